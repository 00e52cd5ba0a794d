"""Clean and robust accuracy over the whole validation or test set, on any number of processes."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn

from wdat.attacks import Attack
from wdat.distributed import current, together
from wdat.errors import SettingError, unknown
from wdat.evaluation import ImageTensors, evaluate
from wdat.evaluation.batches import drained, members, unrepeated
from wdat.evaluation.evaluator import Progress, plan
from wdat.gradients import ordinary
from wdat.inputs import classes_of
from wdat.losses import check_classes
from wdat.records import Facts, Record, RecordFile
from wdat.threat import ThreatModel, parse_budget


class RobustEvaluation(L.Callback):
    """Attacks the images that a validation or test loop has seen, as one set with one budget.

    For any LightningModule that holds its network, and any loader of batches that hold images in [0, 1] and labels, as
    `wdat.evaluate` takes them; of several loaders the first. Images that Lightning's sampler repeats to make the shards
    of several processes even are counted once.

    Logs, as `val/…` or `test/…`: `acc_clean`; `acc_pointwise`, the lowest accuracy under the
    pointwise attacks; `acc_distributional`, the lowest under the others, and `distance`, the W_p length of that move;
    `acc_NAME` of each distributional attack where there are several; `upsilon` of the first loss.

    Records of a validation during training have the stage `epoch`. A checkpoint that the trainer has loaded for a test
    is the one that its records name.

    Args:
        threat: Order, norm and budget.
        attacks: Names, or attacks; pointwise ones run at p = inf.
        losses: For each, one clean record and one run of every attack given by name.
        options: Settings of attacks given by name, such as `{"wpgd": {"steps": 100}}`.
        validation_options: Those that replace them on validation images; without effect where that attack isn't run.
        deltas: Further budgets at which a test set is attacked.
        network: The attribute of the module that holds the network; empty for the module itself.
        stage: What records outside training say; None for `before` until the trainer has trained and `after` from then.
        records: Where records go: a file, its path, or None to keep them here.
        facts: What records say of network, data and seed.
        batch_size: Images per pass.
        progress: Called with a label, steps done and steps in all.
        tf32: Whether products may use TF32, where the device has it; records tell.

    Attributes:
        records: The records, written through to their file.

    Raises:
        SettingError: If there is no attack, or a name, option or budget can't be used.
    """

    def __init__(
        self,
        threat: ThreatModel,
        attacks: Sequence[str | Attack] = ("pgd", "wpgd"),
        *,
        losses: Sequence[str] = ("ce",),
        options: Mapping[str, Mapping[str, Any]] | None = None,
        validation_options: Mapping[str, Mapping[str, Any]] | None = None,
        deltas: Sequence[float | str] = (),
        network: str = "network",
        stage: str | None = None,
        records: RecordFile | str | Path | None = None,
        facts: Facts | None = None,
        batch_size: int = 512,
        progress: Progress | None = None,
        tf32: bool = False,
    ) -> None:
        self.threat, self.losses, self.batch_size = threat, tuple(losses), batch_size
        self.attacks = plan(attacks, losses, options, batch_size)
        options, other = options or {}, validation_options or {}
        names = sorted({*options, *(attack for attack in attacks if isinstance(attack, str))})
        for name in other:
            if name not in names:
                raise unknown("attack given by name", name, names, f"evaluation.validation_options.{name}")
        both = {name: {**options.get(name, {}), **other.get(name, {})} for name in {*options, *other}}
        try:
            validation = plan(attacks, losses, both, batch_size)
        except SettingError as error:  # those of `options` alone have passed
            raise SettingError(str(error).replace("attack_options.", "evaluation.validation_options.")) from error
        self._attacks = {"test": self.attacks, "val": validation}
        if not self.attacks or not self.losses:
            raise SettingError("evaluation.attacks and evaluation.losses must each name at least one")
        for attack in self.attacks:
            attack.threat_of(threat)  # refuses an impossible pair before any work
        self.deltas = [parse_budget(delta, "evaluation.deltas") for delta in deltas]
        self.network, self.stage, self.facts, self.progress = network, stage, facts or Facts(), progress
        self.tf32 = tf32
        self.records = (
            records if isinstance(records, RecordFile) else RecordFile(None if records is None else Path(records))
        )
        self._trained = False
        self._batches: list[tuple[Tensor, ...]] = []
        self._seen = 0  # images of this process, with those that its sampler repeats

    @property
    def metrics(self) -> set[str]:
        """Names of what is logged, without the split."""
        pointwise = {"acc_pointwise"} if any(a.pointwise for a in self.attacks) else set()
        shared = [a.name for a in self.attacks if not a.pointwise]
        several = {f"acc_{name}" for name in shared} if len(shared) > 1 else set()
        return {"acc_clean", "upsilon", *pointwise, *({"acc_distributional", "distance"} if shared else ()), *several}

    def check(self, network: nn.Module, shape: Sequence[int]) -> None:
        """Refuse, before any work, what can't be measured with this network on such images.

        Args:
            network: Takes images in [0, 1], gives logits (N, K); left as it was found.
            shape: (C, H, W) of the images.

        Raises:
            SettingError: The network can't take such images; a loss, an attack or a budget doesn't fit.
        """
        like = next((p for p in network.parameters() if p.is_floating_point()), torch.zeros(0))
        classes = classes_of(network, like.new_zeros((1, *shape)))
        for loss in self.losses:
            check_classes(loss, classes)
        for threat in (self.threat, *(replace(self.threat, delta=delta) for delta in self.deltas)):
            for attack in chain(*self._attacks.values()):
                attack.check(shape, classes, threat)

    def _network(self, module: L.LightningModule) -> nn.Module:
        found = getattr(module, self.network, None) if self.network else module
        if not isinstance(found, nn.Module):
            names = [name for name, _ in module.named_children()]
            raise unknown(f"network of {type(module).__name__}", self.network, names, "network")
        return found

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse a module that has no such network, before any work."""
        self._network(pl_module)

    def _collect(self, loaders: Any, batch: Any, number: int) -> None:
        if number:
            return
        given = members(batch)
        mine = ordinary(*unrepeated(given, CombinedLoader(loaders).flattened[0], self._seen))
        self._batches.append(tuple(part.cpu() for part in mine))  # whether the device has room for all shows at the end
        self._seen += len(given[1])

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        """Keep the images."""
        self._collect(trainer.val_dataloaders, batch, dataloader_idx)

    def on_test_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        """Keep the images."""
        self._collect(trainer.test_dataloaders, batch, dataloader_idx)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """From now on a test is one of trained weights."""
        self._trained = True

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Attack the validation set."""
        self._evaluate(trainer, pl_module, "val")

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Attack the test set."""
        self._evaluate(trainer, pl_module, "test", self.deltas)

    def _evaluate(
        self, trainer: L.Trainer, pl_module: L.LightningModule, split: str, deltas: Sequence[float] = ()
    ) -> None:
        batches, self._batches, self._seen = self._batches, [], 0
        if trainer.sanity_checking:
            return
        fitting = trainer.state.fn == TrainerFn.FITTING
        processes = current(pl_module.device)
        with together(processes):
            images = ImageTensors.join(drained(batches), pl_module.device)
        found = evaluate(
            self._network(pl_module),
            images,
            self.threat,
            attacks=self._attacks[split],
            losses=self.losses,
            deltas=deltas,
            batch_size=self.batch_size,
            stage="epoch" if fitting else self.stage or ("after" if self._trained else "before"),
            split=split,
            epoch=trainer.current_epoch + 1 if fitting else None,
            facts=self.facts if fitting else self._of_checkpoint(trainer),
            processes=processes,
            progress=self.progress or False,
            pictures=split == "test",
            tf32=self.tf32,
        )
        if trainer.is_global_zero or self.records.path is None:
            self.records.add(found)
        for key, value in self._metrics(found).items():
            pl_module.log(f"{split}/{key}", value, prog_bar=key.startswith("acc"))

    def _of_checkpoint(self, trainer: L.Trainer) -> Facts:
        """The facts, with the checkpoint that the trainer has loaded, if it has, by its path from the run's folder."""
        path = trainer.ckpt_path
        if path is None:
            kept = not self._trained or not self.facts.checkpoint
            return self.facts if kept else replace(self.facts, checkpoint="trained weights, not saved")
        name = os.path.relpath(path, self.records.path.parent) if self.records.path else str(path)
        return replace(self.facts, checkpoint=name)

    def _metrics(self, found: Sequence[Record]) -> dict[str, float]:
        """What is logged, by name, of the clean records and those of the attacks, in this order; budgets follow."""
        clean, first = found[0], len(self.losses)
        attacked = list(zip(self.attacks, found[first : first + len(self.attacks)], strict=True))
        values: dict[str, float | None] = {"acc_clean": clean.accuracy, "upsilon": clean.upsilon}
        pointwise = [record.accuracy for attack, record in attacked if attack.pointwise]
        shared = [record for attack, record in attacked if not attack.pointwise]
        if pointwise:
            values["acc_pointwise"] = min(pointwise)
        if shared:
            strongest = min(shared, key=lambda record: record.accuracy)
            values |= {"acc_distributional": strongest.accuracy, "distance": strongest.distance}
        if len(shared) > 1:
            values |= {f"acc_{record.attack}": record.accuracy for record in shared}
        return {key: value for key, value in values.items() if value is not None}
