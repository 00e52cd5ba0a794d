"""Pictures made from records only: matplotlib figures without a display, and their SVG text."""

from __future__ import annotations

import io
import math
import os
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

BACKEND = None if "matplotlib" in sys.modules else os.environ.pop("MPLBACKEND", None)
import matplotlib  # noqa: E402  # a script that a notebook starts inherits the name of a backend that it may lack

if BACKEND is not None:
    os.environ["MPLBACKEND"] = BACKEND
    with suppress(ValueError):
        matplotlib.rcParams["backend"] = BACKEND

import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
from matplotlib import style  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.ticker import MaxNLocator  # noqa: E402
from numpy.typing import NDArray  # noqa: E402

from wdat.records import Record, budget_name, in_255ths  # noqa: E402
from wdat.reporting.frame import Section, having, loss_name, order_name, sections, title_of, to_frame  # noqa: E402
from wdat.terminal import printable  # noqa: E402

STYLE = Path(__file__).with_name("wdat.mplstyle")
COLOURS = {  # Okabe and Ito's, which colour-blind readers can tell apart
    "knapsack": "#d55e00", "certified": "#882255", "wpgd": "#0072b2", "wfgsm": "#56b4e9", "wpgd_budget": "#cc79a7",
    "pgd": "#009e73", "fgsm": "#7a7a7a", "autoattack": "#000000", "none": "#222222",
}  # fmt: skip
OTHER = "#5b4b9a"  # an attack of the user's own
NORMS = {"linf": "l∞", "l2": "l₂"}
MARKERS = "osD^v"
GUESS = "x"  # the marker of first-order estimates
SIZE = (4.6, 3.5)
LONGEST = 70  # characters of a label
ALIKE = 0.005  # accuracies that no picture can tell apart


@contextmanager
def house_style() -> Iterator[None]:
    """The one style of all pictures, wherever a figure is made or drawn."""
    with style.context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # names may be in any script
        yield


def new_axes(axes: Axes | None = None, size: tuple[float, float] = SIZE) -> tuple[Figure, Axes]:
    """A figure with one pair of axes in the house style, or the figure of the axes given."""
    if axes is not None:
        figure = axes.figure
        while not isinstance(figure, Figure):  # of a part of a figure
            figure = figure.figure
        return figure, axes
    with house_style():
        figure = Figure(figsize=size, layout="constrained")
        return figure, figure.add_subplot()


