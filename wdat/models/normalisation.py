"""Constants of normalisation: the mean and standard deviation that a network takes out of its images."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn

from wdat.errors import SettingError

MEAN = ("mean", "mu", "means", "image_mean", "pixel_mean", "norm_mean")
STD = ("std", "sigma", "stds", "image_std", "pixel_std", "norm_std")
"""What the constants are called, as the last part of a key."""

CLOSE = 1e-3
"""How far constants may differ that are the same, rounded differently."""

_MOST = 4  # channels


def constants(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of the tensors that are constants of normalisation: their names say so, and they have a value a channel."""
    return {
        name: value for name, value in tensors.items()
        if name.rpartition(".")[2] in (*MEAN, *STD) and value.is_floating_point() and 0 < value.numel() <= _MOST
    }  # fmt: skip


def compare(network: nn.Module, found: Mapping[str, Tensor], path: Path) -> str:
    """Compare the constants of a file with the network's own, which are 0 and 1 where it has none.

    Args:
        network: The network that the weights are for.
        found: The file's constants by name; none compare as equal.
        path: The file, for messages.

    Returns:
        What to tell the user; empty where there was nothing to compare.

    Raises:
        SettingError: They differ.
    """
    own = constants(dict(chain(network.named_buffers(), network.named_parameters())))
    for name, value in found.items():
        kind = MEAN if name.rpartition(".")[2] in MEAN else STD
        mine = next(
            (v for n, v in own.items() if n.rpartition(".")[2] in kind), torch.tensor(0.0 if kind is MEAN else 1.0)
        )
        a, b = (tensor.detach().flatten().cpu().float() for tensor in (value, mine))
        longest = max(len(a), len(b))
        a, b = (tensor.expand(longest) if len(tensor) in (1, longest) else tensor.new_zeros(0) for tensor in (a, b))
        if len(a) != len(b) or not bool(((a - b).abs() <= CLOSE).all()):
            raise SettingError(
                f"{path} was trained with {name} = {_text(a)}, and {type(network).__name__} has {_text(b)} "
                "(model.checkpoint): set model.mean and model.std where the model has them, or choose the model that "
                "the file was saved with"
            )
    return f"{path}: {', '.join(found)} equal the network's own and are left out" if found else ""


def _text(values: Tensor) -> str:
    return "(" + ", ".join(f"{value:.4g}" for value in values.tolist()) + ")"
