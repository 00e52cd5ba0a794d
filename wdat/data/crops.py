"""Cutting images of many sizes to one: as RobustBench does for evaluation, and at random for training."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from PIL.Image import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as transforms

from wdat.errors import SettingError

TRIALS = 10
"""Boxes that are tried before the central one is taken, as in torchvision's `RandomResizedCrop`."""

RATIOS = (3 / 4, 4 / 3)
"""Narrowest and widest shape of a box, width over height, as there."""

_NAME = re.compile(r"(Bicubic)?(?:Res([1-9]\d*))?(?:Crop([1-9]\d*))?")


@dataclass(frozen=True)
class CenterCrop:
    """How evaluation brings an image to its size.

    Attributes:
        resize: Pixels of the shorter side after resizing, or without `crop` of both sides; None for no resizing.
        crop: Side of the central square that is kept; smaller images are padded with zeros. None for no cropping.
        bicubic: Whether resizing is bicubic instead of bilinear.
    """

    resize: int | None
    crop: int | None
    bicubic: bool = False

    @classmethod
    def named(cls, name: str) -> CenterCrop:
        """The crop of a name in RobustBench's style: `Res256Crop224`, `Crop288`, `Res224`, `BicubicRes256Crop224`.

        Raises:
            SettingError: The name is of another form.
        """
        found = _NAME.fullmatch(name)
        if found is None or not (found[2] or found[3]):
            raise SettingError(
                f"data.preprocessing={name} is unknown: write Res256Crop224 (shorter side to 256, central 224×224), "
                "BicubicRes256Crop224, Crop288 or Res224, with any numbers of pixels"
            )
        resize, crop = (int(pixels) if pixels else None for pixels in (found[2], found[3]))
        return cls(resize, crop, found[1] is not None)

    @property
    def size(self) -> int:
        """Side of the square that comes out."""
        return self.crop or self.resize or 0

    @property
    def interpolation(self) -> InterpolationMode:
        """How pixels are resampled."""
        return InterpolationMode.BICUBIC if self.bicubic else InterpolationMode.BILINEAR

    def __call__(self, image: Image) -> Tensor:
        """The image as (C, `size`, `size`), uint8."""
        if self.resize:
            side = self.resize if self.crop else [self.resize, self.resize]
            image = transforms.resize(image, side, self.interpolation)
        if self.crop:
            image = transforms.center_crop(image, self.crop)
        pixels: Tensor = transforms.pil_to_tensor(image)
        return pixels


class CropDraws(NamedTuple):
    """The random choices for a set of images, uniform in [0, 1), so that they don't depend on the images' sizes.

    Attributes:
        areas: (N, `TRIALS`).
        ratios: (N, `TRIALS`).
        corners: (N, 2): row and column.
        flips: (N,), bool.
    """

    areas: Tensor
    ratios: Tensor
    corners: Tensor
    flips: Tensor

    def at(self, position: Tensor) -> CropDraws:
        """The choices for the images at `position` (B,), int64."""
        return CropDraws(*(choices[position] for choices in self))


@dataclass(frozen=True)
class RandomCrop:
    """A random box of the image, resized to the size of evaluation, then flipped: torchvision's `RandomResizedCrop`.

    Attributes:
        crop: The crop of evaluation, which gives size and interpolation.
        min_area: Smallest share of the image that a box covers (`data.min_area`); 1 takes the crop of evaluation.
        flip: Whether images are flipped left to right, one in two (`data.flip`).
    """

    crop: CenterCrop
    min_area: float = 0.08
    flip: bool = True

    def draw(self, size: int, generator: torch.Generator) -> CropDraws:
        """Draws for `size` images, on the CPU."""
        areas, ratios, corners = (torch.rand(size, n, generator=generator) for n in (TRIALS, TRIALS, 2))
        flips = torch.rand(size, generator=generator) < 0.5
        return CropDraws(areas, ratios, corners, flips & self.flip)

    def __call__(self, image: Image, draws: CropDraws) -> Tensor:
        """Applies the choices for one image; gives (C, `crop.size`, `crop.size`), uint8."""
        if self.min_area < 1:
            areas, ratios, corner = (choices.tolist() for choices in draws[:3])
            position = box(image.height, image.width, self.min_area, areas, ratios, corner)
            side = [self.crop.size] * 2
            image = transforms.resized_crop(image, *position, side, self.crop.interpolation)
            pixels: Tensor = transforms.pil_to_tensor(image)
        else:
            pixels = self.crop(image)
        return pixels.flip(2) if bool(draws.flips) else pixels


def box(
    height: int, width: int, min_area: float, areas: Sequence[float], ratios: Sequence[float], corner: Sequence[float]
) -> tuple[int, int, int, int]:
    """The part of an image that random numbers choose, by the rule of torchvision's `RandomResizedCrop`.

    Args:
        height: Of the image.
        width: Of the image.
        min_area: Smallest share of the image.
        areas: One number in [0, 1) a trial: how large the box is.
        ratios: One number in [0, 1) a trial: how wide it is for its height, on a logarithmic scale.
        corner: Two numbers in [0, 1): where the first box that fits lies.

    Returns:
        Top, left, height and width of the box; the largest central one of an allowed shape where none fits.
    """
    narrow, wide = RATIOS
    for area, ratio in zip(areas, ratios, strict=True):
        pixels = height * width * (min_area + (1 - min_area) * area)
        shape = narrow * (wide / narrow) ** ratio
        w, h = round(math.sqrt(pixels * shape)), round(math.sqrt(pixels / shape))
        if 0 < w <= width and 0 < h <= height:
            return int(corner[0] * (height - h + 1)), int(corner[1] * (width - w + 1)), h, w
    w, h = min(width, round(height * wide)), min(height, round(width / narrow))
    return (height - h) // 2, (width - w) // 2, h, w
