"""Arrays inside an `.npz` file, mapped where they lie: files larger than memory cost no memory.

`numpy.savez` stores its members as they are, `numpy.savez_compressed` doesn't. NumPy itself maps `.npy` files only.
"""

from __future__ import annotations

import ast
import math
import struct
import warnings
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_LOCAL_HEADER = struct.Struct("<26xHH")  # of a zip member; ends with the lengths of its name and of its extra field
_ENCRYPTED = 1
_MAGIC = b"\x93NUMPY"
_LENGTHS = {(1, 0): struct.Struct("<H"), (2, 0): struct.Struct("<I")}  # of an array's header, by version
_LONGEST = 10_000  # bytes of a header, as in NumPy: what is longer isn't parsed


def mapped(path: str | Path, names: Iterable[str]) -> dict[str, NDArray[Any]]:
    """Maps arrays of an `.npz` file, read-only.

    Pages are read when they are touched, and given back when memory is short. The sums that the archive keeps of its
    members aren't checked: that would read them whole.

    Args:
        path: The file.
        names: Arrays to map, such as `"image"`.

    Returns:
        The arrays that could be mapped, by name, as `numpy.memmap`. Those that are absent, compressed, empty or hold
        Python objects are left out, for `numpy.load` to read or to refuse.

    Raises:
        OSError: The file can't be read.
        ValueError: A member's header is damaged, or its size isn't that of its array.
        zipfile.BadZipFile: The file is no archive, or is cut short.
    """
    wanted = {f"{name}.npy": name for name in names}
    with open(path, "rb") as stream, zipfile.ZipFile(stream) as archive:
        members = {wanted[member.filename]: member for member in archive.infolist() if member.filename in wanted}
        arrays = {name: _map(path, stream, member) for name, member in members.items()}
    return {name: array for name, array in arrays.items() if array is not None}


def view(array: NDArray[Any]) -> Tensor:
    """The array as a tensor that shares its memory and must not be written to, even where it is read-only."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)


def _map(path: str | Path, stream: BinaryIO, member: zipfile.ZipInfo) -> NDArray[Any] | None:
    """The array of one member, or None where it can't be mapped."""
    if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & _ENCRYPTED:
        return None
    stream.seek(member.header_offset)
    header = stream.read(_LOCAL_HEADER.size)
    if len(header) < _LOCAL_HEADER.size:
        raise ValueError(f"{member.filename} begins behind the end of the file")
    start = member.header_offset + _LOCAL_HEADER.size + sum(_LOCAL_HEADER.unpack(header))
    stream.seek(start)
    described = _array_header(stream, member.filename)
    if described is None:
        return None
    shape, fortran, dtype = described
    offset, size = stream.tell(), math.prod(shape) * dtype.itemsize
    if dtype.hasobject or size == 0:
        return None
    if offset + size != start + member.file_size:
        raise ValueError(f"{member.filename} has {start + member.file_size - offset} bytes for an array of {size}")
    return np.memmap(path, dtype, "r", offset, shape, "F" if fortran else "C")


def _array_header(stream: BinaryIO, name: str) -> tuple[tuple[int, ...], bool, np.dtype[Any]] | None:
    """Shape, Fortran order and type of the array that begins here; None for kinds that aren't mapped.

    The header is a literal, and is read as one: NumPy's own reader belongs to a module that can also unpickle.
    """
    magic = stream.read(len(_MAGIC) + 2)
    if len(magic) < len(_MAGIC) + 2 or not magic.startswith(_MAGIC):
        raise ValueError(f"{name} is no array: the magic bytes are missing")
    length = _LENGTHS.get((magic[-2], magic[-1]))
    if length is None:
        return None
    try:
        (size,) = length.unpack(stream.read(length.size))
        if size > _LONGEST:
            raise ValueError(f"{size} bytes long")
        header = ast.literal_eval(stream.read(size).decode("latin1"))
        shape, kind = tuple(map(int, header["shape"])), header["descr"]
        if not isinstance(kind, str):
            return None  # records of several fields
        if any(side < 0 for side in shape):
            raise ValueError(f"shape {shape}")
        return shape, bool(header["fortran_order"]), np.dtype(kind)
    except (ValueError, TypeError, KeyError, SyntaxError, struct.error, MemoryError, RecursionError) as error:
        raise ValueError(f"{name} has a damaged header ({error})") from error
