"""Pictures of what the benchmarks measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from wdat.reporting.plots import house_style, save

COLOURS = {"table": "#0072b2", "uncorrected table": "#e69f00", "subsample": "#009e73", "ema": "#cc79a7", "batch": "0.7"}
ORDER = ("batch", "ema", "subsample", "uncorrected table", "table")


@house_style()
def errors_over_time(rows: Sequence[dict[str, Any]], epoch: int, place: Path) -> None:
    """Relative error of every estimator along the run: a panel for each radii loss and norm, at the first rate.

    Args:
        rows: As `benchmarks.upsilon` records them.
        epoch: Steps in an epoch.
        place: The PNG file.
    """
    rate = rows[0]["rate"]
    panels = sorted({(row["radii_loss"], row["norm"]) for row in rows})
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(5.4 * columns, 3.6 * lines), layout="constrained")
    for k, (loss, norm) in enumerate(panels):
        axes = figure.add_subplot(lines, columns, k + 1)
        key = "upsilon_error" if loss == "ce" else "c_error"
        chosen = {r["estimator"]: r for r in rows if (r["radii_loss"], r["norm"], r["rate"]) == (loss, norm, rate)}
        for name in ORDER:
            row = chosen[name]
            axes.plot(
                row["steps"], [100 * e for e in row[key]], color=COLOURS[name], label=name,
                linewidth=2.4 if name == "table" else 1.3,
            )  # fmt: skip
        axes.axhline(0, color="0.3", linewidth=0.8)
        axes.axvline(epoch, color="0.3", linewidth=0.8, linestyle=":")
        axes.set_title(f"{loss} radii, {norm}: error of {'Υ' if loss == 'ce' else 'c (capped radii)'}")
        limit = 25 if loss == "ce" else 60
        axes.set_ylim(-limit, limit)
        axes.set_xlabel(f"step (dotted: end of the first epoch; rate {rate:g})")
        axes.set_ylabel("relative error, %")
        if k == 0:
            axes.legend(loc="lower right", fontsize=8, ncols=2)
    save(figure, place)
