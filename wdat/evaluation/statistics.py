"""Intervals of the figures that an evaluation reports."""

from __future__ import annotations


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
