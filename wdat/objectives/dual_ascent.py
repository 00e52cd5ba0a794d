"""The knapsack's dual on the distances themselves **(ours)**."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from wdat.attacks import Attack
from wdat.data.batch import Batch
from wdat.errors import SettingError, check_real, check_whole
from wdat.gradients import undisturbed
from wdat.losses import margin
from wdat.objectives.base import Objective, StepContext, Term, Terms, check_factor

SLOPE = 0.5  # smallest slope that counts, in logits over the whole way


@dataclass(frozen=True, kw_only=True)
class DualAscent(Objective):
    """Ascends the knapsack's dual, max_λ E[min(1, λ d^p)] − λ δ^p, on the distances d themselves **(ours)**.

    x_w is to lie at the critical distance d* (`attack=critical`), where λ = d*^(−p). Let t be the share of the way from
    x to x_w at which the network first errs, so that min(1, λ d^p) is t^p along this way: found on a grid, by linear
    interpolation of the margin. The gradient of t^p in the weights is −p t^(p−1)/m' times that of the margin at the
    crossing, m' its slope along the way. Images that err as they are have t = 0 and no such gradient; they get
    cross-entropy, in the manner of MMA (Ding et al. 2020, arXiv 1812.02637). Images that hold at x_w get nothing. In
    the log `distances` is the margin at the crossings so weighted, about 0, and `misclassified` the cross-entropy.

    Attributes:
        order: p of the dual, finite.
        beta_clean: Factor of the cross-entropy at misclassified images.
        points: Points of the grid besides the image, each a forward pass.
    """

    order: float = 2.0
    beta_clean: float = 1.0
    points: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        hint = "the dual of a budget needs threat.p finite"
        check_real("objective.order", self.order, "[1, inf)", hint)
        check_factor("beta_clean", self.beta_clean)
        check_whole("objective.points", self.points, 1, "each costs a forward pass; 4 are usual")

    def check(self, attack: Attack | None) -> None:
        if attack is None or attack.name != "critical":
            name = attack.name if attack else "none"
            raise SettingError(
                f"attack={name}: objective=dual_ascent goes to the critical distance, set attack=critical"
            )

    def __call__(self, network: nn.Module, batch: Batch, context: StepContext) -> Terms:
        x, moved = batch.x, context.distributional()
        shares = torch.linspace(0, 1, self.points + 1).tolist()
        with undisturbed(network), torch.no_grad():
            margins = torch.stack([margin(network(torch.lerp(x, moved, t)), batch.y) for t in shares])
        t, slope = crossing(margins)
        logits = network(torch.lerp(x, moved, t.to(x)[:, None, None, None]))
        errs = margins[0] > 0
        weights = torch.where(errs | slope.isinf(), 0.0, self.order * t ** (self.order - 1) / slope)
        misclassified = torch.where(errs, self.cross_entropy(logits, batch), 0.0)
        return {
            "distances": Term(weights * margin(logits, batch.y)),
            "misclassified": Term(misclassified, self.beta_clean),
        }


def crossing(margins: Tensor) -> tuple[Tensor, Tensor]:
    """Where a margin first turns positive.

    Args:
        margins: (G + 1, B), at G + 1 points of [0, 1], equally spaced.

    Returns:
        The share t in [0, 1], (B,): 0 where it is positive from the start and 1 where it nowhere is; and the slope of
        the margin there, (B,), at least 0.5: inf where it nowhere is positive.
    """
    g = len(margins) - 1
    errs = margins > 0
    crosses, first = errs.any(0), errs.int().argmax(0)
    after = margins.gather(0, first.clamp_min(1)[None]).squeeze(0)
    before = margins.gather(0, (first.clamp_min(1) - 1)[None]).squeeze(0)
    rise = (after - before).clamp_min(1e-12)
    t = (first - 1 + (-before / rise).clamp(0, 1)) / g
    t = torch.where(crosses, torch.where(first == 0, 0.0, t), 1.0)
    return t, torch.where(crosses, (g * rise).clamp_min(SLOPE), torch.inf)
