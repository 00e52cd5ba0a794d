"""The tables and the picture of the frontier study, from the rows that `benchmarks.frontier` has finished.

    python -m benchmarks.frontier_table outputs/frontier     # writes results/frontier.json and docs/frontier.png
    python -m benchmarks.frontier_table                      # prints the tables of the record

Accuracies in percent, on the same test images for all seeds. What a method gains is the difference of an arm's knapsack
accuracy and the one that the reference has at the arm's own clean accuracy, by linear interpolation between the
reference's arms. The bootstrap resamples images, the same ones for all arms of a seed, and measures clean accuracies,
knapsacks and interpolation anew each time.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.case_arms import NETWORKS
from benchmarks.common import CONSOLE
from benchmarks.frontier import ARMS, METHODS, REFERENCE
from wdat.cli.console import readable_errors
from wdat.errors import SettingError
from wdat.records import installed_versions, source_commit
from wdat.reporting.plots import house_style, save

Floats = NDArray[np.float64]

BUDGETS = {"w1": (1.0, 1), "w2": (2.0, 1), "w2_2": (2.0, 2), "w4": (4.0, 1), "w4_2": (4.0, 2)}
GAINS = ("w2", "w2_2")
TITLES = {"clean": "clean", "w1": "W_1 δ", "w2": "W_2 δ", "w2_2": "W_2 2 δ", "w4": "W_4 δ", "w4_2": "W_4 2 δ"}
RESAMPLES = 400
RECORD, PICTURE = Path("results/frontier.json"), Path("docs/frontier.png")


def knapsack(distances: Floats, p: float, delta: float) -> float:
    """A_δ from distances (N,), as `wdat.attacks.knapsack_allocation.solve` has it, faster."""
    n = len(distances)
    cost = np.sort((distances / delta) ** p)
    spent = np.cumsum(cost)
    whole = int(np.searchsorted(spent, n * (1 + 1e-12), side="right"))
    part = 0.0
    if whole < n and np.isfinite(cost[whole]):
        part = max(n - (spent[whole - 1] if whole else 0.0), 0.0) / cost[whole]
    return 1 - (whole + float(part)) / n


def measured(distances: Floats, delta: float) -> dict[str, float]:
    """Clean and knapsack accuracies in percent."""
    found = {"clean": float((distances > 0).mean())}
    found |= {key: knapsack(distances, p, m * delta) for key, (p, m) in BUDGETS.items()}
    return {key: 100 * value for key, value in found.items()}


def at(clean: float, curve: list[tuple[float, float]]) -> float:
    """A frontier's accuracy at a clean accuracy; the line through its last two arms goes on beyond them.

    Args:
        clean: Where.
        curve: Pairs of clean and knapsack accuracy, two at least.
    """
    x, y = (np.array(values) for values in zip(*sorted(curve), strict=True))
    i = int(np.clip(np.searchsorted(x, clean) - 1, 0, len(x) - 2))
    width = x[i + 1] - x[i]
    share = (clean - x[i]) / width if width > 0 else 0.0
    return float(y[i] + share * (y[i + 1] - y[i]))


def gains(arm: dict[str, float], frontiers: Sequence[Sequence[dict[str, float]]]) -> list[float]:
    """What an arm has above the best of the frontiers at its own clean accuracy, for each of `GAINS`.

    Args:
        arm: What was measured.
        frontiers: Of each, what was measured of its arms, two at least.
    """
    curves = {key: [[(r["clean"], r[key]) for r in frontier] for frontier in frontiers] for key in GAINS}
    return [arm[key] - max(at(arm["clean"], curve) for curve in curves[key]) for key in GAINS]


def reaching(clean: float, frontiers: Sequence[Sequence[str]], measures: Mapping[str, dict[str, float]]) -> list[Any]:
    """The frontiers that have arms on either side of a clean accuracy."""
    ends = [(min(values), max(values)) for values in ([measures[a]["clean"] for a in f] for f in frontiers)]
    return [frontier for frontier, (low, high) in zip(frontiers, ends, strict=True) if low <= clean <= high]


def compared(arm: str, seeds: Mapping[int, Mapping[str, Floats]], delta: float) -> dict[str, Any] | None:
    """Gains over the reference, mean over the seeds in which it has arms on either side of the arm's clean accuracy.

    Args:
        arm: Its name.
        seeds: Distances (N,) of all arms by seed.
        delta: δ in pixel units.
    """
    points: list[list[float]] = []
    resamples: list[list[list[float]]] = []
    used: list[int] = []
    for seed, arms in seeds.items():
        if arm not in arms or arm.rsplit("-", 1)[0] in REFERENCE:
            continue
        families = [[a for a in arms if a.rsplit("-", 1)[0] == method] for method in REFERENCE]
        names = [arm, *(a for family in families for a in family)]
        measures = {name: measured(arms[name], delta) for name in names}
        near = reaching(measures[arm]["clean"], [f for f in families if len(f) > 1], measures)
        if not near:
            continue
        points.append(gains(measures[arm], [[measures[a] for a in f] for f in near]))
        n, rng = len(arms[arm]), np.random.default_rng(0)
        used.append(seed)
        resamples.append([])
        for drawn in (rng.integers(n, size=n) for _ in range(RESAMPLES)):
            again = {name: measured(arms[name][drawn], delta) for name in {arm, *(a for f in near for a in f)}}
            resamples[-1].append(gains(again[arm], [[again[a] for a in f] for f in near]))
    if not points:
        return None
    low, high = np.quantile(np.mean(resamples, axis=0), [0.025, 0.975], axis=0)
    return {
        "seeds": used,
        "by_seed": [dict(zip(GAINS, (round(value, 3) for value in point), strict=True)) for point in points],
        **{
            key: {"mean": float(np.mean([p[k] for p in points])), "low": float(low[k]), "high": float(high[k])}
            for k, key in enumerate(GAINS)
        },
    }


def stored(place: Path) -> Floats | None:
    """Distances (N,) of one evaluation, in pixel units; None where it isn't finished."""
    if not (place / "distances_linf.npz").exists():
        return None
    with np.load(place / "distances_linf.npz", allow_pickle=False) as file:
        return np.asarray(file["distances"], dtype=np.float64)


