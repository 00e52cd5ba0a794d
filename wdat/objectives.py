"""Training objectives: sums of named, averaged terms.

E[CE(f(x), y)] + β_p E[KL(f(x) ‖ f(x_p))] + β_w E[KL(f(x) ‖ f(x_w))]: `wdat` has β_p = 0 [A], `trades` β_w = 0 [T],
`combined` both. `pgd_at` is E[CE(f(x_p), y)] (Madry et al. 2018), `attack_at` E[CE(f(x_w), y)], `clean` E[CE(f(x), y)].
Label smoothing changes the cross-entropies only; divergences and attacks stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from wdat.attacks import Attack
from wdat.errors import SettingError, unknown
from wdat.losses import cross_entropy, kl_divergence, log_probabilities, smoothed_cross_entropy
from wdat.threat import parse_budget

SMOOTH = ("all", "synthetic")


@dataclass(frozen=True)
class Terms:
    """Averages over a batch; the ones that an objective doesn't have are None.

    Attributes:
        loss: What is minimised.
        loss_clean: E[CE(f(x), y)].
        loss_pointwise: The term at x_p, without its factor.
        loss_distributional: The term at x_w, without its factor.
    """

    loss: Tensor
    loss_clean: Tensor | None = None
    loss_pointwise: Tensor | None = None
    loss_distributional: Tensor | None = None


@dataclass(frozen=True)
class Objective:
    """What is minimised, and which perturbed images it needs.

    Attributes:
        beta_p: Factor of the pointwise term; 0 leaves it out.
        beta_w: Factor of the distributional term; 0 leaves it out.
        clean: Whether there is a clean term.
        divergence: Whether perturbed terms are KL divergences from the clean prediction, or cross-entropies.
        pointwise_attack: Gives x_p, at p = inf.
        pointwise_delta: Budget of x_p in pixel units; None for the threat's.
        label_smoothing: Share of each label that is spread over all classes, in [0, 1).
        smooth: Which labels: `all`, or those of `synthetic` images only.

    Raises:
        SettingError: If a factor is negative, the pointwise attack is missing or no pointwise one, or the smoothing is
            out of range.
    """

    beta_p: float = 0.0
    beta_w: float = 0.0
    clean: bool = True
    divergence: bool = True
    pointwise_attack: Attack | None = None
    pointwise_delta: float | str | None = None
    label_smoothing: float = 0.0
    smooth: str = "all"

    def __post_init__(self) -> None:
        for key in ("beta_p", "beta_w"):
            if not getattr(self, key) >= 0:
                raise SettingError(f"objective.{key}={getattr(self, key)} must not be negative")
        if self.beta_p > 0 and (self.pointwise_attack is None or not self.pointwise_attack.pointwise):
            raise SettingError("objective.pointwise_attack must be a pointwise attack (pgd or fgsm) where beta_p > 0")
        if not 0 <= self.label_smoothing < 1:
            raise SettingError(f"objective.label_smoothing={self.label_smoothing} must be a share in [0, 1)")
        if self.smooth not in SMOOTH:
            raise unknown("choice of labels", self.smooth, SMOOTH, "objective.smooth")
        if not self.clean and self.beta_p == 0 and self.beta_w == 0:
            raise SettingError("objective has no term: set beta_p or beta_w, or clean=true")
        _ = self.pointwise_budget  # refuses an unreadable one before any work

    @property
    def pointwise_budget(self) -> float | None:
        """Budget of x_p in pixel units; None for the threat's."""
        delta = self.pointwise_delta
        return None if delta is None else parse_budget(delta, "objective.pointwise_delta")

    @property
    def uses_attack(self) -> bool:
        """Whether the distributional attack (`attack=…`) takes part."""
        return self.beta_w > 0

    @property
    def needs_logits(self) -> bool:
        """Whether a term is made of the clean logits."""
        return self.clean or self.divergence

    @property
    def smooths_synthetic(self) -> bool:
        """Whether labels are smoothed, and those of synthetic images only."""
        return self.label_smoothing > 0 and self.smooth == "synthetic"

    def cross_entropy(self, logits: Tensor, y: Tensor, synthetic: Tensor | None = None) -> Tensor:
        """Cross-entropy to the labels, smoothed where that is asked for; (N, K), (N,), (N,) bool or None → (N,)."""
        if self.label_smoothing == 0 or (self.smooths_synthetic and synthetic is None):
            return cross_entropy(logits, y)
        chosen = synthetic if self.smooths_synthetic and synthetic is not None else 1.0
        return smoothed_cross_entropy(logits, y, self.label_smoothing * chosen)

    def __call__(
        self,
        network: nn.Module,
        logits: Tensor | None,
        y: Tensor,
        x_p: Tensor | None,
        x_w: Tensor | None,
        synthetic: Tensor | None = None,
    ) -> Terms:
        """The terms on one batch; perturbed images pass through the network here, in its present mode.

        Raises:
            ValueError: If what a term needs is missing.

        Args:
            network: In train mode, with gradients.
            logits: Clean logits (N, K) with gradients; None where neither the clean term nor a divergence needs them.
            y: Labels (N,).
            x_p: Images (N, C, H, W) of the pointwise attack, if the objective has that term.
            x_w: Images of the distributional attack, if the objective has that term.
            synthetic: Which images are synthetic, (N,) bool; None where none are.
        """
        missing = [
            n
            for n, v, wanted in (
                ("logits", logits, self.needs_logits),
                ("x_p", x_p, self.beta_p > 0),
                ("x_w", x_w, self.beta_w > 0),
            )
            if wanted and v is None
        ]
        if missing:
            raise ValueError(f"this objective needs {', '.join(missing)}")
        clean = self.cross_entropy(logits, y, synthetic).mean() if self.clean and logits is not None else None
        log_clean = log_probabilities(logits) if self.divergence and logits is not None else None

        def term(x: Tensor | None) -> Tensor | None:
            if x is None:
                return None
            if log_clean is None:
                return self.cross_entropy(network(x), y, synthetic).mean()
            return kl_divergence(network(x), log_clean).mean()

        pointwise = term(x_p) if self.beta_p > 0 else None
        distributional = term(x_w) if self.beta_w > 0 else None
        parts = [clean]
        parts += [None if pointwise is None else self.beta_p * pointwise]
        parts += [None if distributional is None else self.beta_w * distributional]
        present = [part for part in parts if part is not None]
        loss = present[0]
        for part in present[1:]:
            loss = loss + part
        return Terms(loss, clean, pointwise, distributional)
