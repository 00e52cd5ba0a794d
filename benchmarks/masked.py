"""What the search behind the knapsack finds on networks that mask their gradients, beside AutoAttack.

    python -m benchmarks.masked [--images 48] [--show]  # a quarter of an hour on one core

One robust network is changed in ways that leave its answers, or nearly, and mislead whoever follows its gradients. Each
is measured pointwise (p = inf), where AutoAttack's APGD-CE and Square, which asks for no gradient, may be compared with
the points that the three efforts of the search find.
"""

from __future__ import annotations

import argparse
import json
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn

import wdat
from benchmarks.common import CONSOLE, add_common, add_real, write
from benchmarks.near_ties import evaluation_images
from wdat.attacks.search import EFFORTS
from wdat.cli.console import readable_errors
from wdat.models import load_network

MASKS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "as it is": (lambda x: x, lambda logits: logits),
    "logits × 10,000": (lambda x: x, lambda logits: 1e4 * logits),
    "softmax of 50 × logits": (lambda x: x, lambda logits: (50 * logits).softmax(1)),
    "input rounded to 8 bits": (lambda x: (255 * x).round() / 255, lambda logits: logits),
    "logits rounded to quarters": (lambda x: x, lambda logits: (4 * logits).round() / 4),
}
"""By name: what is done to images and to logits."""

AUTOATTACK = {"version": "custom", "attacks_to_run": ("apgd-ce", "square")}


class Masked(nn.Module):
    """A network between two functions.

    Args:
        inner: Takes images in [0, 1], gives logits.
        mask: A name in `MASKS`.
    """

    def __init__(self, inner: nn.Module, mask: str) -> None:
        super().__init__()
        self.inner = inner
        self.before, self.after = MASKS[mask]

    def forward(self, x: Tensor) -> Tensor:
        """What takes the place of logits (N, K)."""
        return self.after(self.inner(self.before(x)))


def measured(inner: nn.Module, mask: str, x: Tensor, y: Tensor, delta: float) -> dict[str, Any]:
    """Accuracies of one network, images without any point by effort, and what was said."""
    network = Masked(inner, mask)
    threat = wdat.ThreatModel(math.inf, "linf", delta)
    row: dict[str, Any] = {"network": mask, "n": len(x), "accuracy": {}, "unfound": {}, "warned": {}}
    for effort in EFFORTS:
        options: dict[str, dict[str, Any]] = {"knapsack": {"effort": effort}, "autoattack": AUTOATTACK}
        attacks = ["knapsack", *["autoattack"][: effort == "quick"]]
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            records = wdat.evaluate(network, [(x, y)], threat, attacks, options=options)
        row["accuracy"] |= {"clean": records[0].accuracy, effort: records[1].accuracy}
        if len(records) > 2:
            row["accuracy"]["autoattack"] = records[2].accuracy
        row["unfound"][effort] = records[1].details["unfound"]
        texts = [str(warning.message) for warning in said]
        known = {"no point": "no misclassified point was found", "autoattack": "the search missed points"}
        row["warned"][effort] = [name for name, words in known.items() if any(words in text for text in texts)]
    return row


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table of docs/evaluate.md."""
    columns = ("clean", *EFFORTS, "autoattack")
    head = ["network", "clean", *(f"`{effort}`" for effort in EFFORTS), "AutoAttack"]
    lines = [head, ["---"] * len(head)]
    lines += [[row["network"], *(f"{100 * row['accuracy'][name]:.1f}" for name in columns)] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    """Measure, print, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common(parser, "masked")
    add_real(parser)
    parser.add_argument("--images", type=int, default=48, help="the first ones")
    parser.add_argument("--delta", type=float, default=4, help="budget in 1/255, l∞")
    parser.add_argument("--masks", nargs="+", choices=MASKS, default=list(MASKS), metavar="MASK")
    parser.add_argument("--show", action="store_true", help="print the table of the record in Markdown and stop")
    options = parser.parse_args()
    if options.show:
        print(markdown(json.loads(options.output.read_text())["rows"]))
        return
    x, y = (t[: options.images] for t in evaluation_images(options.data))
    inner = load_network(options.network, checkpoint=str(options.checkpoint)).eval()
    table, rows = Table("network", "clean", *EFFORTS, "AutoAttack", "warned of"), []
    for mask in options.masks:
        torch.manual_seed(options.seed)
        rows.append(row := measured(inner, mask, x, y, options.delta / 255))
        figures = [f"{100 * row['accuracy'][name]:.1f}" for name in ("clean", *EFFORTS, "autoattack")]
        table.add_row(mask, *figures, "; ".join(f"{k}: {', '.join(v)}" for k, v in row["warned"].items() if v))
    CONSOLE.print(table)
    write("masked", options, "cpu", {"rows": rows})


if __name__ == "__main__":
    with readable_errors():
        main()
