"""Every attack against an independent implementation, image by image in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from wdat.attacks import Context, build, sensitivity_radii
from wdat.sensitivity import Exact
from wdat.threat import ThreatModel

CLOSE = {"rtol": 1e-6, "atol": 1e-9}


@pytest.mark.parametrize("p", [1.5, 2.0, 8.0, math.inf])
@pytest.mark.parametrize(("norm", "delta"), [("linf", 0.1), ("l2", 0.5)])
@pytest.mark.parametrize("loss", ["ce", "redlr"])
def test_wpgd(problem, textbook, p, norm, delta, loss):
    network, x, y = problem()
    result = build("wpgd", steps=6, step_size=0.4, loss=loss)(network, x, y, ThreatModel(p, norm, delta))
    expected = textbook.wpgd(network, x, y, p, norm, delta, 6, 0.4, loss)
    assert_close(result.x_adv, torch.from_numpy(expected.x), **CLOSE)
    assert result.accuracy == pytest.approx(expected.accuracy)
    assert result.loss_mean == pytest.approx(expected.loss_mean, rel=1e-6)


@pytest.mark.parametrize("p", [1.5, 2.0, math.inf])
@pytest.mark.parametrize(("norm", "delta"), [("linf", 0.1), ("l2", 0.5)])
@pytest.mark.parametrize("loss", ["ce", "margin"])
def test_wpgd_budget_and_pgd(problem, textbook, p, norm, delta, loss):
    network, x, y = problem()
    threat = ThreatModel(p, norm, delta)
    n = textbook.norms(network, x, y, loss, norm)
    q = threat.q
    radii = (delta * (n / float((n**q).mean() ** (1 / q))) ** (q - 1)).tolist()
    expected = textbook.pgd(network, x, y, radii, norm, 5, 0.4, loss, loss)
    for name in ["wpgd_budget"] + ["pgd"] * threat.is_pointwise:
        result = build(name, steps=5, step_size=0.4, loss=loss)(network, x, y, threat)
        assert_close(result.x_adv, torch.from_numpy(expected.x), **CLOSE)
        assert result.accuracy == pytest.approx(expected.accuracy)
        assert result.loss_mean == pytest.approx(expected.loss_mean, rel=1e-6)
        assert_close(result.radii, torch.tensor(radii, dtype=torch.float64), **CLOSE)


def _madry(network, x, y, epsilon, alpha, steps):
    """PGD as everybody writes it."""
    z = x.clone()
    for _ in range(steps):
        z.requires_grad_(True)
        (g,) = torch.autograd.grad(F.cross_entropy(network(z), y, reduction="sum"), z)
        z = z.detach() + alpha * g.sign()
        z = torch.clamp(torch.min(torch.max(z, x - epsilon), x + epsilon), 0, 1)
    return z


@pytest.mark.parametrize("name", ["fgsm", "wfgsm"])
def test_fgsm(problem, name):
    network, x, y = problem()
    result = build(name)(network, x, y, ThreatModel(math.inf, "linf", "8/255"))
    assert_close(result.x_adv, _madry(network, x, y, 8 / 255, 8 / 255, 1), **CLOSE)


@pytest.mark.parametrize("name", ["pgd", "wpgd", "wpgd_budget"])
def test_pgd_is_madrys(problem, name):
    network, x, y = problem()
    attack = build(name, steps=10, step_size=0.25)
    result = attack(network, x, y, ThreatModel(math.inf, "linf", "8/255"), Context(training=True))
    assert_close(result.x_adv, _madry(network, x, y, 8 / 255, 2 / 255, 10), **CLOSE)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_wpgd_at_p_inf_is_pgd(problem, norm):
    network, x, y = problem()
    threat = ThreatModel(math.inf, norm, 0.2)
    assert_close(
        build("wpgd", steps=8, step_size=0.3)(network, x, y, threat).x_adv,
        build("pgd", steps=8, step_size=0.3)(network, x, y, threat.pointwise()).x_adv,
        **CLOSE,
    )


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_pointwise_attacks_are_pointwise_under_any_order(problem, norm):
    network, x, y = problem()
    for name in ("fgsm", "pgd"):
        results = [build(name)(network, x, y, ThreatModel(p, norm, 0.1)) for p in (1, 2, math.inf)]
        assert {r.threat.p for r in results} == {math.inf}
        assert all(torch.equal(r.x_adv, results[0].x_adv) for r in results)


@pytest.mark.parametrize("given", [False, True])
def test_uniform_radii_with_noise_are_trades_own_attack(problem, given):
    """github.com/yaodongyu/TRADES: 0.001·N(0, 1), then signs of the summed KL in eval mode."""
    network, x, y = problem()
    network = torch.nn.Sequential(network, torch.nn.Dropout(0.5)).eval()
    noise = 0.001 * torch.randn(x.shape, generator=torch.Generator().manual_seed(3)).to(x)
    z = x + noise
    for _ in range(10):
        z = z.detach().requires_grad_(True)
        kl = F.kl_div(F.log_softmax(network(z), 1), F.softmax(network(x), 1), reduction="sum")
        (g,) = torch.autograd.grad(kl, z)
        z = z.detach() + 0.007 * g.sign()
        z = torch.clamp(torch.min(torch.max(z, x - 0.031), x + 0.031), 0, 1)

    log_clean = network(x).log_softmax(1).detach() if given else None
    network.train()
    context = Context(training=True, noise=lambda: noise, log_clean=log_clean)
    attack = build("pgd", loss="kl", steps=10, step_size=0.007 / 0.031)
    result = attack(network, x, y, ThreatModel(math.inf, "linf", 0.031), context)
    assert_close(result.x_adv, z, **CLOSE)
    assert network.training


def _running(n: torch.Tensor, q: float) -> Exact:
    """Υ of a training set whose norms are `n`."""
    exact = Exact()
    exact.q = q
    exact.measured(torch.arange(len(n)), n)
    return exact


def test_training_leaves_out_images_of_radius_zero_without_a_change(problem, textbook):
    network, x, y = problem()
    threat = ThreatModel(2, "linf", 0.1)
    attack = build("wpgd_budget", steps=4, step_size=0.5, loss="kl", radii_loss="redlr")
    running = _running(torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64), 2.0)
    sizes = []
    handle = network.register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[0])))
    result = attack(network, x, y, threat, Context(training=True, sensitivity=running))
    handle.remove()
    wrong = network(x).argmax(1) != y
    assert 0 < int(wrong.sum()) < len(x)
    assert_close(result.radii > 0, ~wrong)
    assert sizes == [len(x)] + [int((~wrong).sum())] * 3  # later steps see only the images that move
    n = textbook.norms(network, x, y, "redlr", "linf")
    assert_close(result.radii, sensitivity_radii(n, running.upsilon(), 2.0, 0.1), **CLOSE)
    expected = textbook.pgd(network, x, y, result.radii.tolist(), "linf", 4, 0.5, "redlr", "kl")[-1]
    assert_close(result.x_adv, torch.from_numpy(expected), **CLOSE)
    assert torch.equal(result.x_adv[wrong], x[wrong])


def test_training_wpgd_gets_the_share_that_the_running_upsilon_grants(problem, textbook):
    network, x, y = problem()
    n = textbook.norms(network, x, y, "ce", "linf")
    upsilon = 2.5
    share = 0.1 * float((n**2).mean().sqrt()) / upsilon
    context = Context(training=True, sensitivity=_running(torch.tensor([upsilon], dtype=torch.float64), 2.0))
    result = build("wpgd", steps=6, step_size=0.4)(network, x, y, ThreatModel(2, "linf", 0.1), context)
    expected = textbook.wpgd(network, x, y, 2, "linf", share, 6, 0.4, "ce")
    assert_close(result.x_adv, torch.from_numpy(expected.last), **CLOSE)
    assert result.distance <= share * (1 + 1e-9)
    assert result.accuracy is None
    assert result.loss_mean is None


@pytest.mark.parametrize("name", ["wpgd", "wpgd_budget", "wfgsm", "pgd"])
def test_training_returns_the_last_iterate(problem, name):
    network, x, y = problem()
    threat = ThreatModel(2, "linf", 0.05)
    calls = []
    result = build(name, steps=3)(network, x, y, threat, Context(training=True, progress=lambda *a: calls.append(a)))
    assert result.accuracy is result.correct is result.loss_mean is None
    assert result.distance <= 0.05 + 1e-9
    assert calls[:2] == [(1, 3), (2, 3)]
