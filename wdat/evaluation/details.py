"""What a record's `details` hold, for tables and pictures that are made from records only.

| key | of | value |
| --- | --- | --- |
| `histogram` | every attack | `{"edges": [...], "counts": [...]}`: images by how far they were moved, pixel units |
| `examples` | every attack | up to 6 images, those moved furthest, each with the keys of `examples` below |
| `bound` | `knapsack`, `certified` | `"upper"` or `"lower"` bound of A_δ |
| `critical_distance` | `knapsack`, `certified` | d*(δ), the largest distance paid for |
| `curve` | `knapsack`, `certified` | `[[δ, accuracy], ...]` from one sort |
| `effort` | `knapsack` | `[[gradient passes an image, accuracy], ...]` |
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
from wdat.gradients import forward
from wdat.guard import undisturbed


def pictures(network: nn.Module, x: Tensor, y: Tensor, result: AttackResult, batch_size: int) -> dict[str, Any]:
    """`histogram` and `examples` of one attack, of this process's images.

    Args:
        network: Gives the predictions shown with the examples; left as it was found.
        x: Images (N, C, H, W).
        y: Labels (N,).
        result: What became of them.
        batch_size: Images per pass.
    """
    with undisturbed(network):
        predictions = forward(network, result.x_adv, batch_size).argmax(1)
    return {"histogram": histogram(result.distances), "examples": examples(x, y, result, predictions)}


def histogram(distances: Tensor, bins: int = 40) -> dict[str, list[float]]:
    """Images by how far they were moved.

    Args:
        distances: (N,), finite, in pixel units.
        bins: Number of equal bins from 0 to the largest distance.
    """
    d = distances.detach().double().cpu()
    largest = float(d.max()) if len(d) else 0.0
    edges = torch.linspace(0, largest or 1.0, bins + 1, dtype=torch.float64)
    return {"edges": edges.tolist(), "counts": torch.histogram(d, edges).hist.tolist()}


def examples(x: Tensor, y: Tensor, result: AttackResult, predictions: Tensor, count: int = 6) -> list[dict[str, Any]]:
    """The images that were moved furthest, with their changes.

    Args:
        x: Images (N, C, H, W) in [0, 1], with 1 or 3 channels.
        y: Labels (N,).
        result: What became of them.
        predictions: Classes predicted for the moved images, (N,).
        count: How many.

    Returns:
        For each `image`, `moved` and `change` (scaled to its largest value) as base64 PNG, `label`, `prediction` and
        `radius`.
    """
    if x.dim() != 4 or x.shape[1] not in (1, 3):
        return []
    furthest = result.distances.argsort(descending=True)[:count].tolist()
    found = []
    for i in furthest:
        change = result.x_adv[i] - x[i]
        scale = float(change.abs().max()) or 1.0
        found.append(
            {
                "image": _png(x[i]),
                "moved": _png(result.x_adv[i]),
                "change": _png(0.5 + 0.5 * change / scale),
                "label": int(y[i]),
                "prediction": int(predictions[i]),
                "radius": float(result.distances[i]),
            }
        )
    return found


def _png(image: Tensor) -> str:
    pixels = (image.detach().clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels.squeeze()).save(buffer, format="PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()
