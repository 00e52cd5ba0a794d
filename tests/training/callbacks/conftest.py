"""Shared by the tests of the callbacks: small data, a small module and a quiet trainer."""

from __future__ import annotations

import logging
from functools import partial

import lightning as L
import pytest
import torch

from wdat.attacks import build
from wdat.data import ImageDataModule
from wdat.models import load_network
from wdat.objectives import WDAT
from wdat.sensitivity import Subsample
from wdat.threat import ThreatModel
from wdat.training.callbacks import RobustEvaluation
from wdat.training.module import WDATModule
from wdat.training.schedulers import Constant

logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)


@pytest.fixture(scope="session")
def digits():
    """`digits(**options)`: 48 training images in batches of 16, 37 for validation and 41 for testing."""

    def make(**options):
        settings = {"batch_size": 16, "val_size": 37, "limit_train": 48, "limit_test": 41, "flip": False, "seed": 3}
        data = ImageDataModule("digits", 10, **{**settings, **options})
        data.prepare_data()
        data.setup()
        return data

    return make


@pytest.fixture(scope="session")
def weights(digits):
    """Of a network that has learnt a little, so that accuracies lie inside (0, 1)."""
    network = load_network("small_cnn", seed=1).train()
    images = digits(limit_train=None).images("train")
    optimizer = torch.optim.Adam(network.parameters(), 2e-3)
    for step in range(25):
        rows = torch.randperm(len(images), generator=torch.Generator().manual_seed(step))[:64]
        optimizer.zero_grad()
        logits = network(images.pixels(rows, None).float() / 255)
        torch.nn.functional.cross_entropy(logits, images.labels[rows]).backward()
        optimizer.step()
    return network.state_dict()


@pytest.fixture
def network(weights):
    network = load_network("small_cnn")
    network.load_state_dict(weights)
    return network


@pytest.fixture
def make_module(network):
    """`make_module(**settings)`: W-DAT at p = 2 with the module's settings overridden."""

    def make(**settings):
        defaults = {
            "network": network,
            "objective": WDAT(),
            "attack": build("wpgd_budget", loss="kl", steps=2, step_size=0.5, radius_max=4),
            "threat": ThreatModel(2, "linf", 0.1),
            "sensitivity": Subsample(16, 1),
            "optimizer": partial(torch.optim.SGD, lr=0.001),
            "scheduler": Constant(),
        }
        return WDATModule(**{**defaults, **settings})

    return make


@pytest.fixture
def make_evaluation():
    """`make_evaluation(**options)`: the pointwise attack stops short of its budget, so the two differ."""

    def make(pointwise_step=0.15, **options):
        pointwise = build("pgd", loss="ce", steps=5, step_size=pointwise_step)
        attacks = [pointwise, build("wpgd", loss="ce", steps=5, step_size=0.375)]
        return RobustEvaluation(options.pop("threat", ThreatModel(2, "linf", 0.1)), attacks, **options)

    return make


@pytest.fixture
def make_trainer(tmp_path):
    def make(*callbacks, **options):
        quiet = {
            "accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False,
            "num_sanity_val_steps": 0, "enable_progress_bar": False, "enable_model_summary": False,
            "use_distributed_sampler": False, "inference_mode": False, "max_epochs": 1, "default_root_dir": tmp_path,
            "log_every_n_steps": 1,
        }  # fmt: skip
        return L.Trainer(callbacks=list(callbacks), **{**quiet, **options})

    return make
