"""Runs the case study (docs/case-study.md): fine-tune a network with one arm and seed, then evaluate it.

    python -m benchmarks.case_study --network resnet2b --arms as_found pgd_at critical_draw --seeds 0 1 2
    python -m benchmarks.case_study --network resnet2b --arms critical_draw --seeds 0 --list  # the commands alone
    python -m benchmarks.case_study --scratch --passes 45 --arms trades wdat_ce combined  # from scratch
    python -m benchmarks.case_study --network preact_resnet18 --arms as_found pgd_at critical_draw  # for a GPU

Every arm costs the same number of forward and backward passes of an image, unless `--epochs` says otherwise. Each row
is `train.py` and then `evaluate.py`, in a folder of its own; a network without public weights is trained
first. What is finished is left alone, and what was stopped goes on, so the same command may be given again.
`python -m benchmarks.case_table` makes the tables.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.case_arms import ARMS, FINE_TUNING, NETWORKS, SCRATCH_RATE, Arm, rate
from benchmarks.common import CONSOLE, SHARED
from wdat.cli.console import readable_errors
from wdat.errors import SettingError
from wdat.records import read

PASSES = 180  # whole epochs of arms of 4, 5 and 9 passes
EVALUATIONS = ("val", "test_jpeg", "test_original")


RUNNING = (
    "finetune.channels_last=true",
    "callbacks.checkpoint.save_top_k=0",  # the last epoch: the networks as found have seen the validation images
    "trainer.check_val_every_n_epoch=20",
    "data.val_size=2000",
    "data.limit_test=100",  # train.py's own test; evaluate.py measures on all
    "evaluation.curve=[]",
)


@dataclass(frozen=True)
class Study:
    """What the rows of one call share; paths are of folders and files that may not exist yet.

    Attributes:
        network: Its name in `NETWORKS`.
        out: Folder of all rows.
        data: npz of the images to train on.
        epochs: Of training.
        passes: Instead, what training costs in epochs of plain training, the same for every arm.
        scratch: Whether weights are drawn by the seed.
        more: Further settings of `train.py`.
        autoattack: Whether to run it on the unaltered test images.
        arms: Ways to train, by name.
    """

    network: str
    out: Path
    data: Path
    epochs: int = 20
    passes: int | None = None
    scratch: bool = False
    more: tuple[str, ...] = ()
    autoattack: bool = False
    arms: Mapping[str, Arm] = field(default_factory=lambda: ARMS)

    def place(self, arm: str, seed: int) -> Path:
        """Where a row is kept."""
        return self.out / self.network / arm / (f"seed{seed}" if self.arms[arm].settings else "")

    def weights(self) -> Path:
        """The weights that fine-tuning starts with."""
        found = NETWORKS[self.network].weights
        return SHARED / found if found else self.out / self.network / "first/train/checkpoints/last.ckpt"

    def first(self) -> list[str]:
        """The command that trains a network without public weights."""
        place = self.out / self.network / "first/train"
        return self._train(0, *NETWORKS[self.network].first, f"hydra.run.dir={place}")

    def epochs_of(self, arm: str) -> int:
        """How long an arm is trained.

        Raises:
            SettingError: If the passes aren't whole epochs of it.
        """
        if not self.passes:
            return self.epochs
        each = self.arms[arm].passes
        epochs, left = divmod(self.passes, each)
        if left:
            raise SettingError(
                f"--passes={self.passes} isn't a whole number of epochs of {arm}, which costs {each} passes an "
                f"epoch: take {max(epochs, 1) * each}, or {PASSES} for all arms"
            )
        return epochs

    def training(self, arm: str, seed: int) -> list[str]:
        """The command that trains a row."""
        start = [rate(SCRATCH_RATE)]
        if not self.scratch:
            start = [f"model.checkpoint={self.weights()}", rate(NETWORKS[self.network].rate)]
        return self._train(
            seed, f"trainer.max_epochs={self.epochs_of(arm)}", *FINE_TUNING, *start, *self.arms[arm].settings,
            f"hydra.run.dir={self.place(arm, seed) / 'train'}",
        )  # fmt: skip

    def _train(self, seed: int, *settings: str) -> list[str]:
        found = NETWORKS[self.network]
        common = [f"model={self.network}", "data=npz", f"data.path={self.data}", f"seed={seed}", *RUNNING]
        return ["train.py", *common, *found.settings, *map(found.at, settings), *self.more]

    def evaluations(self, arm: str, seed: int) -> dict[str, list[str]]:
        """The commands that evaluate a row, by the name of their folder."""
        found, place = NETWORKS[self.network], self.place(arm, seed)
        weights = place / "train/checkpoints/last.ckpt" if self.arms[arm].settings else self.weights()
        common = [
            "evaluate.py", f"model={self.network}", f"model.checkpoint={weights}", "data=npz",
            f"threat.delta={found.delta}/255", "save_distances=true",
        ]  # fmt: skip
        search = "attack_options.knapsack={steps: 30, starts: 1, targets: 2, fab: 0, fab_targets: 0, seed: 0}"
        many = [*common, f"data.path={self.data}", "losses=[redlr]", "attacks=[pgd,wpgd,knapsack]", search]
        attacks = "pgd,wpgd,knapsack" + (",autoattack" if self.autoattack else "")
        few = [f"data.path={SHARED / 'data/cifar10_subset.npz'}", "losses=[ce,redlr]", f"attacks=[{attacks}]"]
        commands = {
            "val": [*many, "data.val_size=2000", f"seed={seed}", "split=val"],
            "test_jpeg": many,
            "test_original": [*common, *few],
        }
        return {name: [*command, f"hydra.run.dir={place / name}"] for name, command in commands.items()}


def run(command: list[str], log: Path) -> None:
    """Run a command of the project, its output in a file.

    Raises:
        SettingError: If it fails.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with log.open("a") as stream:
        code = subprocess.run([sys.executable, *command], stdout=stream, stderr=subprocess.STDOUT).returncode
    if code:
        raise SettingError(f"{' '.join(command[:3])} … ended with status {code}; its output is in {log}")
    CONSOLE.print(f"  {command[0]} {time.monotonic() - started:.0f} s, {log}", markup=False, highlight=False)


