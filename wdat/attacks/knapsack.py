"""The strongest distributional attack on accuracy: nearest adversarial points, then the knapsack. [K]"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from wdat.attacks.base import Attack, Context, Moved
from wdat.attacks.knapsack_allocation import Allocation, bootstrap, curve, solve
from wdat.attacks.minimum_norm import NearestAdversarial, Search, nearest_adversarial
from wdat.distributed import together
from wdat.gradients import ordinary, undisturbed
from wdat.threat import ThreatModel

CURVE_POINTS = 64


@dataclass
class Knapsack(Attack):
    """Move the cheapest images onto their nearest misclassified points until the budget is spent.

    The set that is returned moves whole images only; the optimum may also move a share of one more image's mass. It is
    an upper bound of A_δ, because distances are those of points that were found.

    Attributes:
        starts, targets, steps, bisections, fab, fab_targets, seed: How hard to look, as `Search` has it.
        nearest: Distances computed before, on the same images, with the same network and norm; None computes them.
    """

    name: ClassVar[str] = "knapsack"
    starts: int = field(default=Search.starts, kw_only=True)
    targets: int = field(default=Search.targets, kw_only=True)
    steps: int = field(default=Search.steps, kw_only=True)
    bisections: int = field(default=Search.bisections, kw_only=True)
    fab: int = field(default=Search.fab, kw_only=True)
    fab_targets: int = field(default=Search.fab_targets, kw_only=True)
    seed: int = field(default=0, kw_only=True)
    nearest: NearestAdversarial | None = field(default=None, kw_only=True, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.search  # refuses what can't be used before any work

    def threat_of(self, threat: ThreatModel) -> ThreatModel:
        """Any p in [1, inf]."""
        return threat

    @property
    def search(self) -> Search:
        """How hard to look."""
        return Search(**{f.name: getattr(self, f.name) for f in fields(Search)})

    def find(
        self, network: nn.Module, x: Tensor, y: Tensor, norm: str, context: Context | None = None
    ) -> NearestAdversarial:
        """Search the nearest adversarial points of this process's images (N, C, H, W) with labels (N,)."""
        x, y = ordinary(x, y)
        with undisturbed(network), torch.autocast(x.device.type, enabled=False):
            return self._search(network, x, y, norm, context or Context())

    def _search(self, network: nn.Module, x: Tensor, y: Tensor, norm: str, context: Context) -> NearestAdversarial:
        return nearest_adversarial(network, x, y, norm, self.search, context.progress, context.index)

    def _run(self, network: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, context: Context) -> Moved:
        if self.nearest is None:
            with together(context.processes):
                nearest = self._search(network, x, y, threat.norm, context)
        else:
            nearest = self.nearest
        whole, optimum = divide(nearest, threat, context)
        x_adv = torch.where(whole.view(-1, *[1] * (x.dim() - 1)), nearest.x_adv, x)
        radii = torch.where(whole, nearest.distances, 0.0)
        return Moved(x_adv, radii, threat.delta, None, details=figures(nearest, optimum, threat, context))


def divide(nearest: NearestAdversarial, threat: ThreatModel, context: Context) -> tuple[Tensor, Allocation]:
    """Solve the knapsack over all processes' images.

    Returns:
        Which of this process's images move whole, (N,) bool, and the optimum over all.
    """
    processes = context.processes
    optimum = solve(processes.gather(nearest.distances), threat)
    before = int(
        processes.gather(torch.tensor([len(nearest.distances)], device=nearest.distances.device))[
            : processes.rank
        ].sum()
    )
    mine = optimum.mass[before : before + len(nearest.distances)]
    return (mine >= 1) & (nearest.distances > 0), optimum


def figures(nearest: NearestAdversarial, optimum: Allocation, threat: ThreatModel, context: Context) -> dict[str, Any]:
    """What records and pictures say of the knapsack; keys as in `wdat.evaluation.details`."""
    gather = context.processes.gather
    effort = [[passes, solve(gather(then), threat).accuracy] for passes, then in nearest.effort]
    return {"bound": "upper", "effort": effort, **_optimum(gather(nearest.distances), optimum, threat)}


def certified_figures(radii: Tensor, threat: ThreatModel) -> dict[str, Any]:
    """The same of certified radii (N,), 0 where an image is misclassified: a lower bound of A_δ."""
    return {"bound": "lower", **_optimum(radii, solve(radii, threat), threat)}


def _optimum(distances: Tensor, optimum: Allocation, threat: ThreatModel) -> dict[str, Any]:
    low, high = bootstrap(distances, threat)
    return {
        "accuracy": optimum.accuracy,
        "accuracy_low": low,
        "accuracy_high": high,
        "distance": optimum.length,
        "critical_distance": optimum.critical,
        "moved": int(((optimum.mass > 0) & (distances > 0)).sum()),
        "curve": thinned(*curve(distances, threat.p)),
    }


def thinned(budgets: Tensor, accuracies: Tensor, points: int = CURVE_POINTS) -> list[list[float]]:
    """At most `points` points of a curve, evenly spread over its images, both ends included."""
    rows = torch.linspace(0, len(budgets) - 1, min(points, len(budgets))).round().long()
    return [[float(b), float(a)] for b, a in zip(budgets.cpu()[rows], accuracies.cpu()[rows], strict=True)]
