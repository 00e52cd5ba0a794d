"""What a source gives, and which of its images make up a split."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from wdat.data.files import Files
from wdat.errors import SettingError


@dataclass(frozen=True)
class Splits:
    """The training and the test set of one source; an empty training set leaves evaluation.

    Attributes:
        x_train: Images (N, C, H, W), uint8, or N files.
        y_train: Labels (N,), int64.
        x_test: Images (M, C, H, W), uint8, or M files.
        y_test: Labels (M,), int64.
        classes: Names of the classes, where the source has them.
        x_val: Validation images of the source's own; None where they are set aside from the training set.
        y_val: Their labels.
        listed: How many of the first test images are a published list, in its order.
    """

    x_train: Tensor | Files
    y_train: Tensor
    x_test: Tensor | Files
    y_test: Tensor
    classes: tuple[str, ...] | None = None
    x_val: Tensor | Files | None = None
    y_val: Tensor | None = None
    listed: int = 0


def check_labels(splits: Splits, num_classes: int) -> None:
    """Checks that every label is a class.

    Raises:
        SettingError: A label lies outside 0 .. `num_classes` - 1, or the source names another number of classes.
    """
    if splits.classes is not None and len(splits.classes) != num_classes:
        shown = ", ".join([*splits.classes[:3], *(["…"] if len(splits.classes) > 3 else [])])
        if len(splits.classes) == 1:
            raise SettingError(f"the data have one class, {shown}: set data.root to the folder that holds all classes")
        raise SettingError(
            f"the data have {len(splits.classes)} classes ({shown}), but "
            f"data.num_classes={num_classes}: set data.num_classes={len(splits.classes)}, or give all classes"
        )
    for name, labels in (("y_train", splits.y_train), ("y_val", splits.y_val), ("y_test", splits.y_test)):
        if labels is None or len(labels) == 0:
            continue
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= num_classes:
            remedy = f"set data.num_classes={high + 1} or correct the labels"
            if low < 0 or (low == 1 and high == num_classes):
                remedy = "number the classes from 0" + (f", {name} - 1" if low == 1 else "")
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
    quotas = _quotas(sizes, count, torch.arange(len(sizes)))
    order = torch.randperm(len(labels), generator=generator)
    classes, earlier = _ranks(labels[order])
    held = earlier < quotas[classes]
    return order[~held], order[held]


def by_class(labels: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draws `count` rows, each class in proportion to its size: as many of each where the classes are equally large.

    A class of c of the N rows gives `count` * c / N of them, rounded down or up (largest remainders first, equal ones
    by lot), so that exactly `count` rows come and accuracy on them estimates that on all.

    Args:
        labels: (N,), int64.
        count: Number of rows to draw, in 0 .. N.
        generator: A CPU generator; it fixes the result.

    Returns:
        The rows, int64, (count,), increasing.
    """
    labels = labels.cpu()
    _, sizes = torch.unique(labels, return_counts=True)
    quotas = _quotas(sizes, count, torch.randperm(len(sizes), generator=generator))
    order = torch.randperm(len(labels), generator=generator)
    classes, earlier = _ranks(labels[order])
    return order[earlier < quotas[classes]].sort().values


def _quotas(sizes: Tensor, count: int, lots: Tensor) -> Tensor:
    """How many of `count` each class gives, in proportion to the sizes (K,); equal remainders go by `lots`."""
    total = int(sizes.sum())
    shares = sizes * count
    quotas = shares // total
    remainders = (shares % total)[lots]
    first = lots[remainders.argsort(descending=True, stable=True)]
    quotas[first[: count - int(quotas.sum())]] += 1
    return quotas


def _ranks(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Each label's position among the distinct ones, and how many equal ones stand before it, both (N,)."""
    _, positions, sizes = torch.unique(labels, return_inverse=True, return_counts=True)
    together = positions.argsort(stable=True)
    ranks = torch.empty_like(positions)
    ranks[together] = torch.arange(len(labels)) - (sizes.cumsum(0) - sizes)[positions[together]]
    return positions, ranks