def save(figure: Figure, path: Path) -> None:
    """Write a figure in the format that its ending names; the same figure gives the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".svg":
        path.write_text(to_svg(figure) + "\n", encoding="utf-8")
        return
    with house_style():
        figure.savefig(path)


def to_svg(figure: Figure, prefix: str = "", title: str = "") -> str:
    """SVG text to stand inside a page: text stays text, no date, no addresses but the name spaces.

    Args:
        figure: What to write.
        prefix: Put before every identifier, so that several figures can share a page.
        title: What a screen reader says.
    """
    out = io.StringIO()
    with house_style():
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    svg = out.getvalue()
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    if prefix:
        svg = re.sub(r'(\sid="|url\(#|href="#)', rf"\g<1>{prefix}", svg)
    for character, entity in {"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;"}.items():
        title = title.replace(character, entity)
    return svg.replace("<svg", f'<svg role="img" aria-label="{title}"' if title else "<svg", 1).strip()


def accuracy_against_budget(records: Sequence[Record], path: Path) -> None:
    """Write the picture of a run's or an evaluation's main result, the first network, norm and order of its test set.

    Args:
        records: Of any stage; those of stage `epoch` aren't drawn.
        path: The PNG to write; empty axes where nothing was measured.
    """
    found = sections(to_frame(records))
    best = [s for s in found if s.split == "test" and not s.attacked.empty] or found
    save(accuracy_curves(best[0]) if best else new_axes()[0], path)


class Points(NamedTuple):
    """Accuracies of one attack at the budgets it was run at."""

    label: str
    colour: str
    marker: str
    pale: bool
    rows: pd.DataFrame


@house_style()
def accuracy_curves(section: Section, axes: Axes | None = None) -> Figure:
    """Accuracy against δ: whole curves of the knapsack and of certified radii, points with intervals for the others.

    Args:
        section: Records of one network, set of images, norm and order. Before training is drawn paler.
        axes: Where to draw, with the legend inside; None makes a figure, with the legend below.
    """
    given = axes is not None
    figure, axes = new_axes(axes)
    scale, unit = unit_of(section.norm, section.deltas)
    reach = 1.2 * (max(section.deltas, default=0.0) or 1 / 255)
    points: list[Points] = []
    for stage in section.stages:
        pale, when = stage == "before", f", {stage}" if len(section.stages) > 1 else ""
        rows = section.attacked[section.attacked["stage"] == stage]
        curved = having(rows, "curve")
        ends: dict[str, NDArray[Any]] = {}
        grid = np.linspace(0, reach, 600)
        for (attack, p, bound), own in rows[curved].groupby(["attack", "p", "bound"], sort=False):
            label = f"{attack}, {order_name(p)}{', lower bound' if bound == 'lower' else ''}{when}"
            look: dict[str, Any] = {"color": _colour(attack), "alpha": 0.5 if pale else 1}
            accuracy = on_curve(own["details"].iloc[-1]["curve"], p, grid)
            ends |= {bound: accuracy} if p == section.p else {}
            axes.plot(scale * grid, 100 * accuracy, ls="--" if pale else "-", label=plain(label), lw=1.8, **look)
            _intervals(axes, own, scale, 0.0, fmt="s", ms=4, mfc="white" if pale else None, **look)
        if len(ends) == 2:
            words = f"between certified and knapsack{when}"
            band: dict[str, Any] = {"color": COLOURS["certified"], "alpha": 0.05 if pale else 0.12, "lw": 0}
            axes.fill_between(scale * grid, 100 * ends["lower"], 100 * ends["upper"], label=plain(words), **band)
        points += _points(section, stage, rows[~curved], when)
    for number, (label, colour, marker, pale, rows) in enumerate(drawn := _together(points)):
        offset = 0.007 * scale * reach * (number - (len(drawn) - 1) / 2) if not label.startswith("clean") else 0.0
        look = {"color": colour, "mfc": "white" if pale else colour, "alpha": 0.65 if pale else 1}
        _intervals(axes, rows, scale, offset, fmt=marker, label=plain(label), **look)
    axes.set(xlim=(-0.02 * scale * reach, scale * reach), ylim=(0, 100), ylabel="accuracy in percent")
    axes.set_xlabel(plain(f"budget δ{unit}, {NORMS.get(section.norm, section.norm)}"))
    if given:
        axes.set_title(_short(section.title), parse_math=False)
        axes.legend(fontsize="small")
    else:
        _finish(figure, axes, section.rows)
    return figure


def _points(section: Section, stage: str, rows: pd.DataFrame, when: str) -> list[Points]:
    """Clean images, attacks that were run at single budgets, and first-order estimates above zero."""
    clean = section.rows[(section.rows["stage"] == stage) & (section.rows["attack"] == "none")].head(1)
    pale = stage == "before"
    found = [Points(f"clean{when}", COLOURS["none"], "o", pale, clean)]
    losses = sorted(section.rows["loss"].unique())
    for (name, attack, loss, threat), own in rows.groupby(["name", "attack", "loss", "threat"], sort=False):
        strongest = own.sort_values("accuracy").drop_duplicates("delta").sort_values("delta")  # of several settings
        marker = MARKERS[losses.index(loss) % len(MARKERS)]
        found.append(Points(f"{name}, {threat}{when}", _colour(attack), marker, pale, strongest))
    guesses = pd.DataFrame(section.estimates(), columns=["stage", "loss", "delta", "accuracy"])
    for loss, own in guesses[(guesses["stage"] == stage) & (guesses["accuracy"] > 0)].groupby("loss"):
        label = f"first-order estimate, {loss_name(loss)}{when}"
        found.append(Points(label, "#555555", GUESS, pale, own.assign(accuracy_low=np.nan, accuracy_high=np.nan)))
    return [p for p in found if not p.rows.empty]


def _together(points: Sequence[Points]) -> list[Points]:
    """Attacks whose accuracies a picture can't tell apart become one, and its name says so."""
    kept: list[Points] = []
    for own in points:
        mine = own.rows.set_index("delta")["accuracy"].sort_index()
        for i, other in enumerate(kept) if own.marker != GUESS else ():
            theirs = other.rows.set_index("delta")["accuracy"].sort_index()
            if mine.index.equals(theirs.index) and (mine - theirs).abs().max() < ALIKE and other.pale == own.pale:
                kept[i] = other._replace(label=f"{other.label} ≈ {own.label}")
                break
        else:
            kept.append(own)
    return kept


