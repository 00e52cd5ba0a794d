"""Attacks without a hard budget, WRM and UDR: closed forms on a linear network, and what they learn."""

from __future__ import annotations

import math

import pytest
import torch
from sampled import product
from torch import nn
from torch.testing import assert_close

from wdat.attacks import PGD, UDR, WRM, Context
from wdat.errors import SettingError
from wdat.objectives import TRADES
from wdat.sensitivity import Exact
from wdat.threat import ThreatModel, direction, dual_norm, per_image


def linear(n=12, classes=2):
    """Two classes, so that the margin is linear; images away from the border of [0, 1]."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        network = nn.Sequential(nn.Flatten(), nn.Linear(27, classes)).double()
        x = 0.3 + 0.4 * torch.rand(n, 3, 3, 3, dtype=torch.float64)
        y = torch.randint(classes, (n,))
    return network, x, y


def gradients(network, x, y):
    weight = network[1].weight.detach()
    return (weight[1 - y] - weight[y]).reshape_as(x)


def training(values, noise=None):
    estimator = Exact()
    estimator.measured(torch.arange(len(values)), values)
    return Context(sensitivity=estimator, index=torch.arange(len(values)), noise=noise, training=True)


# --- WRM ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 4, 15])
@pytest.mark.parametrize("gamma", [0.4, 3.0])
def test_wrm_moves_by_the_gradient_over_twice_gamma_until_the_box(gamma, steps):
    network, x, y = linear()
    g = gradients(network, x, y)
    attack = WRM(loss="margin", gamma=gamma, steps=steps)
    result = attack(network, x, y, ThreatModel(2, "l2", 0.1), training(dual_norm(g, "l2")))
    wanted = (x + g / (2 * gamma)).clamp(0, 1)
    assert_close(result.x_adv, wanted)
    assert bool(((wanted == 0) | (wanted == 1)).any()) == (gamma == 0.4)
    assert (result.distances <= result.radii * (1 + 1e-9)).all()


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("p", [1.5, 2, 3])
def test_wrm_maximises_the_loss_minus_the_price_of_transport(p, norm):
    network, x, y = linear()
    g = gradients(network, x, y)
    n, gamma = dual_norm(g, norm), 40.0
    attack = WRM(loss="margin", gamma=gamma, steps=5)
    result = attack(network, x, y, ThreatModel(p, norm, 0.1), training(n))
    assert_close(result.x_adv, x + per_image((n / (p * gamma)) ** (1 / (p - 1)), x) * direction(g, norm))
    along = torch.linspace(0, 3, 400, dtype=torch.float64)[:, None] * result.distances  # no other length does better
    assert ((n * along - gamma * along**p).max(0).values <= n * result.distances - gamma * result.distances**p).all()


def length(result, p):
    """W_p length of the set's move, which a step in training doesn't read from the device."""
    return float((result.distances**p).mean() ** (1 / p))


@pytest.mark.parametrize(("norm", "p", "factor"), product(["linf", "l2"], [2, 3], [0.5, 1.0, 4.0], every=5))
def test_the_price_adapts_until_the_budget_is_spent(p, norm, factor):
    network, x, y = linear()
    n = dual_norm(gradients(network, x, y), norm)
    threat = ThreatModel(p, norm, 0.05)
    right = float((n**threat.q).mean() ** (1 / threat.q)) / (p * threat.delta ** (p - 1))
    attack, context = WRM(loss="margin", steps=2), training(n)
    first = attack(network, x, y, threat, context)
    assert length(first, p) == pytest.approx(threat.delta, rel=1e-6), "on a linear network Υ gives the price"
    attack.load_state_dict({"log_gamma": math.log(factor * right)})
    for _ in range(300):
        result = attack(network, x, y, threat, context)
    assert math.exp(attack.state_dict()["log_gamma"]) == pytest.approx(right, rel=1e-3)
    assert length(result, p) == pytest.approx(threat.delta, rel=1e-3)


def test_a_fixed_price_stays():
    network, x, y = linear()
    attack = WRM(gamma=2.0)
    attack(network, x, y, ThreatModel(2, "l2", 0.1), training(torch.ones(12)))
    assert attack.state_dict() == {"log_gamma": None}


def test_without_a_budget_wrm_moves_nothing():
    network, x, y = linear()
    result = WRM()(network, x, y, ThreatModel(2, "l2", 0), training(torch.ones(12)))
    assert torch.equal(result.x_adv, x)


# --- UDR ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_udr_with_a_hard_wall_is_pgd(norm):
    network, x, y = linear()
    context = training(torch.ones(12), noise=lambda: 0.001 * torch.ones_like(x))
    threat = ThreatModel(2, norm, 0.05)
    ours = UDR(steps=6, step_size=0.4, tau=0.4)(network, x, y, threat, context)
    theirs = PGD(steps=6, step_size=0.4)(network, x, y, threat, context)
    assert_close(ours.x_adv, theirs.x_adv, rtol=0, atol=1e-12)
    assert_close(ours.radii, theirs.radii)


def test_udr_takes_back_a_share_of_what_leaves_the_ball():
    network, x, y = linear()
    sign, delta, alpha, share = gradients(network, x, y).sign(), 0.04, 0.3 * 0.04, 0.5
    context = training(torch.ones(12), noise=lambda: torch.zeros_like(x))
    attack = UDR(loss="margin", steps=7, step_size=0.3, tau=0.6)
    result = attack(network, x, y, ThreatModel(2, "linf", delta), context)
    d = 0.0
    for _ in range(7):
        d += alpha
        d -= share * (d - delta) if d > delta else 0.0
    assert d > delta
    assert_close(result.x_adv, x + d * sign)
    assert (result.distances <= result.radii * (1 + 1e-9)).all()


def test_the_multiplier_follows_the_pixels():
    network, x, y = linear()
    delta, context = 0.04, training(torch.ones(12), noise=lambda: torch.zeros_like(x))
    attack = UDR(loss="margin", steps=2, step_size=0.25, tau=0.25, multiplier=0.9, rate=2.0, every=3)
    for _ in range(2):
        attack(network, x, y, ThreatModel(2, "linf", delta), context)
    assert attack.state_dict() == {"multiplier": 0.9, "batches": 2}
    attack(network, x, y, ThreatModel(2, "linf", delta), context)
    assert attack.state_dict()["multiplier"] == pytest.approx(0.9 - 2.0 * (delta - 2 * 0.25 * delta))
    other = UDR()
    other.load_state_dict(attack.state_dict())
    assert other.hardness == pytest.approx(attack.hardness)


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options", "word"),
    [
        (WRM, {"gamma": 0.0}, "attack.gamma"),
        (WRM, {"gamma": math.nan}, "attack.gamma"),
        (WRM, {"rate": 0.0}, "attack.rate"),
        (UDR, {"tau": 0.0}, "attack.tau"),
        (UDR, {"multiplier": -1.0}, "attack.multiplier"),
        (UDR, {"rate": -0.1}, "attack.rate"),
        (UDR, {"every": 0}, "attack.every"),
    ],
)
def test_impossible_settings_are_named(kind, options, word):
    with pytest.raises(SettingError, match=word):
        kind(**options)


def test_wrm_needs_an_order_that_has_a_price():
    with pytest.raises(SettingError, match=r"threat\.p=inf.*threat\.p=2"):
        WRM().threat_of(ThreatModel(math.inf, "linf", 0.1))
    with pytest.raises(SettingError, match=r"threat\.p"):
        WRM().threat_of(ThreatModel(1, "linf", 0.1))


@pytest.mark.parametrize("kind", [WRM, UDR])
def test_they_train_only(kind):
    network, x, y = linear()
    with pytest.raises(SettingError, match="trains only; to evaluate, use knapsack"):
        kind()(network, x, y, ThreatModel(2, "linf", 0.1))


def test_the_images_of_a_pointwise_term_have_no_multiplier():
    with pytest.raises(SettingError, match=r"objective\.pointwise_attack=udr.*attack=udr"):
        TRADES(pointwise_attack=UDR())
