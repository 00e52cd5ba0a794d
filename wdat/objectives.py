"""Training objectives: one small class each, called with a network, a batch and what surrounds the step.

E[CE(f(x), y)] + β_p E[KL(f(x) ‖ f(x_p))] + β_w E[KL(f(x) ‖ f(x_w))]: `WDAT` has β_p = 0 [A], `TRADES` β_w = 0 [T],
`Combined` both. `PGDAT` is E[CE(f(x_p), y)] (Madry et al. 2018), `AttackAT` E[CE(f(x_w), y)], `Clean` E[CE(f(x), y)];
`MART` (Wang et al. 2020) weighs TRADES' divergence by how unsure the network is.
Label smoothing, and the bounded generalised cross-entropy in its place, change the cross-entropies only; divergences
and attacks stay as they are.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from wdat.attacks import PGD, Attack
from wdat.data.batch import Batch
from wdat.errors import SettingError, check_real, check_whole, unknown
from wdat.gradients import undisturbed
from wdat.losses import (
    boosted_cross_entropy,
    bounded,
    cross_entropy,
    generalised_cross_entropy,
    kl_divergence,
    log_probabilities,
    margin,
    smoothed_cross_entropy,
)
from wdat.threat import parse_budget

SMOOTH = ("all", "synthetic")


class Term(NamedTuple):
    """One summand of an objective.

    Attributes:
        values: (B,), one for each image of this process.
        factor: What their mean is multiplied by.
    """

    values: Tensor
    factor: float = 1.0


Terms = dict[str, Term]  # by their names in the log: `clean`, `pointwise`, `distributional`, or an objective's own


def total(terms: Terms) -> Tensor:
    """The loss: the sum over the terms of their means, each times its factor."""
    parts = [term.values.mean() if term.factor == 1 else term.factor * term.values.mean() for term in terms.values()]
    loss = parts[0]
    for part in parts[1:]:
        loss = loss + part
    return loss


def of_labels(batch: Batch, values: Callable[[Tensor], Tensor]) -> Tensor:
    """A function of the labels (B,) → (B,), averaged over the two labels of each mixed image by their shares."""
    if batch.other is None or batch.share is None:
        return values(batch.y)
    return batch.share * values(batch.y) + (1 - batch.share) * values(batch.other)


class StepContext(Protocol):
    """What an objective may ask for in one step; nothing is computed before it is asked for.

    Attacks run in eval mode, as TRADES has it. `with_logits` says that `logits` will be asked for too: where train and
    eval mode agree, one pass at the clean images then serves both.
    """

    def logits(self) -> Tensor:
        """Logits (B, K) of the clean images in train mode, with gradients."""
        ...

    def distributional(self, with_logits: bool = False) -> Tensor:
        """Images (B, C, H, W) moved by the run's distributional attack, x_w."""
        ...

    def pointwise(self, attack: Attack, delta: float | None = None, with_logits: bool = False) -> Tensor:
        """Images (B, C, H, W) moved by another attack at p = inf, x_p; `delta` None for the threat's budget."""
        ...


