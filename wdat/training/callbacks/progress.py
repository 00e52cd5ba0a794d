"""One progress display for nested work: epochs, the attacks of an evaluation, and a line an epoch that stays."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from wdat.terminal import PlainConsole

SHOWN = {
    "train/loss": ("loss", "{:.3f}", 1),
    "val/acc_clean": ("clean", "{:.2f} %", 100),
    "val/acc_pointwise": ("pointwise", "{:.2f} %", 100),
    "val/acc_wpgd": ("W-PGD", "{:.2f} %", 100),
    "val/acc_distributional": ("distributional", "{:.2f} %", 100),
    "val/upsilon": ("Υ", "{:.2f}", 1),
}


class WorkProgress(ProgressBar):
    """A bar for the epoch and one for the attack within it; after each epoch its figures on a line of their own.

    Where the output is a file, only those lines are written.

    Args:
        label: What an epoch's line begins with.
    """

    def __init__(self, label: str = "epoch") -> None:
        super().__init__()
        self.label = label
        self.console = PlainConsole()
        self._live: Progress | None = None
        self._batches = 0
        self._validated = False
        self._enabled = True
        self._tasks: dict[str, TaskID] = {}

    def report(self, label: str, done: int, total: int) -> None:
        """Show work inside an epoch or an evaluation; it goes away when done."""
        if self._live is None:
            return
        if label not in self._tasks:
            self._tasks[label] = self._live.add_task(label, total=total)
        self._live.update(self._tasks[label], completed=done)
        if done >= total:
            self._live.remove_task(self._tasks.pop(label))

    def disable(self) -> None:
        """Show nothing; Lightning asks for it on processes other than the first."""
        self._enabled = False
        self._stop()

    def enable(self) -> None:
        """Show progress again."""
        self._enabled = True

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Start the display, on the first process only."""
        super().setup(trainer, pl_module, stage)
        if self._enabled and trainer.is_global_zero and self.console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._live = Progress(*columns, console=self.console, transient=True)
            self._live.start()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Stop the display."""
        self._stop()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Stop the display, so that the error can be read."""
        self._stop()

    def _stop(self) -> None:
        if self._live is not None:
            self._live.stop()
        self._live, self._tasks = None, {}

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move the epoch's bar."""
        self.report(f"{self.label} {trainer.current_epoch + 1}/{trainer.max_epochs}", batch_idx + 1, self._batches)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Learn the epoch's length."""
        self._validated = False
        self._batches = int(trainer.num_training_batches)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remember that this epoch has figures of its own."""
        self._validated = True

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print the epoch's figures."""
        if not self._enabled or not trainer.is_global_zero:
            return
        figures = trainer.callback_metrics
        fresh = [k for k in SHOWN if k in figures and (self._validated or not k.startswith("val/"))]
        parts = [f"{SHOWN[k][0]} {SHOWN[k][1].format(SHOWN[k][2] * float(figures[k]))}" for k in fresh]
        self.console.print(f"{self.label} {trainer.current_epoch + 1}/{trainer.max_epochs}: {', '.join(parts)}")
