"""What surrounds one training step: clean logits, perturbed images and random numbers, made when they are asked for."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from wdat.attacks import Attack, AttackResult, Context
from wdat.attacks.base import Verification
from wdat.data.batch import Batch
from wdat.distributed import Processes
from wdat.errors import DIVERGED, SettingError
from wdat.gradients import eager, is_compiled, undisturbed
from wdat.losses import log_probabilities
from wdat.seeding import normal, uniform
from wdat.sensitivity import Estimator
from wdat.threat import ThreatModel

START_NOISE = 0.001  # standard deviation of the random start in pixel units, as in TRADES


class Step:
    """One process's part of one step; an objective's `StepContext`.

    One pass at the clean images serves the loss, the target of the attacks and the gradient that sets the radii, where
    train and eval mode agree; a compiled network frees its buffers in the first backward pass and can't share the last.

    Args:
        network: In train mode.
        batch: The images.
        threat: The threat trained against.
        attack: Gives x_w; None where the run has none.
        sensitivity: Estimates Υ of the training set.
        measure: Called before the attack; measures what the estimator wants of other training images.
        modes_agree: Whether the network's train and eval mode agree, tried on the images.
        processes: Hold the other parts of the batch.
        seed: The seed of the run.

    Attributes:
        result: What the distributional attack did; None if nobody has asked for it.
        verifications: What is still to be asked of the attacks that have run.
    """

    def __init__(
        self,
        network: nn.Module,
        batch: Batch,
        threat: ThreatModel,
        attack: Attack | None,
        sensitivity: Estimator,
        measure: Callable[[], None],
        modes_agree: Callable[[Tensor], bool],
        processes: Processes,
        seed: int,
    ) -> None:
        self.network, self.batch, self.threat, self.attack = network, batch, threat, attack
        self.sensitivity, self.measure, self.modes_agree = sensitivity, measure, modes_agree
        self.result: AttackResult | None = None
        self.verifications: list[Verification] = []
        self._logits: Tensor | None = None
        noise, uniform = partial(start_noise, seed, batch), partial(radius_draws, seed, batch)
        most = -(-batch.size // processes.world_size)
        self._context = Context(processes, noise=noise, uniform=uniform, most=most, training=True, deferred=True)

    def logits(self) -> Tensor:
        """Logits (B, K) of the clean images in train mode, with gradients."""
        if self._logits is None:
            self._logits = self.network(self.batch.x)
        return self._logits

    def distributional(self, with_logits: bool = False) -> Tensor:
        """Images (B, C, H, W) moved by the distributional attack, x_w."""
        if self.attack is None:
            raise SettingError("this objective asks for the images of a distributional attack: set attack")
        if self.result is None:
            if not self.attack.is_uniform(self.threat):
                self.measure()
            context = self._shared(with_logits, gradient=not self.attack.is_uniform(self.threat))
            context = replace(context, sensitivity=self.sensitivity, index=self.batch.index)
            self.result = self._attacked(self.attack, self.threat, context)
        return self.result.x_adv

    def pointwise(self, attack: Attack, delta: float | None = None, with_logits: bool = False) -> Tensor:
        """Images (B, C, H, W) moved by another attack at p = inf, x_p."""
        threat, context = self.threat.pointwise(delta), self._shared(with_logits, gradient=False)
        return self._attacked(attack, threat, context).x_adv

    def _attacked(self, attack: Attack, threat: ThreatModel, context: Context) -> AttackResult:
        result = attack(self.network, self.batch.x, self.batch.y, threat, context)
        if result.verification is not None:
            self.verifications.append(result.verification)
        return result

    @property
    def divides(self) -> bool:
        """Whether an attack has divided its budget by the sensitivities."""
        if self.result is None or self.attack is None:
            return False
        return not self.attack.by_distance and not self.attack.is_uniform(self.threat)

    def _shared(self, with_logits: bool, gradient: bool) -> Context:
        """What the attacks know, with a clean pass of which `logits` is made too, and perhaps an input gradient."""
        network, x = self.network, self.batch.x
        if with_logits and self._logits is None and self.modes_agree(x):
            whole = next(network.parameters()).requires_grad  # else backward would pass a frozen backbone to reach x
            gradient = gradient and whole and not is_compiled(network)
            x = x.detach().requires_grad_(True) if gradient else x
            self._logits = network(x)
            clean_pass = (x, self._logits) if gradient else None
            log_clean = log_probabilities(self._logits.detach())
            self._context = replace(self._context, log_clean=log_clean, clean_pass=clean_pass)
        return self._context


def start_noise(seed: int, batch: Batch) -> Tensor:
    """The random start (B, C, H, W) of uniform radii: a function of the seed, the step and the position [T]."""
    draws = normal(seed, "noise", batch.step, batch.position, batch.x.shape[1:].numel())
    return (START_NOISE * draws).view_as(batch.x).to(batch.x)


def radius_draws(seed: int, batch: Batch) -> Tensor:
    """One number in [0, 1) for each image, (B,): a function of the seed, the step and the position."""
    return uniform(seed, "radii", batch.step, batch.position).to(batch.x.dtype)


def modes_agree(network: nn.Module, x: Tensor) -> bool:
    """Whether the network's present mode and eval mode give the same logits, tried on the images x (N, C, H, W).

    Only then may clean logits of the training step serve the attack, which runs in eval mode.
    """
    flags = [(module, module.training) for module in network.modules()]
    devices = [x.device] if x.device.type == "cuda" else []
    with undisturbed(network), eager(network), torch.no_grad(), torch.random.fork_rng(devices):
        evaluated = network(x)
        for module, training in flags:
            module.training = training
        return torch.equal(network(x), evaluated)


def not_finite(network: nn.Module, batch: Batch, loss: float) -> str:
    """What is known of a loss that isn't finite on this process's part of the batch, and what to try."""
    rows = batch.index.tolist()
    with undisturbed(network), eager(network), torch.no_grad():
        fine = network(batch.x).isfinite().all(1)
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
