"""Runs the frontier study (docs/case-study.md): methods over their strengths, at equal passes per image.

    python -m benchmarks.frontier --data FILE.npz --networks resnet2b cnn_a --seeds 0 1
    python -m benchmarks.frontier --data FILE.npz --arms pgd_at-2 pgd_at_gce-2 --list  # the commands alone
    python -m benchmarks.frontier_table outputs/frontier  # the tables, the record and the picture

Each arm is `train.py` and then `evaluate.py`, as `benchmarks.case_study` has them, in a folder of its own. What is
finished is left alone and what was stopped goes on, so the same command may be given again. An arm that fails doesn't
stop the others.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.case_arms import AWP, NETWORKS, Arm, at_attack, dual_ascent, pgd_at, trades, wdat
from benchmarks.case_study import Study, evaluate, train
from benchmarks.common import CONSOLE
from wdat.cli.console import readable_errors
from wdat.errors import SettingError

PASSES = 20  # of each training image, forward and backward: whole epochs for arms of 4 and of 5 passes
IMAGES = 12_000
VALIDATION = 2_000  # left out of training; the networks as found have seen them, so they measure nothing here
TESTED = 4_000
FASTER = ("evaluation.attacks=[wpgd]",)  # on the hundred test images of a training run


@dataclass(frozen=True)
class Method:
    """A way to train, and its arms.

    Attributes:
        says: What it is, for tables.
        arms: Settings of `train.py` by strength.
    """

    says: str
    arms: dict[str, tuple[str, ...]]


GCE = "objective.gce_q=0.5"
RADII, BUDGETS = ("1", "1.5", "2", "2.5"), ("0.7", "1", "1.4")
MIDDLE = RADII[1:3]
SOFT = ("attack=udr", "objective=attack_at", "attack.steps=3", "attack.step_size=0.833", "attack.tau=0.833")
PRICED = ("attack=wrm", "objective=attack_at", "attack.loss=ce", "attack.steps=3")


def mart(radius: str) -> tuple[str, ...]:
    """MART with the inner steps of PGD-AT."""
    return ("objective=mart", *pgd_at(radius)[1:])


def kl(order: str, radius: float = 0.1) -> tuple[str, ...]:
    """Worst-case weights of a batch's images."""
    return "reweighting=kl", f"reweighting.order={order}", f"reweighting.radius={radius:g}"


FAST, LIGHT = "optimizer.lr=2.5η", "weight_perturbation.gamma=0.002"

METHODS = {
    "pgd_at": Method("PGD-AT, CE", {r: pgd_at(f"{r}δ") for r in RADII}),
    "pgd_at_gce": Method("PGD-AT, GCE with q = 0.5", {r: (*pgd_at(f"{r}δ"), GCE) for r in RADII}),
    "draw": Method("drawn radii, CE", {r: (*at_attack("critical_draw"), f"threat.delta={r}δ") for r in BUDGETS}),
    "draw_gce": Method(
        "drawn radii, GCE with q = 0.5",
        {r: (*at_attack("critical_draw"), f"threat.delta={r}δ", GCE) for r in BUDGETS},
    ),
    "trades": Method("TRADES, β = 6", {r: trades(f"{r}δ") for r in RADII[:3]}),
    "trades_3": Method("TRADES, β = 3", {r: trades(f"{r}δ", 3) for r in RADII[1:]}),
    "wdat": Method(
        "W-DAT, CE radii, β = 6",
        {r: wdat("wpgd_budget", "attack.radius_max=4", f"threat.delta={r}δ") for r in ("1", "2", "3")},
    ),
    "mart": Method("MART, β = 5", {r: mart(f"{r}δ") for r in RADII[:3]}),
    "udr": Method("UDR", {r: (*SOFT, "attack.loss=ce", f"threat.delta={r}δ") for r in RADII[1:]}),
    "wrm": Method("WRM at a budget", {r: (*PRICED, f"threat.delta={r}δ") for r in ("1", "1.5", "2")}),
    "sr": Method("PGD-AT, weights by SR-WDRO", {r: (*pgd_at(f"{r}δ"), *kl("uniform_weights")) for r in MIDDLE}),
    "armor": Method("PGD-AT, weights by ARMOR", {r: (*pgd_at(f"{r}δ"), *kl("weights_uniform")) for r in MIDDLE}),
    "awp": Method("PGD-AT, AWP", {r: (*pgd_at(f"{r}δ"), AWP) for r in MIDDLE}),
    "awp_light": Method("PGD-AT, AWP with γ = 0.002", {r: (*pgd_at(f"{r}δ"), AWP, LIGHT) for r in MIDDLE}),
    "gce_awp": Method("PGD-AT, GCE, AWP", {r: (*pgd_at(f"{r}δ"), GCE, AWP) for r in MIDDLE}),
    "gce_sr": Method("PGD-AT, GCE, SR-WDRO", {r: (*pgd_at(f"{r}δ"), GCE, *kl("uniform_weights")) for r in RADII[1:]}),
    "gce_sr3": Method(
        "PGD-AT, GCE, SR-WDRO with r = 0.3",
        {r: (*pgd_at(f"{r}δ"), GCE, *kl("uniform_weights", 0.3)) for r in RADII[1:]},
    ),
    "gce8_sr": Method(
        "PGD-AT, GCE with q = 0.8, SR-WDRO",
        {r: (*pgd_at(f"{r}δ"), "objective.gce_q=0.8", *kl("uniform_weights")) for r in RADII[1:]},
    ),
    "dual": Method("dual ascent, β = 1", {r: dual_ascent(f"{r}δ") for r in BUDGETS}),
    "dual_light": Method("dual ascent, β = 0.25", {r: dual_ascent(f"{r}δ", 0.25) for r in BUDGETS}),
    "slow": Method("PGD-AT, CE, rate × 0.4", {r: (*pgd_at(f"{r}δ"), "optimizer.lr=0.4η") for r in RADII}),
    "slower": Method("PGD-AT, CE, rate × 0.15", {r: (*pgd_at(f"{r}δ"), "optimizer.lr=0.15η") for r in RADII}),
    "slow_gce": Method("PGD-AT, GCE, rate × 0.4", {r: (*pgd_at(f"{r}δ"), GCE, "optimizer.lr=0.4η") for r in RADII}),
    "fast": Method("PGD-AT, CE, rate × 2.5", {r: (*pgd_at(f"{r}δ"), FAST) for r in RADII[1:]}),
    "fast_gce": Method("PGD-AT, GCE, rate × 2.5", {r: (*pgd_at(f"{r}δ"), GCE, FAST) for r in RADII[1:]}),
    "gce_sr10": Method(
        "PGD-AT, GCE, SR-WDRO with r = 1",
        {r: (*pgd_at(f"{r}δ"), GCE, *kl("uniform_weights", 1)) for r in RADII[1:]},
    ),
    "short": Method("PGD-AT, CE, 1 inner step", {r: pgd_at(f"{r}δ", 1) for r in MIDDLE}),
    "short_gce": Method("PGD-AT, GCE, 1 inner step", {r: (*pgd_at(f"{r}δ", 1), GCE) for r in MIDDLE}),
}
"""By name; a strength is a radius in units of δ, of drawn radii the budget that they are drawn for."""