def _intervals(axes: Axes, rows: pd.DataFrame, scale: float, offset: float, **look: Any) -> None:
    """Points with their 95 % intervals, a little beside their budget where several stand there."""
    y = 100 * rows["accuracy"].to_numpy()
    ends = 100 * rows[["accuracy_low", "accuracy_high"]].to_numpy(dtype=float).T
    off = np.maximum([y - ends[0], ends[1] - y], 0)
    axes.errorbar(scale * rows["delta"] + offset, y, None if np.isnan(off).any() else off, elinewidth=1, **look)


def on_curve(curve: Sequence[Sequence[float]], p: float, deltas: NDArray[Any]) -> NDArray[Any]:
    """Accuracies at budgets from a knapsack's curve: linear in δ^p between its points, a staircase at p = inf."""
    budgets, accuracy = np.array(curve, dtype=float).T
    if math.isinf(p):
        rows = np.searchsorted(budgets, deltas, side="right") - 1
        return np.asarray(accuracy[np.maximum(rows, 0)])
    largest = budgets[-1] or 1.0  # so that no power underflows
    return np.asarray(np.interp((deltas / largest) ** p, (budgets / largest) ** p, accuracy))


@house_style()
def radius_histogram(rows: pd.DataFrame) -> Figure | None:
    """How far images were moved, for several attacks with one budget; densities, because their bins differ.

    Args:
        rows: Of one norm, as `to_frame` makes them; those without a histogram are passed over.

    Returns:
        None if no row has a histogram.
    """
    kept = [r for r in rows.itertuples() if (r.details.get("histogram") or {}).get("counts")]
    if not kept:
        return None
    figure, axes = new_axes()
    delta, norm = float(kept[0].delta), kept[0].norm
    scale, unit = unit_of(norm, [delta])
    far, floor, reach = 0.0, 1.0, 4 * scale * max(delta, 1e-9)
    for r in kept:
        edges = scale * np.array(r.details["histogram"]["edges"], dtype=float)
        counts = np.array(r.details["histogram"]["counts"], dtype=float)
        width = max(edges[1] - edges[0], 1e-12)
        far, floor = max(far, edges[-1]), min(floor, 0.5 / width) if far else 0.5 / width
        density = np.where(counts > 0, counts / np.maximum(np.diff(edges), 1e-12), np.nan)
        look: dict[str, Any] = {"color": _colour(r.attack), "baseline": 1e-3}
        axes.stairs(density, edges, fill=True, alpha=0.25, **look)
        axes.stairs(density, edges, lw=1.2, label=plain(f"{r.name}, {r.threat}"), **look)
        critical = float(r.details.get("critical_distance") or 0)
        if critical:
            label = f"d* = {budget_name(critical, norm, delta)}"
            axes.axvline(scale * critical, color=_colour(r.attack), ls="--", lw=1, label=label)
            reach = max(reach, 4 * scale * critical)
    axes.axvline(scale * delta, color="#222222", ls=":", lw=1, label=f"δ = {budget_name(delta, norm)}")
    if far > reach:
        words = f"some further, up to {far:.3g} →"
        axes.text(0.99, 0.98, words, ha="right", va="top", transform=axes.transAxes, size=8)
    axes.set(yscale="log", ylim=(floor, None), xlim=(0, 1.03 * min(far, reach)))
    axes.set_xlabel(plain(f"distance moved{unit}, {NORMS.get(norm, norm)}"))
    axes.set_ylabel(f"images per {'1/255' if scale == 255 else 'unit of distance'}")
    _finish(figure, axes, rows)
    return figure


