"""Pictures made from records only: matplotlib figures without a display, and their SVG text."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from wdat.records import Record
from wdat.reporting.figures import ESTIMATE, Group, budget_name, groups, order_name
from wdat.terminal import printable

INK = {"before": "#8a8a8a", "after": "#1f5fa8"}
COLOURS = {  # Okabe and Ito's, told apart by colour-blind readers too
    "knapsack": "#d55e00", "certified": "#882255", "wpgd": "#0072b2", "wfgsm": "#56b4e9", "wpgd_budget": "#cc79a7",
    "pgd": "#009e73", "fgsm": "#7a7a7a", "autoattack": "#000000",
}  # fmt: skip
DASHES = ("-", "--", "-.", (0, (1, 1.2)))
SIZE = (4.8, 3.7)
LONGEST = 80  # characters of a label
FONT: dict[Any, Any] = {"font.size": 9, "svg.fonttype": "none", "svg.hashsalt": "wdat"}


def save(figure: Figure, path: Path) -> None:
    """Write a figure in the format that its ending names; the same figure gives the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".svg":
        path.write_text(to_svg(figure) + "\n", encoding="utf-8")
    else:
        _draw(figure, path, dpi=150)


def _draw(figure: Figure, out: Any, **options: Any) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # names may be in any script
        figure.savefig(out, **options)


def to_svg(figure: Figure, prefix: str = "", title: str = "") -> str:
    """SVG text to stand inside a page: text stays text, no date, no addresses but the name spaces.

    Args:
        figure: What to write.
        prefix: Put before every identifier, so that several figures can share a page.
        title: What a screen reader says.
    """
    out = io.StringIO()
    with matplotlib.rc_context(FONT):
        _draw(figure, out, format="svg", metadata={"Date": None, "Creator": None})
    svg = out.getvalue()
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    if prefix:
        svg = re.sub(r'(\sid="|url\(#|href="#)', rf"\g<1>{prefix}", svg)
    label = f' role="img" aria-label="{_attribute(title)}"' if title else ""
    return svg.replace("<svg", f"<svg{label}", 1).strip()


def accuracy_curves(group: Group) -> Figure:
    """Accuracy against δ: attacks, the knapsack's whole curve, certified bounds and the first-order estimate.

    Args:
        group: Records of one network, set of images, norm and order. Earlier stages are drawn paler.
    """
    figure, axes = new_axes()
    scale, unit = unit_of(group.norm)
    reach = 1.15 * scale * (max(group.deltas, default=0.0) or 1 / 255)
    losses = sorted({r.loss for r in group.records})
    for stage in group.stages:
        several = f", {stage}" if len(group.stages) > 1 else ""
        pale = 0.45 if stage == "before" else 1.0
        clean = group.clean(stage)
        lines: dict[tuple[str, str, float], list[Record]] = {}
        for r in sorted(group.attacked(stage), key=lambda r: (r.delta, r.accuracy)):
            line = lines.setdefault((r.attack, r.loss, r.p), [])
            if not (line and line[-1].delta == r.delta):  # of several settings the strongest
                line.append(r)
        for (attack, loss, p), points in lines.items():
            style: dict[str, Any] = {"color": COLOURS.get(attack, "#5b4b9a"), "alpha": pale}
            kind = "" if attack == "certified" and p == group.p else f" ({order_name(p)})"
            if any(r.details.get("curve") for r in points):  # the knapsack, and certified radii
                name = f"{attack}{kind}{', lower bound' if attack == 'certified' else ''}{several}"
                _knapsack(axes, points, scale, p, style | {"label": name})
                continue
            line = ([clean] if clean else []) + points
            _band(axes, line, scale, style)
            dash = DASHES[losses.index(loss) % len(DASHES)]
            x, y = [scale * r.delta for r in line], [100 * r.accuracy for r in line]
            name = f"{attack} {loss}{kind}{several}"
            axes.plot(x, y, linestyle=dash, lw=1.3, marker="o", ms=3, label=plain(name), **style)
        for loss in losses:
            found = [(d, v) for of, d, v in group.estimates(stage) if of == loss]
            if found:
                start = [(0.0, clean.accuracy)] if clean else []
                xs, ys = np.array(start + found).T
                mark = "dxv^"[losses.index(loss) % 4]
                name = f"{ESTIMATE}, {loss}{several}"
                axes.plot(scale * xs, 100 * ys, ":", marker=mark, ms=4, color="#444444", alpha=pale, label=plain(name))
        if clean:
            axes.plot([0], [100 * clean.accuracy], "o", ms=4, color="#222222", alpha=pale, clip_on=False)
    axes.set(
        xlim=(0, reach), ylim=(0, 100), xlabel=plain(f"budget δ{unit}, {group.norm}"), ylabel="accuracy in percent"
    )
    legend_below(figure, axes)
    return figure


