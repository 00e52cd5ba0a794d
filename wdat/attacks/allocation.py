"""Radii: how one Wasserstein budget is divided among the images of a set.

An allocation is admissible where (mean δ_i^p)^(1/p) ≤ δ over the set that shares the budget.
"""

from __future__ import annotations

import torch
from torch import Tensor

from wdat.errors import check_real
from wdat.sensitivity import Sample, Sensitivity
from wdat.threat import ThreatModel


def sensitivity_radii(norms: Tensor, upsilon: float, q: float, delta: float) -> Tensor:
    """δ_i = δ (n_i/Υ)^(q−1), the first-order optimal division [B]; uniform at p = inf (q = 1), zero where Υ is.

    Over the set that gives Υ its W_p length is exactly δ, because (q−1)p = q.

    Args:
        norms: Dual norms n_i of the images at hand, (N,).
        upsilon: Υ of the set.
        q: Conjugate order, at least 1.
        delta: Budget in pixel units.

    Returns:
        Radii (N,), in the dtype of `norms`.
    """
    if q == 1:
        return torch.full_like(norms, delta)
    if upsilon == 0:
        return torch.zeros_like(norms)
    return delta * (norms / upsilon) ** (q - 1)


def capped_radii(norms: Tensor, sample: Sample, threat: ThreatModel, radius_max: float) -> Tensor:
    """δ_i = min(c n_i^(q−1), r_max), with c such that the W_p length over the set is δ again **(ours)**.

    With u_i = n_i^q and C = c^p the condition is mean min(C u_i, r_max^p) = δ^p. The left side is piecewise linear and
    increasing in C; with the k largest u capped, C = (N δ^p − k r_max^p)/Σ_{i>k} u_i, and the smallest k for which the
    next u is not capped is the solution. Exact, by one sort. Where even r_max on every image with a gradient doesn't
    spend the budget, all of these get r_max.

    Args:
        norms: Dual norms of the images at hand, (N,).
        sample: Dual norms of the whole set, on which c is solved.
        threat: Threat with 1 < p < inf.
        radius_max: r_max, at least δ, in pixel units.

    Returns:
        Radii (N,), in the dtype of `norms`.
    """
    q, p = threat.q, threat.p
    n, order = sample.values.detach().double().cpu().sort(descending=True)
    largest = float(n[0]) if n.numel() else 0.0
    if largest == 0 or threat.delta == 0:
        return torch.zeros_like(norms)
    u = (n / largest) ** q
    bound = (radius_max / threat.delta) ** p  # r_max^p in units of δ^p
    weights = torch.ones_like(u) if sample.counts is None else sample.counts.cpu()[order]
    tail = (weights * u).flip(0).cumsum(0).flip(0)  # Σ_{i ≥ k} u_i
    k = weights.cumsum(0) - weights
    left = weights.sum() - k * bound  # budget left for the others, in units of δ^p
    uncapped = (tail > 0) & (left > 0) & (left * u <= bound * tail * (1 + 1e-12))
    if not bool(uncapped.any()):
        return torch.where(norms > 0, torch.full_like(norms, radius_max), 0.0)
    first = int(uncapped.to(torch.uint8).argmax())
    scale = threat.delta * float(left[first] / tail[first]) ** (1 / p)  # c in units of 1/largest^(q−1)
    radii: Tensor = (scale * (norms.double() / largest) ** (q - 1)).clamp_max(radius_max)
    return radii.to(norms.dtype)


def allocate(norms: Tensor, sensitivity: Sensitivity, threat: ThreatModel, radius_max: float | None) -> Tensor:
    """Radii of the images at hand, by (capped) sensitivity; uniform at p = inf.

    Args:
        norms: Dual norms of the images at hand, (N,), already observed by `sensitivity`.
        sensitivity: Knows Υ of the set, and perhaps the values that give it.
        threat: Threat with p > 1.
        radius_max: r_max in units of δ; None for no cap.

    Returns:
        Radii (N,) in pixel units.

    Raises:
        SettingError: If r_max is smaller than δ, so that the budget couldn't be spent.
    """
    if threat.is_pointwise:
        return torch.full_like(norms, threat.delta)
    if radius_max is None:
        return sensitivity_radii(norms, sensitivity.upsilon(), threat.q, threat.delta)
    check_real("attack.radius_max", radius_max, "[1, inf)", "it is in units of the budget: at least 1, or null")
    bound = radius_max * threat.delta
    sample = sensitivity.sample()
    if sample is None:  # nothing to solve on: what the cap cuts is lost
        return sensitivity_radii(norms, sensitivity.upsilon(), threat.q, threat.delta).clamp_max(bound)
    return capped_radii(norms, sample, threat, bound)


def granted_share(norms: Tensor, sensitivity: Sensitivity, threat: ThreatModel) -> float:
    """The budget that a running Υ grants one (global) batch: δ (mean n_i^q)^(1/p) / Υ^(q/p) **(ours)**.

    It is the W_p length of the batch's sensitivity radii. Over the set that gives Υ it is δ.
    """
    if threat.is_pointwise:
        return threat.delta
    radii = sensitivity_radii(norms, sensitivity.upsilon(), threat.q, threat.delta)
    return threat.length(radii, sensitivity.processes)
