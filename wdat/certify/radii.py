"""Certified radii: the largest ball around each image on which CROWN proves the label.

The knapsack's sort of such radii, which are never larger than the true distances, gives a lower bound of A_δ. Each
radius is proved by one evaluation of its own, in float64 and with a margin of logits that covers what float32 rounds,
so neither the search for it nor a time limit can make it wrong, only short. (Up to floating-point rounding in the
bounds themselves.)
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from wdat.attacks.knapsack import certified_figures
from wdat.certify.base import Certificate, Surroundings
from wdat.certify.crown import margin_bound, size
from wdat.certify.kept import CAPPED, LEFT, PROVED, Kept, fingerprint
from wdat.distributed import Processes, together
from wdat.errors import SettingError
from wdat.gradients import device_of, input_gradients, undisturbed
from wdat.losses import margin
from wdat.precision import float32
from wdat.threat import ThreatModel, dual_norm

ROUND = 32  # images between two looks at what the budgets can pay for
Bound = Callable[[float, bool], float]


@dataclass(frozen=True)
class Radii:
    """Certified radii of a whole set.

    Attributes:
        radii: (n,), float64, in the order of the set; 0 where an image is misclassified or nothing was proved.
        unfinished: Images whose radius a time limit left at 0.
        seconds: CPU time of all processes together.
    """

    radii: Tensor
    unfinished: int
    seconds: float

    def figures(self, threat: ThreatModel) -> dict[str, Any]:
        """The knapsack of the radii."""
        details = certified_figures(self.radii, threat)
        return {
            **details,
            "unfinished": self.unfinished,
            "cpu_seconds_per_image": self.seconds / max(len(self.radii), 1),
        }


@dataclass(frozen=True)
class Crown(Certificate):
    """Radii certified by CROWN, for small ReLU networks; a bound of the network itself.

    Attributes:
        evaluations: Bounds computed for an image at most (one more where the last fails); the last is in float64.
        margin: What the bound of the logits' margin must exceed, so that rounding in float32 can't matter.
        seconds: Time limit of each process, after which the radii that are missing stay 0; None for none.
        gigabytes: Networks are refused whose widest layer's linear bounds take more.
    """

    name: ClassVar[str] = "crown"
    by_distance: ClassVar[bool] = True
    evaluations: int = 5
    margin: float = 1e-4
    seconds: float | None = None
    gigabytes: float = 0.5

    def __post_init__(self) -> None:
        if self.evaluations < 2:
            raise SettingError(f"certify.evaluations={self.evaluations} must be at least 2")
        for name in ("margin", "seconds", "gigabytes"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise SettingError(f"certify.{name}={value} must be positive")

    def __call__(
        self,
        network: nn.Module,
        x: Tensor,
        y: Tensor,
        threats: Sequence[ThreatModel],
        surroundings: Surroundings | None = None,
    ) -> Radii:
        around = surroundings or Surroundings()
        rows = torch.arange(len(x)) if around.rows is None else around.rows.cpu()
        with together(around.processes):
            self.check_network(network, x)
        clean, reach = _linear(network, x, y, threats[0].norm)
        far = 1.0 if threats[0].norm == "linf" else math.sqrt(x[0].numel()) if len(x) else 0.0
        if around.distances is None:
            caps, near = torch.full_like(clean, far), reach
        else:
            caps = around.distances.double().cpu().clamp(max=far)
            near = torch.where(around.distances.cpu().isfinite(), caps, reach.clamp(max=far))
        caps = torch.where(clean > self.margin, caps, 0.0)
        near = torch.where(caps > 0, near, 0.0)
        order = _Order(near, rows, around.processes)
        budgets = sorted((t.p, t.delta) for t in threats)
        about = {"options": str(self.options), "norm": threats[0].norm, "budgets": str(budgets), **around.about}
        about["distances"] = fingerprint(order.near)
        file = None if around.folder is None else around.folder / f"certified_{threats[0].norm}.pt"
        kept = Kept(file, about, rows, len(order.near), around.processes)
        self._search(network, x, y, threats, (clean, caps, near), order, kept, around)
        whole = around.processes.gather(kept.values)[order.inverse]
        left = int(around.processes.sum([float((kept.states == LEFT).sum())])[0])
        return Radii(whole, left, around.processes.sum([kept.seconds])[0])

    def check_network(self, network: nn.Module, x: Tensor) -> None:
        if not len(x):
            return
        needs = size(network, x[0].to(device_of(network, x)))
        if needs.gigabytes > self.gigabytes:
            raise SettingError(
                f"certify=crown is for small networks: the linear bounds of this one's widest layer take "
                f"{needs.gigabytes:.1f} GB an image (certify.gigabytes={self.gigabytes:g}), and each image needs up "
                f"to {needs.units:,} backward passes an evaluation, one for each ReLU unit that isn't stable; use "
                "certify=smoothing"
            )

    def _search(
        self,
        network: nn.Module,
        x: Tensor,
        y: Tensor,
        threats: Sequence[ThreatModel],
        known: tuple[Tensor, Tensor, Tensor],
        order: _Order,
        kept: Kept,
        around: Surroundings,
    ) -> None:
        """Fill `kept`, the cheapest images first, in rounds that all processes begin together."""
        clean, caps, near = known
        precise, device = copy.deepcopy(network).double().eval(), device_of(network, x)
        started, n = time.perf_counter(), len(order.near)
        processes, norm = around.processes, threats[0].norm
        for first in range(0, n, ROUND):
            radii, states = (processes.gather(part)[order.sorted] for part in (kept.values, kept.states))
            payable = reach_of(radii[:first], n, threats)
            ratio = _recent_ratio(radii[:first], order.near[order.sorted_rows][:first], states[:first])
            here = (order.place >= first) & (order.place < first + ROUND) & (kept.states == LEFT)
            with together(processes):
                for i in here.nonzero().squeeze(1).tolist():
                    if self.seconds is not None and time.perf_counter() - started > self.seconds:
                        break
                    then = time.process_time()

                    def bound(radius: float, exact: bool, i: int = i) -> float:
                        image = x[i].to(device, torch.float64 if exact else None)
                        return margin_bound(precise if exact else network, image, int(y[i]), radius, norm)

                    cap = min(float(caps[i]), payable)
                    if all(t.is_pointwise for t in threats):
                        value = _stairs(bound, float(caps[i]), sorted({t.delta for t in threats}), self.margin)
                    else:
                        value = self._radius(bound, float(clean[i]), cap, cap < float(caps[i]), ratio * float(near[i]))
                    kept.set(i, value, CAPPED if value == cap < float(caps[i]) else PROVED, time.process_time() - then)
            if processes.max(float(bool((here & (kept.states != LEFT)).any()))):
                kept.save()
            if around.progress:
                around.progress(min(first + ROUND, n), n)

    def _radius(self, bound: Bound, clean: float, cap: float, payable: bool, guess: float) -> float:
        """The radius of one image; where the cap is what the budgets can pay for, that is tried first."""
        if cap <= 0:
            return 0.0
        points: list[tuple[float, float]] = []
        if payable:
            value = bound(cap, True)
            if value > self.margin:
                return cap
            points.append((cap, value))
        return largest_radius(bound, clean, cap, guess, self.evaluations, self.margin, points)


def _stairs(bound: Bound, cap: float, budgets: Sequence[float], least: float) -> float:
    """The largest pointwise budget that is proved: other radii make no difference to pointwise accuracy."""
    for budget in reversed(budgets):
        radius = budget * (1 + 1e-9)  # the pointwise knapsack pays for radii that equal δ
        if radius <= cap and bound(radius, True) > least:
            return radius
    return 0.0


def largest_radius(
    bound: Bound,
    clean: float,
    cap: float,
    guess: float,
    evaluations: int,
    least: float,
    points: Sequence[tuple[float, float]] = (),
) -> float:
    """The largest radius that can be proved with few evaluations of a bound that falls with the radius.

    What the bound loses, `clean − bound(r)`, is nearly a power of r, so the next radius is where the power through the
    two nearest evaluations meets the margin: a secant in logarithms, kept inside the bracket that is known.

    Args:
        bound: (radius, whether in float64) → lower bound of the margin; NaN proves nothing.
        clean: The margin at the image itself, above `least`.
        cap: Radii beyond it aren't tried.
        guess: Where to begin.
        evaluations: Of the bound, at most, and one more where the last fails.
        least: What the bound must exceed.
        points: Radii and values known before, of bounds that fail.

    Returns:
        A radius at which the bound, in float64, exceeds `least`; 0 where none was found.
    """
    low, high = 0.0, min((r for r, _ in points), default=math.inf)
    losses = [(r, _loss(clean, v)) for r, v in points]
    r = min(guess, cap, 0.7 * high) if guess > 0 else 0.5 * min(cap, high)
    for _ in range(evaluations - 1 - len(points)):
        value = bound(r, False)
        losses.append((r, _loss(clean, value)))
        if value > least:
            low = r
        else:
            high = r
        r = _next(losses, clean - 2 * least)
        r = min(max(r, low + 0.02 * (min(high, cap) - low)), cap, low + 0.98 * (high - low))
        if low > 0 and r - low < 0.003 * low:
            break
    for radius in (low + 0.95 * (r - low) if low > 0 else 0.9 * r, low if low > 0 else 0.4 * r):
        if radius > 0 and bound(radius, True) > least:
            return radius
    return 0.0


def _loss(clean: float, value: float) -> float:
    """What the bound loses at a radius; a large loss where it isn't finite, the smallest where it is rounding."""
    return max(clean - value, 1e-9 * clean) if math.isfinite(value) else 30 * clean


