"""Descents of the radius: ascend a margin on a sphere that shrinks while the image is misclassified, and grows else.

In the manner of FMN (Pintor et al. 2021, arXiv 2102.12827). The first descent **(ours)** runs towards the class whose
linearised boundary is nearest, and its first step is the gradient that found this class. In linf a second kind of step
**(ours)** is proportional to the gradient: a sign step moves every pixel alike, though many hardly matter.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from wdat.gradients import Gradients, forward, gradients_of, input_gradients
from wdat.losses import margin, predictions
from wdat.threat import contract, direction, dual_norm, image_norm, per_image

Loss = Callable[[Tensor, Tensor], Tensor]

INNER = 0.95  # below this share of a segment bisection doesn't look: descents end at the boundary
PROPORTIONAL = 3.0  # a proportional step moves a pixel of root mean square gradient by this many radii, then is clipped


def misclassified(logits: Tensor, y: Tensor) -> Tensor:
    """Misclassified by more than rounding, (N,): the verdict outlives another batch composition.

    Logits that aren't finite are wrong.
    """
    slack = 64 * torch.finfo(torch.float32 if logits.dtype != torch.float64 else torch.float64).eps
    return (margin(logits, y) > slack * logits.abs().amax(1)) | (predictions(logits) < 0)


@dataclass
class Best:
    """The nearest verified points so far of one chunk of images.

    Attributes:
        network: Takes images in [0, 1], gives logits (N, K).
        x: Images (N, ...) in [0, 1].
        y: Labels (N,).
        norm: Ground norm.
        points: (N, ...), the images themselves where no point is known.
        distances: (N,), inf where no point is known.
    """

    network: nn.Module
    x: Tensor
    y: Tensor
    norm: str
    points: Tensor
    distances: Tensor

    def offer(self, points: Tensor, logits: Tensor) -> Tensor:
        """Keep the points (N, ...), with their logits (N, K), that are misclassified and nearer than what is known.

        Returns:
            Which points are misclassified, (N,).
        """
        wrong = misclassified(logits, self.y)
        distances = image_norm(points - self.x, self.norm)
        nearer = wrong & (distances < self.distances)
        self.distances = torch.where(nearer, distances, self.distances)
        self.points = torch.where(nearer.view(-1, *[1] * (points.dim() - 1)), points, self.points)
        return wrong

    def bisect(self, times: int) -> None:
        """Move along the segments from the images to their points, within the outer part of each."""
        low, high = torch.full_like(self.distances, INNER), torch.ones_like(self.distances)
        ends = self.points
        for _ in range(times):
            middle = (low + high) / 2
            points = (self.x + per_image(middle, self.x) * (ends - self.x)).clamp_(0, 1)
            wrong = self.offer(points, forward(self.network, points, len(points)))
            low, high = torch.where(wrong, low, middle), torch.where(wrong, middle, high)


def towards(target: Tensor) -> Loss:
    """The loss z_t − z_y of a targeted descent to the classes `target` (N,)."""

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return (logits.gather(1, target[:, None]) - logits.gather(1, labels[:, None])).squeeze(1)

    return loss


def nearest_classes(best: Best, candidates: int) -> tuple[Tensor, Gradients]:
    """Where to run to: of the classes with the largest logits, those with the nearest linearised boundaries.

    Args:
        best: The images.
        candidates: How many classes are looked at; a backward pass each, all after one forward pass.

    Returns:
        Classes by that distance, (N, at most `candidates`), and the gradients of z_t − z_y for the first of them.
    """
    images = best.x.detach().requires_grad_(True)
    logits = best.network(images)
    others = logits.detach().scatter(1, best.y[:, None], -torch.inf).argsort(1, descending=True)
    likely = others[:, : min(candidates, others.shape[1] - 1)]
    columns: list[Tensor] = []
    first: Gradients | None = None
    for k, target in enumerate(likely.unbind(1)):
        g = gradients_of(images, logits, best.y, towards(target), retain_graph=k + 1 < likely.shape[1])
        linear = (-g.loss / dual_norm(g.gradient, best.norm).clamp_min(1e-12)).nan_to_num(torch.inf, torch.inf)
        if first is None:
            first = g
        else:  # keep the gradients of the nearest class only, whatever the number of classes
            nearer = linear < torch.stack(columns, 1).amin(1)
            gradient = torch.where(nearer.view(-1, *[1] * (images.dim() - 1)), g.gradient, first.gradient)
            first = Gradients(gradient, torch.where(nearer, g.loss, first.loss), g.logits, first.finite)
        columns.append(linear)
    if first is None:
        raise ValueError("a network needs at least two classes")
    return likely.gather(1, torch.stack(columns, 1).argsort(stable=True, dim=1)), first


@dataclass(frozen=True)
class Pace:
    """How steps shrink along a descent, from the first value to the last by half a cosine.

    Attributes:
        rate: Length of a step in units of the radius.
        growth: By which factor the radius grows, or shrinks, in a step.
        proportional: Whether steps in linf are proportional to the gradient; else its sign.
    """

    rate: tuple[float, float] = (1.0, 0.02)
    growth: tuple[float, float] = (0.2, 0.001)
    proportional: bool = False

    def at(self, share: float) -> tuple[float, float]:
        """Rate and growth after a share of the steps."""
        cosine = (1 + math.cos(math.pi * share)) / 2
        rate, growth = (last + (first - last) * cosine for first, last in (self.rate, self.growth))
        return rate, growth


FAR, FINE = Pace(), Pace(rate=(0.3, 0.01), growth=(0.05, 0.0005), proportional=True)


def descend(
    best: Best, start: Tensor, loss: Loss, steps: int, pace: Pace = FAR, first: Gradients | None = None
) -> None:
    """One descent of the radius.

    Args:
        best: The images and their nearest points, which it improves.
        start: (N, ...), in [0, 1].
        loss: Positive exactly where an image is misclassified, as wanted.
        steps: Forward and backward passes; one forward pass follows.
        pace: How long the steps are.
        first: Gradients of the loss at `start`, where they are known: a pass less.
    """
    x, y, norm = best.x, best.y, best.norm
    z, radius = start, torch.full_like(best.distances, torch.nan)
    for step in range(steps):
        rate, growth = pace.at(step / steps)
        known = first if step == 0 else None
        g = known or input_gradients(best.network, z, y, loss, len(z))
        wrong = best.offer(z, g.logits)
        if step == 0:  # the distance at which the loss would vanish if it were linear: where to begin
            linear = (-g.loss).clamp_min(0) / dual_norm(g.gradient, norm).clamp_min(1e-12)
            radius = image_norm(z - x, norm) + linear
        radius = torch.where(wrong, torch.minimum(radius, best.distances) * (1 - growth), radius * (1 + growth))
        radius = torch.minimum(radius, best.distances).clamp_max(1e3)
        z = z + per_image(rate * radius, z) * _step(g.gradient, norm, pace.proportional)
        z = contract(x, z, radius, norm).clamp_(0, 1)
    best.offer(z, forward(best.network, z, len(z)))


def _step(gradient: Tensor, norm: str, proportional: bool) -> Tensor:
    """A step for a radius of one, to be clipped to the ball."""
    if norm != "linf" or not proportional:
        return direction(gradient, norm)
    flat = gradient.flatten(1)
    largest = flat.abs().amax(1)
    scaled = gradient / per_image(torch.where(largest > 0, largest, 1.0), gradient)  # tiny gradients keep their shape
    rms = scaled.flatten(1).square().mean(1).sqrt()
    return PROPORTIONAL * scaled / per_image(torch.where(rms > 0, rms, 1.0), gradient)
