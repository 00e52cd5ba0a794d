"""Intervals against resampling."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch import nn

import wdat
from wdat.evaluation.statistics import bootstrap_interval, masking_warning
from wdat.records import Record
from wdat.reporting.frame import sections, to_frame
from wdat.reporting.results import notes


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


def _record(attack, accuracy, delta=0.03, **details):
    return Record(
        stage="evaluate", split="test", epoch=None, device="cpu", n=100, set_size=100, network="net", checkpoint="",
        data="d", seed=0, attack=attack, options={}, loss="0-1", p=2.0, norm="linf", delta=delta, accuracy=accuracy,
        accuracy_low=0, accuracy_high=1, loss_mean=None, distance=0.0, seconds=0.0, details=details,
    )  # fmt: skip


def test_a_knapsack_that_leaves_more_than_autoattack_is_warned_of():
    autoattack = _record("autoattack", 0.20)
    assert masking_warning([autoattack, _record("knapsack", 0.1, pointwise_accuracy=0.20)]) is None
    assert masking_warning([_record("knapsack", 0.1, pointwise_accuracy=0.9)]) is None
    assert masking_warning([autoattack, _record("knapsack", 0.1, delta=0.02, pointwise_accuracy=0.9)]) is None
    assert masking_warning([autoattack, _record("knapsack", 0.1)]) is None, "a record from before this figure"
    text = masking_warning([autoattack, *[_record("knapsack", 0.1, pointwise_accuracy=0.25)] * 2])
    assert text is not None
    assert text.count("\n") == 0
    assert "25.0 %" in text
    assert "20.0 %" in text
    assert "effort=thorough" in text


class Saturated(nn.Module):
    """Rounds its input, so that every gradient is zero; black-box attacks don't mind."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(48, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(torch.round(x * 255).flatten(1) / 255)


def test_a_network_that_masks_its_gradients_is_not_called_robust_in_silence():
    """The search finds no point at all, Square does: both are said, from Python and in the report's notes."""
    network, x = Saturated(), torch.rand(12, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    y = network(x).argmax(1)
    square = {"autoattack": {"version": "custom", "attacks_to_run": ("square",)}}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        records = wdat.evaluate(
            network, [(x, y)], wdat.ThreatModel("inf", "linf", 0.3), ["knapsack", "autoattack"], options=square
        )
    _, knapsack, autoattack = records
    assert knapsack.accuracy == 1
    assert autoattack.accuracy < 0.9
    assert knapsack.details["unfound"] == 12
    texts = [str(warning.message) for warning in said]
    assert any("no misclassified point was found anywhere for 12 of 12 images" in text for text in texts)
    assert any("the search missed points" in text for text in texts)
    (section,) = sections(to_frame(records))
    assert sum("12 of 12 images" in note or "points leave 100.0 %" in note for note in notes(section)) == 2