def _next(losses: list[tuple[float, float]], wanted: float) -> float:
    """The radius at which a power of it, through the evaluations on both sides of the wanted loss, has that loss."""
    wanted = max(wanted, 1e-12)
    inner = sorted((point for point in losses if point[1] < wanted), reverse=True)
    outer = sorted(point for point in losses if point[1] >= wanted)
    (r, loss), *more = [*inner[:1], *outer[:1], *inner[1:2], *outer[1:2]]
    power = 1.5
    if more and more[0][0] != r:
        power = min(max(math.log(loss / more[0][1]) / math.log(r / more[0][0]), 1.0), 8.0)
    return float(r * (wanted / loss) ** (1 / power))


def reach_of(radii: Tensor, n: int, threats: Sequence[ThreatModel]) -> float:
    """The largest radius that any budget could still pay for, where all images but these cost nothing.

    A radius above it leaves every knapsack as it is, however large, so that the search may end there.

    Args:
        radii: (M,), those known, of the n images of the set.
        n: Images in the set.
        threats: Orders and budgets.
    """
    costly = radii[radii > 0].double().sort().values
    found = 0.0
    for threat in threats:
        if threat.is_pointwise or threat.delta == 0:
            found = max(found, threat.delta * (1 + 1e-9))  # the pointwise knapsack pays for radii that equal δ
            continue
        beyond = (((costly / threat.delta) ** threat.p).cumsum(0) > n * (1 + 1e-9)).nonzero()
        found = max(found, float(costly[beyond[0, 0]]) if len(beyond) else math.inf)
    return found


