"""Labelled images in memory, and how validation images are set aside from the training images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from wdat.errors import SettingError


@dataclass(frozen=True)
class Splits:
    """The training and the test set of one source.

    Attributes:
        x_train: Images (N, C, H, W), uint8.
        y_train: Labels (N,), int64.
        x_test: Images (M, C, H, W), uint8.
        y_test: Labels (M,), int64.
    """

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor


def check_labels(splits: Splits, num_classes: int) -> None:
    """Checks that every label is a class.

    Raises:
        SettingError: A label lies outside 0 .. `num_classes` - 1.
    """
    for name, labels in (("y_train", splits.y_train), ("y_test", splits.y_test)):
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
    classes, sizes = torch.unique(labels, return_counts=True)
    shares = sizes * count
    quotas = shares // len(labels)
    remainders = shares % len(labels)
    quotas[remainders.argsort(descending=True, stable=True)[: count - int(quotas.sum())]] += 1

    order = torch.randperm(len(labels), generator=generator)
    held = torch.zeros(len(labels), dtype=torch.bool)
    for label, quota in zip(classes, quotas.tolist(), strict=True):
        held[(labels[order] == label).nonzero().flatten()[:quota]] = True
    return order[~held], order[held]
