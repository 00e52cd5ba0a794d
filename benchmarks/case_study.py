"""Runs the case study (docs/case-study.md): fine-tune a network with one arm and seed, then evaluate it.

    python -m benchmarks.case_study --network resnet2b --arms as_found pgd_at critical_draw --seeds 0 1 2
    python -m benchmarks.case_study --network resnet2b --arms critical_draw --seeds 0 --list  # the commands alone
    python -m benchmarks.case_study --scratch --passes 45 --arms trades wdat_ce combined  # from scratch, equal cost

Each row is `train.py` and then `evaluate.py`, in a folder of its own. What is finished is left alone, and what was
stopped goes on, so the same command may be given again. `python -m benchmarks.case_table` makes the tables.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common import CONSOLE, SHARED
from wdat.console import readable_errors
from wdat.errors import SettingError
from wdat.records import read

DELTA = "2/255"
EVALUATIONS = ("val", "test_jpeg", "test_original")


@dataclass(frozen=True)
class Network:
    """A network as found.

    Attributes:
        weights: Its file, in `WDAT_SHARED`.
        rate: Peak learning rate of fine-tuning, chosen on validation images.
    """

    weights: str
    rate: float


NETWORKS = {"resnet2b": Network("models/resnet2b.pt", 0.02), "cnn_a": Network("models/cnn_a_adv.pt", 0.005)}
SCRATCH_RATE = 0.05


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        says: What it is, for tables.
        settings: Overrides of `train.py`; none for the network as found.
    """

    says: str
    settings: tuple[str, ...] = ()

    @property
    def passes(self) -> int:
        """What an epoch costs in epochs of plain training (each image once forward and once backward).

        One for every inner step, and one for every set of images in the objective: the images as they are, unless CE
        at perturbed images is all, and those of each inner attack.
        """
        steps = [int(s.split(".steps=")[1]) for s in self.settings if ".steps=" in s]
        return sum(steps) + len(steps) + all(not s.endswith(".loss=ce") for s in self.settings)


def _inner(attack: str, loss: str, steps: int = 3) -> tuple[str, ...]:
    """An attack's inner steps; 2.5 radii in all, as 10 steps of a quarter make."""
    return f"{attack}.loss={loss}", f"{attack}.steps={steps}", f"{attack}.step_size={2.5 / steps:.3f}"


def pgd_at(delta: str) -> tuple[str, ...]:
    """CE at PGD's images, every image with one radius."""
    return "objective=pgd_at", f"objective.pointwise_delta={delta}", *_inner("objective.pointwise_attack", "ce")


def trades(delta: str, beta: float = 6) -> tuple[str, ...]:
    """TRADES, every image with one radius."""
    inner = _inner("objective.pointwise_attack", "kl")
    return "objective=trades", f"objective.pointwise_delta={delta}", f"objective.beta_p={beta:g}", *inner


def at_attack(attack: str, *more: str) -> tuple[str, ...]:
    """CE at the images of a training attack, as PGD-AT has it."""
    return f"attack={attack}", "objective=attack_at", *_inner("attack", "ce"), *more


def wdat(attack: str, *more: str) -> tuple[str, ...]:
    """CE at the images as they are, and KL at those of a training attack."""
    return f"attack={attack}", *_inner("attack", "kl"), *more


def rate(value: float) -> str:
    """The peak learning rate."""
    return f"schedule.optimizer.lr={value:g}"


COMMON = (
    f"threat.delta={DELTA}",
    "averaging=ema",
    "averaging.decay=0.999",
    "channels_last=true",
    "data.crop=0",
    "schedule.optimizer.weight_decay=0",
    "schedule.shape.warmup=0.05",
    "callbacks.checkpoint.save_top_k=0",  # the last epoch: the networks as found have seen the validation images
    "trainer.check_val_every_n_epoch=20",
    "data.val_size=2000",
    "data.limit_test=100",  # train.py's own test; evaluate.py measures on all
    "curve=[]",
)

