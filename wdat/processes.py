"""Sums and maxima over the processes that share a set of images.

What shares a budget is a *set*, and a set may be spread over several processes. Functions that reduce over it take a
`Processes`; the default, `ALONE`, is this process only, so nothing ever waits for another by accident.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


class Processes:
    """One process: reductions return what they are given.

    Attributes:
        rank: This process's number, from 0.
        world: How many processes share the set.
    """

    rank: int = 0
    world: int = 1

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sum of each value over the processes, in float64."""
        return list(values)

    def max(self, value: float) -> float:
        """Largest of the processes' values."""
        return value

    def gather(self, values: Tensor) -> Tensor:
        """All processes' rows, in the order of their ranks; the numbers of rows may differ."""
        return values


class TorchProcesses(Processes):
    """All processes of the default group of `torch.distributed`; every one must make the same calls."""

    def __init__(self, device: torch.device) -> None:
        self.rank, self.world, self._device = dist.get_rank(), dist.get_world_size(), device

    def _reduce(self, values: Sequence[float], op: dist.ReduceOp.RedOpType) -> list[float]:
        tensor = torch.tensor(values, dtype=torch.float64, device=self._device)
        dist.all_reduce(tensor, op=op)
        return [float(v) for v in tensor.tolist()]

    def sum(self, values: Sequence[float]) -> list[float]:
        return self._reduce(values, dist.ReduceOp.SUM)

    def max(self, value: float) -> float:
        return self._reduce([value], dist.ReduceOp.MAX)[0]

    def gather(self, values: Tensor) -> Tensor:
        counts = [int(c) for c in self.sum([float(values.shape[0]) * (r == self.rank) for r in range(self.world)])]
        longest = max(counts)
        padded = values.new_zeros((longest, *values.shape[1:]))
        padded[: values.shape[0]] = values
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


ALONE = Processes()


def current(device: torch.device) -> Processes:
    """The processes of the running `torch.distributed` group, or this one alone."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return TorchProcesses(device)
    return ALONE
