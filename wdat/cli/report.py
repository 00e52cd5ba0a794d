"""Writes the report of runs anew: wdat report RUN_DIR..."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from wdat.cli.console import readable_errors
from wdat.reporting.frame import load_records
from wdat.reporting.report import write_report


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the report of each run folder that is named."""
    parser = argparse.ArgumentParser(prog="wdat report", description="Reports of runs as HTML.")
    parser.add_argument("runs", metavar="RUN_DIR", type=Path, nargs="+", help="folders that hold records.json")
    for folder in parser.parse_args(arguments).runs:
        write_report(load_records(folder / "records.json"), folder / "report.html")
        print(folder / "report.html")


if __name__ == "__main__":
    with readable_errors():
        main()