ARMS = {
    "as_found": Arm("as found"),
    "pgd_at": Arm("PGD-AT at δ (control)", pgd_at(DELTA)),
    "pgd_at_2": Arm("PGD-AT at 2 δ", pgd_at("4/255")),
    "trades": Arm("TRADES at δ", trades(DELTA)),
    "trades_2": Arm("TRADES at 2 δ", trades("4/255")),
    "wdat_ce": Arm("W-DAT, CE radii", wdat("wpgd_budget", "attack.radius_max=4")),
    "wdat_redlr": Arm("W-DAT, ReDLR radii", wdat("wpgd_budget", "attack.radius_max=4", "attack.radii_loss=redlr")),
    "combined": Arm(
        "combined", ("objective=combined", *wdat("wpgd_budget"), *_inner("objective.pointwise_attack", "kl"))
    ),
    "knapsack_budget": Arm("knapsack radii", at_attack("knapsack_budget")),
    "critical": Arm("critical radii d*", at_attack("critical")),
    "critical_draw": Arm("drawn radii d* U^(1/2)", at_attack("critical_draw")),
    "critical_trades": Arm("TRADES at d*", wdat("critical")),
    "wdat_2": Arm("W-DAT at 2 δ, CE radii", wdat("wpgd_budget", "attack.radius_max=4", "threat.delta=4/255")),
    "wdat_3": Arm("W-DAT at 3 δ, CE radii", wdat("wpgd_budget", "attack.radius_max=4", "threat.delta=6/255")),
    "wdat_beta": Arm("W-DAT, CE radii, β = 2", wdat("wpgd_budget", "attack.radius_max=4", "objective.beta_w=2")),
    "wdat_slow": Arm("W-DAT, CE radii, rate 0.005", wdat("wpgd_budget", "attack.radius_max=4", rate(0.005))),
    "budget_at_2": Arm(
        "CE at W-DAT's images, 2 δ", at_attack("wpgd_budget", "attack.radius_max=4", "threat.delta=4/255")
    ),
    "wdat_ema": Arm("W-DAT, CE radii, Υ by EMA", wdat("wpgd_budget", "attack.radius_max=4", "sensitivity=ema")),
    "wdat_exact": Arm(
        "W-DAT, CE radii, exact Υ every 75 steps",
        wdat("wpgd_budget", "attack.radius_max=4", "sensitivity=exact", "sensitivity.every=75"),
    ),
    "wdat_draw": Arm("W-DAT, drawn radii", wdat("critical_draw")),
    "draw_slow": Arm("drawn radii, rate 0.005", at_attack("critical_draw", rate(0.005))),
    "draw_crop": Arm("drawn radii, crops of 4 pixels", at_attack("critical_draw", "data.crop=4")),
    "draw_head": Arm("drawn radii, last layer", at_attack("critical_draw", "finetune=head")),
    "draw_reset": Arm("drawn radii, re-drawn last layer", at_attack("critical_draw", "finetune.init=reset_head")),
    "draw_perturb": Arm("drawn radii, perturbed weights", at_attack("critical_draw", "finetune.init=perturb")),
}
"""By name; `as_found` is not trained."""


def folder(out: Path, network: str, arm: str, seed: int) -> Path:
    """Where a row is kept."""
    return out / network / arm / (f"seed{seed}" if ARMS[arm].settings else "")


def training(
    network: str, arm: str, seed: int, data: Path, place: Path, epochs: int, more: list[str], scratch: bool = False
) -> list[str]:
    """The command that trains a row, from the weights as found or from weights drawn by the seed."""
    found = NETWORKS[network]
    start = [rate(SCRATCH_RATE)] if scratch else [f"model.checkpoint={SHARED / found.weights}", rate(found.rate)]
    return [
        "train.py", f"model={network}", "data=npz", f"data.path={data}", f"seed={seed}", f"trainer.max_epochs={epochs}",
        *COMMON, *start, *ARMS[arm].settings, *more, f"hydra.run.dir={place / 'train'}",
    ]  # fmt: skip