@house_style()
def accuracy_against_effort(rows: pd.DataFrame) -> Figure | None:
    """What is left after each stage of the knapsack's search, against its cost; None if no row says."""
    kept = [r for r in rows.itertuples() if r.details.get("effort")]
    if not kept:
        return None
    figure, axes = new_axes()
    for number, r in enumerate(kept):
        passes, accuracy = np.array(r.details["effort"], dtype=float).T
        label = f"{r.threat}, δ = {r.budget}{'' if r.stage == 'evaluate' else f', {r.stage}'}"
        look: dict[str, Any] = {"alpha": 0.5 if r.stage == "before" else 1, "ls": ("-", "--", "-.", ":")[number % 4]}
        marker = MARKERS[number % len(MARKERS)]
        axes.plot(passes, 100 * accuracy, color=COLOURS["knapsack"], marker=marker, label=plain(label), **look)
    top = 140 * max(max(a for _, a in r.details["effort"]) for r in kept)
    axes.set(
        xlim=(0, None),
        ylim=(0, min(100, top) or 1),
        xlabel="passes of the search per image",
        ylabel="accuracy in percent",
    )
    _finish(figure, axes, rows)
    return figure


@house_style()
def accuracy_over_epochs(frame: pd.DataFrame) -> Figure:
    """Accuracy after each epoch, clean and under each attack and budget, 95 % intervals over images as bands.

    Args:
        frame: Rows of stage `epoch` of one run, as `to_frame` makes them.
    """
    figure, axes = new_axes()
    deltas = sorted(d for d in frame["delta"].unique() if d)
    for (name, attack, threat, delta), own in frame.groupby(["name", "attack", "threat", "delta"], sort=False):
        points = own.sort_values("epoch").drop_duplicates("epoch", keep="last")
        x, colour = points["epoch"].astype(int), _colour(attack)
        label = name if attack == "none" else f"{name}, {threat}, δ = {points['budget'].iloc[0]}"
        axes.fill_between(x, 100 * points["accuracy_low"], 100 * points["accuracy_high"], color=colour, alpha=0.1, lw=0)
        dash = ("-", "--", "-.", ":")[deltas.index(delta) % 4] if delta else "-"
        axes.plot(x, 100 * points["accuracy"], ls=dash, color=colour, marker="o", ms=3.5, label=plain(label))
    axes.set(ylim=(0, 100), xlabel="epoch")
    axes.set_ylabel(plain(f"accuracy on {frame['split'].iloc[0]} in percent"))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _finish(figure, axes, frame)
    return figure


def _finish(figure: Figure, axes: Axes, rows: pd.DataFrame) -> None:
    """A title that says what was measured, and the legend."""
    axes.set_title(_short(title_of(rows)), parse_math=False)
    legend_below(figure, axes)


def legend_below(figure: Figure, axes: Axes) -> None:
    """Below the axes, with room of its own."""
    names = axes.get_legend_handles_labels()[1]
    if not names or len(figure.axes) > 1:
        return
    columns = 2 if max(map(len, names)) <= 38 else 1
    width, height = figure.get_size_inches()
    with house_style():
        figure.set_size_inches(width, height + 0.19 * math.ceil(len(names) / columns))
        figure.legend(loc="outside lower center", ncols=columns, handlelength=2.4, columnspacing=1.2)


def unit_of(norm: str, deltas: Sequence[float]) -> tuple[float, str]:
    """What lengths are multiplied with on an axis, as their budgets are written, and how the axis says so."""
    in_fractions = norm == "linf" and all(in_255ths(delta) for delta in deltas if delta)
    return (255.0, " in 1/255") if in_fractions else (1.0, " in pixel units")


def _colour(attack: str) -> str:
    return COLOURS.get(attack, OTHER)


def plain(text: str) -> str:
    """Text that matplotlib draws as it is: no mathematics between dollars, no label hidden by an underscore."""
    return (" " if text.startswith("_") else "") + _short(text).replace("$", r"\$")


def _short(text: str) -> str:
    """A name on one line, shortened where it would take the room of the axes."""
    line = printable(text).replace("\n", " ")
    return line if len(line) <= LONGEST else line[: LONGEST - 1] + "…"
