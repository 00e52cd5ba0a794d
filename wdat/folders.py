"""Folders that are there only if something is in them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def no_empty_folders(folder: Path) -> Iterator[None]:
    """Take away the folders that the block has made on the way to `folder` and left empty, also after an error.

    Args:
        folder: A folder that the block may make, with those above it.
    """
    made = [place for place in (folder, *folder.absolute().parents) if not _exists(place)]
    try:
        yield
    finally:
        for place in made:
            with suppress(OSError, ValueError):  # it isn't there, or isn't empty
                place.rmdir()


def _exists(place: Path) -> bool:
    try:
        return place.exists()
    except (OSError, ValueError):  # no such name can be
        return False
