"""The objectives of the field: one small class each."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn

from wdat.attacks import PGD, Attack
from wdat.data.batch import Batch
from wdat.errors import SettingError
from wdat.losses import boosted_cross_entropy, bounded, kl_divergence, log_probabilities
from wdat.objectives.base import Objective, StepContext, Term, Terms, check_factor, of_labels
from wdat.threat import parse_budget


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
        check_factor("beta_w", self.beta_w)

    def __call__(self, network: nn.Module, batch: Batch, context: StepContext) -> Terms:
        x_w = context.distributional(with_logits=True) if self.beta_w else None
        return self.divergences(network, batch, context, distributional=(x_w, self.beta_w))


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
        check_factor("beta_p", self.beta_p)

    def __call__(self, network: nn.Module, batch: Batch, context: StepContext) -> Terms:
        x_p = self._moved(context, with_logits=True) if self.beta_p else None
        return self.divergences(network, batch, context, pointwise=(x_p, self.beta_p))


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
        check_factor("beta_p", self.beta_p)
        check_factor("beta_w", self.beta_w)

    def __call__(self, network: nn.Module, batch: Batch, context: StepContext) -> Terms:
        x_w = context.distributional(with_logits=True) if self.beta_w else None
        x_p = self._moved(context, with_logits=True) if self.beta_p else None
        moved = {"pointwise": (x_p, self.beta_p), "distributional": (x_w, self.beta_w)}
        return self.divergences(network, batch, context, **moved)


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
        check_factor("beta_p", self.beta_p)

    def __call__(self, network: nn.Module, batch: Batch, context: StepContext) -> Terms:
        moved = network(self._moved(context, with_logits=bool(self.beta_p)))
        boosted = of_labels(batch, lambda y: bounded(boosted_cross_entropy(moved, y), self.gce_q))
        terms = {"boosted": Term(self.cross_entropy(moved, batch) + boosted)}
        if self.beta_p:
            log_clean = log_probabilities(context.logits())
            unsure = 1 - of_labels(batch, lambda y: log_clean.gather(1, y[:, None]).squeeze(1).exp())
            terms["pointwise"] = Term(unsure * kl_divergence(moved, log_clean), self.beta_p)
        return terms
