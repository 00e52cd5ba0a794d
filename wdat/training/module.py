"""The LightningModule: one training step of the combined objective, and Υ before it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from wdat.attacks import Attack, AttackResult, Context
from wdat.data.batch import Batch
from wdat.distributed import Processes, current
from wdat.errors import DIVERGED, RunError, SettingError
from wdat.gradients import forward, undisturbed
from wdat.losses import log_probabilities
from wdat.objectives import Objective
from wdat.seeding import generator
from wdat.sensitivity import Estimator, with_pool
from wdat.threat import ThreatModel
from wdat.training.metrics import CountAccuracy
from wdat.training.optimizers import decay_groups

TERMS = ("loss", "loss_clean", "loss_pointwise", "loss_distributional")
START_NOISE = 0.001  # standard deviation of the random start in pixel units, as in TRADES


class TrainingImages(Protocol):
    """What estimators that measure Υ themselves need of the data module."""

    n_train: int

    def train_batches(self, index: Tensor, step: int, rank: int, world: int) -> Iterator[Batch]:
        """This process's part of the training images `index`, augmented as in training."""
        ...


class WDATModule(L.LightningModule):
    """Fine-tunes a network against a Wasserstein threat [A].

    Args:
        network: Takes images in [0, 1], gives logits (N, K). Parameters to train have `requires_grad`.
        objective: What is minimised.
        attack: The distributional attack that gives x_w.
        threat: The threat trained against.
        sensitivity: Estimates Υ of the training set as training goes on.
        optimizer: Called with the trainable parameters; in two groups where some are `exempt`.
        schedule: Factor of the learning rate as a function of the progress in [0, 1]; its method
            `momentum`, if it has one, gives the momentum.
        keep_eval: Called with the network after every change to train mode; puts frozen parts in eval mode again.
        seed: The seed of the run.
        exempt: What has no weight decay, of `norm` and `bias`.
    """

    def __init__(
        self,
        network: nn.Module,
        objective: Objective,
        attack: Attack,
        threat: ThreatModel,
        sensitivity: Estimator,
        optimizer: Callable[[Any], Optimizer],
        schedule: Callable[[float], float],
        keep_eval: Callable[[nn.Module], None] | None = None,
        seed: int = 0,
        exempt: Sequence[str] = (),
    ) -> None:
        super().__init__()
        if objective.uses_attack:
            attack.threat_of(threat)  # refuses an impossible pair before any work
        decay_groups(network, exempt)  # likewise an unknown kind
        self.network, self.exempt = network, tuple(exempt)
        self.objective, self.attack, self.threat, self.sensitivity = objective, attack, threat, sensitivity
        self.make_optimizer, self.shape, self.keep_eval, self.seed = optimizer, schedule, keep_eval, seed
        self.accuracy = nn.ModuleDict({"val": CountAccuracy(), "test": CountAccuracy()})
        self.last_attack: AttackResult | None = None
        self._modes_agree: bool | None = None
        self._look_for_synthetic = objective.smooths_synthetic
        self.report: Callable[[str, int, int], None] = lambda label, done, total: None  # of work inside a step
        self.notice: Callable[[str], None] = rank_zero_warn

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

    def setup(self, stage: str) -> None:
        """Υ is that of the images that are drawn: where the data have a pool of synthetic ones, of the mixture."""
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        if stage == "fit" and getattr(data, "pool", None) is not None:
            size, every = data.synthetic.sample, data.synthetic.every
            self.sensitivity = with_pool(self.sensitivity, data.pool, data.pool_share, size, every)

    def on_fit_start(self) -> None:
        """Networks are loaded in eval mode; training needs train mode. The estimator learns of the training set."""
        self.train()
        self._modes_agree = None
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        n_train = getattr(data, "n_train", 0)
        own, distances = self.attack.threat_of(self.threat), self.attack.by_distance
        self.sensitivity.begin(n_train, own.p if distances else own.q, self.seed, current(self.device), distances)

    def on_train_epoch_start(self) -> None:
        """Networks are loaded in eval mode; training needs train mode."""
        self.train()

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Set the momentum where the schedule has one of its own."""
        momentum = getattr(self.shape, "momentum", None)
        value = momentum(self._progress(self.trainer.global_step)) if momentum else None
        if value is not None:
            for group in self.trainer.optimizers[0].param_groups:
                group["momentum"] = value

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One step on one process's part of a global batch."""
        x, y = batch.x, batch.y
        objective, network = self.objective, self.network
        # Dropout draws from the global stream: a function of seed, step and process, so that a resumed run draws alike.
        torch.manual_seed(generator(self.seed, "dropout", batch.step, current(self.device).rank).initial_seed())
        if objective.uses_attack:
            self._measure(batch.step)
        logits, context = self._clean_pass(batch)
        x_p = x_w = None
        if objective.beta_p > 0 and objective.pointwise_attack is not None:
            threat = self.threat.pointwise(objective.pointwise_budget)
            x_p = objective.pointwise_attack(network, x, y, threat, context).x_adv
        if objective.uses_attack:
            context = replace(context, sensitivity=self.sensitivity, index=batch.index)
            self.last_attack = self.attack(network, x, y, self.threat, context)
            x_w = self.last_attack.x_adv
        if objective.needs_logits and logits is None:
            logits = network(x)
        if self._look_for_synthetic:
            self._say_if_none_is_synthetic(batch, context.processes)
        terms = objective(network, logits, y, x_p, x_w, batch.synthetic)
        share = len(y) * context.processes.world_size / batch.size  # 1 but where the processes' parts are unequal
        self._log_terms(batch, {key: getattr(terms, key) for key in TERMS}, context.processes)
        return terms.loss * share if share != 1 else terms.loss

    def _say_if_none_is_synthetic(self, batch: Batch, processes: Processes) -> None:
        """Say so, once, where labels of synthetic images only are smoothed and the first global batch has none."""
        self._look_for_synthetic = False
        mine = batch.synthetic is not None and bool(batch.synthetic.any())
        if not processes.max(float(mine)):
            self.notice(
                f"there are no synthetic images, so objective.label_smoothing={self.objective.label_smoothing} with "
                "objective.smooth=synthetic smooths nothing (objective.smooth=all smooths all labels)"
            )

    def _log_terms(self, batch: Batch, terms: dict[str, Tensor | None], processes: Processes) -> None:
        """Log the averages over the global batch, and stop all processes where they aren't finite.

        Raises:
            RunError: If the loss isn't finite; nothing has been updated yet.
        """
        present = {key: value.detach() for key, value in terms.items() if value is not None}
        mine: list[float] = torch.stack(list(present.values())).double().tolist()
        means = processes.sum([value * len(batch.y) / batch.size for value in mine])
        if not all(map(math.isfinite, means)):
            raise RunError(self._not_finite(batch, mine[0]))
        for key, value in zip(present, means, strict=True):
            self.log(f"train/{key}", value, on_step=True, on_epoch=False, prog_bar=key == "loss")

    def _not_finite(self, batch: Batch, loss: float) -> str:
        """What is known of a loss that isn't finite on this process's part of the batch, and what to try."""
        rows = batch.index.tolist()
        with undisturbed(self.network), torch.no_grad():
            fine = self.network(batch.x).isfinite().all(1)
        broken = batch.index[~fine].tolist()
        if len(broken) == len(rows):
            where = "the network gives no finite logits at all: its weights have diverged"
        elif broken:
            where = f"the training images {broken} have no finite logits"
        elif not math.isfinite(loss):
            where = f"the clean logits are finite; look at the perturbed images of the training images {rows}"
        else:
            where = "it is finite in this process's part of the batch"
        return f"the loss of step {batch.step} is not finite ({where}). No update was made: {DIVERGED}"

    def _clean_pass(self, batch: Batch) -> tuple[Tensor | None, Context]:
        """The clean logits where the attacks can use them too, and what the attacks need to know.

        One forward pass serves the loss, the target of the attacks and the gradient that sets the radii, where train
        and eval mode agree; a compiled network frees its buffers in the first backward pass and can't share the last.
        """
        network, objective = self.network, self.objective
        context = Context(
            current(self.device),
            noise=partial(start_noise, self.seed, batch),
            uniform=partial(radius_draws, self.seed, batch),
            training=True,
        )
        if self._modes_agree is None:
            self._modes_agree = modes_agree(network, batch.x)
        if not (objective.needs_logits and self._modes_agree):
            return None, context
        whole = next(network.parameters()).requires_grad  # else backward would pass through a frozen backbone to x
        shared = objective.uses_attack and whole and not self._uniform and not is_compiled(network)
        x = batch.x.detach().requires_grad_(True) if shared else batch.x
        logits = network(x)
        clean_pass = (x, logits) if shared else None
        return logits, replace(context, log_clean=log_probabilities(logits.detach()), clean_pass=clean_pass)

    @property
    def _uniform(self) -> bool:
        """Whether every radius is δ, whatever Υ is."""
        return self.attack.threat_of(self.threat).is_pointwise and not self.attack.by_distance

    def _measure(self, step: int) -> None:
        """Measure the dual norms that the estimator wants before this step, on all processes together."""
        wanted = None if self._uniform else self.sensitivity.wanted(step)
        if wanted is not None:
            self.sensitivity.measured(wanted, self.norms(wanted, step))

    def norms(self, index: Tensor, step: int) -> Tensor:
        """What the attack's allocation wants to know of training images, in passes shared by all processes.

        Args:
            index: (M,), rows of the training set, the same on all processes.
            step: Fixes the augmentation.

        Returns:
            (M,), on all processes.

        Raises:
            SettingError: If the data module gives no training images.
        """
        data: TrainingImages = self.trainer.datamodule  # type: ignore[attr-defined]
        if not hasattr(data, "train_batches"):
            raise SettingError(
                f"sensitivity={self.sensitivity.name} measures training images, which this data module doesn't give "
                "(train_batches); use sensitivity=batch or ema, or wdat.data.ImageDataModule"
            )
        processes = current(self.device)
        position, norms, done = [], [], 0
        with undisturbed(self.network):
            for batch in data.train_batches(index, step, processes.rank, processes.world_size):
                part = self.transfer_batch_to_device(batch, self.device, 0)
                part = self.trainer.precision_plugin.convert_input(part)
                position.append(part.position)
                norms.append(self.attack.norms(self.network, part.x, part.y, self.threat))
                done += len(part.position) * processes.world_size
                self.report("gradient norms of the training images", min(done, len(index)), len(index))
        mine = torch.cat(norms) if norms else torch.empty(0, device=self.device)
        positions = torch.cat(position) if position else torch.empty(0, dtype=torch.int64, device=self.device)
        gathered = processes.gather(mine)
        ordered = torch.empty_like(gathered)
        ordered[processes.gather(positions)] = gathered
        return ordered

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Clean accuracy; robust accuracy is the callback's."""
        self._count("val", batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Clean accuracy; robust accuracy is the callback's."""
        self._count("test", batch)

    def _count(self, split: str, batch: Batch) -> None:
        metric: CountAccuracy = self.accuracy[split]  # type: ignore[assignment]
        with torch.autocast(self.device.type, enabled=False):  # evaluation is always in float32
            metric.update(forward(self.network, batch.x), batch.y)
        self.log(f"{split}/acc_clean", metric, on_step=False, on_epoch=True, prog_bar=True)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """The optimiser on the trainable parameters, its rate a function of the progress."""
        trainable = [p for p in self.network.parameters() if p.requires_grad]
        optimizer = self.make_optimizer(decay_groups(self.network, self.exempt) if self.exempt else trainable)
        scheduler = LambdaLR(optimizer, self._rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _rate(self, step: int) -> float:
        return self.shape(self._progress(step))

    def _progress(self, step: int) -> float:
        # The length is asked for only once training runs: asked for before, Lightning makes the training loader early
        # and then doesn't restore its position when a run is resumed inside an epoch.
        return step / max(self.trainer.estimated_stepping_batches, 1) if step else 0.0

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the estimator's state; plain containers only, so that `weights_only` loads them."""
        checkpoint["sensitivity"] = {"name": self.sensitivity.name, **self.sensitivity.state_dict()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the estimator's state where it is of the same kind."""
        state = dict(checkpoint.get("sensitivity", {}))
        if state.pop("name", None) == self.sensitivity.name:
            self.sensitivity.load_state_dict(state)


def start_noise(seed: int, batch: Batch) -> Tensor:
    """The random start (B, C, H, W) of uniform radii: a function of the seed, the step and the position [T]."""
    draws = torch.randn(
        (batch.size, *batch.x.shape[1:]), generator=generator(seed, "noise", batch.step), dtype=torch.float32
    )
    return (START_NOISE * draws[batch.position.cpu()]).to(batch.x)


def radius_draws(seed: int, batch: Batch) -> Tensor:
    """One number in [0, 1) for each image, (B,): a function of the seed, the step and the position."""
    return torch.rand(batch.size, generator=generator(seed, "radii", batch.step))[batch.position.cpu()].to(batch.x)


def is_compiled(network: nn.Module) -> bool:
    """Whether `network.compile()` was called."""
    return getattr(network, "_compiled_call_impl", None) is not None


def modes_agree(network: nn.Module, x: Tensor) -> bool:
    """Whether the network's present mode and eval mode give the same logits, tried on the images x (N, C, H, W).

    Only then may clean logits of the training step serve the attack, which runs in eval mode.
    """
    flags = [(module, module.training) for module in network.modules()]
    devices = [x.device] if x.device.type == "cuda" else []
    with undisturbed(network), torch.no_grad(), torch.random.fork_rng(devices):
        evaluated = network(x)
        for module, training in flags:
            module.training = training
        return torch.equal(network(x), evaluated)
