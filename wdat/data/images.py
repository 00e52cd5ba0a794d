"""Images in memory, read a batch at a time."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.data import Dataset

from wdat import seeding
from wdat.batch import Batch
from wdat.data.augment import Augment, Draws
from wdat.data.sampling import BatchPlan


class ImageSet(Dataset[Batch]):
    """One split. An item is a whole batch, chosen by a `BatchPlan`.

    Args:
        images: (N, C, H, W), uint8, on any device.
        labels: (N,), int64, on the same device.
        augment: The augmentation, or None to read images as they are.
        seed: The seed of the run.
    """

    def __init__(self, images: Tensor, labels: Tensor, augment: Augment | None = None, seed: int = 0) -> None:
        self.images = images
        self.labels = labels
        self.augment = augment
        self.seed = seed

    def to(self, device: torch.device) -> ImageSet:
        """The same images on a device; itself where they are there."""
        if self.images.device == device:
            return self
        return ImageSet(self.images.to(device), self.labels.to(device), self.augment, self.seed)

    def __len__(self) -> int:
        """Number of images."""
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
        index = plan.index.to(device)
        x = self.images[index]
        if self.augment is not None and draws is not None:
            x = self.augment(x, draws.at(plan.place))
        return Batch(x.to(torch.float32) / 255, self.labels[index], index, plan.place.to(device), plan.size, plan.step)
