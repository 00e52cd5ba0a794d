"""Text for terminals: nothing that is printed can steer them, brackets in names and paths are no markup.

What is secret is recognised here too, wherever a configuration or a command is shown.
"""

from __future__ import annotations

import io
import os
import re
import sys
from typing import Any

from rich.console import Console
from rich.text import Text

SECRET = re.compile(r"(^|_|\.|api)(keys?|tokens?|secrets?|passw(or)?ds?|credentials?)$", re.IGNORECASE)  # ends of names
HIDDEN = "***"
INNER = re.compile(  # a name and its value inside of a dict in Hydra's grammar
    r"""(\w+)(['"]?\s*:\s*)(\[[^\]]*\]|\{[^}]*\}|'[^']*'|"[^"]*"|[^,}\]]+)"""
)


def prepare_environment() -> None:
    """Make any terminal and any environment do: letters that it can't show are replaced, a notebook's pictures aren't.

    `MPLBACKEND=module://...` is inherited from a notebook, whose package another environment may lack.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    if os.environ.get("MPLBACKEND", "").startswith("module://"):
        del os.environ["MPLBACKEND"]


def is_secret(key: str) -> bool:
    """Whether a setting of this name, such as `logger.api_key`, is nobody else's business."""
    return SECRET.search(key) is not None


def without_secrets(value: Any, key: str = "") -> Any:
    """Nested plain values, those under secret names hidden, however deep they lie.

    Args:
        value: A configuration in plain values.
        key: The name it stands under.
    """
    if isinstance(value, dict):
        return {name: without_secrets(item, key if is_secret(key) else str(name)) for name, item in value.items()}
    if isinstance(value, list):
        return [without_secrets(item, key) for item in value]
    return HIDDEN if value not in (None, "") and is_secret(key) else value


def without_secret(override: str) -> str:
    """An override such as `logger.api_key=abc`, its value hidden under a secret name, also one inside of the value."""
    key, sign, value = override.partition("=")
    if sign and value and is_secret(key):
        return f"{key}={HIDDEN}"

    def hidden(found: re.Match[str]) -> str:
        return f"{found[1]}{found[2]}{HIDDEN}" if is_secret(found[1]) else found[0]

    return f"{key}{sign}{re.sub(INNER, hidden, value)}"


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
