"""Synthetic images: a labelled pool of any size, of which a batch's rows are read and nothing else.

The published pools have 1, 20 and 100 million images, 3 to 307 GB. `numpy.savez` stores its arrays as they are, so a
row is found by its number. Rows are read with `pread`, not through a map: a mapped page counts as memory of the process
until it is given back, and each fault reads more of the file than the row and waits for it alone.
"""

from __future__ import annotations

import math
import os
import weakref
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wdat.data.mapped import mapped
from wdat.data.splits import hold_out
from wdat.errors import RunError, SettingError

ARRAYS = ("image", "label")
CHUNK = 1 << 20  # labels that are read at once where all are
CANDIDATES = 16  # rows from which each row of a stratified sample is chosen


@dataclass(frozen=True)
class Synthetic:
    """The settings of a pool, `data.synthetic`.

    Attributes:
        path: The file; None for no pool.
        fraction: f, the share of a batch that is drawn from the pool, in (0, 1).
        sample: Images of the pool by whose gradients Υ is known.
        every: Steps between stratified passes over that many images; None for the first alone, after which the norms
            of the batches' own synthetic images take the positions of the oldest.

    Raises:
        SettingError: A setting is out of range.
    """

    path: str | Path | None = None
    fraction: float = 0.7
    sample: int = 1024
    every: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.fraction < 1:
            raise SettingError(
                f"data.synthetic.fraction={self.fraction} is a share between 0 and 1, 0.7 is usual; to train on the "
                "originals alone set data.synthetic.path=null"
            )
        if self.sample < 1:
            raise SettingError(f"data.synthetic.sample={self.sample} must be at least 1 image; 1024 is usual")
        if self.every is not None and self.every < 1:
            raise SettingError(
                f"data.synthetic.every={self.every} must be at least 1 step, or null for the first pass alone"
            )