def evaluations(network: str, arm: str, seed: int, data: Path, place: Path, autoattack: bool) -> dict[str, list[str]]:
    """The commands that evaluate a row, by the name of their folder."""
    trained = bool(ARMS[arm].settings)
    weights = place / "train/checkpoints/last.ckpt" if trained else SHARED / NETWORKS[network].weights
    common = ["evaluate.py", f"model={network}", f"model.checkpoint={weights}", "data=npz", f"threat.delta={DELTA}"]
    search = "attack_options.knapsack={steps: 30, starts: 1, targets: 2, fab: 0, fab_targets: 0, seed: 0}"
    attacks = "pgd,wpgd,knapsack" + (",autoattack" if autoattack else "")
    return {
        "val": [
            *common, f"data.path={data}", "data.val_size=2000", f"seed={seed}", "split=val", "losses=[redlr]",
            "attacks=[pgd,wpgd,knapsack]", search, "save_distances=true", f"hydra.run.dir={place / 'val'}",
        ],
        "test_jpeg": [
            *common, f"data.path={data}", "losses=[redlr]", "attacks=[pgd,wpgd,knapsack]", search,
            "save_distances=true", f"hydra.run.dir={place / 'test_jpeg'}",
        ],
        "test_original": [
            *common, f"data.path={SHARED / 'data/cifar10_subset.npz'}", "losses=[ce,redlr]", f"attacks=[{attacks}]",
            "save_distances=true", f"hydra.run.dir={place / 'test_original'}",
        ],
    }  # fmt: skip


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


def row(args: argparse.Namespace, arm: str, seed: int) -> None:
    """Bring one row to its end."""
    place = folder(args.out, args.network, arm, seed)
    CONSOLE.print(f"{args.network}, {arm}, seed {seed}", markup=False)
    epochs = round(args.passes / ARMS[arm].passes) if args.passes and ARMS[arm].passes else args.epochs
    train = training(args.network, arm, seed, args.data, place, epochs, args.set, args.scratch)
    if args.list:
        print(*([" ".join(train)] if ARMS[arm].settings else []), sep="\n")
        for command in evaluations(args.network, arm, seed, args.data, place, args.autoattack).values():
            print(" ".join(f"'{c}'" if "{" in c or "[" in c else c for c in command))
        return
    if ARMS[arm].settings and not finished(place / "train", "after"):
        stopped = (place / "train/checkpoints/last.ckpt").exists()
        run(["train.py", f"resume={place / 'train'}"] if stopped else train, place / "train.log")
    for name, command in evaluations(args.network, arm, seed, args.data, place, args.autoattack).items():
        wanted = {"knapsack", *(["autoattack"] if args.autoattack and name == "test_original" else [])}
        if name in args.evaluate and not wanted <= attacks_of(place / name):
            resume = ["evaluate.py", f"resume={place / name}", *[c for c in command if c.startswith("attacks=")]]
            run(resume if (place / name / "records.json").exists() else command, place / f"{name}.log")


def finished(place: Path, stage: str) -> bool:
    """Whether a run has a knapsack of its last stage, or, in training, all that is measured after it."""
    records = place / "records.json"
    return records.exists() and any(r.stage == stage and r.attack == "wpgd" for r in read(records))


def attacks_of(place: Path) -> set[str]:
    """The attacks whose records an evaluation has at the largest budget."""
    records = place / "records.json"
    found = read(records) if records.exists() else []
    return {r.attack for r in found}


def main() -> None:
    """Read the command line and run the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=NETWORKS, default="resnet2b")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM", help=", ".join(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument(
        "--passes", type=int, metavar="N", help="instead of --epochs, those that cost N epochs of plain training"
    )
    parser.add_argument("--scratch", action="store_true", help="start at weights drawn by the seed")
    parser.add_argument("--data", type=Path, required=True, help="npz of the re-encoded images")
    parser.add_argument("--out", type=Path, default=Path("outputs/case_study"))
    parser.add_argument("--evaluate", nargs="*", choices=EVALUATIONS, default=EVALUATIONS, help="none to train only")
    parser.add_argument("--autoattack", action="store_true", help="on the unaltered test images")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="further settings of train.py")
    parser.add_argument("--list", action="store_true", help="print the command lines and stop")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for arm in args.arms:
        for seed in args.seeds if ARMS[arm].settings else args.seeds[:1]:
            row(args, arm, seed)


if __name__ == "__main__":
    with readable_errors():
        main()
