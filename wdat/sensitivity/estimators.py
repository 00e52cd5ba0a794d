"""Estimators that measure Υ anew: from the batch at hand, or by a pass of their own over training images."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wdat.errors import check_real, check_whole
from wdat.seeding import generator
from wdat.sensitivity.base import Estimator, Sample
from wdat.threat import power_mean


class Batch(Estimator):
    """Υ of the batch itself: free, noisy, and at q > 1 biased low by Jensen's inequality."""

    name = "batch"
    of_batches = True

    def take(self, rows: Tensor | None, norms: Tensor) -> None:
        self._values = norms

    def sample(self) -> Sample | None:
        return None if self._values is None else Sample(self._values)

    def upsilon(self) -> float:
        if self._values is None:
            raise RuntimeError("no gradient norms were observed yet; call observe first")
        return power_mean(self._values, self.q)


class Ema(Batch):
    """Moving average of the batch values of Υ^q; [A] reports that it does worse. Keeps no values, so c = δ/Υ^(q−1).

    Args:
        rate: Weight η of the newest batch, in (0, 1].
    """

    name = "ema"

    def __init__(self, rate: float = 0.1) -> None:
        super().__init__()
        check_real("sensitivity.rate", rate, "(0, 1]", "0.1 is usual")
        self.rate = rate
        self._log_power: float | None = None  # log Υ^q; the power itself overflows at q far from 1

    def take(self, rows: Tensor | None, norms: Tensor) -> None:
        fresh = power_mean(norms, self.q)
        log_fresh = self.q * math.log(fresh) if fresh > 0 else -math.inf
        if self._log_power is None or self.rate == 1:
            self._log_power = log_fresh
        else:
            old, new = math.log1p(-self.rate) + self._log_power, math.log(self.rate) + log_fresh
            self._log_power = float(np.logaddexp(old, new))

    def sample(self) -> Sample | None:
        return None

    def upsilon(self) -> float:
        if self._log_power is None:
            raise RuntimeError("no gradient norms were observed yet; call observe first")
        return math.exp(self._log_power / self.q)

    def state_dict(self) -> dict[str, Any]:
        return {"log_power": self._log_power}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._log_power = state["log_power"]


class Exact(Batch):
    """A pass over the whole training set every k steps; k = 1 is the method as published [A].

    Args:
        every: Steps between passes, at least 1.
    """

    name = "exact"
    of_batches = False

    def __init__(self, every: int = 1) -> None:
        super().__init__()
        check_whole("sensitivity.every", every)
        self.every = every

    def wanted(self, step: int) -> Tensor | None:
        if step % self.every and self._values is not None:
            return None
        return torch.arange(self.n_train)

    def measured(self, index: Tensor, norms: Tensor) -> None:
        self._values = norms.detach().cpu()

    def observe(self, index: Tensor | None, norms: Tensor, most: int | None = None) -> None:
        """The batch tells nothing that the pass didn't."""

    def take(self, rows: Tensor | None, norms: Tensor) -> None:
        """Likewise."""


class Subsample(Exact):
    """A fresh random subset every k steps: unbiased for Υ^q.

    Args:
        size: Images in the subset.
        every: Steps between passes, at least 1.
    """

    name = "subsample"

    def __init__(self, size: int = 1024, every: int = 10) -> None:
        super().__init__(every)
        check_whole("sensitivity.size", size)
        self.size = size

    def wanted(self, step: int) -> Tensor | None:
        if super().wanted(step) is None:
            return None
        order = torch.randperm(self.n_train, generator=generator(self.seed, "subsample", step))
        return order[: self.size].sort().values
