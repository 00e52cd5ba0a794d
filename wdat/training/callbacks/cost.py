"""What a training step costs."""

from __future__ import annotations

import time
from typing import Any

import lightning as L
import torch

from wdat.data.batch import Batch
from wdat.training.callbacks.cadence import due


class StepCost(L.Callback):
    """Logs `cost/seconds_per_step` and `cost/images_per_second` over the steps since the last log.

    On a GPU the clock is read after the device has finished, once per log, so that logging doesn't slow the steps.
    """

    def __init__(self) -> None:
        self._started: float | None = None
        self._steps = self._images = 0

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start anew: an evaluation may lie between two epochs."""
        self._started, self._steps, self._images = None, 0, 0

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start the clock before the first step."""
        if self._started is None:
            self._started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Count, and log at the trainer's own cadence."""
        self._steps += 1
        self._images += batch.size
        if not due(trainer) or not self._started:
            return
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        seconds = time.perf_counter() - self._started
        pl_module.log("cost/seconds_per_step", seconds / self._steps, rank_zero_only=True)
        pl_module.log("cost/images_per_second", self._images / seconds, rank_zero_only=True)
        self._started, self._steps, self._images = time.perf_counter(), 0, 0
