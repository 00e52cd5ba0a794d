"""Weight averaging: what is scored, saved and kept is an exponential average of the weights."""

from __future__ import annotations

import math
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from wdat.errors import SettingError, check_real


class ExponentialAveraging(WeightAveraging):
    """Validates, saves and in the end keeps an exponential average of the weights w: a ← d_t a + (1 − d_t) w.

    With d_t = min(decay, (1 + t) / (10 + t)) after each optimiser step, t = 0 at the first step from the start on, as
    in Gowal et al. 2020 and Rebuffi et al. 2021. Until then d = 0, so that the average is the current weights and no
    initial ones are ever scored. Training, its attacks and the Υ that it uses see the current weights only.

    Running statistics (all buffers) are copied from the current weights, not averaged, as in the PyTorch port of that
    recipe. Frozen parameters stay as they are to the bit.

    Checkpoints hold the average as `state_dict`, the current weights as `current_model_state`. Its position among the
    callbacks doesn't matter.

    Args:
        decay: The largest d, in [0, 1).
        start: Share of the run after which averaging starts, in [0, 1).

    Raises:
        SettingError: If a setting is out of range.
    """

    def __init__(self, decay: float = 0.995, start: float = 0.0) -> None:
        for key, value in (("decay", decay), ("start", start)):
            check_real(f"averaging.{key}", value, "[0, 1)")
        super().__init__(use_buffers=False, multi_avg_fn=self._average)
        self.decay, self.start = decay, start
        self._start_step: int | None = None
        self._step = 0
        self._swapped = False

    def decay_at(self, t: int) -> float:
        """d_t, t steps after the start; 0 before it, where t is negative."""
        return min(self.decay, (1 + t) / (10 + t)) if t >= 0 else 0.0

    def _average(self, averaged: Any, current: Any, n_averaged: Tensor | int) -> None:
        """One step of the average; interpolation leaves equal tensors, such as frozen ones, equal to the bit."""
        update = get_ema_multi_avg_fn(self.decay_at(self._step - (self._start_step or 0)))  # type: ignore[no-untyped-call]
        update(averaged, current, n_averaged)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Start from a copy of the weights; it counts as the first model averaged, so that the first step blends it.

        Lightning would copy the whole module: with it the attack, the estimator's table, the last adversarial images
        and the progress display, which can't be copied while it is shown.
        """
        if stage != "fit":
            return
        for callback in trainer.checkpoint_callbacks:
            if getattr(callback, "save_weights_only", False):
                raise SettingError(
                    "averaging needs save_weights_only=false in the checkpoint callbacks: Lightning would leave the "
                    "average out and save the current weights, which weren't scored"
                )
        device = self._device or trainer.strategy.root_device  # the module itself is moved only after this hook
        parts = nn.ModuleDict(dict(pl_module.named_children()))
        average = AveragedModel(parts, device, use_buffers=self._use_buffers, **self._kwargs)
        average.n_averaged.fill_(1)
        trainer.precision_plugin.convert_module(average)  # as the module itself will be
        self._average_model = average
        self._latest_update_step, self._start_step = trainer.global_step, None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Learn the length of the run; an average that has started continues, also in a run that is resumed longer."""
        if self._start_step is None or trainer.global_step <= self._start_step:
            length = trainer.estimated_stepping_batches
            if self.start and math.isinf(length):
                raise SettingError(
                    f"averaging.start={self.start} is a share of the run, whose length isn't known: "
                    "set trainer.max_epochs, or averaging.start=0"
                )
            self._start_step = int(self.start * length) if self.start else 0

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update the average after each optimiser step."""
        self._step = trainer.global_step - 1
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put the average into the module, during training only: `trainer.validate` scores what it is given."""
        if trainer.state.fn == TrainerFn.FITTING:
            super().on_validation_epoch_start(trainer, pl_module)
            self._swapped = True

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave the average in the module: other callbacks attack it in this hook, before or after this one."""

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put the current weights back."""
        self._put_back(trainer, pl_module)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Put the current weights back where a validation was broken off."""
        self._put_back(trainer, pl_module)

    def _put_back(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._swapped:
            super().on_validation_epoch_end(trainer, pl_module)
            self._swapped = False

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep the average also where nothing was left to train, of which `on_train_end` isn't told."""
        self.on_train_end(trainer, pl_module)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Let go of the average, which the module now holds itself."""
        if stage == "fit":
            self._average_model = None

    def state_dict(self) -> dict[str, Any]:
        """Lightning's state, and the step at which averaging starts."""
        return {**super().state_dict(), "start_step": self._start_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        super().load_state_dict(state_dict)
        self._start_step = state_dict["start_step"]

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save both under their names, also where a callback saves in a validation or before this one's turn."""
        if self._average_model is not None and not self._swapped:
            self.on_train_batch_end(trainer, pl_module, None, None, 0)  # does nothing if that step is counted already
            checkpoint["callbacks"][self.state_key] = self.state_dict()
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        if self._swapped:
            average = checkpoint["current_model_state"]
            checkpoint["current_model_state"], checkpoint["state_dict"] = checkpoint["state_dict"], average

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Restore both to continue training; else the average is all that is wanted, and is loaded already."""
        if trainer.state.fn == TrainerFn.FITTING:
            super().on_load_checkpoint(trainer, pl_module, checkpoint)
