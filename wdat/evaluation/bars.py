"""A progress bar for evaluations in notebooks and terminals."""

from __future__ import annotations

from typing import Any

from tqdm.auto import tqdm


class Bars:
    """One bar for each attack that runs, which stays when it is done.

    Example:
        >>> bars = Bars(disable=True)
        >>> bars("W-PGD", 1, 50)
    """

    def __init__(self, **options: Any) -> None:
        self._options = options
        self._open: dict[str, Any] = {}

    def __call__(self, label: str, done: int, total: int) -> None:
        """Show that of `total` steps under a label so many are done."""
        if label not in self._open:
            self._open[label] = tqdm(total=total, desc=label, **self._options)
        bar = self._open[label]
        bar.update(done - bar.n)
        if done >= total:
            self._open.pop(label).close()
