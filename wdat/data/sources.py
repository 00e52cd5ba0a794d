"""Where images come from, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torchvision.datasets import CIFAR10, CIFAR100

from wdat.data import cifar
from wdat.data.cifar import cifar10, cifar100
from wdat.data.digits import digits
from wdat.data.folder import folder
from wdat.data.imagenet import imagenet
from wdat.data.npz import npz
from wdat.data.splits import Splits

__all__ = ["SOURCES", "Source", "Where", "cifar10", "cifar100", "digits", "fetch", "folder", "imagenet", "npz"]


@dataclass(frozen=True)
class Where:
    """Where a source lies and how it is read; each source takes of it what concerns it.

    Attributes:
        root: A folder (`data.root`).
        path: A file (`data.path`).
        size: Side of the images in a folder (`data.size`).
        test_size: The share of a folder that is its test set (`data.test_size`).
    """

    root: str | Path | None = None
    path: str | Path | None = None
    size: int | None = None
    test_size: float = 0.2


Source = Callable[[Where], Splits]
"""A function that reads a data set."""

SOURCES: dict[str, Source] = {
    "cifar10": lambda where: cifar10(where.root or "data", False),
    "cifar100": lambda where: cifar100(where.root or "data", False),
    "imagenet": lambda where: imagenet(where.root or "data"),
    "folder": lambda where: folder(where.root, where.size, where.test_size),
    "npz": lambda where: npz(where.path),
    "digits": lambda where: digits(),
}
"""Each source, as it is read once its files are there."""

_ARCHIVES = {"cifar10": CIFAR10, "cifar100": CIFAR100}


def fetch(source: str, root: str | Path | None, download: bool) -> None:
    """Downloads what `source` needs and doesn't find; nothing for sources that are never downloaded."""
    if source in _ARCHIVES:
        cifar.fetch(_ARCHIVES[source], root or "data", download)
