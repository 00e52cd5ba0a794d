"""`last.ckpt`, from which a stopped run is resumed."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint

from wdat.distributed import current
from wdat.errors import check_real


class LastCheckpoint(Checkpoint):
    """Saves at the end of every epoch, and within an epoch after so many minutes.

    Never after the last step of an epoch alone: Lightning would take the epoch's evaluation for done on resuming.

    Args:
        path: The file.
        minutes: Minutes between two saves within an epoch; None for none.
    """

    def __init__(self, path: str | Path, minutes: float | None = 15.0) -> None:
        if minutes is not None:
            check_real("callbacks.last_checkpoint.minutes", minutes, "[0, inf)", "not negative; null for none")
        self.path, self.minutes = Path(path), minutes
        self._saved = time.monotonic()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self._saved = time.monotonic()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Save when it is time, on the word of any process."""
        if self.minutes is None or trainer.is_last_batch:
            return
        due = time.monotonic() - self._saved >= 60 * self.minutes
        if current(pl_module.device).max(float(due)):
            self._save(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save."""
        self._save(trainer)

    def _save(self, trainer: L.Trainer) -> None:
        trainer.save_checkpoint(self.path)
        self._saved = time.monotonic()
