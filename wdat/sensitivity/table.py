"""Υ of the training set for free: one stored norm an image, refreshed by gradients that the attack computes **(ours)**.

Every step takes the gradients of its batch at the clean images anyway: they set the radii and are the attack's first
step. So the batch's entries of a table of n_i can be refreshed at no cost, and Υ read off the table. What is wrong with
this is age: an entry is on average half an epoch old or more, while fine-tuning shrinks all norms together.

**The model.** n_i(t) = a_i g(t) ξ: a common drift g (training makes the whole network flatter or steeper), an image's
own slowly changing level a_i, and noise ξ of the augmentation with a mean that stays. The table stores
m_i = n_i(t_i)/ĝ(t_i) at the image's last visit t_i and reads g with today's estimate, n̂_i(t) = ĝ(t) m_i; then Υ̂ =
ĝ(t) (mean m_i^q)^(1/q) costs one float an image and no pass over the set.

**The gain.** Let e = log g − log ĝ be its error. A batch B compares fresh with predicted,

    r = (1/q) log(Σ_B n_i^q / Σ_B (ĝ m_i)^q) ≈ e(t) − mean_B e(t_i),

the error that has *grown* since the batch was last seen, about T steps before (an epoch). Taking ĝ ← ĝ exp(r) at every
step would repeat the same correction many times over, because every batch of the epoch sees the same growth (a shuffled
epoch always draws the stalest entries of the table): the gain runs ahead, swings back an epoch later, and takes up each
batch's noise in full. So a step takes the share 1/w of what the last w batches say, pooled:

    log ĝ ← log ĝ + r_w / w,    r_w = (1/q) log(Σ_w Σ_B min(n_i/ĝ, c)^q / Σ_w Σ_B min(m_i, c)^q).

With a steady drift of ρ a step the gain then follows at ρ T/(T + w), leaving w/(T + w) of the bias of the uncorrected
table (little where an epoch has hundreds of batches), and it forgets single batches over w steps. Drift is fastest
where fine-tuning begins, so w starts at 10 batches and grows by one in five up to `window`: less bias first, less noise
later. Both sums are clipped at c, a high quantile of the m_i: one near tie would otherwise move the gain of all images
(with ReDLR the sums are one image's). Clipping slows the gain a little; it doesn't bias it, because it treats both
sides alike.

**Reading.** Υ and the sums that cap the radii come from a histogram of the m_i with 1.6 % wide bins, kept by adding and
taking away the batch's entries, so that a step costs the same for 10³ and 10⁷ images.

**Where it is off.** Where some images drift and others don't (a re-drawn last layer), the common gain is a compromise
until each was visited. In an epoch of few batches relative to w it trusts the stored values more than the gain.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from wdat.distributed import Processes
from wdat.errors import check_real, check_whole
from wdat.sensitivity.base import Estimator, Sample
from wdat.sensitivity.histogram import Histogram
from wdat.threat import power_mean

FIRST, GROWTH = 10, 5  # w begins at FIRST batches and grows by one in GROWTH


class Table(Estimator):
    """Every training image's last dual norm over a running gain; filled by one exact pass before the first step.

    Where the attack measures distances instead (`knapsack_budget`, `critical`), they are kept as they are: zeros and
    infinities have no common drift.

    Args:
        window: The largest w, batches that the gain pools and over which it takes up what they say; None for no
            correction.
        clip: Quantile of the predicted norms at which the gain's sums are clipped, in (0, 1].
        every: Steps between further exact passes; None for none.
    """

    name = "table"

    def __init__(self, window: int | None = 30, clip: float = 0.99, every: int | None = None) -> None:
        super().__init__()
        if window is not None:
            check_whole("sensitivity.window", window, hint="batches, or null for no correction")
        check_real("sensitivity.clip", clip, "(0, 1]", "a quantile; 0.99 is usual, 1 clips nothing")
        if every is not None:
            check_whole("sensitivity.every", every, hint="steps, or null for the first pass alone")
        self.window, self.clip, self.every = window, clip, every
        self._stored: Tensor | None = None  # (n_train,) float32: m_i
        self._log_gain = 0.0
        self._recent: list[tuple[float, float]] = []  # fresh and predicted sums of the last batches
        self._seen = 0  # batches since the table was filled
        self._unit = 1.0  # Υ when it was filled; sums of powers are taken in it
        self._follow = True
        self._histogram = Histogram(2.0)
        self._sample: Sample | None = None

    def begin(self, n_train: int, q: float, seed: int, processes: Processes, distances: bool = False) -> None:
        super().begin(n_train, q, seed, processes, distances)
        self._follow = self.window is not None and not distances
        if self._stored is not None and len(self._stored) != n_train:
            self._stored = None  # another set: fill anew
        order = q if math.isfinite(q) else 1.0
        if self._histogram.order != order or len(self._histogram) != n_train:
            self._count(order)

    def _count(self, order: float) -> None:
        self._histogram, self._sample = Histogram(order), None
        if self._stored is not None:
            self._histogram.add(self._stored)

    def wanted(self, step: int) -> Tensor | None:
        due = self._stored is None or (self.every is not None and step % self.every == 0)
        return torch.arange(self.n_train) if due else None

    def measured(self, index: Tensor, norms: Tensor) -> None:
        stored = torch.zeros(self.n_train, dtype=torch.float32)
        stored[index.cpu()] = norms.detach().float().cpu()
        self._stored, self._log_gain, self._recent, self._seen = stored, 0.0, [], 0
        self._count(self._histogram.order)
        self._unit = self.upsilon() or 1.0

    def take(self, rows: Tensor | None, norms: Tensor) -> None:
        """Refresh the batch's entries (all processes' together) and the gain.

        Args:
            rows: (N,), rows in the training set, each at most once in a global batch.
            norms: (N,), their fresh dual norms.

        Raises:
            RuntimeError: If the table wasn't filled, or the batch doesn't say which images it holds.
        """
        if rows is None or self._stored is None:
            raise RuntimeError("the table needs to be filled (measured) and to know which images are observed (index)")
        fresh = norms.double()
        old = self._stored[rows]
        if self._follow:
            self._correct(fresh / math.exp(self._log_gain), old.double())
        new = (fresh / math.exp(self._log_gain)).float()
        self._stored[rows] = new
        self._histogram.add(old, -1)
        self._histogram.add(new)
        self._sample = None

    def _correct(self, fresh: Tensor, predicted: Tensor) -> None:
        """One step of the gain, from norms in units of the present one."""
        bound = self._histogram.quantile(self.clip) if self.clip < 1 else math.inf
        sums = [float(((v.clamp_max(bound or math.inf) / self._unit) ** self.q).sum()) for v in (fresh, predicted)]
        if not all(map(math.isfinite, sums)):
            return
        self._seen += 1
        window = min(self.window or 1, FIRST + self._seen // GROWTH)
        self._recent = [*self._recent, (sums[0], sums[1])][-window:]
        above, below = (sum(column) for column in zip(*self._recent, strict=True))
        if above > 0 and below > 0:
            self._log_gain += math.log(above / below) / (self.q * window)

    def sample(self) -> Sample | None:
        if self._stored is None:
            return None
        if self._sample is None:
            values, counts = self._histogram.sample()
            self._sample = Sample(values * math.exp(self._log_gain), counts)
        return self._sample

    def upsilon(self) -> float:
        sample = self.sample()
        if sample is None:
            raise RuntimeError("no gradient norms were observed yet; call measured first")
        return power_mean(sample.values, self.q, counts=sample.counts)

    def state_dict(self) -> dict[str, Any]:
        return {
            "stored": self._stored,
            "log_gain": self._log_gain,
            "recent": self._recent,
            "seen": self._seen,
            "unit": self._unit,
            "order": self._histogram.order,
            "counts": self._histogram.counts,
            "sums": self._histogram.sums,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._stored = None if state["stored"] is None else state["stored"].clone()
        self._log_gain, self._seen, self._unit = state["log_gain"], state["seen"], state["unit"]
        self._recent = [(above, below) for above, below in state["recent"]]
        self._histogram, self._sample = Histogram(state["order"]), None
        self._histogram.counts, self._histogram.sums = state["counts"].clone(), state["sums"].clone()
