"""Worst-case weights of a batch's images: an objective's mean becomes the largest weighted mean in a KL ball."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import brentq
from torch import Tensor

from wdat.distributed import Processes
from wdat.errors import SettingError, check_real, unknown
from wdat.objectives import Term, Terms

Floats = NDArray[np.float64]
RANGE = (-700.0, 40.0)  # of log τ and log (η − max ℓ), in units of the spread of the losses


def _from_uniform(z: Floats, s: float) -> Floats:
    """Weights ∝ 1/(η − ℓ_i), η = max ℓ + e^s, in logarithms."""
    return -np.logaddexp(s, np.log(np.maximum(-z, 1e-300)))


def _to_uniform(z: Floats, s: float) -> Floats:
    """Weights ∝ exp(ℓ_i/τ), τ = e^s, in logarithms."""
    return z * math.exp(-s)


SHAPES: dict[str, Callable[[Floats, float], Floats]] = {
    "uniform_weights": _from_uniform,
    "weights_uniform": _to_uniform,
}


def divergence(weights: Floats, order: str) -> float:
    """KL(u ‖ a) for `uniform_weights` and KL(a ‖ u) for `weights_uniform`, u uniform; a (N,) with sum 1."""
    n = len(weights)
    with np.errstate(divide="ignore"):
        logs = np.log(n * weights)
    if order == "uniform_weights":
        return float(-logs.mean())
    return float((weights * np.where(weights > 0, logs, 0.0)).sum())


def worst_weights(losses: Floats, radius: float, order: str) -> Floats:
    """The weights a (N,), with sum 1, that maximise Σ a_i ℓ_i within a KL ball around uniform.

    KL(u ‖ a) ≤ r has a_i ∝ 1/(η − ℓ_i); KL(a ‖ u) ≤ r has a_i ∝ exp(ℓ_i/τ). η or τ is found by one search for a root.

    Args:
        losses: ℓ (N,).
        radius: r, positive. Where KL(a ‖ u) can't reach it, the largest losses share all the weight.
        order: `uniform_weights` for KL(u ‖ a), `weights_uniform` for KL(a ‖ u).

    Returns:
        Uniform weights where the losses don't differ or aren't finite.
    """
    n, spread = len(losses), float(np.ptp(losses)) if len(losses) else 0.0
    uniform = np.full(n, 1 / max(n, 1))
    if not 0 < spread < math.inf:
        return uniform
    z, shape = (losses - losses.max()) / spread, SHAPES[order]

    def weights(s: float) -> Floats:
        logs = shape(z, s)
        found: Floats = np.exp(logs - logs.max())
        found /= found.sum()
        return found

    def excess(s: float) -> float:
        return divergence(weights(s), order) - radius

    low, high = RANGE
    if excess(low) <= 0:
        return weights(low)
    return weights(brentq(excess, low, high, xtol=1e-10)) if excess(high) < 0 else weights(high)


@dataclass(frozen=True, kw_only=True)
class KLReweighting:
    """Weighs the images of each global batch by the worst weights for their losses; costs no pass.

    `uniform_weights` is SR-WDRO's ball, KL(u ‖ a) ≤ r (Liu et al. 2025, ICLR, arXiv 2503.04315; r = 0.1), and
    `weights_uniform` ARMOR's, KL(a ‖ u) ≤ r (2025; r is searched). The loss of an image is its sum over the
    objective's terms. No gradient passes through the weights, as the derivative of a maximum has it.

    Attributes:
        radius: r.
        order: The order of the divergence's arguments.
    """

    radius: float = 0.1
    order: str = "uniform_weights"

    def __post_init__(self) -> None:
        hint = "a KL divergence; 0.1 is usual, reweighting=none for 0"
        check_real("reweighting.radius", self.radius, "(0, inf)", hint)
        if self.order not in SHAPES:
            raise unknown("order of the divergence", self.order, SHAPES, "reweighting.order")

    def check(self, batch_size: int) -> None:
        """Refuse batches in which there is nothing to weigh.

        Raises:
            SettingError: If a batch has one image.
        """
        if batch_size < 2:
            raise SettingError(
                f"data.batch_size={batch_size} leaves reweighting=kl nothing to weigh, because it compares the images "
                "of a batch: take at least 2, or reweighting=none"
            )

    def __call__(self, terms: Terms, processes: Processes) -> Terms:
        """The terms (B,), each image's values times its weight, whose mean over the global batch is 1."""
        losses = torch.stack([term.factor * term.values.detach() for term in terms.values()]).sum(0).double()
        weights = self.weights(losses, processes)
        return {name: Term(weights.to(term.values) * term.values, term.factor) for name, term in terms.items()}

    def weights(self, losses: Tensor, processes: Processes) -> Tensor:
        """Weights of this process's losses (B,), of mean 1 over the global batch; (B,), float64."""
        rank = torch.full_like(losses, processes.rank)
        everyone = processes.gather(torch.stack([losses, rank], 1)).cpu()
        found = worst_weights(everyone[:, 0].numpy(), self.radius, self.order) * len(everyone)
        return torch.from_numpy(found)[everyone[:, 1] == processes.rank].to(losses.device)
