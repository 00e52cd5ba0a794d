"""Switches that make a network faster and leave its parameters and their names as they are."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def accelerate(
    network: nn.Module, channels_last: bool = False, compiled: bool = False, backend: Any = "inductor"
) -> nn.Module:
    """Choose the network's memory layout, and whether it is compiled.

    Only the network is compiled, never the attacks around it, whose `autograd.grad` would break the compiled region.
    It is compiled in place, so that the names in checkpoints stay as they are.

    Args:
        network: Changed in place.
        channels_last: Keep convolutions' weights, and so what flows between them, as N×H×W×C, which is faster on GPUs
            with bf16. Images and their gradients outside the network are not concerned.
        compiled: Compile the network at its first use (`torch.compile`).
        backend: What generates the code, as `torch.compile` takes it.
    """
    if channels_last:
        network.to(memory_format=torch.channels_last)
    if compiled:
        network.compile(backend=backend)
    return network


class PreciseLinear(nn.Linear):
    """A linear layer in the precision of its weights, also under autocast."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., F) to (..., K)."""
        if not torch.is_autocast_enabled(x.device.type):
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(self.weight.dtype), self.weight, self.bias)


def precise(network: nn.Module, name: str) -> None:
    """Let a linear layer compute in the precision of its weights, also under autocast; its parameters stay the same.

    Of the last layer: bfloat16 has 8 bits, so that the difference of two logits of size 8 is a multiple of 1/32, and
    with it every margin and every distance to the boundary.

    Args:
        network: Changed in place.
        name: Of the layer in the network; one of another class than `torch.nn.Linear` is left alone.
    """
    parent, _, own = name.rpartition(".")
    layer = network.get_submodule(name)
    if own and type(layer) is nn.Linear:
        made = PreciseLinear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        made.weight, made.bias = layer.weight, layer.bias
        setattr(network.get_submodule(parent), own, made.train(layer.training))
