"""Both ends of the bracket: certified and attacked distributional accuracy of small networks on real images.

    python -m benchmarks.certify [--only NETWORK ...] [--images 846] [--folder FOLDER]

Of each network every order and budget comes from one set of certified radii and one search for nearest adversarial
points. What is done is kept in the folder, and the same command goes on from it. `--show` prints the tables of the
record in Markdown and measures nothing.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

from benchmarks.common import CONSOLE, SHARED, add_common, write
from wdat import ThreatModel, models
from wdat.attacks.knapsack import Knapsack
from wdat.certify import Certificate, Crown, Smoothing
from wdat.cli.console import readable_errors
from wdat.data import ImageDataModule
from wdat.errors import SettingError
from wdat.evaluation import ImageTensors
from wdat.evaluation.evaluator import Evaluator
from wdat.evaluation.session import Session
from wdat.records import Facts, Record, RecordFile

ORDERS = (1.0, 2.0, 4.0, math.inf)
LITTLE = 0.01
BEGIN, END = "<!-- made by benchmarks.certify: begin -->", "<!-- made by benchmarks.certify: end -->"
WIDE = {"mean": [0.485, 0.456, 0.406], "std": [0.225, 0.225, 0.225]}


@dataclass(frozen=True)
class Case:
    """One network under one norm.

    Attributes:
        architecture: Name of a local network.
        file: Its weights.
        budgets: For linf in 1/255, for l2 in pixel units of [0, 1].
        constants: Of its normalisation.
        norm: Ground norm.
        orders: Wasserstein orders.
        certificates: What bounds it from below.
        attacked: Whether it is attacked too.
    """

    architecture: str
    file: str
    budgets: Sequence[float] = (0.25, 0.5, 1.0, 2.0)
    constants: dict[str, Any] = field(default_factory=dict)
    norm: str = "linf"
    orders: Sequence[float] = ORDERS
    certificates: Sequence[Certificate] = (Crown(),)
    attacked: bool = True

    @property
    def threats(self) -> list[ThreatModel]:
        """One for each order and budget."""
        unit = 255 if self.norm == "linf" else 1
        return [ThreatModel(p, self.norm, budget / unit) for p in self.orders for budget in self.budgets]


CASES = {
    "cnn_a": Case("cnn_a", "cnn_a_adv.pt"),
    "cifar_wide": Case("cnn_a", "cifar_wide.pt", constants=WIDE),
    "resnet2b": Case("resnet2b", "resnet2b.pt"),
    "kw_8px": Case("cnn_a", "kw_8px.pt", (1.0, 2.0, 4.0, 8.0), WIDE),
    "resnet2b randomised": Case(
        "resnet2b", "resnet2b.pt", (0.05, 0.1, 0.25, 0.5), norm="l2", orders=(2.0, math.inf), attacked=False,
        certificates=[Smoothing(sigma=s) for s in (0.06, 0.12, 0.25)],
    ),
    "resnet2b pointwise": Case("resnet2b", "resnet2b.pt", (1.0,), orders=(math.inf,)),
}  # fmt: skip


def run(name: str, case: Case, options: argparse.Namespace) -> list[Record]:
    """All records of one case, those kept in its folder included."""
    checkpoint = SHARED / "models" / case.file
    data = ImageDataModule("npz", 10, path=options.data, val_size=1, limit_test=options.images, seed=options.seed)
    data.setup("test")
    images = ImageTensors.collect(data.test_dataloader(), torch.device("cpu"))
    network = models.load_network(case.architecture, checkpoint=checkpoint, **case.constants)
    facts = Facts(case.architecture, case.file, options.data.name, options.seed, models.digest(network))
    folder = options.folder / name.replace(" ", "_")
    folder.mkdir(parents=True, exist_ok=True)
    report = None if options.quiet else lambda label, k, n: CONSOLE.print(f"{name}: {label}, {k} of {n}", markup=False)
    session = Session(
        Evaluator(network, images, facts=facts, progress=report), RecordFile(folder / "records.json"), folder
    )
    attack = Knapsack()
    for threat in case.threats if case.attacked else ():
        session.attacked(attack, threat)
    for certificate in case.certificates:
        session.certify(certificate, case.threats, [attack] if case.attacked else [])
    return session.results.records


def rows(name: str, records: Sequence[Record]) -> list[dict[str, Any]]:
    """One row for each certified accuracy, with the attacked one of the same network, order and budget."""
    attacked = {(r.network, r.p, r.norm, r.delta): r for r in records if r.attack == "knapsack"}
    found = []
    for record in records:
        if record.attack != "certified":
            continue
        upper = attacked.get((record.network, record.p, record.norm, record.delta))
        found.append(
            {
                "case": name, "network": record.network, "checkpoint": record.checkpoint, "weights": record.weights,
                "data": record.data, "n": record.n, "options": record.options, "norm": record.norm,
                "p": "inf" if math.isinf(record.p) else record.p, "delta": record.delta,
                "certified": record.accuracy, "attacked": upper.accuracy if upper else None,
                "cpu_seconds_per_image": record.details["cpu_seconds_per_image"],
                "unfinished": record.details.get("unfinished", 0),
                "commit": record.commit,
            }
        )  # fmt: skip
    return found


def _table(lines: Sequence[Sequence[str]]) -> str:
    head, *rest = lines
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *rest))


def brackets(record: dict[str, Any], name: str) -> str:
    """The table of one case in Markdown: a line for each order, a column for each budget."""
    chosen = [row for row in record["rows"] if row["case"] == name]
    budgets = sorted({row["delta"] for row in chosen})
    lines = [["", *(_budget(chosen[0]["norm"], budget) for budget in budgets)]]
    for network in dict.fromkeys(row["network"] for row in chosen):
        for p in dict.fromkeys(row["p"] for row in chosen):
            cells = {r["delta"]: r for r in chosen if r["p"] == p and r["network"] == network}
            if cells:
                note = network.partition(", ")[2]
                lines.append([_order(p) + (f", {note}" if note else ""), *(_bracket(cells[b]) for b in budgets)])
    return _table(lines)


def _order(p: float | str) -> str:
    return f"W_{'∞' if p == 'inf' else format(p, 'g')}"


def _budget(norm: str, delta: float) -> str:
    return f"{255 * delta:g}/255" if norm == "linf" else f"{delta:g}"


def _bracket(row: dict[str, Any]) -> str:
    low, high = row["certified"], row["attacked"]
    if high is None:
        return f"≥ {100 * low:.1f}"
    return f"{100 * low:.1f} to {100 * high:.1f} ({100 * (high - low):.1f})"


def summary(record: dict[str, Any]) -> str:
    """One line for each case in Markdown: images, time, and images that were left out."""
    lines = [["case", "images", "CPU seconds an image", "left out"]]
    for name in dict.fromkeys(row["case"] for row in record["rows"]):
        chosen = [row for row in record["rows"] if row["case"] == name]
        seconds = max(row["cpu_seconds_per_image"] for row in chosen)
        unfinished = max(row["unfinished"] for row in chosen)
        lines.append([name, str(chosen[0]["n"]), f"{seconds:.2f}", str(unfinished)])
    return _table(lines)


def useless(record: dict[str, Any]) -> str:
    """Where the lower end says next to nothing: below `LITTLE`."""
    found: dict[str, list[str]] = {}
    for row in record["rows"]:
        if row["certified"] < LITTLE:
            where = f"{_order(row['p'])} at {_budget(row['norm'], row['delta'])}"
            note = row["network"].partition(", ")[2]
            found.setdefault(row["case"], []).append(f"{where} ({note})" if note else where)
    if not found:
        return f"No lower end is below {100 * LITTLE:g} %."
    listed = "; ".join(f"{name}: {', '.join(places)}" for name, places in found.items())
    return f"The lower end is below {100 * LITTLE:g} %, and says next to nothing, for {listed}."


def page(text: str, record: dict[str, Any]) -> str:
    """A page in Markdown whose part between the two marks is what the record says."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    parts = [summary(record), useless(record)]
    for name in dict.fromkeys(row["case"] for row in record["rows"]):
        parts.append(f"**{name}**\n\n{brackets(record, name)}")
    return f"{before}{BEGIN}\n\n" + "\n\n".join(parts) + f"\n\n{END}{after}"


