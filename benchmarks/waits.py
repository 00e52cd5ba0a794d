"""How often a training step, and a step of an evaluation, makes the host wait for the device; counted without a GPU.

    python -m benchmarks.waits [--inner-steps 10] [--batch-size 16] [--label before]

A pretended accelerator counts the moments at which the host reads from the device or waits for a copy, the kernels
outside the network, and the collective operations of two processes. Counts don't depend on the speed of any machine;
each label of the record (`before` and `after` a change) is replaced by a run with that label.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from rich.table import Table as Printed
from torch import Tensor, nn

from benchmarks.common import CONSOLE, add_common, write
from benchmarks.pretended import CUDA, Counts, accelerator, device_tensor, lend
from wdat import ThreatModel
from wdat.attacks import Context, build
from wdat.cli.console import readable_errors
from wdat.data.batch import Batch
from wdat.distributed import current
from wdat.objectives import TRADES, WDAT, Objective
from wdat.sensitivity import Batch as BatchNorms
from wdat.sensitivity import Ema, Estimator, Exact, Subsample, Table, with_pool
from wdat.training.module import WDATModule
from wdat.training.requests import Requests
from wdat.training.schedulers import Constant

DELTA = {"linf": 8 / 255, "l2": 0.5}
ESTIMATORS: dict[str, Callable[[], Estimator]] = {
    "table": Table, "batch": BatchNorms, "ema": Ema,
    "exact": partial(Exact, every=1000), "subsample": partial(Subsample, every=1000),  # a pass of its own is no step
}  # fmt: skip
TRAINING = ("wpgd_budget", "wpgd", "knapsack_budget", "critical_draw", "trades")
EVALUATION = ("pgd", "wpgd", "knapsack")
N_TRAIN = 64


class SmallNetwork(nn.Module):
    """A convolution, a BatchNorm and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(3, 8, 3, 4), nn.BatchNorm2d(8)
        self.linear = nn.Linear(8 * 4, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, 10) of images (N, 3, 8, 8)."""
        features: Tensor = self.norm(self.convolution(x))
        logits: Tensor = self.linear(torch.relu(features).flatten(1))
        return logits


class SmallPool:
    """A pool of synthetic images, as far as estimators look at it."""

    class_sizes = torch.full((10,), 100)

    def __len__(self) -> int:
        return 1000

    def labels(self, rows: Tensor) -> Tensor:
        """Each row's label."""
        return rows % 10

    def stratified(self, size: int, generator: torch.Generator) -> Tensor:
        """The first rows."""
        return torch.arange(size)


