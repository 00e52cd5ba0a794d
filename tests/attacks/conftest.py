"""Small networks and independent, image by image implementations that the attacks are compared with."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn


def _problem(n: int = 12, classes: int = 4, dtype: torch.dtype = torch.float64, seed: int = 0):
    """A smooth random network and images, some on the border of [0, 1], about half classified correctly."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = nn.Sequential(nn.Flatten(), nn.Linear(48, 16), nn.Tanh(), nn.Linear(16, classes)).to(dtype)
        with torch.no_grad():
            network[1].weight.mul_(3)
            network[3].weight.mul_(3)
        x = (torch.rand(n, 3, 4, 4, dtype=dtype) * 1.2 - 0.1).clamp(0, 1)
        y = network(x).argmax(1)
        y[::3] = torch.randint(classes, y[::3].shape)
    return network, x, y


@pytest.fixture
def problem():
    return _problem


def _loss(name, z, y, log_clean=None):
    """One image's loss by its formula; z is a vector of logits."""
    if name == "ce":
        return torch.logsumexp(z, 0) - z[y]
    if name == "kl":
        return (log_clean.exp() * (log_clean - (z - torch.logsumexp(z, 0)))).sum()
    others = torch.cat([z[:y], z[y + 1 :]])
    margin = others.max() - z[y]
    if name == "margin":
        return margin
    top = z.sort(descending=True).values
    return torch.minimum(margin / (top[0] - top[2]), torch.zeros((), dtype=z.dtype))


def _gradient(network, image, label, loss, log_clean=None):
    image = torch.from_numpy(image).clone().requires_grad_(True)
    value = _loss(loss, network(image[None])[0], int(label), log_clean)
    if not value.requires_grad:
        return np.zeros_like(image.detach().numpy())
    (g,) = torch.autograd.grad(value, image)
    return g.numpy()


def _dual(g, norm):
    return np.abs(g).sum() if norm == "linf" else math.sqrt((g * g).sum())


def _ascent(g, norm):
    if norm == "linf":
        return np.sign(g)
    length = math.sqrt((g * g).sum())
    return g / length if length > 0 else 0 * g


def _distance(offset, norm):
    return np.abs(offset).max() if norm == "linf" else math.sqrt((offset * offset).sum())


def _into_ball(offset, radius, norm):
    if norm == "linf":
        return np.clip(offset, -radius, radius)
    length = math.sqrt((offset * offset).sum())
    return offset if length <= radius else offset * (radius / length)


def _summary(network, trajectory, y, loss):
    """(image set of lowest accuracy, that accuracy, largest mean loss) over a trajectory."""
    accuracies, losses = [], []
    for z in trajectory:
        with torch.no_grad():
            logits = network(torch.from_numpy(z))
        accuracies.append(np.mean([int(row.argmax()) == int(label) for row, label in zip(logits, y, strict=True)]))
        losses.append(np.mean([float(_loss(loss, row, int(label))) for row, label in zip(logits, y, strict=True)]))
    best = int(np.argmin(accuracies))
    return SimpleNamespace(x=trajectory[best], accuracy=accuracies[best], loss_mean=max(losses), last=trajectory[-1])


def _wpgd(network, x, y, p, norm, delta, steps, step_size, loss):
    """W-PGD as the design describes it, one image after another, in numpy float64."""
    q = 1.0 if math.isinf(p) else p / (p - 1)
    origin, z, trajectory = x.numpy(), x.numpy().copy(), []
    for _ in range(steps):
        g = [_gradient(network, z[i], y[i], loss) for i in range(len(z))]
        n = [_dual(gi, norm) for gi in g]
        upsilon = np.mean([v**q for v in n]) ** (1 / q)
        for i in range(len(z)):
            share = (n[i] / upsilon) ** (q - 1) if upsilon > 0 else 0.0
            z[i] = z[i] + step_size * delta * share * _ascent(g[i], norm)
        d = [_distance(z[i] - origin[i], norm) for i in range(len(z))]
        if math.isinf(p):
            radii = [min(v, delta) for v in d]
        else:
            total = np.mean([v**p for v in d]) ** (1 / p)
            radii = [v * delta / total if total > delta else v for v in d]
        for i in range(len(z)):
            z[i] = np.clip(origin[i] + _into_ball(z[i] - origin[i], radii[i], norm), 0, 1)
        trajectory.append(z.copy())
    return _summary(network, trajectory, y, loss)


def _pgd(network, x, y, radii, norm, steps, step_size, first, then):
    """PGD inside given radii, one image after another: the first step on one loss, the others on another."""
    with torch.no_grad():
        log_clean = network(x).log_softmax(1)
    trajectory = [x.numpy().copy() for _ in range(steps)]
    for i in range(len(x)):
        origin = x[i].numpy()
        z = origin.copy()
        for k in range(steps):
            g = _gradient(network, z, y[i], first if k == 0 else then, log_clean[i])
            offset = z + step_size * radii[i] * _ascent(g, norm) - origin
            z = np.clip(origin + _into_ball(offset, radii[i], norm), 0, 1)
            trajectory[k][i] = z
    return trajectory if then == "kl" else _summary(network, trajectory, y, then)


def _norms(network, x, y, loss, norm):
    """The dual norms n_i, a float64 tensor."""
    values = [_dual(_gradient(network, i.numpy(), j, loss), norm) for i, j in zip(x, y, strict=True)]
    return torch.tensor(values, dtype=torch.float64)


@pytest.fixture
def textbook():
    return SimpleNamespace(wpgd=_wpgd, pgd=_pgd, norms=_norms)
