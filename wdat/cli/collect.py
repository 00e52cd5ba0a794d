"""Gathers the records of many runs into one table: accuracies over seeds with intervals, arms against a baseline.

    python -m wdat.cli.collect DIR... [KEY=VALUE...] [--baseline ARM] [--format FORMAT] [--output DIR]
    python -m wdat.cli.collect --leaderboard DIR... [--output DIR]

Every JSON file of records below the folders is read. Rows of one arm are runs that differ in their seed alone;
`wdat.reporting.runs` says how arms get their labels.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from wdat.cli.console import readable_errors
from wdat.errors import SettingError
from wdat.records import Record
from wdat.reporting import leaderboard, plots
from wdat.reporting.compare import Comparison, compare
from wdat.reporting.dot_plot import dot_plot
from wdat.reporting.frame import STAGES
from wdat.reporting.report import render_collection
from wdat.reporting.runs import LABELS, Run, find
from wdat.reporting.tables import WRITERS, collected, markdown
from wdat.terminal import PlainConsole

FILES = {"markdown": "table.md", "csv": "table.csv", "latex": "table.tex"}
LAYOUTS = ("auto", "long", "wide")


def table(records: Sequence[Record], stages: Sequence[str] = STAGES) -> str:
    """Markdown of one arm: a row a network, data set, attack, loss and budget; accuracy in percent over seeds.

    Args:
        records: Of any number of runs; the latest of equal ones counts.
        stages: Which stages become columns, where they occur.
    """
    return markdown(collected(compare([Run(Path(), tuple(records), None, None, "")], stages)))


def filters_of(arguments: Sequence[str]) -> tuple[list[Path], dict[str, list[str]]]:
    """Places and filters on a command line: what is no path and has `=` in it is a filter.

    Raises:
        SettingError: If there is no place, or a filter has no value.
    """
    paths: list[Path] = []
    filters: dict[str, list[str]] = {}
    for argument in arguments:
        key, sign, values = argument.partition("=")
        if Path(argument).exists() or not sign:
            paths.append(Path(argument))
        elif not key or not all(values.split(",")):
            raise SettingError(
                f"{argument} has no value: a filter is written like attack=knapsack or delta=2/255,8/255"
            )
        else:
            filters[key] = values.split(",")
    if not paths:
        raise SettingError("name the folder of a run or of a multirun, or a file of records, before the filters")
    return paths, filters


def write_all(comparison: Comparison, runs: Sequence[Run], folder: Path, layout: str = "auto") -> list[Path]:
    """Write the table in every format, its figure and the report.

    Args:
        comparison: Of the runs.
        runs: Named in the report's section on how to repeat them.
        folder: Made where it is missing; files of these names are replaced.
        layout: Of the table.

    Returns:
        The files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, file in FILES.items():
        text = WRITERS[name](comparison, layout)
        (folder / file).write_text(text, encoding="utf-8", errors="backslashreplace")
    plots.save(dot_plot(comparison), folder / "figure.png")
    page = render_collection(comparison, runs, layout)
    (folder / "report.html").write_text(page, encoding="utf-8", errors="backslashreplace")
    return [folder / file for file in (*FILES.values(), "figure.png", "report.html")]


def show_leaderboard(runs: Sequence[Run], filters: Mapping[str, Sequence[str]], folder: Path | None) -> None:
    """Print the leaderboard, or write it with its records and print the names of the files."""
    found = leaderboard.entries(runs)
    if folder is None:
        print(leaderboard.page(found, filters=filters), end="")
    else:
        print("\n".join(map(str, leaderboard.submission(found, folder))))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="wdat collect", description="Records of many runs in one table: accuracies over seeds, with intervals."
    )
    parser.add_argument(
        "paths", metavar="DIR | KEY=VALUE", nargs="+",
        help="folders of runs or multiruns, or files; then filters such as attack=knapsack,wpgd delta=2/255 seed=0,1 "
        "(filters by loss, p, norm, delta and options leave clean accuracy in)",
    )  # fmt: skip
    parser.add_argument(
        "--format", choices=(*WRITERS, "rich"), default="markdown", help="of what is printed (%(default)s)"
    )
    parser.add_argument("--baseline", metavar="NAME", help="arm (or network) to which differences are taken")
    parser.add_argument(
        "--label", choices=LABELS, default="auto",
        help="what names an arm: the settings in .hydra/overrides.yaml that differ, or the folder without its seed; "
        "auto takes the settings where they are known",
    )  # fmt: skip
    parser.add_argument(
        "--layout", choices=LAYOUTS, default="auto",
        help="long: a row a measurement and arm; wide: a row an arm, a column a measurement; auto: wide where it fits",
    )  # fmt: skip
    parser.add_argument(
        "--leaderboard",
        action="store_true",
        help="a row a network and budget: accuracy clean and at each order, between what is certified and attacked",
    )
    parser.add_argument(
        "--output", metavar="DIR", type=Path,
        help="write table.md, table.csv, table.tex, figure.png and report.html there and print their names; with "
        "--leaderboard, leaderboard.md and one file of records a network",
    )  # fmt: skip
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, then print the table or write the files."""
    chosen = _parser().parse_args(arguments)
    paths, filters = filters_of(chosen.paths)
    runs = find(paths, chosen.label)
    if chosen.leaderboard:
        show_leaderboard(runs, filters, chosen.output)
        return
    comparison = compare(runs, baseline=chosen.baseline, filters=filters)
    if chosen.output is not None:
        print("\n".join(map(str, write_all(comparison, runs, chosen.output, chosen.layout))))
    elif chosen.format == "rich":
        grid = collected(comparison, chosen.layout)
        console = PlainConsole(soft_wrap=False)
        console.print(grid)
        console.print("\n".join(grid.notes), soft_wrap=True)
    else:
        print(WRITERS[chosen.format](comparison, chosen.layout), end="")


if __name__ == "__main__":
    with readable_errors():
        main()
