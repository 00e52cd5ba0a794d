"""What the attack of a training step is given."""

from __future__ import annotations

import pytest
import torch
from small_training import QUIET, SEED, fit, module_for, small_cnn, with_batchnorm
from torch import nn

from wdat import models
from wdat.attacks.budget import PGD, WPGDBudget
from wdat.errors import ConstraintError
from wdat.seeding import normal
from wdat.sensitivity import Table

pytestmark = QUIET


class Spy(PGD):
    """PGD that remembers what it was given."""

    def __call__(self, network, x, y, threat, context=None):
        with torch.no_grad():
            modes = [m.training for m in network.modules()]
            network.eval()
            self.seen = (context, x, network(x).log_softmax(1))
            for module, mode in zip(network.modules(), modes, strict=True):
                module.training = mode
        return super().__call__(network, x, y, threat, context)


class Dropping(nn.Module):
    """Identity in eval mode; in train mode it drops images' features, by the flag `training`, as timm's DropPath."""

    def forward(self, x):
        return x * 0.5 if self.training else x


def layered(layer):
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3072, 16), nn.Tanh(), layer, nn.Linear(16, 10))


AGREE = {"plain": lambda: nn.Identity(), "layernorm": lambda: nn.LayerNorm(16), "dropout_0": lambda: nn.Dropout(0.0)}
DIFFER = {
    "batchnorm": lambda: nn.BatchNorm1d(16),
    "dropout": lambda: nn.Dropout(0.5),
    "rrelu": lambda: nn.RReLU(),
    "own": lambda: Dropping(),
}


@pytest.mark.parametrize("layer", ["plain", "layernorm"])
def test_clean_log_probabilities_are_shared_where_the_modes_agree(data, layer):
    spy = Spy(loss="kl", steps=2)
    fit(module_for(layered(AGREE[layer]()), attack=spy), data, 2)
    context, _, wanted = spy.seen
    torch.testing.assert_close(context.log_clean, wanted)
    assert not context.log_clean.requires_grad


@pytest.mark.parametrize("layer", DIFFER)
def test_clean_log_probabilities_are_not_shared_where_the_modes_differ(data, layer):
    spy = Spy(loss="kl", steps=2)
    fit(module_for(layered(DIFFER[layer]()), attack=spy), data, 2)
    context, _, wanted = spy.seen
    if context.log_clean is not None:  # allowed only if they are those of eval mode
        torch.testing.assert_close(context.log_clean, wanted)


def test_frozen_batchnorm_is_shared_again(data):
    network = with_batchnorm()
    models.prepare(network, "head")
    spy = Spy(loss="kl", steps=2)
    fit(module_for(network, attack=spy), data, 2)
    assert spy.seen[0].log_clean is not None


class Kept(WPGDBudget):
    """W-PGD-budget that remembers what surrounded it."""

    def __call__(self, network, x, y, threat, context=None):
        self.context = context
        return super().__call__(network, x, y, threat, context)


@pytest.mark.parametrize("trained", ["all", "head"])
def test_one_clean_pass_serves_loss_and_radii_unless_the_backbone_is_frozen(data, trained):
    network = small_cnn()
    models.prepare(network, trained)
    kept = Kept(loss="kl", steps=2, step_size=0.5)
    fit(module_for(network, attack=kept), data, 2)
    assert (kept.context.clean_pass is not None) == (trained == "all")


def test_sharing_the_clean_pass_changes_nothing(data, monkeypatch):
    def trained():
        network = small_cnn()
        fit(module_for(network, sensitivity=Table()), data, 3)
        return network

    shared = trained()
    monkeypatch.setattr("wdat.training.step.is_compiled", lambda network: True)  # a compiled network can't share
    for mine, theirs in zip(shared.parameters(), trained().parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("precision", ["32-true", "64-true"])
def test_noise_is_that_of_the_seed_and_the_step(data, precision):
    spy = Spy(loss="kl", steps=2)
    fit(module_for(small_cnn(), attack=spy), data, 3, precision=precision)
    context, x, _ = spy.seen
    wanted = 0.001 * normal(SEED, "noise", 2, torch.arange(len(x)), x[0].numel()).view_as(x)
    torch.testing.assert_close(context.noise().float(), wanted)
    assert context.training


class Cheat(WPGDBudget):
    """Moves one image twice as far as it may."""

    def _run(self, *arguments):
        moved = super()._run(*arguments)
        moved.x_adv = moved.x_adv.clone()
        moved.x_adv[0] = (arguments[1][0] + 3 * moved.radii[0] * (arguments[1][0] < 0.5)).clamp(0, 1)
        return moved


def test_an_attack_that_leaves_its_radius_is_caught_before_any_update(data):
    network = small_cnn()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    module = module_for(network, attack=Cheat(loss="kl", steps=2), sensitivity=Table())
    with pytest.raises(ConstraintError, match="beyond its radius"):
        fit(module, data, 2)
    for key, value in network.state_dict().items():
        assert torch.equal(before[key], value), key
