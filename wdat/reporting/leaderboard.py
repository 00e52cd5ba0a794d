"""A leaderboard from anyone's records: what is certified and what attacks leave, a row a network and budget."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

from wdat.errors import SettingError
from wdat.records import EXAMPLES, Record, budget_name, write
from wdat.reporting.compare import filtered
from wdat.reporting.frame import order_name, percent, to_frame
from wdat.reporting.runs import Run, find
from wdat.reporting.tables import Grid, literal, to_markdown
from wdat.terminal import printable

COMMAND = "command"  # in a record's details: how it was made
STAGES = ("evaluate", "after")
TITLE = "Accuracy in percent on test images, at best known ends: [certified, attacked], or ≤ attacked"


@dataclass(frozen=True)
class Entry:
    """All records of one network's weights on one set of images.

    Attributes:
        name: The network, with its checkpoint's name where it has one.
        records: Of test images, after training or of an evaluation.
        files: Where they were read from.
    """

    name: str
    records: tuple[Record, ...]
    files: tuple[Path, ...]

    @property
    def slug(self) -> str:
        """The name as that of a file."""
        return re.sub(r"[^\w.=-]+", "_", self.name, flags=re.ASCII).strip("_")

    @property
    def commands(self) -> list[str]:
        """How its records were made, where that is known."""
        return list(dict.fromkeys(str(r.details[COMMAND]) for r in self.records if r.details.get(COMMAND)))


def entries(runs: Iterable[Run]) -> list[Entry]:
    """The records of runs by network, weights and images; each says in its details how it was made.

    Raises:
        SettingError: If no record is of test images, after training or of an evaluation.
    """
    kept: dict[tuple[str, str, str, str, int], list[tuple[Record, Path]]] = {}
    for run in runs:
        for record in run.records:
            if record.split == "test" and record.stage in STAGES:
                known = {} if run.command is None else {COMMAND: run.command}
                own = {k: v for k, v in record.details.items() if k != EXAMPLES}
                whose = record.weights or record.checkpoint
                key = (record.network, whose, record.data, record.images or "", record.n)
                kept.setdefault(key, []).append((replace(record, details={**known, **own}), run.path))
    if not kept:
        raise SettingError("no record is of test images after training or in an evaluation: name folders of such runs")
    return [
        Entry(_name(pairs[0][0]), tuple(r for r, _ in pairs), tuple(dict.fromkeys(path for _, path in pairs)))
        for pairs in kept.values()
    ]


def _name(record: Record) -> str:
    stem = Path(record.checkpoint).stem
    return record.network if stem in ("", record.network) else f"{record.network}, {stem}"


def table(found: Sequence[Entry], filters: Mapping[str, Sequence[str]] | None = None) -> Grid:
    """A row an entry, norm and budget, the most accurate under the smallest order first.

    A column an order: the largest certified accuracy and the smallest under any attack of that order. AutoAttack has a
    column of its own and counts at order ∞ too. What all rows share is in the title.

    Args:
        found: The entries.
        filters: Values by column, as `wdat collect` takes them.
    """
    frames = [to_frame(entry.records).assign(entry=i) for i, entry in enumerate(found)]
    frame = pd.concat([f.drop(columns=["epoch", "details"]) for f in frames], ignore_index=True)
    frame = filtered(frame, filters or {})
    clean = frame[frame["attack"] == "none"].groupby("entry")["accuracy"].first()
    attacked = frame[frame["attack"] != "none"]
    orders = sorted(attacked["p"].unique(), reverse=True)
    lines = []
    for (i, norm, delta), rows in attacked.groupby(["entry", "norm", "delta"], sort=False):
        auto = rows[rows["attack"] == "autoattack"]["accuracy"].min()
        ends = {p: _ends(rows[rows["p"] == p]) for p in orders}
        line = {
            "network": found[i].name, "clean": percent(clean.get(i), 1), "AutoAttack": percent(auto, 1),
            **{_order(p): _bracket(*ends[p]) for p in orders},
            "norm, δ": f"{norm}, {budget_name(delta, norm)}", "images": f"{found[i].records[0].n:,}",
            "data": found[i].records[0].data,
        }  # fmt: skip
        worst = next((ends[p][1] for p in reversed(orders) if not math.isnan(ends[p][1])), 0.0)
        lines.append(((line["data"], norm, delta, -worst), line))
    cells = pd.DataFrame([line for _, line in sorted(lines, key=lambda pair: pair[0])])
    if not len(cells):
        raise SettingError("no record is of an attack or a certificate: there is nothing to rank")
    if (cells["AutoAttack"] == "–").all():
        cells = cells.drop(columns="AutoAttack")
    shared = {c: cells[c].iloc[0] for c in ("norm, δ", "images", "data") if cells[c].nunique() == 1}
    cells = cells.drop(columns=list(shared))
    names = {"images": "{} images", "data": "{}", "norm, δ": "{}"}
    title = "; ".join([TITLE, *(names[c].format(text) for c, text in shared.items())])
    return Grid(cells, title, numbers=tuple(c for c in cells.columns if c not in ("network", "norm, δ", "data")))


def _order(p: float) -> str:
    return "W∞" if math.isinf(p) else order_name(p)


def _ends(rows: pd.DataFrame) -> tuple[float, float]:
    """The largest lower bound and the smallest upper bound; NaN for none."""
    lower = rows["bound"] == "lower"
    return rows[lower]["accuracy"].max(), rows[~lower]["accuracy"].min()


def _bracket(low: float, high: float) -> str:
    if math.isnan(low):
        return "–" if math.isnan(high) else f"≤ {percent(high, 1)}"
    return f"≥ {percent(low, 1)}" if math.isnan(high) else f"[{percent(low, 1)}, {percent(high, 1)}]"


def page(found: Sequence[Entry], links: str = "", filters: Mapping[str, Sequence[str]] | None = None) -> str:
    """The table as Markdown, and below it how each row was made.

    Args:
        found: The entries.
        links: What stands before the name of an entry's file of records in a link to it.
        filters: As in `table`.
    """
    lines = []
    for entry in sorted(found, key=lambda e: e.name):
        commands = "\n".join(printable(line).replace("\n", " ").replace("```", "") for line in entry.commands)
        lines.append(f"[{literal(entry.name)}]({links}{entry.slug}.json)\n\n```text\n{commands or 'unknown'}\n```\n")
    return f"{to_markdown(table(found, filters))}\n**Records and commands**\n\n" + "\n".join(lines)


def submission(found: Sequence[Entry], folder: Path) -> list[Path]:
    """Write the records of each entry, without examples, and a page of all entries of the folder.

    Files of these names are replaced; those of other entries stay.

    Returns:
        The files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{entry.slug}.json" for entry in found]
    for entry, file in zip(found, files, strict=True):
        write(file, list({r.key: r for r in entry.records}.values()))
    target = folder / "leaderboard.md"
    target.write_text(page(entries(find([folder]))), encoding="utf-8", errors="backslashreplace")
    return [*files, target]
