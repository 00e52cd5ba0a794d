"""Certified radii of a set: proved one by one, never beyond a misclassified point, equal on any number of processes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from certify.conftest import image, seeded
from hypothesis import given
from hypothesis import strategies as st
from sampled import product
from torch import nn

from wdat.attacks.knapsack import Knapsack
from wdat.attacks.knapsack_allocation import solve
from wdat.certify import Crown, Surroundings
from wdat.certify import radii as module
from wdat.certify.crown import margin_bound
from wdat.certify.radii import largest_radius, reach_of
from wdat.errors import SettingError
from wdat.models import load_network
from wdat.threat import ThreatModel

SEARCH = {"starts": 1, "targets": 3, "steps": 30}
N = 24


def threats(norm="linf", orders=(1, 2, 4, math.inf), budgets=(0.01, 0.03)):
    return [ThreatModel(p, norm, delta) for p in orders for delta in budgets]


@pytest.fixture(scope="module")
def problem():
    """A float32 network, images of which some are misclassified, and the distances that an attack finds."""
    network = seeded("strides", seed=1, gain=1.2).float()
    x = torch.stack([image(seed) for seed in range(N)]).float()
    y = network(x).argmax(1)
    y[::7] = (y[::7] + 1) % 4
    return network, x, y


@pytest.fixture(scope="module")
def distances(problem):
    return {norm: Knapsack(**SEARCH).find(*problem, norm).distances for norm in ("linf", "l2")}


@pytest.fixture(autouse=True)
def short_rounds(monkeypatch):
    monkeypatch.setattr(module, "ROUND", 8)


@pytest.fixture
def counted(monkeypatch):
    """Radii at which a bound was computed."""
    calls = []

    def bound(network, x, label, radius, norm):
        calls.append(radius)
        return margin_bound(network, x, label, radius, norm)

    monkeypatch.setattr(module, "margin_bound", bound)
    return calls


@given(
    power=st.floats(1, 5), root=st.floats(1e-3, 2), guess=st.floats(0.05, 5), clean=st.floats(0.01, 20),
    wall=st.booleans(),
)  # fmt: skip
def test_the_largest_radius_is_proved_and_near_the_root(power, root, guess, clean, wall):
    seen = {}

    def bound(radius, exact):
        value = clean * (1 - (radius / root) ** power)
        value = -math.inf if wall and radius > 1.5 * root else value
        if exact:
            seen[radius] = value
        return value

    found = largest_radius(bound, clean, 10.0, guess * root, 6, 1e-4)
    assert found == 0 or seen[found] > 1e-4
    assert found <= root
    true = root * (1 - 2e-4 / clean) ** (1 / power)
    assert found >= (0.5 if wall else 0.9) * true


@pytest.mark.parametrize("value", [math.nan, -1.0, 1e-5, math.inf * -1])
def test_what_isnt_proved_is_zero(value):
    assert largest_radius(lambda radius, exact: value, 1.0, 0.1, 0.05, 5, 1e-4) == 0


def test_float64_has_the_last_word():
    """Float32 proves all, float64 nothing: the radius is 0."""
    assert largest_radius(lambda radius, exact: 0.0 if exact else 1.0, 2.0, 0.1, 0.05, 5, 1e-4) == 0


def test_no_radius_beyond_the_cap():
    assert largest_radius(lambda radius, exact: 1.0, 2.0, 0.1, 0.05, 5, 1e-4) == pytest.approx(0.1, rel=0.02)
    assert largest_radius(lambda radius, exact: 1.0, 2.0, 0.1, 0.5, 5, 1e-4) <= 0.1


@pytest.mark.parametrize(("norm", "known"), product(["linf", "l2"], [True, False], every=3))
def test_no_radius_is_beyond_a_misclassified_point(problem, distances, norm, known):
    """Also where the search was not told of any."""
    network, x, y = problem
    d = distances[norm]
    delta = 0.1 if norm == "linf" else 0.8
    asked = threats(norm, orders=(math.inf, 2), budgets=(delta,))
    found = Crown()(network, x, y, asked, Surroundings(distances=d if known else None))
    assert bool((found.radii <= d.double() + 1e-12).all())
    assert bool((found.radii[::7] == 0).all())
    assert int((found.radii > 0).sum()) >= 18
    exact = network.double()
    for i in range(0, N, 5):
        r = float(found.radii[i])
        if r > 0:
            assert margin_bound(exact, x[i].double(), int(y[i]), r, norm) > 1e-4
    network.float()
    for threat in asked:
        assert solve(found.radii, threat).accuracy <= solve(d, threat).accuracy + 1e-12


def test_radii_that_budgets_cant_reach_are_not_refined(problem, distances, counted):
    """The lower bounds are those of the longest search, for far fewer evaluations."""
    network, x, y = problem
    asked = threats(budgets=(0.001, 0.002))
    short = Crown()(network, x, y, asked, Surroundings(distances=distances["linf"]))
    few = len(counted)
    long = Crown()(network, x, y, [*asked, ThreatModel(2, "linf", 1.0)], Surroundings(distances=distances["linf"]))
    assert len(counted) - few > 1.2 * few
    assert float(long.radii.sum()) > 1.2 * float(short.radii.sum())
    for threat in asked:
        assert solve(short.radii, threat).accuracy == pytest.approx(solve(long.radii, threat).accuracy, abs=2e-3)


@given(
    radii=st.lists(st.floats(0, 1), min_size=1, max_size=20), delta=st.floats(0.01, 0.5),
    p=st.sampled_from([1.0, 2.0, 4.0, math.inf]), more=st.floats(1.0, 5.0),
)  # fmt: skip
def test_what_is_beyond_reach_changes_no_accuracy(radii, delta, p, more):
    values, threat = torch.tensor(radii, dtype=torch.float64), ThreatModel(p, "linf", delta)
    reach = reach_of(values, len(values), [threat])
    for other in (torch.where(values > reach, values * more, values), values.clamp(max=reach)):
        assert solve(other, threat).accuracy == pytest.approx(solve(values, threat).accuracy, abs=1e-7)


def test_pointwise_budgets_take_one_evaluation_each(problem, distances, counted):
    network, x, y = problem
    found = Crown()(network, x, y, [ThreatModel(math.inf, "linf", 0.01)], Surroundings(distances=distances["linf"]))
    assert len(counted) == int((distances["linf"] > 0.01).sum())
    proved = [margin_bound(network, x[i], int(y[i]), 0.01, "linf") > 1e-4 for i in range(N)]
    assert (found.radii > 0.01).tolist() == proved
    assert solve(found.radii, ThreatModel(math.inf, "linf", 0.01)).accuracy == sum(proved) / N


@pytest.mark.parametrize("norm", ["linf"])
def test_several_processes_find_what_one_does(problem, distances, together, tmp_path, norm):
    network, x, y = problem
    asked = threats(norm)
    alone = Crown()(network, x, y, asked, Surroundings(distances=distances[norm])).radii

    def part(processes):
        rows = torch.arange(processes.rank, N, 3).flip(0)  # in an order of their own
        around = Surroundings(rows, processes, distances[norm][rows], tmp_path)
        return Crown()(copies[processes.rank], x[rows], y[rows], asked, around)

    copies = [seeded("strides", seed=1, gain=1.2).float() for _ in range(3)]  # threads, unlike processes, share memory
    for found in together(3, part):
        assert torch.equal(found.radii, alone)


def test_an_interrupted_search_goes_on(problem, distances, tmp_path, monkeypatch, counted):
    network, x, y = problem
    whole = Crown()(network, x, y, threats(), Surroundings(distances=distances["linf"])).radii
    all_calls = len(counted)
    around = Surroundings(distances=distances["linf"], folder=tmp_path, about={"weights": "these"})

    def stopped(network, x, label, radius, norm):
        if len(counted) >= all_calls + all_calls // 2:
            raise KeyboardInterrupt
        counted.append(radius)
        return margin_bound(network, x, label, radius, norm)

    with monkeypatch.context() as patch:
        patch.setattr(module, "margin_bound", stopped)
        with pytest.raises(KeyboardInterrupt):
            Crown()(network, x, y, threats(), around)
    counted.clear()
    assert torch.equal(Crown()(network, x, y, threats(), around).radii, whole)
    assert 0 < len(counted) < all_calls
    counted.clear()
    assert torch.equal(Crown()(network, x, y, threats(), around).radii, whole)
    assert not counted
    other = Surroundings(distances=distances["linf"], folder=tmp_path, about={"weights": "others"})
    assert torch.equal(Crown()(network, x, y, threats(), other).radii, whole)
    assert len(counted) == all_calls


def test_a_damaged_file_is_named(problem, tmp_path):
    (tmp_path / "certified_linf.pt").write_bytes(b"PK\x03\x04 not this")
    with pytest.raises(SettingError, match=r"certified_linf\.pt"):
        Crown()(*problem, threats(), Surroundings(folder=tmp_path))


def test_a_time_limit_leaves_radii_short(problem, distances, tmp_path):
    network, x, y = problem
    whole = Crown()(network, x, y, threats(), Surroundings(distances=distances["linf"])).radii
    none = Crown(seconds=1e-9)(network, x, y, threats(), Surroundings(distances=distances["linf"], folder=tmp_path))
    assert bool((none.radii == 0).all())
    assert none.unfinished == N
    assert none.figures(threats()[0])["unfinished"] == N
    assert solve(none.radii, threats()[0]).accuracy <= solve(whole, threats()[0]).accuracy


@pytest.mark.parametrize("layer", [0, 2])
def test_a_network_with_nan_weights_certifies_nothing(problem, layer):
    network, x, y = seeded("strides", seed=1).float(), *problem[1:]
    with torch.no_grad():
        network[layer].weight[0, 0, 0, 0] = torch.nan
    found = Crown()(network, x, y, threats())
    assert bool((found.radii == 0).all())
    assert found.figures(threats()[1])["accuracy"] == 0


def test_infinite_logits_certify_nothing(problem):
    network, x, y = nn.Sequential(nn.Flatten(), nn.Linear(108, 4)), *problem[1:]
    with torch.no_grad():
        network[1].bias[2] = torch.inf
    assert bool((Crown()(network, x, torch.full_like(y, 2), threats()).radii == 0).all())


def test_an_empty_part_and_progress(problem, distances, together):
    network, x, y = problem
    told = []

    def part(processes):
        rows = torch.arange(6) if processes.rank else torch.arange(0)
        around = Surroundings(rows, processes, None, None, {}, lambda k, n: told.append((k, n)))
        return Crown()(network if processes.rank else seeded("mlp").float(), x[rows], y[rows], threats(), around).radii

    first, second = together(2, part)
    assert torch.equal(first, second)
    assert len(first) == 6
    assert set(told) == {(6, 6)}


def test_large_networks_are_refused_with_the_reason():
    x = torch.rand(2, 3, 32, 32)
    with pytest.raises(SettingError, match=r"1\.6 GB an image .*backward passes"):
        Crown()(load_network("preact_resnet18"), x, torch.zeros(2, dtype=torch.long), threats())


@pytest.mark.parametrize(
    "settings", [{"evaluations": 1}, {"margin": 0.0}, {"seconds": -1.0}, {"gigabytes": math.nan}], ids=str
)
def test_settings_that_cant_be_used(settings):
    with pytest.raises(SettingError, match=f"certify.{next(iter(settings))}"):
        Crown(**settings)


def test_figures_are_those_of_the_knapsack(problem, distances):
    network, x, y = problem
    found = Crown()(network, x, y, threats(), Surroundings(distances=distances["linf"]))
    figures = found.figures(threats()[3])
    assert figures["bound"] == "lower"
    assert figures["accuracy"] == solve(found.radii, threats()[3]).accuracy
    assert np.isfinite(figures["cpu_seconds_per_image"])
