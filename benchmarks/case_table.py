"""The tables and the picture of the case study, from the rows that `benchmarks.case_study` has finished.

    python -m benchmarks.case_table outputs/case_study       # writes results/case_study.json
    python -m benchmarks.case_table                          # prints its tables, writes docs/case-study-*.png
    python -m benchmarks.case_table outputs/scratch --control trades --record results/case_scratch.json

Accuracies in percent. Knapsack accuracies come from the nearest-flip distances of single images, the others from
`evaluate.py`'s records. Differences are paired: image by image in the bootstrap, which resamples images and keeps the
seeds; seed by seed in the t-interval.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.case_arms import ARMS, NETWORKS
from benchmarks.common import CONSOLE
from wdat.attacks.knapsack_allocation import solve
from wdat.cli.console import readable_errors
from wdat.errors import SettingError
from wdat.records import installed_versions, read, source_commit
from wdat.reporting.compare import over_seeds
from wdat.reporting.plots import house_style, legend_below, new_axes, save
from wdat.threat import ThreatModel

TESTS = {
    "val": "2,000 re-encoded validation images",
    "test_jpeg": "10,000 re-encoded test images",
    "test_original": "846 unaltered test images",
}
KNAPSACKS = {"w2": (2.0, 1), "w2_2": (2.0, 2), "w4": (4.0, 1), "w4_2": (4.0, 2)}
BASE, CONTROL, MAIN = "as_found", "pgd_at", "w2"
RESAMPLES = 400
BOTH_LOSSES = "test_original"  # there PGD ascends CE and ReDLR, and the lower accuracy counts
RECORD = Path("results/case_study.json")
PICTURES = Path("docs")
COLUMNS = {
    "clean": "clean", "pgd": "PGD ReDLR δ", "autoattack": "AutoAttack δ", "wpgd": "W-PGD ReDLR",
    "w2": "W_2 knapsack δ", "w2_2": "2 δ", "w4": "W_4 knapsack δ", "w4_2": "2 δ", "upsilon": "Υ, CE",
}  # fmt: skip


def measured(place: Path, delta: float) -> dict[str, float]:
    """What one evaluation of one network found, accuracies in [0, 1]; budgets other than δ are the knapsack's alone."""
    records = [r for r in read(place / "records.json") if r.attack == "none" or math.isclose(r.delta, delta)]
    found: dict[str, float] = {}
    for record in sorted(records, key=lambda r: r.loss == "redlr"):  # where both were run, ReDLR's
        name = {"none": "clean"}.get(record.attack, record.attack)
        if name in ("clean", "autoattack", "wpgd", "pgd"):
            found[name] = min(found.get(name, 1.0), record.accuracy) if name == "pgd" else record.accuracy
        if record.loss == "ce" and record.upsilon is not None:
            found["upsilon"] = record.upsilon
    distances = flips(place)
    return found | {key: knapsack(distances, p, m * delta) for key, (p, m) in KNAPSACKS.items()}


def flips(place: Path) -> Tensor:
    """Nearest-flip distances (N,) of one evaluation, in pixel units."""
    with np.load(place / "distances_linf.npz", allow_pickle=False) as file:
        return torch.from_numpy(file["distances"])


def knapsack(distances: Tensor, p: float, delta: float) -> float:
    """A_δ of l∞ distances."""
    return solve(distances, ThreatModel(p, "linf", delta)).accuracy


@cache
def resampled(place: Path, delta: float, seed: int = 0) -> NDArray[np.float64]:
    """The main figure of one network in resamples of the images, the same ones for every network: (RESAMPLES,).

    Args:
        place: Of its evaluation; all that are compared are of the same images in the same order.
        delta: δ in pixel units.
        seed: Of the resamples.
    """
    distances = flips(place)
    n, rng = len(distances), torch.Generator().manual_seed(seed)
    p, multiple = KNAPSACKS[MAIN]
    drawn = (distances[torch.randint(n, (n,), generator=rng)] for _ in range(RESAMPLES))
    return np.array([knapsack(d, p, multiple * delta) for d in drawn])


def difference(these: dict[int, Path], those: dict[int, Path], delta: float) -> dict[str, Any]:
    """Paired differences of the main figure, in percentage points; a network as found stands beside every seed."""
    pairs = {s: (these[s], those.get(s, those[min(those)])) for s in these}
    by_seed = {s: 100 * (measured(a, delta)[MAIN] - measured(b, delta)[MAIN]) for s, (a, b) in pairs.items()}
    values = pd.DataFrame({"seed": list(by_seed), "accuracy": list(by_seed.values())})
    over = over_seeds(values.assign(what=""), ["what"]).iloc[0]
    ends = {f"seeds_{end}": None if pd.isna(over[end]) else float(over[end]) for end in ("low", "high")}
    resamples = [resampled(a, delta) - resampled(b, delta) for a, b in pairs.values()]
    low, high = np.quantile(100 * np.mean(resamples, axis=0), [0.025, 0.975])
    return {
        "mean": float(over["mean"]), "by_seed": by_seed, **ends,
        "images_low": float(low), "images_high": float(high),
    }  # fmt: skip


