"""What one process of a training may ask all of them for: to save, or to stop."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SAVE, INTERRUPTED, TERMINATED = "save", "SIGINT", "SIGTERM"
NAMES = (SAVE, INTERRUPTED, TERMINATED)


class Requests:
    """What this process asks for, until all have been told of it.

    The training step carries it to the others in the sum that it makes anyway, and hands out what any has asked for.
    """

    def __init__(self) -> None:
        self._asked = dict.fromkeys(NAMES, False)

    def ask(self, name: str) -> None:
        """Ask all processes for one of `NAMES`, with the next step; a signal's handler may call it."""
        self._asked[name] = True

    def taken(self) -> list[float]:
        """1 for each of `NAMES` that is asked for, else 0; what is taken isn't asked for again."""
        asked, self._asked = self._asked, dict.fromkeys(NAMES, False)
        return [float(asked[name]) for name in NAMES]


def asked_by_any(outputs: Any) -> frozenset[str] | None:
    """What any process has asked for in the step that returned these outputs; None where it carried no requests."""
    found: frozenset[str] | None = outputs.get("requests") if isinstance(outputs, Mapping) else None
    return found
