"""What a pool of 100 million synthetic images costs a training, against one of 50,000: time and memory.

    python -m benchmarks.pool [--count 100000000] [--against 50000] [--folder DIR]

Both pools are files whose images are a hole (benchmarks/sparse.py), so that 307 GB take no room: the same code runs and
the system fills as many new pages, but the disk has nothing to fetch. What a disk adds is measured on a smaller pool of
real bytes (--real images), which is dropped from memory before each batch.

loading    a batch of originals and synthetic images, read and augmented
step       the same, and a W-DAT step on it: attack, loss, backward, update

Both pools take their turns, round by round. Resident memory is the process's own (VmRSS) while batches are loaded.
"""

from __future__ import annotations

import argparse
import copy
import os
import re
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track
from rich.table import Table as Printed
from torch import nn

from benchmarks.common import CONSOLE, add_common, add_real, images, seconds, spread, write
from benchmarks.sparse import CLASSES, sparse_pool
from wdat import ThreatModel
from wdat.attacks import build
from wdat.cli.console import readable_errors
from wdat.data import ImageDataModule
from wdat.data.batch import Batch
from wdat.distributed import ALONE
from wdat.models import load_network, prepare
from wdat.objectives import WDAT
from wdat.sensitivity import Table, with_pool
from wdat.training.module import WDATModule
from wdat.training.schedulers import Constant

MEGABYTE = 1 << 20