def radius_histogram(records: Sequence[Record]) -> Figure | None:
    """How far images were moved, for several attacks with one budget; densities, because their bins differ.

    Args:
        records: Of one norm; those without a histogram are passed over.

    Returns:
        None if no record has a histogram.
    """
    kept = [r for r in records if (r.details.get("histogram") or {}).get("counts")]
    if not kept:
        return None
    figure, axes = new_axes()
    scale, unit = unit_of(kept[0].norm)
    for r in kept:
        edges = scale * np.array(r.details["histogram"]["edges"], dtype=float)
        counts = np.array(r.details["histogram"]["counts"], dtype=float)
        colour = COLOURS.get(r.attack, "#5b4b9a")
        density = np.where(counts > 0, counts / np.maximum(np.diff(edges), 1e-12), np.nan)
        name = plain(f"{r.attack} ({order_name(r.p)}, {r.loss})")
        axes.stairs(density, edges, fill=True, color=colour, alpha=0.25, baseline=1e-3)
        axes.stairs(density, edges, color=colour, lw=1.2, label=name, baseline=1e-3)
        critical = r.details.get("critical_distance")
        if critical:
            axes.axvline(scale * critical, color=colour, ls="--", lw=1, label=f"d* = {budget_name(critical, r.norm)}")
    axes.axvline(scale * kept[0].delta, color="#222222", ls=":", lw=1, label=f"δ = {_delta(kept[0])}")
    far = scale * max(r.details["histogram"]["edges"][-1] for r in kept)
    reach = 4 * scale * max(kept[0].delta, *(float(r.details.get("critical_distance") or 0) for r in kept), 1e-9)
    if far > reach:
        axes.text(
            0.99, 0.98, f"some further, up to {far:.3g} →", ha="right", va="top", transform=axes.transAxes, size=8
        )
    axes.set(yscale="log", ylim=(0.5 * _smallest(kept, scale), None), xlim=(0, min(far, reach)))
    axes.set(
        xlabel=plain(f"distance moved{unit}, {kept[0].norm}"),
        ylabel=f"images per {'1/255' if scale == 255 else 'unit'}",
    )
    legend_below(figure, axes)
    return figure


def accuracy_against_effort(records: Sequence[Record]) -> Figure | None:
    """What is left after each stage of the knapsack's search, against its cost; None if no record says."""
    kept = [r for r in records if r.details.get("effort")]
    if not kept:
        return None
    figure, axes = new_axes()
    for number, r in enumerate(kept):
        passes, accuracy = np.array(r.details["effort"], dtype=float).T
        pale = 0.45 if r.stage == "before" else 1.0
        name = f"{order_name(r.p)}, δ = {_delta(r)}{f', {r.stage}' if r.stage != 'evaluate' else ''}"
        dash, mark = DASHES[number % len(DASHES)], "osd^v"[number % 5]
        style: dict[str, Any] = {"color": COLOURS["knapsack"], "alpha": pale, "linestyle": dash, "marker": mark}
        axes.plot(passes, 100 * accuracy, ms=4, label=plain(name), **style)
    axes.set(xlim=(0, None), ylim=(0, 100), xlabel="gradient passes an image", ylabel="accuracy in percent")
    legend_below(figure, axes)
    return figure


