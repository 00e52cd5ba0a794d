"""Pools of synthetic images of any size that take no room: npz files whose images are a hole in the file."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO

import numpy as np

CLASSES, CHUNK = 10, 1 << 24
NEW = 0xFFFFFFFF  # in a zip file: the number stands in the zip64 field
VERSION, DATE = 45, 0x21  # zip64; 1 January 1980


def sparse_pool(path: Path, count: int, size: int = 32) -> None:
    """Write `image`, uint8, count×size×size×3, black and without room on the disk, and `label`, uint8, at random.

    The archive is zip64, as `numpy.savez` writes it beyond 4 GB. Its sums of the members are left at zero: they would
    need all bytes to be read, here as in training.
    """
    rng = np.random.default_rng(0)
    with path.open("wb") as file:
        start = _begin(file, "image", (count, size, size, 3))
        file.seek(count * size * size * 3, 1)
        members = [("image", 0, file.tell() - start)]
        header = file.tell()
        start = _begin(file, "label", (count,))
        for first in range(0, count, CHUNK):
            file.write(rng.integers(CLASSES, size=min(CHUNK, count - first), dtype=np.uint8).tobytes())
        members.append(("label", header, file.tell() - start))
        _end(file, members)


def _begin(file: BinaryIO, name: str, shape: tuple[int, ...]) -> int:
    """Write the headers of one member; where its content begins."""
    length = int(np.prod(shape))
    content = b"\x93NUMPY\x01\x00"
    described = {"descr": "|u1", "fortran_order": False, "shape": shape}
    text = repr(described).encode()
    text += b" " * (-(len(content) + 2 + len(text) + 1) % 64) + b"\n"
    content += struct.pack("<H", len(text)) + text
    file_name = f"{name}.npy".encode()
    whole = len(content) + length
    head = struct.pack("<4s5H3I2H", b"PK\3\4", VERSION, 0, 0, 0, DATE, 0, NEW, NEW, len(file_name), 20)
    file.write(head + file_name + struct.pack("<2H2Q", 1, 16, whole, whole))
    start = file.tell()
    file.write(content)
    return start


def _end(file: BinaryIO, members: list[tuple[str, int, int]]) -> None:
    """Write the list of members: name, where its header is, and its size."""
    begun = file.tell()
    for name, offset, size in members:
        file_name = f"{name}.npy".encode()
        head = (b"PK\1\2", VERSION, VERSION, 0, 0, 0, DATE, 0, NEW, NEW, len(file_name), 28, 0, 0, 0, 0, NEW)
        file.write(struct.pack("<4s6H3I5H2I", *head) + file_name + struct.pack("<2H3Q", 1, 24, size, size, offset))
    end, n = file.tell(), len(members)
    file.write(struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, VERSION, VERSION, 0, 0, n, n, end - begun, begun))
    file.write(struct.pack("<4sIQI", b"PK\6\7", 0, end, 1))
    file.write(struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, n, n, NEW, NEW, 0))
