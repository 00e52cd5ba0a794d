"""AWP: one step by hand, BatchNorm, and what stays as it was."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from small_training import QUIET, SHARED, Stop, digits, fit, module_for, same, small_cnn, trainer_for, with_batchnorm

from wdat import models
from wdat.attacks import PGD
from wdat.data.batch import Batch
from wdat.distributed import ALONE, Processes
from wdat.errors import RunError, SettingError
from wdat.objectives import PGDAT, TRADES, Clean
from wdat.training.reweighting import KLReweighting
from wdat.training.weight_perturbation import AWP

pytestmark = QUIET
INNER = {"steps": 2, "step_size": 0.5}


def objective(kind=PGDAT):
    return kind(pointwise_attack=PGD(loss="ce", **INNER))


@pytest.mark.parametrize("kind", [PGDAT, TRADES])
def test_without_a_move_nothing_changes(data, kind):
    plain = fit(module_for(with_batchnorm(), objective(kind)), data, 3)
    perturbed = fit(
        module_for(with_batchnorm(), objective(kind), weight_perturbation=AWP(gamma=0.0, start=0.0)), data, 3
    )
    assert same(plain.network, perturbed.network)


def test_one_step_by_hand(data):
    """Gradient at w, weights moved by γ ‖w‖ g/‖g‖, gradient there, taken from w; BatchNorm's pass is the second."""
    gamma = 0.1
    network, by_hand = with_batchnorm(), with_batchnorm()
    fit(module_for(network, Clean(), weight_perturbation=AWP(gamma=gamma, start=0.0)), data, 1)
    batch = next(iter(data.train_dataloader()))
    parameters = list(by_hand.parameters())
    ascent = copy.deepcopy(by_hand).train()
    first = torch.autograd.grad(F.cross_entropy(ascent(batch.x), batch.y), list(ascent.parameters()))
    before = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for p, g in zip(parameters, first, strict=True):
            if p.dim() > 1:
                p.add_(gamma * p.norm() * g / g.norm())
    by_hand.train()
    second = torch.autograd.grad(F.cross_entropy(by_hand(batch.x), batch.y), parameters)
    with torch.no_grad():
        for p, w, g in zip(parameters, before, second, strict=True):
            p.copy_(w - 0.05 * g)
    for (name, ours), theirs in zip(network.state_dict().items(), by_hand.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6, msg=name)
    assert int(network[1].num_batches_tracked) == 1


def test_it_begins_after_its_share_of_the_run(data, tmp_path):
    """Six steps, the first three of them plain."""
    late = AWP(gamma=0.2, start=0.5)
    plain = fit(module_for(small_cnn(), Clean()), data, -1, epochs=2)
    perturbed = fit(module_for(small_cnn(), Clean(), weight_perturbation=late), data, -1, epochs=2)
    assert not same(plain.network, perturbed.network)
    # Stopped after the third step both are alike, because the share is of the whole run.
    stopped = [module_for(small_cnn(), Clean(), weight_perturbation=awp) for awp in (None, late)]
    for module in stopped:
        with pytest.raises(InterruptedError):
            fit(module, data, -1, epochs=2, callbacks=[Stop(3, tmp_path / "stopped.ckpt")])
    assert same(stopped[0].network, stopped[1].network)


def test_an_interrupted_run_equals_an_uninterrupted_one(tmp_path):
    def make():
        around = {"reweighting": KLReweighting(), "weight_perturbation": AWP(start=0.3)}
        return module_for(with_batchnorm(), objective(TRADES), threat=SHARED, **around)

    whole, path = fit(make(), digits(), -1, epochs=2), tmp_path / "stopped.ckpt"
    with pytest.raises(InterruptedError):
        fit(make(), digits(), -1, epochs=2, callbacks=[Stop(4, path)])
    resumed = make()
    trainer_for(epochs=2).fit(resumed, digits(), ckpt_path=path)
    assert same(resumed.network, whole.network)


class Broken(Clean):
    """Not finite, or an error, at the second pass of a step."""

    def __call__(self, network, batch, context):
        terms = super().__call__(network, batch, context)
        if type(context).__name__ == "Again":
            if self.smooth == "synthetic":
                raise InterruptedError
            terms["clean"] = terms["clean"]._replace(values=math.nan * terms["clean"].values)
        return terms


@pytest.mark.parametrize(("smooth", "error"), [("synthetic", InterruptedError), ("all", RunError)])
def test_a_step_that_fails_leaves_the_weights_where_they_were(data, smooth, error):
    network = small_cnn()
    before = copy.deepcopy(network)
    with pytest.raises(error):
        fit(module_for(network, Broken(smooth=smooth), weight_perturbation=AWP(start=0.0)), data, 1)
    assert same(network, before)


def test_every_process_moves_alike(data, monkeypatch):
    """Two halves of a batch, whose gradients are summed, move the weights as the whole batch does."""
    whole = next(iter(data.train_dataloader()))

    class Two(Processes):
        world_size = 2
        kept = None

        def add(self, values):
            self.kept, one = values.clone(), self.kept
            values.add_(0.0 if one is None else one)

    def moved(parts, processes):
        network = small_cnn().train()
        for part in parts:
            loss = F.cross_entropy(network(part.x), part.y)
            found = AWP(start=0.0).move(network, loss, processes)
            weights = [w.detach().clone() for w in found.weights]
            found.restore()
        return weights

    halves = [Batch(whole.x[k::2], whole.y[k::2], whole.index[k::2], whole.position[k::2], 16, 0) for k in (0, 1)]
    for one, other in zip(moved([whole], ALONE), moved(halves, Two()), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "word"),
    [({"gamma": -0.1}, "weight_perturbation.gamma"), ({"gamma": 1.5}, "weight_perturbation.gamma"),
     ({"start": 1.0}, "weight_perturbation.start")],
)  # fmt: skip
def test_impossible_settings_are_named(options, word):
    with pytest.raises(SettingError, match=word):
        AWP(**options)


def test_a_frozen_network_is_refused():
    network = small_cnn().requires_grad_(False)
    with pytest.raises(SettingError, match=r"weight_perturbation=awp.*finetune=all"):
        module_for(network, Clean(), weight_perturbation=AWP())


def test_training_the_head_moves_the_head_alone(data):
    network = small_cnn()
    before = copy.deepcopy(network.state_dict())
    trained = models.prepare(network, "head")
    fit(module_for(network, Clean(), weight_perturbation=AWP(gamma=0.5, start=0.0)), data, 2)
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]) == (name not in trained), name
