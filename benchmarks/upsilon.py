"""How well each estimator knows Υ while a network is fine-tuned, and what knowing it costs.

    python -m benchmarks.upsilon [--rates 0.003 0.001 0.01] [--norms linf l2] [--losses ce redlr] [--steps 300]

W-DAT fine-tuning of a real network at p = 2 with the table; the other estimators watch the same run. Every tenth step
all are compared with the truth: exact passes over all training images under the same augmentation, averaged over
`--draws` of them. Errors count after the first epoch. Two quantities:

Υ     the sensitivity itself;
c     what divides the budget: 1/c of δ_i = min(c n_i, r_max), r_max = 4δ. With ReDLR, Υ is the norm of one or two near
      ties, whoever measures it; the cap makes the division robust, so there c is what matters.

The second table times the step of the table itself, from a thousand to ten million images.
"""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from collections import defaultdict
from functools import partial
from typing import Any

import lightning as L
import numpy as np
import torch
from rich.table import Table as Printed

from benchmarks.common import CONSOLE, add_common, add_real, images, seconds, spread, write
from benchmarks.pictures import errors_over_time
from wdat import ThreatModel
from wdat.attacks import allocate, build
from wdat.cli.console import readable_errors
from wdat.distributed import ALONE
from wdat.models import load_network, prepare
from wdat.objectives import WDAT
from wdat.sensitivity import Batch, Ema, Estimator, Sensitivity, Subsample, Table
from wdat.training.module import WDATModule
from wdat.training.schedulers import Constant

DELTA = {"linf": 2 / 255, "l2": 0.25}
CAP = 4.0


def scale(sensitivity: Sensitivity, threat: ThreatModel) -> float:
    """1/c in δ_i = min(c n_i, r_max), up to a factor: read off the radius of a norm far below the cap (p = 2)."""
    probe = torch.tensor([1e-9 * sensitivity.upsilon()], dtype=torch.float64)
    return float(threat.delta * probe / allocate(probe, sensitivity, threat, CAP))


class Timed(Table):
    """The table, with a clock around what it does in a step."""

    seconds = 0.0

    def take(self, rows: torch.Tensor | None, norms: torch.Tensor) -> None:
        started = time.perf_counter()
        super().take(rows, norms)
        self.upsilon()
        self.seconds += time.perf_counter() - started


class Compare(L.Callback):
    """Lets estimators watch a run, and compares all with the truth now and then."""

    def __init__(self, watching: dict[str, Estimator], every: int, draws: int) -> None:
        self.watching, self.every, self.draws = watching, every, draws
        self.steps: list[int] = []
        self.truth: dict[str, list[float]] = {"upsilon": [], "c": []}
        self.known: dict[str, dict[str, list[float]]] = defaultdict(lambda: {"upsilon": [], "c": []})
        self.seconds = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        for estimator in self.watching.values():
            estimator.begin(trainer.datamodule.n_train, 2.0, pl_module.seed, ALONE)  # type: ignore[attr-defined]

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch.step % self.every == 0:
            everything = torch.arange(trainer.datamodule.n_train)  # type: ignore[attr-defined]
            found = []
            for draw in range(self.draws):  # other augmentations than the estimators' own passes
                exact = Sensitivity(2.0)
                exact.observe(None, pl_module.norms(everything, batch.step + 1_000_000 * (draw + 1)))
                found.append((exact.upsilon(), scale(exact, pl_module.threat)))
            self.steps.append(batch.step)
            for key, values in zip(("upsilon", "c"), zip(*found, strict=True), strict=True):
                self.truth[key].append(float(np.mean(values)))
        for estimator in self.watching.values():
            wanted = estimator.wanted(batch.step)
            if wanted is not None:
                estimator.measured(wanted, pl_module.norms(wanted, batch.step))
        self._started = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch.step:  # the first step fills the table
            self.seconds += time.perf_counter() - self._started
        else:
            pl_module.sensitivity.seconds = 0.0
        for estimator in self.watching.values():
            estimator.observe(batch.index, outputs["attack_result"].norms)
        if batch.step % self.every == 0:
            for name, estimator in {"table": pl_module.sensitivity, **self.watching}.items():
                self.known[name]["upsilon"].append(estimator.upsilon())
                self.known[name]["c"].append(scale(estimator, pl_module.threat))