ARMS = {
    f"{name}-{strength}": Arm(f"{method.says}, {strength} δ", settings)
    for name, method in METHODS.items()
    for strength, settings in method.arms.items()
}

REFERENCE = ("pgd_at", "slow", "slower")
"""Methods that the others are compared with, at their own clean accuracy: PGD-AT at three rates, the best of them."""


def study_of(
    network: str, out: Path, data: Path, images: int = IMAGES, passes: int = PASSES, more: tuple[str, ...] = ()
) -> Study:
    """The rows of one network; `more` are further settings of `train.py`."""
    settings = (f"data.limit_train={images}", f"data.val_size={VALIDATION}", *FASTER, *more)
    return Study(network, out, data, passes=passes, more=settings, arms=ARMS)


def evaluation(study: Study, arm: str, seed: int, split: str = "test") -> list[str]:
    """The command that measures an arm: on test images, the same for all seeds, or on those that were left out.

    W_1 at 2 δ pays for larger distances than W_2 and W_4 do, so that its search serves them all.
    """
    delta, place = NETWORKS[study.network].delta, study.place(arm, seed)
    images = {"test": (f"data.limit_test={TESTED}", "seed=0"), "val": (f"data.val_size={VALIDATION}", f"seed={seed}")}
    return [
        "evaluate.py", f"model={study.network}", f"model.checkpoint={place / 'train/checkpoints/last.ckpt'}",
        "data=npz", f"data.path={study.data}", *images[split], f"split={split}",
        "attacks=[knapsack]", "attack_options.knapsack.effort=quick", "losses=[ce]", "save_distances=true",
        "threat.p=1", f"threat.delta={delta}/255", f"deltas=[{delta}/255,{2 * delta}/255]",
        f"hydra.run.dir={place / split}",
    ]  # fmt: skip


def row(study: Study, arm: str, seed: int, splits: Sequence[str]) -> None:
    """Train and measure an arm unless that is done; its cost is kept beside it."""
    place, started = study.place(arm, seed), time.monotonic()
    train(study.training(arm, seed), place / "train")
    about = {
        "network": study.network, "arm": arm, "says": ARMS[arm].says, "seed": seed, "settings": ARMS[arm].settings,
        "passes_an_epoch": ARMS[arm].passes, "epochs": study.epochs_of(arm),
        "seconds": time.monotonic() - started,
    }  # fmt: skip
    if not (place / "arm.json").exists():
        (place / "arm.json").write_text(json.dumps(about, indent=1) + "\n")
    for split in splits:
        evaluate(evaluation(study, arm, seed, split), place / split)


def main() -> None:
    """Read the command line and run the arms, seed by seed and network by network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=["resnet2b", "cnn_a"])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM", help=", ".join(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--images", type=int, default=IMAGES, help="to train on, drawn by class from the seed")
    parser.add_argument("--passes", type=int, default=PASSES, help="of each image, forward and backward")
    parser.add_argument("--splits", nargs="+", choices=["test", "val"], default=["test"], help="to measure on")
    parser.add_argument("--data", type=Path, required=True, help="npz of the re-encoded images")
    parser.add_argument("--out", type=Path, default=Path("outputs/frontier"))
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="further settings of train.py")
    parser.add_argument("--list", action="store_true", help="print the command lines and stop")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    failed: list[str] = []
    for seed in args.seeds:
        for network in args.networks:
            study = study_of(network, args.out, args.data, args.images, args.passes, tuple(args.set))
            for arm in args.arms:
                if args.list:
                    for command in (study.training(arm, seed), *(evaluation(study, arm, seed, s) for s in args.splits)):
                        print(" ".join(f"'{c}'" if "[" in c else c for c in command))
                    continue
                CONSOLE.print(f"{network}, {arm}, seed {seed}", markup=False)
                try:
                    row(study, arm, seed, args.splits)
                except SettingError as error:  # of this arm; it is tried again with the next call
                    failed.append(str(error))
    if failed:
        raise SettingError("; ".join(failed))


if __name__ == "__main__":
    with readable_errors():
        main()
