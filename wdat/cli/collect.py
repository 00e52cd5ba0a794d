"""Gathers the records of many runs into one table: mean ± standard deviation over seeds, arms against a baseline.

    python -m wdat.cli.collect DIR... [--baseline ARM] [--format markdown|csv|latex] [--output DIR]

Every JSON file of records below the folders is read. Rows of one arm are runs that differ in their seed alone;
`wdat.reporting.runs` says how arms get their labels.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from wdat.cli.console import readable_errors
from wdat.records import Record
from wdat.reporting import plots
from wdat.reporting.compare import STAGES, Comparison, compare
from wdat.reporting.dots import dots
from wdat.reporting.formats import FORMATS, WRITERS, markdown
from wdat.reporting.report import render_collection
from wdat.reporting.runs import LABELS, Run, find

FILES = {"markdown": "table.md", "csv": "table.csv", "latex": "table.tex"}


def table(records: Sequence[Record], stages: Sequence[str] = STAGES) -> str:
    """Markdown of one arm: a row a network, data set, attack, loss and budget; accuracy in percent over seeds.

    Args:
        records: Of any number of runs; the latest of equal ones counts.
        stages: Which stages become columns, where they occur.
    """
    return markdown(compare([Run(Path(), tuple(records), None, None, "")], stages))


def write_all(comparison: Comparison, runs: Sequence[Run], folder: Path) -> list[Path]:
    """Write the table in every format, its figure and the report.

    Args:
        comparison: Of the runs.
        runs: Named in the report's section on how to repeat them.
        folder: Made where it is missing; files of these names are replaced.

    Returns:
        The files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, file in FILES.items():
        (folder / file).write_text(WRITERS[name](comparison), encoding="utf-8", errors="backslashreplace")
    plots.save(dots(comparison), folder / "figure.png")
    page = render_collection(comparison, runs)
    (folder / "report.html").write_text(page, encoding="utf-8", errors="backslashreplace")
    return [folder / file for file in (*FILES.values(), "figure.png", "report.html")]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m wdat.cli.collect",
        description="Records of many runs in one table: mean ± standard deviation over seeds.",
    )
    parser.add_argument("places", metavar="DIR", type=Path, nargs="+", help="folders of runs or multiruns, or files")
    parser.add_argument("--format", choices=FORMATS, default="markdown", help="of what is printed (%(default)s)")
    parser.add_argument("--baseline", metavar="NAME", help="arm (or network) to which differences are taken")
    parser.add_argument(
        "--label", choices=LABELS, default="auto",
        help="what names an arm: the settings in .hydra/overrides.yaml that differ, or the folder without its seed; "
        "auto takes the settings where they are known",
    )  # fmt: skip
    parser.add_argument(
        "--output", metavar="DIR", type=Path,
        help="write table.md, table.csv, table.tex, figure.png and report.html there and print their names",
    )  # fmt: skip
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, then print the table or write the files."""
    chosen = _parser().parse_args(arguments)
    runs = find(chosen.places, chosen.label)
    comparison = compare(runs, baseline=chosen.baseline)
    if chosen.output is None:
        print(WRITERS[chosen.format](comparison), end="")
    else:
        print("\n".join(map(str, write_all(comparison, runs, chosen.output))))


if __name__ == "__main__":
    with readable_errors():
        main()