def main() -> None:
    """Measure, print, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES)[:-1], help="cases to measure")
    parser.add_argument("--data", type=Path, default=SHARED / "data/cifar10_subset.npz", help="images (%(default)s)")
    parser.add_argument("--images", type=int, default=None, help="the first N test images; all without it")
    parser.add_argument("--folder", type=Path, default=Path("outputs/certify"), help="what is kept (%(default)s)")
    parser.add_argument("--quiet", action="store_true", help="no lines of progress")
    parser.add_argument("--show", type=Path, metavar="PAGE", help="write the record's tables into a page, measure none")
    add_common(parser, "certify")
    options = parser.parse_args()
    if options.show:
        record = json.loads(options.output.read_text())
        options.show.write_text(page(options.show.read_text(encoding="utf-8"), record), encoding="utf-8")
        return
    if not options.data.exists():
        raise SettingError(f"--data={options.data} does not exist; name an npz file with x_test and y_test")
    kept = json.loads(options.output.read_text())["rows"] if options.output.exists() else []
    for name in track(options.only, "certify", transient=True, disable=not options.quiet):
        found = rows(name, run(name, CASES[name], options))
        kept = [row for row in kept if row["case"] != name] + found
        kept.sort(key=lambda row: list(CASES).index(row["case"]))
        write("certify", options, "cpu", {"rows": kept})
        CONSOLE.print(f"\n{name}\n\n{brackets({'rows': kept}, name)}", markup=False, soft_wrap=True)


if __name__ == "__main__":
    with readable_errors():
        main()
