"""The randomised bound: limits that cover, a minimum that is never too large, noise that is the image's own."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from certify.conftest import image
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linprog
from torch import nn

from wdat.certify import Smoothing, Surroundings
from wdat.certify.smoothing import clopper_pearson, lower_bound, minima
from wdat.errors import SettingError
from wdat.threat import ThreatModel


@pytest.fixture(scope="module")
def problem():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Flatten(), nn.Linear(108, 4))
    x = torch.stack([image(seed) for seed in range(10)]).float()
    return network, x, network(x).argmax(1)


def test_limits_cover():
    """Of simulated binomials at most a share `level` has its limit above its probability."""
    generator = np.random.default_rng(0)
    for p in (0.02, 0.3, 0.9, 0.999):
        hits = torch.from_numpy(generator.binomial(200, p, 20_000))
        above = float((clopper_pearson(hits, 200, 0.05) > p).double().mean())
        assert above <= 0.05 + 4 * math.sqrt(0.05 * 0.95 / 20_000)


def test_limits_of_all_images_hold_at_once():
    """α is shared among the images."""
    generator = np.random.default_rng(1)
    p = generator.uniform(0.1, 0.99, 50)
    hits = torch.from_numpy(generator.binomial(100, p, (2_000, 50)))
    above = (clopper_pearson(hits, 100, 0.1 / 50) > torch.from_numpy(p)).any(1)
    assert float(above.double().mean()) <= 0.1 + 4 * math.sqrt(0.09 / 2_000)


def test_limits_of_none_and_all():
    """No hit gives 0, n of n the closed form level^(1/n)."""
    found = clopper_pearson(torch.tensor([0, 100]), 100, 0.01)
    assert found.tolist() == pytest.approx([0.0, 0.01**0.01])


@given(
    a=st.lists(st.floats(-4, 5), min_size=1, max_size=5), log=st.floats(-12, 0), unit=st.floats(0.01, 20),
    p=st.sampled_from([1.0, 1.3, 2.0, 3.0, 6.0]),
)  # fmt: skip
def test_the_minimum_against_brute_force(a, log, unit, p):
    """Never above the least value on a fine grid, and close below it."""
    values, weight = torch.tensor([*a, -torch.inf], dtype=torch.float64), math.exp(log)
    found = minima(values, weight, unit, p, 1e-6)
    t = torch.cat([torch.linspace(0, 16, 40_001), torch.logspace(-9, 4, 4_000)]).double()
    brute = (torch.special.ndtr(values[:, None] - t) + weight * (t / unit) ** p).amin(1)
    assert bool((found <= brute + 1e-15).all())
    assert bool((found >= brute - 1e-4).all())
    assert float(found[-1]) == 0


@pytest.mark.parametrize("p", [1, 2, 4])
@pytest.mark.parametrize("delta", [0.02, 0.1, 0.3])
def test_the_bound_is_the_value_of_the_best_attack(p, delta):
    """A linear program moves shares of each image by lengths on a grid; by duality its value is the bound's."""
    sigma, limits = 0.12, torch.tensor([0.0, 0.2, 0.6, 0.9, 0.98, 0.999], dtype=torch.float64)
    lengths = np.linspace(0, 2.0, 1501)
    h = torch.special.ndtr(torch.special.ndtri(limits)[:, None] - torch.from_numpy(lengths) / sigma).numpy()
    n, m = h.shape
    mass = np.kron(np.eye(n), np.ones(m))
    spent = np.tile(lengths**p, n)[None] / n
    attack = linprog(h.ravel() / n, A_ub=spent, b_ub=[delta**p], A_eq=mass, b_eq=np.ones(n), method="highs")
    bound, terms, weight = lower_bound(limits, sigma, ThreatModel(p, "l2", delta))
    assert bound <= attack.fun + 1e-9
    assert bound == pytest.approx(attack.fun, abs=2e-3)
    assert float(terms.mean()) == bound
    assert 0 <= weight <= 1


def test_pointwise_and_without_budget():
    limits = torch.tensor([0.0, 0.5, 0.9], dtype=torch.float64)
    assert lower_bound(limits, 0.5, ThreatModel(2, "l2", 0))[0] == pytest.approx(float(limits.mean()))
    at = torch.special.ndtr(torch.special.ndtri(limits) - 0.2)
    assert lower_bound(limits, 0.5, ThreatModel(math.inf, "l2", 0.1))[0] == pytest.approx(float(at.mean()))


