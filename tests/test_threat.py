"""Norms, directions, projections and numbers, as properties and against brute force."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch.testing import assert_close

from wdat.errors import SettingError
from wdat.threat import (
    NORMS,
    ThreatModel,
    contract,
    direction,
    dual_norm,
    image_norm,
    parse_budget,
    parse_number,
    per_image,
    power_mean,
)

numbers = st.floats(-1, 1, allow_subnormal=False)
images = arrays(np.float64, (3, 2, 3), elements=numbers).map(torch.from_numpy)
norms = st.sampled_from(NORMS)
scales = st.integers(-12, 12).map(lambda k: 10.0**k)


@given(images, norms, scales)
def test_direction_attains_the_dual_norm(g, norm, scale):
    g = g * scale
    inner = (direction(g, norm) * g).flatten(1).sum(1)
    assert_close(inner, dual_norm(g, norm), rtol=1e-9, atol=1e-12 * scale)


@given(images, norms, scales)
def test_direction_has_unit_norm_except_at_zero(g, norm, scale):
    g = g * scale
    length = image_norm(direction(g, norm), norm)
    assert_close(length, (g.flatten(1) != 0).any(1).double(), rtol=1e-9, atol=0)


@given(images, images, norms)
def test_hoelder_holds_for_any_pair(v, g, norm):
    inner = (v * g).flatten(1).sum(1).abs()
    assert bool((inner <= image_norm(v, norm) * dual_norm(g, norm) * (1 + 1e-9) + 1e-15).all())


@pytest.mark.parametrize("norm", NORMS)
def test_direction_of_zero_is_zero(norm):
    assert_close(direction(torch.zeros(2, 3, 2), norm), torch.zeros(2, 3, 2))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("scale", [1e-45, 1e-38, 1e-30, 1e-20, 1.0, 1e20, 1e30, 3e38])
def test_direction_survives_tiny_and_huge_float32_gradients(norm, scale):
    g = torch.tensor([[1.0, -1.0, 0.0, 1.0]]) * scale
    expected = torch.tensor([[1.0, -1.0, 0.0, 1.0]]) * (1.0 if norm == "linf" else 3**-0.5)
    assert_close(direction(g, norm), expected)


@pytest.mark.parametrize("scale", [1e-30, 1e-22, 1e20, 1e30])
@pytest.mark.parametrize("function", [dual_norm, image_norm])
def test_l2_norm_of_tiny_and_huge_float32_values_is_right(function, scale):
    """Squares leave float32 at 1e-23 and 2e19; a norm of zero or infinity spoils the allocation."""
    value = function(torch.full((1, 4), scale), "l2")
    assert float(value) == pytest.approx(2 * scale, rel=1e-5, abs=0)


@pytest.mark.parametrize("norm", NORMS)
def test_norms_equal_numpys(norm):
    v = torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    flat = v.flatten(1).numpy()
    assert_close(image_norm(v, norm).numpy(), np.linalg.norm(flat, np.inf if norm == "linf" else 2, axis=1))
    assert_close(dual_norm(v, norm).numpy(), np.linalg.norm(flat, 1 if norm == "linf" else 2, axis=1))


def test_norms_do_not_mind_channels_last():
    v = torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    for norm in NORMS:
        for function in (image_norm, dual_norm, direction):
            assert_close(function(v.contiguous(memory_format=torch.channels_last), norm), function(v, norm))


# --- projection


@given(images, images, st.floats(0, 2), norms)
def test_contract_stays_in_the_ball_and_leaves_interior_points(origin, x, radius, norm):
    radii = torch.tensor([radius, 0.0, 10.0], dtype=torch.float64)
    z = contract(origin, x, radii, norm)
    distance = image_norm(z - origin, norm)
    assert bool((distance <= radii + 1e-12).all())
    inside = image_norm(x - origin, norm) <= radii
    assert bool(inside[2])
    assert_close(z[inside], x[inside], rtol=0, atol=1e-15)
    assert_close(distance[~inside], radii[~inside], rtol=1e-12, atol=1e-15)
    assert_close(z[1], origin[1])


@given(images, images, st.floats(0, 2), norms)
def test_contract_is_idempotent(origin, x, radius, norm):
    radii = torch.full((3,), radius, dtype=torch.float64)
    once = contract(origin, x, radii, norm)
    assert_close(contract(origin, once, radii, norm), once, rtol=1e-12, atol=1e-15)


@given(images, images, st.floats(0.01, 2), norms, st.integers(0, 10_000))
def test_contract_is_the_nearest_point(origin, x, radius, norm, seed):
    """z is the projection onto a convex set iff ⟨x − z, v − z⟩ ≤ 0 for every v in the set."""
    radii = torch.full((3,), radius, dtype=torch.float64)
    z = contract(origin, x, radii, norm)
    v = torch.randn(3, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    v = origin + per_image(radii / image_norm(v, norm), v) * v
    assert bool((((x - z) * (v - z)).flatten(1).sum(1) <= 1e-12).all())


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("point", [(1.0, 0.3), (-0.9, 0.8), (0.1, 0.2), (0.5, 0.0)])
def test_contract_equals_a_search_over_a_grid(norm, point):
    line = torch.linspace(-0.5, 0.5, 801, dtype=torch.float64)
    grid = torch.cartesian_prod(line, line)
    grid = grid[image_norm(grid, norm) <= 0.5 + 1e-12]
    x = torch.tensor([point], dtype=torch.float64)
    best = grid[(grid - x).square().sum(1).argmin()]
    z = contract(torch.zeros_like(x), x, torch.tensor([0.5], dtype=torch.float64), norm)[0]
    assert_close(z, best, rtol=0, atol=1.5e-2)  # along the circle a grid is coarse
    assert float((z - x).norm()) <= float((best - x).norm()) + 1e-12


# --- power means and lengths


@given(
    st.lists(st.floats(0, 1e3, allow_subnormal=False).filter(lambda v: v == 0 or v > 1e-3), min_size=1, max_size=9),
    st.floats(0.5, 8),
)
def test_power_mean_equals_the_naive_formula(values, order):
    naive = np.mean(np.array(values) ** order) ** (1 / order)
    assert power_mean(torch.tensor(values, dtype=torch.float64), order) == pytest.approx(naive, rel=1e-9)


def test_power_mean_of_tiny_distances_at_high_order_does_not_underflow():
    d = torch.tensor([1e-30, 2e-30], dtype=torch.float32)
    assert power_mean(d, 64) == pytest.approx(2e-30 * ((1 + 2.0**-64) / 2) ** (1 / 64), rel=1e-6, abs=0)
    assert power_mean(d.double() * 1e-200, 64) > 0
    assert math.isfinite(power_mean(torch.tensor([1e30, 1e38]), 64))


def test_power_mean_at_order_infinity_is_the_maximum():
    assert power_mean(torch.tensor([0.25, 0.5, 0.0]), math.inf) == 0.5
    assert power_mean(torch.zeros(3), 2) == 0.0
    assert power_mean(torch.zeros(0), 2) == 0.0


@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=6), st.floats(1, 50), st.floats(1, 50))
def test_power_mean_rises_with_the_order(values, a, b):
    v = torch.tensor(values, dtype=torch.float64)
    assert power_mean(v, min(a, b)) <= power_mean(v, max(a, b)) * (1 + 1e-12)


def test_power_mean_over_processes_is_that_of_the_whole(together):
    values = torch.rand(11, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    parts = [values[:7], values[7:7], values[7:]]
    for order in (1.0, 2.0, 64.0, math.inf):
        for result in together(3, lambda p, order=order: power_mean(parts[p.rank], order, p)):
            assert result == pytest.approx(power_mean(values, order), rel=1e-12)


# --- numbers


@pytest.mark.parametrize(
    ("text", "value"),
    [("8/255", 8 / 255), ("0.03", 0.03), (" 8 / 255 ", 8 / 255), ("inf", math.inf), (2, 2.0), (0, 0.0), ("1e-3", 1e-3)],
)
def test_numbers_are_read(text, value):
    assert parse_number(text, "s") == value


@pytest.mark.parametrize("text", ["", "abc", "1/0", "nan", "8/", "/255", "8/255/2", "inf/inf", None, [1], math.nan])
def test_what_is_no_number_is_refused_by_name(text):
    with pytest.raises(SettingError, match=r"threat\.p"):
        parse_number(text, "threat.p")


@pytest.mark.parametrize("text", ["-1/255", -0.1, "inf", math.inf, "1/0", "8:255"])
def test_impossible_budgets_are_refused_by_name(text):
    with pytest.raises(SettingError, match=r"threat\.delta"):
        parse_budget(text)


# --- the threat model


@given(st.floats(1.001, 1e4))
def test_orders_are_conjugate(p):
    threat = ThreatModel(p, "linf", 0.1)
    assert 1 / threat.p + 1 / threat.q == pytest.approx(1, abs=1e-12)
    assert (threat.q - 1) * p == pytest.approx(threat.q, rel=1e-9)
    assert ThreatModel(threat.q, "l2", 0.1).q == pytest.approx(p, rel=1e-6)


def test_orders_at_the_ends():
    assert ThreatModel("inf", "linf", 0).q == 1.0
    assert ThreatModel(1, "linf", 0).q == math.inf
    assert ThreatModel("inf", "l2", "8/255").is_pointwise
    assert not ThreatModel(1e6, "l2", 0.1).is_pointwise


def test_pointwise_keeps_norm_and_budget():
    assert ThreatModel(2, "l2", "0.5").pointwise() == ThreatModel(math.inf, "l2", 0.5)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [((0.5, "linf", 0.1), "threat.p"), ((2, "l1", 0.1), "threat.norm"), ((2, "linf", -1), "threat.delta")],
)
def test_impossible_threats_name_the_setting(arguments, word):
    with pytest.raises(SettingError, match=word):
        ThreatModel(*arguments)


def test_unknown_norm_suggests_the_nearest():
    with pytest.raises(SettingError, match="did you mean linf"):
        ThreatModel(2, "Linfty", 0.1)


def test_threat_is_frozen():
    with pytest.raises(AttributeError):
        ThreatModel(2, "linf", 0.1).delta = 1.0


def test_distances_and_length():
    origin, x = torch.zeros(2, 1, 1, 2), torch.tensor([[[[0.3, -0.4]]], [[[0.0, 0.0]]]])
    assert_close(ThreatModel(2, "linf", 1).distances(origin, x), torch.tensor([0.4, 0.0]))
    assert_close(ThreatModel(2, "l2", 1).distances(origin, x), torch.tensor([0.5, 0.0]))
    d = torch.tensor([3.0, 4.0])
    assert ThreatModel(2, "l2", 1).length(d) == pytest.approx(12.5**0.5)
    assert ThreatModel(math.inf, "l2", 1).length(d) == 4.0
    assert ThreatModel(1, "l2", 1).length(d) == 3.5
