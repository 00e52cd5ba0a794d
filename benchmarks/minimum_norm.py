"""The search for nearest adversarial points against the public minimum-norm attacks: accuracy against passes.

    pip install --no-build-isolation -e ".[benchmarks]"
    python -m benchmarks.minimum_norm [--networks resnet2b cnn_a] [--norms linf l2] [--only WORD ...] [--seeds 0 1]

Two robustly trained networks, the test images of an npz file, order 2, linf 2/255 and l2 0.25. Each attack is run once
on the images that are classified correctly; each point it returns is clamped into [0, 1] and verified by a forward
pass; then the knapsack is solved. Passes are counted inside the network, forward and backward, and stated for each
attacked image. `best` takes for each image the nearest point of all public attacks.

The record is written after each run, and what it holds isn't run again: a stopped benchmark goes on where it was. The
table and the figure are made from the record alone (`--show`). One core suffices, in about two hours.
"""

from __future__ import annotations

import argparse
import importlib
import json
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.table import Table
from torch import Tensor, nn

from benchmarks.common import CONSOLE, SHARED, add_common, write
from benchmarks.near_ties import evaluation_images
from wdat import ThreatModel
from wdat.attacks import build
from wdat.attacks.fab import as_found, fab_points
from wdat.attacks.knapsack import Knapsack
from wdat.attacks.knapsack_allocation import solve
from wdat.attacks.passes import Counted
from wdat.cli.console import readable_errors
from wdat.errors import SettingError
from wdat.gradients import forward, undisturbed
from wdat.models import load_network
from wdat.records import source_commit
from wdat.threat import image_norm

DELTA = {"linf": 2 / 255, "l2": 0.25}
WEIGHTS = {"resnet2b": "resnet2b.pt", "cnn_a": "cnn_a_adv.pt"}
EFFORTS = ("quick", "default", "thorough")
Points = Callable[[nn.Module, Tensor, Tensor], Tensor]  # network, images, labels → points


@dataclass(frozen=True)
class Run:
    """One attack at one setting.

    Attributes:
        name: What tables call it.
        norms: Where it can run.
        points: Makes it, of a norm and a seed; None for our own.
        library: Whose it is; None is ours.
    """

    name: str
    norms: tuple[str, ...]
    points: Callable[[str, int], Points] | None = None
    library: str | None = None


