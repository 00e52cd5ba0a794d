"""A compiler back end that counts: every forward pass of a training step is compiled, those of evaluation are not."""

from __future__ import annotations

from functools import partial

import lightning as L
import pytest
import torch
from sampled import sampled
from torch import nn

import wdat
from wdat import models
from wdat.attacks import build
from wdat.data import ImageDataModule
from wdat.objectives import WDAT, Combined
from wdat.sensitivity import Exact, Table
from wdat.training.callbacks import RobustEvaluation
from wdat.training.module import WDATModule
from wdat.training.schedulers import Constant

pytestmark = [
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*"),
]


def small():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, 4), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 64, 10)
    ).eval()


class Count(L.Callback):
    """Passes since the last step, after each step and after each evaluation."""

    def __init__(self):
        self.passes, self.seen = 0, []

    def once(self, *_):
        self.passes += 1

    def note(self, what):
        self.seen.append((what, self.passes))
        self.passes = 0

    def on_train_start(self, *_):
        self.note("before")

    def on_train_batch_end(self, *_):
        self.note("step")

    def on_validation_end(self, *_):
        self.note("evaluation")

    def on_test_end(self, *_):
        self.note("evaluation")


@pytest.fixture(scope="module")
def data():
    data = ImageDataModule("digits", 10, val_size=300, batch_size=64, flip=False, seed=0, limit_test=150,
                           limit_train=300)  # fmt: skip
    data.prepare_data()
    data.setup()
    return data


def run(data, count, network, precision, radii_loss, objective, sensitivity):
    """A test, a training of one epoch with validation, and a test."""
    few = {"steps": 2, "step_size": 0.5, "batch_size": 64}
    attack = build("wpgd_budget", loss="kl", radii_loss=radii_loss, steps=3, step_size=0.4, radius_max=4.0)
    threat = wdat.ThreatModel(2, "linf", 0.1)
    module = WDATModule(
        network, objective, attack, threat, sensitivity(), partial(torch.optim.SGD, lr=0.01), Constant(), seed=0
    )
    evaluation = RobustEvaluation(threat, [build("pgd", **few), build("wpgd", loss="redlr", **few)], batch_size=64)
    trainer = L.Trainer(
        max_epochs=1, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, precision=precision,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, use_distributed_sampler=False,
        inference_mode=False, callbacks=[evaluation, count],
    )  # fmt: skip
    trainer.test(module, data, verbose=False)
    trainer.fit(module, data)
    trainer.test(module, data, verbose=False)
    return [passes for what, passes in count.seen if what == "step"], [p for w, p in count.seen if w == "evaluation"]


PGD = build("pgd", loss="kl", steps=2, step_size=0.5)
CASES = {
    "W-DAT": ("32-true", "ce", WDAT(), Table),
    "images without a radius": ("bf16-mixed", "redlr", WDAT(), Table),
    "combined": ("bf16-mixed", "redlr", Combined(pointwise_attack=PGD), partial(Exact, every=2)),
}


@pytest.mark.parametrize("name", sampled(CASES, 2))
def test_every_pass_of_a_step_is_compiled(data, name):
    """With batches of several sizes too: images whose radius is zero take no steps."""
    eager, compiled, graphs = Count(), Count(), []

    def backend(graph, inputs):
        graphs.append(graph)

        def call(*given):
            compiled.once()
            return graph.forward(*given)

        return call

    plain = small()
    plain.register_forward_pre_hook(eager.once)
    steps, evaluations = run(data, eager, plain, *CASES[name])
    network = models.accelerate(small(), compiled=True, backend=backend)
    found, evaluated = run(data, compiled, network, *CASES[name])
    assert min(steps) >= 4
    steps[0] -= 2  # whether train and eval mode agree is tried once
    assert found == steps, f"of {steps} passes {found} are compiled, in {len(graphs)} graphs"
    assert len(graphs) <= 4, "torch.compile keeps eight of a function and then gives up without a word"
    assert evaluated == [0] * len(evaluations)
