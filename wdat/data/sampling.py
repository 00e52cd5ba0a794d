"""Which images make up which batch: a function of the seed and the epoch, divided over the processes by position."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DistributedSampler

from wdat import seeding
from wdat.errors import SettingError


@dataclass(frozen=True)
class BatchPlan:
    """One process's part of one global batch, before any image is read.

    Attributes:
        index: (B,), int64: rows in the split; row r of a pool of synthetic images is n + r.
        position: (B,), int64: positions in the global batch.
        size: Number of images in the global batch.
        step: The global batch's number since the start of training; 0 in evaluation.
        epoch: The epoch it belongs to; 0 in evaluation.
    """

    index: Tensor
    position: Tensor
    size: int
    step: int
    epoch: int


class _Plan(DistributedSampler[BatchPlan]):
    """What both plans share. Lightning leaves a `DistributedSampler` as it is, and tells it the epoch."""

    def __init__(self, n: int, batch_size: int, rank: int, world_size: int, shuffle: bool, seed: int = 0) -> None:
        if batch_size < 1:
            raise SettingError(
                f"a batch of {batch_size} images: set data.batch_size and data.eval_batch_size to 1 or more"
            )
        super().__init__(range(n), world_size, rank, shuffle=shuffle, seed=seed)  # type: ignore[arg-type]
        self.n = n
        self.batch_size = batch_size
        self.world_size = world_size


def synthetic_positions(size: int, fraction: float) -> Tensor:
    """Which positions of a global batch are a pool's: B − round((1 − f)·B), evenly spread over the processes.

    Args:
        size: Images in the global batch, B.
        fraction: f, in (0, 1).

    Returns:
        (B,), bool.

    Raises:
        SettingError: No original or no synthetic image is left.
    """
    count = size - round((1 - fraction) * size)
    if not 0 < count < size:
        raise SettingError(
            f"data.synthetic.fraction={fraction} of {size} images leaves no {'synthetic' if not count else 'original'} "
            f"image in a batch: set it nearer to 0.5, or raise data.batch_size"
        )
    position = torch.arange(size)
    return (position + 1) * count // size > position * count // size


def check_divisible(batch_size: int, world_size: int) -> None:
    """Refuse a global batch that processes can't share evenly.

    Raises:
        SettingError: If it isn't a multiple of their number.
    """
    if batch_size % world_size:
        raise SettingError(
            f"data.batch_size={batch_size} counts the images over all processes and can't be divided over "
            f"{world_size}: set data.batch_size={-(-batch_size // world_size) * world_size}, or change "
            "trainer.devices"
        )


class TrainPlan(_Plan):
    """The shuffled batches of training, one epoch at a time.

    The order of an epoch is one permutation, the same on every process. Global batch k is its rows k·B to (k + 1)·B,
    of which process `rank` of `world_size` takes its consecutive share. A last, incomplete batch is dropped; a set
    smaller than one batch is one batch.

    With a pool of synthetic images an epoch has as many batches, and each takes (1 − f)·B rows of the permutation and
    the others from the pool, uniformly.

    Args:
        n: Number of training images.
        batch_size: Images in a global batch, over all processes: B.
        seed: The seed of the run.
        rank: This process's number, from 0.
        world_size: Number of processes.
        pool: Number of synthetic images; 0 for none.
        fraction: f, their share of a batch.

    Raises:
        SettingError: B can't be divided evenly over the processes or over originals and pool, or there are more
            processes than images.
    """

    def __init__(
        self,
        n: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        pool: int = 0,
        fraction: float = 0.0,
    ) -> None:
        super().__init__(n, batch_size, rank, world_size, shuffle=True, seed=seed)
        check_divisible(batch_size, world_size)
        if n < world_size:
            raise SettingError(
                f"{n} training images for {world_size} processes: set trainer.devices or raise data.limit_train"
            )
        size = min(batch_size, n)
        self.pool = pool
        self._drawn_places = synthetic_positions(size, fraction) if pool else torch.zeros(size, dtype=torch.bool)
        self._first = 0  # where the next pass begins
        self._drawn = 0  # batches of this epoch handed out so far

    def __len__(self) -> int:
        """Number of global batches in an epoch."""
        return max(1, self.n // self.batch_size)

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order; a position restored for the same epoch is kept."""
        if epoch != self.epoch:
            self.epoch, self._first, self._drawn = epoch, 0, 0

    def __iter__(self) -> Iterator[BatchPlan]:
        first, self._first = self._first, 0
        size = len(self._drawn_places)
        order = torch.randperm(self.n, generator=seeding.generator(self.seed, "order", self.epoch))
        position = torch.arange(self.rank * size // self.world_size, (self.rank + 1) * size // self.world_size)
        for k in range(first, len(self)):
            self._drawn = k + 1
            step = self.epoch * len(self) + k
            yield BatchPlan(self._rows(order, k, step)[position], position, size, step, self.epoch)

    def _rows(self, order: Tensor, k: int, step: int) -> Tensor:
        """The rows of a whole global batch."""
        drawn = self._drawn_places
        size, count = len(drawn), int(drawn.sum())
        own = order[k * (size - count) : (k + 1) * (size - count)]
        if not count:
            return own
        rows = torch.empty(size, dtype=torch.int64)
        rows[~drawn] = own
        rows[drawn] = self.n + torch.randint(self.pool, (count,), generator=seeding.generator(self.seed, "pool", step))
        return rows

    def handed_out(self, step: int) -> None:
        """Notes that batch `step` has come out of the loader, whose workers may have drawn further ones."""
        self._drawn = step - self.epoch * len(self) + 1

    def state_dict(self) -> dict[str, int]:
        """The position in training, equal on all processes."""
        return {"epoch": self.epoch, "drawn": self._drawn}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Makes the next pass go on after the batches that were handed out when `state` was taken."""
        self.epoch = state["epoch"]
        self._first = self._drawn = state["drawn"]


class ShardPlan(_Plan):
    """The batches of evaluation: every image once, on one process.

    Process `rank` takes rows rank, rank + world_size, …; nothing is repeated to make shards even. All processes have
    the same number of batches, so that loops with a collective in each batch stay in step; where a process has no image
    left its batch is empty.

    Args:
        n: Number of images.
        batch_size: The most images a process handles at once.
        rank: This process's number, from 0.
        world_size: Number of processes.
    """

    def __init__(self, n: int, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        super().__init__(n, batch_size, rank, world_size, shuffle=False)

    def __len__(self) -> int:
        """Number of batches of each process."""
        return -(-self.n // (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[BatchPlan]:
        whole = self.batch_size * self.world_size
        for start in range(0, len(self) * whole, whole):
            stop = min(start + whole, self.n)
            index = torch.arange(min(start + self.rank, stop), stop, self.world_size)
            yield BatchPlan(index, index - start, stop - start, 0, 0)
