"""The picture of a comparison: a dot an arm, mean ± standard deviation over seeds, a panel an attack and budget."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from wdat.reporting.compare import Comparison, Row
from wdat.reporting.plots import FONT, plain
from wdat.terminal import printable

STYLES = {  # colour, marker and whether it is filled: told apart without colour too
    "before": ("#6b6b6b", "o", False), "after": ("#0072b2", "o", True), "evaluate": ("#d55e00", "D", True),
}  # fmt: skip
LABEL, LINES = 28, 3  # characters and lines of an arm's name
WIDTH, LINE, HEAD, STEP = 4.8, 0.15, 0.34, 0.15  # inches: a panel, a line of a name, a title, a stage

Panel = tuple[str, list[tuple[str, Row]]]


def dots(comparison: Comparison, columns: int | None = None) -> Figure:
    """Accuracies of all rows, each seed as a small dot, the mean as a large one, ± one standard deviation as a bar.

    Args:
        comparison: Its rows; those with equal clean accuracies under several losses are drawn once.
        columns: Panels side by side; None takes as many as keep the picture from growing tall.
    """
    panels = _panels(comparison)
    height = sum(_height(panel) for panel in panels)
    columns = columns or max(1, min(3, len(panels), math.ceil(height / 9)))
    lines = [panels[i : i + columns] for i in range(0, len(panels), columns)]
    heights = [max(map(_height, line)) for line in lines]
    with matplotlib.rc_context(FONT):
        figure = Figure(figsize=(WIDTH * columns, sum(heights) + 0.7), layout="constrained")
        grid = figure.add_gridspec(len(lines), columns, height_ratios=heights)
        for i, panel in enumerate(panels):
            axes = figure.add_subplot(grid[i // columns, i % columns])
            _draw(axes, panel, comparison.stages)
            if i + columns >= len(panels):
                axes.set_xlabel("accuracy in percent")
            else:
                axes.tick_params(axis="x", labelbottom=False, length=0)
        figure.legend(
            handles=_legend(comparison), loc="outside lower center", ncols=4, frameon=False, fontsize=8,
            handlelength=1.2, columnspacing=1.2,
        )  # fmt: skip
    return figure


def _panels(comparison: Comparison) -> list[Panel]:
    """A panel a measurement with a line an arm; of a single arm one panel with a line a measurement."""
    seen: dict[tuple[object, ...], Row] = {}
    for row in comparison.rows:  # clean accuracy is the same whatever the loss
        key = (row.arm, row.network, *(row.measurement if row.attack != "none" else (row.data, row.split, row.norm)))
        if not set(row.records) <= set(seen[key].records if key in seen else ()):
            seen[(*key, len(seen)) if key in seen else key] = row
    rows = list(seen.values())
    who = {(row.arm, row.network) for row in rows}
    data, networks = {(row.data, row.split) for row in rows}, {row.network for row in rows}

    def what(row: Row) -> str:
        name = "clean" if row.attack == "none" else f"{row.attack_name}, {row.budget}"
        name += f", {row.norm}" if row.attack == "none" and len({r.norm for r in rows}) > 1 else ""
        return name + (f", {row.data} {row.split}" if len(data) > 1 else "")

    if len(who) == 1:
        arm, network = next(iter(who))
        return [(network if arm in ("", network) else f"{network}, {arm}", [(what(row), row) for row in rows])]
    panels: dict[str, list[tuple[str, Row]]] = {}
    for row in rows:
        parts = [row.arm] if len(comparison.arms) > 1 else []
        parts += [row.network] if len(networks) > 1 else []
        panels.setdefault(what(row), []).append((", ".join(parts), row))
    return list(panels.items())


def _height(panel: Panel) -> float:
    return HEAD + sum(_room(name, row) for name, row in panel[1])


def _room(name: str, row: Row) -> float:
    return 0.08 + max(LINE * len(_wrapped(name)), STEP * len(row.records))


def _wrapped(name: str) -> list[str]:
    """Lines that break between settings; of what is too long the ends stay."""
    lines = [""]
    for part in printable(name).replace("\n", " ").split(", "):
        cut = (LABEL - 1) // 2
        short = part if len(part) <= LABEL else f"{part[:cut]}…{part[-cut:]}"
        if not lines[-1] or len(lines[-1]) + len(short) + 2 <= LABEL:
            lines[-1] += (", " if lines[-1] else "") + short
        else:
            lines.append(short)
    return [plain(line) for line in (lines if len(lines) <= LINES else [*lines[: LINES - 1], f"… {lines[-1]}"])]


def _draw(axes: Axes, panel: Panel, stages: Sequence[str]) -> None:
    title, rows = panel
    bottom, ticks = 0.0, []
    for name, row in rows:
        room = _room(name, row)
        ticks.append(bottom + room / 2)
        here = [stage for stage in stages if row.records.get(stage)]
        for i, stage in enumerate(here):
            _dot(axes, row, stage, bottom + room / 2 + STEP * (i - (len(here) - 1) / 2))
        bottom += room
    axes.set(xlim=(-1.5, 101.5), ylim=(bottom, 0))
    axes.set_yticks(ticks, ["\n".join(_wrapped(name)) for name, _ in rows], fontsize=8)
    axes.set_title("\n".join(textwrap.wrap(plain(title), 60)[:2]), loc="left", fontsize=9)
    axes.grid(axis="x", alpha=0.3, linewidth=0.5)
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _dot(axes: Axes, row: Row, stage: str, y: float) -> None:
    found = row.over_seeds(stage)
    assert found is not None
    colour, marker, filled = STYLES[stage]
    face = colour if filled else "#ffffff"
    if found.sd is not None:
        seeds = [100 * r.accuracy for r in row.records[stage].values()]
        axes.plot(seeds, [y] * len(seeds), "|", color=colour, ms=6, mew=0.9, alpha=0.55, zorder=3)
    bar = None if found.sd is None else 100 * found.sd
    axes.errorbar(
        100 * found.mean, y, xerr=bar, fmt=marker, color=colour, mfc=face, ms=5, mew=1.1, lw=1.3, capsize=2, zorder=4,
        label=stage, clip_on=False,
    )  # fmt: skip


def _legend(comparison: Comparison) -> list[Line2D]:
    handles = []
    for stage in comparison.stages:
        colour, marker, filled = STYLES[stage]
        face = colour if filled else "#ffffff"
        handles.append(Line2D([], [], color=colour, marker=marker, mfc=face, ms=5, lw=0, label=stage))
    if any(len(found) > 1 for row in comparison.rows for found in row.records.values()):
        handles.append(Line2D([], [], color="#6b6b6b", marker="|", ms=6, lw=1.3, label="± sd; ticks: seeds"))
    return handles
