"""The guard that leaves a network as it was found."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def undisturbed(network: nn.Module) -> Iterator[None]:
    """Eval mode, frozen parameters and enabled input gradients; everything as before on exit, also after an error.

    Each submodule's training flag, each parameter's `requires_grad` and each buffer's values are restored; `.grad` is
    never touched, because only gradients with respect to inputs are ever taken. Works inside `torch.no_grad` and
    `torch.inference_mode`.
    """
    flags = [(module, module.training) for module in network.modules()]
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in network.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    try:
        network.eval()
        for parameter in trained:
            parameter.requires_grad_(False)
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for module, training in flags:
            module.training = training
        for parameter in trained:
            parameter.requires_grad_(True)
        with torch.no_grad():
            for module, name, buffer, _ in buffers:
                setattr(module, name, buffer)
            # Only what has changed is written, because a graph may hold the others; one look at the device for all.
            changed = [(buffer != saved).any() for _, _, buffer, saved in buffers]
            if changed and bool(torch.stack(changed).any()):
                for (_, _, buffer, saved), differs in zip(buffers, changed, strict=True):
                    if differs:
                        buffer.copy_(saved)


def ordinary(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Detached tensors that autograd accepts, also where the given ones were made in inference mode."""
    with torch.inference_mode(False):
        return tuple(t.clone() if t.is_inference() else t.detach() for t in tensors)
