"""Published weights on disk: fetched where absent, checked before they take their place, never half there."""

from __future__ import annotations

import errno
import os
import tempfile
import textwrap
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.error import HTTPError

from torch import nn

from wdat.errors import SettingError
from wdat.folders import no_empty_folders
from wdat.models.reading import broken_part, read


@dataclass(frozen=True)
class WeightFile:
    """A file of published weights: where it is looked for, where it comes from, and the way to fetch it.

    Attributes:
        root: The folder below which its network's files are looked for.
        place: Where the file belongs, from `root` on.
        source: Its address, for messages.
        fetch: Writes the file to the path it is given.
    """

    root: Path
    place: Path
    source: str
    fetch: Callable[[str], object]

    @property
    def path(self) -> Path:
        """Where the file belongs."""
        return self.root / self.place

    def exists(self) -> bool:
        """Whether there is anything of that name."""
        return os.path.exists(self.path)


def obtain(files: Sequence[WeightFile], network: str, load: Callable[[Path | None], nn.Module]) -> nn.Module:
    """Load a network from its files. Those that are absent are fetched, and stay only if the network has loaded.

    Args:
        files: All of the network's, in one folder.
        network: Its name, for messages.
        load: Builds the network with its weights from a folder in which each file lies at its `place`; None stands
            for the files' own root.

    Raises:
        SettingError: A file can't be had, or what is there or arrives is no file of weights, or of another network.
    """
    absent = [file for file in files if not file.exists()]
    for file in files:
        if file not in absent:
            _check_present(file)
    if not absent:
        try:
            return load(None)
        except Exception as error:  # third-party code on third-party files
            paths, sources = ", ".join(str(f.path) for f in files), ", ".join(f.source for f in files)
            raise SettingError(
                f"{network} can't be loaded from {paths} (model.name): {one_line(error)}; deleting what isn't of this "
                f"network lets it be downloaded again from {sources}"
            ) from error
    parent = absent[0].path.parent
    with no_empty_folders(parent), _scratch(parent) as folder:
        for file in files:
            arrived = Path(folder) / file.place
            arrived.parent.mkdir(parents=True, exist_ok=True)
            if file in absent:
                _fetch(file, arrived, network)
            else:
                arrived.symlink_to(file.path.absolute())
        try:
            loaded = load(Path(folder))
        except Exception as error:
            raise _refused(absent, network, f"what arrived is not of this network: {one_line(error)}") from error
        for file in absent:
            os.replace(Path(folder) / file.place, file.path)
    return loaded


def _check_present(file: WeightFile) -> None:
    """Refuse a file that is there and holds no weights."""
    try:
        read(file.path, "model.root")
    except SettingError as error:
        raise SettingError(f"{error}; deleting it lets it be downloaded again from {file.source}") from error


def _fetch(file: WeightFile, to: Path, network: str) -> None:
    """Fetch a file and check that it is a whole one of weights."""
    try:
        file.fetch(str(to))
    except Exception as error:  # a downloader may raise anything
        raise _refused([file], network, _why(error)) from error
    try:
        read(to, "model.root")
        part = broken_part(to) if zipfile.is_zipfile(to) else None
        if part:
            raise SettingError(f"{to} is damaged in its part {part}: fetch it again")
    except SettingError as error:
        raise _refused([file], network, str(error).replace(str(to), "what arrived")) from error


def _refused(files: Sequence[WeightFile], network: str, reason: str) -> SettingError:
    """The error for a download that nothing is kept of."""
    sources, paths = ", ".join(f.source for f in files), ", ".join(str(f.path.absolute()) for f in files)
    return SettingError(
        f"the weights of {network} could not be downloaded from {sources} (model.name): {reason}. Nothing was kept. "
        f"Fetch them by hand, in a browser if need be, and put them at {paths}"
    )


def _why(error: Exception) -> str:
    """Why a download failed, before what the downloader says."""
    said = one_line(error)
    if type(error).__name__ == "FileURLRetrievalError":  # gdown's
        return f"Google Drive gives no file, as when its daily quota is used up ({said})"
    if isinstance(error, HTTPError) or type(error).__name__ == "HTTPError":  # urllib's or requests'
        return f"the server refuses ({said})"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"there is no room ({said}): make room, or name another folder (model.root)"
    if isinstance(error, OSError):
        return f"the server can't be reached: no network, or it is blocked ({said})"
    return said


def _scratch(parent: Path) -> tempfile.TemporaryDirectory[str]:
    """A new folder in `parent`, which is made where it is absent."""
    try:
        parent.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryDirectory(dir=parent, prefix=".download-")
    except (OSError, ValueError) as error:
        raise SettingError(f"{parent} can't be written (model.root): {one_line(error)}; name another folder") from error


def one_line(error: Exception) -> str:
    """An error's message on one line; a foreign one is cut short."""
    text = str(error) or type(error).__name__
    return text if isinstance(error, SettingError) else textwrap.shorten(text, 160, placeholder=" ...")
