"""The threat model: norms, their duals, directions, distances and projections, in pixel units of [0, 1].

A threat is a Wasserstein ball around the data distribution: order p, ground norm r on images, budget δ. At p = inf
it is the usual pointwise threat. Sources: [B] arXiv 2306.09844 (NeurIPS 2023).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from wdat.distributed import ALONE, Processes
from wdat.errors import SettingError, unknown

NORMS = ("linf", "l2")

PIECE = 512  # images of which differences are held at a time


def parse_number(value: float | str, setting: str) -> float:
    """A number, given as one or as text such as `"8/255"` or `"inf"`.

    Raises:
        SettingError: If the text isn't a number or a quotient of two.
    """
    try:
        if isinstance(value, str):
            above, slash, below = value.partition("/")
            number = float(above) / (float(below) if slash else 1.0)
        else:
            number = float(value)
    except (TypeError, ValueError, ZeroDivisionError):
        number = math.nan
    if math.isnan(number):
        raise SettingError(f"{setting}={value!r} is not a number; write it like 8/255, 0.03 or inf")
    return number


def parse_budget(value: float | str, setting: str = "threat.delta") -> float:
    """A budget in pixel units of [0, 1]: finite and not negative.

    Raises:
        SettingError: If it is unreadable, negative or infinite.
    """
    delta = parse_number(value, setting)
    if delta < 0 or math.isinf(delta):
        raise SettingError(f"{setting}={value!r} must be finite and not negative, in pixel units of [0, 1] (8/255)")
    return delta


def image_norm(v: Tensor, norm: str) -> Tensor:
    """Norm of each image: (N, ...) → (N,)."""
    flat = v.flatten(1)
    return flat.abs().amax(1) if norm == "linf" else _l2(flat)


def dual_norm(g: Tensor, norm: str) -> Tensor:
    """Norm of each gradient in the dual of the ground norm: l1 for linf, l2 for l2; (N, ...) → (N,)."""
    flat = g.flatten(1)
    return flat.abs().sum(1) if norm == "linf" else _l2(flat)


def _l2(flat: Tensor) -> Tensor:
    """Lengths of rows, also where squares of small and large values leave the range of float32."""
    if flat.device.type != "cpu":  # without asking the device
        exact: Tensor = torch.linalg.vector_norm(flat, dim=1, dtype=torch.float64)
        return exact.to(flat.dtype)
    length: Tensor = torch.linalg.vector_norm(flat, dim=1)
    odd = _odd(length, flat)
    if len(odd):
        wide: Tensor = torch.linalg.vector_norm(flat[odd], dim=1, dtype=torch.float64)
        length = length.index_copy(0, odd, wide.to(flat.dtype))
    return length


def _odd(length: Tensor, flat: Tensor) -> Tensor:
    """Indices of the rows whose squares may have left the range of float32; rows of zeros haven't."""
    rows = (~((length > 1e-15) & (length < 1e15))).nonzero().squeeze(1)
    return rows[flat[rows].any(1)] if len(rows) else rows


def direction(g: Tensor, norm: str) -> Tensor:
    """Steepest ascent h(g) with unit ground norm: ⟨h(g), g⟩ = ‖g‖_s, and h(0) = 0.

    h(g) = argmax {⟨v, g⟩ : ‖v‖_r ≤ 1}: sign(g) for linf, g/‖g‖₂ for l2.
    """
    if norm == "linf":
        return g.sign()
    flat = g.flatten(1)
    length = torch.linalg.vector_norm(flat, dim=1) if g.device.type == "cpu" else None
    if length is None or len(_odd(length, flat)):
        # Divide by the largest entry first, so that tiny gradients keep their direction.
        largest = per_image(flat.abs().amax(1), g)
        g = torch.where(largest > 0, g / largest, 0.0)
        length = torch.linalg.vector_norm(g.flatten(1), dim=1)
    return g / per_image(torch.where(length > 0, length, 1.0), g)


def per_image(values: Tensor, like: Tensor) -> Tensor:
    """Reshape (N,) to (N, 1, ..., 1) so that it multiplies images of `like`'s shape."""
    return values.to(like.dtype).view(-1, *[1] * (like.dim() - 1))


def contract(origin: Tensor, x: Tensor, radii: Tensor, norm: str) -> Tensor:
    """Project each image onto the ball of its own radius around its origin; interior points stay where they are.

    argmin over z of ‖z − x_i‖₂ subject to ‖z − origin_i‖_r ≤ radii_i.

    Args:
        origin: Centres (N, ...).
        x: Points (N, ...).
        radii: (N,), not negative.
        norm: Ground norm.
    """
    offset = x - origin
    shrink(offset, radii, radii if norm == "linf" else image_norm(offset, norm), norm)
    return offset.add_(origin)


