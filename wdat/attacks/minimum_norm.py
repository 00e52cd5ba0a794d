"""Nearest-flip distances: how far each image is from the nearest point where the network errs.

Every distance is that of a point found, stored in [0, 1] and verified by a forward pass, so it is never too small. The
search is a descent of the radius in the manner of FMN (Pintor et al. 2021, arXiv 2102.12827): ascend the margin on a
sphere that shrinks while the image is misclassified and grows while it is not. First towards several target classes,
which gains most, then untargeted, from the nearest point so far and from random ones; then FAB if wanted; after each
stage bisection towards the image. The nearest point of all stages is kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from wdat.attacks.fab import fab_flips
from wdat.errors import SettingError
from wdat.gradients import forward, input_gradients
from wdat.losses import margin
from wdat.threat import contract, direction, dual_norm, image_norm, per_image

Report = Callable[[int, int], None]


@dataclass(frozen=True)
class Flips:
    """The nearest misclassified points that were found.

    Attributes:
        x_adv: (N, ...), the points; the images themselves where no point was found.
        distances: (N,), in pixel units: 0 where the image is misclassified as it is, inf where no point was found.
        effort: After each stage of the search, gradient passes an image so far and the distances then, (N,).
    """

    x_adv: Tensor
    distances: Tensor
    effort: list[tuple[int, Tensor]] = field(default_factory=list)


@dataclass(frozen=True)
class Search:
    """How hard to look.

    Attributes:
        starts: Untargeted descents: the first from the nearest point so far, the others from random points at its
            distance.
        targets: Targeted descents before them, towards the classes with the nearest linearised boundaries.
        steps: Steps of each descent.
        bisections: Halvings between the image and the point found, after each descent.
        batch_size: Images per pass.
        seed: Of the random starts.
        fab: Steps of FAB on top; 0 for none.
        fab_targets: Classes that FAB runs towards; 0 runs it once untargeted, where a step costs a pass a class.
    """

    starts: int = 2
    targets: int = 3
    steps: int = 50
    bisections: int = 8
    batch_size: int = 512
    seed: int = 0
    fab: int = 0
    fab_targets: int = 0

    def __post_init__(self) -> None:
        for name in ("starts", "steps", "batch_size"):
            if getattr(self, name) < 1:
                raise SettingError(f"attack_options.knapsack.{name}={getattr(self, name)} must be at least 1")
        for name in ("targets", "bisections", "fab", "fab_targets"):
            if getattr(self, name) < 0:
                raise SettingError(f"attack_options.knapsack.{name}={getattr(self, name)} must not be negative")


def _flipped(logits: Tensor, y: Tensor) -> Tensor:
    """Misclassified by more than rounding, (N,): the verdict outlives another batch composition; never for NaN."""
    slack = 64 * torch.finfo(torch.float32 if logits.dtype != torch.float64 else torch.float64).eps
    return margin(logits, y) > slack * logits.abs().amax(1)


class _Best:
    """The nearest verified flips so far of one chunk of images."""

    def __init__(self, network: nn.Module, x: Tensor, y: Tensor, norm: str) -> None:
        self.network, self.x, self.y, self.norm = network, x, y, norm
        wrong = forward(network, x, len(x)).argmax(1) != y
        self.points = x.clone()
        self.distances = torch.where(wrong, 0.0, torch.inf).to(x.dtype)

    def offer(self, points: Tensor, logits: Tensor) -> None:
        """Keep the points (N, ...), with their logits (N, K), that are misclassified and nearer than what is known."""
        distances = image_norm(points - self.x, self.norm)
        nearer = _flipped(logits, self.y) & (distances < self.distances)
        self.distances = torch.where(nearer, distances, self.distances)
        self.points = torch.where(nearer.view(-1, *[1] * (points.dim() - 1)), points, self.points)

    def bisect(self, times: int) -> None:
        """Move along the segments from the images to their points."""
        low = torch.zeros_like(self.distances)
        high = torch.ones_like(self.distances)
        ends = self.points
        for _ in range(times):
            middle = (low + high) / 2
            points = (self.x + per_image(middle, self.x) * (ends - self.x)).clamp_(0, 1)
            logits = forward(self.network, points, len(points))
            self.offer(points, logits)
            flipped = _flipped(logits, self.y)
            low, high = torch.where(flipped, low, middle), torch.where(flipped, middle, high)


def _descend(best: _Best, start: Tensor, loss: Callable[[Tensor, Tensor], Tensor], steps: int) -> None:
    """One descent of the radius from `start` (N, ...)."""
    network, x, y, norm = best.network, best.x, best.y, best.norm
    z, radius = start, torch.full_like(best.distances, torch.nan)
    for step in range(steps):
        cosine = (1 + math.cos(math.pi * step / steps)) / 2
        rate, growth = 0.02 + 0.98 * cosine, 0.001 + 0.199 * cosine
        g = input_gradients(network, z, y, loss, len(z))
        flipped = _flipped(g.logits, y)
        best.offer(z, g.logits)
        # The distance at which the loss would vanish if it were linear: where to begin.
        linear = (-g.loss).clamp_min(0) / dual_norm(g.gradient, norm).clamp_min(1e-12)
        radius = torch.where(radius.isnan(), image_norm(z - x, norm) + linear, radius)
        radius = torch.where(flipped, torch.minimum(radius, best.distances) * (1 - growth), radius * (1 + growth))
        radius = torch.minimum(radius, best.distances).clamp_max(1e3)
        z = z + per_image(rate * radius, z) * direction(g.gradient, norm)
        z = contract(x, z, radius, norm).clamp_(0, 1)
    best.offer(z, forward(network, z, len(z)))


def _towards(target: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss z_t − z_y of a targeted descent."""

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return (logits.gather(1, target[:, None]) - logits.gather(1, labels[:, None])).squeeze(1)

    return loss