def run(options: argparse.Namespace, loss: str, norm: str, rate: float) -> list[dict[str, Any]]:
    """One fine-tuning; a row for each estimator."""
    data = images(options.data, options.images, options.batch_size, options.seed)
    network = load_network(options.network, checkpoint=options.checkpoint)
    prepare(network)
    attack = build("wpgd_budget", loss="kl", radii_loss=loss, steps=10, step_size=0.25, radius_max=CAP)
    compare = Compare(
        {"uncorrected table": Table(window=None), "subsample": Subsample(1024, 10), "ema": Ema(0.1), "batch": Batch()},
        options.every,
        options.draws,
    )
    table = Timed()
    module = WDATModule(
        network, WDAT(), attack, ThreatModel(2, norm, DELTA[norm]), table,
        partial(torch.optim.SGD, lr=rate, momentum=0.9), Constant(), seed=options.seed,
    )  # fmt: skip
    trainer = L.Trainer(
        max_steps=options.steps, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[compare], limit_val_batches=0,
        use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(module, data)
    first = options.images // options.batch_size
    late = np.array(compare.steps) >= first
    rows = []
    for name, known in compare.known.items():
        row: dict[str, Any] = {"radii_loss": loss, "norm": norm, "rate": rate, "estimator": name}
        for key, values in known.items():
            error = np.array(values) / np.array(compare.truth[key]) - 1
            size = np.abs(error[late])
            row[key] = {"median": float(np.median(size)), "max": float(size.max()), "mean": float(size.mean())}
            row[f"{key}_error"] = [round(float(e), 5) for e in error]
        rows.append(row | {"steps": compare.steps})
    rows[0]["share_of_step"] = table.seconds / compare.seconds
    return rows


def growth(batch_size: int, rounds: int) -> list[dict[str, Any]]:
    """Time of one step of the table (refresh, Υ, radii) against its length."""
    rows: list[dict[str, Any]] = []
    threat = ThreatModel(2, "linf", 2 / 255)
    for n in (10**3, 10**4, 10**5, 10**6, 10**7):
        table = Table()
        table.begin(n, 2.0, 0, ALONE)
        generator = torch.Generator().manual_seed(0)
        table.measured(torch.arange(n), torch.rand(n, generator=generator))
        times = []
        for _ in range(rounds + 10):
            index = torch.randint(n, (batch_size,), generator=generator).unique()
            norms = torch.rand(len(index), generator=generator)

            def step(index: torch.Tensor = index, norms: torch.Tensor = norms, table: Table = table) -> None:
                table.observe(index, norms)
                allocate(norms, table, threat, CAP)

            times.append(seconds(step))
        rows.append({"images": n, "seconds": spread(times[10:])})
    return rows


def show(rows: list[dict[str, Any]]) -> Printed:
    """The errors, a line for each estimator and setting."""
    table = Printed(
        "estimator", "Υ: median %", "max %", "c: median %", "max %", "cost, % of a step",
        title="relative error after the first epoch", title_justify="left",
    )  # fmt: skip
    for row in rows:
        if row["estimator"] == "table":
            table.add_section()
            table.add_row(f"[bold]{row['radii_loss']} radii, {row['norm']}, rate {row['rate']:g}")
        figures = [f"{100 * row[key][figure]:.2f}" for key in ("upsilon", "c") for figure in ("median", "max")]
        cost = f"{100 * row['share_of_step']:.2f}" if "share_of_step" in row else ""
        table.add_row("  " + row["estimator"], *figures, cost)
    return table


def main() -> None:
    """Measure, print, draw, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common(parser, "upsilon")
    add_real(parser)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.003, 0.001, 0.01])
    parser.add_argument("--norms", nargs="+", choices=sorted(DELTA), default=["linf", "l2"])
    parser.add_argument("--losses", nargs="+", choices=["ce", "redlr"], default=["ce", "redlr"])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--every", type=int, default=10, help="steps between comparisons with the truth")
    parser.add_argument("--draws", type=int, default=2, help="augmentations that the truth averages over")
    parser.add_argument("--growth-rounds", type=int, default=200)
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*|.*LeafSpec.*")
    settings = [(loss, norm, rate) for loss in options.losses for norm in options.norms for rate in options.rates]
    rows: list[dict[str, Any]] = []
    for k, setting in enumerate(settings):
        rows += run(options, *setting)
        CONSOLE.print(f"[dim]{k + 1}/{len(settings)} fine-tuned: {setting[0]} radii, {setting[1]}, rate {setting[2]:g}")
    CONSOLE.print(show(rows))
    grown = growth(options.batch_size, options.growth_rounds)
    table = Printed("images in the table", "ms a step (median)", "min", "max")
    for row in grown:
        table.add_row(f"{row['images']:,}", *(f"{1000 * v:.3f}" for v in row["seconds"].values()))
    CONSOLE.print(table)
    write("upsilon", options, "cpu", {"rows": rows, "growth": grown})
    picture = options.output.with_suffix(".png")
    errors_over_time(rows, options.images // options.batch_size, picture)
    CONSOLE.print(f"picture {picture}")


if __name__ == "__main__":
    with readable_errors():
        main()
