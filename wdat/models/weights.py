"""Published weights on disk: fetched where absent, checked before they take their place, never half there."""

from __future__ import annotations

import os
import tempfile
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from wdat.errors import SettingError
from wdat.models.checkpoint import read


@dataclass(frozen=True)
class WeightFile:
    """A file of published weights: where it is looked for, where it comes from, and the way to fetch it.

    Attributes:
        path: Where the file belongs.
        source: Its address, for messages.
        fetch: Writes the file to the path it is given.
    """

    path: Path
    source: str
    fetch: Callable[[str], object]

    def ensure(self, network: str) -> None:
        """Fetch the file where it is absent. What arrives is checked before it takes its place.

        Args:
            network: Name of the network, for messages.

        Raises:
            SettingError: It can't be had, or what is there or arrives is no file of weights.
        """
        if os.path.exists(self.path):
            try:
                read(self.path, "model.root")
            except SettingError as error:
                raise SettingError(f"{error}; deleting it lets it be downloaded again from {self.source}") from error
            return
        with _scratch(self.path.parent) as folder:
            arrived = Path(folder) / self.path.name
            try:
                self.fetch(str(arrived))
                read(arrived, "model.root")
            except Exception as error:  # a downloader may raise anything
                reason = one_line(error).replace(str(arrived), "what arrived")
                raise SettingError(
                    f"the weights of {network} could not be downloaded from {self.source} (model.name): {reason}. "
                    f"Fetch them by hand, in a browser if need be, and put them at {self.path.absolute()}"
                ) from error
            os.replace(arrived, self.path)


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