def rows(out: Path, control: str = CONTROL) -> list[dict[str, Any]]:
    """One row a network, test set and arm that has been finished, compared with the network as found and the control.

    Raises:
        SettingError: If there is none.
    """
    found = []
    for network in NETWORKS:
        delta = NETWORKS[network].delta / 255
        for test in TESTS:
            places = {arm: finished(out / network / arm, test) for arm in ARMS}
            for arm, seeds in places.items():
                if not seeds:
                    continue
                each = {seed: measured(place, delta) for seed, place in seeds.items()}
                keys = [k for k in COLUMNS if all(k in m for m in each.values())]
                row: dict[str, Any] = {
                    "network": network, "delta": delta, "test": test, "n": len(flips(seeds[min(seeds)])), "arm": arm,
                    "says": ARMS[arm].says, "seeds": sorted(seeds),
                    "mean": {k: float(np.mean([m[k] for m in each.values()])) for k in keys},
                    "sd": {k: float(np.std([m[k] for m in each.values()], ddof=1)) for k in keys if len(each) > 1},
                }  # fmt: skip
                for name, other in (("base", BASE), ("control", control)):
                    if arm not in (BASE, other) and places[other]:
                        row[name] = difference(seeds, places[other], delta)
                found.append(row)
    if not found:
        raise SettingError(f"{out} has no finished row of the case study; run python -m benchmarks.case_study first")
    return found


def finished(place: Path, test: str) -> dict[int, Path]:
    """The evaluations of one arm that are complete, by seed."""
    candidates = {0: place / test} if not place.name or (place / test).is_dir() else {}
    candidates |= {int(p.name[4:]): p / test for p in sorted(place.glob("seed*"))}
    return {s: p for s, p in candidates.items() if (p / "distances_linf.npz").exists()}


def table(found: Sequence[dict[str, Any]], network: str, test: str, columns: Sequence[str] = tuple(COLUMNS)) -> str:
    """Markdown: accuracies in percent, mean over seeds (standard deviation), and differences of the main figure.

    On validation images, which the networks as found have seen, nothing is compared with these. Training from scratch
    has no network as found, and compares with whatever control it was given.
    """
    mine = [row for row in found if row["network"] == network and row["test"] == test]
    keys = [k for k in columns if any(k in row["mean"] for row in mine)]
    compared = {"base": "− as found", "control": "− control"}
    if test == "val" or all(row["arm"] != BASE for row in mine):
        del compared["base"]
    titles = COLUMNS | ({"pgd": "PGD δ, CE or ReDLR"} if test == BOTH_LOSSES else {})
    head = ["arm", "seeds", *(titles[k] for k in keys), *compared.values()]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for row in mine:
        cells = [row["says"], str(len(row["seeds"])) if row["arm"] != BASE else ""]
        cells += [_cell(row, key) for key in keys]
        cells += [_difference(row.get(name)) for name in compared]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(row: dict[str, Any], key: str) -> str:
    if key not in row["mean"]:
        return ""
    scale = 1 if key == "upsilon" else 100
    sd = f" ({scale * row['sd'][key]:.1f})" if key in row["sd"] else ""
    return f"{scale * row['mean'][key]:.1f}{sd}"


def _difference(found: dict[str, Any] | None) -> str:
    if found is None:
        return ""
    low, high = found["seeds_low"], found["seeds_high"]
    seeds = "" if low is None else f"; {low:+.1f}, {high:+.1f}"
    return f"{found['mean']:+.1f} [{found['images_low']:+.1f}, {found['images_high']:+.1f}{seeds}]"


@house_style()
def picture(found: Sequence[dict[str, Any]], network: str, place: Path) -> None:
    """Accuracy under the knapsack at W₂, less that of the first arm, for every arm of a network's table.

    At the budgets of the record, on the re-encoded test images: means over seeds with their standard deviation. Lines
    join what was measured.
    """
    figure, axes = new_axes()
    arms = [row for row in found if row["network"] == network and row["test"] == "test_jpeg"]
    delta = NETWORKS[network].delta
    budgets = {"clean": 0.0, "w2": delta, "w2_2": 2 * delta}
    for i, row in enumerate(arms):
        mean = [100 * (row["mean"][k] - arms[0]["mean"][k]) for k in budgets]
        sd = [100 * row["sd"].get(k, 0.0) for k in budgets]
        look: dict[str, Any] = {"ls": ("-", "--", "-.", ":")[i // 8 % 4], "marker": "osD^v"[i % 5], "lw": 1.2}
        axes.errorbar(list(budgets.values()), mean, sd, label=row["says"], **look)
    axes.set(xlim=(-0.05 * delta, 2.1 * delta), xlabel="budget δ in 1/255, l∞, W₂",
             ylabel=f"knapsack accuracy, points above “{arms[0]['says']}”")  # fmt: skip
    axes.set_title(f"{network}, {TESTS['test_jpeg']}")
    legend_below(figure, axes)
    save(figure, place)


def main() -> None:
    """Read the command line; write the record and the picture, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", help="folder of benchmarks.case_study")
    parser.add_argument("--control", choices=ARMS, default=CONTROL, metavar="ARM", help="what arms are compared with")
    parser.add_argument("--record", type=Path, default=RECORD)
    parser.add_argument("--pictures", type=Path, default=PICTURES, help="folder of the networks' pictures")
    args = parser.parse_args()
    if args.out:
        found = rows(args.out, args.control)
        record = {"tests": TESTS, "resamples": RESAMPLES, "rows": found}
        record |= {"commit": source_commit(), "versions": installed_versions()}
        args.record.write_text(json.dumps(record, indent=1) + "\n")
        CONSOLE.print(f"record {args.record}", markup=False)
    if not args.record.exists():
        raise SettingError(f"there is no record {args.record}; name the folder of benchmarks.case_study")
    found = json.loads(args.record.read_text())["rows"]
    for network, test in dict.fromkeys((row["network"], row["test"]) for row in found):
        print(f"\n{network}, {TESTS[test]}\n\n{table(found, network, test)}")
        if test == "test_jpeg":
            place = args.pictures / f"case-study-{network}.png"
            picture(found, network, place)
            CONSOLE.print(f"picture {place}", markup=False)


if __name__ == "__main__":
    with readable_errors():
        main()
