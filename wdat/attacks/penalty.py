"""A penalty descent: minimise the distance plus an augmented-Lagrangian penalty of being classified correctly.

In the manner of ALMA (Rony et al. 2021, arXiv 2011.11857): the constraint c is the difference-of-logits ratio,
positive where the image is classified correctly; its multiplier μ follows the slope of the penalty by a moving average;
the steps are those of RMSProp with momentum. It walks along the boundary where a descent of the radius walks across it,
so it finds other minima. It always minimises the l2 distance, because the gradient of the linf distance touches one
pixel only; in linf its points are where another descent starts **(ours)**.
"""

from __future__ import annotations

import torch
from torch import Tensor

from wdat.attacks.descent import Best
from wdat.losses import margin
from wdat.threat import image_norm, per_image

RATE = 0.4  # length of the first step in units of the distance known
UNKNOWN = 0.5  # stands for that distance where no point is known
AVERAGE = 0.5  # of multiplier, squares and momentum: for about 100 steps
LAST_RATE = 0.01  # of the first one
CHECK, IMPROVED, RAISE = 10, 0.95, 1.2  # every so many steps ρ is raised where c hasn't fallen to this share


def penalty_slope(c: Tensor, mu: Tensor, rho: Tensor) -> Tensor:
    """dP/dc of ALMA's penalty: μ (1 + 2ρc) + ρ²c²/2 for c ≥ 0, μ/(1 − ρc)² below; (N,) → (N,)."""
    above = mu * (1 + 2 * rho * c) + 0.5 * (rho * c) ** 2
    return torch.where(c >= 0, above, mu / (1 - rho * c.clamp(max=0)) ** 2)


def _ratio(logits: Tensor, y: Tensor) -> Tensor:
    """c, (N,): how far the label leads, over the lead of the first class before the third."""
    top = logits.topk(min(3, logits.shape[1]), dim=1).values
    return (1e-4 - margin(logits, y)) / (top[:, 0] - top[:, -1] + 1e-8)


def penalise(best: Best, start: Tensor, steps: int) -> Tensor:
    """One penalty descent.

    Args:
        best: The images and their nearest points, which it improves.
        start: (N, ...), in [0, 1].
        steps: Forward and backward passes.

    Returns:
        The misclassified points that are nearest in l2, (N, ...); the last ones where none is misclassified.
    """
    x, y = best.x, best.y
    nearest, least = start, torch.full_like(best.distances, torch.inf)
    z, mu, rho = start, torch.ones_like(best.distances), torch.ones_like(best.distances)
    squares, momentum = torch.ones_like(x), torch.zeros_like(x)
    begun = torch.full_like(best.distances, torch.inf)  # the step at which the image was first misclassified
    length, before = torch.zeros_like(best.distances), torch.zeros_like(best.distances)
    for step in range(steps):
        images = z.detach().requires_grad_(True)
        logits = best.network(images)
        ratio = _ratio(logits, y)
        c = ratio.detach().to(x.dtype)
        wrong = best.offer(z, logits.detach())
        distance = image_norm(z - x, "l2")
        better = torch.where(wrong, distance < least, least.isinf())
        nearest = torch.where(per_image(better, z).bool(), z, nearest)
        least = torch.where(wrong & better, distance, least)
        if step == 0:
            before = c
        elif (step + 1) % CHECK == 0:
            rho = torch.where(begun.isinf() & ~wrong & (c >= IMPROVED * before), RAISE * rho, rho)
            before = c
        if step:
            mu = torch.lerp(penalty_slope(c, mu, rho), mu, AVERAGE).clamp(1e-6, 1e12)
        begun = torch.where(wrong & begun.isinf(), float(step), begun)
        (gradient,) = torch.autograd.grad((penalty_slope(c, mu, rho) * ratio).sum(), images)
        gradient = torch.where(per_image(gradient.flatten(1).isfinite().all(1), x).bool(), gradient, 0.0)
        gradient = gradient + (z - x) / per_image(distance.clamp_min(1e-12), x)
        if step == 0:
            known = torch.where(best.distances.isfinite(), image_norm(best.points - x, "l2"), UNKNOWN)
            length = RATE * known / image_norm(gradient, "l2").clamp_min(1e-12)
        done = (step - begun).clamp_min(0) / (steps - begun)
        now = length * LAST_RATE ** done.nan_to_num(0.0)
        squares.mul_(AVERAGE).addcmul_(gradient, gradient, value=1 - AVERAGE)
        momentum.mul_(AVERAGE).addcdiv_(gradient, squares.sqrt().add_(1e-12))
        z = (z - per_image(now, z) * momentum).clamp_(0, 1)
    return nearest
