"""The picture of a comparison: a line an arm, grouped by attack and budget, means with their intervals."""

from __future__ import annotations

import textwrap
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from wdat.reporting.compare import MEASUREMENT, Comparison
from wdat.reporting.plots import house_style, plain

STYLES = {  # colour, marker and whether it is filled: told apart without colour too
    "before": ("#6b6b6b", "o", False), "after": ("#0072b2", "o", True), "evaluate": ("#d55e00", "D", True),
}  # fmt: skip
WIDTH, LINE, STAGE, EDGE = 4.8, 0.17, 0.13, 1.0  # inches: the picture, a line of a name, a stage, axis and legend
LABEL = 28  # characters of a line of an arm's name


@house_style()
def dot_plot(comparison: Comparison) -> Figure:
    """Accuracies of all rows: each seed as a tick, the mean as a dot, its 95 % interval as a bar.

    Args:
        comparison: Of any number of arms; of one alone every line is an attack.
    """
    figures = comparison.figures[comparison.figures["figure"].isin(comparison.stages)]
    several = len(figures[["arm", "network"]].drop_duplicates()) > 1
    lines = list(figures.groupby([*MEASUREMENT, "arm", "network"], sort=False, dropna=False))
    top, previous, ticks, names = 0.0, None, [], []
    drawing: list[tuple[float, str, pd.Series]] = []
    headings: list[tuple[float, str]] = []
    for key, own in lines:
        about = dict(zip([*MEASUREMENT, "arm", "network"], key, strict=True))
        what = ", ".join(str(about[k]) for k in ("name", "threat", "budget") if about[k])
        name = _arm(about, comparison) if several else what
        if several and key[: len(MEASUREMENT)] != previous:
            top += LINE * 0.6
            headings.append((top + LINE / 2, what))
            top += LINE
        previous = key[: len(MEASUREMENT)]
        wrapped = textwrap.wrap(plain(name), LABEL)[:3] or [""]
        height = max(LINE * len(wrapped), STAGE * len(own)) + 0.05
        ticks.append(top + height / 2)
        names.append("\n".join(wrapped))
        for i, (_, r) in enumerate(own.iterrows()):
            drawing.append((top + height / 2 + STAGE * (i - (len(own) - 1) / 2), str(r["figure"]), r))
        top += height
    figure = Figure(figsize=(WIDTH, top + EDGE), layout="constrained")
    axes = figure.add_subplot()
    for y, stage, r in drawing:
        colour, marker, filled = STYLES[stage]
        off = (
            None if pd.isna(r["low"]) else 100 * pd.Series([r["mean"] - r["low"], r["high"] - r["mean"]]).clip(lower=0)
        )
        if r["count"] > 1:
            axes.plot([100 * v for v in r["values"]], [y] * r["count"], "|", color=colour, ms=6, mew=0.9, alpha=0.6)
        bar = None if off is None else off.to_numpy().reshape(2, 1)
        look: dict[str, Any] = {"color": colour, "mfc": colour if filled else "white", "fmt": marker, "ms": 4.5}
        axes.errorbar([100 * r["mean"]], [y], xerr=bar, label=stage, **look)
    for y, what in headings:
        axes.text(0.0, y, plain(what), transform=axes.get_yaxis_transform(), va="center", weight="bold", size=8)
    low, high = 100 * figures["low"].fillna(figures["mean"]).min(), 100 * figures["high"].fillna(figures["mean"]).max()
    axes.set(xlim=(max(low - 3, -1.5), min(high + 3, 101.5)), ylim=(top + 0.05, 0), xlabel="accuracy in percent")
    axes.set_yticks(ticks, names, fontsize=8)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)
    handles = [Line2D([], [], color=c, marker=m, mfc=c if f else "white", ms=5, lw=0, label=s)
               for s, (c, m, f) in STYLES.items() if s in comparison.stages]  # fmt: skip
    figure.legend(handles=handles, loc="outside lower center", ncols=4)
    return figure


def _arm(about: dict[str, object], comparison: Comparison) -> str:
    several = comparison.figures["network"].nunique() > 1
    parts = [about["arm"]] if len(comparison.arms) > 1 else []
    return ", ".join(map(str, [*parts, *([about["network"]] if several or not parts else [])]))
