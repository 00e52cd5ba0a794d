"""Clean, pointwise and distributional accuracy over the whole validation or test set, on any number of processes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn

from wdat.attacks import Attack
from wdat.data.batch import Batch
from wdat.distributed import current, together
from wdat.errors import SettingError
from wdat.evaluation import ImageTensors, evaluate
from wdat.evaluation.evaluator import Progress
from wdat.gradients import ordinary
from wdat.records import Facts, Record, RecordFile
from wdat.training.module import WDATModule


class RobustEvaluation(L.Callback):
    """Attacks the images that a validation or test loop has seen, as one set with one budget.

    Logs `{val,test}/{acc_pointwise,acc_distributional,upsilon,distance}`, and adds the records to a results.

    Args:
        pointwise: The attack behind `acc_pointwise`, at p = inf.
        distributional: The attack behind `acc_distributional`.
        loss: The loss whose Υ is logged.
        batch_size: Images per pass.
        curve: Further budgets at which a test set is attacked, in units of the threat's.
    """

    def __init__(
        self,
        pointwise: Attack,
        distributional: Attack,
        loss: str = "ce",
        batch_size: int = 512,
        curve: Sequence[float] = (),
    ) -> None:
        if not pointwise.pointwise:
            raise SettingError(
                f"callbacks.robust_evaluation.pointwise.name={pointwise.name} is not pointwise; use pgd or fgsm"
            )
        self.pointwise, self.distributional = pointwise, distributional
        self.loss, self.batch_size, self.curve = loss, batch_size, tuple(curve)
        self.results = RecordFile(None)
        self.facts = Facts()
        self.stage = "evaluate"
        self.progress: Progress | None = None
        self.last: list[Record] = []
        self._batches: list[Batch] = []

    def describe(self, results: RecordFile, facts: Facts, progress: Progress | None = None) -> None:
        """Where records go, what they say of the run, and who is told of the progress."""
        self.results, self.facts, self.progress = results, facts, progress

    def _collect(self, batch: Batch) -> None:
        x, y, index = ordinary(batch.x, batch.y, batch.index)
        self._batches.append(batch._replace(x=x, y=y, index=index))

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, *_: Any
    ) -> None:
        """Keep the images."""
        self._collect(batch)

    def on_test_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, *_: Any
    ) -> None:
        """Keep the images."""
        self._collect(batch)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Attack the validation set."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._evaluate(trainer, pl_module, "val", "epoch", trainer.current_epoch + 1)
        else:
            self._evaluate(trainer, pl_module, "val", self.stage, None)

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Attack the test set."""
        self._evaluate(trainer, pl_module, "test", self.stage, None)

    def _evaluate(
        self, trainer: L.Trainer, pl_module: L.LightningModule, split: str, stage: str, epoch: int | None
    ) -> None:
        batches, self._batches = self._batches, []
        if trainer.sanity_checking or not isinstance(pl_module, WDATModule):
            return
        device, threat = pl_module.device, pl_module.threat
        processes = current(device)
        with together(processes):
            images = ImageTensors.collect(batches, device)
        run = partial(
            evaluate,
            pl_module.network,
            images,
            attacks=[self.pointwise, self.distributional],
            batch_size=self.batch_size,
            stage=stage,
            split=split,
            epoch=epoch,
            facts=self.facts,
            processes=processes,
            progress=self.progress,
        )
        self.last = run(threat, losses=[self.loss], pictures=split == "test")
        self.results.add(self.last)
        for factor in self.curve if split == "test" else ():
            self.results.add(run(replace(threat, delta=factor * threat.delta), losses=[]))
        clean, pointwise, distributional = self.last
        values = {
            "acc_pointwise": pointwise.accuracy,
            "acc_distributional": distributional.accuracy,
            "upsilon": clean.upsilon,
            "distance": distributional.distance,
        }
        for key, value in values.items():
            if value is not None:
                pl_module.log(f"{split}/{key}", value, prog_bar=key.startswith("acc"))
