"""Sums and maxima over the processes that share a set of images.

What shares a budget is a *set*, and a set may be spread over several processes. Functions that reduce over it take a
`Processes`; the default, `ALONE`, is this process only, so nothing ever waits for another by accident.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from wdat.errors import RunError, SettingError, cause, chain

PIECE = 512  # rows of a process that travel at once where a whole set is brought together


class Processes:
    """One process: reductions return what they are given.

    Attributes:
        rank: This process's number, from 0.
        world_size: How many processes share the set.
        device: Where the tensors must be that travel between processes.
    """

    rank: int = 0
    world_size: int = 1
    device: torch.device = torch.device("cpu")

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sum of each value over the processes, in float64."""
        return list(values)

    def add(self, values: Tensor) -> None:
        """Sum of a tensor over the processes, in place and in its own precision."""

    def max(self, value: float) -> float:
        """Largest of the processes' values."""
        return value

    def gather(self, values: Tensor) -> Tensor:
        """All processes' rows, in the order of their ranks, where the given ones are; their numbers may differ."""
        return values

    def to_host(self, values: Tensor, most: int | None = None) -> Tensor:
        """All processes' rows on the CPU, in the order of their ranks.

        Args:
            values: (N, k), float64, this process's rows.
            most: The most rows that any process has, where that is known: then one collective operation will do.
        """
        return self.gather(values).cpu()

    def total(self, values: Tensor) -> tuple[Tensor, list[float]]:
        """Sum of a vector (n,), float64, over the processes, where it is and on the host, which waits for it once."""
        sums = self.sum(values.tolist())
        return values if self.world_size == 1 else values.new_tensor(sums), sums

    def agree(self, error: Exception | None) -> None:
        """Raise on every process where any has an error, so that none is left waiting for the others.

        Args:
            error: This process's own, or None.

        Raises:
            Exception: This process's own error; where it has none, a `SettingError` or `RunError` that tells the
                first one of the others.
        """
        if not self.sum([float(error is not None)])[0]:
            return
        said = error and (cause(error, SettingError, RunError) or error)
        known = isinstance(said, (SettingError, RunError))
        text = str(said) if known else f"{type(said).__name__}: {said}"
        told = {"rank": self.rank, "setting": isinstance(said, SettingError), "text": text}
        line = [] if error is None else list(json.dumps(told).encode() + b"\n")
        lines = self.gather(torch.tensor(line, dtype=torch.uint8, device=self.device))
        if error is not None:
            raise error
        first = json.loads(bytes(lines.tolist()).splitlines()[0])
        raise (SettingError if first["setting"] else RunError)(f"process {first['rank']}: {first['text']}")


class TorchProcesses(Processes):
    """All processes of the default group of `torch.distributed`; every one must make the same calls."""

    def __init__(self, device: torch.device) -> None:
        self.rank, self.world_size, self.device = dist.get_rank(), dist.get_world_size(), device

    def _reduce(self, values: Sequence[float], op: dist.ReduceOp.RedOpType) -> list[float]:
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        with distributed_errors():
            dist.all_reduce(tensor, op=op)
            return [float(v) for v in tensor.tolist()]

    def sum(self, values: Sequence[float]) -> list[float]:
        return self._reduce(values, dist.ReduceOp.SUM)

    def add(self, values: Tensor) -> None:
        with distributed_errors():
            dist.all_reduce(values)

    def max(self, value: float) -> float:
        return self._reduce([value], dist.ReduceOp.MAX)[0]

    def total(self, values: Tensor) -> tuple[Tensor, list[float]]:
        summed = values.clone()
        with distributed_errors():
            dist.all_reduce(summed)
            return summed, [float(v) for v in summed.tolist()]

    def to_host(self, values: Tensor, most: int | None = None) -> Tensor:
        if most is None:
            return super().to_host(values)
        padded = values.new_zeros((most + 1, values.shape[1]))  # the last row says how many count
        padded[: values.shape[0]] = values
        padded[most] = values.shape[0]
        parts = [torch.empty_like(padded) for _ in range(self.world_size)]
        with distributed_errors():
            dist.all_gather(parts, padded)
            host = torch.stack(parts).cpu()
        return torch.cat([part[: int(part[most, 0])] for part in host])

    def gather(self, values: Tensor) -> Tensor:
        counts = [int(c) for c in self.sum([float(values.shape[0]) * (r == self.rank) for r in range(self.world_size)])]
        if not any(counts):
            return values
        padded = values.new_zeros((max(counts), *values.shape[1:]), device=self.device)
        padded[: values.shape[0]] = values
        parts = [torch.empty_like(padded) for _ in counts]
        with distributed_errors():
            dist.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)]).to(values.device)


