"""Υ = (mean n_i^q)^(1/q), the sensitivity of the loss to a Wasserstein budget, and its estimators during training.

n_i is the dual norm of image i's input gradient. V(δ) = V(0) + δΥ + o(δ) ([B], Theorem 2), so Υ says how fast the
distributionally robust loss rises, and n_i/Υ how an optimal attacker divides the budget.

In training Υ changes with every update. [A] recomputes it over the whole training set after each one (`Exact` with
`every=1`); `Table` is nearly as good and costs nothing; the other estimators are cheaper and less exact. Where a
pool of synthetic images is mixed in, `Mixture` adds its part.
"""

from wdat.sensitivity.base import Estimator, Sample, Sensitivity
from wdat.sensitivity.estimators import Batch, Ema, Exact, Subsample
from wdat.sensitivity.mixture import Mixture, with_pool
from wdat.sensitivity.table import Table

__all__ = ["Batch", "Ema", "Estimator", "Exact", "Mixture", "Sample", "Sensitivity", "Subsample", "Table", "with_pool"]
