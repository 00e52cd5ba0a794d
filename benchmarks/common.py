"""What the benchmarks share: the clock, the real networks and images, and where records go."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from wdat.data import ImageDataModule
from wdat.errors import SettingError
from wdat.records import installed_versions, source_commit

CONSOLE = Console()
SHARED = Path(os.environ.get("WDAT_SHARED", Path(__file__).parents[2] / "shared"))


def add_common(parser: argparse.ArgumentParser, name: str) -> None:
    """The options that all benchmarks have."""
    parser.add_argument("--output", type=Path, default=Path(f"results/{name}.json"), help="the record (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)


def add_real(parser: argparse.ArgumentParser) -> None:
    """The options that name a real network and real images."""
    parser.add_argument("--network", default="resnet2b")
    parser.add_argument(
        "--checkpoint", type=Path, default=SHARED / "models/resnet2b.pt", help="its weights (%(default)s)"
    )
    parser.add_argument(
        "--data", type=Path, default=SHARED / "data/cifar10_subset.npz", help="images, npz (%(default)s)"
    )


def images(path: Path, count: int, batch_size: int, seed: int, **settings: Any) -> ImageDataModule:
    """`count` training images of an npz file, augmented by crops and flips, with further settings of the data.

    Raises:
        SettingError: If there is no such file, or it holds too few.
    """
    if not path.exists():
        raise SettingError(f"--data={path} does not exist; name an npz file with x_train, y_train, x_test, y_test")
    whole = ImageDataModule("npz", 10, path=path, val_size=1, seed=seed)
    whole.setup()
    held = whole.n_train + 1 - count
    if held < 1:
        raise SettingError(f"--images={count} is more than the {whole.n_train} training images of {path}")
    data = ImageDataModule("npz", 10, path=path, val_size=held, batch_size=batch_size, seed=seed, **settings)
    data.setup()
    return data


def synchronize() -> None:
    """Wait for the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(work: Callable[[], object]) -> float:
    """Wall-clock time of a call, the device's work included."""
    synchronize()
    started = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - started


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and range."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def write(name: str, options: argparse.Namespace, device: object, tables: dict[str, Any]) -> None:
    """Write the record of a benchmark.

    Args:
        name: Of the benchmark.
        options: Its settings; paths are kept by name only.
        device: What it ran on.
        tables: Rows by the name of their table.
    """
    settings = {k: v.name if isinstance(v, Path) else v for k, v in vars(options).items() if k != "output"}
    about = {"benchmark": name, "device": str(device), "threads": torch.get_num_threads(), "settings": settings}
    record = {**about, **tables, "commit": source_commit(), "versions": installed_versions()}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(record, indent=1) + "\n")
    CONSOLE.print(f"record {options.output}", markup=False)
