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
| `unfound` | `knapsack` | images for which no misclassified point was found at any distance |
| `moved` | `knapsack` | images that are attacked, the fractional one included |
| `command` | every attack | the command line that made the record, in files of a leaderboard |
| `materialised` | `knapsack` | `{"accuracy", "distance"}` of the whole images among them, verified by forward passes |
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from wdat.attacks import AttackResult
from wdat.distributed import ALONE, Processes
from wdat.gradients import forward, undisturbed
from wdat.losses import predictions

COUNT = 6  # examples of a record
LARGEST = 1024  # width of a picture's parts in pixels; larger images are no examples


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
    network: nn.Module,
    x: Tensor,
    y: Tensor,
    result: AttackResult,
    rows: Tensor,
    processes: Processes = ALONE,
    classes: Sequence[str] | None = None,
) -> list[dict[str, Any]]:
    """The `COUNT` images that were moved furthest, with their changes; of equally far ones the first in the set.

    Args:
        network: Gives the predictions, of these images only; left as it was found.
        x: Images (N, C, H, W) in [0, 1], with 1 or 3 channels, this process's part.
        y: Labels (N,).
        result: What became of them.
        rows: (N,), where the images stand in the whole set.
        processes: Hold the other parts.
        classes: Names of the classes, by label.

    Returns:
        For each `picture`, the image, the adversarial image and the change (scaled to its largest value) side by side
        as a PNG; `label`, `clean_prediction`, `prediction` of the adversarial image, and with `classes` the `names` of
        the three; `radius`, how far it was moved, and `granted`, the radius that the attack gave it, None where only
        the set is bounded.
    """
    if x.dim() != 4 or x.shape[1] not in (1, 3) or x.shape[3] > LARGEST:
        return []
    mine = _furthest(result.distances, rows)
    with undisturbed(network):
        before, after = (predictions(forward(network, images[mine])) for images in (x, result.x_adv))
    granted = torch.full_like(result.distances, torch.nan) if result.radii is None else result.radii
    members = [part[mine] for part in (x, result.x_adv, y, granted, result.distances, rows)]
    parts = [processes.gather(part) for part in (*members, before, after)]
    first = _furthest(parts[4], parts[5])
    found = []
    for image, moved, label, radius, distance, _, clean, adversarial in zip(*(p[first] for p in parts), strict=True):
        seen = [int(label), int(clean), int(adversarial)]
        example = dict(zip(("label", "clean_prediction", "prediction"), seen, strict=True))
        about: dict[str, Any] = {"picture": _png(image, moved), **example, "radius": float(distance)}
        about["granted"] = None if result.radii is None else float(radius)
        found.append(about | ({"names": [str(classes[k]) if k >= 0 else "none" for k in seen]} if classes else {}))
    return found


def _furthest(distances: Tensor, rows: Tensor) -> Tensor:
    """Indices of the `COUNT` largest distances, in decreasing order; equal ones in the order of the set."""
    ordered = rows.argsort()
    return ordered[distances[ordered].argsort(descending=True, stable=True)][:COUNT]


def _png(image: Tensor, moved: Tensor) -> bytes:
    """An image, the moved image and the change between them, side by side."""
    change = moved - image
    gap = torch.ones_like(image[:, :, : max(1, image.shape[2] // 16)])
    strip = torch.cat([image, gap, moved, gap, 0.5 + 0.5 * change / (float(change.abs().max()) or 1.0)], dim=2)
    pixels = (strip.detach().clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
