"""The picture of training: accuracy on validation images after each epoch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from wdat.records import Record
from wdat.reporting.figures import budget_name, order_name
from wdat.reporting.plots import COLOURS, legend_below, new_axes, plain

Line = tuple[str, str, float, float]


def training_runs(records: Sequence[Record]) -> list[list[Record]]:
    """Records of stage `epoch`, apart by what a picture can't hold together: network, data, split, norm and seed."""
    found: dict[tuple[Any, ...], list[Record]] = {}
    for r in records:
        if r.stage == "epoch" and r.epoch is not None:
            found.setdefault((r.network, r.data, r.split, r.norm, r.seed), []).append(r)
    return list(found.values())


def accuracy_over_epochs(records: Sequence[Record]) -> Figure:
    """Accuracy after each epoch, clean and under each attack and budget, 95 % intervals over images as bands.

    Args:
        records: Of one run as `training_runs` gives them; of equal ones the latest counts.
    """
    figure, axes = new_axes()
    lines: dict[Line, dict[int, Record]] = {}
    for r in records:
        lines.setdefault((r.attack, r.loss, r.p, r.delta), {})[r.epoch or 0] = r
    dashes = {delta: ("-", "--", "-.", ":")[i % 4] for i, delta in enumerate(sorted({k[3] for k in lines if k[3]}))}
    for (attack, loss, p, delta), found in lines.items():
        points = [found[epoch] for epoch in sorted(found)]
        clean = attack == "none"
        name = (
            f"clean ({loss})" if clean else f"{attack} {loss} ({order_name(p)}), {budget_name(delta, points[0].norm)}"
        )
        colour = "#222222" if clean else COLOURS.get(attack, "#5b4b9a")
        x = sorted(found)
        low, high = [100 * r.accuracy_low for r in points], [100 * r.accuracy_high for r in points]
        axes.fill_between(x, low, high, color=colour, alpha=0.08, linewidth=0)
        axes.plot(
            x, [100 * r.accuracy for r in points], linestyle=dashes.get(delta, "-"), color=colour, marker="o", ms=3.5,
            lw=1.4, label=plain(name),
        )  # fmt: skip
    axes.set(ylim=(0, 100), xlabel="epoch", ylabel=plain(f"accuracy on {records[0].split} in percent"))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    legend_below(figure, axes)
    return figure
