"""What a run loses when it is killed, its files are damaged, its disk is full, or a batch or a process fails.

    python -m benchmarks.faults [--kills 20] [--damages 5] [--disks 5] [--nans 5] [--deaths 5]

Every case is a short training of the quickstart's network in a folder of its own: a fault at a random moment, what the
user is told, `resume=` until it is done, and a comparison with the run that nothing happened to. *Lost* counts steps
that had been made and had to be made again, those since the last checkpoint. Long; not part of the tests.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.common import CONSOLE, add_common, spread, write
from benchmarks.faulted import Outcome, Run, children, end, kill
from wdat.records import source_commit


@dataclass
class Case:
    """One fault.

    Attributes:
        kind: What was done.
        moment: When, in words.
        status: Exit status of the run that it happened to; None where it was killed from outside.
        said: The last line that the user read.
        seconds_to_end: From the fault to the end of all processes.
        lost: Steps that had to be made again; None where the run had not begun to save.
        attempts: Runs until it was done, the first one included.
        equal: Whether final weights, records and logged metrics are those of the undisturbed run, to the bit, but for
            what tells the time.
        hung: Whether a run had to be ended by force.
        commit: Of the source.
    """

    kind: str
    moment: str
    status: int | None
    said: str
    seconds_to_end: float
    lost: int | None
    attempts: int
    equal: bool
    hung: bool = False
    commit: str | None = field(default_factory=source_commit)


class Campaign:
    """All cases, against one undisturbed run for each number of processes."""

    def __init__(self, place: Path, seed: int) -> None:
        self.place, self.random = place, random.Random(seed)
        self.cases: list[Case] = []
        self.plain: dict[int, tuple[float, Outcome]] = {}

    def undisturbed(self, devices: int = 1) -> tuple[float, Outcome]:
        """How long a run takes, and where it ends."""
        if devices not in self.plain:
            run = Run(self.place / f"undisturbed_{devices}", devices)
            started = time.perf_counter()
            said, hung = end(run.start())
            if hung or not run.last.exists():
                raise SystemExit(f"the undisturbed run on {devices} processes failed: {said}")
            self.plain[devices] = time.perf_counter() - started, run.outcome()
        return self.plain[devices]

    def close(self, run: Run, kind: str, moment: str, status: int | None, said: str, seconds: float, hung: bool,
              devices: int = 1) -> None:  # fmt: skip
        """Resume a run after its fault, compare, and note."""
        saved, done = run.saved(), run.done()
        attempts, late = (0, False) if hung else run.finish()
        apart = ["unfinished"] if hung or late else run.outcome().differences(self.undisturbed(devices)[1])
        lost = None if saved is None else max(done - saved, 0)
        self.cases.append(Case(kind, moment, status, said, seconds, lost, 1 + attempts, not apart, hung or late))
        verdict = f"[red]different: {', '.join(apart)}[/]" if apart else "equal"
        CONSOLE.print(f"[dim]{kind}, {moment}: lost {lost}, {verdict}: {said[:100]}", highlight=False)
        shutil.rmtree(run.folder, ignore_errors=True)

    def killed(self, number: int) -> None:
        """Killed at a random moment; every second run saves after every step."""
        moment = self.random.uniform(0.35, 1.0) * self.undisturbed()[0]
        often = ["callbacks.last_checkpoint.minutes=0"] if number % 2 else []
        while True:
            run = Run(self.place / f"kill_{number}", 1, *often)
            process = run.start()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=moment)
            if process.poll() is None:
                break
            moment *= 0.7  # it was done before: once more, and sooner
            shutil.rmtree(run.folder)
        kill(process)
        started = time.perf_counter()
        said, hung = end(process)
        every = "saving every step" if often else "saving every epoch"
        self.close(run, "kill -9", f"{moment:.1f} s, {every}", None, said, time.perf_counter() - started, hung)

    def damaged(self, number: int) -> None:
        """Stopped by SIGTERM in the third epoch, then its last checkpoint is damaged."""
        ways: dict[str, Callable[[Path], object]] = {
            "cut short": lambda path: path.write_bytes(path.read_bytes()[:-300]),
            "a byte flipped": _flip,
            "emptied": lambda path: path.write_bytes(b""),
            "an HTML page": lambda path: path.write_text("<html>quota</html>"),
            "gone": lambda path: path.unlink(),
        }
        name = list(ways)[number % len(ways)]
        run = Run(self.place / f"damage_{number}", 1)
        process = run.start()
        while run.done() < 21 and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        started = time.perf_counter()
        said, hung = end(process)
        seconds = time.perf_counter() - started
        ways[name](run.last)
        self.close(run, "damaged checkpoint", f"{name}, after SIGTERM", process.returncode, said, seconds, hung)

    def full(self, number: int) -> None:
        """On a disk that is full after some checkpoints; then it gets larger."""
        disk = self.place / f"disk_{number}"
        disk.mkdir()
        size = 900 + 350 * number  # KiB; a checkpoint has about 400
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(disk)]
        if subprocess.run(mount, capture_output=True).returncode:
            CONSOLE.print("[yellow]no small disk can be mounted here (it needs root): full disks were left out")
            return
        try:
            run = Run(disk / "run", 1)
            started = time.perf_counter()
            process = run.start()
            said, hung = end(process)
            seconds = time.perf_counter() - started
            subprocess.run(["mount", "-o", "remount,size=50m", str(disk)], check=True)
            self.close(run, "full disk", f"{size} KiB", process.returncode, said, seconds, hung)
        finally:
            subprocess.run(["umount", str(disk)], check=True)

    def poisoned(self, number: int) -> None:
        """One image of a batch is NaN."""
        step = self.random.randrange(1, 60)
        poison = f"+callbacks.poison={{_target_: benchmarks.poison.Poison, step: {step}}}"
        run = Run(self.place / f"nan_{number}", 1)
        process = run.start(poison)
        started = time.perf_counter()
        said, hung = end(process)
        overrides = run.folder / ".hydra" / "overrides.yaml"
        overrides.write_text("".join(line for line in overrides.open() if "poison" not in line))  # the cause is removed
        self.close(run, "NaN batch", f"step {step}", process.returncode, said, time.perf_counter() - started, hung)

    def bereaved(self, number: int) -> None:
        """Two processes; the second, or the first, is killed at a random moment."""
        length, _ = self.undisturbed(2)
        moment = self.random.uniform(0.3, 0.9) * length
        while True:
            run = Run(self.place / f"death_{number}", 2)
            process = run.start()
            time.sleep(moment)
            second = children(process.pid) if process.poll() is None else []
            if second:
                break
            kill(process)
            moment *= 0.8 if process.wait() == 0 else 1.2  # done before, or not two yet: once more
            shutil.rmtree(run.folder, ignore_errors=True)
        victim = process.pid if number % 2 else second[0]
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim, signal.SIGKILL)
        started = time.perf_counter()
        said, hung = end(process)
        who = "first" if victim == process.pid else "second"
        seconds = time.perf_counter() - started
        kill(process)
        self.close(run, f"{who} of two processes", f"{moment:.1f} s", process.returncode, said, seconds, hung, 2)


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(bytes(data))


def summary(cases: Sequence[Case]) -> list[dict[str, Any]]:
    """A row for each kind of fault."""
    rows = []
    for kind in dict.fromkeys(case.kind for case in cases):
        some = [case for case in cases if case.kind == kind]
        lost = [case.lost for case in some if case.lost is not None]
        rows.append(
            {
                "kind": kind,
                "cases": len(some),
                "equal": sum(case.equal for case in some),
                "hung": sum(case.hung for case in some),
                "nothing_saved_yet": sum(case.lost is None for case in some),
                "lost": spread(lost) if lost else None,
                "seconds_to_end": spread([case.seconds_to_end for case in some]),
            }
        )
    return rows


def main() -> None:
    """Run the campaign, print, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common(parser, "faults")
    # With 0 a fault keeps the cases that the record has.
    for name, count in (("kills", 20), ("damages", 5), ("disks", 5), ("nans", 5), ("deaths", 5)):
        parser.add_argument(f"--{name}", type=int, default=count)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        campaign = Campaign(Path(folder), options.seed)
        old = json.loads(options.output.read_text())["cases"] if options.output.exists() else []
        for count, fault, kinds in (
            (options.kills, campaign.killed, ("kill -9",)),
            (options.damages, campaign.damaged, ("damaged checkpoint",)),
            (options.disks, campaign.full, ("full disk",)),
            (options.nans, campaign.poisoned, ("NaN batch",)),
            (options.deaths, campaign.bereaved, ("first of two processes", "second of two processes")),
        ):
            if not count:
                campaign.cases += [Case(**case) for case in old if case["kind"] in kinds]
            for number in range(count):
                fault(number)
    rows = summary(campaign.cases)
    table = Table(
        "fault", "cases", "ends equal", "hung", "nothing saved yet", "steps lost: median (max)", "s to end: max"
    )
    for row in rows:
        lost = f"{row['lost']['median']:.0f} ({row['lost']['max']})" if row["lost"] else "–"
        figures = [str(row[key]) for key in ("cases", "equal", "hung", "nothing_saved_yet")]
        table.add_row(row["kind"], *figures, lost, f"{row['seconds_to_end']['max']:.1f}")
    CONSOLE.print(table)
    write("faults", options, "cpu", {"rows": rows, "cases": [asdict(case) for case in campaign.cases]})


if __name__ == "__main__":
    main()
