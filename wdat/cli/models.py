"""The zoo on the command line: what there is, and how a trained network leaves.

wdat models [list] [NAME] [--dataset cifar10] [--threat Linf] [--format table|tsv|json]
wdat models export RUN_DIR [--out DIR] [--records DIR ...]
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from wdat.cli.console import readable_errors
from wdat.models import listing, zoo
from wdat.models.export import export
from wdat.terminal import PlainConsole

COMMANDS = ("list", "export")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="wdat models",
        description="RobustBench's networks, and the export of trained ones. Without a command: list.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    of_list = commands.add_parser("list", help="the networks of the zoo", description="The networks of the zoo.")
    of_list.add_argument("name", nargs="?", default="", metavar="NAME", help="a part of a name or alias")
    of_list.add_argument("--dataset", choices=zoo.CLASSES)
    of_list.add_argument("--threat", choices=zoo.THREAT_MODELS, help="what the networks were trained against")
    of_list.add_argument(
        "--format", choices=("table", *listing.TEXTS), help="table at a terminal, else tsv, with one line a network"
    )
    of_export = commands.add_parser(
        "export",
        help="weights and a model card of a run",
        description="Writes a state dict for RobustBench's own architecture, and a model card from the run's records.",
    )
    of_export.add_argument("run", metavar="RUN_DIR", type=Path, help="folder of a run of train.py")
    of_export.add_argument("--out", metavar="DIR", type=Path, help="where to write (RUN_DIR/export)")
    of_export.add_argument(
        "--records", metavar="DIR", type=Path, action="append", default=[],
        help="folder of a run of evaluate.py on the same checkpoint, for AutoAttack and the knapsack; may be repeated",
    )  # fmt: skip
    return parser


def show(arguments: argparse.Namespace) -> None:
    """Print the list."""
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
        console=PlainConsole(stderr=True), transient=True, disable=not sys.stderr.isatty(),
    )  # fmt: skip
    with bar:
        task = bar.add_task("reading the zoo", total=None)
        entries = listing.chosen(arguments.dataset, arguments.threat, arguments.name)
        bar.update(task, description="building outlines", total=len(entries))
        rows = []
        for entry in entries:
            rows.append(listing.row(entry))
            bar.advance(task)
    form = arguments.format or ("table" if sys.stdout.isatty() else "tsv")
    if form == "table":
        PlainConsole(soft_wrap=False).print(listing.table(rows))
    else:
        sys.stdout.write(listing.TEXTS[form](rows))


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and do it."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] not in (*COMMANDS, "-h", "--help"):
        words.insert(0, "list")
    chosen = _parser().parse_args(words)
    try:
        if chosen.command == "list":
            show(chosen)
        else:
            done = export(chosen.run, chosen.out, chosen.records)
            console = PlainConsole()
            for line in (*done.notes, f"weights {done.weights}", f"card    {done.card}"):
                console.print(line)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as `head`, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    with readable_errors():
        main()