def shrink(offset: Tensor, radii: Tensor, lengths: Tensor, norm: str) -> None:
    """What `contract` does, in place on offsets (N, ...) whose lengths (N,) are known."""
    bound = per_image(radii, offset)
    if norm == "linf":
        offset.clamp_(-bound, bound)
    else:
        factor = torch.where(lengths > radii, radii / lengths.clamp_min(torch.finfo(offset.dtype).tiny), 1.0)
        offset.mul_(per_image(factor, offset))


def power_mean(values: Tensor, order: float, processes: Processes = ALONE, counts: Tensor | None = None) -> float:
    """(mean of values^order)^(1/order) over all processes; the maximum at order inf; 0 for an empty set.

    Values are scaled by their maximum, so that neither tiny distances nor high orders under- or overflow.

    Args:
        values: (N,), not negative; this process's part of the set.
        order: In (0, inf].
        processes: Reduces over the processes that share the set.
        counts: (N,), how often each value stands in the set; None for once.
    """
    values = values.detach().double()
    largest = processes.max(values.max().item() if values.numel() else 0.0)
    if math.isinf(order) or largest == 0 or not math.isfinite(largest):
        return largest
    powers = (values / largest) ** order
    if counts is None:
        total, count = processes.sum([float(powers.sum()), float(values.numel())])
    else:
        total, count = processes.sum([float((counts * powers).sum()), float(counts.sum())])
    return float(largest * (total / count) ** (1 / order))


@dataclass(frozen=True)
class ThreatModel:
    """A Wasserstein ball B_δ(P) of order p with a ground norm on images.

    Attributes:
        p: Order in [1, inf]; a number, or text such as `"inf"`. p = 1 serves the knapsack only.
        norm: Ground norm, `"linf"` or `"l2"`.
        delta: Budget in pixel units of [0, 1]; a number, or text such as `"8/255"`.

    Raises:
        SettingError: If p < 1, the norm is unknown, or the budget is negative, infinite, unreadable or, in linf,
            more than the whole range of a pixel.

    Example:
        >>> threat = ThreatModel(p=2, norm="linf", delta="8/255")
        >>> threat.q, threat.is_pointwise, round(threat.delta, 4)
        (2.0, False, 0.0314)
    """

    p: float
    norm: str
    delta: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "p", parse_number(self.p, "threat.p"))
        object.__setattr__(self, "delta", parse_budget(self.delta))
        if self.p < 1:
            raise SettingError(f"threat.p={self.p:g} must be at least 1; 2 is usual, inf is the pointwise threat")
        if self.norm not in NORMS:
            raise unknown("norm", self.norm, NORMS, "threat.norm")
        if self.norm == "linf":
            self._refuse_beyond(1.0, "the whole range of a pixel")

    def check(self, shape: Sequence[int]) -> None:
        """Refuse a budget that no image can use up.

        Args:
            shape: (C, H, W) of the images.

        Raises:
            SettingError: If δ is more than the largest distance of two images in [0, 1].
        """
        diameter = 1.0 if self.norm == "linf" else math.prod(shape) ** 0.5
        self._refuse_beyond(diameter, f"the largest distance of two images {'×'.join(map(str, shape))}")

    def _refuse_beyond(self, most: float, what: str) -> None:
        if self.delta > most * (1 + 1e-9):
            meant = f"did you mean {self.delta:g}/255?" if self.delta < 256 else "write it like 8/255"
            raise SettingError(
                f"threat.delta={self.delta:g} is more than {most:.4g}, {what}: budgets (threat.delta, deltas) are in "
                f"pixel units of [0, 1]; {meant}"
            )

    @property
    def q(self) -> float:
        """Conjugate order, 1/p + 1/q = 1: 1 at p = inf, inf at p = 1."""
        if math.isinf(self.p):
            return 1.0
        return math.inf if self.p == 1 else self.p / (self.p - 1)

    @property
    def is_pointwise(self) -> bool:
        """Whether every image has the full budget, p = inf."""
        return math.isinf(self.p)

    def pointwise(self, delta: float | None = None) -> ThreatModel:
        """The same norm at p = inf, with the same budget or another one."""
        return replace(self, p=math.inf, delta=self.delta if delta is None else delta)

    def distances(self, origin: Tensor, x: Tensor) -> Tensor:
        """‖x_i − origin_i‖_r of each image, (N,)."""
        pieces = range(0, max(len(x), 1), PIECE)
        return torch.cat([image_norm(x[i : i + PIECE] - origin[i : i + PIECE], self.norm) for i in pieces])

    def length(self, distances: Tensor, processes: Processes = ALONE) -> float:
        """W_p length (mean d_i^p)^(1/p) of a set of moves, over all processes.

        An upper bound of W_p between the two empirical distributions: the coupling of each image with itself.
        """
        return power_mean(distances, self.p, processes)
