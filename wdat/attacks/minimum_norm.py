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
from itertools import accumulate

import torch
from torch import Tensor, nn

from wdat.attacks.fab import fab_points
from wdat.errors import SettingError
from wdat.gradients import forward, input_gradients
from wdat.losses import correct, margin, predictions
from wdat.seeding import generator
from wdat.threat import contract, direction, dual_norm, image_norm, per_image

Report = Callable[[int, int], None]


@dataclass(frozen=True)
class NearestAdversarial:
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
        seed: Of the random starts, which are drawn for each image by its place in the set.
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
        for name in ("targets", "bisections", "seed", "fab", "fab_targets"):
            if getattr(self, name) < 0:
                raise SettingError(f"attack_options.knapsack.{name}={getattr(self, name)} must not be negative")


def _flipped(logits: Tensor, y: Tensor) -> Tensor:
    """Misclassified by more than rounding, (N,): the verdict outlives another batch composition.

    Logits that aren't finite are wrong.
    """
    slack = 64 * torch.finfo(torch.float32 if logits.dtype != torch.float64 else torch.float64).eps
    return (margin(logits, y) > slack * logits.abs().amax(1)) | (predictions(logits) < 0)


class _Best:
    """The nearest verified nearest so far of one chunk of images."""

    def __init__(self, network: nn.Module, x: Tensor, y: Tensor, norm: str) -> None:
        self.network, self.x, self.y, self.norm = network, x, y, norm
        wrong = ~correct(forward(network, x, len(x)), y)
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


def _candidates(wanted: int, classes: int) -> int:
    """How many classes are looked at for the wanted ones; a gradient pass each."""
    return min(classes - 1, max(10, wanted))


def _nearest_classes(best: _Best, wanted: int) -> Tensor:
    """Where to run to: of the ten classes with the largest logits, those with the nearest linearised boundaries.

    Returns:
        Classes by that distance, (N, at least `wanted`).
    """
    x, y = best.x, best.y
    likely = forward(best.network, x, len(x)).scatter(1, y[:, None], -torch.inf).argsort(1, descending=True)
    likely = likely[:, : _candidates(wanted, likely.shape[1])]
    columns = []
    for target in likely.unbind(1):
        g = input_gradients(best.network, x, y, _towards(target), len(x))
        columns.append(-g.loss / dual_norm(g.gradient, best.norm).clamp_min(1e-12))
    return likely.gather(1, torch.stack(columns, 1).argsort(stable=True, dim=1))


def _passes(search: Search, classes: int) -> list[int]:
    """Gradient passes an image after each stage of the search."""
    targets = min(search.targets, classes - 1)
    taken = [search.steps] * (targets + search.starts)
    if targets:
        taken[0] += _candidates(targets, classes)
    if search.fab:
        taken.append(search.fab * (min(search.fab_targets, classes - 1) or classes))
    return list(accumulate(taken))


def _start(best: _Best, search: Search, start: int, rows: Tensor) -> Tensor:
    """Where an untargeted descent begins: the nearest points so far, the images themselves where there are none."""
    if not start:
        return best.points
    x = best.x
    draws = [torch.rand(x.shape[1:], generator=generator(search.seed, "search", start, row)) for row in rows.tolist()]
    noise = torch.stack(draws).to(x) * 2 - 1
    reach = best.distances.where(best.distances.isfinite(), best.distances.new_tensor(0.03))
    return contract(x, x + per_image(reach, x) * noise, reach, best.norm).clamp_(0, 1)


def _stages(best: _Best, search: Search, rows: Tensor) -> Iterator[None]:
    """The stages of the search on one chunk, whose images have the places `rows` (N,) in the set."""
    x, y = best.x, best.y
    classes = forward(best.network, x[:1]).shape[1]
    if targets := min(search.targets, classes - 1):
        for target in _nearest_classes(best, targets)[:, :targets].unbind(1):
            _descend(best, x, _towards(target), search.steps)
            best.bisect(search.bisections)
            yield
    for start in range(search.starts):
        _descend(best, _start(best, search, start, rows), margin, search.steps)
        best.bisect(search.bisections)
        yield
    if search.fab:
        points = fab_points(best.network, x, y, best.norm, search.fab, targets=search.fab_targets, seed=search.seed)
        best.offer(points, forward(best.network, points, len(points)))
        best.bisect(search.bisections)
        yield


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
        wrong = ~correct(forward(network, outer, batch_size // 2 + 1), y[rows])
        settled = settled.index_copy(0, rows[wrong], outer[wrong])
        done[rows[wrong]] = True
    return settled, done


def nearest_adversarial(
    network: nn.Module,
    x: Tensor,
    y: Tensor,
    norm: str,
    search: Search,
    report: Report | None = None,
    rows: Tensor | None = None,
) -> NearestAdversarial:
    """Search the nearest misclassified point of each image; call it inside `wdat.gradients.undisturbed`.

    Args:
        network: Takes images in [0, 1], gives logits (N, K).
        x: Images (N, C, H, W) in [0, 1].
        y: Labels (N,).
        norm: Ground norm.
        search: How hard to look.
        report: Called with stages done and stages in all.
        rows: (N,), the images' places in the set, by which random starts are drawn; None for 0 to N − 1.

    Returns:
        Distances that serve every order p and every budget. The effort has the same stages for any images, also none.
    """
    places = torch.arange(len(x)) if rows is None else rows.cpu()
    chunks = list(range(0, len(x), search.batch_size))
    passes = _passes(search, forward(network, x[:1]).shape[1])
    points, distances = x.clone(), torch.zeros(len(x), dtype=x.dtype, device=x.device)
    then = distances.expand(len(passes), -1).clone()  # after each stage
    for number, first in enumerate(chunks):
        here = slice(first, first + search.batch_size)
        everyone = _Best(network, x[here], y[here], norm)
        right = (everyone.distances > 0).nonzero().squeeze(1)
        if not len(right):
            if report:
                report((number + 1) * len(passes), len(chunks) * len(passes))
            continue
        best = _Best(network, x[here][right], y[here][right], norm)
        for stage, _ in enumerate(_stages(best, search, places[here][right.cpu()])):
            then[stage, first + right] = best.distances
            if report:
                report(number * len(passes) + stage + 1, len(chunks) * len(passes))
        points[first + right], distances[first + right] = best.points, best.distances
    reached = ((distances > 0) & distances.isfinite()).nonzero().squeeze(1)
    if len(reached):
        settled, wrong = _settle(network, x[reached], y[reached], points[reached], search.batch_size)
        points = points.index_copy(0, reached, torch.where(per_image(wrong, x).bool(), settled, x[reached]))
        now = image_norm(points[reached] - x[reached], norm)
        distances = distances.index_copy(0, reached, torch.where(wrong, now, torch.inf))
    return NearestAdversarial(points, distances, list(zip(passes, then, strict=True)))
