"""Images in memory, and beside them perhaps a pool of synthetic ones, read a batch at a time."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.data import Dataset

from wdat import seeding
from wdat.batch import Batch
from wdat.data.augment import Augment, Draws
from wdat.data.pool import SyntheticPool
from wdat.data.sampling import BatchPlan


class ImageSet(Dataset[Batch]):
    """One split. An item is a whole batch, chosen by a `BatchPlan`.

    Args:
        images: (N, C, H, W), uint8, on any device.
        labels: (N,), int64, on the same device.
        augment: The augmentation, or None to read images as they are.
        seed: The seed of the run.
        pool: Synthetic images, which the rows from N on stand for; read from their file batch by batch.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        augment: Augment | None = None,
        seed: int = 0,
        pool: SyntheticPool | None = None,
    ) -> None:
        self.images = images
        self.labels = labels
        self.augment = augment
        self.seed = seed
        self.pool = pool

    def to(self, device: torch.device) -> ImageSet:
        """The same images on a device; itself where they are there."""
        if self.images.device == device:
            return self
        return ImageSet(self.images.to(device), self.labels.to(device), self.augment, self.seed, self.pool)

    def __len__(self) -> int:
        """Number of images, without the pool's."""
        return len(self.images)

    def __getitem__(self, plan: BatchPlan) -> Batch:
        """The planned batch, augmented as a function of the seed, the step and the place."""
        if self.augment is None:
            return self.read(plan)
        return self.read(plan, self.augment.draw(plan.size, seeding.generator(self.seed, "augment", plan.step)))

    def read(self, plan: BatchPlan, draws: Draws | None = None) -> Batch:
        """The planned batch, as float32 in [0, 1].

        Args:
            plan: Rows and places.
            draws: The choices for the whole global batch, of which those at `plan.place` are used; None for none.
        """
        device = self.images.device
        synthetic = None if self.pool is None else plan.index >= len(self)
        x, y = self._rows(plan.index, synthetic)
        if self.augment is not None and draws is not None:
            x = self.augment(x, draws.at(plan.place))
        index, place = plan.index.to(device), plan.place.to(device)
        synthetic = None if synthetic is None else synthetic.to(device)
        return Batch(x.to(torch.float32) / 255, y, index, place, plan.size, plan.step, synthetic)

    def _rows(self, index: Tensor, synthetic: Tensor | None) -> tuple[Tensor, Tensor]:
        """Images and labels, on the device; those of the pool are copied there."""
        device = self.images.device
        if self.pool is None or synthetic is None:
            index = index.to(device)
            return self.images[index], self.labels[index]
        own, drawn = index[~synthetic].to(device), index[synthetic] - len(self)
        images, labels = self.pool.read(drawn)
        x = torch.cat([self.images[own], images.to(device)])
        y = torch.cat([self.labels[own], labels.to(device)])
        order = synthetic.to(torch.uint8).argsort(stable=True).argsort().to(device)  # originals first, and back
        return x[order], y[order]
