"""One self-contained HTML page from records: the result in words, tables and pictures, and how to repeat it."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from wdat.errors import SettingError
from wdat.records import Record
from wdat.reporting import figures
from wdat.reporting.compare import Comparison
from wdat.reporting.dots import dots
from wdat.reporting.epochs import training_runs
from wdat.reporting.formats import cells, notes
from wdat.reporting.page import page, picture, table
from wdat.reporting.repeat import READING, collection_facts, facts, how_to_repeat
from wdat.reporting.runs import Run, command_of
from wdat.reporting.sections import heading, section, training_section

Section = tuple[str, str, str]


def write_report(records: Sequence[Record], path: Path) -> None:
    """Write the page; the same records give the same bytes.

    Args:
        records: Of any number of evaluations, and of one run's training.
        path: The HTML file. Where its folder is that of a run, the page says with what command the run was made.

    Raises:
        SettingError: If no record is of stage `before`, `after` or `evaluate`.
    """
    text = render(records, command_of(path.parent))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", errors="backslashreplace")  # file names may hold what is no text


def render(records: Sequence[Record], command: str | None = None) -> str:
    """The page as text; raises as `write_report`.

    Args:
        records: As there.
        command: What made them, where it is known.
    """
    found, sections = _sections(records)
    networks = list(dict.fromkeys(g.network for g in found))
    about = f"{len(records)} records; intervals are at 95 %."
    sections += [READING, ("again", "How to repeat it", how_to_repeat(facts(records, command), records))]
    return page(f"Robustness of {', '.join(networks)}", about, sections)


def _sections(records: Sequence[Record]) -> tuple[list[figures.Group], list[Section]]:
    found = figures.groups(records)
    if not found:
        raise SettingError("a report needs records of stage before, after or evaluate; run an evaluation first")
    made = [(f"g{i}", heading(g, found), section(g, f"g{i}-")) for i, g in enumerate(found, 1)]
    runs = training_runs(records)
    for i, run in enumerate(runs, 1):
        which = f": {run[0].network}, {run[0].norm}, seed {run[0].seed}" if len(runs) > 1 else ""
        made.append((f"t{i}", escape(f"During training{which}"), training_section(run, f"t{i}-")))
    return found, made


def render_collection(comparison: Comparison, runs: Sequence[Run]) -> str:
    """The page of many runs: the table, its figure, and how to repeat each; of one run also its own sections.

    Args:
        comparison: Of the runs.
        runs: With their records and commands.
    """
    records = [r for run in runs for r in run.records]
    networks = list(dict.fromkeys(row.network for row in comparison.rows))
    said = "".join(f"<li>{escape(note)}</li>" for note in notes(comparison))
    words = "Accuracy of every row of the table: the mean over seeds, ± one standard deviation, each seed as a tick."
    sections = [
        ("table", "Table", f"{_collection_tables(comparison)}<ul>{said}</ul>"),
        ("figure", "Figure", picture(dots(comparison, columns=1), "f-", words)),
    ]
    if len(runs) == 1:
        sections += _sections(records)[1]
    sections += [READING, ("again", "How to repeat it", how_to_repeat(collection_facts(runs), records))]
    arms = f"{len(comparison.arms)} arms, " if len(comparison.arms) > 1 else ""
    about = f"{len(runs)} {'run' if len(runs) == 1 else 'runs'}, {arms}{len(records)} records."
    return page(f"Robustness of {', '.join(networks)}", about, sections)


def _collection_tables(comparison: Comparison) -> str:
    """A table of all rows of one arm; of several a table an attack and budget, a row an arm."""
    head, rows = cells(comparison)
    rows_of: dict[tuple[object, ...], list[list[str]]] = {}
    several = len({(row.arm, row.network) for row in comparison.rows}) > 1
    for row, line in zip(comparison.rows, rows, strict=True):
        rows_of.setdefault(row.measurement if several else (), []).append(line)
    named = ["attack", "budget"] if several else []
    named += ["data", *(["network"] if len({row.network for row in comparison.rows}) == 1 else []), "n", "seeds"]
    return "\n".join(_without_repetition(head, lines, named) for lines in rows_of.values())


def _without_repetition(head: Sequence[str], rows: Sequence[Sequence[str]], named: Sequence[str]) -> str:
    """A table without columns that hold nothing, and without the named ones that are constant: its caption has them."""
    column = {title: [row[i] for row in rows] for i, title in enumerate(head)}
    shared = [title for title in named if len(set(column[title])) == 1]
    kept = [i for i, title in enumerate(head) if title not in shared and set(column[title]) != {"–"}]
    words = {"n": "n = ", "seeds": "seeds "}
    caption = [escape(words.get(title, "") + column[title][0]) for title in shared]
    caption = [f"<b>{caption[0]}</b>", *caption[1:]] if caption else ["All rows"]
    return table(
        ", ".join(caption), [escape(head[i]) for i in kept], [([escape(row[i]) for i in kept], "") for row in rows]
    )
