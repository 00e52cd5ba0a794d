"""A lower bound for the classifier that adds Gaussian noise to every image: for any network, in the l2 norm.

The randomised classifier draws ε from N(0, σ² I) and predicts what the network does on x + ε. With p_i the probability
that it gives the label of image i, its probability after a move of l2 length d is at least

    h_i(d) = Φ(Φ⁻¹(p_i) − d/σ)

(Neyman and Pearson; Cohen et al. 2019, arXiv 1902.02918; for distributions, Kumar et al. 2022, arXiv 2201.12440). An
attacker who moves image i by random lengths with mean of d^p over the set at most δ^p is bounded by the Lagrangian:
for any λ ≥ 0

    A_δ  ≥  mean_i min over d ≥ 0 of [h_i(d) + λ (d/δ)^p] − λ,

and the best λ is taken, which also is the value of the best attack on these h_i, by strong duality. At p = inf the
bound is mean_i h_i(δ). p_i are Clopper-Pearson lower limits at level α/n, so the bound holds, with probability 1 − α
over the samples, for all n images and so for every order and budget at once.

It is a bound of another classifier than the network, and named so: "…, randomised, σ = 0.12".
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from scipy.optimize import minimize_scalar
from scipy.stats import beta
from torch import Tensor, nn

from wdat.certify.base import Certificate, Surroundings
from wdat.certify.kept import PROVED, Kept
from wdat.distributed import together
from wdat.errors import SettingError
from wdat.gradients import device_of, undisturbed
from wdat.precision import float32
from wdat.seeding import generator
from wdat.threat import ThreatModel

BLOCK = 50  # samples drawn at once, so that the draws are those of the image, whatever the batch
CELLS = 256  # of the interval in which the minimum over lengths is enclosed
ROUND = 32  # images between two writes
TOLERANCE = 1e-6  # width of the enclosure of the minimum


@dataclass(frozen=True)
class Randomised:
    """Lower limits of the label's probability under noise.

    Attributes:
        limits: (n,), float64, p_i in the order of the set.
        sigma: Standard deviation of the noise, in pixel units.
        alpha: All limits hold at once with probability 1 − alpha.
        seconds: CPU time of all processes together.
    """

    limits: Tensor
    sigma: float
    alpha: float
    seconds: float

    def figures(self, threat: ThreatModel) -> dict[str, Any]:
        """The bound at one threat; its interval is of resampled images at the same λ."""
        accuracy, values, _ = lower_bound(self.limits, self.sigma, threat)
        drawn = torch.randint(len(values), (1000, len(values)), generator=torch.Generator().manual_seed(0))
        low, high = values[drawn].mean(1).clamp(0, 1).quantile(values.new_tensor([0.025, 0.975])).tolist()
        return {
            "bound": "lower", "accuracy": accuracy, "accuracy_low": low, "accuracy_high": high,
            "distance": threat.delta, "sigma": self.sigma, "alpha": self.alpha,
            "accuracy_without_attack": float(self.limits.mean()),
            "cpu_seconds_per_image": self.seconds / max(len(self.limits), 1),
        }  # fmt: skip


@dataclass(frozen=True)
class Smoothing(Certificate):
    """Bounds the randomised classifier. Its settings are fixed before any sample is drawn, and recorded.

    Attributes:
        sigma: Standard deviation of the noise, in pixel units.
        samples: Noisy copies of each image.
        alpha: The limits of all images hold at once with probability 1 − alpha.
        seed: Of the noise, which is drawn for each image by its position in the set.
        batch_size: Noisy images per pass; doesn't change the result.
    """

    name: ClassVar[str] = "smoothing"
    sigma: float = 0.12
    samples: int = 1000
    alpha: float = 0.001
    seed: int = 0
    batch_size: int = 500

    def __post_init__(self) -> None:
        if not 0 < self.sigma < math.inf:
            raise SettingError(f"certify.sigma={self.sigma} must be positive, in pixel units of [0, 1] (0.12)")
        if not 0 < self.alpha < 1:
            raise SettingError(f"certify.alpha={self.alpha} must lie between 0 and 1 (0.001)")
        for name, least in (("samples", 1), ("seed", 0), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise SettingError(f"certify.{name}={getattr(self, name)} must be at least {least}")

    @property
    def options(self) -> dict[str, Any]:
        return {name: value for name, value in super().options.items() if name != "batch_size"}

    def network_name(self, name: str) -> str:
        return f"{name}, randomised, σ = {self.sigma:g}"

    def check(self, threats: Sequence[ThreatModel]) -> None:
        for threat in threats:
            if threat.norm != "l2":
                raise SettingError(
                    f"certify=smoothing bounds l2 moves, and threat.norm={threat.norm}: use threat=w2_l2, or "
                    "certify=crown"
                )

    def __call__(
        self,
        network: nn.Module,
        x: Tensor,
        y: Tensor,
        threats: Sequence[ThreatModel],
        surroundings: Surroundings | None = None,
    ) -> Randomised:
        self.check(threats)
        around = surroundings or Surroundings()
        processes = around.processes
        rows = torch.arange(len(x)) if around.rows is None else around.rows.cpu()
        everyone = processes.gather(rows)
        n = len(everyone)
        file = None if around.folder is None else around.folder / f"randomised_{self.sigma:g}.pt"
        kept = Kept(file, {"options": str(self.options), **around.about}, rows, n, processes)
        most = int(processes.max(float(len(x))))
        for first in range(0, most, ROUND):
            with together(processes), undisturbed(network), float32(network, x):
                for i in range(first, min(first + ROUND, len(x))):
                    if not kept.states[i]:
                        then = time.process_time()
                        right = self.count(network, x[i].to(device_of(network, x)), int(y[i]), int(rows[i]))
                        kept.set(i, right, PROVED, time.process_time() - then)
            kept.save()
            if around.progress:
                around.progress(min(first + ROUND, most), most)
        counts = processes.gather(kept.values)[everyone.argsort()]
        limits = clopper_pearson(counts, self.samples, self.alpha / max(n, 1))
        return Randomised(limits, self.sigma, self.alpha, processes.sum([kept.seconds])[0])

    def count(self, network: nn.Module, image: Tensor, label: int, row: int) -> int:
        """Of the noisy copies of one image (C, H, W) those that the network gives the label; NaN logits don't."""
        right, waiting = 0, image.new_empty((0, *image.shape))
        for block in range(math.ceil(self.samples / BLOCK)):
            draws = generator(self.seed, "smoothing", row, block)
            noise = torch.randn((BLOCK, *image.shape), generator=draws)[: self.samples - block * BLOCK]
            waiting = torch.cat([waiting, image + self.sigma * noise.to(image)])
            last = (block + 1) * BLOCK >= self.samples
            while len(waiting) >= self.batch_size or (last and len(waiting)):
                with torch.no_grad():
                    logits = network(waiting[: self.batch_size])
                right += int(((logits.argmax(1) == label) & logits.isfinite().all(1)).sum())
                waiting = waiting[self.batch_size :]
        return right


