"""CIFAR-10 and CIFAR-100, through torchvision: used where they lie, downloaded where they don't."""

from __future__ import annotations

import http.client
import os
import socket
import tarfile
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.datasets.utils import check_integrity, download_and_extract_archive

from wdat.data.splits import Splits
from wdat.errors import SettingError
from wdat.folders import no_empty_folders

SILENCE = 60.0
"""Seconds without a byte after which a download is given up."""

_FAILURES = (OSError, RuntimeError, http.client.HTTPException, tarfile.TarError, EOFError, zlib.error)


def cifar10(root: str | Path = "data", download: bool = True) -> Splits:
    """CIFAR-10: 50,000 training and 10,000 test images of 32×32×3, ten classes.

    Args:
        root: The folder that holds, or will hold, `cifar-10-batches-py` (`data.root`).
        download: Whether to download files that aren't there (`data.download`).

    Raises:
        SettingError: The files are missing or damaged, and can't or mustn't be downloaded.
    """
    return read(CIFAR10, root, download)


def cifar100(root: str | Path = "data", download: bool = True) -> Splits:
    """CIFAR-100: as `cifar10`, with a hundred (fine) classes, in `cifar-100-python`."""
    return read(CIFAR100, root, download)


def read(kind: type[CIFAR10], root: str | Path, download: bool) -> Splits:
    """Fetches the files where needed and reads both sets."""
    fetch(kind, root, download)
    try:
        with warnings.catch_warnings():
            # The published files carry flags as numbers, which NumPy 2.4.0 to 2.4.4 warn of.
            warnings.filterwarnings("ignore", message=r"dtype\(\): align should be passed", category=UserWarning)
            train, test = (kind(Path(os.path.expanduser(root)), train=train) for train in (True, False))
    except _FAILURES as error:
        raise _error(kind, root, f"can't be read ({error})", "delete that folder and run again, or") from error
    x_train, x_test = (torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous() for part in (train, test))
    return Splits(x_train, torch.tensor(train.targets), x_test, torch.tensor(test.targets))


def fetch(kind: type[CIFAR10], root: str | Path, download: bool) -> None:
    """Downloads and unpacks the files unless they are there, complete and undamaged.

    Raises:
        SettingError: As `cifar10`.
    """
    parent = Path(os.path.expanduser(root))
    folder = parent / kind.base_folder
    lists = [(str(name), str(md5)) for name, md5 in (*kind.train_list, *kind.test_list)]
    files = [*lists, (kind.meta["filename"], kind.meta["md5"])]
    wrong = [name for name, md5 in files if not check_integrity(folder / name, md5)]
    if not wrong:
        return
    damaged = [name for name in wrong if os.path.exists(folder / name)]
    if damaged:
        fault = f"is damaged ({', '.join(damaged)}: wrong checksum)"
    else:
        fault = "isn't there" if len(wrong) == len(files) else f"is incomplete (no {', '.join(wrong)})"
    if not download:
        raise _error(kind, root, fault, "set data.download=true, or")
    try:
        with no_empty_folders(parent), _patience(SILENCE):
            download_and_extract_archive(kind.url, parent, filename=kind.filename, md5=kind.tgz_md5)
    except _FAILURES as error:
        fault = f"{fault}, and downloading {kind.url} failed ({error})"
        raise _error(kind, root, fault, f"put {kind.filename} into {parent.absolute()}, or") from error


def _error(kind: type[CIFAR10], root: str | Path, fault: str, remedy: str) -> SettingError:
    folder = Path(os.path.expanduser(root)).absolute() / kind.base_folder
    return SettingError(
        f"{kind.__name__} (data.root={root}) {fault}: {remedy} put its unpacked files into {folder}, "
        "or use a file of your own with data=npz data.path=FILE.npz"
    )


@contextmanager
def _patience(seconds: float) -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
