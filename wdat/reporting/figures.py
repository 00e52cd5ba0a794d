"""Figures derived from records: R_δ, the first-order estimate A·R^l, rows for tables, and the result in words. Pure.

Sources: [B] arXiv 2306.09844, the ratio R_δ and R^l.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from wdat.records import Record

STAGES = ("before", "after", "evaluate")
ESTIMATE = "first-order estimate"


@dataclass(frozen=True)
class Group:
    """What records must share to be compared: one network on one set of images, one norm and one order.

    Attributes:
        records: Clean records first, the latest of equal ones; pointwise attacks (p = inf) belong to every order.
    """

    network: str
    checkpoint: str
    data: str
    split: str
    norm: str
    p: float
    seed: int
    n: int
    records: tuple[Record, ...]

    @property
    def stages(self) -> list[str]:
        """Those that occur, in the order `before`, `after`, `evaluate`."""
        return [s for s in STAGES if any(r.stage == s for r in self.records)]

    @property
    def deltas(self) -> list[float]:
        """Budgets of the attacks, increasing."""
        found: list[float] = []
        for delta in sorted(r.delta for r in self.attacked()):
            if not (found and math.isclose(delta, found[-1])):
                found.append(delta)
        return found

    def clean(self, stage: str, loss: str | None = None) -> Record | None:
        """The clean record of a stage for a loss, or any if the loss has none of its own."""
        found = [r for r in self.records if r.stage == stage and r.attack == "none"]
        return next((r for r in found if r.loss == loss), found[0] if found else None)

    def attacked(self, stage: str | None = None, delta: float | None = None) -> list[Record]:
        """Records under attack, of a stage and a budget where they are given."""
        kept = [r for r in self.records if r.attack != "none" and stage in (None, r.stage)]
        return [r for r in kept if delta is None or math.isclose(r.delta, delta)]

    def estimates(self, stage: str) -> list[tuple[str, float, float]]:
        """Loss, δ and A·R^l, for every clean record of a stage and every budget at which it can be stated."""
        found = []
        for clean in (r for r in self.records if r.stage == stage and r.attack == "none" and r.p == self.p):
            for delta in self.deltas:
                value = first_order_estimate(clean, self.attacked(stage), delta)
                if value is not None:
                    found.append((clean.loss, delta, value))
        return found


def same_run(record: Record) -> tuple[Any, ...]:
    """What two measurements of the same thing share; the later one replaces the earlier (after a resume)."""
    options = json.dumps(record.options, sort_keys=True, default=str)
    return (record.stage, record.attack, record.loss, record.p, record.delta, options)


def groups(records: Sequence[Record]) -> list[Group]:
    """Records that may be compared, in the order in which they first occur; records of stage `epoch` are left out.

    Args:
        records: Of any number of runs. Checkpoints tell evaluations apart, but not a run's `before` from its `after`.
    """
    kept = [r for r in records if r.stage in STAGES]

    def place(r: Record) -> tuple[Any, ...]:
        return (r.network, r.checkpoint if r.stage == "evaluate" else "", r.data, r.split, r.norm, r.seed, r.n)

    found = []
    for key in dict.fromkeys(map(place, kept)):
        here = [r for r in kept if place(r) == key]
        orders = list(dict.fromkeys(r.p for r in here if r.attack == "none" or not math.isinf(r.p))) or [math.inf]
        for p in orders:
            latest = {same_run(r): r for r in here if r.p == p or (r.attack != "none" and math.isinf(r.p))}
            ordered = sorted(latest.values(), key=lambda r: (r.attack != "none", STAGES.index(r.stage)))
            network, checkpoint, data, split, norm, seed, n = key
            found.append(Group(network, checkpoint, data, split, norm, p, seed, n, tuple(ordered)))
    return found


def ratio(record: Record, clean: Record) -> float | None:
    """R_δ = A_δ/A [B]; None where the clean accuracy is 0."""
    return record.accuracy / clean.accuracy if clean.accuracy > 0 else None


def first_order_estimate(clean: Record, attacked: Sequence[Record], delta: float) -> float | None:
    """A·R^l with R^l = min over V of (W(0) − V)/(W(0) − V(0)), an ESTIMATE of a lower bound of A_δ [B], never a bound.

    V runs over V(0) + δΥ and the largest mean loss under attack, for the same stage, loss, p, norm and δ. It is valid
    as δ → 0 only: V(δ) exceeds both, so at usual budgets the estimate can exceed A_δ.

    Args:
        clean: The clean record of the loss.
        attacked: Records under attack; those of other losses, orders, norms, stages and budgets are passed over.
        delta: Budget in pixel units.

    Returns:
        In [0, A]; None where it can't be stated: nothing is misclassified, W(0) ≤ V(0), or no V is known.
    """
    low, high = clean.loss_mean, clean.loss_misclassified
    if low is None or high is None or not high > low:
        return None
    values = [] if clean.upsilon is None else [low + delta * clean.upsilon]
    for r in attacked:
        same = (r.stage, r.loss, r.p, r.norm) == (clean.stage, clean.loss, clean.p, clean.norm)
        if same and r.attack != "none" and math.isclose(r.delta, delta) and r.loss_mean is not None:
            values.append(r.loss_mean)
    if not values:
        return None
    left = (high - max(values)) / (high - low)
    return clean.accuracy * min(max(left, 0.0), 1.0)


def bound_of(record: Record) -> str:
    """What an accuracy says of A_δ: `exact` for clean ones, `upper` under attack, `lower` for certified ones."""
    if record.attack == "none":
        return "exact"
    return str(record.details.get("bound") or ("lower" if record.attack == "certified" else "upper"))


def interval_of(record: Record) -> str:
    """What an interval means: `images`, `conditional` on fixed outcomes, or `solved anew` in each resample."""
    if "critical_distance" in record.details or record.attack in ("knapsack", "certified"):
        return "solved anew"
    return "images" if record.attack == "none" or math.isinf(record.p) else "conditional"


def order_name(p: float) -> str:
    """`W_2`, or `pointwise` at p = inf."""
    return "pointwise" if math.isinf(p) else f"W_{p:g}"


def budget_name(delta: float | None, norm: str) -> str:
    """A length in pixel units as people write it: `8/255` for linf, a decimal for l2."""
    if delta is None:
        return "–"
    return f"{255 * delta:.3g}/255" if norm == "linf" else f"{delta:.3g}"


def summary_rows(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Plain rows for tables, group by group: clean figures, attacks by budget, then first-order estimates.

    Returns:
        One dict a row, with what the group shares, and `stage, kind, bound, attack, loss, delta, accuracy, low, high,
        interval, ratio, distance, seconds, loss_mean, upsilon, loss_misclassified`; a figure that doesn't exist is
        None.
    """
    rows: list[dict[str, Any]] = []
    for group in groups(records):
        shared = {k: getattr(group, k) for k in ("network", "checkpoint", "data", "split", "norm", "p", "seed", "n")}
        for r in sorted(group.records, key=lambda r: r.delta):
            clean = group.clean(r.stage, r.loss)
            kind = "clean" if r.attack == "none" else order_name(r.p)
            rows.append(shared | _row(r, kind) | {"ratio": ratio(r, clean) if clean else None})
        for stage in group.stages:
            for loss, delta, value in group.estimates(stage):
                clean = group.clean(stage, loss)
                share = value / clean.accuracy if clean and clean.accuracy > 0 else None
                about = {"stage": stage, "kind": ESTIMATE, "bound": "estimate", "attack": "A·R^l", "loss": loss}
                rows.append({**shared, **_EMPTY, **about, "delta": delta, "accuracy": value, "ratio": share})
    return rows