def images(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random images (N, 3, 8, 8) and labels (N,), on the pretended device."""
    drawn = torch.Generator().manual_seed(seed)
    x, y = torch.rand(count, 3, 8, 8, generator=drawn), torch.randint(10, (count,), generator=drawn)
    return device_tensor(x), device_tensor(y)


@dataclass
class TrainingSteps:
    """Training steps on the pretended device, without the loop around them; call it inside `accelerator`.

    Attributes:
        attack: A name in `ATTACKS`, or `trades` for the objective without a distributional attack.
        norm: Ground norm.
        estimator: A name in `ESTIMATORS`.
        inner: Inner steps.
        size: Images of this process in a batch.
        processes: As `accelerator` has it.
        pool: Whether half of the images are of a synthetic pool.
        requests: What is asked of the other processes.
    """

    attack: str
    norm: str
    estimator: str = "table"
    inner: int = 10
    size: int = 16
    processes: int = 1
    pool: bool = False
    requests: Requests | None = None

    def __post_init__(self) -> None:
        options: dict[str, Any] = {"loss": "kl", "steps": self.inner, "step_size": 0.25}
        single = self.attack in ("fgsm", "wfgsm")
        if single:
            options = {"loss": "ce"}
        name = "wpgd_budget" if self.attack == "trades" else self.attack
        attack = build(name, **options, **({"radius_max": 4.0} if self.attack == "wpgd_budget" else {}))
        objective: Objective = WDAT()
        if self.attack == "trades":
            objective = TRADES(pointwise_attack=build("pgd", **options))
        estimator = ESTIMATORS[self.estimator]()
        if self.pool:
            estimator = with_pool(estimator, SmallPool(), 0.5, 32, None)
        threat = ThreatModel(2, self.norm, DELTA[self.norm])
        torch.manual_seed(0)
        network = lend(SmallNetwork())
        self.module = WDATModule(
            network,
            objective,
            attack,
            threat,
            estimator,
            torch.optim.SGD,
            Constant(),
            notify=lambda text: None,
            requests=self.requests,
        )
        self.module._device = CUDA
        self.module.log = lambda *arguments, **given: None  # type: ignore[method-assign]
        own = attack.threat_of(threat)
        order = own.p if attack.by_distance else own.q
        estimator.begin(N_TRAIN, order, 0, current(CUDA), attack.by_distance)
        wanted = estimator.wanted(0)
        if wanted is not None:
            estimator.measured(wanted, device_tensor(torch.rand(len(wanted)) + 0.5))
        self.module.train()

    def __call__(self, step: int) -> dict[str, Any]:
        """One step with its backward pass."""
        first = N_TRAIN - self.size // 2 if self.pool else 0
        rows = device_tensor(torch.arange(first, first + self.size))
        batch = Batch(
            *images(self.size, step), rows, device_tensor(torch.arange(self.size)),
            self.size * self.processes, step,
            rows >= N_TRAIN if self.pool else None,
        )  # fmt: skip
        outputs = self.module.training_step(batch, step)
        outputs["loss"].backward()
        return outputs


def training(attack: str, norm: str, inner: int, size: int, processes: int) -> dict[str, Any]:
    """Counts of one training step, the third, when what is done once is done."""
    with accelerator(processes) as counts:
        step = TrainingSteps(attack, norm, "table", inner, size, processes)
        for number in (1, 2):
            step(number)
        counts.clear()
        step(3)
        return row(counts, what="training step", attack=attack, norm=norm, processes=processes)


def evaluation(attack: str, norm: str, size: int, processes: int) -> dict[str, Any]:
    """Counts of one attack on a whole set."""
    with accelerator(processes) as counts:
        torch.manual_seed(0)
        network, (x, y) = lend(SmallNetwork()), images(size)
        context = Context(processes=current(CUDA), index=device_tensor(torch.arange(size)))
        options = {} if attack == "knapsack" else {"steps": 10}
        counts.clear()
        build(attack, **options)(network, x, y, ThreatModel(2, norm, DELTA[norm]), context)
        return row(counts, what="evaluation", attack=attack, norm=norm, processes=processes)


def row(counts: Counts, **about: Any) -> dict[str, Any]:
    """One row of the record."""
    waits, kernels, collectives = counts.totals()
    lines = {f"{line} {kind}": count for (line, kind), count in counts.waits.most_common(12)}
    return {**about, "waits": waits, "kernels": kernels, "collectives": collectives, "lines": lines}


def main() -> None:
    """Count, print, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common(parser, "waits")
    parser.add_argument("--inner-steps", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--images", type=int, default=64, help="images of an evaluation")
    parser.add_argument("--label", default="after", help="under which the counts stand in the record (%(default)s)")
    options = parser.parse_args()
    rows = []
    for norm in DELTA:
        for processes in (1, 2):
            rows += [training(a, norm, options.inner_steps, options.batch_size, processes) for a in TRAINING]
            rows += [evaluation(a, norm, options.images, processes) for a in EVALUATION]
    runs = json.loads(options.output.read_text())["runs"] if options.output.exists() else {}
    runs[options.label] = rows
    table = Printed("", "attack", "norm", "processes", *(f"waits {name}" for name in runs), "collectives",
                    title=f"{options.inner_steps} inner steps")  # fmt: skip
    for number, found in enumerate(rows):
        about = [str(found[key]) for key in ("what", "attack", "norm", "processes")]
        waits = [str(some[number]["waits"]) for some in runs.values()]
        table.add_row(*about, *waits, " ".join(str(some[number]["collectives"]) for some in runs.values()))
    CONSOLE.print(table)
    write("waits", options, "pretended cuda", {"runs": runs})


if __name__ == "__main__":
    with readable_errors():
        main()
