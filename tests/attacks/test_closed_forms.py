"""Cases whose answer is known."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from wdat.attacks import ATTACKS, build
from wdat.evaluation import ImageTensors, evaluate
from wdat.threat import ThreatModel, direction


def _affine(seed: int = 0):
    """A linear network whose logits keep their order on all of [0, 1]^d, so that every image's margin is affine.

    The best wrong class of label 0 is 1, that of 1 and 2 is 0: gradients w1 − w0, w0 − w1, w0 − w2.
    """
    w = torch.randn(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) / 8
    w[2] *= 3
    network = nn.Sequential(nn.Flatten(), nn.Linear(8, 3)).double()
    with torch.no_grad():
        network[1].weight.copy_(w)
        network[1].bias.copy_(torch.tensor([20.0, 10.0, 0.0]))
    generator = torch.Generator().manual_seed(seed + 1)
    x = 0.4 + 0.2 * torch.rand(10, 2, 2, 2, dtype=torch.float64, generator=generator)
    y = torch.arange(10) % 3
    g = torch.stack([w[1] - w[0], w[0] - w[1], w[0] - w[2]])[y].view_as(x)
    j0 = torch.stack([network(x)[i, (1, 0, 0)[int(y[i])]] - network(x)[i, y[i]] for i in range(10)]).detach()
    return network, x, y, g, j0


def _dual(g, norm):
    return g.flatten(1).abs().sum(1) if norm == "linf" else g.flatten(1).square().sum(1).sqrt()


@given(
    p=st.sampled_from([1.5, 2.0, 4.0, math.inf]),
    norm=st.sampled_from(["linf", "l2"]),
    seed=st.integers(0, 20),
    delta=st.sampled_from([0.0, 0.001, 0.05]),
)
def test_the_robust_loss_of_an_affine_margin_is_attained(p, norm, seed, delta):
    """V(δ) = V(0) + δΥ exactly: by Hölder nothing is larger, and W-FGSM attains it where no pixel is clipped."""
    network, x, y, g, j0 = _affine(seed)
    q = 1.0 if math.isinf(p) else p / (p - 1)
    upsilon = float(_dual(g, norm).pow(q).mean() ** (1 / q))
    threat = ThreatModel(p, norm, delta)
    clean = evaluate(network, ImageTensors(x, y), threat, [], losses=["margin"])[0]
    assert clean.upsilon == pytest.approx(upsilon, rel=1e-9)
    assert clean.loss_mean == pytest.approx(float(j0.mean()), rel=1e-9)
    value = float(j0.mean()) + delta * upsilon
    for name, options in (("wfgsm", {}), ("wpgd", {"steps": 12, "step_size": 0.2}), ("wpgd_budget", {})):
        result = build(name, loss="margin", **options)(network, x, y, threat)
        assert result.loss_mean == pytest.approx(value, rel=1e-9)
        if name == "wfgsm":  # the others return the first of equally accurate iterates
            assert result.distance == pytest.approx(delta, rel=1e-9, abs=1e-12)


@given(st.integers(0, 50), st.sampled_from([1.5, 2.0, 4.0]))
def test_no_admissible_perturbation_beats_it(seed, p):
    network, x, y, g, j0 = _affine(3)
    threat = ThreatModel(p, "linf", 0.05)
    best = build("wfgsm", loss="margin")(network, x, y, threat)
    generator = torch.Generator().manual_seed(seed)
    radii = torch.rand(10, dtype=torch.float64, generator=generator)
    radii *= 0.05 / threat.length(radii)
    other = j0 + (g * direction(g, "linf")).flatten(1).sum(1) * radii
    assert float(other.mean()) <= best.loss_mean + 1e-12


def test_the_first_order_estimate_holds_as_the_budget_shrinks(problem):
    """(V(δ) − V(0))/δ → Υ for a smooth network."""
    network, x, y = problem()
    x = 0.2 + 0.6 * x
    threat = ThreatModel(2, "linf", 1e-6)
    clean = evaluate(network, ImageTensors(x, y), threat, [])[0]
    result = build("wfgsm")(network, x, y, threat)
    assert (result.loss_mean - clean.loss_mean) / 1e-6 == pytest.approx(clean.upsilon, rel=1e-3)


@pytest.mark.parametrize("name", [n for n, a in ATTACKS.items() if not a.for_training])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_no_budget_leaves_the_clean_accuracy(problem, name, norm):
    network, x, y = problem()
    result = build(name)(network, x, y, ThreatModel(2, norm, 0))
    assert torch.equal(result.x_adv, x)
    assert result.distance == 0.0
    assert result.accuracy == float((network(x).argmax(1) == y).double().mean())


@pytest.mark.parametrize("name", ["fgsm", "pgd", "wfgsm", "wpgd", "wpgd_budget"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("share", [0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_largest_budgets_stay_finite_and_still_attack(problem, name, norm, share, dtype):
    network, x, y = problem(dtype=dtype)
    diameter = 1.0 if norm == "linf" else x[0].numel() ** 0.5
    result = build(name)(network, x, y, ThreatModel(2, norm, share * diameter))
    assert bool(result.x_adv.isfinite().all())
    assert math.isfinite(result.distance)
    assert result.accuracy < float((network(x).argmax(1) == y).double().mean())