def new_axes() -> tuple[Figure, Axes]:
    """A figure with one pair of axes in the house style."""
    with matplotlib.rc_context(FONT):
        figure = Figure(figsize=SIZE, layout="constrained")
        axes = figure.add_subplot()
    axes.grid(alpha=0.25, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def legend_below(figure: Figure, axes: Axes) -> None:
    """Below the axes, with room of its own."""
    names = axes.get_legend_handles_labels()[1]
    if not names:
        return
    columns = 2 if max(map(len, names)) <= 36 else 1
    figure.set_size_inches(SIZE[0], SIZE[1] + 0.18 * math.ceil(len(names) / columns))
    figure.legend(
        loc="outside lower center", ncols=columns, frameon=False, fontsize=8, handlelength=3.5, columnspacing=1.2
    )


def _knapsack(axes: Axes, points: Sequence[Record], scale: float, p: float, style: dict[str, Any]) -> None:
    """The whole curve, linear in δ^p between its points (constant at p = inf), and measured points with intervals."""
    budgets, accuracy = np.array([r.details["curve"] for r in points if r.details.get("curve")][-1], dtype=float).T
    name = plain(style.pop("label"))
    if math.isinf(p):
        axes.step(scale * budgets, 100 * accuracy, where="post", lw=2, label=name, **style)
    else:
        share = np.linspace(0, 1, 9)[:-1]
        largest = budgets[-1] or 1.0
        powers = (budgets / largest) ** p
        x = np.append((powers[:-1, None] + share * np.diff(powers)[:, None]).ravel(), powers[-1])
        y = np.append((accuracy[:-1, None] + share * np.diff(accuracy)[:, None]).ravel(), accuracy[-1])
        axes.plot(scale * largest * x ** (1 / p), 100 * y, lw=2, label=name, **style)
    heights = np.array([[r.accuracy, r.accuracy_low, r.accuracy_high] for r in points]).T * 100
    off = np.maximum([heights[0] - heights[1], heights[2] - heights[0]], 0)
    axes.errorbar([scale * r.delta for r in points], heights[0], off, fmt="s", ms=4, capsize=2.5, lw=1.2, **style)


def _band(axes: Axes, records: Sequence[Record], scale: float, style: dict[str, Any]) -> None:
    low, high = [100 * r.accuracy_low for r in records], [100 * r.accuracy_high for r in records]
    axes.fill_between([scale * r.delta for r in records], low, high, color=style["color"], alpha=0.08, linewidth=0)


def _smallest(records: Sequence[Record], scale: float) -> float:
    """The smallest height that one image gives."""
    widths = [scale * (r.details["histogram"]["edges"][1] - r.details["histogram"]["edges"][0]) for r in records]
    return float(1 / max(*widths, 1e-12))


def unit_of(norm: str) -> tuple[float, str]:
    """What a length is multiplied with on an axis, and how the axis says so."""
    return (255.0, " in units of 1/255") if norm == "linf" else (1.0, " in pixel units")


def _delta(record: Record) -> str:
    return budget_name(record.delta, record.norm)


def plain(text: str) -> str:
    """Text that matplotlib draws as it is: no mathematics between dollars, no label hidden by an underscore."""
    return (" " if text.startswith("_") else "") + _short(text).replace("$", r"\$")


def _short(text: str) -> str:
    """A name on one line, cut where it would take the room of the axes."""
    line = printable(text).replace("\n", " ")
    return line if len(line) <= LONGEST else line[: LONGEST - 1] + "…"


def _attribute(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace('"', "&quot;")


def accuracy_against_budget(records: Sequence[Record], path: Path) -> None:
    """Accuracy against δ under each attack, before and after training, with 95 % intervals as bands.

    Args:
        records: Those of a run; stages `before` and `after` on the test set are drawn. Of evaluations alone, the first
            network, norm and order, as `accuracy_curves` draws them.
        path: The PNG to write.
    """
    chosen = [r for r in records if r.stage in INK and r.split == "test"]
    if not chosen and (evaluations := groups([r for r in records if r.stage == "evaluate"])):
        save(accuracy_curves(evaluations[0]), path)
        return
    attacks = sorted({r.attack for r in chosen} - {"none"})
    styles = dict(zip(attacks, ["-", "--", ":", "-."] * len(attacks), strict=False))
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for stage, colour in INK.items():
        clean = [r for r in chosen if r.stage == stage and r.attack == "none"][-1:]
        for attack in attacks:
            latest = {r.delta: r for r in chosen if r.stage == stage and r.attack == attack}
            if not latest:
                continue
            points = clean + [latest[delta] for delta in sorted(latest)]
            x, y = [255 * r.delta for r in points], [100 * r.accuracy for r in points]
            name = plain(f"{stage}: {attack} ({order_name(points[-1].p)})")
            axes.plot(x, y, styles[attack], color=colour, marker="o", markersize=3.5, label=name)
            low, high = [100 * r.accuracy_low for r in points], [100 * r.accuracy_high for r in points]
            axes.fill_between(x, low, high, color=colour, alpha=0.10, linewidth=0)
    about = chosen[-1] if chosen else None
    axes.set_xlabel(plain(f"budget δ in units of 1/255{f' ({about.norm})' if about else ''}"))
    axes.set_ylabel("accuracy in percent")
    axes.set_xlim(left=0)
    axes.set_ylim(0, 100)
    axes.grid(alpha=0.25, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    if about:
        title = f"{_short(about.network)} on {_short(about.data)}, {about.n} test images"
        axes.set_title(title, loc="left", fontsize=10, parse_math=False)
        if axes.get_lines():
            axes.legend(frameon=False, fontsize=8)
    save(figure, path)
