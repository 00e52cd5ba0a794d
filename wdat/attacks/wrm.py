"""WRM: ascend the loss minus a price on transport, in place of a budget (Sinha et al. 2018, arXiv 1710.10571).

The dual of the W_p ball is inf over γ ≥ 0 of γ δ^p + E sup_x' [J(x') − γ ‖x' − x‖_r^p]. The inner problem is one for
each image, so nothing couples a batch; the price γ is fixed, or follows the budget by steps down the dual's gradient
δ^p − E ‖x' − x‖_r^p **(ours)**.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import count
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from wdat.attacks.base import Context, Moved
from wdat.attacks.gradient import GradientAttack
from wdat.errors import SettingError, check_real
from wdat.sensitivity import Sensitivity
from wdat.threat import ThreatModel, direction, dual_norm, per_image

LARGEST = 10.0  # times the budget's cost that one dual step answers to


@dataclass
class WRM(GradientAttack):
    """x' ascends J(x') − γ ‖x' − x‖_r^p within [0, 1].

    For a loss with gradient g that is linear the solution is a move along h(g), the direction of steepest ascent, by
    (‖g‖_s/(p γ))^(q−1): for p = 2 in l2 it is g/(2γ). Step k moves the share min(1, a/√k) of the way there, with g at
    the current point; in l2 at p = 2 that is gradient ascent whose steps are in units of 1/(2γ). The source takes 15
    steps of length 1/√(t + 2) in units of the loss, which diverge once γ is large; other orders and norms are
    **(ours)**. The first step is at the images as they are.

    The state is the price that adapts: it begins at Υ/(p δ^(p−1)), right to first order, and is in checkpoints.

    Attributes:
        gamma: γ, the price of one unit of ‖x' − x‖_r^p in pixel units; None adapts it to the threat's budget.
        rate: Of the dual's steps: log γ grows by `rate` times (mean cost)/δ^p − 1 with every global batch.
        step_size: a.
    """

    name: ClassVar[str] = "wrm"
    for_training: ClassVar[bool] = True
    steps: int = field(default=15, kw_only=True)
    step_size: float = field(default=1.0, kw_only=True)
    gamma: float | None = field(default=None, kw_only=True)
    rate: float = field(default=0.05, kw_only=True)
    _log_gamma: float | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gamma is not None:
            check_real("attack.gamma", self.gamma, "(0, inf)", "a price is positive; null adapts it to the budget")
        check_real("attack.rate", self.rate, "(0, 1]", "of the steps of log gamma; 0.05 is usual")

    def threat_of(self, threat: ThreatModel) -> ThreatModel:
        """1 < p < inf: a price on transport stands for a budget only where the cost is finite."""
        if threat.is_pointwise:
            raise SettingError(
                f"attack={self.name} puts a price on ‖x' − x‖^p, which threat.p=inf doesn't have: set threat.p=2, or "
                "attack=pgd"
            )
        return super().threat_of(threat)

    def price(self, sensitivity: Sensitivity, threat: ThreatModel) -> float:
        """γ for the next images; infinite where nothing may move."""
        if self.gamma is not None:
            return self.gamma
        if self._log_gamma is not None:
            return math.exp(self._log_gamma)
        if threat.delta == 0:
            return math.inf
        first = sensitivity.upsilon() / (threat.p * threat.delta ** (threat.p - 1))
        self._log_gamma = math.log(first) if first > 0 else None
        return first or math.inf

    def state_dict(self) -> dict[str, Any]:
        return {"log_gamma": self._log_gamma}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._log_gamma = state["log_gamma"]

    def _run(self, network: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, context: Context) -> Moved:
        if context.sensitivity is None or not context.training:
            raise SettingError(f"attack {self.name} keeps no budget and trains only; to evaluate, use knapsack")
        clean, norms, sensitivity = self._clean(network, x, y, threat, context)
        target = self._target(network, x, y, context, clean)
        price, numbers = self.price(sensitivity, threat), count(1)
        bound = torch.zeros_like(norms)

        def move(z: Tensor, gradient: Tensor) -> Tensor:
            share = min(1.0, self.step_size / math.sqrt(next(numbers)))
            length = (dual_norm(gradient, threat.norm) / (threat.p * price)) ** (threat.q - 1)
            torch.maximum(bound, length, out=bound)
            aim = x + per_image(length, x) * direction(gradient, threat.norm)
            return torch.lerp(z, aim, share).clamp_(0, 1)

        z, _ = self._ascend(network, move(x, clean.gradient), y, target, move, context)
        self._learn(threat.distances(x, z), threat, context)
        return Moved(z, bound, None, None, norms, int((~clean.finite).sum()))

    def _learn(self, distances: Tensor, threat: ThreatModel, context: Context) -> None:
        """One step down the dual in log γ, by the cost of the global batch."""
        if self._log_gamma is None:
            return
        costs = ((distances.double() / threat.delta) ** threat.p).sum()
        total, n = context.processes.sum([float(costs), float(len(distances))])
        self._log_gamma += self.rate * (min(total / max(n, 1.0), LARGEST) - 1)
