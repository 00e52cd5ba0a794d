"""Υ of what training draws from: the original images, and a pool of synthetic ones with the weight f.

    Υ^q = (1 − f) Υ_o^q + f Υ_s^q

Υ_o is the business of the run's estimator, which sees the originals alone. A pool is too large for a value an image, so
Υ_s is known by the norms of m of its images **(ours)**: at first by one pass over a stratified sample, then, at no
cost, by those of the synthetic images that the batches draw, uniformly, the newest in the place of the oldest. With
1,024 images and 90 in a batch none is older than twelve steps. The m images are weighted so that every class counts as
much as it does in the pool.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from wdat.distributed import Processes
from wdat.seeding import generator
from wdat.sensitivity.base import Estimator, Sample
from wdat.threat import power_mean


class Pool(Protocol):
    """What there is to know of a pool of synthetic images."""

    class_sizes: Tensor

    def __len__(self) -> int:
        """Number of images."""
        ...

    def labels(self, rows: Tensor) -> Tensor:
        """The labels of rows (M,), int64."""
        ...

    def stratified(self, size: int, generator: torch.Generator) -> Tensor:
        """Rows (M,), int64, each class in proportion to its size."""
        ...


class Mixture(Estimator):
    """Another estimator's Υ of the originals, together with that of a pool. Row r of the pool is n_train + r.

    Args:
        originals: The estimator of the run; it isn't told of the pool.
        pool: The pool.
        share: f, its share of a batch.
        size: Norms of the pool's images that are kept, m.
        every: Steps between stratified passes, the only ones then that tell of the pool; None for the first alone.
    """

    name = "mixture"

    def __init__(self, originals: Estimator, pool: Pool, share: float, size: int, every: int | None = None) -> None:
        super().__init__()
        self.originals, self.pool, self.share, self.size, self.every = originals, pool, share, size, every
        self._norms = torch.empty(0, dtype=torch.float64)  # of the pool's images, newest last
        self._labels = torch.empty(0, dtype=torch.int64)

    def begin(self, n_train: int, q: float, seed: int, processes: Processes, distances: bool = False) -> None:
        super().begin(n_train, q, seed, processes, distances)
        self.originals.begin(n_train, q, seed, processes, distances)

    def wanted(self, step: int) -> Tensor | None:
        parts = [self.originals.wanted(step)]
        if not len(self._norms) or (self.every is not None and step % self.every == 0):
            parts.append(self.n_train + self.pool.stratified(self.size, generator(self.seed, "strata", step)))
        rows = [part for part in parts if part is not None]
        return torch.cat(rows) if rows else None

    def measured(self, index: Tensor, norms: Tensor) -> None:
        own, drawn = self._divided(index, norms)
        if len(own[0]):
            self.originals.measured(*own)
        if len(drawn[0]):
            self._norms, self._labels = self._norms[:0], self._labels[:0]
            self._keep(*drawn, len(drawn[0]))

    def take(self, rows: Tensor | None, norms: Tensor) -> None:
        """Hand the originals' norms on; keep those of the synthetic images (all processes' together).

        Args:
            rows: (N,), rows in the training set, and behind them in the pool.
            norms: (N,), their fresh dual norms.

        Raises:
            RuntimeError: If the batch doesn't say which images it holds.
        """
        if rows is None:
            raise RuntimeError("the mixture needs to know which images are observed (index)")
        own, drawn = self._divided(rows, norms)
        self.originals.take(*own)
        if self.every is None:
            self._keep(*drawn, self.size)

    def _divided(self, index: Tensor, norms: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Rows and norms of the originals, and of the pool's images."""
        drawn = index >= self.n_train
        chosen = drawn.to(norms.device)
        return (index[~drawn], norms[~chosen]), (index[drawn], norms[chosen])

    def _keep(self, index: Tensor, norms: Tensor, size: int) -> None:
        """Put in norms of the pool's images; keep the newest."""
        labels = self.pool.labels(index.cpu() - self.n_train)
        self._norms = torch.cat([self._norms, norms.detach().double().cpu()])[-size:]
        self._labels = torch.cat([self._labels, labels])[-size:]

    def _weights(self) -> Tensor:
        """Of the norms that are kept, (M,), adding up to 1: every class as large as it is in the pool."""
        counts = torch.bincount(self._labels, minlength=len(self.pool.class_sizes))
        weights = (self.pool.class_sizes / counts)[self._labels].double()
        return weights / weights.sum()

    def sample(self) -> Sample | None:
        own = self.originals.sample()
        if own is None or not len(self._norms):
            return None
        values = own.values.double().cpu()
        counts = torch.ones_like(values) if own.counts is None else own.counts.double().cpu()
        weights = [(1 - self.share) * counts / counts.sum(), self.share * self._weights()]
        return Sample(torch.cat([values, self._norms]), torch.cat(weights))

    def upsilon(self) -> float:
        if not len(self._norms):
            raise RuntimeError("no gradient norms were observed yet; call measured first")
        drawn = power_mean(self._norms, self.q, counts=self._weights())
        both = torch.tensor([self.originals.upsilon(), drawn], dtype=torch.float64)
        return power_mean(both, self.q, counts=torch.tensor([1 - self.share, self.share], dtype=torch.float64))

    def state_dict(self) -> dict[str, Any]:
        return {
            "originals": {"name": self.originals.name, **self.originals.state_dict()},
            "pool": len(self.pool),
            "norms": self._norms,
            "labels": self._labels,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        own = dict(state["originals"])
        if own.pop("name") == self.originals.name:
            self.originals.load_state_dict(own)
        if state["pool"] == len(self.pool):  # else another one: measure it
            self._norms, self._labels = state["norms"].clone(), state["labels"].clone()


def with_pool(estimator: Estimator, pool: Pool, share: float, size: int, every: int | None) -> Estimator:
    """The estimator of a run that draws from a pool too.

    Estimators that go by the batches alone, which are fair samples of the mixture, need nothing more.
    """
    own = estimator.originals if isinstance(estimator, Mixture) else estimator
    return own if own.of_batches else Mixture(own, pool, share, size, every)
