"""The time of one W-DAT step against one TRADES step with as many inner steps, all in one run.

    python -m benchmarks.step [--norms linf l2] [--rounds 9] [--batch-size 128] [--inner-steps 10]
    python -m benchmarks.step --network wrn_28_10 --random --batch-size 512 --precision bf16 --channels-last

Steps of a training of ours without the loop around it: attack, loss, backward, update; batches are read beforehand.
What the loop adds (Lightning, the loader, the averaging of weights) is measured last, on W-DAT with CE radii.

trades, as usual   TRADES as it is commonly written: the natural logits anew in every inner step, and twice for the loss
trades             ours, `objective=trades`
wdat, ce           `objective=wdat attack=wpgd_budget sensitivity=table`, radii from CE gradients
wdat, redlr        the same with ReDLR radii: zero on misclassified images, which then take no inner steps

All start from the same weights and take their steps in turn, round by round, so that the ratios hold where the
machine's speed drifts; after `--minutes` no further round begins. The model's FLOPs are counted and set against a
matrix product measured in the same run.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import track
from rich.table import Table as Printed
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from benchmarks.common import CONSOLE, add_common, add_real, images, seconds, spread, write
from benchmarks.whole_loop import loop, random_images
from wdat import ThreatModel
from wdat.attacks import build
from wdat.cli.console import readable_errors
from wdat.data import ImageDataModule
from wdat.data.batch import Batch
from wdat.distributed import ALONE
from wdat.gradients import undisturbed
from wdat.models import accelerate, load_network, prepare
from wdat.objectives import TRADES, WDAT
from wdat.sensitivity import Table
from wdat.threat import contract, direction
from wdat.training.module import WDATModule
from wdat.training.schedulers import Constant

DELTA = {"linf": 2 / 255, "l2": 0.25}
BETA, STEP_SIZE, NOISE = 6.0, 0.25, 0.001
ALL = ("trades, as usual", "trades", "wdat, ce", "wdat, redlr")
Step = Callable[[Batch], Any]


def usual_trades(network: nn.Module, threat: ThreatModel, inner: int, precision: torch.dtype) -> Step:
    """A training step written as in the public code of TRADES (Zhang et al. 2019)."""
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-4, momentum=0.9)
    length = STEP_SIZE * threat.delta

    def step(batch: Batch) -> None:
        x, y = batch.x, batch.y
        radii = x.new_full((len(x),), threat.delta)
        network.eval()
        z = x + NOISE * torch.randn_like(x)
        for _ in range(inner):
            z.requires_grad_()
            with torch.autocast(x.device.type, precision, enabled=precision != torch.float32):
                natural = F.softmax(network(x), dim=1)
                loss = F.kl_div(F.log_softmax(network(z), dim=1), natural, reduction="sum")
            gradient = torch.autograd.grad(loss, [z])[0]
            z = z.detach() + length * direction(gradient.detach(), threat.norm)
            z = contract(x, z, radii, threat.norm).clamp(0, 1)
        network.train()
        optimizer.zero_grad()
        with torch.autocast(x.device.type, precision, enabled=precision != torch.float32):
            loss = F.cross_entropy(network(x), y)
            natural = F.softmax(network(x), dim=1)
            loss = loss + BETA * F.kl_div(F.log_softmax(network(z), dim=1), natural, reduction="batchmean")
        loss.backward()
        optimizer.step()

    return step


def ours(module: WDATModule, batches: list[Batch], n_train: int, precision: torch.dtype) -> Step:
    """A training step of a module without the trainer around it; its table is filled from the batches at hand."""
    optimizer = torch.optim.SGD(module.network.parameters(), lr=1e-4, momentum=0.9)
    module.log = lambda *arguments, **options: None  # type: ignore[method-assign]
    module.sensitivity.begin(n_train, module.threat.q, 0, ALONE)
    assert module.attack is not None
    norms = torch.ones(n_train)
    with undisturbed(module.network):
        for batch in batches:
            norms[batch.index.cpu()] = (
                module.attack.norms(module.network, batch.x, batch.y, module.threat).float().cpu()
            )
    module.sensitivity.measured(torch.arange(n_train), norms)
    module.train()

    def step(batch: Batch) -> dict[str, Any]:
        with torch.autocast(batch.x.device.type, precision, enabled=precision != torch.float32):
            outputs = module.training_step(batch, 0)
        optimizer.zero_grad()
        outputs["loss"].backward()
        optimizer.step()
        return outputs

    return step


def make(
    kind: str, network: nn.Module, threat: ThreatModel, inner: int, batches: list[Batch], n_train: int, options: Any
) -> tuple[Step, WDATModule | None]:
    """One of `ALL`, on a copy of the network."""
    network = copy.deepcopy(network)
    accelerate(network, options.channels_last, options.compile)
    precision = torch.bfloat16 if options.precision == "bf16" else torch.float32
    if kind == "trades, as usual":
        return usual_trades(network, threat, inner, precision), None
    pgd = build("pgd", loss="kl", steps=inner, step_size=STEP_SIZE)
    objective = TRADES(beta_p=BETA, pointwise_attack=pgd) if kind == "trades" else WDAT(beta_w=BETA)
    loss = "redlr" if kind == "wdat, redlr" else "ce"
    attack = build("wpgd_budget", loss="kl", radii_loss=loss, steps=inner, step_size=STEP_SIZE, radius_max=4.0)
    module = WDATModule(
        network, objective, attack, threat, Table(), torch.optim.SGD, Constant(), seed=options.seed, notify=print
    )
    module.to(batches[0].x.device)
    return ours(module, batches, n_train, precision), module


def compare(
    network: nn.Module,
    threat: ThreatModel,
    inner: int,
    batches: list[Batch],
    n_train: int,
    options: Any,
    rounds: int,
    until: float,
) -> dict[str, Any]:
    """Seconds a step of each kind, and ratios within rounds, of which none but the first begins after a time."""
    made = {kind: make(kind, network, threat, inner, batches, n_train, options) for kind in options.kinds}

    def go(step: Step) -> None:
        for batch in batches:
            step(batch)

    def zero_radii(step: Step) -> float | None:
        results = [step(batch)["attack_result"] for batch in batches]
        if results[0] is None:
            return None
        return sum(float((result.radii == 0).float().mean()) for result in results) / len(results)

    for step, _ in made.values():
        go(step)  # warms up
    times: dict[str, list[float]] = {kind: [] for kind in made}
    for number in range(rounds):
        if number and time.monotonic() > until:
            break
        for kind, (step, _) in made.items():
            times[kind].append(seconds(partial(go, step)) / len(batches))
    row: dict[str, Any] = {
        "norm": threat.norm,
        "batch_size": len(batches[0].y),
        "inner_steps": inner,
        "seconds": {kind: spread(values) for kind, values in times.items()},
        "ratios": {},
        "zero_radii": {},
    }
    for kind, (step, module) in made.items():
        if module is None:
            continue
        if (share := zero_radii(step)) is not None:
            row["zero_radii"][kind] = share
        for other in ("trades", "trades, as usual"):
            if other in times and kind != other:
                pairs = zip(times[kind], times[other], strict=True)
                row["ratios"][f"{kind} / {other}"] = spread([mine / theirs for mine, theirs in pairs])
    return row


class Flops(TorchDispatchMode):
    """Counts the FLOPs of matrix products and convolutions by PyTorch's own formulas.

    PyTorch's `FlopCounterMode` also follows modules, by hooks that `autograd.grad` with respect to a leaf refuses.
    """

    total = 0.0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if function._overloadpacket in flop_registry:
            self.total += flop_registry[function._overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


def flops(
    network: nn.Module, threat: ThreatModel, batches: list[Batch], n_train: int, options: Any
) -> dict[str, float]:
    """FLOPs of one step by kind, and the rate of a matrix product in the same precision, in FLOP/s."""
    found = {}
    plain = argparse.Namespace(**{**vars(options), "compile": False})
    for kind in options.kinds:
        step, _ = make(kind, network, threat, options.inner_steps, batches, n_train, plain)
        with Flops() as counter:
            step(batches[0])
        found[kind] = counter.total
    device = batches[0].x.device
    size = 8192 if device.type == "cuda" else 1024
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16 if options.precision == "bf16" else torch.float32)

    def product() -> None:
        for _ in range(10):
            a @ a

    product()
    found["matrix product a second"] = 10 * 2 * size**3 / min(seconds(product) for _ in range(5))
    return found


def training_set(options: Any, batch_size: int) -> ImageDataModule:
    """Real images, or random ones."""
    if not options.random:
        return images(options.data, options.images, batch_size, options.seed)
    source = random_images(max(options.images, batch_size), options.seed)
    data = ImageDataModule(source, 10, val_size=1, batch_size=batch_size, seed=options.seed)
    data.setup()
    return data


def read(options: Any, batch_size: int, count: int, device: torch.device) -> tuple[list[Batch], int]:
    """Batches of real or random images, and how many images the training set has."""
    data = training_set(options, batch_size)
    loader = iter(data.train_dataloader())
    batches = [next(loader) for _ in range(max(1, min(count, data.n_train // batch_size)))]
    moved = [b._replace(x=b.x.to(device), y=b.y.to(device), index=b.index.to(device)) for b in batches]
    return moved, data.n_train


def whole(network: nn.Module, threat: ThreatModel, batches: list[Batch], n_train: int, options: Any) -> dict[str, Any]:
    """What the loop around the step adds, for W-DAT with CE radii."""
    common = (threat, options.inner_steps, batches, n_train, options)
    step, _ = make("wdat, ce", network, *common)
    _, module = make("wdat, ce", network, *common)
    assert module is not None
    del module.log  # the trainer's own again
    module.sensitivity = Table()
    steps = len(batches)

    def bare() -> float:
        return seconds(lambda: [step(batch) for batch in batches]) / steps

    bare()  # warms up
    data = training_set(options, options.batch_size)
    precision = "bf16-mixed" if options.precision == "bf16" else "32-true"
    return loop(module, data, bare, min(options.rounds, 5), steps, precision)


def milliseconds(row: dict[str, Any], kind: str) -> str:
    """Median time of a step."""
    return f"{1000 * row['seconds'][kind]['median']:.1f}"


def main() -> None:
    """Measure, print, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common(parser, "step")
    add_real(parser)
    parser.add_argument("--random", action="store_true", help="fresh weights and random images")
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--norms", nargs="+", choices=sorted(DELTA), default=["linf", "l2"])
    parser.add_argument("--kinds", nargs="+", choices=ALL, default=list(ALL))
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--inner-steps", type=int, default=10)
    parser.add_argument("--batches", type=int, default=8, help="steps of each kind in a round")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--minutes", type=float, default=8, help="after which no further round begins (%(default)s)")
    parser.add_argument("--grow-batch", type=int, nargs="*", default=[32, 64, 128, 256, 512])
    parser.add_argument("--grow-steps", type=int, nargs="*", default=[1, 2, 5, 10, 20])
    parser.add_argument("--precision", choices=["32", "bf16"], default="32")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batches, n_train = read(options, options.batch_size, options.batches, device)
    network = load_network(options.network, checkpoint=None if options.random else options.checkpoint)
    prepare(network)
    network.to(device)
    rows: list[dict[str, Any]] = []
    started, budget = time.monotonic(), 60 * options.minutes
    for number, norm in enumerate(track(options.norms, "steps", transient=True), 1):
        threat = ThreatModel(2, norm, DELTA[norm])
        until = started + 0.5 * budget * number / len(options.norms)
        rows.append(compare(network, threat, options.inner_steps, batches, n_train, options, options.rounds, until))
    threat = ThreatModel(2, options.norms[0], DELTA[options.norms[0]])
    around = whole(network, threat, batches, n_train, options)
    grown: list[dict[str, Any]] = []
    sizes = [(b, options.inner_steps) for b in options.grow_batch]
    sizes += [(options.batch_size, k) for k in options.grow_steps]
    for size, inner in track(sizes, "growth", transient=True):
        if time.monotonic() > started + budget:
            break
        some, count = read(options, size, 4, device)
        grown.append(compare(network, threat, inner, some, count, options, 3, started + budget))
    counted = flops(network, threat, batches, n_train, options)

    table = Printed("ratio of the time of a step", "norm", "median", "min", "max", title=f"{options.network}, {device}")
    for row in rows:
        for name, values in row["ratios"].items():
            table.add_row(name, row["norm"], *(f"{v:.3f}" for v in values.values()))
        for kind, share in row["zero_radii"].items():
            table.add_row(f"[dim]{kind}: images with radius zero", row["norm"], f"[dim]{100 * share:.0f} %", "", "")
    CONSOLE.print(table)
    table = Printed("batch", "inner steps", *(f"{kind}, ms" for kind in options.kinds), title="growth")
    for row in grown:
        table.add_row(str(row["batch_size"]), str(row["inner_steps"]), *(milliseconds(row, k) for k in options.kinds))
    CONSOLE.print(table)
    table = Printed("kind", "images / s", "GFLOP a step", "GFLOP/s", "% of a matrix product", title=options.norms[0])
    for kind in options.kinds:
        pace = counted[kind] / rows[0]["seconds"][kind]["median"]
        share = 100 * pace / counted["matrix product a second"]
        speed = options.batch_size / rows[0]["seconds"][kind]["median"]
        table.add_row(kind, f"{speed:,.0f}", f"{counted[kind] / 1e9:.2f}", f"{pace / 1e9:,.1f}", f"{share:.1f}")
    CONSOLE.print(table)
    rate = options.batch_size / around["seconds"]["median"]
    CONSOLE.print(f"the whole loop, wdat, ce: {around['ratio']:.3f} times the bare step, {rate:,.0f} images / s")
    write("step", options, device, {"rows": rows, "growth": grown, "flops": counted, "loop": around})


if __name__ == "__main__":
    with readable_errors():
        main()
