"""Labelled images, read a batch at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset

from wdat import seeding
from wdat.data.augment import Augment, Draws
from wdat.data.batch import Batch
from wdat.data.sampling import BatchPlan


class Choices(Protocol):
    """Random choices for the images of a global batch."""

    def at(self, position: Tensor) -> Any:
        """The choices for the images at `position` (B,), int64."""
        ...


class Augmentation(Protocol):
    """What draws them."""

    def draw(self, size: int, generator: torch.Generator) -> Choices:
        """Draws for `size` images, on the CPU."""
        ...


class LabelledImages(Dataset[Batch], ABC):
    """One split. An item is a whole batch, chosen by a `BatchPlan`; its images are uint8, which loaders make float.

    Attributes:
        in_files: Whether images are decoded from files of their own, for which several processes may read.

    Args:
        labels: (N,), int64, on the device of the images.
        augment: The augmentation, or None to read images as they are.
        seed: The seed of the run.
    """

    in_files: bool = False

    def __init__(self, labels: Tensor, augment: Augmentation | None, seed: int) -> None:
        self.labels = labels
        self.augment = augment
        self.seed = seed

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""

    @abstractmethod
    def pixels(self, index: Tensor, draws: Any) -> Tensor:
        """Images as uint8.

        Args:
            index: (B,), int64: rows of the split, on the device of the labels.
            draws: The choices for these images, or None to read them as they are.

        Returns:
            (B, C, H, W), contiguous.
        """

    @abstractmethod
    def to(self, device: torch.device) -> LabelledImages:
        """The same images kept in the memory of a device, where they are kept in memory at all."""

    def __len__(self) -> int:
        """Number of images."""
        return len(self.labels)

    def __getitem__(self, plan: BatchPlan) -> Batch:
        """The planned batch, augmented as a function of the seed, the step and the position."""
        return self.read(plan, self.draw(plan.size, "augment", plan.step))

    def draw(self, size: int, purpose: str, step: int) -> Choices | None:
        """The choices for a global batch of `size` images; None where nothing is augmented."""
        return None if self.augment is None else self.augment.draw(size, self.generator(purpose, step))

    def generator(self, purpose: str, step: int) -> torch.Generator:
        """Random numbers on the CPU, a function of the seed, the purpose and the step."""
        return seeding.generator(self.seed, purpose, step)

    def read(self, plan: BatchPlan, draws: Choices | None = None) -> Batch:
        """The planned batch, its images as uint8, a quarter of what float32 would take on the way to the device.

        Args:
            plan: Rows and positions.
            draws: The choices for the whole global batch, of which those at `plan.position` are used; None for none.
        """
        device = self.labels.device
        index, position = (rows.to(device, non_blocking=True) for rows in (plan.index, plan.position))
        x, y = self.rows_of(index, None if draws is None else draws.at(plan.position))
        return Batch(x, y, index, position, plan.size, plan.step, self.synthetic(index))

    def rows_of(self, index: Tensor, draws: Any) -> tuple[Tensor, Tensor]:
        """Images as `pixels` gives them, and their labels (B,)."""
        return self.pixels(index, draws), self.labels[index]

    def synthetic(self, index: Tensor) -> Tensor | None:
        """Which rows (B,) are synthetic images, (B,) bool; None where there are none."""
        return None


class ImageSet(LabelledImages):
    """Images in a tensor, in memory or mapped from a file.

    Args:
        images: (M, C, H, W), uint8, on any device.
        labels: (N,), int64, on the same device.
        augment: The augmentation, or None to read images as they are.
        seed: The seed of the run.
        rows: (N,), int64: where the images of this split stand in `images`; None where these are the split.
    """

    augment: Augment | None

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        augment: Augment | None = None,
        seed: int = 0,
        rows: Tensor | None = None,
    ) -> None:
        super().__init__(labels, augment, seed)
        self.images = images
        self.rows = rows

    @property
    def shape(self) -> tuple[int, int, int]:
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    def to(self, device: torch.device) -> ImageSet:
        """The images of this split alone on a device; itself where that is so."""
        if self.rows is None and self.images.device == device:
            return self
        images = self.images if self.rows is None else self.images[self.rows]
        return ImageSet(images.contiguous().to(device), self.labels.to(device), self.augment, self.seed)

    def pixels(self, index: Tensor, draws: Draws | None) -> Tensor:
        x = self.images[index if self.rows is None else self.rows[index]].contiguous()
        return x if self.augment is None or draws is None else self.augment(x, draws)
