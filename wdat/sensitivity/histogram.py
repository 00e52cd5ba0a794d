"""A set of positive numbers as counts and power sums in fine logarithmic bins, for sums that never pass over the set.

The bin of a number is the leading bits of its float32 pattern: all of the exponent and `BITS` of the fraction. A bin
is therefore 1.6 % wide at most, whatever the magnitude, and its number needs no logarithm.
"""

from __future__ import annotations

import torch
from torch import Tensor

BITS = 6
BINS = (255 << BITS) + 1  # the last holds infinity
SMALLEST = torch.finfo(torch.float32).tiny  # what is smaller counts as zero


def _bin(values: Tensor) -> Tensor:
    return (values.view(torch.int32) >> (23 - BITS)).long()


class Histogram:
    """Counts and Σ v^order of every bin.

    Within a bin the numbers differ little, so adding and taking away loses no precision: means of order `order` agree
    with those of the numbers themselves to about 1e-12, means of other orders and thresholds to the width of a bin.

    Args:
        order: The power, in (0, inf).
    """

    def __init__(self, order: float) -> None:
        self.order = order
        first = torch.arange(BINS, dtype=torch.int32) << (23 - BITS)
        self._edges = first.view(torch.float32).double()
        self.counts = torch.zeros(BINS, dtype=torch.float64)
        self.sums = torch.zeros(BINS, dtype=torch.float64)  # Σ (v/edge)^order

    def add(self, values: Tensor, sign: int = 1) -> None:
        """Put numbers in (N,), float32, at least 0; infinite ones too.

        Args:
            values: The numbers.
            sign: −1 to take away numbers that were put in before.
        """
        values = torch.where(values < SMALLEST, 0.0, values)
        bins = _bin(values)
        ratio = torch.where(values.isinf(), 1.0, values.double() / self._edges[bins].clamp_min(SMALLEST))
        relative = ratio**self.order
        self.counts.index_add_(0, bins, torch.full_like(relative, sign))
        self.sums.index_add_(0, bins, sign * relative)

    def sample(self) -> tuple[Tensor, Tensor]:
        """One number for each bin that isn't empty, increasing, with its count: (M,), (M,), float64.

        Their mean of order `order` is that of the numbers put in.
        """
        held = self.counts.nonzero().squeeze(1)
        counts = self.counts[held]
        means = (self.sums[held] / counts) ** (1 / self.order)
        return self._edges[held] * torch.where(self._edges[held] > 0, means, 0.0), counts

    def quantile(self, share: float) -> float:
        """The number below which `share` of the numbers lie, up to the width of a bin; 0 if there is none."""
        below = self.counts.cumsum(0)
        if not float(below[-1]):
            return 0.0
        place = int(torch.searchsorted(below, torch.tensor(share * float(below[-1]), dtype=torch.float64)))
        return float(self._edges[min(place, BINS - 1)])

    def __len__(self) -> int:
        """How many numbers were put in."""
        return round(float(self.counts.sum()))