def _lost(error: BaseException) -> str | None:
    """What the library says of other processes that it can't reach; None for any other error.

    gloo has no kind of error of its own; its messages begin with the place in its source and end with advice. NCCL's
    say after the place in its source what failed, and on a later line why.
    """
    text, _, reason = str(error).strip().partition("\n")
    if isinstance(error, RunError) or not isinstance(error, RuntimeError):
        return None
    if "NCCL" in text and (isinstance(error, dist.DistError) or "NCCL error" in text):
        text = re.sub(r"NCCL error in: \S+, *", "NCCL: ", text).partition(", NCCL version")[0]
        why = reason.strip().partition("\n")[0]
        return f"{text.partition(' (run with')[0]}{f', {why}' if why else ''}; NCCL_DEBUG=INFO tells more"
    if isinstance(error, dist.DistError) or any(word in text for word in ("gloo/", "by peer", "pair closure")):
        return re.sub(r"^\[\S*\] *", "", text).partition(". ")[0]
    return None


@contextmanager
def distributed_errors(remedy: Callable[[], str] | None = None) -> Iterator[None]:
    """Tell in a `RunError` of other processes that can't be reached, whether for us or for a library's own sums.

    Args:
        remedy: What to do about it, asked for where it is needed.

    Raises:
        RunError: If one of them has gone, or is late.
    """
    try:
        yield
    except RuntimeError as error:
        reason = next(filter(None, map(_lost, chain(error))), None)
        if reason is None:
            raise
        raise RunError(
            f"process {dist.get_rank()} waited in vain for the others ({reason}): one of them has failed, and "
            "says why, or was late by more than the time limit (the strategy's timeout)"
            f"{f'; {remedy()}' if remedy else ''}"
        ) from error


ALONE = Processes()


def current(device: torch.device) -> Processes:
    """The processes of the running `torch.distributed` group, or this one alone."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return TorchProcesses(device)
    return ALONE


@contextmanager
def together(processes: Processes) -> Iterator[None]:
    """Raise on all processes what the block raises on any of them.

    Args:
        processes: Those that all pass through the block; inside it none may wait for another.
    """
    error = None
    try:
        yield
    except Exception as raised:
        error = raised
    processes.agree(error)


def gather_to_rank_zero(values: Tensor, rows: Tensor, processes: Processes) -> Tensor | None:
    """The values of a whole set on the first process, on its CPU; None on the others.

    Args:
        values: (N, ...), this process's part.
        rows: (N,), its places in the set.
        processes: Hold the other parts.
    """
    size = int(processes.sum([float(len(values))])[0])
    whole = torch.empty((size, *values.shape[1:]), dtype=values.dtype) if processes.rank == 0 else None
    for start in range(0, int(processes.max(float(len(values)))), PIECE):
        piece = processes.gather(values[start : start + PIECE])
        place = processes.gather(rows[start : start + PIECE])
        if whole is not None:
            whole[place.cpu()] = piece.cpu()
    return whole


def scatter_from_rank_zero(whole: Tensor | None, like: Tensor, rows: Tensor, processes: Processes) -> Tensor:
    """This process's part of values that only the first process has; the inverse of `gather_to_rank_zero`.

    Args:
        whole: The values of the whole set, in its order, on the first process; elsewhere it isn't looked at.
        like: (0, ...), has the dtype, the device and the shape of a row.
        rows: (N,), this process's places in the set.
        processes: Share the set.
    """
    size = int(processes.sum([float(len(rows))])[0])
    mine = like.new_empty((len(rows), *like.shape[1:]))
    for start in range(0, size, PIECE):
        part = like if whole is None or processes.rank else whole[start : start + PIECE].to(like)
        piece = processes.gather(part)
        here = (rows >= start) & (rows < start + len(piece))
        mine[here] = piece[rows[here] - start]
    return mine
