"""What a source gives, and which of its images make up a split."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from wdat.data.files import Files
from wdat.errors import SettingError


@dataclass(frozen=True)
class Splits:
    """The training and the test set of one source.

    Attributes:
        x_train: Images (N, C, H, W), uint8, or N files.
        y_train: Labels (N,), int64.
        x_test: Images (M, C, H, W), uint8, or M files.
        y_test: Labels (M,), int64.
        classes: Names of the classes, where the source has them.
    """

    x_train: Tensor | Files
    y_train: Tensor
    x_test: Tensor | Files
    y_test: Tensor
    classes: tuple[str, ...] | None = None


def check_labels(splits: Splits, num_classes: int) -> None:
    """Checks that every label is a class.

    Raises:
        SettingError: A label lies outside 0 .. `num_classes` - 1, or the source names another number of classes.
    """
    if splits.classes is not None and len(splits.classes) != num_classes:
        raise SettingError(
            f"the data have {len(splits.classes)} classes ({', '.join(splits.classes[:3])}, …), but "
            f"data.num_classes={num_classes}: set data.num_classes={len(splits.classes)}, or give all classes"
        )
    for name, labels in (("y_train", splits.y_train), ("y_test", splits.y_test)):
        if len(labels) == 0:
            continue
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= num_classes:
            remedy = (
                "number the classes from 0" if low < 0 else f"set data.num_classes={high + 1} or correct the labels"
            )
            raise SettingError(
                f"{name} has labels from {low} to {high}, but data.num_classes={num_classes} "
                f"allows 0 to {num_classes - 1}: {remedy}"
            )


def hold_out(labels: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Sets `count` rows aside, each class in proportion to its size.

    A class of c of the n rows gives `count` * c / n of them, rounded down or up (largest remainders first), so that
    the quotas add up to `count`. Both parts come back shuffled: the first rows of either are a fair sample even when
    the source is sorted by class.

    Args:
        labels: (N,), int64.
        count: Number of rows to set aside, in 0 .. N.
        generator: A CPU generator; it fixes the result.

    Returns:
        The rows that stay and the rows set aside, int64, (N - count,) and (count,).
    """
    labels = labels.cpu()
    _, sizes = torch.unique(labels, return_counts=True)
    shares = sizes * count
    quotas = shares // len(labels)
    remainders = shares % len(labels)
    quotas[remainders.argsort(descending=True, stable=True)[: count - int(quotas.sum())]] += 1

    order = torch.randperm(len(labels), generator=generator)
    classes, earlier = _ranks(labels[order])
    held = earlier < quotas[classes]
    return order[~held], order[held]


def first_of_each(labels: Tensor, count: int, num_classes: int, setting: str) -> Tensor:
    """The first images of every class, the same number of each.

    Where `count` is no multiple of `num_classes`, the first classes give one more.

    Args:
        labels: (N,), int64, in 0 .. `num_classes` - 1.
        count: Number of rows to keep.
        num_classes: Number of classes.
        setting: What the message of an error calls `count`, such as `"data.limit_test"`.

    Returns:
        The rows that are kept, int64, (count,), in increasing order.

    Raises:
        SettingError: A class has too few images.
    """
    sizes = labels.bincount(minlength=num_classes)
    quotas = count // num_classes + (torch.arange(num_classes) < count % num_classes).long()
    short = (sizes < quotas).nonzero().flatten()
    if len(short):
        most = int(sizes.min()) * num_classes
        remedy = f"set {setting}={most} or less" if most else "add some"
        raise SettingError(
            f"{setting}={count} with data.balanced=true takes {int(quotas[short[0]])} of class {int(short[0])}, "
            f"which has {int(sizes[short[0]])} images: {remedy}, or data.balanced=false"
        )
    return (_ranks(labels)[1] < quotas[labels]).nonzero().flatten()


def _ranks(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Each label's position among the distinct ones, and how many equal ones stand before it, both (N,)."""
    _, positions, sizes = torch.unique(labels, return_inverse=True, return_counts=True)
    together = positions.argsort(stable=True)
    ranks = torch.empty_like(positions)
    ranks[together] = torch.arange(len(labels)) - (sizes.cumsum(0) - sizes)[positions[together]]
    return positions, ranks
