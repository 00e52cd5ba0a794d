"""Images in files, decoded when they are read."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from wdat.data.crops import CenterCrop, CropDraws, RandomCrop
from wdat.data.images import LabelledImages
from wdat.errors import SettingError


@dataclass(frozen=True)
class Files:
    """Image files below one folder.

    Attributes:
        folder: The folder.
        names: (N,), bytes: their paths in it. An array, because worker processes that count references to a million
            strings would each end with a copy of them.
    """

    folder: Path
    names: NDArray[np.bytes_]

    @classmethod
    def of(cls, folder: Path, names: Sequence[str]) -> Files:
        """The files of these names."""
        return cls(folder, np.array([os.fsencode(name) for name in names], dtype=np.bytes_))

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, rows: Tensor) -> Files:
        """The files in these rows, (B,), int64."""
        return Files(self.folder, self.names[rows.numpy()])

    def path(self, row: int) -> Path:
        """Where a file is."""
        return self.folder / os.fsdecode(bytes(self.names[row]))

    def open(self, row: int) -> Image.Image:
        """Decodes one file as RGB.

        Raises:
            SettingError: The file can't be decoded, or has pixels of more than 16 bits.
        """
        path = self.path(row)
        try:
            with Image.open(path) as image:
                if image.mode in ("I", "F"):
                    raise SettingError(f"{path} has 32-bit pixels, whose range is unknown: convert it to 8 bits")
                if image.mode.startswith("I;16"):  # which Pillow would cut at 255
                    narrow = (np.asarray(image).astype(np.uint32) * 255 + 32767) // 65535
                    return Image.fromarray(narrow.astype(np.uint8)).convert("RGB")
                decoded: Image.Image = image.convert("RGB")
                return decoded
        except SettingError:
            raise
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # what Pillow raises
            raise SettingError(f"{path} can't be decoded ({error}): replace or remove it (data.root)") from error


class FileSet(LabelledImages):
    """One split of images in files, cropped to one size.

    Args:
        files: The images.
        labels: (N,), int64, on the CPU.
        crop: How an image is cropped where nothing is augmented.
        augment: How it is cropped in training, or None.
        seed: The seed of the run.
    """

    augment: RandomCrop | None

    in_files = True

    def __init__(
        self, files: Files, labels: Tensor, crop: CenterCrop, augment: RandomCrop | None = None, seed: int = 0
    ) -> None:
        super().__init__(labels, augment, seed)
        self.files = files
        self.crop = crop

    @property
    def shape(self) -> tuple[int, int, int]:
        return 3, self.crop.size, self.crop.size

    def to(self, device: torch.device) -> FileSet:
        """Itself: nothing is kept in memory."""
        return self

    def pixels(self, index: Tensor, draws: CropDraws | None) -> Tensor:
        x = torch.empty(len(index), *self.shape, dtype=torch.uint8)
        for position, row in enumerate(index.tolist()):
            image = self.files.open(row)
            if self.augment is None or draws is None:
                x[position] = self.crop(image)
            else:
                x[position] = self.augment(image, draws.at(torch.tensor(position)))
        return x
