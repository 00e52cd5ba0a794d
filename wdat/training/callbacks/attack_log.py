"""What the training attack does: Υ, and how the budget is divided."""

from __future__ import annotations

import math
from typing import Any

import lightning as L
import torch
from torch import Tensor

from wdat.attacks import AttackResult
from wdat.distributed import current
from wdat.training.callbacks.cadence import due


class AttackLog(L.Callback):
    """Logs `train/upsilon`, `train/radius_max`, `train/top1_share` and `train/zero_radii` of the global batch.

    They come from the mapping that `training_step` returns: `attack_result` and `upsilon`, as `WDATModule` has them.
    """

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log at the trainer's own cadence."""
        result: AttackResult | None = (outputs or {}).get("attack_result")
        if result is None or not due(trainer):
            return
        radii = current(pl_module.device).gather(result.distances if result.radii is None else result.radii)
        values = radius_figures(radii, result.threat.p)
        if outputs.get("upsilon") is not None:
            values["upsilon"] = outputs["upsilon"]()
        for key, value in values.items():
            pl_module.log(f"train/{key}", value, rank_zero_only=True)


def radius_figures(radii: Tensor, p: float) -> dict[str, float]:
    """How a budget was divided.

    Args:
        radii: (N,), or the distances of an attack that has no radii.
        p: Order of the threat.

    Returns:
        `radius_max`, the largest radius in pixel units; `top1_share`, the share of Σ δ_i^p that the 1 % of images with
        the largest radii take (at least one image; at p = inf, where all radii are equal, their share of the images);
        `zero_radii`, the share of images that may not move.
    """
    radii = radii.detach().double()
    largest = float(radii.max()) if len(radii) else 0.0
    top = max(1, math.ceil(len(radii) / 100))
    order = 0.0 if math.isinf(p) else p
    spent = (radii / largest) ** order if largest > 0 else torch.zeros_like(radii)
    share = float(spent.topk(min(top, len(radii))).values.sum() / spent.sum()) if float(spent.sum()) > 0 else 0.0
    return {"radius_max": largest, "top1_share": share, "zero_radii": float((radii == 0).double().mean())}