def rounded(measures: dict[str, float]) -> dict[str, float]:
    """To what a record keeps."""
    return {key: round(value, 3) for key, value in measures.items()}


def rows(out: Path) -> list[dict[str, Any]]:
    """One row a network and arm that has been finished.

    Raises:
        SettingError: If there is none.
    """
    found = []
    for network in NETWORKS:
        delta = NETWORKS[network].delta / 255
        distances: dict[int, dict[str, Floats]] = {}
        seen: dict[str, dict[int, dict[str, float]]] = {}
        about: dict[str, dict[str, Any]] = {}
        for arm in ARMS:
            for place in sorted((out / network / arm).glob("seed*")):
                tested, left_out = (stored(place / split) for split in ("test", "val"))
                if tested is not None and (place / "arm.json").exists():
                    distances.setdefault(int(place.name[4:]), {})[arm] = tested
                    about[arm] = json.loads((place / "arm.json").read_text())
                    if left_out is not None:
                        seen.setdefault(arm, {})[int(place.name[4:])] = rounded(measured(left_out, delta))
        for arm, facts in about.items():
            each = {s: measured(arms[arm], delta) for s, arms in distances.items() if arm in arms}
            method, strength = arm.rsplit("-", 1)
            found.append({
                "network": network, "delta": delta, "method": method, "strength": float(strength),
                "says": METHODS[method].says, "settings": facts["settings"],
                "passes_an_epoch": facts["passes_an_epoch"], "epochs": facts["epochs"], "seeds": sorted(each),
                "n": len(next(iter(distances[min(each)].values()))),
                "mean": {k: float(np.mean([m[k] for m in each.values()])) for k in TITLES},
                "by_seed": {s: rounded(m) for s, m in sorted(each.items())}, "validation": seen.get(arm),
                "gain": compared(arm, distances, delta),
            })  # fmt: skip
    if not found:
        raise SettingError(f"{out} has no finished row of the study; run python -m benchmarks.frontier first")
    return found