_EMPTY: Mapping[str, Any] = dict.fromkeys(
    ("low", "high", "interval", "distance", "seconds", "loss_mean", "upsilon", "loss_misclassified")
)


def _row(r: Record, kind: str) -> dict[str, Any]:
    return {
        "stage": r.stage, "kind": kind, "bound": bound_of(r), "attack": r.attack, "loss": r.loss, "delta": r.delta,
        "accuracy": r.accuracy, "low": r.accuracy_low, "high": r.accuracy_high, "interval": interval_of(r),
        "distance": r.distance, "seconds": r.seconds, "loss_mean": r.loss_mean, "upsilon": r.upsilon,
        "loss_misclassified": r.loss_misclassified,
    }  # fmt: skip


NAMES = {"wpgd": "W-PGD", "wfgsm": "W-FGSM", "pgd": "PGD", "fgsm": "FGSM", "wpgd_budget": "W-PGD-budget",
         "autoattack": "AutoAttack"}  # fmt: skip


def attack_name(record: Record) -> str:
    """The attack as people write it, with its loss."""
    return (
        "the knapsack" if record.attack == "knapsack" else f"{NAMES.get(record.attack, record.attack)} ({record.loss})"
    )


def percent(share: float) -> str:
    """A share as a percentage."""
    return f"{100 * share:.1f}\N{NO-BREAK SPACE}%"


