"""The knapsack: given each image's distance to its nearest misclassified point, the optimal division of a budget. [K]

For accuracy (0–1 loss) an optimal attacker attacks the cheapest images first until (1/N) Σ d_i^p = δ^p, the last one
fractionally (a share of its mass moves); at p = inf all images with d_i ≤ δ. With the true distances this is exactly
the adversarial accuracy A_δ; with distances found by an attack, which are too large, an *upper* bound; with certified
radii, which are too small, a *lower* bound. Everything is computed in units of δ, because d^p underflows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from wdat.threat import ThreatModel


@dataclass(frozen=True)
class Allocation:
    """How the budget is spent.

    Attributes:
        accuracy: What is left, in [0, 1], the fractional image included.
        mass: (N,), share of each image's mass that is moved onto its point, in [0, 1]; 1 for misclassified images,
            which cost nothing.
        critical: d*, the largest distance paid for; 0 where nothing is.
        length: W_p length that is spent.
    """

    accuracy: float
    mass: Tensor
    critical: float
    length: float


def solve(distances: Tensor, threat: ThreatModel) -> Allocation:
    """Attack the cheapest images first.

    Args:
        distances: (N,), in pixel units: 0 where misclassified, inf where no point is known.
        threat: Budget and order, p in [1, inf].
    """
    d = distances.detach().double()
    n = len(d)
    mass = (d <= 0).double()
    if threat.delta > 0 and threat.is_pointwise:
        mass = (d <= threat.delta).double()
    elif threat.delta > 0:
        cost, order = ((d / threat.delta) ** threat.p).sort()
        spent = cost.cumsum(0)
        whole = int((spent <= n * (1 + 1e-12)).sum())
        mass[order[:whole]] = 1.0
        if whole < n and cost[whole].isfinite():
            left = n - (float(spent[whole - 1]) if whole else 0.0)
            mass[order[whole]] = max(left, 0.0) / float(cost[whole])
    moved = mass * (d > 0)
    paid = d[moved > 0]
    critical = float(paid.max()) if len(paid) else 0.0
    return Allocation(1 - float(mass.sum()) / n, mass, critical, _length(d, moved, threat.p))


def critical_distance(distances: Tensor, counts: Tensor | None, threat: ThreatModel) -> float:
    """d*, the largest distance paid for, of a set of which some distances may stand for several images.

    Args:
        distances: (M,), as for `solve`.
        counts: (M,), how many images have each distance; None for one each.
        threat: Budget and order, p in [1, inf].
    """
    if counts is None:
        return solve(distances, threat).critical
    d, order = distances.detach().double().sort()
    counts = counts[order]
    if threat.delta == 0:
        return 0.0
    if threat.is_pointwise:
        paid = d <= threat.delta
    else:
        cost = counts * (d / threat.delta) ** threat.p
        spent_before = torch.cat([cost.new_zeros(1), cost.cumsum(0)[:-1]])
        paid = (spent_before < counts.sum()) & cost.isfinite()
    return float(d[paid].max()) if bool(paid.any()) else 0.0


def _length(d: Tensor, mass: Tensor, p: float) -> float:
    paid = d[mass > 0]
    if not len(paid):
        return 0.0
    largest = float(paid.max())
    if math.isinf(p):
        return largest
    return float(largest * (float(((paid / largest) ** p * mass[mass > 0]).sum()) / len(d)) ** (1 / p))


def curve(distances: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """The whole accuracy-against-budget curve, from one sort.

    Args:
        distances: (N,), as for `solve`.
        p: Order in [1, inf].

    Returns:
        Budgets δ_k, increasing from 0, and accuracies after each further image; between two of them accuracy is linear
        in δ^p (constant at p = inf). Images without a point are never reached.
    """
    d = distances.detach().double()
    n = len(d)
    reached = d[(d > 0) & d.isfinite()].sort().values
    right = float((d > 0).sum())
    accuracies = torch.cat([d.new_tensor([right]), right - torch.arange(1, len(reached) + 1, device=d.device)]) / n
    if not len(reached):
        return d.new_zeros(1), accuracies
    if math.isinf(p):
        budgets = reached
    else:
        largest = reached[-1]
        budgets = largest * (((reached / largest) ** p).cumsum(0) / n) ** (1 / p)
    return torch.cat([d.new_zeros(1), budgets]), accuracies


def bootstrap(
    distances: Tensor, threat: ThreatModel, resamples: int = 1000, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """Percentile interval of the accuracy over images, the knapsack solved anew in each resample.

    Args:
        distances: (N,), as for `solve`.
        threat: Budget and order.
        resamples: Number of resamples.
        seed: Of the resampling.
        level: Coverage.
    """
    d = distances.detach().double().cpu()
    n = len(d)
    generator = torch.Generator().manual_seed(seed)
    if threat.delta == 0:
        cost = torch.where(d > 0, torch.inf, 0.0).double()
    elif threat.is_pointwise:
        cost = torch.where(d <= threat.delta, 0.0, torch.inf).double()
    else:
        cost = (d / threat.delta) ** threat.p
    cost = cost.sort().values
    accuracies = []
    for _ in range(resamples):
        drawn = torch.randint(n, (n,), generator=generator)
        count = torch.bincount(drawn, minlength=n).double()  # times each image, in the order of its cost
        spent = torch.where(count > 0, count * cost, 0.0).cumsum(0)
        whole = int((spent <= n * (1 + 1e-12)).sum())
        mass = float(count[:whole].sum())
        if whole < n and cost[whole].isfinite() and cost[whole] > 0:
            left = n - (float(spent[whole - 1]) if whole else 0.0)
            mass += max(left, 0.0) / float(cost[whole])
        accuracies.append(1 - mass / n)
    tail = (1 - level) / 2
    values = torch.tensor(accuracies, dtype=torch.float64)
    low, high = values.quantile(values.new_tensor([tail, 1 - tail])).tolist()
    return float(low), float(high)