def table(found: list[dict[str, Any]], network: str) -> str:
    """Markdown: accuracies, and gains with intervals over images."""
    head = ["method", "radius or budget, δ", "seeds", *TITLES.values(), "gain at δ", "gain at 2 δ"]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for row in found:
        if row["network"] == network:
            cells = [row["says"], f"{row['strength']:g}", str(len(row["seeds"]))]
            cells += [f"{row['mean'][key]:.1f}" for key in TITLES]
            cells += [_gain(row["gain"], key) for key in GAINS]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _gain(found: dict[str, Any] | None, key: str) -> str:
    if found is None:
        return ""
    return f"{found[key]['mean']:+.1f} [{found[key]['low']:+.1f}, {found[key]['high']:+.1f}]"


def first(row: dict[str, Any]) -> dict[str, float]:
    """What was measured of an arm's first seed."""
    measures: dict[str, float] = row["by_seed"][min(row["by_seed"])]
    return measures


def picture(found: list[dict[str, Any]], methods: list[str], place: Path) -> None:
    """Clean against knapsack accuracy of each method over its strengths; the first seed, which all arms have."""
    networks = list(dict.fromkeys(row["network"] for row in found))
    drawn = [method for method in methods if any(row["method"] == method for row in found)]
    with house_style():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(5 * len(GAINS), 4 * len(networks)), layout="constrained")
        grid = figure.subplots(len(networks), len(GAINS), squeeze=False)
        for line, network in zip(grid, networks, strict=True):
            for axes, key in zip(line, GAINS, strict=True):
                for i, method in enumerate(drawn):
                    own = [first(r) for r in found if (r["network"], r["method"]) == (network, method)]
                    clean, accuracy = zip(*sorted((m["clean"], m[key]) for m in own), strict=True) if own else ((), ())
                    style: dict[str, Any] = {"lw": 2.2, "color": "#222222"} if method == "pgd_at" else {"lw": 1.2}
                    marker, label = "osD^v<>PX*"[i % 10], METHODS[method].says
                    axes.plot(clean, accuracy, marker=marker, ms=5, label=label, **style)
                axes.set(xlabel="clean accuracy, in percent", ylabel=f"{TITLES[key]} knapsack, at most")
                axes.set_title(network)
        figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
        save(figure, place)


def main() -> None:
    """Read the command line; write the record and the picture, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", help="folder of benchmarks.frontier")
    parser.add_argument("--record", type=Path, default=RECORD)
    parser.add_argument("--picture", type=Path, default=PICTURE)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD", help="drawn")
    args = parser.parse_args()
    if args.out:
        found = rows(args.out)
        (passes,) = {row["passes_an_epoch"] * row["epochs"] for row in found}  # the same for all
        record = {"split": "test", "passes": passes, "resamples": RESAMPLES, "reference": REFERENCE, "rows": found}
        record |= {"commit": source_commit(), "versions": installed_versions()}
        args.record.write_text(json.dumps(record, indent=1) + "\n")
        picture(found, args.methods, args.picture)
        CONSOLE.print(f"record {args.record}, picture {args.picture}", markup=False)
    if not args.record.exists():
        raise SettingError(f"there is no record {args.record}; name the folder of benchmarks.frontier")
    found = json.loads(args.record.read_text())["rows"]
    for network in dict.fromkeys(row["network"] for row in found):
        print(f"\n{network}\n\n{table(found, network)}")


if __name__ == "__main__":
    with readable_errors():
        main()
