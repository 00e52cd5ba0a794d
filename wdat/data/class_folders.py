"""Images in class folders: which classes there are, and whose images. Nothing is decoded."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from wdat.errors import SettingError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""Endings of image files, as in torchvision's `ImageFolder`."""

_HIDDEN = (".", "__MACOSX", "@eaDir")
"""What names of folders and files begin with that systems and tools leave behind, such as `.ipynb_checkpoints`."""


def subfolders(folder: Path) -> list[str]:
    """Names of the folders in a folder, sorted, without hidden ones; none where it isn't there."""
    entries = os.scandir(folder) if os.path.isdir(folder) else ()
    return sorted(entry.name for entry in entries if entry.is_dir() and not _hidden(entry.name))


def holds_images(folder: Path) -> bool:
    """Whether image files lie in the folder itself."""
    return any(name.lower().endswith(EXTENSIONS) and not _hidden(name) for name in os.listdir(folder))


def content(folder: Path) -> str:
    """What lies in a folder, or in the nearest one above it that is there, for messages."""
    while not os.path.isdir(folder) and folder != folder.parent:
        folder = folder.parent
    names = sorted(entry.name + "/" * entry.is_dir() for entry in os.scandir(folder))
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return f"{folder.absolute()} holds {', '.join(names[:8]) or 'nothing'}{more}"


def class_folders(folder: Path, source: str) -> tuple[list[str], list[str], Tensor]:
    """The images of one split.

    Labels number the class folders in the order of their names, as in torchvision's `ImageFolder`. Hidden folders and
    files are no classes and no images.

    Args:
        folder: Holds a folder for each class.
        source: What messages begin with, such as `"data=folder data.root=FOLDER"`.

    Returns:
        Names of the classes, paths of the images from the folder on, in the order of their names, and labels (N,).

    Raises:
        SettingError: No such folder, no class folders in it, or a class without images.
    """
    split = f"{folder.name}/"
    if not os.path.isdir(folder):
        raise SettingError(f"{source}: there is no folder {folder.absolute()} ({content(folder)})")
    classes = subfolders(folder)
    if not classes:
        raise SettingError(f"{source}: {split} has no class folders; sort its images into {split}CLASS/")
    names: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = _images(folder, name)
        names += found
        labels += [label] * len(found)
    present = set(labels)
    empty = [name for label, name in enumerate(classes) if label not in present]
    if empty:
        named = ", ".join(empty[:5]) + (f" and {len(empty) - 5} more" if len(empty) > 5 else "")
        raise SettingError(
            f"{source}: {split} has no images of the class{'es' * (len(empty) > 1)} {named}; put images into "
            f"{split}{empty[0]}/ or remove it"
        )
    return classes, names, torch.tensor(labels)


def check_same(source: str, classes: dict[str, list[str]]) -> None:
    """Refuse splits with different classes, whose labels would mean different things.

    Raises:
        SettingError: The splits' classes, by the name of the split, aren't the same.
    """
    first, *others = classes
    for split in others:
        odd = sorted(set(classes[split]) ^ set(classes[first]))
        if odd:
            where = ", ".join(f"{name} only in {split if name in classes[split] else first}/" for name in odd[:3])
            raise SettingError(f"{source}: {first}/ and {split}/ have different classes ({where}); give both the same")


def _images(folder: Path, name: str) -> list[str]:
    """Paths of the images of one class, from the folder of the split on."""
    walked = []
    for position, folders, files in os.walk(folder / name, followlinks=True):
        folders[:] = [inner for inner in folders if not _hidden(inner)]
        walked.append((position, sorted(f for f in files if f.lower().endswith(EXTENSIONS) and not _hidden(f))))
    return [os.path.join(os.path.relpath(position, folder), f) for position, files in sorted(walked) for f in files]


def _hidden(name: str) -> bool:
    return name.startswith(_HIDDEN)
