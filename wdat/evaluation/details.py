"""What a record's `details` hold, for tables and pictures that are made from records only.

| key | of | value |
| --- | --- | --- |
| `histogram` | every attack | `{"edges": [...], "counts": [...]}`: images by how far they were moved, pixel units |
| `examples` | every attack | up to 6 images, those moved furthest, each with the keys of `examples` below |
| `bound` | `knapsack`, `certified` | `"upper"` or `"lower"` bound of A_δ |
| `critical_distance` | `knapsack`, `certified` | d*(δ), the largest distance paid for |
| `curve` | `knapsack`, `certified` | `[[δ, accuracy], ...]` from one sort |
| `effort` | `knapsack` | `[[passes, accuracy], ...]`: forward and backward, an attacked image, counted in the network |
| `valid_up_to` | `knapsack` | the largest budget, of the record's order, that the search was made for; null for all |
| `pointwise_accuracy` | `knapsack` | what the same points leave at p = inf with the same budget |
| `moved` | `knapsack` | images that are attacked, the fractional one included |
| `materialised` | `knapsack` | `{"accuracy", "distance"}` of the whole images among them, verified by forward passes |
"""

from __future__ import annotations

import base64
import io
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from wdat.attacks import AttackResult
from wdat.distributed import ALONE, Processes
from wdat.gradients import forward, undisturbed


def pictures(
    network: nn.Module,
    x: Tensor,
    y: Tensor,
    result: AttackResult,
    batch_size: int,
    rows: Tensor,
    processes: Processes = ALONE,
) -> dict[str, Any]:
    """`histogram` and `examples` of one attack.

    Args:
        network: Gives the classes shown with the examples; left as it was found.
        x: Images (N, C, H, W), this process's part.
        y: Labels (N,).
        result: What became of them.
        batch_size: Images per pass.
        rows: (N,), where the images stand in the whole set.
        processes: Hold the other parts.
    """
    with undisturbed(network):
        before, after = (forward(network, images, batch_size).argmax(1) for images in (x, result.x_adv))
    counts = histogram(result.distances, processes=processes)
    return {"histogram": counts, "examples": examples(x, y, result, before, after, rows, processes)}


def histogram(distances: Tensor, bins: int = 40, processes: Processes = ALONE) -> dict[str, list[float]]:
    """Images by how far they were moved.

    Args:
        distances: (N,), finite, in pixel units, this process's part.
        bins: Number of equal bins from 0 to the largest distance.
        processes: Hold the other parts.
    """
    d = distances.detach().double().cpu()
    largest = processes.max(float(d.max()) if len(d) else 0.0)
    edges = torch.linspace(0, largest or 1.0, bins + 1, dtype=torch.float64)
    return {"edges": edges.tolist(), "counts": processes.sum(torch.histogram(d, edges).hist.tolist())}


def examples(
    x: Tensor,
    y: Tensor,
    result: AttackResult,
    before: Tensor,
    after: Tensor,
    rows: Tensor,
    processes: Processes = ALONE,
    count: int = 6,
) -> list[dict[str, Any]]:
    """The images that were moved furthest, with their changes; of equally far ones the first in the set.

    Args:
        x: Images (N, C, H, W) in [0, 1], with 1 or 3 channels, this process's part.
        y: Labels (N,).
        result: What became of them.
        before: Classes predicted for the images, (N,).
        after: Classes predicted for the moved images, (N,).
        rows: (N,), where the images stand in the whole set.
        processes: Hold the other parts.
        count: How many.

    Returns:
        For each `image`, `moved` and `change` (scaled to its largest value) as base64 PNG, `label`, `clean_prediction`,
        `prediction` of the moved image, `radius`, how far it was moved, and `granted`, the radius that the attack gave
        it, None where only the set is bounded.
    """
    if x.dim() != 4 or x.shape[1] not in (1, 3):
        return []
    mine = _furthest(result.distances, rows, count)
    granted = torch.full_like(result.distances, torch.nan) if result.radii is None else result.radii
    members = (x, result.x_adv, y, before, after, granted, result.distances, rows)
    parts = [processes.gather(part[mine]) for part in members]
    first = _furthest(parts[-2], parts[-1], count)
    found = []
    for image, moved, label, clean, prediction, radius, distance, _ in zip(*(p[first] for p in parts), strict=True):
        change = moved - image
        scale = float(change.abs().max()) or 1.0
        found.append(
            {
                "image": _png(image),
                "moved": _png(moved),
                "change": _png(0.5 + 0.5 * change / scale),
                "label": int(label),
                "clean_prediction": int(clean),
                "prediction": int(prediction),
                "radius": float(distance),
                "granted": None if result.radii is None else float(radius),
            }
        )
    return found


def _furthest(distances: Tensor, rows: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest distances, in decreasing order; equal ones in the order of the set."""
    ordered = rows.argsort()
    return ordered[distances[ordered].argsort(descending=True, stable=True)][:count]


def _png(image: Tensor) -> str:
    pixels = (image.detach().clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels.squeeze()).save(buffer, format="PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()
