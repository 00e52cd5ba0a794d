"""A fault that `benchmarks.faults` injects through the configuration."""

from __future__ import annotations

from typing import Any

import lightning as L


class Poison(L.Callback):
    """Makes one image of one batch NaN.

    Args:
        step: The global step before which it does so.
    """

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Spoil the first image."""
        if trainer.global_step == self.step:
            batch.x[0] = float("nan")
