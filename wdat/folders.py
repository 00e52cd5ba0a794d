"""Folders that are there only if something is in them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def no_empty_folders(folder: Path) -> Iterator[None]:
    """Take away the folders that the block has made on the way to `folder` and left empty, also after an error.

    Args:
        folder: A folder that the block may make, with those above it.
    """
    made = absent(folder)
    try:
        yield
    finally:
        remove_empty(made)


def absent(folder: Path) -> list[Path]:
    """Of a folder and those above it, the ones that don't exist, the outermost first."""
    return [path for path in (*reversed(folder.absolute().parents), folder) if not _exists(path)]


def remove_empty(folders: Sequence[Path]) -> None:
    """Take away those of these folders, the outermost first, that are there and empty."""
    for folder in reversed(folders):
        with suppress(OSError, ValueError):  # it isn't there, or isn't empty
            folder.rmdir()


def _exists(folder: Path) -> bool:
    try:
        return folder.exists()
    except (OSError, ValueError):  # no such name can be
        return False
