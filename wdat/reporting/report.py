"""One self-contained HTML page from records: the answer, how it came about, and how to repeat it."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from markupsafe import Markup, escape
from matplotlib.figure import Figure

from wdat.errors import SettingError
from wdat.records import EXAMPLES, Record, budget_name
from wdat.reporting import plots, results
from wdat.reporting.compare import Comparison
from wdat.reporting.dot_plot import dot_plot
from wdat.reporting.frame import Section, having, order_name, sections, to_frame
from wdat.reporting.runs import Run, command_of
from wdat.reporting.tables import collected

PNG = b"\x89PNG\r\n\x1a\n"  # how such a file begins
LARGEST = 2**22  # bytes of a picture
TEMPLATES = Path(__file__).with_name("templates")

Part = dict[str, Any]  # a section of the page: `id`, `heading`, `template`, and what the template shows


def write_report(records: Sequence[Record], path: Path) -> None:
    """Write the page; the same records give the same bytes.

    Args:
        records: Of any number of evaluations, and of one run's training.
        path: The HTML file. Where its folder is that of a run, the page says with what command the run was made, and
            shows the pictures of its examples.

    Raises:
        SettingError: If no record is of stage `before`, `after` or `evaluate`.
    """
    text = render(records, command_of(path.parent), path.parent)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", errors="backslashreplace")  # file names may hold what is no text


def render(records: Sequence[Record], command: str | None = None, folder: Path | None = None) -> str:
    """The page as text; raises as `write_report`.

    Args:
        records: As there.
        command: What made them, where it is known.
        folder: Where the pictures of their examples are.
    """
    frame = to_frame(records)
    parts = _parts(frame, folder)
    if not parts:
        raise SettingError("a report needs records of stage before, after or evaluate; run an evaluation first")
    said = [(command, "")] if command is None else [("", command)]
    facts = {"command": [("unknown: no .hydra/overrides.yaml lies beside the records", "")] if not command else said}
    return _page(frame, parts, facts, f"{len(frame)} records; intervals are at 95 %.", records)


def render_collection(comparison: Comparison, runs: Sequence[Run], layout: str = "auto") -> str:
    """The page of many runs: the table, its figure, and how to repeat each; of one run also its own sections.

    Args:
        comparison: Of the runs.
        runs: With their records and commands.
        layout: Of the table.
    """
    records = [r for run in runs for r in run.records]
    grid = collected(comparison, layout)
    words = "Accuracies of the table: means with their intervals; a tick is a seed."
    plot = _plot(dot_plot(comparison), "f-", words)
    parts: list[Part] = [{"id": "table", "heading": "Comparison", "template": "comparison.html.j2", "grids": [grid],
                          "notes": grid.notes, "plots": [plot]}]  # fmt: skip
    if len(runs) == 1:
        parts += _parts(to_frame(records), runs[0].path.parent)
    named = [
        (f"{run.arm or run.folder}, seed {', '.join(map(str, run.seeds))}: {run.path}", run.command) for run in runs
    ]
    facts: dict[str, Any] = {"runs": named}
    if not any(run.command for run in runs):
        facts["command"] = [("unknown: no .hydra/overrides.yaml lies beside the records", "")]
    arms = f"{len(comparison.arms)} arms, " if len(comparison.arms) > 1 else ""
    about = f"{len(runs)} {'run' if len(runs) == 1 else 'runs'}, {arms}{len(records)} records."
    frame = pd.concat([to_frame(run.records) for run in runs])
    return _page(frame, parts, facts, about, records)


def _page(
    frame: pd.DataFrame, parts: Sequence[Part], facts: dict[str, Any], about: str, records: Sequence[Record]
) -> str:
    loader = jinja2.FileSystemLoader(TEMPLATES)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["rich"] = rich
    attacks = {
        f"{r.name}, {r.threat}; interval: {r.interval}": r.options
        for r in frame[frame["attack"] != "none"].itertuples()
    }
    end: list[Part] = [
        {"id": "reading", "heading": "How to read this", "template": "reading.html.j2"},
        {"id": "again", "heading": "How to repeat it", "template": "repeat.html.j2", "attacks": list(attacks.items()),
         "facts": {**facts, **_measured_on(frame, records)}},
    ]  # fmt: skip
    title = f"Robustness of {', '.join(frame['network'].unique())}"
    style = Markup((TEMPLATES / "style.css").read_text(encoding="utf-8"))  # the package's own file
    page = environment.get_template("page.html.j2")
    return page.render(title=title, about=about, style=style, parts=[*parts, *end]).strip() + "\n"


def _measured_on(frame: pd.DataFrame, records: Sequence[Record]) -> dict[str, list[tuple[str, str]]]:
    """Everything else that a repetition needs; values that differ between records are all listed."""
    values: dict[str, Iterable[str]] = {
        "network": frame["network"],
        "checkpoint": (checkpoint or "the registry's own, or none" for checkpoint in frame["checkpoint"]),
        "data": (f"{r.data}, {r.split}, {r.n:,} images" for r in frame.itertuples()),
        "seed": frame["seed"].astype(str),
        "device": frame["device"],
        "commit": (r.commit or "unknown" for r in records),
        "versions": (", ".join(f"{k} {v}" for k, v in sorted(r.versions.items())) for r in records),
    }
    return {name: [(text, "") for text in dict.fromkeys(found)] for name, found in values.items()}


def rich(text: str) -> Markup:
    """Plain text as HTML: subscripts, and intervals in small type."""
    html = re.sub(r"\b([AWR])_(δ|[\d.]+)", r"\1<sub>\2</sub>", str(escape(text)))
    return Markup(re.sub(r"(?<=[\d.–]) (\[[^\[\]]*\])", r" <small>\1</small>", html))  # escaped above


def _parts(frame: pd.DataFrame, folder: Path | None) -> list[Part]:
    """A part for each network, set of images, norm and order, then one for each training."""
    found = sections(frame)
    parts = [_result(section, _heading(section, found), f"g{i}", folder) for i, section in enumerate(found, 1)]
    epochs = list(frame[frame["stage"] == "epoch"].groupby(["network", "data", "split", "norm", "seed"], sort=False))
    for i, ((network, _, split, norm, seed), rows) in enumerate(epochs if found else [], 1):
        which = f": {network}, {norm}, seed {seed}" if len(epochs) > 1 else ""
        words = (
            f"Accuracy after each epoch on {rows['n'].iloc[0]:,} images ({split}), with 95 % intervals over images. "
        )
        plot = _plot(plots.accuracy_over_epochs(rows), f"t{i}-", words + "These images may have chosen the checkpoint.")
        parts.append({"id": f"t{i}", "heading": f"During training{which}", "template": "training.html.j2",
                      "plots": [plot]})  # fmt: skip
    return parts


def _heading(section: Section, found: Sequence[Section]) -> str:
    """Names a section by what tells it from the others, checkpoint and seed only where they are needed."""
    parts = [section.title, section.norm, order_name(section.p)]
    parts += [f"checkpoint {section.checkpoint or 'none'}"] if len({s.checkpoint for s in found}) > 1 else []
    parts += [f"seed {section.seed}"] if len({s.seed for s in found}) > 1 else []
    return ", ".join(parts)


def _result(section: Section, heading: str, name: str, folder: Path | None) -> Part:
    """The answer first: the table of budgets and the curve; then details, pictures and examples."""
    last = section.attacked[section.attacked["stage"] == (section.stages or [""])[-1]]
    curve, drawn = [], []
    if not section.attacked.empty:
        words = (
            "Accuracy against budget, with 95 % intervals. The knapsack's curve is whole; other attacks were run at "
        )
        curve.append(_plot(plots.accuracy_curves(section), f"{name}c-", words + "single budgets, shown side by side."))
    for i, delta in enumerate(section.deltas):
        chosen = last[(last["delta"] == delta) & (last["p"] == section.p)].sort_values("accuracy", ascending=False)
        chosen = chosen[chosen["attack"].isin(["wpgd", "knapsack"])].drop_duplicates("attack", keep="last")
        words = (
            f"How far images were moved, δ = {budget_name(delta, section.norm)}; d* is the largest distance that the "
        )
        words += "knapsack pays for. Heights are densities, on a logarithmic scale."
        drawn.append((plots.radius_histogram(chosen), f"{name}h{i}-", words))
    own = section.attacked[section.attacked["p"] == section.p]
    words = "What the knapsack leaves, against the effort of its search. If it still falls, search longer."
    drawn.append((plots.accuracy_against_effort(own), f"{name}e-", words))
    return {
        "id": name, "heading": heading, "template": "result.html.j2", "curve": curve,
        "answer": [g for g in (results.answer(section), results.clean(section)) if g],
        "notes": results.notes(section),
        "grids": [g for g in (results.attacks(section), results.knapsack(section)) if g],
        "plots": [_plot(figure, prefix, words) for figure, prefix, words in drawn if figure],
        "sheets": _sheets(last[last["p"] == section.p], folder),
    }  # fmt: skip


def _plot(figure: Figure, prefix: str, words: str) -> dict[str, Any]:
    """A figure as SVG, in which matplotlib has escaped all text, and its caption."""
    return {"svg": Markup(plots.to_svg(figure, prefix, words)), "words": words}


def _sheets(rows: pd.DataFrame, folder: Path | None) -> list[dict[str, Any]]:
    """Images moved furthest by the strongest gradient attack and by the knapsack, at the largest budget."""
    shown = rows[having(rows, EXAMPLES)].sort_values(["delta", "accuracy"], ascending=[False, True])
    sheets = []
    for _, r in shown.assign(knapsack=shown["attack"] == "knapsack").drop_duplicates("knapsack").iterrows():
        cards = []
        for example in r["details"][EXAMPLES]:
            source = picture(example, folder)
            if source:
                encoded = base64.b64encode(source).decode()
                words = f"{classes(example)}, moved {budget_name(example.get('radius'), r['norm'], r['delta'])}"
                cards.append({"source": f"data:image/png;base64,{encoded}", "words": words})
        name = "the knapsack" if r["attack"] == "knapsack" else r["name"]
        heading = f"Images that {name} moved furthest, {r['threat']}, δ = {r['budget']}"
        sheets += [{"heading": heading, "examples": cards}] if cards else []
    return sheets


def classes(example: dict[str, Any]) -> str:
    """Label and class predicted for the adversarial image, by their names where they are known."""
    names = example.get("names") or [example.get("label"), None, example.get("prediction")]
    return f"{names[0]} → {names[-1]}"


def picture(example: dict[str, Any], folder: Path | None) -> bytes | None:
    """The PNG of an example: in memory, or a file in the folder `examples` of its run; None for anything else."""
    found = example.get("picture")
    if isinstance(found, str) and folder is not None:
        file = folder / EXAMPLES / Path(found).name
        if (
            found != f"{EXAMPLES}/{file.name}"
            or file.is_symlink()
            or not file.is_file()
            or file.stat().st_size > LARGEST
        ):
            return None
        found = file.read_bytes()
    return found if isinstance(found, bytes) and found.startswith(PNG) else None