@dataclass(frozen=True, kw_only=True)
class Objective(ABC):
    """What is minimised.

    Attributes:
        label_smoothing: Share of each label that the cross-entropies spread over all classes, in [0, 1).
        smooth: Which labels: `all`, or those of `synthetic` images only.
        gce_q: q of the generalised cross-entropy (1 − p_y^q)/q (Zhang & Sabuncu 2018, arXiv 1805.07836) in place of
            cross-entropy wherever the objective has it, in [0, 1]; 0 is cross-entropy. Attacks ascend their own loss
            whatever this is. At perturbed images it is **(ours)**: cross-entropy spends a small network's capacity on
            images that it can't hold, while accuracy only counts them.

    Raises:
        SettingError: If a setting is out of range.
    """

    label_smoothing: float = 0.0
    smooth: str = "all"
    gce_q: float = 0.0

    def __post_init__(self) -> None:
        check_real("objective.label_smoothing", self.label_smoothing, "[0, 1)", "a share of the label")
        hint = "q of the generalised cross-entropy; 0 is cross-entropy, 0.5 is usual"
        check_real("objective.gce_q", self.gce_q, "[0, 1]", hint)
        if self.gce_q and self.label_smoothing:
            raise SettingError(
                f"objective.label_smoothing={self.label_smoothing} belongs to cross-entropy, which "
                f"objective.gce_q={self.gce_q} replaces: set one of the two to 0"
            )
        if self.smooth not in SMOOTH:
            raise unknown("choice of labels", self.smooth, SMOOTH, "objective.smooth")

    def check(self, attack: Attack | None) -> None:
        """Refuse a distributional attack that makes no sense here.

        Raises:
            SettingError: With the one that does.
        """
        return

    @abstractmethod
    def __call__(self, network: nn.Module, batch: Batch, context: StepContext) -> Terms:
        """The terms on one process's part of a batch; perturbed images pass through the network here.

        Args:
            network: In train mode, with gradients.
            batch: Images, labels, and which images are synthetic.
            context: Gives clean logits and perturbed images.
        """

    def cross_entropy(self, logits: Tensor, batch: Batch) -> Tensor:
        """Cross-entropy to the labels, bounded, smoothed, of mixed images where that is asked for; (B, K) → (B,)."""
        if self.gce_q:
            return of_labels(batch, lambda y: generalised_cross_entropy(logits, y, self.gce_q))
        if self.label_smoothing == 0 or (self.smooth == "synthetic" and batch.synthetic is None):
            return of_labels(batch, lambda y: cross_entropy(logits, y))
        chosen = batch.synthetic if self.smooth == "synthetic" and batch.synthetic is not None else 1.0
        return of_labels(batch, lambda y: smoothed_cross_entropy(logits, y, self.label_smoothing * chosen))

    def _divergences(
        self, network: nn.Module, batch: Batch, context: StepContext, **moved: tuple[Tensor | None, float]
    ) -> Terms:
        """The clean term, and KL divergences at moved images with their factors; None where that is 0."""
        logits = context.logits()
        terms = {"clean": Term(self.cross_entropy(logits, batch))}
        log_clean = log_probabilities(logits)
        for name, (x, factor) in moved.items():
            if x is not None:
                terms[name] = Term(kl_divergence(network(x), log_clean), factor)
        return terms


def _check_factor(key: str, value: float) -> None:
    check_real(f"objective.{key}", value, "[0, inf)", "a factor isn't negative, and 0 leaves its term out")


@dataclass(frozen=True, kw_only=True)
class Clean(Objective):
    """E[CE(f(x), y)]."""

    def __call__(self, network: nn.Module, batch: Batch, context: StepContext) -> Terms:
        return {"clean": Term(self.cross_entropy(context.logits(), batch))}


@dataclass(frozen=True, kw_only=True)
class WDAT(Objective):
    """E[CE(f(x), y)] + β_w E[KL(f(x) ‖ f(x_w))] [A].

    Attributes:
        beta_w: β_w, factor of the distributional term.
    """

    beta_w: float = 6.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_factor("beta_w", self.beta_w)

    def __call__(self, network: nn.Module, batch: Batch, context: StepContext) -> Terms:
        x_w = context.distributional(with_logits=True) if self.beta_w else None
        return self._divergences(network, batch, context, distributional=(x_w, self.beta_w))


@dataclass(frozen=True, kw_only=True)
class AttackAT(Objective):
    """E[CE(f(x_w), y)]: adversarial training with the distributional attack **(ours)**."""

    def __call__(self, network: nn.Module, batch: Batch, context: StepContext) -> Terms:
        x_w = context.distributional()
        return {"distributional": Term(self.cross_entropy(network(x_w), batch))}


@dataclass(frozen=True, kw_only=True)
class _Pointwise(Objective):
    """What objectives with images x_p have in common.

    Attributes:
        pointwise_attack: Gives x_p, at p = inf.
        pointwise_delta: Budget of x_p in pixel units; None for the threat's.
    """

    pointwise_attack: Attack = field(default_factory=lambda: PGD(loss="kl", steps=10, step_size=0.25))
    pointwise_delta: float | str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.pointwise_attack.pointwise:
            raise SettingError(
                "objective.pointwise_attack must be a pointwise attack, such as wdat.attacks.PGD or FGSM"
            )
        if self.pointwise_attack.state_dict():
            raise SettingError(
                f"objective.pointwise_attack={self.pointwise_attack.name} learns as it trains, which is for the run's "
                f"own attack: attack={self.pointwise_attack.name} objective=attack_at, or objective=wdat"
            )
        _ = self._delta  # refuses an unreadable one before any work

    @property
    def _delta(self) -> float | None:
        given = self.pointwise_delta
        return None if given is None else parse_budget(given, "objective.pointwise_delta")

    def _moved(self, context: StepContext, with_logits: bool) -> Tensor:
        return context.pointwise(self.pointwise_attack, self._delta, with_logits)


