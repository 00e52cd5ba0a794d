"""Shapes of the learning rate: functions of the progress t in [0, 1], so that a schedule scales to any length.

PyTorch's own schedulers are told the number of steps when they are made and keep it in their state: they can't be
resumed in a longer run, and Lightning's count of steps isn't to be had before training runs (see `WDATModule`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from wdat.errors import SettingError, check_real, check_whole


class Constant:
    """Factor 1 throughout."""

    def __call__(self, t: float) -> float:
        return 1.0


class Cosine:
    """Linear warm-up from zero, then half a cosine (Loshchilov & Hutter 2017).

    Args:
        warmup: Share of the run spent on the warm-up, in [0, 1).
        final: Factor at the end, in [0, 1].
    """

    def __init__(self, warmup: float = 0.0, final: float = 0.0) -> None:
        _check_share("warmup", warmup)
        _check_factor("final", final)
        self.warmup, self.final = warmup, final

    def __call__(self, t: float) -> float:
        if t < self.warmup:
            return t / self.warmup
        return _half_cosine(1.0, self.final, (t - self.warmup) / (1 - self.warmup))


class OneCycle:
    """Half a cosine up to 1, half a cosine down, the momentum the other way round (Smith & Topin 2019).

    The factor changes once an epoch where the warm-up lasts longer than one, with the values of torch's
    `OneCycleLR(total_steps=epochs)`. Shorter runs would lose their warm-up; there it changes at every step **(ours)**.

    Args:
        warmup: Share of the run spent on the way up, in [0, 1).
        start: Factor at the start, in [0, 1].
        final: Factor at the end, in [0, 1].
        epochs: Epochs of the run; None to change at every step whatever its length.
        cycle_momentum: The momentum where the factor is 1, and at both ends; None leaves the optimiser's own.

    Raises:
        SettingError: If a setting is out of range.
    """

    def __init__(
        self,
        warmup: float = 0.3,
        start: float = 0.04,
        final: float = 4e-6,
        epochs: int | None = None,
        cycle_momentum: Sequence[float] | None = None,
    ) -> None:
        _check_share("warmup", warmup)
        _check_factor("start", start)
        _check_factor("final", final)
        if epochs is not None:
            check_whole("scheduler.epochs", epochs, 0, "null for a rate that changes at every step")
        momentum = None if cycle_momentum is None else tuple(cycle_momentum)
        if momentum is not None and len(momentum) != 2:
            raise SettingError(f"scheduler.cycle_momentum={list(momentum)} must be two numbers, or null")
        for value in momentum or ():
            check_real("scheduler.cycle_momentum", value, "[0, 1)", "at the peak and at the ends, or null")
        self.warmup, self.start, self.final, self.cycle_momentum = warmup, start, final, momentum
        self.epochs = epochs if epochs is not None and warmup * epochs > 1 else None

    def __call__(self, t: float) -> float:
        return self._cycle(t, self.start, 1.0, self.final)

    def momentum(self, t: float) -> float | None:
        """The momentum at the progress t; None for the optimiser's own."""
        if self.cycle_momentum is None:
            return None
        peak, ends = self.cycle_momentum
        return self._cycle(t, ends, peak, ends)

    def _cycle(self, t: float, first: float, middle: float, last: float) -> float:
        """From one value over another to the last; of n epochs, the last begins at (n − 1)/n."""
        now, peak, end = t, self.warmup, 1.0
        if self.epochs:
            now = math.floor(t * self.epochs + 1e-6)  # 1e-6: t is a ratio of steps, rounded
            peak, end = self.warmup * self.epochs - 1, self.epochs - 1.0
        if now < peak:
            return _half_cosine(first, middle, now / peak)
        return _half_cosine(middle, last, (now - peak) / (end - peak))


class Steps:
    """The rate is multiplied by `factor` at each milestone.

    Args:
        milestones: Shares of the run, in [0, 1].
        factor: What the rate is multiplied by.
    """

    def __init__(self, milestones: Sequence[float], factor: float = 0.1) -> None:
        for milestone in milestones:
            check_real("scheduler.milestones", milestone, "[0, 1]", "shares of the run")
        check_real("scheduler.factor", factor, "[0, inf)", "what the rate is multiplied by")
        self.milestones, self.factor = tuple(milestones), factor

    def __call__(self, t: float) -> float:
        return float(self.factor ** sum(t >= m for m in self.milestones))


def _half_cosine(first: float, last: float, share: float) -> float:
    """From the first value, at share 0, to the last, at share 1 and beyond."""
    return last + (first - last) * 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))


def _check_share(key: str, value: float) -> None:
    check_real(f"scheduler.{key}", value, "[0, 1)", "a share of the run")


def _check_factor(key: str, value: float) -> None:
    check_real(f"scheduler.{key}", value, "[0, 1]", "a factor of the peak rate")
