"""Intervals against resampling."""

from __future__ import annotations

import numpy as np
import pytest

from wdat.evaluation.statistics import bootstrap_interval


@pytest.mark.parametrize(("hits", "n"), [(50, 100), (3, 40), (580, 846), (1, 7), (39, 40)])
@pytest.mark.parametrize("level", [0.95, 0.5])
def test_the_interval_is_that_of_resampling(hits, n, level):
    outcomes = np.arange(n) < hits
    rng = np.random.default_rng(0)
    means = outcomes[rng.integers(0, n, (20_000, n))].mean(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2], method="inverted_cdf")
    found = bootstrap_interval(hits, n, level)
    assert found == pytest.approx((low, high), abs=1.01 / n)
    assert found[0] <= hits / n <= found[1]


@pytest.mark.parametrize("n", [1, 9, 10_000])
def test_fixed_outcomes_have_no_spread(n):
    assert bootstrap_interval(0, n) == (0.0, 0.0)
    assert bootstrap_interval(n, n) == (1.0, 1.0)
