"""A row for each run of a sweep: what was varied and what came of it.

    python -m sweeps.table multirun/upsilon/2025-01-31_12-00-00
    python -m sweeps.table outputs/upsilon

Accuracies are of validation images, at the epoch with the highest accuracy under the distributional attack. Test
images choose nothing, so they aren't shown; where nothing is chosen, `python -m wdat.cli.collect` has them.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from omegaconf import OmegaConf

from wdat.cli.console import readable_errors
from wdat.errors import SettingError
from wdat.records import Record, read
from wdat.reporting.frame import percent

FIGURES = ("clean", "pointwise", "distributional")


def table(folder: Path) -> str:
    """Markdown, one row a run in the order of the jobs.

    Args:
        folder: Of one sweep.

    Raises:
        SettingError: If there is no run below it.
    """
    files = sorted(folder.rglob(".hydra/overrides.yaml"), key=_in_order)
    if not files:
        raise SettingError(f"{folder} holds no runs; name the folder of a sweep")
    runs = [dict(str(o).split("=", 1) for o in OmegaConf.load(file)) for file in files]
    keys = dict.fromkeys(key for run in runs for key in run if key != "resume")
    varied = [key for key in keys if len({run.get(key) for run in runs}) > 1]
    lines = ["| " + " | ".join([*varied, "epoch", *FIGURES]) + " |", "|" + " --- |" * (len(varied) + 4)]
    for run, file in zip(runs, files, strict=True):
        records = file.parents[1] / "records.json"
        best = chosen(read(records)) if records.exists() else []
        figures = [str(best[0].epoch), *(percent(r.accuracy) for r in best)] if best else ["–"] * 4
        lines.append("| " + " | ".join([*(run.get(key, "") for key in varied), *figures]) + " |")
    return "\n".join(lines)


def _in_order(file: Path) -> list[tuple[int, str]]:
    """Sorts the folders of jobs by their numbers."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", str(file))]


def chosen(records: list[Record]) -> list[Record]:
    """Clean, pointwise and distributional record of the best validated epoch; none where none was validated."""
    epochs: dict[int | None, list[Record]] = {}
    for record in records:
        if record.stage == "epoch":
            epochs.setdefault(record.epoch, []).append(record)
    whole = [found for found in epochs.values() if len(found) == len(FIGURES)]
    return max(whole, key=lambda found: found[-1].accuracy, default=[])


if __name__ == "__main__":
    with readable_errors():
        if len(sys.argv) != 2:
            raise SettingError("name the folder of a sweep: python -m sweeps.table DIR")
        print(table(Path(sys.argv[1])))
