"""The LightningModule: one training step of an objective, and Υ before it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import MeanMetric

from wdat.attacks import Attack
from wdat.attacks.base import Verification
from wdat.data.batch import Batch
from wdat.distributed import Processes, current, together
from wdat.errors import RunError, SettingError
from wdat.evaluation.evaluator import Progress
from wdat.gradients import forward
from wdat.losses import correct
from wdat.objectives import Objective, Terms, total
from wdat.precision import float32
from wdat.seeding import generator
from wdat.sensitivity import Batch as BatchSensitivity
from wdat.sensitivity import Estimator
from wdat.threat import ThreatModel
from wdat.training.norms import training_norms
from wdat.training.optimizers import decay_groups
from wdat.training.requests import NAMES, Requests
from wdat.training.reweighting import KLReweighting
from wdat.training.step import Step, modes_agree, not_finite
from wdat.training.weight_perturbation import AWP, Moved, kept_buffers


class WDATModule(L.LightningModule):
    """Fine-tunes a network against a Wasserstein threat [A].

    `training_step` returns a mapping, which callbacks find in `outputs`: `loss`; `terms`, their means over the global
    batch by their names in the log; `attack_result` of the distributional attack, None where the objective doesn't ask
    for it; `requests`, what any process asks for, None in one process; `upsilon`, a function that gives Υ, None where
    the attack doesn't divide its budget by it.

    Args:
        network: Takes images in [0, 1], gives logits (N, K). Parameters to train have `requires_grad`.
        objective: What is minimised.
        attack: The distributional attack that gives x_w; None where the objective doesn't ask for it.
        threat: The threat trained against.
        sensitivity: Estimates Υ of the training set during training; None for the batches' own.
        optimizer: Called with the trainable parameters; in two groups where some are `exempt`.
        scheduler: Factor of the learning rate as a function of the progress in [0, 1]; its method
            `momentum`, if it has one, gives the momentum.
        keep_eval: Called with the network after every change to train mode; puts frozen parts in eval mode again.
        seed: The seed of the run.
        exempt: What has no weight decay, of `norm` and `bias`.
        notify: Told, on the first process, of what a user should know.
        progress: Told of passes over the training images within a step.
        requests: What this process may ask the others for; each step carries it to them.
        reweighting: Weighs the images of each global batch; None weighs them alike.
        weight_perturbation: Where the gradient of a step is taken; None for the weights as they are.

    Raises:
        SettingError: If the attack can't have this threat, or there are no weights to perturb.
    """

    def __init__(
        self,
        network: nn.Module,
        objective: Objective,
        attack: Attack | None,
        threat: ThreatModel,
        sensitivity: Estimator | None,
        optimizer: Callable[[Any], Optimizer],
        scheduler: Callable[[float], float],
        keep_eval: Callable[[nn.Module], None] | None = None,
        seed: int = 0,
        exempt: Sequence[str] = (),
        notify: Callable[[str], None] = rank_zero_warn,
        progress: Progress | None = None,
        requests: Requests | None = None,
        reweighting: KLReweighting | None = None,
        weight_perturbation: AWP | None = None,
    ) -> None:
        super().__init__()
        if attack is not None:
            attack.threat_of(threat)
        objective.check(attack)
        if weight_perturbation is not None:
            weight_perturbation.weights(network)  # refuses a network without any
        decay_groups(network, exempt)  # refuses an unknown kind
        self.network, self.objective, self.attack, self.threat = network, objective, attack, threat
        self.sensitivity = sensitivity or BatchSensitivity()
        self.make_optimizer, self.scheduler, self.exempt = optimizer, scheduler, tuple(exempt)
        self.keep_eval, self.seed, self.notify, self.progress = keep_eval, seed, notify, progress
        self.requests = requests
        self.reweighting, self.weight_perturbation = reweighting, weight_perturbation
        self._moved: Moved | None = None
        self.accuracy = nn.ModuleDict({"val": MeanMetric(), "test": MeanMetric()})
        self._modes_agree: bool | None = None
        self._attack_expected = attack is not None

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, K) of images (N, C, H, W) in [0, 1]."""
        logits: Tensor = self.network(x)
        return logits

    def train(self, mode: bool = True) -> WDATModule:
        """Train mode, but for what is frozen."""
        super().train(mode)
        if mode and self.keep_eval:
            self.keep_eval(self.network)
        return self

    def on_fit_start(self) -> None:
        """Networks are loaded in eval mode; training needs train mode. The estimator learns of the training set."""
        self.train()
        self._modes_agree = None
        if self.attack is not None:
            n_train = getattr(self.trainer.datamodule, "n_train", 0)  # type: ignore[attr-defined]
            own, distances = self.attack.threat_of(self.threat), self.attack.by_distance
            self.sensitivity.begin(n_train, own.p if distances else own.q, self.seed, current(self.device), distances)

    def on_train_epoch_start(self) -> None:
        """Networks are loaded in eval mode; training needs train mode."""
        self.train()

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Set the momentum where the scheduler has one of its own."""
        momentum = getattr(self.scheduler, "momentum", None)
        value = momentum(self._progress(self.trainer.global_step)) if momentum else None
        if value is not None:
            for group in self.trainer.optimizers[0].param_groups:
                group["momentum"] = value

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """One step on one process's part of a global batch."""
        processes = current(self.device)
        # Dropout draws from the global stream: a function of seed, step and process, so that a resumed run draws alike.
        torch.manual_seed(generator(self.seed, "dropout", batch.step, processes.rank).initial_seed())
        measure = partial(self._measure, batch.step)
        about = (self.threat, self.attack, self.sensitivity, measure, self._agree, processes, self.seed)
        step = Step(self.network, batch, *about)
        terms = self._terms_at(batch, step, processes)
        loss = total(terms)
        means, requests = self._told(batch, loss, terms, step.verifications, processes)
        if self._attack_expected and step.result is None and self.attack is not None:
            self.notify(f"this objective has no distributional term, so attack={self.attack.name} is not used")
        self._attack_expected = False
        return {
            "loss": self._scaled(loss, batch, processes),
            "terms": means,
            "attack_result": step.result,
            "requests": requests,
            "upsilon": self.sensitivity.upsilon if step.divides else None,
        }

    def _terms_at(self, batch: Batch, step: Step, processes: Processes) -> Terms:
        """The objective's terms, at perturbed weights where that is asked for; `backward` puts these back."""
        perturbation = self.weight_perturbation
        if perturbation is None or self._progress(self.trainer.global_step) < perturbation.start:
            return self._weighted(self.objective(self.network, batch, step), processes)
        with kept_buffers(self.network):
            terms = self._weighted(self.objective(self.network, batch, step), processes)
            self._moved = perturbation.move(self.network, self._scaled(total(terms), batch, processes), processes)
        try:
            return self._weighted(self.objective(self.network, batch, step.again()), processes)
        except BaseException:
            self._put_back()
            raise

    def _weighted(self, terms: Terms, processes: Processes) -> Terms:
        return terms if self.reweighting is None else self.reweighting(terms, processes)

    @staticmethod
    def _scaled(loss: Tensor, batch: Batch, processes: Processes) -> Tensor:
        """The loss of this process's part, such that the processes' mean is the global batch's."""
        share = len(batch.y) * processes.world_size / batch.size  # 1 but where the processes' parts are unequal
        return loss * share if share != 1 else loss

    def _put_back(self) -> None:
        if self._moved is not None:
            self._moved.restore()
            self._moved = None

    def backward(self, loss: Tensor, *arguments: Any, **options: Any) -> None:
        """The gradients, at perturbed weights where the step has moved them; then the weights are put back."""
        try:
            super().backward(loss, *arguments, **options)
        finally:
            self._put_back()

    def _agree(self, x: Tensor) -> bool:
        if self._modes_agree is None:
            self._modes_agree = modes_agree(self.network, x)
        return self._modes_agree

    def _told(
        self, batch: Batch, loss: Tensor, terms: Terms, verifications: Sequence[Verification], processes: Processes
    ) -> tuple[dict[str, float], frozenset[str] | None]:
        """Log the averages over the global batch, and stop all processes where they aren't finite.

        Everything that the host has to know of a step, of all processes, it reads here at once.

        Returns:
            The averages, and what any process asks for; None where no other one could.

        Raises:
            RunError: If the loss isn't finite; nothing has been updated yet.
            ConstraintError: If an attack left its threat model, likewise.
        """
        own = {"loss": loss, **{f"loss_{name}": term.values.mean() for name, term in terms.items()}}
        mine = torch.stack([value.detach() for value in own.values()]).double() * len(batch.y) / batch.size
        shared = self.requests if processes.world_size > 1 else None
        asked = torch.tensor(shared.taken() if shared else [], dtype=torch.float64).to(mine.device, non_blocking=True)
        broken = [check.broken.view(1) for check in verifications]
        summed, sums = processes.total(torch.cat([mine, asked, *broken]))
        flags = sums[len(mine) :]
        if any(flags[len(asked) :]):
            self._put_back()
            with together(processes):
                for check in verifications:
                    check.verify()
        if not all(map(math.isfinite, sums)):
            self._put_back()
            raise RunError(not_finite(self.network, batch, float(loss.detach())))
        for key, value in zip(own, summed.float(), strict=False):
            self.log(f"train/{key}", value, on_step=True, on_epoch=False, prog_bar=key == "loss")
        requests = frozenset(name for name, flag in zip(NAMES, flags, strict=False) if flag) if shared else None
        return dict(zip(own, sums, strict=False)), requests

    def _measure(self, step: int) -> None:
        """Measure the dual norms that the estimator wants before this step, on all processes together."""
        wanted = self.sensitivity.wanted(step)
        if wanted is not None:
            self.sensitivity.measured(wanted, self.norms(wanted, step))

    def norms(self, index: Tensor, step: int) -> Tensor:
        """The dual norms (M,) of training images `index` (M,), augmented as `step` fixes it, on all processes."""
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        if self.attack is None or not hasattr(data, "train_batches"):
            raise SettingError(
                f"sensitivity={self.sensitivity.name} measures training images, which this data module doesn't give "
                "(train_batches); use sensitivity=batch or ema, or wdat.data.ImageDataModule"
            )

        def to_device(batch: Batch) -> Batch:
            moved = self.transfer_batch_to_device(batch, self.device, 0)
            return cast(Batch, self.trainer.precision_plugin.convert_input(moved))

        what = (self.network, self.attack, self.threat, data, index, step)
        return training_norms(*what, to_device, current(self.device), self.progress)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Clean accuracy; robust accuracy is the callback's."""
        self._count("val", batch)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Clean accuracy; robust accuracy is the callback's."""
        self._count("test", batch)

    def _count(self, split: str, batch: Any) -> None:
        x, y = batch[0], batch[1]
        accuracy = cast(MeanMetric, self.accuracy[split])
        with float32(self.network, x):  # evaluation is always in float32
            accuracy.update(correct(forward(self.network, x), y).float())
        self.log(f"{split}/acc_clean", accuracy, on_step=False, on_epoch=True, prog_bar=True)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """The optimiser on the trainable parameters, its rate a function of the progress."""
        trainable = [p for p in self.network.parameters() if p.requires_grad]
        optimizer = self.make_optimizer(decay_groups(self.network, self.exempt) if self.exempt else trainable)
        scheduler = LambdaLR(optimizer, lambda step: self.scheduler(self._progress(step)))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _progress(self, step: int) -> float:
        # The length is asked for only once training runs: asked for before, Lightning makes the training loader early
        # and then doesn't restore its position when a run is resumed inside an epoch.
        return step / max(self.trainer.estimated_stepping_batches, 1) if step else 0.0

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the estimator's and the attack's state; plain containers only, so that `weights_only` loads them."""
        checkpoint["sensitivity"] = {"name": self.sensitivity.name, **self.sensitivity.state_dict()}
        if self.attack is not None:
            checkpoint["attack"] = {"name": self.attack.name, **self.attack.state_dict()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the estimator's and the attack's state where they are of the same kind."""
        state = dict(checkpoint.get("sensitivity", {}))
        if state.pop("name", None) == self.sensitivity.name:
            self.sensitivity.load_state_dict(state)
        learnt = dict(checkpoint.get("attack", {}))
        if self.attack is not None and learnt.pop("name", None) == self.attack.name and learnt:
            self.attack.load_state_dict(learnt)
