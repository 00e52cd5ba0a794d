"""Training objectives: one small class each, called with a network, a batch and what surrounds the step.

E[CE(f(x), y)] + β_p E[KL(f(x) ‖ f(x_p))] + β_w E[KL(f(x) ‖ f(x_w))]: `WDAT` has β_p = 0 [A], `TRADES` β_w = 0 [T],
`Combined` both. `PGDAT` is E[CE(f(x_p), y)] (Madry et al. 2018), `AttackAT` E[CE(f(x_w), y)], `Clean` E[CE(f(x), y)];
`MART` (Wang et al. 2020) weighs TRADES' divergence by how unsure the network is.
Label smoothing, and the bounded generalised cross-entropy in its place, change the cross-entropies only; divergences
and attacks stay as they are.
"""

from wdat.objectives.base import Objective, StepContext, Term, Terms, total
from wdat.objectives.dual_ascent import DualAscent
from wdat.objectives.standard import MART, PGDAT, TRADES, WDAT, AttackAT, Clean, Combined

__all__ = [
    "MART", "PGDAT", "TRADES", "WDAT", "AttackAT", "Clean", "Combined", "DualAscent", "Objective", "StepContext",
    "Term", "Terms", "total",
]  # fmt: skip