@dataclass(frozen=True, kw_only=True)
class TRADES(_Pointwise):
    """E[CE(f(x), y)] + β_p E[KL(f(x) ‖ f(x_p))] [T].

    Attributes:
        beta_p: β_p, factor of the pointwise term.
    """

    beta_p: float = 6.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_factor("beta_p", self.beta_p)

    def __call__(self, network: nn.Module, batch: Batch, context: StepContext) -> Terms:
        x_p = self._moved(context, with_logits=True) if self.beta_p else None
        return self._divergences(network, batch, context, pointwise=(x_p, self.beta_p))


@dataclass(frozen=True, kw_only=True)
class Combined(_Pointwise):
    """E[CE(f(x), y)] + β_p E[KL(f(x) ‖ f(x_p))] + β_w E[KL(f(x) ‖ f(x_w))].

    Attributes:
        beta_p: β_p, factor of the pointwise term.
        beta_w: β_w, factor of the distributional term.
    """

    beta_p: float = 3.0
    beta_w: float = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_factor("beta_p", self.beta_p)
        _check_factor("beta_w", self.beta_w)

    def __call__(self, network: nn.Module, batch: Batch, context: StepContext) -> Terms:
        x_w = context.distributional(with_logits=True) if self.beta_w else None
        x_p = self._moved(context, with_logits=True) if self.beta_p else None
        moved = {"pointwise": (x_p, self.beta_p), "distributional": (x_w, self.beta_w)}
        return self._divergences(network, batch, context, **moved)


@dataclass(frozen=True, kw_only=True)
class PGDAT(_Pointwise):
    """E[CE(f(x_p), y)] (Madry et al. 2018)."""

    pointwise_attack: Attack = field(default_factory=lambda: PGD(loss="ce", steps=10, step_size=0.25))

    def __call__(self, network: nn.Module, batch: Batch, context: StepContext) -> Terms:
        x_p = self._moved(context, with_logits=False)
        return {"pointwise": Term(self.cross_entropy(network(x_p), batch))}


@dataclass(frozen=True, kw_only=True)
class MART(_Pointwise):
    """E[BCE(f(x_p), y)] + β_p E[(1 − p_y(x)) KL(f(x) ‖ f(x_p))] (Wang et al. 2020, ICLR).

    BCE = −log p_y − log(1 − max_{k≠y} p_k), p the softmax; x_p by PGD on cross-entropy. Images that the network doesn't
    know yet count more. With `gce_q` both logarithms log u become −(1 − u^q)/q **(ours)**. In the log `boosted` is the
    first term and `pointwise` the second.

    Attributes:
        beta_p: β_p, factor of the second term; 5 in the paper, 6 in its code.
    """

    pointwise_attack: Attack = field(default_factory=lambda: PGD(loss="ce", steps=10, step_size=0.25))
    beta_p: float = 5.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_factor("beta_p", self.beta_p)

    def __call__(self, network: nn.Module, batch: Batch, context: StepContext) -> Terms:
        moved = network(self._moved(context, with_logits=bool(self.beta_p)))
        boosted = of_labels(batch, lambda y: bounded(boosted_cross_entropy(moved, y), self.gce_q))
        terms = {"boosted": Term(self.cross_entropy(moved, batch) + boosted)}
        if self.beta_p:
            log_clean = log_probabilities(context.logits())
            unsure = 1 - of_labels(batch, lambda y: log_clean.gather(1, y[:, None]).squeeze(1).exp())
            terms["pointwise"] = Term(unsure * kl_divergence(moved, log_clean), self.beta_p)
        return terms


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
        _check_factor("beta_clean", self.beta_clean)
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


SLOPE = 0.5  # smallest slope that counts, in logits over the whole way


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
