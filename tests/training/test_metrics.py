"""Metrics against scikit-learn and numpy, whole and in parts."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score

from wdat.training.metrics import CountAccuracy, Upsilon

RNG = np.random.default_rng(0)
LOGITS, LABELS = RNG.normal(size=(11, 4)), RNG.integers(0, 4, 11)
NORMS = RNG.exponential(size=11)


def _synchronised(metrics):
    """What each process would compute after gathering every state from all of them."""
    others = [[getattr(m, state) for m in metrics] for state in metrics[0]._defaults]
    for metric in metrics:
        gathered = iter(others)
        metric.distributed_available_fn = lambda: True
        metric.dist_sync_fn = lambda *_, g=gathered, **__: next(g)
        yield float(metric.compute())


def test_accuracy_equals_sklearns():
    metric = CountAccuracy()
    for rows in (slice(0, 7), slice(7, 11)):
        metric.update(torch.from_numpy(LOGITS[rows]), torch.from_numpy(LABELS[rows]))
    assert float(metric.compute()) == accuracy_score(LABELS, LOGITS.argmax(1))


@pytest.mark.parametrize("cut", [0, 1, 7, 11])
def test_accuracy_of_unequal_parts_is_that_of_the_whole(cut):
    parts = [CountAccuracy(), CountAccuracy()]
    for metric, rows in zip(parts, (slice(0, cut), slice(cut, 11)), strict=True):
        metric.update(torch.from_numpy(LOGITS[rows]), torch.from_numpy(LABELS[rows]))
    assert list(_synchronised(parts)) == [accuracy_score(LABELS, LOGITS.argmax(1))] * 2


def test_accuracy_counts_in_integers_beyond_float32():
    metric = CountAccuracy()
    metric.correct += 2**24
    metric.total += 2**24
    metric.update(torch.tensor([[0.0, 1.0]]), torch.tensor([1]))
    assert int(metric.correct) == 2**24 + 1
    assert float(metric.compute()) == 1.0


def test_accuracy_of_nothing_is_not_a_number():
    metric = CountAccuracy()
    metric.update(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    assert math.isnan(metric.compute())


@pytest.mark.parametrize("q", [1.0, 2.0, 64.0, math.inf])
@pytest.mark.parametrize("cut", [0, 4, 11])
@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e12])
def test_upsilon_of_parts_is_that_of_the_whole(q, cut, scale):
    largest = NORMS.max()
    mean = 1.0 if math.isinf(q) else np.mean((NORMS / largest) ** q) ** (1 / q)
    parts = [Upsilon(q), Upsilon(q)]
    parts[0].update(torch.from_numpy(NORMS[:cut] * scale))
    parts[1].update(torch.zeros(0))  # a process may have no image
    for value in NORMS[cut:]:
        parts[1].update(torch.tensor([value * scale]))
    for value in _synchronised(parts):
        assert value == pytest.approx(largest * mean * scale, rel=1e-6, abs=0)


@pytest.mark.parametrize("q", [2.0, math.inf])
def test_upsilon_of_zeros_is_zero(q):
    metric = Upsilon(q)
    metric.update(torch.zeros(3))
    assert float(metric.compute()) == 0.0


def test_upsilon_resets():
    metric = Upsilon(2)
    metric.update(torch.tensor([100.0]))
    metric.reset()
    metric.update(torch.tensor([3.0, 4.0]))
    assert float(metric.compute()) == pytest.approx(12.5**0.5)


def test_forward_gives_the_batch_value_and_accumulates():
    metric = Upsilon(2)
    assert float(metric(torch.tensor([3.0]))) == pytest.approx(3.0)
    assert float(metric(torch.tensor([4.0]))) == pytest.approx(4.0)
    assert float(metric.compute()) == pytest.approx(12.5**0.5)


@pytest.mark.parametrize("metric", [CountAccuracy(), Upsilon(2)])
def test_metrics_can_be_cloned_and_pickled(metric):
    metric.clone()
    pickle.loads(pickle.dumps(metric))
