"""Small seeded networks of images (3, 6, 6), one for each thing that CROWN must follow."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

SHAPE = (3, 6, 6)


class Block(nn.Module):
    """A residual block with a strided shortcut, then one with an identity shortcut."""

    def __init__(self, in_place: bool = False) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, 1, 1)
        self.short, self.third = nn.Conv2d(3, 4, 1, 2), nn.Conv2d(4, 4, 3, padding=1)
        self.head, self.in_place = nn.Linear(36, 4), in_place

    def forward(self, x: Tensor) -> Tensor:
        if self.in_place:
            z = self.second(F.relu(self.first(x), inplace=True))
            z += self.short(x)
            z = F.relu_(z)
        else:
            z = F.relu(self.second(F.relu(self.first(x))) + self.short(x))
        z = F.relu(self.third(z) + z)
        return self.head(z.flatten(1))


class Normalised(nn.Module):
    """Arithmetic with constants on both sides, views and a mean over pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        mean = torch.tensor([0.4, 0.5, 0.6], dtype=x.dtype).view(3, 1, 1)
        x = F.pad(x, (1, 0, 0, 1), value=0.5)
        x = 2.0 * ((x - mean) / torch.tensor([0.25, 0.2, 0.3], dtype=x.dtype).view(3, 1, 1)) * -0.5 + 0.1
        z = torch.relu(self.conv(x)).mean((2, 3))
        return self.head(z.view(-1, 8)) - 0.05


def _batch_norm() -> nn.Module:
    norm = nn.BatchNorm2d(5)
    nn.init.normal_(norm.weight)  # of both signs
    nn.init.normal_(norm.bias)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    return nn.Sequential(nn.Conv2d(3, 5, 3), norm, nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(20, 4))


KINDS = {
    "mlp": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(108, 20), nn.ReLU(), nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 4)
    ),
    "strides": lambda: nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(6, 8, 2, padding=1, dilation=2, bias=False),
        nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(72, 4),
    ),
    "batch norm": _batch_norm,
    "pooling": lambda: nn.Sequential(
        nn.AvgPool2d(3, 1, 1), nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 4)
    ),
    "residual": Block,
    "in place": lambda: Block(in_place=True),
    "constants": Normalised,
}  # fmt: skip


def seeded(kind: str, seed: int = 0, gain: float = 1.5) -> nn.Module:
    """A network in float64, its weights a little larger than usual, so that units become unstable."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = KINDS[kind]().double().eval()
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                if parameter.dim() > 1 and "head" not in name:
                    parameter.mul_(gain)
    return network


def image(seed: int = 0, shape: tuple[int, ...] = SHAPE) -> Tensor:
    """An image in float64, part of it on the border of [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(shape, generator=generator, dtype=torch.float64) * 1.4 - 0.2).clamp(0, 1)


@pytest.fixture(params=sorted(KINDS))
def kind(request) -> str:
    return request.param
