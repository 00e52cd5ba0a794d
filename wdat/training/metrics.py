"""Metrics with additive states, exact on any number of devices and any split of the images over them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from wdat.losses import correct


def _log_of_sum(logs: Tensor) -> Tensor:
    return torch.logsumexp(logs, 0)


class CountAccuracy(Metric):
    """Accuracy as correct images over all images, counted in integers.

    Averaging per-device accuracies is wrong where shards are unequal; sums of counts are not.

    Example:
        >>> metric = CountAccuracy()
        >>> metric.update(torch.tensor([[2.0, 1.0], [0.0, 3.0], [1.0, 0.0]]), torch.tensor([0, 1, 1]))
        >>> round(float(metric.compute()), 4)
        0.6667
    """

    full_state_update = False
    higher_is_better = True
    correct: Tensor
    total: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("correct", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Count logits (N, K) against labels (N,); those that aren't finite are wrong."""
        self.correct += correct(logits, labels).sum()
        self.total += labels.numel()

    def compute(self) -> Tensor:
        """Accuracy in [0, 1]; NaN before any image."""
        return self.correct.double() / self.total


class Upsilon(Metric):
    """Υ = (mean n_i^q)^(1/q) of a stream of dual norms; the largest norm at q = inf.

    The state is log Σ n_i^q, so that neither high orders nor small norms over- or underflow.

    Args:
        q: Conjugate order, at least 1.

    Example:
        >>> metric = Upsilon(q=2)
        >>> metric.update(torch.tensor([3.0]))
        >>> metric.update(torch.tensor([4.0, 0.0]))
        >>> round(float(metric.compute()), 4)
        2.8868
    """

    full_state_update = False
    log_sum: Tensor
    count: Tensor

    def __init__(self, q: float = 2.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.q = q
        reduce = "max" if q == float("inf") else _log_of_sum
        self.add_state("log_sum", torch.full((), -torch.inf, dtype=torch.float64), dist_reduce_fx=reduce)
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, norms: Tensor) -> None:
        """Take in dual norms (N,), not negative."""
        logs = norms.double().log()
        if self.q == float("inf"):
            self.log_sum = torch.maximum(self.log_sum, logs.max()) if len(logs) else self.log_sum
        else:
            self.log_sum = torch.logaddexp(self.log_sum, torch.logsumexp(self.q * logs, 0))
        self.count += norms.numel()

    def compute(self) -> Tensor:
        """Υ in units of the loss per pixel unit."""
        if self.q == float("inf"):
            return self.log_sum.exp()
        return ((self.log_sum - self.count.double().log()) / self.q).exp()
