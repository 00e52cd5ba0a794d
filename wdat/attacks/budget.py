"""W-PGD-budget [A]: the budget is divided once, at the clean images; then each image ascends inside its own radius.

With uniform radii it is PGD, with a single step (W-)FGSM. No image depends on another once the radii are known, so
batches of any size can be attacked one by one: this is what trains. The details are **(ours)**.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from wdat.attacks.allocation import allocate
from wdat.attacks.base import Context, Moved
from wdat.attacks.gradient import GradientAttack, Move
from wdat.errors import check_real
from wdat.gradients import input_gradients
from wdat.sensitivity import Sensitivity
from wdat.threat import ThreatModel, contract, direction, per_image

SHAPE = 32


@dataclass
class WPGDBudget(GradientAttack):
    """Pointwise PGD inside radii that (capped) sensitivity fixed once.

    δ_i = min(c n_i^(q−1), r_max), then x ← Π_i(x + step_size δ_i h(∇J)), with Π_i onto {‖x − x_i‖_r ≤ δ_i} ∩ [0, 1].
    Images with radius zero take no steps in training.

    Attributes:
        radius_max: Cap of the radii in units of δ **(ours)**; None for none.
    """

    name: ClassVar[str] = "wpgd_budget"
    radius_max: float | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.radius_max is not None:
            hint = "it is in units of the budget: at least 1, or null for no cap"
            check_real("attack.radius_max", self.radius_max, "[1, inf)", hint)

    def _run(self, network: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, context: Context) -> Moved:
        clean, norms = None, None
        if threat.is_pointwise and context.noise is not None and not self.by_distance:
            radii = x.new_full((len(x),), threat.delta)
        else:
            clean, norms, sensitivity = self._clean(network, x, y, threat, context)
            radii = self._radii(norms, sensitivity, threat, context).to(x.dtype)
        target = self._target(network, x, y, context, clean)

        everyone = not context.training or (threat.is_pointwise and not self.by_distance)
        rows = slice(None) if everyone else _moving(radii)
        origin, bound, y, target = x[rows], radii[rows], y[rows], target[rows]
        move = self._mover(origin, bound, threat.norm)
        if len(origin) > self.batch_size:
            move = self._piecewise(origin, bound, threat.norm)

        dropped: Tensor | int = 0
        if clean is not None:
            first, dropped = [move(origin, clean.gradient[rows])], (~clean.finite).sum()
            del clean  # it is as large as the set; so is the first iterate, which is handed over
        else:  # uniform radii: every step ascends `loss`, the first from a small random offset, as in TRADES
            start = origin + context.noise()  # type: ignore[misc]  # not None in this branch
            first = [move(start, input_gradients(network, start, target, self._loss, self.batch_size).gradient)]
        z, loss_mean = self._ascend(network, first.pop(), y, target, move, context)
        return Moved(_put(z, rows, x), radii, self._share(threat, context), loss_mean, norms, dropped)

    def _radii(self, norms: Tensor, sensitivity: Sensitivity, threat: ThreatModel, context: Context) -> Tensor:
        return allocate(norms, sensitivity, threat, self.radius_max)

    def _piecewise(self, origin: Tensor, radii: Tensor, norm: str) -> Move:
        """The move of a large set, for which nothing as large as the set is kept."""

        def move(z: Tensor, gradient: Tensor) -> Tensor:
            moved = torch.empty_like(z)
            for start in range(0, len(z), self.batch_size):
                rows = slice(start, start + self.batch_size)
                moved[rows] = self._mover(origin[rows], radii[rows], norm)(z[rows], gradient[rows])
            return moved

        return move

    def _mover(self, origin: Tensor, radii: Tensor, norm: str) -> Move:
        """The move x ← Π_i(x + step_size δ_i h(g)); in linf the ball and [0, 1] are one box, found once."""
        length = per_image(self.step_size * radii, origin)
        if norm == "linf":
            bound = per_image(radii, origin)
            low, high = (origin - bound).clamp_min_(0), (origin + bound).clamp_max_(1)
            return lambda z, gradient: torch.addcmul(z, length, gradient.sign()).clamp_(low, high)

        def move(z: Tensor, gradient: Tensor) -> Tensor:
            return contract(origin, z + length * direction(gradient, norm), radii, norm).clamp_(0, 1)

        return move

    @staticmethod
    def _share(threat: ThreatModel, context: Context) -> float | None:
        """The whole set must keep the budget; with a running Υ one batch may spend more than its share."""
        return threat.delta if context.sensitivity is None else None


def _moving(radii: Tensor) -> slice | Tensor:
    """Indices of the images with positive radii; all of them as a slice, which copies nothing.

    On an accelerator others, which don't move, fill up their number to a multiple of `SHAPE`: kernels are chosen, and
    compiled networks made, for few sizes of batches.
    """
    if radii.device.type == "cpu":
        rows = (radii > 0).nonzero().squeeze(1)
    else:
        moving = radii > 0
        wanted = min(-(-int(moving.sum()) // SHAPE) * SHAPE, len(radii))
        rows = moving.to(torch.uint8).argsort(descending=True, stable=True)[:wanted]
    return slice(None) if len(rows) == len(radii) else rows


def _put(z: Tensor, rows: slice | Tensor, x: Tensor) -> Tensor:
    if isinstance(rows, slice):
        return z
    return x.index_copy(0, rows, z)


@dataclass
class PGD(WPGDBudget):
    """Projected gradient descent (Madry et al. 2018): W-PGD-budget at p = inf."""

    name: ClassVar[str] = "pgd"
    pointwise: ClassVar[bool] = True


@dataclass
class WFGSM(WPGDBudget):
    """W-FGSM [B]: x + δ h(∇J)(n/Υ)^(q−1), one step of full length."""

    name: ClassVar[str] = "wfgsm"
    steps: int = field(default=1, kw_only=True)
    step_size: float = field(default=1.0, kw_only=True)


@dataclass
class FGSM(WFGSM):
    """Fast gradient sign method (Goodfellow et al. 2015): W-FGSM at p = inf."""

    name: ClassVar[str] = "fgsm"
    pointwise: ClassVar[bool] = True
