"""Images of a split, and beside them a pool of synthetic ones."""

from __future__ import annotations

import torch
from torch import Tensor

from wdat.data.augment import Draws
from wdat.data.images import ImageSet, LabelledImages
from wdat.data.pool import SyntheticPool


class MixedSet(LabelledImages):
    """A split of N images, and a pool, which the rows from N on stand for. The pool is read from its file row by row.

    Args:
        originals: The split; its augmentation is that of the pool's images too.
        pool: The pool, its images of the same shape.
    """

    def __init__(self, originals: ImageSet, pool: SyntheticPool) -> None:
        super().__init__(originals.labels, originals.augment, originals.seed)
        self.originals = originals
        self.pool = pool

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.originals.shape

    def to(self, device: torch.device) -> MixedSet:
        """The originals on a device; the pool stays where it is, and its images are copied batch by batch."""
        return MixedSet(self.originals.to(device), self.pool)

    def synthetic(self, index: Tensor) -> Tensor:
        return index >= len(self)

    def pixels(self, index: Tensor, draws: Draws | None) -> Tensor:
        return self.rows_of(index, draws)[0]

    def rows_of(self, index: Tensor, draws: Draws | None) -> tuple[Tensor, Tensor]:
        synthetic = self.synthetic(index)
        own = index[~synthetic]
        images, labels = self.pool.read((index[synthetic] - len(self)).cpu())
        order = synthetic.to(torch.uint8).argsort(stable=True).argsort()  # originals first, and back
        x = torch.cat([self.originals.pixels(own, None), images.to(index.device)])[order]
        y = torch.cat([self.labels[own], labels.to(index.device)])[order]
        augment = self.originals.augment
        return x if augment is None or draws is None else augment(x, draws), y
