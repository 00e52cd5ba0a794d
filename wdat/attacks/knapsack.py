"""The strongest distributional attack on accuracy: nearest adversarial points, then the knapsack. [K]"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from wdat.attacks.base import Attack, Context, Moved
from wdat.attacks.knapsack_allocation import Allocation, bootstrap, curve, solve
from wdat.attacks.minimum_norm import NearestAdversarial, nearest_adversarial
from wdat.attacks.search import Search
from wdat.gradients import ordinary, undisturbed
from wdat.precision import float32
from wdat.threat import ThreatModel

CURVE_POINTS = 64
FEW = 0.05  # of the attacked images may be left without a point by a short search
UNFOUND = (
    "knapsack: no misclassified point was found anywhere for {} of {} images, as where gradients vanish or mislead "
    "(gradient masking): its accuracy is no evidence of robustness; set attack_options.knapsack.effort=thorough, and "
    "compare with attacks=[autoattack]"
)


@dataclass
class Knapsack(Attack):
    """Move the cheapest images onto their nearest misclassified points until the budget is spent.

    The set that is returned moves whole images only; the optimum may also move a share of one more image's mass. It is
    an upper bound of A_δ, because distances are those of points that were found.

    Attributes:
        effort: How hard to look: `quick`, `default` or `thorough`, as `Search` has them.
        seed: Of random starts.
        candidates, targets, penalty, starts, steps, refine, bisections, fab, fab_targets: As `Effort` has them; None
            leaves the effort's own.
        nearest: Points found before, by the same search, on the same images, with the same network and norm; for a
            larger budget than they serve the search goes on. None searches.
    """

    name: ClassVar[str] = "knapsack"
    effort: str = field(default=Search.effort, kw_only=True)
    seed: int = field(default=0, kw_only=True)
    candidates: int | None = field(default=None, kw_only=True)
    targets: int | None = field(default=None, kw_only=True)
    penalty: int | None = field(default=None, kw_only=True)
    starts: int | None = field(default=None, kw_only=True)
    steps: int | None = field(default=None, kw_only=True)
    refine: int | None = field(default=None, kw_only=True)
    bisections: int | None = field(default=None, kw_only=True)
    fab: int | None = field(default=None, kw_only=True)
    fab_targets: int | None = field(default=None, kw_only=True)
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
        self,
        network: nn.Module,
        x: Tensor,
        y: Tensor,
        norm: str,
        context: Context | None = None,
        threats: Sequence[ThreatModel] = (),
        previous: NearestAdversarial | None = None,
    ) -> NearestAdversarial:
        """Search the nearest adversarial points of this process's images (N, C, H, W) with labels (N,).

        Args:
            network: Takes images in [0, 1], gives logits (N, K); left as it was found.
            x: Images in [0, 1].
            y: Labels.
            norm: Ground norm.
            context: What surrounds the call; all its processes make it.
            threats: Budgets to serve; none searches every image to the end.
            previous: What the same search found for smaller budgets.
        """
        (x, y), context = ordinary(x, y), context or Context()
        with undisturbed(network), float32(network, x, context.tf32):
            return self._search(network, x, y, norm, context, threats, previous)

    def prepared(
        self, network: nn.Module, x: Tensor, y: Tensor, threats: Sequence[ThreatModel], context: Context | None = None
    ) -> Knapsack:
        """The knapsack of points that serve all these budgets."""
        return replace(self, nearest=self.find(network, x, y, threats[0].norm, context, threats, self.nearest))

    def _search(
        self,
        network: nn.Module,
        x: Tensor,
        y: Tensor,
        norm: str,
        context: Context,
        threats: Sequence[ThreatModel],
        previous: NearestAdversarial | None,
    ) -> NearestAdversarial:
        around = (context.progress, context.index, threats, previous, context.processes)
        return nearest_adversarial(network, x, y, norm, self.search, *around)

    def _run(self, network: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, context: Context) -> Moved:
        nearest = self.nearest
        if nearest is None or not nearest.serves(threat, context.processes):
            nearest = self._search(network, x, y, threat.norm, context, [threat], nearest)
        whole, optimum = divide(nearest, threat, context)
        details = figures(nearest, optimum, threat, context)
        attacked = int((context.processes.gather(nearest.distances) > 0).sum())
        if details["unfound"] > FEW * attacked:
            warnings.warn(UNFOUND.format(details["unfound"], attacked), stacklevel=4)
        x_adv = torch.where(whole.view(-1, *[1] * (x.dim() - 1)), nearest.x_adv, x)
        radii = torch.where(whole, nearest.distances, 0.0)
        return Moved(x_adv, radii, threat.delta, None, details=details)


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
    effort = [[round(passes, 1), solve(gather(then), threat).accuracy] for passes, then in nearest.effort]
    served, distances = nearest.served(threat.p, context.processes), gather(nearest.distances)
    about = {
        "bound": "upper",
        "effort": effort,
        "valid_up_to": None if math.isinf(served) else served,
        "pointwise_accuracy": solve(distances, threat.pointwise()).accuracy,
        "unfound": int(distances.isinf().sum()),
    }
    return {**about, **_optimum(distances, optimum, threat)}


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
