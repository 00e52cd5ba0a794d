"""Small images in class folders, decoded into memory once."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torchvision.transforms import functional as transforms

from wdat import seeding
from wdat.data.class_folders import check_same, class_folders, content, holds_images, subfolders
from wdat.data.crops import CenterCrop
from wdat.data.files import Files
from wdat.data.splits import Splits, hold_out
from wdat.errors import SettingError

VALIDATION = ("val", "valid", "validation")
"""What the folder of validation images may be called."""

_THREADS = 4


def folder(root: str | Path | None, size: int | None = None, test_size: float = 0.2) -> Splits:
    """Reads all images of a folder.

    The folder holds `train/CLASS/…` and `test/CLASS/…`, perhaps also `val/CLASS/…`. With `train/` and `val/` alone, or
    `val/` alone, `val/` is the test set, as on ImageNet. Without such folders it holds `CLASS/…`, of which a share is
    set aside as the test set, by class; the draw is the same for every seed of a run, so that no run trains on what
    another is tested on.

    Args:
        root: The folder (`data.root`).
        size: Side of the square that images are brought to (`data.size`): the shorter side is resized to it and the
            centre kept. None keeps images as they are, which must then be of one size.
        test_size: The share of the images of each class that is the test set where no folder is (`data.test_size`).

    Raises:
        SettingError: No such folder, no images of a class, splits with different classes, images that can't be decoded,
            or of different sizes.
    """
    if root is None:
        raise SettingError("data=folder reads images in class folders: set data.root=FOLDER")
    source, base = f"data=folder data.root={root}", Path(os.path.expanduser(root))
    found = [name for name in subfolders(base) if name in ("train", "test", *VALIDATION) and subfolders(base / name)]
    if not found:
        return _divided(source, base, size, test_size)
    val = next((name for name in VALIDATION if name in found), None)
    test = "test" if "test" in found else val
    if test is None:
        raise SettingError(
            f"{source} has train/ and neither test/ nor val/: add one, or set data.root={os.path.join(root, 'train')}, "
            "of which data.test_size is set aside"
        )
    splits = {"train": "train" if "train" in found else None, "val": val if val != test else None, "test": test}
    scanned = {k: class_folders(base / name, source) for k, name in splits.items() if name}
    check_same(source, {str(splits[k]): classes for k, (classes, _, _) in scanned.items()})
    x = _decoded({k: Files.of(base / str(splits[k]), names) for k, (_, names, _) in scanned.items()}, size)
    y = {k: labels for k, (_, _, labels) in scanned.items()}
    nothing = x["test"][:0], y["test"][:0]
    data = Splits(
        x.get("train", nothing[0]), y.get("train", nothing[1]), x["test"], y["test"], tuple(scanned["test"][0])
    )  # fmt: skip
    return replace(data, x_val=x["val"], y_val=y["val"]) if "val" in x else data


def _divided(source: str, base: Path, size: int | None, test_size: float) -> Splits:
    """A folder without folders for the splits."""
    if not subfolders(base) or not any(
        holds_images(base / name) or subfolders(base / name) for name in subfolders(base)
    ):
        raise SettingError(
            f"{source} has no class folders ({content(base)}): set data.root to the folder that holds train/CLASS/ and "
            "test/CLASS/, or CLASS/"
        )
    if not 0 < test_size < 1:
        raise SettingError(f"data.test_size={test_size}: set data.test_size to a share between 0 and 1")
    classes, names, labels = class_folders(base, source)
    x = _decoded({"all": Files.of(base, names)}, size)["all"]
    kept, held = hold_out(labels, round(test_size * len(labels)), seeding.generator(0, "test"))
    kept, held = kept.sort().values, held.sort().values
    if not len(kept) or not len(held):
        raise SettingError(f"data.test_size={test_size} of {len(labels)} images leaves none on one side: change it")
    return Splits(x[kept], labels[kept], x[held], labels[held], tuple(classes))


def _decoded(files: dict[str, Files], size: int | None) -> dict[str, Tensor]:
    """Images (N, 3, H, W), uint8, of each set of files, all of one size."""
    if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
        raise SettingError(f"data.size={size}: set data.size to a whole number of pixels from 1, or null")
    crop = None if size is None else CenterCrop(size, size)
    first: tuple[int, ...] | None = None
    decoded = {}
    with ThreadPoolExecutor(_THREADS) as pool:
        for name, part in files.items():
            images = []
            for row, pixels in enumerate(pool.map(lambda row, part=part: _pixels(part, row, crop), range(len(part)))):
                first = first or tuple(pixels.shape)
                if tuple(pixels.shape) != first:
                    shape, others = ("×".join(map(str, sides[1:])) for sides in (pixels.shape, first))
                    raise SettingError(
                        f"{part.path(row)} is {shape} and others are {others}: "
                        f"set data.size={min(first[1:])} or another number of pixels, to which all are resized"
                    )
                images.append(pixels)
            decoded[name] = torch.stack(images)
    return decoded


def _pixels(files: Files, row: int, crop: CenterCrop | None) -> Tensor:
    """One image, (3, H, W), uint8; what has the wanted size already keeps its pixels."""
    image = files.open(row)
    if crop is not None and image.size != (crop.size, crop.size):
        return crop(image)
    pixels: Tensor = transforms.pil_to_tensor(image)
    return pixels
