"""Writes the report of runs anew: wdat report RUN_DIR..."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from wdat.cli.console import readable_errors
from wdat.errors import SettingError
from wdat.records import read
from wdat.reporting.report import write_report


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the report of each run folder that is named."""
    parser = argparse.ArgumentParser(prog="wdat report", description="Reports of runs as HTML.")
    parser.add_argument("runs", metavar="RUN_DIR", type=Path, nargs="+", help="folders that hold records.json")
    for folder in parser.parse_args(arguments).runs:
        records = read(folder / "records.json")
        if not records:
            raise SettingError(f"{folder} holds no records.json; name the folder of a run")
        write_report(records, folder / "report.html")
        print(folder / "report.html")


if __name__ == "__main__":
    with readable_errors():
        main()