def _adv_lib(attack: str, **options: Any) -> Callable[[str, int], Points]:
    def of(norm: str, seed: int) -> Points:
        def points(network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            with warnings.catch_warnings():  # its own versions of torch and setuptools
                warnings.simplefilter("ignore")
                import adv_lib.attacks as library
                from adv_lib.attacks.auto_pgd import minimal_apgd
            settings = dict(options)
            if "norm" in settings or attack == "tr":
                settings["p" if attack == "tr" else "norm"] = {"linf": float("inf"), "l2": 2.0}[norm]
            if attack == "tr":
                settings["eps"] = DELTA[norm] / 8  # its default, 0.001, is meant for linf
            if attack == "minimal_apgd":
                settings["max_eps"] = 4 * DELTA[norm]
            run = minimal_apgd if attack == "minimal_apgd" else getattr(library, attack)
            found: Tensor = run(network, x, y, **settings)
            return found

        return points

    return of


def _foolbox(attack: dict[str, str], **options: Any) -> Callable[[str, int], Points]:
    def of(norm: str, seed: int) -> Points:
        def points(network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            foolbox: Any = importlib.import_module("foolbox")

            model = foolbox.PyTorchModel(network, bounds=(0, 1))
            run = getattr(foolbox.attacks, attack[norm])(**options)
            found: Tensor = run(model, x, foolbox.criteria.Misclassification(y), epsilons=None)[0]
            return found

        return points

    return of


def _fab(steps: int, targets: int) -> Callable[[str, int], Points]:
    return lambda norm, seed: partial(fab_points, norm=norm, steps=steps, targets=targets, seed=seed)


BOTH = ("linf", "l2")
PUBLIC = (
    Run("FMN 100", BOTH, _adv_lib("fmn", norm=None, steps=100), "adv-lib"),
    Run("FMN 200", BOTH, _adv_lib("fmn", norm=None, steps=200), "adv-lib"),
    Run("FMN 100 (foolbox)", BOTH, _foolbox({"linf": "LInfFMNAttack", "l2": "L2FMNAttack"}, steps=100), "foolbox"),
    Run("ALMA 100", ("l2",), _adv_lib("alma", num_steps=100, α=0.5), "adv-lib"),
    Run("ALMA 200", ("l2",), _adv_lib("alma", num_steps=200, α=0.7), "adv-lib"),
    Run("DDN 100", ("l2",), _adv_lib("ddn", steps=100, init_norm=DELTA["l2"], levels=None), "adv-lib"),
    Run("DDN 200", ("l2",), _adv_lib("ddn", steps=200, init_norm=DELTA["l2"], levels=None), "adv-lib"),
    Run("TR 100", BOTH, _adv_lib("tr", iter=100), "adv-lib"),
    Run("TR adaptive 100", BOTH, _adv_lib("tr", iter=100, adaptive=True), "adv-lib"),
    Run("FAB-T 1 target 100", BOTH, _fab(100, 1), "pyautoattack"),
    Run("FAB-T 3 targets 100", BOTH, _fab(100, 3), "pyautoattack"),
    Run("FAB 3 targets 100", BOTH, _adv_lib("fab", norm=None, n_iter=100, restarts=3, targeted_restarts=True),
        "adv-lib"),
    Run("APGD 100, 8 bisections", BOTH, _adv_lib("minimal_apgd", norm=None, n_iter=100, binary_search_steps=8),
        "adv-lib"),
    Run("FAB-T 9 targets 100", BOTH, _fab(100, 9), "pyautoattack"),
)  # fmt: skip


def _distances(network: nn.Module, x: Tensor, y: Tensor, points: Tensor, norm: str) -> Tensor:
    """Of points (N, ...) that are misclassified in [0, 1], (N,); inf of the others."""
    points = points.detach().to(x).clamp(0, 1)
    wrong = forward(network, points).argmax(1) != y
    return torch.where(wrong & points.flatten(1).isfinite().all(1), image_norm(points - x, norm), torch.inf)


def _public(run: Run, network: Counted, x: Tensor, y: Tensor, norm: str, seed: int, batch_size: int) -> Tensor:
    """Distances that a public attack reaches, (N,). Images are contiguous: adv-lib projects views in place."""
    assert run.points is not None, "ours are no public attacks"
    points = run.points(norm, seed)
    parts = []
    with undisturbed(network), as_found(x.device):
        torch.manual_seed(seed)
        for rows in torch.arange(len(x)).split(batch_size):
            parts.append(points(network, x[rows].contiguous().clone(), y[rows]))
        return _distances(network.network, x, y, torch.cat(parts), norm)


def _case(options: argparse.Namespace, name: str) -> tuple[nn.Module, Tensor, Tensor]:
    checkpoint = options.models / WEIGHTS[name]
    if not checkpoint.exists():
        raise SettingError(f"--models={options.models} has no {WEIGHTS[name]}; name the folder of the networks")
    x, y = evaluation_images(options.data)
    keep = slice(options.images)
    return load_network(name, checkpoint=str(checkpoint)).eval(), x[keep].contiguous(), y[keep]


def _ours(effort: str, threat: ThreatModel, network: nn.Module, x: Tensor, y: Tensor, seed: int) -> Tensor:
    attack = build("knapsack", effort=effort, seed=seed)
    assert isinstance(attack, Knapsack)
    return attack.find(network, x, y, threat.norm, threats=[threat]).distances


def measure(run: Run, network: nn.Module, x: Tensor, y: Tensor, norm: str, seed: int, batch_size: int) -> Any:
    """A row of the record, and the distances (N,), 0 where an image is misclassified as it is."""
    right = (forward(network, x).argmax(1) == y).nonzero().squeeze(1)
    counted, started = Counted(network).eval(), time.perf_counter()
    if run.library is None:
        distances = _ours(run.name, ThreatModel(2, norm, DELTA[norm]), counted, x, y, seed)
    else:
        found = _public(run, counted, x[right], y[right], norm, seed, batch_size)
        distances = torch.zeros(len(x)).index_copy(0, right, found)
    row = {
        "attack": run.name, "library": run.library or "wdat", "norm": norm, "delta": DELTA[norm], "seed": seed,
        "n": len(x), "attacked": len(right),
        "forward": counted.passes.forward / len(right), "backward": counted.passes.backward / len(right),
        "accuracy": solve(distances, ThreatModel(2, norm, DELTA[norm])).accuracy,
        "seconds": time.perf_counter() - started, "commit": source_commit(),
    }  # fmt: skip
    return row, distances


IDENTITY = ("network", "norm", "attack", "library", "seed", "n")


class Book:
    """Rows and best distances, read from the record and written to it after each run."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.rows, self.best = options, [], {}
        if options.output.exists():
            record = json.loads(options.output.read_text())
            self.rows, self.best = record["rows"], record["best"]

    def has(self, identity: tuple[Any, ...]) -> bool:
        """Whether this run is in the record."""
        return identity in {tuple(row[key] for key in IDENTITY) for row in self.rows}

    def add(self, row: dict[str, Any], distances: Tensor) -> None:
        """Write a row; the distances of a public attack make the best ones nearer."""
        self.rows.append(row)
        if row["library"] != "wdat":
            case = f"{row['network']} {row['norm']} {row['n']}"
            d = [None if d == float("inf") else float(f"{d:.7g}") for d in distances.tolist()]
            self.best[case] = [min(a, b, key=_far) for a, b in zip(d, self.best.get(case, d), strict=True)]
        write("minimum_norm", self.options, "cpu", {"rows": self.rows, "best": self.best})


def _far(distance: float | None) -> float:
    return float("inf") if distance is None else distance


def best_accuracies(record: dict[str, Any]) -> dict[str, float]:
    """Knapsack accuracy of the per-image best of all public attacks, by `network norm n`."""
    accuracies = {}
    for case, distances in record["best"].items():
        norm = case.split()[1]
        d = torch.tensor([_far(d) for d in distances], dtype=torch.float64)
        accuracies[case] = solve(d, ThreatModel(2, norm, DELTA[norm])).accuracy
    return accuracies


def above(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows, with `passes` an attacked image and `above`, points above the best."""
    best = best_accuracies(record)
    rows = []
    for row in record["rows"]:
        reference = best.get(f"{row['network']} {row['norm']} {row['n']}", float("nan"))
        rows.append({**row, "passes": row["forward"] + row["backward"], "above": 100 * (row["accuracy"] - reference)})
    return rows


def table(record: dict[str, Any]) -> Table:
    """Passes and accuracy of each attack, those of each case by their accuracy."""
    printed = Table("attack", "library", "seed", "passes an image", "accuracy, %", "above the best", "seconds")
    rows = above(record)
    for case, accuracy in best_accuracies(record).items():
        network, norm, n = case.split()
        printed.add_section()
        printed.add_row(f"[bold]{network}, W_2 {norm} {DELTA[norm]:.4g}, n = {n}", "", "", "", f"{100 * accuracy:.2f}")
        mine = [r for r in rows if (r["network"], r["norm"], r["n"]) == (network, norm, int(n))]
        for r in sorted(mine, key=lambda r: r["accuracy"]):
            figures = [f"{r['passes']:.0f}", f"{100 * r['accuracy']:.2f}", f"{r['above']:+.2f}", f"{r['seconds']:.0f}"]
            printed.add_row(r["attack"], r["library"], str(r["seed"]), *figures)
    return printed


def draw(record: dict[str, Any], place: Path) -> None:
    """Points above the best against passes, a panel for each network and norm."""
    rows = [r for r in above(record) if r["above"] == r["above"]]  # NaN before a public attack has run
    cases = sorted({(r["network"], r["norm"], r["n"]) for r in rows})
    figure = Figure(figsize=(11, 3.6 * -(-len(cases) // 2)), layout="constrained")
    for k, case in enumerate(cases):
        axes = figure.add_subplot(-(-len(cases) // 2), 2, k + 1)
        mine = [r for r in rows if (r["network"], r["norm"], r["n"]) == case]
        for r in (r for r in mine if r["library"] != "wdat"):
            axes.plot(r["passes"], r["above"], "o", color="0.6", markersize=4)
            axes.annotate(r["attack"], (r["passes"], r["above"]), fontsize=6, xytext=(3, 2), textcoords="offset points")
        ours = sorted((r["passes"], r["above"]) for r in mine if r["library"] == "wdat" and r["seed"] == 0)
        axes.plot(*zip(*ours, strict=True), "o-", color="#0072b2", label="quick, default, thorough") if ours else None
        axes.axhline(0, color="0.3", linewidth=0.8)
        axes.set(xscale="log", yscale="symlog", ylabel="points above the best of the public attacks")
        axes.set(
            xlabel="passes an attacked image", title=f"{case[0]}, W_2 {case[1]} {DELTA[case[1]]:.4g}, n = {case[2]}"
        )
        axes.set_ylim(bottom=-0.2)
        if ours and k == 0:
            axes.legend(fontsize=8)
    figure.savefig(place, dpi=110)


def main() -> None:
    """Measure what the record lacks, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common(parser, "minimum_norm")
    parser.add_argument("--models", type=Path, default=SHARED / "models", help="folder of the weights (%(default)s)")
    parser.add_argument(
        "--data", type=Path, default=SHARED / "data/cifar10_subset.npz", help="images, npz (%(default)s)"
    )
    parser.add_argument("--networks", nargs="+", choices=sorted(WEIGHTS), default=["resnet2b", "cnn_a"])
    parser.add_argument("--norms", nargs="+", choices=sorted(DELTA), default=["linf", "l2"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="of our own search (%(default)s)")
    parser.add_argument("--only", nargs="+", help="attacks whose name holds one of these words, ours by their effort")
    parser.add_argument("--images", type=int, help="keep the first N")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--show", action="store_true", help="make table and figure from the record, run nothing")
    options = parser.parse_args()
    book = Book(options)
    ours = [(Run(effort, BOTH), seed) for effort in EFFORTS for seed in options.seeds]
    wanted = [*ours, *((run, options.seed) for run in PUBLIC)]
    if options.only:
        wanted = [(run, seed) for run, seed in wanted if any(word in run.name for word in options.only)]
    for run, seed in [] if options.show else wanted:
        for name in options.networks:
            for norm in [norm for norm in options.norms if norm in run.norms]:
                network, x, y = _case(options, name)
                if book.has((name, norm, run.name, run.library or "wdat", seed, len(x))):
                    continue
                row, distances = measure(run, network, x, y, norm, seed, options.batch_size)
                book.add({"network": name, **row}, distances)
                CONSOLE.print(f"{name} {norm} {run.name}: {100 * row['accuracy']:.2f} %", highlight=False)
    record = {"rows": book.rows, "best": book.best}
    if not record["rows"]:
        raise SettingError(f"--show: {options.output} holds no run; leave --show out")
    if not record["best"]:
        CONSOLE.print("no public attack has run yet, so there is nothing to compare with")
        return
    CONSOLE.print(table(record))
    draw(record, options.output.with_suffix(".png"))


if __name__ == "__main__":
    with readable_errors():
        main()