class _Order:
    """The whole set in the order of the search: the nearest first, equal ones in the order of the set.

    Attributes:
        near: (n,), of the whole set in its order.
        inverse: (n,), brings what the processes gather into the order of the set.
        sorted: (n,), brings what the processes gather into the order of the search.
        sorted_rows: (n,), brings the order of the set into that of the search.
        place: (N,), where this process's images stand in the search.
    """

    def __init__(self, near: Tensor, rows: Tensor, processes: Processes) -> None:
        gathered = processes.gather(rows)
        self.inverse = gathered.argsort()
        self.near = processes.gather(near)[self.inverse]
        self.sorted_rows = self.near.argsort(stable=True)
        self.sorted = self.inverse[self.sorted_rows]
        self.place = self.sorted_rows.argsort()[rows]


def _recent_ratio(radii: Tensor, near: Tensor, states: Tensor) -> float:
    """Median of radius over distance of the last round's worth of images whose radius was found: where to begin."""
    found = ((states == PROVED) & (radii > 0)).nonzero().squeeze(1)[-ROUND:]
    return float((radii[found] / near[found]).median()) if len(found) else 0.7


def _linear(network: nn.Module, x: Tensor, y: Tensor, norm: str) -> tuple[Tensor, Tensor]:
    """Margins (N,), NaN where logits aren't finite, and linearised distances (N,), image by image, on the CPU."""
    with undisturbed(network), float32(network, x):
        found = input_gradients(network, x, y, margin, 1)
    clean = torch.where(found.logits.isfinite().all(1), -found.loss, torch.nan).double()
    return clean.cpu(), (clean / dual_norm(found.gradient, norm).double().clamp_min(1e-12)).clamp_min(0).cpu()
