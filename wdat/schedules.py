"""Shapes of the learning rate: functions of the progress t in [0, 1], so that a schedule scales to any length."""

from __future__ import annotations

import math
from collections.abc import Sequence

from wdat.errors import SettingError


class Constant:
    """Factor 1 throughout."""

    def __call__(self, t: float) -> float:
        return 1.0


class Cosine:
    """Linear warm-up, then half a cosine to zero (Loshchilov & Hutter 2017).

    Args:
        warmup: Share of the run spent on the warm-up, in [0, 1).
    """

    def __init__(self, warmup: float = 0.0) -> None:
        if not 0 <= warmup < 1:
            raise SettingError(f"schedule.shape.warmup={warmup} must be a share of the run in [0, 1)")
        self.warmup = warmup

    def __call__(self, t: float) -> float:
        if t < self.warmup:
            return t / self.warmup
        return 0.5 * (1 + math.cos(math.pi * min((t - self.warmup) / (1 - self.warmup), 1.0)))


class Steps:
    """The rate is multiplied by `factor` at each milestone.

    Args:
        milestones: Shares of the run, in [0, 1].
        factor: What the rate is multiplied by.
    """

    def __init__(self, milestones: Sequence[float], factor: float = 0.1) -> None:
        if any(not 0 <= m <= 1 for m in milestones):
            raise SettingError(f"schedule.shape.milestones={list(milestones)} must be shares of the run in [0, 1]")
        self.milestones, self.factor = tuple(milestones), factor

    def __call__(self, t: float) -> float:
        return float(self.factor ** sum(t >= m for m in self.milestones))
