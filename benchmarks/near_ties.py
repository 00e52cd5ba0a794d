"""How much of the budget near ties of the logits would take, were radii not capped.

    python -m benchmarks.near_ties [--network resnet2b] [--checkpoint FILE] [--data FILE.npz]

The test images of an npz file, p = 2, sensitivity radii δ_i = δ n_i/Υ over all of them. The share of the budget of an
image is δ_i²/(N δ²), whatever the budget is; its gap is that between its largest and its third largest logit, by which
ReDLR divides.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from benchmarks.common import CONSOLE, add_common, add_real, write
from wdat import ThreatModel
from wdat.attacks.allocation import sensitivity_radii
from wdat.cli.console import readable_errors
from wdat.data import ImageDataModule
from wdat.errors import SettingError
from wdat.gradients import input_gradients, undisturbed
from wdat.losses import LOSSES
from wdat.models import load_network
from wdat.threat import dual_norm, power_mean


def evaluation_images(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """The test images of an npz file, in [0, 1], and their labels.

    Raises:
        SettingError: If there is no such file.
    """
    if not path.exists():
        raise SettingError(f"--data={path} does not exist; name an npz file with x_train, y_train, x_test, y_test")
    data = ImageDataModule("npz", 10, path=path, val_size=1)
    data.setup()
    batches = list(data.test_dataloader())
    return torch.cat([batch.x for batch in batches]), torch.cat([batch.y for batch in batches])


def division(network: torch.nn.Module, x: torch.Tensor, y: torch.Tensor, loss: str, norm: str) -> dict[str, Any]:
    """Who takes the budget of one loss in one norm: the largest radius and share, in units of δ and of the budget."""
    threat = ThreatModel(2, norm, 1.0)
    with undisturbed(network):
        found = input_gradients(network, x, y, LOSSES[loss])
    norms = dual_norm(found.gradient, norm)
    radii = sensitivity_radii(norms, power_mean(norms, threat.q), threat.q, threat.delta)
    shares = (radii.double() ** 2 / len(x)).sort(descending=True)
    top = found.logits.topk(3).values
    gaps = top[:, 0] - top[:, 2]
    return {
        "loss": loss, "norm": norm, "n": len(x), "share": float(shares.values[0]), "radius": float(radii.max()),
        "second": float(shares.values[1]), "half": int((shares.values.cumsum(0) < 0.5).sum()) + 1,
        "gap": float(gaps[shares.indices[0]]), "median_gap": float(gaps.median()),
    }  # fmt: skip


def main() -> None:
    """Measure, print, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common(parser, "near_ties")
    add_real(parser)
    options = parser.parse_args()
    x, y = evaluation_images(options.data)
    network = load_network(options.network, checkpoint=str(options.checkpoint)).eval()
    rows = [division(network, x, y, loss, norm) for loss in ("redlr", "ce") for norm in ("linf", "l2")]
    table = Table(
        "loss", "norm", "largest radius, δ", "its share, %", "second, %", "images of half", "gap", "median gap"
    )
    for row in rows:
        shares = [f"{100 * row[key]:.1f}" for key in ("share", "second")]
        gaps = [f"{row[key]:.3g}" for key in ("gap", "median_gap")]
        table.add_row(row["loss"], row["norm"], f"{row['radius']:.1f}", *shares, str(row["half"]), *gaps)
    CONSOLE.print(table)
    write("near_ties", options, "cpu", {"rows": rows})


if __name__ == "__main__":
    with readable_errors():
        main()