def clopper_pearson(hits: Tensor, samples: int, level: float) -> Tensor:
    """Lower confidence limits of probabilities.

    Args:
        hits: (n,), how many of the samples were hits.
        samples: How many there were.
        level: With this probability at most, the limit of one is above its probability.

    Returns:
        (n,), float64; 0 where there was no hit.
    """
    k = hits.double().cpu()
    limits: Tensor = torch.from_numpy(beta.ppf(level, k.clamp_min(1).numpy(), (samples - k + 1).numpy()))
    return torch.where(k > 0, limits, 0.0)


def lower_bound(limits: Tensor, sigma: float, threat: ThreatModel) -> tuple[float, Tensor, float]:
    """The bound of the randomised classifier's accuracy at one threat.

    Whatever λ the search ends with, the bound is valid: the minimum over lengths is enclosed from below.

    Args:
        limits: (n,), p_i or lower bounds of them.
        sigma: Standard deviation of the noise.
        threat: Order and budget, in l2.

    Returns:
        The bound in [0, 1]; (n,), the terms whose mean it is; λ.
    """
    a = torch.special.ndtri(limits.double())
    if threat.delta == 0 or threat.is_pointwise:
        values = torch.special.ndtr(a - threat.delta / sigma)
        return float(values.mean()), values, 0.0
    unit = threat.delta / sigma

    def dual(log: float) -> float:
        weight = math.exp(log)
        return float(minima(a, weight, unit, threat.p, 1e-4).mean()) - weight

    # The dual is concave in λ, so it has one hill in log λ; λ > 1 is never better than λ = 1, where it is ≤ 0.
    best = minimize_scalar(lambda log: -dual(log), bounds=(math.log(1e-8), 0.0), method="bounded").x
    weight = math.exp(float(best))
    values = minima(a, weight, unit, threat.p, TOLERANCE) - weight
    accuracy = float(values.mean())
    return (accuracy, values, weight) if accuracy > 0 else (0.0, torch.zeros_like(values), 0.0)


