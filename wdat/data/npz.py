"""Images of one's own, from a NumPy archive.

The archive holds `x_train, y_train, x_test, y_test`: uint8 images N×H×W×C with one or three channels, and integer
labels. The test arrays alone serve for evaluation; `x_val, y_val` are the validation set where they are there. Nothing
in it is unpickled. Images written by `numpy.savez` are mapped: they stay on the disk until they are read, and may be
larger than memory. Those written by `numpy.savez_compressed` are read whole.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wdat.data.mapped import mapped, view
from wdat.data.splits import Splits
from wdat.errors import SettingError

TEST = ("x_test", "y_test")
PAIRS = (("x_train", "y_train"), ("x_val", "y_val"), TEST)
ARRAYS = ("x_train", "y_train", "x_test", "y_test")


def npz(path: str | Path | None) -> Splits:
    """Reads an archive and checks what is in it.

    Args:
        path: The file (`data.path`).

    Raises:
        SettingError: No such file, a damaged file, or arrays of another kind than stated above.
    """
    if path is None:
        raise SettingError("data=npz reads images from a file: set data.path=FILE.npz")
    file = Path(os.path.expanduser(path))
    arrays = _arrays(file)
    x = {name: _images(file, name, arrays) for name in arrays if name.startswith("x_")}
    for name, images in x.items():
        if images.shape[1:] != x["x_test"].shape[1:]:
            raise _error(file, f"{name} is {_text(arrays[name])} and x_test {_text(arrays['x_test'])}", "use one size")
    y = {name: _labels(file, name, arrays) for name in arrays if name.startswith("y_")}
    train = x.get("x_train", x["x_test"][:0]), y.get("y_train", y["y_test"][:0])
    return Splits(*train, x["x_test"], y["y_test"], x_val=x.get("x_val"), y_val=y.get("y_val"))


def _arrays(file: Path) -> dict[str, NDArray[Any]]:
    if os.path.isdir(file):
        raise SettingError(f"data.path={file} is a folder: class folders of images are data=folder data.root={file}")
    if not os.path.isfile(file):
        raise SettingError(f"data.path={file}: no such file (looked for {file.absolute()}); set data.path=FILE.npz")
    recipe = f"write it with numpy.savez_compressed(FILE, {', '.join(f'{name}={name}' for name in ARRAYS)})"
    try:
        with file.open("rb") as stream:
            archive = np.load(stream, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise _error(file, "holds a single array, not an .npz archive", recipe)
            wanted = [name for pair in PAIRS if pair == TEST or set(pair) & set(archive.files) for name in pair]
            missing = [name for name in wanted if name not in archive.files]
            if missing:
                found = ", ".join(archive.files) or "nothing"
                raise _error(file, f"has no array {', '.join(missing)} (found {found})", recipe)
            arrays = _mapped(file, recipe, wanted)
            return {name: arrays[name] if name in arrays else archive[name] for name in wanted}
    except SettingError:
        raise
    except ValueError as error:  # an object array, or no NumPy file at all: both would need unpickling
        raise _error(file, "holds Python objects or isn't a NumPy archive, and nothing is unpickled", recipe) from error
    except Exception as error:  # a damaged file can make the reader raise nearly anything
        raise _error(file, f"can't be read and may be damaged ({error})", recipe) from error


def _mapped(file: Path, recipe: str, names: list[str]) -> dict[str, NDArray[Any]]:
    try:
        return mapped(file, names)
    except ValueError as error:
        raise _error(file, f"is damaged ({error})", recipe) from error


def _images(file: Path, name: str, arrays: dict[str, NDArray[Any]]) -> Tensor:
    images = arrays[name]
    if images.dtype != np.uint8:
        raise _error(file, f"{name} is {images.dtype}, not uint8", _uint8_remedy(name, images))
    if images.ndim != 4 or images.shape[3] not in (1, 3):
        remedy = "store N×H×W×C with one or three channels"
        if images.ndim == 4 and images.shape[1] in (1, 3):
            remedy = f"put the channels last, {name}.transpose(0, 2, 3, 1)"
        elif images.ndim == 3:
            remedy = f"add a channel, {name}[..., None]"
        raise _error(file, f"{name} is {_text(images)}, not N×H×W×C", remedy)
    if images.size == 0:
        raise _error(file, f"{name} is {_text(images)}: an empty split", "store at least one image in it")
    tensor = view(images).permute(0, 3, 1, 2)
    return tensor if isinstance(images, np.memmap) else tensor.contiguous()


def _labels(file: Path, name: str, arrays: dict[str, NDArray[Any]]) -> Tensor:
    labels, images = arrays[name], arrays[name.replace("y", "x", 1)]
    if labels.ndim != 1:
        raise _error(file, f"{name} is {_text(labels)}, not N class numbers", f"store {name}.reshape(-1) or its argmax")
    if labels.dtype.kind not in "iu":
        raise _error(file, f"{name} is {labels.dtype}, not whole numbers", f"store {name}.astype('int64')")
    if len(labels) != len(images):
        raise _error(
            file,
            f"{name} has {len(labels)} labels for {len(images)} images in {name.replace('y', 'x', 1)}",
            "store one label for each image",
        )
    return torch.from_numpy(labels.astype(np.int64))


def _uint8_remedy(name: str, images: NDArray[Any]) -> str:
    if images.dtype.kind not in "fiub" or images.size == 0:
        return "store pixels from 0 to 255 as uint8"
    low, high = float(np.min(images)), float(np.max(images))
    if not np.isfinite([low, high]).all():
        return "it has pixels that are not finite; store pixels from 0 to 255 as uint8"
    if images.dtype.kind != "f":
        scale = f"({name} // 257)" if 255 < high <= 65535 and low >= 0 else name
        fits = low >= 0 and high <= 65535
        return f"convert to uint8 in 0..255, {scale}.astype('uint8')" if fits else "store pixels from 0 to 255 as uint8"
    spans = {(0, 1): f"{name} * 255", (-1, 1): f"({name} + 1) * 127.5", (0, 255): name}
    for (least, most), pixels in spans.items():
        if least <= low and high <= most:
            return f"these floats look like [{least}, {most}]; convert to uint8, ({pixels}).round().astype('uint8')"
    return "these floats look normalised; store the pixels that they were made from, 0 to 255 as uint8"


def _text(array: NDArray[Any]) -> str:
    return "×".join(map(str, array.shape)) or "a single number"


def _error(file: Path, fault: str, remedy: str) -> SettingError:
    return SettingError(f"data.path={file}: {fault}; {remedy}")
