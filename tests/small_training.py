"""Short trainings of small networks on digits, as the tests of the module make them."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import lightning as L
import pytest
import torch
from torch import nn

from wdat import models
from wdat.attacks import build
from wdat.data import ImageDataModule
from wdat.objectives import WDAT
from wdat.sensitivity import Batch
from wdat.threat import ThreatModel
from wdat.training.module import WDATModule
from wdat.training.schedulers import Constant

CONF = Path(__file__).parents[1] / "conf"
SEED = 11
DELTA = 8 / 255
EVERYONE = ThreatModel(math.inf, "linf", DELTA)
SHARED = ThreatModel(2, "linf", DELTA)
ATTACKS = ["wpgd_budget", "wpgd", "wfgsm", "pgd", "fgsm", "wrm", "udr"]
OBJECTIVES = ["wdat", "trades", "combined", "pgd_at", "mart", "attack_at", "dual_ascent", "clean"]
ESTIMATORS = ["table", "subsample", "exact", "batch", "ema"]


def digits(kind=ImageDataModule, **options):
    settings = {"batch_size": 16, "val_size": 32, "limit_train": 48, "limit_test": 16, "flip": False, "seed": SEED}
    data = kind("digits", 10, **{**settings, **options})
    data.prepare_data()
    data.setup()
    return data


def small_cnn():
    return models.load_network("small_cnn", seed=SEED)


def with_batchnorm():
    torch.manual_seed(SEED)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 10),
    ).eval()


NETWORKS = {"small_cnn": small_cnn, "batchnorm": with_batchnorm}
QUIET = [
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings(r"ignore:.*module\(s\) in eval mode at the start of training"),
]
SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9)


def module_for(network, objective=None, attack=None, threat=SHARED, sensitivity=None, **options):
    settings = {
        "optimizer": SGD, "scheduler": Constant(), "keep_eval": models.keep_frozen_in_eval, "seed": SEED,
        "notify": print,
    }  # fmt: skip
    return WDATModule(
        network,
        objective or WDAT(),
        attack or build("wpgd_budget", loss="kl", steps=2, step_size=0.5),
        threat,
        sensitivity or Batch(),
        **{**settings, **options},
    )


def trainer_for(steps=-1, epochs=100, callbacks=(), **options):
    quiet = {
        "accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False, "num_sanity_val_steps": 0,
        "enable_progress_bar": False, "enable_model_summary": False, "limit_val_batches": 0, "inference_mode": False,
        "use_distributed_sampler": False,
    }  # fmt: skip
    return L.Trainer(max_steps=steps, max_epochs=epochs, callbacks=list(callbacks), **{**quiet, **options})


def fit(module, data, steps=3, **options):
    trainer = trainer_for(steps, **options)
    trainer.fit(module, data)
    return module


def same(one, other):
    """Equality to the bit, of parameters and statistics."""
    mine, theirs = one.state_dict(), other.state_dict()
    return all(torch.equal(mine[key], theirs[key]) for key in mine)


class Outputs(L.Callback):
    """What the training steps have returned."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append(outputs)


class Stop(L.Callback):
    """Stops a run after so many steps, as a kill would, with a checkpoint."""

    def __init__(self, steps, path):
        self.steps, self.path = steps, path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.steps:
            trainer.save_checkpoint(self.path)
            raise InterruptedError


def distributional(name="wpgd_budget", inner=4):
    return build(name, loss="kl", steps=inner, step_size=0.25)
