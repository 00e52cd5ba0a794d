"""The knapsack against brute force, a linear programme, and its own curve and resamples."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sampled import sampled
from scipy.optimize import linprog

from wdat.attacks.knapsack_allocation import bootstrap, critical_distance, curve, solve
from wdat.threat import ThreatModel

ORDERS = [1, 1.5, 2, 4, math.inf]


def _distances(seed, n=30):
    """Distances with zeros, ties and infinities, in pixel units."""
    generator = np.random.default_rng(seed)
    d = generator.exponential(0.03, n)
    d[generator.random(n) < 0.15] = 0.0
    d[generator.random(n) < 0.15] = math.inf
    d[generator.random(n) < 0.3] = 0.02
    return torch.from_numpy(d)


def _programme(d, p, delta):
    """The least accuracy over 0 ≤ mass ≤ 1 with mean(mass d^p) ≤ δ^p, by linear programming."""
    d = d.numpy()
    if math.isinf(p):
        return float((d > delta).mean())
    finite = np.isfinite(d)
    cost = (np.where(finite, d, 0.0) / delta) ** p
    bounds = [(0, 1 if ok else 0) for ok in finite]
    found = linprog(-np.ones(len(d)) / len(d), A_ub=[cost / len(d)], b_ub=[1.0], bounds=bounds)
    assert found.success
    return 1 + found.fun


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("p", ORDERS)
def test_is_the_optimum_of_the_linear_programme(p, seed):
    d = _distances(seed)
    for delta in (0.001, 0.01, 0.02, 0.05):
        found = solve(d, ThreatModel(p, "l2", delta))
        assert found.accuracy == pytest.approx(_programme(d, p, delta), abs=1e-9)


@pytest.mark.parametrize("p", sampled(ORDERS, 3))
def test_no_coupling_on_a_grid_does_better(p):
    d = torch.tensor([0.0, 0.01, 0.01, 0.03, 0.05], dtype=torch.float64)
    delta = 0.015
    best = 1.0
    for mass in itertools.product(np.linspace(0, 1, 9), repeat=len(d)):
        moved = np.asarray(mass)
        paid = d.numpy()[moved > 0]
        spent = (paid.max() if len(paid) else 0.0) if math.isinf(p) else (moved * d.numpy() ** p).mean() ** (1 / p)
        if spent <= delta:
            best = min(best, 1 - moved.mean())
    found = solve(d, ThreatModel(p, "l2", delta)).accuracy
    assert found <= best + 1e-12
    assert found >= best - 1 / 8 / len(d) - 1e-12  # one step of the grid for the one image that is split


@pytest.mark.parametrize("p", ORDERS)
def test_what_it_reports_fits_together(p):
    d = _distances(3)
    for delta in (0.003, 0.02, 5.0):
        found = solve(d, ThreatModel(p, "l2", delta))
        assert ((found.mass >= 0) & (found.mass <= 1)).all()
        assert found.accuracy == pytest.approx(1 - float(found.mass.mean()), abs=1e-12)
        paid = d[(found.mass > 0) & (d > 0)]
        assert found.critical == pytest.approx(float(paid.max()) if len(paid) else 0.0)
        assert found.length <= delta * (1 + 1e-9)
        everything = bool((found.mass[d.isfinite()] == 1).all())
        if not everything and not math.isinf(p):
            assert found.length == pytest.approx(delta, rel=1e-9)
        cheaper = d < found.critical
        assert (found.mass[cheaper] == 1).all()


def test_no_budget_leaves_the_clean_accuracy():
    d = _distances(0)
    for p in ORDERS:
        found = solve(d, ThreatModel(p, "l2", 0.0))
        assert found.accuracy == pytest.approx(float((d > 0).double().mean()), abs=1e-12)
        assert (found.critical, found.length) == (0.0, 0.0)


@pytest.mark.parametrize("p", [*ORDERS, 64])
def test_an_enormous_budget_leaves_images_without_a_flip(p):
    d = _distances(1)
    for delta in (1e3, 1e30, 1e300):
        found = solve(d, ThreatModel(p, "l2", delta))
        assert found.accuracy == pytest.approx(float(d.isinf().double().mean()), abs=1e-12)
        assert math.isfinite(found.length)
        assert math.isfinite(found.critical)
        assert found.length <= float(d[d.isfinite()].max())


def test_tiny_distances_at_a_high_order_do_not_underflow():
    d = torch.tensor([1e-8, 2e-8, 3e-8, 4e-8])
    found = solve(d, ThreatModel(64, "l2", 2e-8))  # 1e-8 ** 64 is 0 in float64
    # In units of δ: 0.5^64 ≈ 0, then 1, then 3 of the budget of 4 over 1.5^64: nothing.
    assert found.accuracy == pytest.approx(0.5, abs=1e-6)
    assert found.length == pytest.approx(2e-8, rel=1e-6)
    budgets, _ = curve(d, 64)
    assert (budgets.diff() > 0).all()
    assert float(budgets[-1]) == pytest.approx(4e-8 * (1 / 4) ** (1 / 64), rel=1e-6)


counted = st.lists(
    st.tuples(st.one_of(st.just(0.0), st.just(math.inf), st.floats(0.01, 3)), st.integers(1, 6)), min_size=1, max_size=8
)


@given(counted, st.sampled_from([1, 2, math.inf]), st.floats(0.05, 5))
def test_the_critical_distance_of_counts_is_that_of_the_repeated_distances(held, p, delta):
    d, counts = torch.tensor(held, dtype=torch.float64).unbind(1)
    repeated, threat = d.repeat_interleave(counts.long()), ThreatModel(p, "l2", delta)
    least, most = (solve(repeated, ThreatModel(p, "l2", delta * (1 + e))).critical for e in (-1e-9, 1e-9))
    for values, times in ((d, counts), (repeated, torch.ones_like(repeated))):
        assert least <= critical_distance(values, times, threat) <= most  # a budget may end between two images
    assert critical_distance(repeated, None, threat) == solve(repeated, threat).critical


@pytest.mark.parametrize("p", [1, 2, math.inf])
def test_the_critical_distance_does_not_depend_on_the_order(p):
    d, counts = (
        torch.tensor([math.inf, 0.03, 0.0, 0.01, 0.02]).double(),
        torch.tensor([2.0, 1.0, 3.0, 4.0, 2.0]).double(),
    )
    for delta in (0.0, 0.004, 0.01, 0.03, 1.0):
        threat = ThreatModel(p, "l2", delta)
        expected = solve(d.repeat_interleave(counts.long()), threat).critical
        for order in itertools.permutations(range(5)):
            assert critical_distance(d[list(order)], counts[list(order)], threat) == expected


@pytest.mark.parametrize("p", [1, 2])
def test_images_far_beyond_the_budget_are_not_paid_for(p):
    d, counts, threat = torch.tensor([1.0, 1e20]).double(), torch.tensor([2.0, 1.0]).double(), ThreatModel(p, "l2", 0.5)
    assert solve(d.repeat_interleave(counts.long()), threat).critical == 1.0
    assert critical_distance(d, counts, threat) == 1.0


@pytest.mark.parametrize("p", ORDERS)
def test_the_curve_agrees_with_solving_at_its_budgets(p):
    d = _distances(2)
    budgets, accuracies = curve(d, p)
    assert budgets[0] == 0
    assert (budgets.diff() >= 0).all()
    assert (accuracies.diff() < 0).all()
    for budget, accuracy, following in zip(budgets, accuracies, [*budgets[1:], torch.inf], strict=True):
        if math.isinf(p) and following == budget:
            continue  # tied images fall together
        found = solve(d, ThreatModel(p, "l2", float(budget) * (1 + 1e-12)))
        assert found.accuracy == pytest.approx(float(accuracy), abs=1e-9)


@pytest.mark.parametrize("p", ORDERS)
def test_smaller_distances_and_larger_budgets_never_raise_the_accuracy(p):
    d = _distances(4)
    nearer = d * torch.from_numpy(np.random.default_rng(0).uniform(0.3, 1, len(d)))
    last = 1.0
    for delta in (0.0, 1e-3, 0.01, 0.02, 0.1):
        threat = ThreatModel(p, "l2", delta)
        accuracy = solve(d, threat).accuracy
        assert solve(nearer, threat).accuracy <= accuracy + 1e-12
        assert accuracy <= last + 1e-12
        last = accuracy


@pytest.mark.parametrize("p", ORDERS)
@pytest.mark.parametrize("delta", [0.0, 0.01])
def test_the_bootstrap_solves_every_resample_anew(p, delta):
    d, threat = _distances(5), ThreatModel(p, "l2", delta)
    ordered = d.sort().values  # the resamples draw places in the order of the costs
    generator, brute = torch.Generator().manual_seed(7), []
    for _ in range(200):
        brute.append(solve(ordered[torch.randint(len(d), (len(d),), generator=generator)], threat).accuracy)
    expected = np.quantile(brute, [0.025, 0.975])
    assert bootstrap(d, threat, 200, seed=7) == pytest.approx(tuple(expected), abs=1e-9)
    low, high = bootstrap(d, threat, 200)
    assert low <= solve(d, threat).accuracy <= high


def test_the_bootstrap_covers():
    generator, threat = torch.Generator().manual_seed(0), ThreatModel(2, "l2", 0.02)
    population = torch.empty(20_000, dtype=torch.float64).exponential_(30, generator=generator)
    truth, covered = solve(population, threat).accuracy, 0
    for trial in range(60):
        sample = population[torch.randint(len(population), (200,), generator=generator)]
        low, high = bootstrap(sample, threat, 200, seed=trial)
        covered += low <= truth <= high
    assert covered >= 50  # 57 expected


def test_nothing_to_gain_and_nothing_to_lose():
    never, always = torch.full((5,), math.inf), torch.zeros(5)
    for p in ORDERS:
        threat = ThreatModel(p, "l2", 0.1)
        assert solve(never, threat).accuracy == 1
        assert solve(always, threat).accuracy == 0
        assert solve(always, threat).length == 0
        assert bootstrap(never, threat, 20) == (1.0, 1.0)
        assert bootstrap(always, threat, 20) == (0.0, 0.0)
        assert curve(never, p)[1].tolist() == [1.0]
        assert curve(always, p)[1].tolist() == [0.0]
