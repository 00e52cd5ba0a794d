"""ImageNet, and other photographs in class folders: `train/CLASS/…` and `val/CLASS/…`."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import torch

from wdat.data.class_folders import check_same, class_folders, content, subfolders
from wdat.data.files import Files
from wdat.data.splits import Splits
from wdat.errors import SettingError


def imagenet(root: str | Path) -> Splits:
    """The files of both folders; nothing is decoded.

    Labels number the class folders in the order of their names, as in torchvision's `ImageFolder`. `val` is the test
    set. Where it holds the 5,000 images of RobustBench's leaderboard these come first, in its order, and are `listed`,
    so that `data.limit_test=5000` is its set. A root without `train` serves for evaluation: its training set is empty.

    Args:
        root: The folder (`data.root`).

    Raises:
        SettingError: No such folder, no class folders, a class without images, or folders with different classes.
    """
    folder, source = Path(os.path.expanduser(root)), f"data=imagenet data.root={root}"
    if not os.path.isdir(folder / "val"):
        raise SettingError(
            f"{source}: there is no folder {(folder / 'val').absolute()} ({content(folder)}); set data.root to the "
            "folder that holds val/"
        )
    classes, test, y_test = class_folders(folder / "val", source)
    first = _leaderboard()
    positions = {name: position for position, name in enumerate(test)}
    all_there = bool(first) and all(name in positions for name in first)
    if all_there:
        listed = torch.zeros(len(test), dtype=torch.bool)
        head = torch.tensor([positions[name] for name in first])
        listed[head] = True
        order = torch.cat([head, (~listed).nonzero().flatten()])
        test, y_test = [test[row] for row in order.tolist()], y_test[order]
    train: list[str] = []
    y_train = torch.zeros(0, dtype=torch.int64)
    if subfolders(folder / "train"):  # an empty folder is as good as none
        found, train, y_train = class_folders(folder / "train", source)
        check_same(source, {"train": found, "val": classes})
    return Splits(
        Files.of(folder / "train", train), y_train, Files.of(folder / "val", test), y_test, tuple(classes),
        listed=len(first) if all_there else 0,
    )  # fmt: skip


def _leaderboard() -> list[str]:
    """Paths, below `val`, of the images of RobustBench's leaderboard in its order; none where it lists none."""
    package = importlib.util.find_spec("robustbench")  # not imported: this is a list, and its networks aren't needed
    positions = package.submodule_search_locations if package else None
    file = Path(next(iter(positions or ["."]))) / "helper_files" / "imagenet_test_image_ids.txt"
    return [os.path.normpath(line) for line in file.read_text("utf-8").split()] if os.path.isfile(file) else []
