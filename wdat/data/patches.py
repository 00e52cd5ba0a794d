"""CutMix and random erasing: a window of a training image replaced, by another image's or by nothing."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from wdat.data.batch import Batch
from wdat.data.images import Choices, LabelledImages
from wdat.data.sampling import BatchPlan
from wdat.errors import check_real

ERASED = (0.02, 0.33)  # smallest and largest share of an image that is erased, as in torchvision's `RandomErasing`
SHAPES = (0.3, 3.3)  # height over width of that window, as there


class PatchDraws(NamedTuple):
    """The random choices for a set of images.

    Attributes:
        partner: (N,), int64: the row of the training split whose window is pasted.
        pasted: (N,), whether one is.
        window: (N, 4), in [0, 1]: row and column of the middle, height and width, as shares of the image.
        erased: (N,), whether a window is erased.
        hole: (N, 4), likewise.
    """

    partner: Tensor
    pasted: Tensor
    window: Tensor
    erased: Tensor
    hole: Tensor

    def at(self, position: Tensor) -> PatchDraws:
        """The choices for the images at `position` (B,), int64."""
        return PatchDraws(*(choices[position] for choices in self))


@dataclass(frozen=True)
class Patches:
    """What is replaced in training images; off by default. No pass through the network is added.

    *CutMix* (Yun et al. 2019, arXiv 1905.04899) pastes a window of another image, of an area uniform in [0, 1] and with
    its middle anywhere, cut off at the border; the cross-entropies weigh the two labels by their areas, and attacks
    that ascend a loss of the label take that of the larger. With adversarial training it helps only together with
    weight averaging (Rebuffi et al. 2021, arXiv 2111.05328). *Random erasing* (Zhong et al. 2020, arXiv 1708.04896)
    makes a window black, of a share of 0.02 to 0.33 and sides in a ratio of 0.3 to 3.3; the label stays.

    Attributes:
        cutmix: The share of images that get a window of another (`data.augmentation.cutmix`).
        erasing: The share of images of which a window is erased (`data.augmentation.erasing`).
    """

    cutmix: float = 0.0
    erasing: float = 0.0

    def __post_init__(self) -> None:
        check_real("data.augmentation.cutmix", self.cutmix, "[0, 1]", "a share of the training images")
        check_real("data.augmentation.erasing", self.erasing, "[0, 1]", "a share of the training images")

    def draw(self, size: int, rows: int, generator: torch.Generator) -> PatchDraws:
        """Draws for `size` images of a split of `rows`, on the CPU."""
        partner = torch.randint(rows, (size,), generator=generator)
        chosen, middles, holes = (torch.rand(size, 2, generator=generator) for _ in range(3))
        side, area, shape = torch.rand(3, size, generator=generator)
        window = torch.cat([middles, side.sqrt()[:, None].expand(-1, 2)], 1)
        share = ERASED[0] + (ERASED[1] - ERASED[0]) * area
        ratio = SHAPES[0] * (SHAPES[1] / SHAPES[0]) ** shape
        hole = torch.cat([holes, (share * ratio).sqrt()[:, None], (share / ratio).sqrt()[:, None]], 1)
        return PatchDraws(partner, chosen[:, 0] < self.cutmix, window, chosen[:, 1] < self.erasing, hole)


def inside(window: Tensor, height: int, width: int) -> Tensor:
    """Which pixels lie in a window; (B, 4) as `PatchDraws` has it → (B, 1, H, W), bool."""
    middle, half = window[:, :2], window[:, 2:] / 2
    rows, columns = ((torch.arange(n, device=window.device) + 0.5) / n for n in (height, width))
    down = (rows - middle[:, :1]).abs() < half[:, :1]
    across = (columns - middle[:, 1:]).abs() < half[:, 1:]
    return (down[:, :, None] & across[:, None, :])[:, None]


def pasted(batch: Batch, partners: Batch, window: Tensor) -> Batch:
    """CutMix with the images of another batch.

    Args:
        batch: B images.
        partners: B others.
        window: (B, H, W) or (B, 1, H, W), bool: where their pixels come.

    Returns:
        The batch with its labels `y` those of the larger part, `other` those of the smaller, `share` that of `y`.
    """
    x = torch.where(window, partners.x, batch.x)
    share = 1 - window.flatten(1).to(torch.float32).mean(1)
    own = share >= 0.5
    y, other = torch.where(own, batch.y, partners.y), torch.where(own, partners.y, batch.y)
    return batch._replace(x=x, y=y, other=other, share=torch.where(own, share, 1 - share))


class _Choices(NamedTuple):
    own: Choices | None
    partners: Choices | None
    patches: PatchDraws

    def at(self, position: Tensor) -> _Choices:
        own, partners = (choices and choices.at(position) for choices in (self.own, self.partners))
        return _Choices(own, partners, self.patches.at(position))


class PatchedSet(LabelledImages):
    """A training split with windows replaced, as a function of the seed, the step and the position.

    Args:
        images: The split; partners are drawn from its rows, not from a pool beside it.
        patches: What is replaced.
    """

    def __init__(self, images: LabelledImages, patches: Patches) -> None:
        super().__init__(images.labels, images.augment, images.seed)
        self.images, self.patches = images, patches
        self.in_files = images.in_files

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.images.shape

    def to(self, device: torch.device) -> PatchedSet:
        return PatchedSet(self.images.to(device), self.patches)

    def pixels(self, index: Tensor, draws: Choices | None) -> Tensor:
        return self.images.pixels(index, draws)

    def rows_of(self, index: Tensor, draws: Choices | None) -> tuple[Tensor, Tensor]:
        return self.images.rows_of(index, draws)

    def synthetic(self, index: Tensor) -> Tensor | None:
        return self.images.synthetic(index)

    def draw(self, size: int, purpose: str, step: int) -> Choices:
        own, partners = (self.images.draw(size, what, step) for what in (purpose, f"{purpose} partners"))
        drawn = self.patches.draw(size, len(self.images), self.generator(f"{purpose} patches", step))
        return _Choices(own, partners, drawn)

    def read(self, plan: BatchPlan, draws: Choices | None = None) -> Batch:
        """The planned batch with its windows replaced; as it is without draws."""
        if not isinstance(draws, _Choices):
            return self.images.read(plan, draws)
        batch, patches = self.images.read(plan, draws.own), draws.patches.at(plan.position)
        height, width = batch.x.shape[2:]
        if self.patches.cutmix:
            partners = self.images.read(replace(plan, index=patches.partner), draws.partners)
            window = inside(patches.window, height, width) & patches.pasted[:, None, None, None]
            batch = pasted(batch, partners, window.to(batch.x.device))
        if self.patches.erasing:
            hole = inside(patches.hole, height, width) & patches.erased[:, None, None, None]
            batch = batch._replace(x=batch.x.masked_fill(hole.to(batch.x.device), 0))
        return batch
