"""ImageNet, and other photographs in class folders: `train/CLASS/…` and `val/CLASS/…`."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import torch
from torch import Tensor

from wdat.data.files import Files
from wdat.data.splits import Splits
from wdat.errors import SettingError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""Endings of image files, as in torchvision's `ImageFolder`."""


def imagenet(root: str | Path) -> Splits:
    """The files of both folders; nothing is decoded.

    Labels number the class folders in the order of their names, as in torchvision's `ImageFolder`. `val` is the test
    set. Where it holds the 5,000 images of RobustBench's leaderboard these come first, in its order, so that
    `data.limit_test=5000` is its set. A root without `train` serves for evaluation: its training set is empty.

    Args:
        root: The folder (`data.root`).

    Raises:
        SettingError: No such folder, no class folders or no images in them, or folders with different classes.
    """
    folder = Path(os.path.expanduser(root))
    classes, test, y_test = _class_folders(folder, "val")
    first = _leaderboard()
    positions = {name: position for position, name in enumerate(test)}
    if first and all(name in positions for name in first):
        listed = torch.zeros(len(test), dtype=torch.bool)
        head = torch.tensor([positions[name] for name in first])
        listed[head] = True
        order = torch.cat([head, (~listed).nonzero().flatten()])
        test, y_test = [test[row] for row in order.tolist()], y_test[order]
    train: list[str] = []
    y_train = torch.zeros(0, dtype=torch.int64)
    if any(entry.is_dir() for entry in _entries(folder / "train")):  # an empty folder is as good as none
        found, train, y_train = _class_folders(folder, "train")
        if found != classes:
            odd = sorted(set(found) ^ set(classes))
            raise _error(root, f"train/ and val/ have different classes ({', '.join(odd[:3])})", "give both the same")
    return Splits(
        Files.of(folder / "train", train), y_train, Files.of(folder / "val", test), y_test, tuple(classes)
    )  # fmt: skip


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """What a folder holds; nothing where it isn't there."""
    return list(os.scandir(folder)) if os.path.isdir(folder) else []


def _class_folders(root: Path, split: str) -> tuple[list[str], list[str], Tensor]:
    """Names of the classes, paths of the images in the folder of the split, in the order of their names, and labels."""
    folder = root / split
    if not os.path.isdir(folder):
        raise _error(root, f"there is no folder {folder.absolute()}", "set data.root to the folder that holds val/")
    classes = sorted(entry.name for entry in _entries(folder) if entry.is_dir())
    if not classes:
        raise _error(root, f"{split}/ has no class folders", f"sort its images into {split}/CLASS/")
    names, labels = [], []
    for label, name in enumerate(classes):
        found = [
            os.path.join(position, file)[len(os.path.join(folder, "")) :]
            for position, _, files in sorted(os.walk(folder / name, followlinks=True))
            for file in sorted(files)
            if file.lower().endswith(EXTENSIONS)
        ]
        names += found
        labels += [label] * len(found)
    if not names:
        raise _error(root, f"{split}/ has class folders without images", f"put images into {split}/CLASS/")
    return classes, names, torch.tensor(labels)


def _leaderboard() -> list[str]:
    """Paths, below `val`, of the images of RobustBench's leaderboard in its order; none where it lists none."""
    package = importlib.util.find_spec("robustbench")  # not imported: this is a list, and its networks aren't needed
    positions = package.submodule_search_locations if package else None
    file = Path(next(iter(positions or ["."]))) / "helper_files" / "imagenet_test_image_ids.txt"
    return [os.path.normpath(line) for line in file.read_text("utf-8").split()] if os.path.isfile(file) else []


def _error(root: str | Path, fault: str, remedy: str) -> SettingError:
    return SettingError(f"data=imagenet data.root={root}: {fault}; {remedy}")
