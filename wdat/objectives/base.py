"""What every objective is: a network, a batch and what surrounds the step make terms of one value for each image."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor, nn

from wdat.attacks import Attack
from wdat.data.batch import Batch
from wdat.errors import SettingError, check_real, unknown
from wdat.losses import (
    cross_entropy,
    generalised_cross_entropy,
    kl_divergence,
    log_probabilities,
    smoothed_cross_entropy,
)

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

    def divergences(
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


def check_factor(key: str, value: float) -> None:
    """Refuse a negative factor of a term, `objective.KEY`."""
    check_real(f"objective.{key}", value, "[0, inf)", "a factor isn't negative, and 0 leaves its term out")
