"""What the search of nearest points must hold where gradients mislead and where rounding decides."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from wdat.attacks import build
from wdat.threat import image_norm


class Steep(nn.Module):
    """Two classes on either side of a plane, with logits so steep that they are flat wherever an image lies.

    Between an image and the plane the gradient falls to e^-30 of its largest value: a linear model of the margin
    expects the boundary some hundred times further away than the other end of [0, 1].
    """

    def __init__(self, pixels: int = 27) -> None:
        super().__init__()
        weight = torch.linspace(0.5, 1.5, pixels, dtype=torch.float64)
        self.register_buffer("weight", weight / weight.sum())  # of dual norm 1 for linf

    def height(self, x: Tensor) -> Tensor:
        """The distance in linf to the plane, signed, (N,)."""
        return (x.flatten(1) - 0.5) @ self.weight

    def forward(self, x: Tensor) -> Tensor:
        t = torch.tanh(150 * self.height(x))
        return torch.stack([t, -t], 1)


def on_one_side(n: int = 12) -> tuple[Steep, Tensor, Tensor, Tensor]:
    """The network, images at 0.1 from its boundary, their labels and distances in linf."""
    network = Steep()
    noise = torch.rand(n, 3, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = 0.6 + 0.05 * (noise - 0.5)
    return network, x, torch.zeros(n, dtype=torch.int64), network.height(x)


def test_a_radius_that_was_far_too_large_comes_back_to_the_nearest_point_found():
    """Without that, a descent of 20 steps ends where it began, at the far corner of [0, 1]."""
    network, x, y, exact = on_one_side()
    search = build("knapsack", starts=0, targets=1, steps=20, bisections=0)
    found = search.find(network, x, y, "linf").distances
    assert bool((found >= exact * (1 - 1e-9)).all())
    assert bool((found <= 1.01 * exact).all())


class Watched(nn.Module):
    """Notes at each pass for gradients how far an image is from where it was, and whether it is misclassified."""

    def __init__(self, network: nn.Module, image: Tensor) -> None:
        super().__init__()
        self.network, self.image = network, image
        self.passes: list[tuple[float, bool]] = []

    def forward(self, z: Tensor) -> Tensor:
        logits = self.network(z)
        if z.requires_grad:
            wrong = logits.argmax(1) != 0
            self.passes += zip(image_norm(z.detach() - self.image, "linf").tolist(), wrong.tolist(), strict=True)
        return logits


def test_no_step_is_spent_beyond_the_nearest_point_found():
    """Nor by descents from random points, where the linear model is as wrong as at the image."""
    network, x, y, _ = on_one_side(4)
    for row in range(4):
        image, label = x[row : row + 1], y[row : row + 1]
        watched, nearest = Watched(network, image), float("inf")
        build("knapsack", starts=3, targets=0, steps=8, bisections=0).find(watched, image, label, "linf")
        for distance, wrong in watched.passes:
            assert distance <= nearest * (1 + 1e-9)
            nearest = min(nearest, distance) if wrong else nearest
        assert nearest < 1


class Rounding(nn.Module):
    """Adds to the label's logit, in batches of other sizes than the search's, what other kernels' rounding might."""

    def __init__(self, network: nn.Module, size: int, shift: float) -> None:
        super().__init__()
        self.network, self.size, self.shift = network, size, shift

    def forward(self, z: Tensor) -> Tensor:
        logits = self.network(z)
        return logits if len(z) == self.size else logits + self.shift * torch.tensor([1.0, 0.0], dtype=z.dtype)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_points_that_another_batch_would_take_back_are_pushed_outwards(norm):
    """Neither lost nor left on the wrong side of the boundary: a little further than the search found them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Flatten(), nn.Linear(27, 2)).double()
        x = 0.45 + 0.1 * torch.rand(12, 3, 3, 3, dtype=torch.float64)
    direction = (network[1].weight[0] - network[1].weight[1]).detach()
    with torch.no_grad():  # every image at margin 0.2 or so on the side of class 0
        network[1].bias.copy_(torch.tensor([0.2, 0.0]) - network[1].weight @ x.flatten(1).mean(0))
    y = torch.zeros(len(x), dtype=torch.int64)
    right = network(x).argmax(1) == 0
    x, y = x[right], y[right]
    strange = Rounding(network, len(x), 1e-5)
    search = build("knapsack", starts=1, targets=1, steps=30, bisections=20, batch_size=len(x))
    found, plain = search.find(strange, x, y, norm), search.find(network, x, y, norm)
    assert bool(found.distances.isfinite().all())
    assert bool((strange(torch.cat([found.x_adv, found.x_adv])).argmax(1) != 0).all())
    assert bool((found.distances <= plain.distances * (1 + 2e-3)).all())
    shortest = (network(x)[:, 0] - network(x)[:, 1]).detach() + 1e-5
    shortest = shortest / (direction.abs().sum() if norm == "linf" else direction.norm())
    assert bool((found.distances >= shortest * (1 - 1e-9)).all())


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_what_only_rounding_misclassifies_is_not_counted(norm):
    """Each logit is a sum of 64 positive terms, near 4096, where float32 has a spacing of 2^-11; none in float64."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Flatten(), nn.Linear(27, 64), nn.Linear(64, 4, bias=False))
        x = 0.45 + 0.1 * torch.rand(60, 3, 3, 3)
        with torch.no_grad():
            network[1].weight.mul_(100)
            network[1].bias.add_(64)
            network[2].weight.mul_(0.5).add_(1)
    with torch.no_grad():  # so that the classes' logits are equal on average
        mean = copy.deepcopy(network).double()(x.double()).mean(0)
        network[2].weight.mul_((mean.mean() / mean).float()[:, None])
    exact = copy.deepcopy(network).double()
    y = exact(x.double()).argmax(1)
    found = build("knapsack", starts=1, targets=2, steps=30, bisections=20).find(network, x, y, norm)
    reached = found.distances.isfinite()
    assert float(reached.float().mean()) > 0.8
    assert bool((exact(found.x_adv.double()).argmax(1) != y)[reached].all())
