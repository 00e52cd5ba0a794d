"""Random crops and flips of whole batches, drawn for the global batch and taken by position."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad


class Draws(NamedTuple):
    """The random choices for a set of images.

    Attributes:
        shifts: (N, 2), int64: row and column, in 0 .. 2·padding, where the crop of the padded image begins.
        flips: (N,), bool: whether left and right are exchanged.
    """

    shifts: Tensor
    flips: Tensor

    def at(self, position: Tensor) -> Draws:
        """The choices for the images at `position` (B,), int64."""
        return Draws(self.shifts[position], self.flips[position])


def crop_and_flip(images: Tensor, shifts: Tensor, flips: Tensor, padding: int = 4) -> Tensor:
    """Pads with zeros, crops back to size, then flips.

    Args:
        images: (B, C, H, W), any dtype.
        shifts: (B, 2), int64: row and column of the crop, in 0 .. 2·`padding`; `padding` leaves an image in place.
        flips: (B,), bool.
        padding: Pixels added on each side.

    Returns:
        (B, C, H, W), same dtype and device as `images`.
    """
    _, channels, height, width = images.shape
    shifts, flips = (drawn.to(images.device, non_blocking=True) for drawn in (shifts, flips))
    rows = shifts[:, :1] + torch.arange(height, device=images.device)
    columns = shifts[:, 1:] + torch.arange(width, device=images.device)
    columns = torch.where(flips[:, None], columns.flip(1), columns)
    padded = pad(images, (padding,) * 4)
    cropped = padded.gather(2, rows[:, None, :, None].expand(-1, channels, -1, padded.shape[3]))
    return cropped.gather(3, columns[:, None, None, :].expand(-1, channels, height, -1))


@dataclass(frozen=True)
class Augment:
    """The settings of the augmentation.

    Attributes:
        padding: Pixels by which a crop may be moved (`data.crop`); 0 for no cropping.
        flip: Whether images are flipped left to right, one in two (`data.flip`).
    """

    padding: int = 4
    flip: bool = True

    def draw(self, size: int, generator: torch.Generator) -> Draws:
        """Draws for `size` images, on the CPU."""
        shifts = torch.randint(2 * self.padding + 1, (size, 2), generator=generator)
        flips = torch.rand(size, generator=generator) < 0.5
        return Draws(shifts, flips & self.flip)

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        """Applies `draws`, one for each of the images (B, C, H, W)."""
        if not self.padding and not self.flip:
            return images
        return crop_and_flip(images, *draws, self.padding)
