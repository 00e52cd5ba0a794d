"""UDR: PGD in a soft ball, its wall as hard as a learned multiplier makes it (Bui et al. 2022, arXiv 2202.13437)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from wdat.attacks.base import Context, Moved
from wdat.attacks.budget import PGD
from wdat.attacks.gradient import Move
from wdat.errors import SettingError, check_real, check_whole
from wdat.threat import ThreatModel, contract, direction, per_image


@dataclass
class UDR(PGD):
    """d ← d + α sign(g), then where |d| > δ: d ← d − λ (α/τ) (d − sign(d) δ), then [0, 1].

    With λ α/τ = 1 this is PGD; it is taken as 1 where it is larger **(ours)**. λ moves against δ minus the mean |d| of
    the pixels of a global batch, every ten batches: the ball softens while pixels use less than it. In l2 the image
    takes the pixel's place **(ours)**. The start is the small random offset that PGD has here; the source starts
    uniformly in the ball. Every image is attacked alike, whatever `threat.p` is. The state, λ and the count of batches,
    is in checkpoints.

    Attributes:
        step_size: α in units of δ, as published 2/255 for 8/255.
        tau: τ in units of δ, likewise.
        multiplier: λ at the beginning.
        rate: By how much of δ − mean |d| λ moves, in pixel units.
        every: Batches between two moves of λ.
    """

    name: ClassVar[str] = "udr"
    for_training: ClassVar[bool] = True
    steps: int = field(default=10, kw_only=True)
    step_size: float = field(default=0.25, kw_only=True)
    tau: float = field(default=0.25, kw_only=True)
    multiplier: float = field(default=1.0, kw_only=True)
    rate: float = field(default=0.02, kw_only=True)
    every: int = field(default=10, kw_only=True)
    _lambda: float = field(default=0.0, init=False, repr=False, compare=False)
    _batches: int = field(default=0, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_real("attack.tau", self.tau, "(0, inf)", "in units of the radius, as attack.step_size; 0.25 is published")
        check_real("attack.multiplier", self.multiplier, "(0, inf)", "1 is published")
        check_real("attack.rate", self.rate, "[0, inf)", "0.02 is published; 0 keeps the multiplier")
        check_whole("attack.every", self.every)
        self._lambda = self.multiplier

    @property
    def hardness(self) -> float:
        """λ α/τ in [0, 1]: the share of what exceeds the ball that one step takes back."""
        return min(1.0, self._lambda * self.step_size / self.tau)

    def state_dict(self) -> dict[str, Any]:
        return {"multiplier": self._lambda, "batches": self._batches}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._lambda, self._batches = state["multiplier"], state["batches"]

    def _run(self, network: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, context: Context) -> Moved:
        if not context.training:
            raise SettingError(f"attack {self.name} keeps no budget and trains only; to evaluate, use knapsack or pgd")
        if context.noise is not None:
            radii, noise = x.new_full((len(x),), threat.delta), context.noise
            context = replace(context, noise=lambda: contract(torch.zeros_like(x), noise(), radii, threat.norm))
        moved = super()._run(network, x, y, threat, context)
        reach = moved.radii * self._reach() if moved.radii is not None else None
        self._learn(moved.x_adv - x, threat, context)
        return replace(moved, radii=reach, length=None)

    def _mover(self, origin: Tensor, radii: Tensor, norm: str) -> Move:
        length, hardness = per_image(self.step_size * radii, origin), self.hardness

        def move(z: Tensor, gradient: Tensor) -> Tensor:
            moved = z + length * direction(gradient, norm)
            return torch.lerp(moved, contract(origin, moved, radii, norm), hardness).clamp_(0, 1)

        return move

    def _reach(self) -> float:
        """How far K steps can come in units of δ, by the recursion of a pixel that always moves outward."""
        reach = 1.0  # the start is within the ball
        for _ in range(self.steps):
            reach += (1 - self.hardness) * self.step_size - self.hardness * (reach - 1)
        return reach

    def _learn(self, offset: Tensor, threat: ThreatModel, context: Context) -> None:
        """Move λ by the mean |d| of the global batch, over pixels in l∞ and over images in l2."""
        self._batches += 1
        if self._batches % self.every:
            return
        sizes = offset.abs() if threat.norm == "linf" else offset.flatten(1).norm(dim=1)
        total, n = context.processes.sum([float(sizes.double().sum()), float(sizes.numel())])
        self._lambda = max(0.0, self._lambda - self.rate * (threat.delta - total / max(n, 1.0)))
