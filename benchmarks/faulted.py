"""One training of the quickstart's network in a folder of its own, small enough to be ended in many ways; how it ends.

Used by `benchmarks.faults`.
"""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from wdat.training.checkpointing import FOLDER, LAST, damage, previous, steps

ROOT = Path(__file__).parents[1]
EVALUATION = "evaluation.attack_options"
SMALL = [
    "experiment=quickstart", "trainer.accelerator=cpu", "trainer.check_val_every_n_epoch=1", "attack.steps=3",
    "evaluation.curve=[]", "pretrain.max_epochs=1", "data.batch_size=32", "trainer.max_epochs=6",
    "trainer.log_every_n_steps=1",
    f"{EVALUATION}.pgd.steps=3", f"{EVALUATION}.pgd.step_size=0.5", f"{EVALUATION}.wpgd.steps=3",
    f"{EVALUATION}.wpgd.step_size=0.5", "data.limit_train=320", "data.limit_val=40", "data.limit_test=40",
]  # fmt: skip
PATIENCE = 240.0  # seconds after which a run counts as hung


@dataclass
class Outcome:
    """What a run ends with."""

    weights: dict[str, torch.Tensor]
    records: list[dict[str, Any]]
    metrics: list[dict[str, str]]

    def differences(self, other: Outcome) -> list[str]:
        """Names of the parts that differ."""
        weights = self.weights.keys() == other.weights.keys() and all(
            torch.equal(value, other.weights[key]) for key, value in self.weights.items()
        )
        parts = {
            "weights": weights, "records": self.records == other.records, "metrics": self.metrics == other.metrics
        }  # fmt: skip
        return [name for name, agree in parts.items() if not agree]


class Run:
    """A training in its folder."""

    def __init__(self, folder: Path, devices: int = 1, *more: str) -> None:
        self.folder = folder
        self.arguments = [*SMALL, f"trainer.devices={devices}", f"hydra.run.dir={folder}", *more]

    def start(self, *more: str, resume: bool = False) -> subprocess.Popen[str]:
        """Start a process group of its own."""
        arguments = [f"resume={self.folder}", *more] if resume else [*self.arguments, *more]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        return subprocess.Popen(
            [sys.executable, str(ROOT / "train.py"), *arguments], cwd=self.folder.parent, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    @property
    def last(self) -> Path:
        """Its last checkpoint."""
        return self.folder / FOLDER / LAST

    def saved(self) -> int | None:
        """Steps in the newest whole checkpoint; None where there is none."""
        for path in (self.last, previous(self.last)):
            if path.exists() and damage(path) is None:
                return steps(path)
        return None

    def done(self) -> int:
        """Steps that the log knows of."""
        for file in (self.folder / "metrics").rglob("metrics.csv"):
            with file.open(newline="") as rows:
                return max((int(row["step"]) + 1 for row in csv.DictReader(rows) if row.get("train/loss")), default=0)
        return 0

    def outcome(self) -> Outcome:
        """Final weights, records and logged metrics, without what tells the time."""
        weights: dict[str, torch.Tensor] = torch.load(self.last, weights_only=True)["state_dict"]
        records = json.loads((self.folder / "records.json").read_text())
        for record in records:
            del record["seconds"]
        with next((self.folder / "metrics").rglob("metrics.csv")).open(newline="") as file:
            rows = [{k: v for k, v in row.items() if v and not k.startswith("cost/")} for row in csv.DictReader(file)]
        return Outcome(weights, records, [row for row in rows if set(row) - {"step", "epoch"}])

    def finish(self) -> tuple[int, bool]:
        """Resume, or start again where nothing was saved, until it is done: attempts, and whether one hung."""
        for attempt in range(1, 4):
            process = self.start(resume=self.saved() is not None)
            _, hung = end(process)
            if process.returncode == 0 or hung:
                return attempt, hung
        return 3, False


def end(process: subprocess.Popen[str], patience: float = PATIENCE) -> tuple[str, bool]:
    """Wait for a run; its last line, and whether it had to be ended by force."""
    try:
        out, _ = process.communicate(timeout=patience)
        hung = False
    except subprocess.TimeoutExpired:
        kill(process)
        out, _ = process.communicate()
        hung = True
    lines = [line.strip() for line in out.splitlines() if line.strip()]
    return re.sub(r"/\S*/", "…/", lines[-1] if lines else ""), hung


def kill(process: subprocess.Popen[str]) -> None:
    """Kill a run with all its processes."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def children(pid: int) -> list[int]:
    """Processes that a process has started."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
