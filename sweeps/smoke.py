"""Runs every sweep at its smallest, without a network: `make sweep-smoke`.

    python -m sweeps.smoke [NAME...] [--kind hydra|wandb] [--keep FOLDER]

The commands are those that the files state, on handwritten digits with two values on the long axes. A Hydra sweep runs
its whole grid. Of a W&B sweep the last point runs, its command line made as W&B's agent makes it and its run offline.
A line says what came of each sweep; the exit status is 1 if any failed.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from sweeps import grids, wandb_file
from wdat.records import read

ROOT = grids.FOLDER.parent
STAGES = {"before", "epoch", "after"}

EVALUATION = "evaluation.attack_options"
SMALL = {
    "data": "digits", "data.limit_train": "96", "data.limit_val": "24", "data.limit_test": "24",
    "data.batch_size": "32", "model": "small_cnn", "trainer.max_epochs": "1", "trainer.accelerator": "cpu",
    "trainer.devices": "1", "pretrain.max_epochs": "3", "evaluation.curve": "[]", "attack.steps": "2",
    f"{EVALUATION}.pgd.steps": "2", f"{EVALUATION}.wpgd.steps": "2",
}  # fmt: skip
FEWER = {  # instead of a file's own values
    "model": "small_cnn,cnn_a",  # the others are downloaded
    "seed": "0,1",
    "objective.beta_w": "1,6",
    "threat.delta": "2/255,8/255",
    "optimizer.lr": "0.001,0.01",
    "finetune.init": "reset_head,perturb",  # the other sweeps have `none`
}


class FailedError(Exception):
    """A sweep didn't do what it should; the message says what."""


def hydra_sweep(name: str, folder: Path) -> int:
    """Run a Hydra sweep; the number of its jobs.

    Raises:
        FailedError: If a job failed, or two shared a folder.
    """
    points = grids.points("hydra", name, FEWER)
    mine = {k: v for k, v in FEWER.items() if k in grids.axes("hydra", name)}
    overrides = {**SMALL, **mine, "hydra.sweep.dir": str(folder)}
    config = ["-cd", str((grids.FOLDER / "hydra").relative_to(ROOT)), "-cn", name]
    start([sys.executable, "train.py", *config, *(f"{k}={v}" for k, v in overrides.items())], folder)
    found = [finished(records) for records in folder.rglob("records.json")]
    if len(found) != len(points):
        raise FailedError(f"{len(points)} jobs left {len(found)} folders")
    return len(found)


def wandb_sweep(name: str, folder: Path) -> int:
    """Run the last point of a W&B sweep's grid; the number of runs, 1.

    Raises:
        FailedError: If it failed, or its metric isn't among what W&B was given.
    """
    sweep, run = grids.load("wandb", name), f"smoke-{name}"
    point = grids.points("wandb", name, FEWER)[-1]
    varied = {word.partition("=")[0] for word in point}
    instead = {k: v for k, v in SMALL.items() if k not in varied}
    instead["hydra.run.dir"] = f"{folder}/${{oc.env:WANDB_RUN_ID}}"
    line = [word for word in grids.expanded(sweep, point, sys.executable) if word.partition("=")[0] not in instead]
    environment = {"WANDB_MODE": "offline", "WANDB_RUN_ID": run, "WANDB_SILENT": "true"}
    start([*line, *(f"{k}={v}" for k, v in instead.items())], folder, environment)
    finished(folder / run / "records.json")
    logged(folder / run, str(sweep["metric"]["name"]))
    return 1


def logged(run: Path, metric: str) -> list[float]:
    """The values of a metric that a run's W&B was given; a name that is only defined has none.

    Raises:
        FailedError: If there is none, or one is no finite number.
    """
    files = list(run.glob("wandb/offline-run-*/*.wandb"))
    rows = [row for file in files for row in wandb_file.read(file).history]
    values = [float(row[metric]) for row in rows if metric in row]
    if len(files) != 1 or not values or not all(map(math.isfinite, values)):
        raise FailedError(f"W&B was given {values} as {metric} in {len(files)} runs")
    return values


def start(command: list[str], folder: Path, environment: Mapping[str, str] | None = None) -> None:
    """Run a command in the project's folder.

    Raises:
        FailedError: If it exits with another status than 0; its last words are in the message.
    """
    folder.mkdir(parents=True)
    env = {"OMP_NUM_THREADS": "1", **os.environ, **(environment or {})}
    done = subprocess.run(command, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    (folder / "output.txt").write_text(done.stdout, encoding="utf-8")
    if done.returncode:
        words = "\n".join(done.stdout.strip().splitlines()[-12:])
        raise FailedError(f"status {done.returncode}\n{words}")


def finished(records: Path) -> Path:
    """The file of a run's records.

    Raises:
        FailedError: If the run didn't come to its end.
    """
    stages = {record.stage for record in read(records)} if records.exists() else set()
    if stages != STAGES:
        raise FailedError(f"{records.parent.name} has the stages {sorted(stages)}, not {sorted(STAGES)}")
    return records


RUNNERS = {"hydra": hydra_sweep, "wandb": wandb_sweep}


def main(arguments: list[str] | None = None) -> int:
    """Run the sweeps that were asked for; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(grids.names())}; all by default")
    parser.add_argument("--kind", choices=grids.KINDS, help="both by default")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="an empty folder for what the runs write")
    options = parser.parse_args(arguments)
    if unknown := set(options.names) - set(grids.names()):
        parser.error(f"no sweep {', '.join(sorted(unknown))}; there are {', '.join(grids.names())}")
    began, failed = time.perf_counter(), 0
    with tempfile.TemporaryDirectory(prefix="sweeps-") as temporary:
        folder = (options.keep or Path(temporary)).resolve()
        for kind in [options.kind] if options.kind else grids.KINDS:
            for name in options.names or grids.names():
                started, outcome, jobs = time.perf_counter(), "ok", 0
                try:
                    jobs = RUNNERS[kind](name, folder / kind / name)
                except FailedError as error:
                    failed, outcome = failed + 1, f"FAILED: {error}"
                seconds = time.perf_counter() - started
                print(f"{kind:6} {name:20} {jobs:3} jobs {seconds:6.1f} s  {outcome}", flush=True)
    print(f"{time.perf_counter() - began:.0f} s, {f'{failed} failed' if failed else 'all ok'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
