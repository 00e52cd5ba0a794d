"""Where images come from, by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torchvision.datasets import CIFAR10, CIFAR100

from wdat.data import cifar
from wdat.data.cifar import cifar10, cifar100
from wdat.data.digits import digits
from wdat.data.imagenet import imagenet
from wdat.data.npz import npz
from wdat.data.splits import Splits

__all__ = ["SOURCES", "cifar10", "cifar100", "digits", "fetch", "imagenet", "npz"]

Source = Callable[["str | Path", "str | Path | None", bool], Splits]
"""A function of `data.root`, `data.path` and `data.download`."""

SOURCES: dict[str, Source] = {
    "cifar10": lambda root, path, download: cifar10(root, download),
    "cifar100": lambda root, path, download: cifar100(root, download),
    "imagenet": lambda root, path, download: imagenet(root),
    "npz": lambda root, path, download: npz(path),
    "digits": lambda root, path, download: digits(),
}
_ARCHIVES = {"cifar10": CIFAR10, "cifar100": CIFAR100}


def fetch(source: str, root: str | Path, download: bool) -> None:
    """Downloads what `source` needs and doesn't find; nothing for sources that are never downloaded."""
    if source in _ARCHIVES:
        cifar.fetch(_ARCHIVES[source], root, download)
