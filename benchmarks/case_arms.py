"""The case study's networks and its ways to train them (docs/case-study.md)."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Network:
    """A network to fine-tune.

    Attributes:
        delta: δ, in 255ths.
        rate: Peak learning rate of fine-tuning, chosen on validation images (`preact_resnet18`: not yet).
        weights: Its file as found, in `WDAT_SHARED`; none if the study trains it.
        first: Overrides of `train.py` that make it, if it has no weights.
        settings: Overrides of every training of it.
    """

    delta: int
    rate: float
    weights: str | None = None
    first: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()

    def at(self, setting: str) -> str:
        """A setting with multiples of δ, as 2δ, or of the rate, as 2η, written out."""
        rates = re.sub(r"([\d.]+)η", lambda found: f"{float(found[1]) * self.rate:g}", setting)
        return re.sub(r"([\d.]+)δ", lambda found: f"{float(found[1]) * self.delta:g}/255", rates)


NETWORKS = {
    "resnet2b": Network(2, 0.02, "models/resnet2b.pt"),
    "cnn_a": Network(2, 0.005, "models/cnn_a_adv.pt"),
    "preact_resnet18": Network(
        8, 0.01,
        first=("experiment=trades2019", "threat=winf_linf", "data.crop=4", "trainer.max_epochs=30"),
        settings=("trainer.precision=bf16-mixed",),
    ),
}  # fmt: skip
SCRATCH_RATE = 0.1  # the best of 0.02, 0.05 and 0.1 for TRADES in four epochs, on validation images


AWP = "weight_perturbation=awp"
ASCENT = "objective=dual_ascent"


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        says: What it is, for tables.
        settings: Overrides of `train.py`; none for the network as found.
    """

    says: str
    settings: tuple[str, ...] = ()

    @property
    def passes(self) -> int:
        """What an epoch costs in epochs of plain training (each image once forward and once backward).

        One for every inner step, and one for every set of images in the objective: the images as they are, unless CE
        at perturbed images is all, and those of each inner attack. AWP passes each set twice. The grid of
        the dual's ascent, five forward passes, counts as two.
        """
        steps = [int(s.split(".steps=")[1]) for s in self.settings if ".steps=" in s]
        as_they_are = "objective=mart" in self.settings or all(not s.endswith(".loss=ce") for s in self.settings)
        grid = 2 * (ASCENT in self.settings)
        return sum(steps) + (len(steps) + as_they_are) * (1 + (AWP in self.settings)) + grid


def _inner(attack: str, loss: str, steps: int = 3) -> tuple[str, ...]:
    """An attack's inner steps; 2.5 radii in all, as 10 steps of a quarter make."""
    return f"{attack}.loss={loss}", f"{attack}.steps={steps}", f"{attack}.step_size={2.5 / steps:.3f}"


def pgd_at(delta: str, steps: int = 3) -> tuple[str, ...]:
    """CE at PGD's images, every image with one radius."""
    inner = _inner("objective.pointwise_attack", "ce", steps)
    return "objective=pgd_at", f"objective.pointwise_delta={delta}", *inner


def trades(delta: str, beta: float = 6) -> tuple[str, ...]:
    """TRADES, every image with one radius."""
    inner = _inner("objective.pointwise_attack", "kl")
    return "objective=trades", f"objective.pointwise_delta={delta}", f"objective.beta_p={beta:g}", *inner


def at_attack(attack: str, *more: str) -> tuple[str, ...]:
    """CE at the images of a training attack, as PGD-AT has it."""
    return f"attack={attack}", "objective=attack_at", *_inner("attack", "ce"), *more


def dual_ascent(delta: str, beta: float = 1) -> tuple[str, ...]:
    """The dual on the distances themselves."""
    return (
        ASCENT,
        f"objective.beta_clean={beta:g}",
        "attack=critical",
        *_inner("attack", "ce", 2),
        f"threat.delta={delta}",
    )


def wdat(attack: str, *more: str) -> tuple[str, ...]:
    """CE at the images as they are, and KL at those of a training attack."""
    return f"attack={attack}", *_inner("attack", "kl"), *more


