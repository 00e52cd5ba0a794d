"""The modes of the network in a training step, and what is frozen."""

from __future__ import annotations

import copy

import lightning as L
import pytest
import torch
from small_training import QUIET, SGD, fit, module_for, small_cnn, trainer_for, with_batchnorm

from wdat import models

pytestmark = QUIET


class Flags(L.Callback):
    """The train flags of the network at each training step."""

    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.append([m.training for m in pl_module.network.modules()])


def test_the_network_trains_in_train_mode_also_after_validation(data):
    flags = Flags()
    module = module_for(with_batchnorm())
    trainer_for(epochs=2, callbacks=[flags], limit_val_batches=1).fit(module, data)
    assert len(flags.seen) == 6
    assert all(map(all, flags.seen))


@pytest.mark.parametrize("prepared", [True, False])
def test_training_the_head_leaves_the_rest_alone(data, prepared):
    network = with_batchnorm()
    before = copy.deepcopy(network.state_dict())
    trained = models.prepare(network, "head")
    module = module_for(network, keep_eval=models.keep_frozen_in_eval if prepared else None)
    trainer_for(epochs=2, limit_val_batches=1).fit(module, data)
    changed = {key for key, value in network.state_dict().items() if not torch.equal(value, before[key])}
    statistics = {key for key in before if "running" in key or "tracked" in key}
    assert changed == ({*trained} if prepared else {*trained} | statistics)
    assert set(trained) == {"7.weight", "7.bias"}


def test_only_what_is_trained_is_given_to_the_optimiser(data):
    network = small_cnn()
    models.prepare(network, "head")
    given = []

    def optimizer(parameters):
        given.extend(parameters)
        return SGD(parameters)

    fit(module_for(network, optimizer=optimizer), data, 1)
    assert {id(p) for p in given} == {id(p) for p in network.parameters() if p.requires_grad}


def test_the_schedule_scales_to_the_length_of_the_run(data):
    seen = []

    def shape(t):
        seen.append(t)
        return 1 - t / 2

    module = fit(module_for(small_cnn(), scheduler=shape), data, -1, epochs=2)
    assert sorted(set(seen)) == pytest.approx([k / 6 for k in range(7)])  # two epochs of three steps
    assert module.optimizers().param_groups[0]["lr"] == pytest.approx(0.05 * 0.5)
