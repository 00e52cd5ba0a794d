"""Intervals of the figures that an evaluation reports, and a warning where they contradict each other."""

from __future__ import annotations

from collections.abc import Sequence

from wdat.records import Record


def bootstrap_interval(hits: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Bootstrap interval over images of an accuracy whose outcomes are fixed.

    Resampling n outcomes of which `hits` are 1 gives a mean with the law Binomial(n, hits/n)/n, so the percentile
    interval is known without resampling.

    Args:
        hits: Images classified correctly.
        n: Images scored, at least 1.
        level: Coverage.

    Returns:
        Lower and upper end, in [0, 1].

    Example:
        >>> bootstrap_interval(50, 100)
        (0.4, 0.6)
    """
    from scipy.stats import binom  # slow to import

    tail = (1 - level) / 2
    low, high = binom.ppf([tail, 1 - tail], n, hits / n)
    return float(low) / n, float(high) / n


def masking_warning(records: Sequence[Record]) -> str | None:
    """A warning where the search behind the knapsack has missed points that AutoAttack found.

    At p = inf the knapsack's accuracy is that of an attack on each image, so a good search leaves no more than
    AutoAttack does. Where it leaves more, the network's gradients mislead the search (gradient masking), and the
    knapsack's figures at every order are too high.

    Args:
        records: Those of one evaluation. Compared are knapsack and AutoAttack of the same network, images, norm and
            budget; knapsack records of any order state what their points leave at p = inf.

    Returns:
        A line for each contradiction; None where there is none, or nothing to compare.
    """
    lines = []
    for knapsack in (r for r in records if r.attack == "knapsack"):
        left = knapsack.details.get("pointwise_accuracy")
        for other in (r for r in records if r.attack == "autoattack" and _same_images(r, knapsack)):
            if left is not None and left > other.accuracy + 0.5 / other.n:
                lines.append(
                    f"{knapsack.network}, {knapsack.norm} {knapsack.delta:.4g}: the knapsack's points leave "
                    f"{100 * left:.1f} % at p = inf, AutoAttack leaves {100 * other.accuracy:.1f} %: the search "
                    "missed points, as where gradients mislead it, and its figures are too high; set "
                    "attack_options.knapsack.effort=thorough or fab=100"
                )
    return "\n".join(dict.fromkeys(lines)) or None


def _same_images(one: Record, other: Record) -> bool:
    what = ("network", "checkpoint", "weights", "data", "split", "images", "n", "norm")
    return all(getattr(one, k) == getattr(other, k) for k in what) and abs(one.delta - other.delta) < 1e-12