def rate(value: float) -> str:
    """The peak learning rate."""
    return f"optimizer.lr={value:g}"


FINE_TUNING = (
    "threat.delta=1δ",
    "averaging=ema",
    "averaging.decay=0.999",
    "data.crop=0",
    "optimizer.weight_decay=0",
    "scheduler.warmup=0.05",
)
"""Settings of every arm."""

LAST = "averaging.decay=0"  # the average is the last step's weights

ARMS = {
    "as_found": Arm("as found"),
    "pgd_at": Arm("PGD-AT at δ (control)", pgd_at("1δ")),
    "pgd_at_2": Arm("PGD-AT at 2 δ", pgd_at("2δ")),
    "trades": Arm("TRADES at δ", trades("1δ")),
    "trades_2": Arm("TRADES at 2 δ", trades("2δ")),
    "wdat_ce": Arm("W-DAT, CE radii", wdat("wpgd_budget", "attack.radius_max=4")),
    "wdat_redlr": Arm("W-DAT, ReDLR radii", wdat("wpgd_budget", "attack.radius_max=4", "attack.radii_loss=redlr")),
    "combined": Arm(
        "combined", ("objective=combined", *wdat("wpgd_budget"), *_inner("objective.pointwise_attack", "kl"))
    ),
    "knapsack_budget": Arm("knapsack radii", at_attack("knapsack_budget")),
    "critical": Arm("critical radii d*", at_attack("critical")),
    "critical_draw": Arm("drawn radii d* U^(1/2)", at_attack("critical_draw")),
    "critical_trades": Arm("TRADES at d*", wdat("critical")),
    "wdat_2": Arm("W-DAT at 2 δ, CE radii", wdat("wpgd_budget", "attack.radius_max=4", "threat.delta=2δ")),
    "wdat_3": Arm("W-DAT at 3 δ, CE radii", wdat("wpgd_budget", "attack.radius_max=4", "threat.delta=3δ")),
    "wdat_beta": Arm("W-DAT, CE radii, β = 2", wdat("wpgd_budget", "attack.radius_max=4", "objective.beta_w=2")),
    "wdat_slow": Arm("W-DAT, CE radii, rate 0.005", wdat("wpgd_budget", "attack.radius_max=4", rate(0.005))),
    "wdat_slowest": Arm("W-DAT, CE radii, rate 0.001", wdat("wpgd_budget", "attack.radius_max=4", rate(0.001))),
    "wdat_last": Arm("W-DAT, CE radii, weights not averaged", wdat("wpgd_budget", "attack.radius_max=4", LAST)),
    "wdat_uncapped": Arm("W-DAT, CE radii, no cap", wdat("wpgd_budget", "attack.radius_max=null")),
    "budget_at_2": Arm("CE at W-DAT's images, 2 δ", at_attack("wpgd_budget", "attack.radius_max=4", "threat.delta=2δ")),
    "wdat_ema": Arm("W-DAT, CE radii, Υ by EMA", wdat("wpgd_budget", "attack.radius_max=4", "sensitivity=ema")),
    "wdat_exact": Arm(
        "W-DAT, CE radii, exact Υ every 75 steps",
        wdat("wpgd_budget", "attack.radius_max=4", "sensitivity=exact", "sensitivity.every=75"),
    ),
    "wdat_draw": Arm("W-DAT, drawn radii", wdat("critical_draw")),
    "draw_slow": Arm("drawn radii, rate 0.005", at_attack("critical_draw", rate(0.005))),
    "draw_crop": Arm("drawn radii, crops of 4 pixels", at_attack("critical_draw", "data.crop=4")),
    "draw_head": Arm("drawn radii, last layer", at_attack("critical_draw", "finetune=head")),
    "draw_reset": Arm("drawn radii, re-drawn last layer", at_attack("critical_draw", "finetune.init=reset_head")),
    "draw_perturb": Arm("drawn radii, perturbed weights", at_attack("critical_draw", "finetune.init=perturb")),
}
"""By name; `as_found` is not trained."""
