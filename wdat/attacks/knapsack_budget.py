"""Training attacks that spend the budget as the optimal attacker would, by distances to the boundary **(ours)**.

The distance of an image to its nearest misclassified point is estimated to first order, margin over the dual norm of
its gradient, from the one gradient that is also the first step. The running values of the training set (whatever
estimator keeps them) give the critical distance d*, the largest that an optimal attacker pays for. No coupling between
the images of a batch, and a step costs what a TRADES step costs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from wdat.attacks.base import Context, Moved
from wdat.attacks.budget import WPGDBudget
from wdat.attacks.knapsack_allocation import critical_distance
from wdat.errors import SettingError, check_real
from wdat.gradients import Gradients
from wdat.sensitivity import Sensitivity
from wdat.threat import ThreatModel, dual_norm


@dataclass
class KnapsackBudget(WPGDBudget):
    """Images with d_i ≤ d* get the radius κ d_i, the others none; then pointwise PGD inside.

    Attributes:
        kappa: κ, how far beyond its first-order distance an image may move.
    """

    name: ClassVar[str] = "knapsack_budget"
    by_distance: ClassVar[bool] = True
    for_training: ClassVar[bool] = True
    radii_loss: str | None = field(default="margin", kw_only=True)
    kappa: float = field(default=1.2, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.radii_loss != "margin":
            raise SettingError(f"attack.radii_loss={self.radii_loss}: {self.name} measures distances, set it to margin")
        if self.radius_max is not None:
            raise SettingError(f"attack.radius_max={self.radius_max:g}: {self.name} has no cap, leave it out")
        check_real("attack.kappa", self.kappa, "(0, inf)", "positive; 1.2 is usual")

    def threat_of(self, threat: ThreatModel) -> ThreatModel:
        """Any p in [1, inf]."""
        return threat

    def _quantity(self, clean: Gradients, threat: ThreatModel) -> Tensor:
        """First-order distances: 0 where misclassified, inf where the gradient vanishes."""
        margins = (-clean.loss).clamp_min(0)
        distances = margins / dual_norm(clean.gradient, threat.norm)
        return torch.where(margins > 0, distances, 0.0)

    def _run(self, network: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, context: Context) -> Moved:
        if context.sensitivity is None:
            raise SettingError(f"attack {self.name} trains; to evaluate, use knapsack")
        return super()._run(network, x, y, threat, context)

    def _radii(self, norms: Tensor, sensitivity: Sensitivity, threat: ThreatModel, context: Context) -> Tensor:
        return torch.where(norms <= self._critical(sensitivity, threat), self.kappa * norms, 0.0)

    def _critical(self, sensitivity: Sensitivity, threat: ThreatModel) -> float:
        sample = sensitivity.sample()
        if sample is None:
            raise SettingError(
                f"sensitivity={sensitivity.name} keeps no values, from which attack={self.name} finds its critical "
                "distance; use table, subsample, exact or batch"
            )
        return critical_distance(*sample, threat)


@dataclass
class Critical(KnapsackBudget):
    """Uniform radii at the critical distance d* instead of δ: the optimal attacker reaches that far. At p = inf, δ."""

    name: ClassVar[str] = "critical"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kappa != KnapsackBudget.kappa:
            raise SettingError(f"attack.kappa={self.kappa} belongs to knapsack_budget; critical gives every image d*")

    def _radii(self, norms: Tensor, sensitivity: Sensitivity, threat: ThreatModel, context: Context) -> Tensor:
        return torch.full_like(norms, threat.delta if threat.is_pointwise else self._critical(sensitivity, threat))


@dataclass
class CriticalDraw(Critical):
    """Radii drawn from what the optimal attacker's accuracy depends on: δ_i = d* U^(1/p), U uniform in [0, 1).

    By duality A_δ = max over λ of E[min(1, λ d^p)] − λ δ^p, attained at λ = d*^(−p). So a small change of the network
    changes A_δ as it changes E[min(1, (d/d*)^p)], which is the mean, over radii r = d* U^(1/p), of the accuracy that a
    pointwise attacker of radius r leaves. At p = inf every radius is d* = δ, and this is PGD.
    """

    name: ClassVar[str] = "critical_draw"

    def _radii(self, norms: Tensor, sensitivity: Sensitivity, threat: ThreatModel, context: Context) -> Tensor:
        if context.uniform is None:
            raise ValueError(f"attack {self.name} draws its radii: give Context.uniform")
        drawn = context.uniform().to(norms) ** (1 / threat.p)
        return drawn * super()._radii(norms, sensitivity, threat, context)