def test_larger_orders_and_smaller_budgets_leave_more():
    limits = torch.rand(60, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for deltas, orders in (((0.02, 0.1, 0.2, 0.6), (2,)), ((0.1,), (math.inf, 4, 2, 1))):
        found = [lower_bound(limits, 0.12, ThreatModel(p, "l2", d))[0] for d in deltas for p in orders]
        assert found == sorted(found, reverse=True)
        assert all(0 <= value <= 1 for value in found)


def test_a_linear_network_meets_its_limit(problem):
    """Of two classes p_i is Φ(margin / (σ ‖w‖)), so the counts must be those of that binomial."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(108, 2))
    x = problem[1][:3]
    y = network(x).argmax(1)
    w = network[1].weight[0] - network[1].weight[1]
    logits = network(x)
    margins = (logits[:, 0] - logits[:, 1]).abs()
    p = torch.special.ndtr(margins / (0.5 * w.norm())).detach()
    certificate = Smoothing(sigma=0.5, samples=4000)
    for i in range(3):
        share = certificate.count(network, x[i], int(y[i]), i) / 4000
        assert share == pytest.approx(float(p[i]), abs=5 * math.sqrt(0.25 / 4000))


def test_noise_is_the_images_own(problem, together):
    """Neither the batch size nor the processes nor other images matter."""
    network, x, y = problem
    threats = [ThreatModel(2, "l2", 0.1)]
    alone = Smoothing(samples=130)(network, x, y, threats)
    other = Smoothing(samples=130, batch_size=7)(network, x, y, threats)
    assert torch.equal(alone.limits, other.limits)
    assert not torch.equal(alone.limits, Smoothing(samples=130, seed=1)(network, x, y, threats).limits)
    copies = [nn.Sequential(nn.Flatten(), nn.Linear(108, 4)) for _ in range(3)]
    for copy in copies:
        copy.load_state_dict(network.state_dict())

    def part(processes):
        rows = torch.arange(processes.rank, 10, 3).flip(0)
        around = Surroundings(rows, processes)
        return Smoothing(samples=130)(copies[processes.rank], x[rows], y[rows], threats, around)

    for found in together(3, part):
        assert torch.equal(found.limits, alone.limits)


def test_what_is_counted_is_kept(problem, tmp_path, monkeypatch):
    network, x, y = problem
    threats, around = [ThreatModel(2, "l2", 0.1)], Surroundings(folder=tmp_path, about={"weights": "these"})
    first = Smoothing(samples=60)(network, x, y, threats, around)
    monkeypatch.setattr(Smoothing, "count", lambda *arguments: pytest.fail("counted again"))
    assert torch.equal(Smoothing(samples=60)(network, x, y, threats, around).limits, first.limits)
    monkeypatch.setattr(Smoothing, "count", lambda *arguments: 0)
    other = Surroundings(folder=tmp_path, about={"weights": "others"})
    assert bool((Smoothing(samples=60)(network, x, y, threats, other).limits == 0).all())


def test_logits_that_arent_finite_count_as_wrong(problem):
    class Broken(nn.Module):
        def forward(self, x):
            return torch.full((len(x), 4), torch.nan)

    found = Smoothing(samples=20)(Broken(), problem[1], torch.zeros(10, dtype=torch.long), [ThreatModel(2, "l2", 0.1)])
    assert found.figures(ThreatModel(2, "l2", 0.1))["accuracy"] == 0


def test_figures_and_names(problem):
    found = Smoothing(samples=200, sigma=0.03)(*problem, [ThreatModel(2, "l2", 0.05)])
    figures = found.figures(ThreatModel(2, "l2", 0.05))
    assert figures["accuracy_low"] <= figures["accuracy"] <= figures["accuracy_high"] <= 1
    assert figures["bound"] == "lower"
    assert figures["accuracy"] < figures["accuracy_without_attack"]
    assert Smoothing(sigma=0.03).network_name("net") == "net, randomised, σ = 0.03"
    assert set(Smoothing().options) == {"method", "sigma", "samples", "alpha", "seed"}


def test_only_l2_is_bounded(problem):
    with pytest.raises(SettingError, match=r"certify=smoothing.*threat=w2_l2"):
        Smoothing()(*problem, [ThreatModel(2, "linf", 0.1)])


@pytest.mark.parametrize("settings", [{"sigma": 0.0}, {"alpha": 1.0}, {"samples": 0}, {"seed": -1}], ids=str)
def test_settings_that_cant_be_used(settings):
    with pytest.raises(SettingError, match=f"certify.{next(iter(settings))}"):
        Smoothing(**settings)
