"""What the gradient attacks share: settings, the loop, and the memory of the best iterate."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from wdat.attacks.base import Attack, Context
from wdat.errors import check_real, check_whole
from wdat.gradients import Gradients, forward, gradients_of, input_gradients
from wdat.losses import check_classes, correct, get_label_loss, get_loss, log_probabilities
from wdat.sensitivity import Sensitivity
from wdat.threat import ThreatModel, dual_norm

Move = Callable[[Tensor, Tensor], Tensor]  # (iterate, gradient there) → next iterate


@dataclass
class GradientAttack(Attack):
    """Iterated steepest ascent; the defaults are the published settings of W-PGD [B].

    Attributes:
        loss: What is ascended: `ce`, `margin`, `dlr`, `redlr`, or `kl` (the TRADES divergence).
        radii_loss: Whose gradient at the clean images divides the budget and serves as the first step; None takes
            `loss`, or `ce` where that is `kl`, which has no gradient there.
        steps: Number of steps, at least 1.
        step_size: Length of one step, in units of the image's radius (`wpgd`: of the budget).
    """

    loss: str = field(default="ce", kw_only=True)
    radii_loss: str | None = field(default=None, kw_only=True)
    steps: int = field(default=50, kw_only=True)
    step_size: float = field(default=1.875 / 50, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._loss = get_loss(self.loss)
        name = self.radii_loss or ("ce" if self.loss == "kl" else self.loss)
        self._radii_loss = get_label_loss(name, "attack.radii_loss")
        check_whole("attack.steps", self.steps)
        check_real("attack.step_size", self.step_size, "(0, inf)", "positive, in units of the radius")

    def check(self, shape: Sequence[int], classes: int, threat: ThreatModel) -> None:
        super().check(shape, classes, threat)
        for loss in (self.loss, self.radii_loss):
            check_classes(loss or "", classes)

    def norms(self, network: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel) -> Tensor:
        """Dual norms n_i of the radii loss at the clean images, (N,); call it inside `undisturbed`."""
        return self._quantity(input_gradients(network, x, y, self._radii_loss, self.batch_size), threat)

    def _quantity(self, clean: Gradients, threat: ThreatModel) -> Tensor:
        """What the allocation wants to know of each image, (N,)."""
        return dual_norm(clean.gradient, threat.norm)

    def _clean(
        self, network: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, context: Context
    ) -> tuple[Gradients, Tensor, Sensitivity]:
        """The pass at the clean images: gradients, what the allocation wants (N,), and Υ that has observed it."""
        if context.clean_pass is not None:
            clean = gradients_of(*context.clean_pass, y, self._radii_loss, retain_graph=True)
        else:
            clean = input_gradients(network, x, y, self._radii_loss, self.batch_size)
        norms = self._quantity(clean, threat)
        sensitivity = context.sensitivity or Sensitivity(threat.q, context.processes)
        if self.by_distance or not threat.is_pointwise:
            sensitivity.observe(context.index, norms, context.most)
        if not threat.is_pointwise and not self.by_distance and sensitivity.upsilon() == 0:
            warnings.warn(f"{self.name}: every gradient is zero (Υ = 0), so no image moves", stacklevel=4)
        return clean, norms, sensitivity

    def _target(self, network: nn.Module, x: Tensor, y: Tensor, context: Context, clean: Gradients | None) -> Tensor:
        """What `loss` compares with: the labels, or the clean log-probabilities, from a pass already made if any."""
        if self.loss != "kl":
            return y
        if clean is not None:
            return log_probabilities(clean.logits)
        if context.log_clean is not None:
            return context.log_clean
        return log_probabilities(forward(network, x, self.batch_size))

    def _ascend(
        self, network: nn.Module, first: Tensor, y: Tensor, target: Tensor, move: Move, context: Context
    ) -> tuple[Tensor, float | None]:
        """Steps 2 to K from the first iterate.

        Returns:
            The last iterate and None in training; else the iterate with the lowest accuracy of the whole set, and the
            largest mean loss, over steps 1 to K.
        """
        x, best, lowest, loss_mean = first, first, 2.0, -torch.inf
        del first  # of a large set no iterate is held that isn't wanted any more

        def look(logits: Tensor, loss: Tensor) -> None:
            nonlocal best, lowest, loss_mean
            found = torch.stack([correct(logits, y).sum().double(), loss.double().sum()]).tolist()
            hits, total, n = context.processes.sum([*found, float(len(y))])
            loss_mean = max(loss_mean, total / max(n, 1))
            if hits / max(n, 1) < lowest:
                lowest, best = hits / max(n, 1), x

        for step in range(1, self.steps):
            g = input_gradients(network, x, target, self._loss, self.batch_size)
            if not context.training:
                look(g.logits, g.loss)
            x = move(x, g.gradient)
            del g
            if context.progress:
                context.progress(step, self.steps)
        if context.training:
            return x, None
        logits = forward(network, x, self.batch_size)
        look(logits, self._loss(logits, target))
        if context.progress:
            context.progress(self.steps, self.steps)
        return best, loss_mean
