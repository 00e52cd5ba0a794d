"""Text for terminals: nothing that is printed can steer them, brackets in names and paths are no markup."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.text import Text


def printable(text: object) -> str:
    """Text that can't steer a terminal: control and formatting characters, but for line ends, as their escapes."""
    return "".join(
        c if c.isprintable() or c in "\n\N{NO-BREAK SPACE}" else c.encode("unicode_escape").decode() for c in str(text)
    )


class PlainConsole(Console):
    """A console that shows text as it is: brackets in names and paths are no markup, nothing steers the terminal."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"markup": False, "emoji": False, "highlight": False, "soft_wrap": True, **options})

    def render_str(self, text: str, **options: Any) -> Text:
        """Every piece of plain text that is printed, alone or in a table, comes through here."""
        return super().render_str(printable(text), **options)
