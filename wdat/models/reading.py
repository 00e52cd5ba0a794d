"""Reading files of weights, safely: nothing is ever unpickled that could run code."""

from __future__ import annotations

import os
import pickle
import re
import textwrap
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from wdat.errors import SettingError


def broken_part(path: Path) -> str | None:
    """The part of a file of `torch.save` whose bytes aren't those of its checksum; None if all are.

    `torch.load` doesn't look at the checksums.

    Raises:
        zipfile.BadZipFile: The file is no archive.
    """
    with zipfile.ZipFile(path) as archive:
        return archive.testzip()


def read(path: Path, setting: str) -> Any:
    """The content of a file of `torch.save` or of safetensors, on the CPU, without unpickling objects.

    Args:
        path: The file.
        setting: The key on the command line that named the file, for messages.

    Raises:
        SettingError: There is no such file, it is no PyTorch file, it is damaged, or it needs unpickling.
    """
    if os.path.isdir(path):
        found = sorted(str(file) for pattern in ("best.ckpt", "*.ckpt", "*.pt*") for file in path.rglob(pattern))
        raise SettingError(f"{path} is a folder ({setting}): name a file{f', such as {found[0]}' if found else ''}")
    if re.match(r"[a-z]+:/", str(path)) and not path.exists():
        raise SettingError(f"{path} is an address, and nothing is downloaded ({setting}): fetch it and name the file")
    if not os.path.isfile(path):  # which no name, however odd, makes fail
        raise SettingError(f"there is no file {path} ({setting}): check the path")
    try:
        if _is_safetensors(path):
            return load_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on a foreign pickle it warns before it refuses
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can make the reader raise nearly anything
        raise SettingError(f"{path} {_why(path, error)} ({setting})") from error


def _why(path: Path, error: Exception) -> str:
    """What is wrong with a file that `torch.load` refused."""
    if isinstance(error, PermissionError):
        return "may not be read: change its permissions"
    if path.stat().st_size == 0:
        return "is empty: fetch it again"
    with path.open("rb") as file:
        head = file.read(64).lstrip()
    if head.startswith(b"<"):
        return f"is a web page{_title(path)}, not weights: fetch it again, in a browser if need be"
    if _cut_short(head, path, error) or isinstance(error, SafetensorError):
        return "is cut short: fetch or save it again"
    if isinstance(error, pickle.UnpicklingError) and head.startswith((b"PK", b"\x80")):
        return (
            "holds pickled Python objects, and nothing is unpickled here because that can run code: where you trust "
            "it, load it once elsewhere and save torch.save(network.state_dict(), FILE)"
        )
    if "TorchScript" in str(error):
        return "is a TorchScript program, which could run code: save torch.jit.load(FILE).state_dict() in another file"
    return "is damaged or no PyTorch file: fetch or save it again"


def _is_safetensors(path: Path) -> bool:
    """Whether a file begins as one of safetensors: the length of a header, and the header's brace."""
    with path.open("rb") as file:
        head = file.read(9)
    return len(head) == 9 and head[8:] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size


def _title(path: Path) -> str:
    """A web page's title, which may tell of a quota or a login; empty if it has none."""
    with path.open("rb") as file:
        found = re.search(r"<title>(.*?)</title>", file.read(4096).decode(errors="replace"), re.I | re.S)
    return f" ('{textwrap.shorten(found[1], 60, placeholder='...')}')" if found else ""


def _cut_short(head: bytes, path: Path, error: Exception) -> bool:
    """Whether a file of PyTorch's lacks its end, which in the present format is a zip archive's list of contents."""
    if head.startswith(b"PK"):
        return not zipfile.is_zipfile(path)
    return head.startswith(b"\x80") and any(sign in str(error) for sign in ("truncated", "Ran out", "unexpected EOF"))
