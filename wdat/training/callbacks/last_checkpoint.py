"""`last.ckpt`, from which a stopped run is resumed."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint

from wdat.distributed import current
from wdat.errors import check_real
from wdat.training.requests import SAVE, Requests, asked_by_any


class LastCheckpoint(Checkpoint):
    """Saves at the end of every epoch, and within an epoch after so many minutes.

    Never after the last step of an epoch alone: Lightning would take the epoch's evaluation for done on resuming.

    Args:
        path: The file.
        minutes: Minutes between two saves within an epoch; None for none.
        requests: Where it asks the other processes, which the module carries to them; None makes a sum of its own
            after each step.
    """

    def __init__(self, path: str | Path, minutes: float | None = 15.0, requests: Requests | None = None) -> None:
        if minutes is not None:
            check_real("callbacks.last_checkpoint.minutes", minutes, "[0, inf)", "not negative; null for none")
        self.path, self.minutes, self.requests = Path(path), minutes, requests
        self._saved = time.monotonic()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self._saved = time.monotonic()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Ask for it when it is time."""
        if self.requests is not None and self._due():
            self.requests.ask(SAVE)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save when it is time, on the word of any process."""
        if self.minutes is None or trainer.is_last_batch:
            return
        told = asked_by_any(outputs)
        if SAVE in told if told is not None else current(pl_module.device).max(float(self._due())):
            self._save(trainer)

    def _due(self) -> bool:
        return self.minutes is not None and time.monotonic() - self._saved >= 60 * self.minutes

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save."""
        self._save(trainer)

    def _save(self, trainer: L.Trainer) -> None:
        trainer.save_checkpoint(self.path)
        self._saved = time.monotonic()