def _nearest_classes(best: _Best, wanted: int) -> tuple[Tensor, int]:
    """Where to run to: of the ten classes with the largest logits, those with the nearest linearised boundaries.

    Returns:
        Classes by that distance, (N, at least `wanted`), and the gradient passes that it took.
    """
    x, y = best.x, best.y
    likely = forward(best.network, x, len(x)).scatter(1, y[:, None], -torch.inf).argsort(1, descending=True)
    likely = likely[:, : min(likely.shape[1] - 1, max(10, wanted))]
    columns = []
    for target in likely.unbind(1):
        g = input_gradients(best.network, x, y, _towards(target), len(x))
        columns.append(-g.loss / dual_norm(g.gradient, best.norm).clamp_min(1e-12))
    return likely.gather(1, torch.stack(columns, 1).argsort(stable=True, dim=1)), likely.shape[1]


def _stages(best: _Best, search: Search, generator: torch.Generator) -> Iterator[int]:
    """The stages of the search on one chunk; each yields the gradient passes an image that it took."""
    x, y = best.x, best.y
    classes = forward(best.network, x[:1]).shape[1]
    if targets := min(search.targets, classes - 1):
        ranked, taken = _nearest_classes(best, targets)
        for target in ranked[:, :targets].unbind(1):
            _descend(best, x, _towards(target), search.steps)
            best.bisect(search.bisections)
            yield search.steps + taken
            taken = 0
    for start in range(search.starts):
        z = best.points  # the images themselves where none was found
        if start:
            noise = torch.rand(x.shape, generator=generator, dtype=torch.float32).to(x) * 2 - 1
            reach = best.distances.where(best.distances.isfinite(), best.distances.new_tensor(0.03))
            z = contract(x, x + per_image(reach, x) * noise, reach, best.norm).clamp_(0, 1)
        _descend(best, z, margin, search.steps)
        best.bisect(search.bisections)
        yield search.steps
    if search.fab:
        points = fab_flips(best.network, x, y, best.norm, search.fab, targets=search.fab_targets, seed=search.seed)
        best.offer(points, forward(best.network, points, len(points)))
        best.bisect(search.bisections)
        yield search.fab * (min(search.fab_targets, classes - 1) or classes)


def _settle(network: nn.Module, x: Tensor, y: Tensor, points: Tensor, batch_size: int) -> tuple[Tensor, Tensor]:
    """Verify the points in other batches than those of the search; what fails is pushed outwards by a hair.

    Returns:
        The points, and which are misclassified, (N,).
    """
    settled, done = points, torch.zeros_like(y, dtype=torch.bool)
    for push in (0.0, 1e-6, 1e-5, 1e-4, 1e-3):
        rows = (~done).nonzero().squeeze(1).flip(0)
        if not len(rows):
            break
        outer = points[rows] if push == 0 else (points[rows] + push * (points[rows] - x[rows])).clamp(0, 1)
        wrong = forward(network, outer, batch_size // 2 + 1).argmax(1) != y[rows]
        settled = settled.index_copy(0, rows[wrong], outer[wrong])
        done[rows[wrong]] = True
    return settled, done


def nearest_flips(
    network: nn.Module, x: Tensor, y: Tensor, norm: str, search: Search, report: Report | None = None
) -> Flips:
    """Search the nearest misclassified point of each image; call it inside `wdat.guard.undisturbed`.

    Args:
        network: Takes images in [0, 1], gives logits (N, K).
        x: Images (N, C, H, W) in [0, 1].
        y: Labels (N,).
        norm: Ground norm.
        search: How hard to look.
        report: Called with stages done and stages in all.

    Returns:
        Distances that serve every order p and every budget.
    """
    done = torch.Generator().manual_seed(search.seed)
    chunks = list(range(0, len(x), search.batch_size))
    points, distances = x.clone(), torch.zeros(len(x), dtype=x.dtype, device=x.device)
    history: list[list[tuple[int, Tensor]]] = []
    stages = search.starts + bool(search.fab)
    stages += min(search.targets, forward(network, x[:1]).shape[1] - 1) if len(x) else 0
    for number, first in enumerate(chunks):
        rows = slice(first, first + search.batch_size)
        everyone = _Best(network, x[rows], y[rows], norm)
        right = (everyone.distances > 0).nonzero().squeeze(1)
        trace: list[tuple[int, Tensor]] = []
        points[rows], distances[rows] = everyone.points, everyone.distances
        if len(right):
            best = _Best(network, x[rows][right], y[rows][right], norm)
            passes = 0
            for stage, taken in enumerate(_stages(best, search, done)):
                passes += taken
                now = distances[rows].clone()
                now[right] = best.distances
                trace.append((passes, now))
                if report:
                    report(number * stages + stage + 1, len(chunks) * stages)
            points[rows] = points[rows].index_copy(0, right, best.points)
            distances[rows] = now
        history.append(trace)
    reached = ((distances > 0) & distances.isfinite()).nonzero().squeeze(1)
    if len(reached):
        settled, wrong = _settle(network, x[reached], y[reached], points[reached], search.batch_size)
        points = points.index_copy(0, reached, torch.where(per_image(wrong, x).bool(), settled, x[reached]))
        now = image_norm(points[reached] - x[reached], norm)
        distances = distances.index_copy(0, reached, torch.where(wrong, now, torch.inf))
    effort = []
    for stage in range(max(map(len, history), default=0)):
        parts = [t[stage][1] if stage < len(t) else distances[:0] for t in history]
        effort.append((max(t[stage][0] for t in history if stage < len(t)), torch.cat(parts)))
    return Flips(points, distances, effort)
