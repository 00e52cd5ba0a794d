"""Networks and images that tests share with the scripts that they start."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Rigid(nn.Module):
    """Flattens as many published networks do: this fails on an empty batch."""

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(x.size(0), -1)


def small_network(norm: bool = False) -> nn.Sequential:
    """A small convolutional network for (N, 1, 8, 8), in float64; with BatchNorm if wanted."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8) if norm else nn.Identity(),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, stride=2, padding=1),
        nn.Tanh(),
        Rigid(),
        nn.Linear(192, 10),
    ).to(torch.float64)


def small_digits() -> tuple[torch.Tensor, torch.Tensor]:
    """The 1,797 digits as (N, 8, 8, 1) uint8 and their labels."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    images = (torch.from_numpy(pixels) * 255 / 16).round().to(torch.uint8)
    return images.view(-1, 8, 8, 1), torch.from_numpy(labels).long()
