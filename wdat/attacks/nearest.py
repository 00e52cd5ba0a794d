"""The distance of each image to its nearest adversarial point, for users with a network of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from wdat.attacks.base import check_images
from wdat.attacks.knapsack import Knapsack
from wdat.attacks.minimum_norm import NearestAdversarial
from wdat.errors import SettingError
from wdat.inputs import as_images, as_labels, as_network
from wdat.threat import ThreatModel


def nearest_adversarial(
    network: nn.Module | Callable[[Tensor], Tensor], x: Tensor, y: Tensor, norm: str = "linf", **options: Any
) -> NearestAdversarial:
    """Search the nearest misclassified point of each image.

    Args:
        network: Any module or function that takes images in [0, 1] and gives logits (N, K); left as it was found.
        x: Images (N, C, H, W), float, in [0, 1]; a tensor, or an array of NumPy.
        y: Labels (N,), whole numbers.
        norm: `linf` or `l2`.
        options: How hard to look: `effort="quick"`, `"default"` or `"thorough"`, and the other settings of
            `wdat.attacks.Knapsack`.

    Returns:
        Points `x_adv` (N, C, H, W) in [0, 1], each verified by a forward pass, and their `distances` (N,) in pixel
        units, which are upper bounds of the true ones: 0 where an image is misclassified as it is, inf where no point
        was found.

    Raises:
        SettingError: If a setting or an input can't be used.

    Example:
        >>> import torch
        >>> network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
        >>> x = torch.rand(8, 3, 2, 2)
        >>> found = nearest_adversarial(network, x, network(x).argmax(1), effort="quick")
        >>> bool((found.distances > 0).all())
        True
    """
    ThreatModel(p=2, norm=norm, delta=1.0)  # refuses an unknown norm
    try:
        attack = Knapsack(**options)
    except TypeError as error:
        raise SettingError(f"nearest_adversarial has an option that the search doesn't know ({error})") from error
    network = as_network(network)
    images = as_images(x, network)
    labels = as_labels(y).to(images.device)
    check_images(network, images, labels)
    return attack.find(network, images, labels, norm)
