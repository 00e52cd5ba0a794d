"""W-PGD against a plain loop of forward and backward passes over the same images.

    python -m benchmarks.attack [--network resnet2b] [--images 1024] [--steps 50] [--rounds 5]

The ratio of 1 would mean that sharing one budget, projecting, verifying and remembering the best iterate cost nothing.
Both are timed in turn, round by round, on the machine at hand; weights and images are random, since speed doesn't
depend on them.
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial

import torch
from rich.progress import track
from rich.table import Table

from benchmarks.common import CONSOLE, add_common, seconds, spread, write
from wdat import ThreatModel, attack
from wdat.gradients import undisturbed
from wdat.losses import cross_entropy
from wdat.models import load_network


def plain(network: torch.nn.Module, x: torch.Tensor, y: torch.Tensor, steps: int, batch_size: int) -> None:
    """The passes that W-PGD can't do without: K forward and backward ones over all images, and a forward one."""
    with undisturbed(network):
        for _ in range(steps):
            for i in range(0, len(x), batch_size):
                images = x[i : i + batch_size].requires_grad_(True)
                torch.autograd.grad(cross_entropy(network(images), y[i : i + batch_size]).sum(), images)
        with torch.no_grad():
            for i in range(0, len(x), batch_size):
                network(x[i : i + batch_size])


def main() -> None:
    """Measure, print, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="resnet2b")
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=256)
    add_common(parser, "attack")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = load_network(options.network).to(device)
    torch.manual_seed(options.seed)
    x, y = torch.rand(options.images, 3, 32, 32, device=device), torch.randint(10, (options.images,), device=device)
    work = options.images * options.steps
    rows, table = [], Table("norm", "plain, images × steps / s", "W-PGD", "ratio (median)", "min", "max")
    for norm in ("linf", "l2"):
        threat = ThreatModel(2, norm, 8 / 255)
        pairs = []
        for _ in track(range(options.rounds + 1), f"{options.network}, {norm}", transient=True):
            loop = seconds(lambda: plain(network, x, y, options.steps, options.batch_size))
            ours = seconds(
                partial(attack, network, x, y, threat, "wpgd", steps=options.steps, batch_size=options.batch_size)
            )
            pairs.append((loop, ours))
        pairs = pairs[1:]  # the first warms up
        ratios = [loop / ours for loop, ours in pairs]
        row = {
            "norm": norm,
            "plain": work / statistics.median(loop for loop, _ in pairs),
            "wpgd": work / statistics.median(ours for _, ours in pairs),
            "ratio": spread(ratios),
        }
        rows.append(row)
        rates = [f"{row[k]:,.0f}" for k in ("plain", "wpgd")]
        table.add_row(norm, *rates, *(f"{v:.3f}" for v in spread(ratios).values()))
    CONSOLE.print(table)
    write("attack", options, device, {"rows": rows})


if __name__ == "__main__":
    main()