def minima(a: Tensor, weight: float, unit: float, p: float, tolerance: float = TOLERANCE) -> Tensor:
    """Lower bounds, at most `tolerance` below them, of min over t ≥ 0 of Φ(a_i − t) + weight (t/unit)^p.

    On an interval [s, t] the first term, which falls, is at least its value at t, and the second, which rises, its
    value at s. Their sum bounds the minimum on that interval; the least such bound of intervals that cover [0, ∞)
    bounds the minimum. Intervals in which the minimum may lie are divided until bound and value are close.

    Args:
        a: (n,), float64, Φ⁻¹(p_i); −inf where p_i is 0.
        weight: λ.
        unit: δ/σ.
        p: Order, finite.
        tolerance: Difference at which the division ends.
    """
    a, where = torch.unique(a, return_inverse=True)

    def fall(t: Tensor) -> Tensor:
        found: Tensor = torch.special.ndtr(a[:, None] - t)
        return found

    def rise(t: Tensor) -> Tensor:
        found: Tensor = weight * (t / unit) ** p
        return found

    # At t = 0 the sum is at most 1, so the minimum lies where the rising term is at most 1.
    end = unit * weight ** (-1 / p)
    end = min(end, float(a.max().clamp_min(0)) + 9.0)  # beyond, the falling term is nothing, and the other rises
    low = torch.linspace(0, end, CELLS + 1, dtype=torch.float64)[:-1].expand(len(a), -1)
    width = end / CELLS
    beyond = rise(low.new_tensor(end))
    best = torch.minimum(fall(low) + rise(low), fall(low.new_full((1, 1), end)) + beyond).amin(1, keepdim=True)
    settled = beyond.expand(len(a), 1)
    for _ in range(60):
        bounds = fall(low + width) + rise(low)
        open_ = bounds < best - tolerance
        settled = torch.minimum(settled, torch.where(open_, torch.inf, bounds).amin(1, keepdim=True))
        most = int(open_.sum(1).max()) if len(a) else 0
        if not most:
            break
        chosen = torch.where(open_, bounds, torch.inf).argsort(1)[:, :most]
        kept = torch.where(open_.gather(1, chosen), low.gather(1, chosen), end)
        width = width / 4
        low = torch.cat([kept + k * width for k in range(4)], 1)
        best = torch.minimum(best, (fall(low) + rise(low)).amin(1, keepdim=True))
    else:
        settled = torch.minimum(settled, bounds.amin(1, keepdim=True))
    return (settled.squeeze(1) - 1e-12).clamp_min(0)[where]
