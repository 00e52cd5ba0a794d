"""SIGTERM and Ctrl-C finish the step, save, and leave a run that can be resumed."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L

from wdat.distributed import current
from wdat.errors import Stopped
from wdat.terminal import PlainConsole
from wdat.training.checkpointing import resume_hint
from wdat.training.requests import Requests, asked_by_any

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class GracefulStop(L.Callback):
    """After a signal the present step is finished, `last.ckpt` written, and `Stopped` raised, on all processes alike.

    Where a signal comes during an evaluation within training, this is finished first; a second signal stops at once,
    and what is lost then is what came after the last checkpoint. In the last step of an epoch the epoch's evaluation
    comes before the stop, because a checkpoint between the two would skip it.

    Args:
        path: Where to save.
        resume: The folder to name in what the user is told.
        requests: Where it asks the other processes, which the module carries to them; None makes a sum of its own
            after each step.
    """

    def __init__(self, path: str | Path, resume: str | Path, requests: Requests | None = None) -> None:
        self.path, self.resume, self.requests = Path(path), Path(resume), requests
        self._signal = 0
        self._stop: Stopped | None = None
        self._old: dict[int, Any] = {}
        self._speaks = True

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take over the signals; Lightning's own handler talks to other processes, which a handler mustn't."""
        self._signal, self._stop, self._speaks = 0, None, trainer.is_global_zero
        if threading.current_thread() is threading.main_thread():
            self._old = {number: signal.signal(number, self._note) for number in SIGNALS}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._signal:
            self._release()
            raise Stopped(number, f"stopped by {signal.Signals(number).name} at once; {resume_hint(self.resume)}")
        self._signal = number
        if self.requests is not None:
            self.requests.ask(signal.Signals(number).name)
        if self._speaks:
            name = signal.Signals(number).name
            PlainConsole(stderr=True).print(f"{name}: stopping after this step (once more: at once)")

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save here unless the epoch's evaluation follows."""
        told = asked_by_any(outputs)
        if trainer.is_last_batch:
            return
        if told is None:
            self._save_if_asked(trainer, self._agreed(pl_module))
        else:
            numbers = [int(number) for number in SIGNALS if number.name in told]
            self._save_if_asked(trainer, max(numbers, default=0))

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save here after the epoch's evaluation."""
        self._save_if_asked(trainer, self._agreed(pl_module))

    def _agreed(self, pl_module: L.LightningModule) -> int:
        return int(current(pl_module.device).max(float(self._signal)))

    def _save_if_asked(self, trainer: L.Trainer, asked: int) -> None:
        if not asked:
            return
        trainer.save_checkpoint(self.path)
        self._stop = Stopped(
            asked,
            f"stopped by {signal.Signals(asked).name} after step {trainer.global_step}; saved {self.path.name}; "
            f"continue with resume={self.resume}",
        )

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Stop only here, because Lightning logs a step after `on_train_batch_end`."""
        self._leave()

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Likewise; a run that was asked in its very last step is done."""
        self._leave()

    def _leave(self) -> None:
        if self._stop is not None:
            self._release()
            raise self._stop

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Give the signals back."""
        self._release()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Give the signals back."""
        self._release()

    def _release(self) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
        self._old = {}