class SyntheticPool:
    """The images and labels of an npz file with `image` (uint8, N×H×W×C) and `label` (N whole numbers).

    Args:
        path: The file (`data.synthetic.path`).
        shape: Channels, height and width of the images that the pool is mixed with.
        num_classes: Number of classes.

    Attributes:
        class_sizes: (K,), int64: images of each class.

    Raises:
        SettingError: No such file, one that can't be read row by row, or arrays of another kind than stated above.
    """

    def __init__(self, path: str | Path, shape: tuple[int, int, int], num_classes: int) -> None:
        self.path = Path(os.path.expanduser(path))
        self._image, self._label = (_Rows(array) for array in _arrays(self.path, shape))
        self._file = os.open(self.path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)
        self.class_sizes = self._count(num_classes)

    def __len__(self) -> int:
        """Number of images."""
        return self._image.count

    def read(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Images and labels.

        Args:
            rows: (M,), int64, in any order.

        Returns:
            (M, C, H, W), uint8, and (M,), int64.

        Raises:
            RunError: The file has changed since it was opened.
        """
        images, labels = self._read(rows, self._image, self._label)
        return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels.astype(np.int64))

    def labels(self, rows: Tensor) -> Tensor:
        """The labels of `rows`, (M,), int64."""
        return torch.from_numpy(self._read(rows, self._label)[0].astype(np.int64))

    def stratified(self, size: int, generator: torch.Generator) -> Tensor:
        """Different rows, each class in proportion to its size among a larger uniform draw.

        Args:
            size: Number of rows; all of them where the pool has no more.
            generator: A CPU generator; it fixes the result.

        Returns:
            (`size`,), int64, increasing.
        """
        if size >= len(self):
            return torch.arange(len(self))
        drawn = torch.randint(len(self), (CANDIDATES * size,), generator=generator).tolist()
        rows = torch.tensor(sorted(set(drawn)))
        _, chosen = hold_out(self.labels(rows), min(size, len(rows)), generator)
        return rows[chosen.sort().values]

    def _read(self, rows: Tensor, *arrays: _Rows) -> list[NDArray[Any]]:
        """Rows of several arrays, read in the file's order, announced before so that the disk fetches them at once."""
        ordered, order = np.unique(rows.numpy(), return_inverse=True)
        for array in arrays:
            for position in array.positions(ordered):
                _announce(self._file, position, array.length)
        found = []
        for array in arrays:
            content = b"".join(self._bytes(position, array.length) for position in array.positions(ordered))
            found.append(np.frombuffer(content, array.dtype).reshape(-1, *array.shape)[order])
        return found

    def _bytes(self, position: int, length: int) -> bytes:
        content = os.pread(self._file, length, position)
        if len(content) < length:
            raise RunError(f"data.synthetic.path={self.path} was cut short while it was in use; restore it and go on")
        return content

    def _count(self, num_classes: int) -> Tensor:
        """Images of each class, from one look at every label."""
        sizes = np.zeros(num_classes, np.int64)
        for labels in self._all_labels():
            low, high = int(labels.min()), int(labels.max())
            if low < 0 or high >= num_classes:
                raise _error(
                    self.path,
                    f"label has {low if low < 0 else high}, but data.num_classes={num_classes} allows 0 to "
                    f"{num_classes - 1}",
                    "use a pool with the classes of the data",
                )
            sizes += np.bincount(labels.astype(np.int64), minlength=num_classes)
        return torch.from_numpy(sizes)

    def _all_labels(self) -> Iterator[NDArray[Any]]:
        array = self._label
        for first in range(0, array.count, CHUNK):
            count = min(CHUNK, array.count - first)
            content = self._bytes(array.offset + first * array.length, count * array.length)
            yield np.frombuffer(content, array.dtype)


class _Rows:
    """Where the rows of an array lie in the file."""

    def __init__(self, array: np.memmap[Any, Any]) -> None:
        self.offset, self.dtype = array.offset, array.dtype
        self.count = int(array.shape[0])
        self.shape: tuple[int, ...] = array.shape[1:]
        self.length = array.dtype.itemsize * math.prod(self.shape)

    def positions(self, rows: NDArray[np.int64]) -> list[int]:
        """Where each row begins, in bytes."""
        positions: list[int] = (self.offset + rows * self.length).tolist()
        return positions


def _announce(file: int, position: int, length: int) -> None:
    """Tell the system what will be read, where it can be told."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file, position, length, os.POSIX_FADV_WILLNEED)


def _arrays(file: Path, shape: tuple[int, int, int]) -> list[Any]:
    """The arrays of the file, mapped and checked as far as their headers go."""
    if not os.path.isfile(file):
        raise _error(file, f"no such file (looked for {file.absolute()})", "set data.synthetic.path=FILE.npz or null")
    recipe = "write it with numpy.savez(FILE, image=image, label=label)"
    try:
        arrays = mapped(file, ARRAYS)
        with zipfile.ZipFile(file) as archive:
            found = [name.removesuffix(".npy") for name in archive.namelist()]
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise _error(file, f"can't be read and may be damaged ({error})", recipe) from error
    for name in ARRAYS:
        if name not in found:
            raise _error(file, f"has no array {name} (found {', '.join(found) or 'nothing'})", recipe)
        if name not in arrays:
            raise _error(
                file,
                f"{name} is compressed or empty, so that its rows can't be found",
                "pack it again without compression: unzip FILE.npz, then zip -0 NEW.npz image.npy label.npy",
            )
    image, label = arrays["image"], arrays["label"]
    wanted = (*shape[1:], shape[0])
    if image.dtype != np.uint8 or image.ndim != 4 or not image.flags.c_contiguous:
        raise _error(file, f"image is {_text(image.shape)} of {image.dtype}, not N×H×W×C of uint8", recipe)
    if image.shape[1:] != wanted:
        raise _error(
            file, f"its images are {_text(image.shape[1:])}, those of the data {_text(wanted)}", "use one size"
        )
    if label.dtype.kind not in "iu" or label.shape != image.shape[:1]:
        raise _error(
            file,
            f"label is {_text(label.shape)} of {label.dtype} for {len(image)} images",
            "store one whole number for each image",
        )
    return [image, label]


def _text(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))


def _error(file: Path, fault: str, remedy: str) -> SettingError:
    return SettingError(f"data.synthetic.path={file}: {fault}; {remedy}")
