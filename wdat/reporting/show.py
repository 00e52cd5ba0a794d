"""Records shown in an interpreter or a notebook: as text, as HTML, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from wdat.errors import SettingError
from wdat.records import Record
from wdat.reporting.frame import sections, to_frame
from wdat.reporting.plots import accuracy_curves, house_style
from wdat.reporting.tables import Grid, before_after, evaluation_table
from wdat.terminal import PlainConsole

__all__ = ["html", "plot", "text", "to_frame"]

WIDTH = 120  # characters of a line


def table(records: Sequence[Record]) -> Grid:
    """Before and after training side by side where both were measured, else a row a measurement."""
    both = {"before", "after"} <= {r.stage for r in records}
    return before_after(records) if both else evaluation_table(records)


def text(records: Sequence[Record]) -> str:
    """The table as text; `[]` for no record."""
    if not records:
        return "[]"
    console = PlainConsole(width=WIDTH, color_system=None, force_terminal=False, force_jupyter=False)
    with console.capture() as captured:
        console.print(table(records))
    return "\n".join(line.rstrip() for line in captured.get().rstrip().splitlines())


def html(records: Sequence[Record]) -> str:
    """The table as HTML; text in records is escaped."""
    if not records:
        return "<p>no records</p>"
    grid = table(records)
    head = ". ".join(escape(part) for part in (grid.title, *grid.notes) if part)
    return f"<p>{head}</p>{grid.cells.to_html(index=False, border=0)}"


def plot(records: Sequence[Record], ax: Axes | None = None) -> Axes:
    """Draw accuracy against budget; as `Results.plot`."""
    attacked = [section for section in sections(to_frame(records)) if not section.attacked.empty]
    if not attacked:
        raise SettingError("no record is of an attack: there is no accuracy against budget to plot")
    if ax is None:
        with house_style():
            ax = plt.figure(layout="constrained").add_subplot()
    accuracy_curves(attacked[0], ax)
    return ax