def in_words(group: Group, stage: str) -> list[str]:
    """What a stage found: one sentence on clean images, then one text a budget. Upper bounds are called so."""
    clean = group.clean(stage)
    said = [f"Of {group.n} images {percent(clean.accuracy)} are classified correctly."] if clean else []
    if clean and clean.accuracy == 0:
        return said
    return said + [text for delta in group.deltas if (text := _budget_in_words(group, stage, delta))]


def _budget_in_words(group: Group, stage: str, delta: float) -> str:
    here = group.attacked(stage, delta)
    upper = sorted((r for r in here if bound_of(r) == "upper"), key=lambda r: r.accuracy)
    floor = max((r.accuracy for r in here if bound_of(r) == "lower" and r.p == group.p), default=None)
    others = [r for r in upper if r.attack != "knapsack"]
    point = next((r for r in others if math.isinf(r.p)), None)
    shared = next((r for r in others if not math.isinf(r.p)), None)
    best = next((r for r in upper if r.attack == "knapsack" and r.p == group.p), None)
    order, clauses = order_name(group.p), []
    if point:
        clauses.append(f"{attack_name(point)}, which moves each image by at most δ, leaves {percent(point.accuracy)}")
    if shared:
        clauses.append(f"{attack_name(shared)}, with one {order} budget for all, leaves {percent(shared.accuracy)}")
    if best:
        what = "moves every image within reach of δ" if math.isinf(best.p) else f"divides the {order} budget optimally"
        clauses.append(f"{'but ' if clauses else ''}an attacker who {what} leaves at most {percent(best.accuracy)}")
    at = f"δ = {budget_name(delta, group.norm)}: "
    ends = [f"at most {percent(upper[0].accuracy)}"] if upper else []
    ends += [f"at least {percent(floor)} by certified radii"] if floor is not None else []
    if not ends:
        return ""
    proved = f"So adversarial accuracy A_δ is {' and '.join(ends)}."
    if upper and floor is not None and floor > upper[0].accuracy + 1e-9:
        proved += " That is a contradiction: check the certificates."
    return at + (f"{'; '.join(clauses)}. " if clauses else "") + proved


def special_cases(group: Group) -> list[str]:
    """What degenerate cases mean, one text for each that occurs."""
    notes: dict[str, list[str]] = {}
    for r in (r for r in group.records if r.attack == "none"):
        who = "The network" if r.stage == "evaluate" else f"The network {r.stage} training"
        if r.accuracy == 0:
            notes[f"{who} misclassifies every image: nothing is left to attack, every accuracy is 0, and R_δ and the "
                  f"{ESTIMATE} don't exist."] = []  # fmt: skip
        elif r.accuracy == 1:
            notes[f"{who} misclassifies nothing here: W(0), the mean loss over misclassified images, doesn't exist, "
                  f"and so the {ESTIMATE} doesn't either."] = []  # fmt: skip
        elif r.loss_misclassified is not None and r.loss_mean is not None and r.loss_misclassified <= r.loss_mean:
            notes.setdefault(f"{who} has W(0) ≤ V(0) under @: the {ESTIMATE} doesn't exist.", []).append(r.loss)
        if r.upsilon == 0:
            notes.setdefault(f"{who} has Υ = 0 under @: no image's loss changes to first order, as with constant "
                             "logits or a saturated loss. Gradient attacks don't move the images then, and accuracy "
                             "under them says nothing about robustness.", []).append(r.loss)  # fmt: skip
        elif r.upsilon is None:
            notes.setdefault(f"{who} has no finite Υ under @, or it wasn't measured.", []).append(r.loss)
    for r in group.attacked():
        if r.dropped:
            notes[f"{attack_name(r)} left out {r.dropped} of {r.set_size} images: no finite gradient."] = []
        if r.set_size != r.n:
            notes[f"{attack_name(r)} shared its budget over {r.set_size} images; {r.n} are scored."] = []
    return [text.replace("@", ", ".join(losses)) if losses else text for text, losses in notes.items()]
