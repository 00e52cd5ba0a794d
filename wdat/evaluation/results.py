"""What `wdat.evaluate` returns: a list of records that prints as a table."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from wdat.records import Record

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes


class Results(list[Record]):
    """Records, in a list that prints as a table, in notebooks too.

    Tables and pictures are loaded where the first is asked for.
    """

    def __repr__(self) -> str:
        return str(_show().text(self))

    def _repr_html_(self) -> str:
        return str(_show().html(self))

    def to_frame(self) -> pd.DataFrame:
        """One row a record, as `wdat.to_frame` makes them."""
        return _show().to_frame(self)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw accuracy against budget: the first network, norm and order of several.

        Args:
            ax: Matplotlib's axes to draw into; None makes a figure with pyplot.

        Raises:
            SettingError: If no record is of an attack.
        """
        axes: Axes = _show().plot(self, ax)
        return axes


def _show() -> Any:
    return import_module("wdat.reporting.show")
