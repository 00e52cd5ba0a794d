"""Switches that make a network faster and leave its parameters and their names as they are."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


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