def train(command: list[str], place: Path) -> None:
    """Train in a folder unless that is finished; what was stopped goes on."""
    if "wpgd" not in attacks_of(place, "after"):
        stopped = (place / "checkpoints/last.ckpt").exists()
        run(["train.py", f"resume={place}"] if stopped else command, place.with_suffix(".log"))


def evaluate(command: list[str], place: Path) -> None:
    """Evaluate in a folder what it has no record of yet."""
    attacks = next(c for c in command if c.startswith("attacks="))
    if not set(attacks[len("attacks=[") : -1].split(",")) <= attacks_of(place):
        stopped = (place / "records.json").exists()
        run(["evaluate.py", f"resume={place}", attacks] if stopped else command, place.with_suffix(".log"))


def attacks_of(place: Path, stage: str | None = None) -> set[str]:
    """The attacks whose records a run has, of one stage or of any."""
    records = place / "records.json"
    found = read(records) if records.exists() else []
    return {r.attack for r in found if stage in (None, r.stage)}


def commands(study: Study, arm: str, seed: int) -> list[list[str]]:
    """All commands of a row."""
    trained = [study.training(arm, seed)] if ARMS[arm].settings else []
    return [*trained, *study.evaluations(arm, seed).values()]


def main() -> None:
    """Read the command line and run the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=NETWORKS, default="resnet2b")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM", help=", ".join(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    length = parser.add_mutually_exclusive_group()
    help_passes = f"cost of every arm, in epochs of plain training; {PASSES} are 45 epochs of PGD-AT"
    length.add_argument("--passes", type=int, default=PASSES, metavar="N", help=help_passes)
    length.add_argument("--epochs", type=int, metavar="N", help="instead, so many of every arm, whatever they cost")
    parser.add_argument("--scratch", action="store_true", help="start at weights drawn by the seed")
    parser.add_argument("--data", type=Path, required=True, help="npz of the re-encoded images")
    parser.add_argument("--out", type=Path, default=Path("outputs/case_study"))
    parser.add_argument("--evaluate", nargs="*", choices=EVALUATIONS, default=EVALUATIONS, help="none to train only")
    parser.add_argument("--autoattack", action="store_true", help="on the unaltered test images")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="further settings of train.py")
    parser.add_argument("--list", action="store_true", help="print the command lines and stop")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    study = Study(
        args.network,
        args.out,
        args.data,
        args.epochs or 0,
        None if args.epochs else args.passes,
        args.scratch,
        tuple(args.set),
        args.autoattack,
    )
    for arm in args.arms:
        if ARMS[arm].settings:
            study.training(arm, 0)  # refused before any work
    rows = [(arm, seed) for arm in args.arms for seed in (args.seeds if ARMS[arm].settings else args.seeds[:1])]
    made_first = bool(NETWORKS[args.network].first) and not args.scratch
    if args.list:
        listed = [study.first()] if made_first else []
        for command in [*listed, *(c for arm, seed in rows for c in commands(study, arm, seed))]:
            print(" ".join(f"'{c}'" if "{" in c or "[" in c else c for c in command))
        return
    if made_first:
        CONSOLE.print(f"{args.network}, its first training", markup=False)
        train(study.first(), args.out / args.network / "first/train")
    for arm, seed in rows:
        CONSOLE.print(f"{args.network}, {arm}, seed {seed}", markup=False)
        place = study.place(arm, seed)
        if ARMS[arm].settings:
            train(study.training(arm, seed), place / "train")
        for name, command in study.evaluations(arm, seed).items():
            if name in args.evaluate:
                evaluate(command, place / name)


if __name__ == "__main__":
    with readable_errors():
        main()