def resident() -> float:
    """Memory of this process, in MB."""
    status = Path("/proc/self/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    assert found
    return int(found[1]) * 1024 / MEGABYTE


def forever(data: ImageDataModule) -> Iterator[Batch]:
    """The batches of training, epoch after epoch."""
    loader = data.train_dataloader()
    while True:
        yield from loader
        loader.plan.set_epoch(loader.plan.epoch + 1)


def trained(network: nn.Module, data: ImageDataModule, inner: int, seed: int) -> Any:
    """A training step on a copy of the network, its estimator filled."""
    attack = build("wpgd_budget", loss="kl", steps=inner, step_size=0.25, radius_max=4.0)
    threat = ThreatModel(2, "linf", 2 / 255)
    assert data.pool
    sensitivity = with_pool(Table(), data.pool, data.pool_share, data.synthetic.sample, data.synthetic.every)
    network = copy.deepcopy(network)
    module = WDATModule(network, WDAT(), attack, threat, sensitivity, torch.optim.SGD, Constant(), None, seed)
    module.log = lambda *arguments, **options: None  # type: ignore[method-assign]
    sensitivity.begin(data.n_train, threat.q, seed, ALONE)
    wanted = sensitivity.wanted(0)
    assert wanted is not None
    sensitivity.measured(wanted, torch.ones(len(wanted)))
    module.train()
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-4, momentum=0.9)

    def step(batch: Batch) -> None:
        loss = module.training_step(batch, 0)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def compare(both: list[ImageDataModule], network: nn.Module, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a batch with each pool, loaded alone and trained on, and ratios within rounds.

    On a machine with other work the processor's seconds say more than the clock's; here the disk is never waited for.
    """
    steps = [trained(network, data, options.inner_steps, options.seed) for data in both]
    streams = [forever(data) for data in both]

    def load(k: int, count: int) -> None:
        for _ in range(count):
            next(streams[k])

    def train(k: int, count: int) -> None:
        for _ in range(count):
            steps[k](next(streams[k]))

    found = {}
    for kind, work, count in (("loading", load, options.loads), ("step", train, options.steps)):
        times: dict[str, list[list[float]]] = {"clock": [[], []], "processor": [[], []]}
        for k in (0, 1):
            work(k, count)  # warms up
        for turn in track(range(options.rounds), kind, transient=True):
            for k in (0, 1) if turn % 2 else (1, 0):
                before = time.process_time()
                times["clock"][k].append(seconds(partial(work, k, count)) / count)
                times["processor"][k].append((time.process_time() - before) / count)
        found[kind] = {
            name: {
                "large": spread(large),
                "small": spread(small),
                "ratio": spread([mine / theirs for mine, theirs in zip(large, small, strict=True)]),
            }
            for name, (large, small) in times.items()
        }
    return found


def memory(data: ImageDataModule, batches: int, points: int) -> list[dict[str, float]]:
    """Resident memory as batches are loaded."""
    stream, found = forever(data), []
    for point in track(range(points + 1), "memory", transient=True):
        if point:
            for _ in range(batches // points):
                next(stream)
        found.append({"batches": point * (batches // points), "resident_mb": resident()})
    return found


def fetched(folder: Path, count: int, options: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds to read a batch's rows of a pool of real bytes: from the disk, one by one too, and from memory."""
    path = folder / "real.npz"
    rng = np.random.default_rng(options.seed)
    some = rng.integers(0, 256, (1 << 16, 32, 32, 3), dtype=np.uint8)
    np.savez(path, image=np.concatenate([some] * max(1, count >> 16)), label=np.zeros(max(1, count >> 16) << 16, int))
    data = pooled(path, options)
    pool, file = data.pool, os.open(path, os.O_RDONLY)
    assert pool
    os.fsync(file)
    size = round(data.pool_share * options.batch_size)
    times: dict[str, list[float]] = {"disk": [], "disk, one by one": [], "memory": []}
    for turn in range(30):
        rows = torch.randint(len(pool), (size,), generator=torch.Generator().manual_seed(turn))
        for kind in times:
            if kind != "memory":
                os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            parts = rows.split(1) if kind == "disk, one by one" else [rows]
            started = time.perf_counter()
            for part in parts:
                pool.read(part)
            times[kind].append(1000 * (time.perf_counter() - started))
    os.close(file)
    path.unlink()
    return {"images": len(pool), "rows": size, "milliseconds": {kind: spread(values) for kind, values in times.items()}}


def pooled(path: Path, options: argparse.Namespace) -> ImageDataModule:
    """The originals with a pool."""
    chosen = {"path": path, "fraction": options.fraction}
    return images(options.data, options.images, options.batch_size, options.seed, synthetic=chosen)


def main() -> None:
    """Measure, print, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common(parser, "pool")
    add_real(parser)
    parser.add_argument("--images", type=int, default=4000, help="originals")
    parser.add_argument("--count", type=int, default=100_000_000, help="synthetic images of the large pool")
    parser.add_argument("--against", type=int, default=50_000, help="of the small one")
    parser.add_argument("--real", type=int, default=500_000, help="of the pool of real bytes; 0 for none")
    parser.add_argument("--folder", type=Path, help="where the pools are written; by default a temporary one")
    parser.add_argument("--fraction", type=float, default=0.7)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--inner-steps", type=int, default=10)
    parser.add_argument("--loads", type=int, default=20, help="batches loaded in a round")
    parser.add_argument("--steps", type=int, default=1, help="steps in a round")
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--batches", type=int, default=5000, help="loaded while memory is watched")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        for kind, count in (("large", options.count), ("small", options.against)):
            sparse_pool(folder / f"{kind}.npz", count)
        files = {kind: (folder / f"{kind}.npz").stat() for kind in ("large", "small")}
        opening = seconds(lambda: pooled(folder / "large.npz", options))
        both = [pooled(folder / f"{kind}.npz", options) for kind in ("large", "small")]
        network = load_network(options.network, checkpoint=options.checkpoint)
        prepare(network)
        watched = memory(both[0], options.batches, 10)
        times = compare(both, network, options)
        disk = fetched(folder, options.real, options) if options.real else None
    row = {
        "images": options.count,
        "gigabytes": files["large"].st_size / 1e9,
        "gigabytes_on_disk": files["large"].st_blocks * 512 / 1e9,
        "classes": CLASSES,
        "seconds_to_open": opening,
        "memory": watched,
        **times,
    }
    table = Printed("per batch", "large pool, ms", "small pool, ms", "ratio", "min", "max", title=f"{options.count:,}")
    for kind, measured in times.items():
        for name, found in measured.items():
            ms = [f"{1000 * found[pool]['median']:.2f}" for pool in ("large", "small")]
            table.add_row(f"{kind}, by the {name}", *ms, *(f"{v:.3f}" for v in found["ratio"].values()))
    CONSOLE.print(table)
    CONSOLE.print(f"resident memory, MB: {[round(point['resident_mb'], 1) for point in watched]}", markup=False)
    CONSOLE.print(f"opened in {opening:.2f} s", f"from a disk: {disk}", markup=False)
    write("pool", options, torch.device("cpu"), {"row": row, "disk": disk})


if __name__ == "__main__":
    with readable_errors():
        main()
