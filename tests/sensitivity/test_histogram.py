"""Sums in logarithmic bins against sums over the numbers themselves."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from wdat.sensitivity.histogram import BINS, SMALLEST, Histogram
from wdat.threat import power_mean

WIDTH = 1 / 64  # of a bin, at most, relative to its lower edge
ORDERS = [1.0, 2.0, 101.0]
numbers = st.lists(
    st.one_of(st.just(0.0), st.floats(-30, 30).map(lambda e: 10.0**e), st.floats(0.5, 2)), min_size=1, max_size=40
).map(torch.tensor)
shares = st.floats(0.01, 1)


def _held(values, order=2.0):
    histogram = Histogram(order)
    histogram.add(values)
    return histogram


def _spread(n, seed=0, scale=1.0, sigma=1.0):
    return scale * torch.exp(sigma * torch.randn(n, generator=torch.Generator().manual_seed(seed)))


def _mean(histogram, order):
    values, counts = histogram.sample()
    return power_mean(values, order, counts=counts)


def _agree(found, values, order):
    assert found == pytest.approx(power_mean(values, order), rel=1e-10, abs=0)


@pytest.mark.parametrize("magnitude", [1e-30, 1e-10, 1.0, 1e10, 1e30])
@pytest.mark.parametrize("order", ORDERS)
def test_the_mean_of_its_order_is_that_of_the_numbers(order, magnitude):
    values = _spread(5000, scale=magnitude)
    _agree(_mean(_held(values, order), order), values, order)


@given(numbers, st.sampled_from([1.0, 1.5, 2.0, 3.0, 101.0]))
def test_the_mean_of_its_order_is_that_of_the_numbers_at_mixed_magnitudes(values, order):
    _agree(_mean(_held(values, order), order), values, order)


@pytest.mark.parametrize("other", [0.5, 1.0, 3.0])
def test_means_of_other_orders_agree_to_the_width_of_a_bin(other):
    values = _spread(5000)
    assert _mean(_held(values, 2.0), other) == pytest.approx(power_mean(values, other), rel=WIDTH)


@given(numbers)
def test_its_values_increase_and_its_counts_make_up_the_set(values):
    histogram = _held(values)
    held, counts = histogram.sample()
    assert bool((held.diff() > 0).all())
    assert bool((counts > 0).all())
    assert float(counts.sum()) == len(values) == len(histogram)
    assert float(counts[held == 0].sum()) == float((values < SMALLEST).sum())


@given(numbers)
def test_every_number_is_within_a_bins_width_of_its_value(values):
    held, counts = _held(values).sample()
    ordered = values.double().sort().values
    assert_close(held.repeat_interleave(counts.long()), ordered, rtol=WIDTH, atol=0)


@given(numbers, numbers, st.sampled_from(ORDERS))
def test_what_is_added_and_taken_away_leaves_no_trace(values, more, order):
    histogram = _held(values, order)
    histogram.add(more)
    histogram.add(more, -1)
    before = _held(values, order)
    assert torch.equal(histogram.counts, before.counts)
    assert_close(histogram.sums, before.sums, rtol=1e-12, atol=1e-12)
    _agree(_mean(histogram, order), values, order)


@pytest.mark.parametrize("order", ORDERS)
def test_ten_thousand_replacements_lose_no_precision(order):
    generator = torch.Generator().manual_seed(1)
    values = _spread(500, sigma=3.0)
    histogram = _held(values, order)
    for k in range(1000):
        rows = torch.randperm(500, generator=generator)[:10]
        histogram.add(values[rows], -1)
        values[rows] = _spread(10, seed=k, scale=math.exp(-k / 100), sigma=3.0)
        histogram.add(values[rows])
    assert torch.equal(histogram.counts, _held(values, order).counts)
    _agree(_mean(histogram, order), values, order)


def test_what_is_smaller_than_any_normal_number_counts_as_zero():
    values = torch.tensor([0.0, 1e-45, 1e-39, SMALLEST, 1.0])
    held, counts = _held(values).sample()
    assert counts.tolist() == [3, 1, 1]
    assert_close(held, torch.tensor([0.0, SMALLEST, 1.0], dtype=torch.float64), rtol=1e-12, atol=0)


def test_what_is_infinite_stays_infinite():
    values = torch.tensor([1.0, math.inf, 3e38, math.inf])
    for order in ORDERS:
        histogram = _held(values, order)
        held, counts = histogram.sample()
        assert counts.tolist() == [1, 1, 2]
        assert_close(held.float(), torch.tensor([1.0, 3e38, math.inf]), rtol=1e-6, atol=0)
        histogram.add(values[1:2], -1)
        assert histogram.sample()[1].tolist() == [1, 1, 1]


def test_the_extremes_have_the_first_and_the_last_bin():
    histogram = _held(torch.tensor([0.0, math.inf]))
    assert histogram.counts.nonzero().squeeze(1).tolist() == [0, BINS - 1]


def test_nothing_has_an_empty_sample():
    for histogram in (Histogram(2.0), _held(torch.zeros(0))):
        assert [len(part) for part in histogram.sample()] == [0, 0]
        assert len(histogram) == 0
        assert _mean(histogram, 2.0) == 0.0
        assert histogram.quantile(0.5) == 0.0


@pytest.mark.parametrize("share", [0.01, 0.5, 0.9, 0.99, 1.0])
def test_quantiles_agree_to_the_width_of_a_bin(share):
    values = _spread(20_000, sigma=2.0)
    found = _held(values).quantile(share)
    assert found == pytest.approx(float(values.double().quantile(share)), rel=WIDTH)


@given(numbers, shares)
def test_a_quantile_is_the_lower_edge_of_its_numbers_bin(values, share):
    number = float(values.sort().values[math.ceil(share * len(values)) - 1])
    found = _held(values).quantile(share)
    assert found <= number
    assert number <= found * (1 + WIDTH)


@given(numbers, shares, shares)
def test_quantiles_increase(values, one, other):
    histogram = _held(values)
    assert histogram.quantile(min(one, other)) <= histogram.quantile(max(one, other))


def test_mostly_zeros_have_a_quantile_of_zero():
    histogram = _held(torch.cat([torch.zeros(98), torch.ones(2)]))
    assert histogram.quantile(0.98) == 0.0
    assert histogram.quantile(0.99) == 1.0


def test_parts_of_numbers_add_up_to_whole_ones():
    histogram = Histogram(2.0)
    histogram.counts[5] = math.nextafter(3.0, 0.0)
    assert len(histogram) == 3
