"""The precision of evaluation: IEEE float32, also on GPUs that would round the factors of products to TF32.

cuDNN lets convolutions use TF32 from Ampere on unless it is told otherwise. Its relative error of 5e-4 is a hundred
times the slack that the verdict on an adversarial point allows for rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from wdat.gradients import device_of, eager


@contextmanager
def float32(network: nn.Module, x: Tensor, tf32: bool = False) -> Iterator[None]:
    """Products and convolutions of float32 in IEEE float32, without autocast or compiled code; restored on exit.

    Args:
        network: Runs where its parameters are; if that is a GPU, it is the current one inside.
        x: Its images, which tell where a network without parameters runs.
        tf32: Whether products may use TF32 instead: faster, and too coarse for exact verdicts.
    """
    device = device_of(network, x)
    current = torch.cuda.device(device) if device.type == "cuda" else nullcontext()  # that of compiled kernels too
    with (
        current,
        eager(network),
        torch.autocast(device.type, enabled=False),
        _products("tf32" if tf32 and device.type == "cuda" else "ieee"),
    ):
        yield


@contextmanager
def _products(wanted: str) -> Iterator[None]:
    """PyTorch has an old and a new interface, and raises where one reads what the other has set."""
    cudnn: Any = torch.backends.cudnn
    try:
        before = cudnn.allow_tf32, torch.get_float32_matmul_precision()
        _ = torch.backends.cuda.matmul.allow_tf32
    except RuntimeError:  # the user has chosen by the new one
        places: list[Any] = [cudnn.conv, cudnn.rnn, torch.backends.cuda.matmul]
        chosen = [place.fp32_precision for place in places]
        for place in places:
            place.fp32_precision = wanted
        try:
            yield
        finally:
            for place, value in zip(places, chosen, strict=True):
                place.fp32_precision = value
        return
    cudnn.allow_tf32 = wanted == "tf32"
    torch.set_float32_matmul_precision("high" if wanted == "tf32" else "highest")
    try:
        yield
    finally:
        cudnn.allow_tf32 = before[0]
        torch.set_float32_matmul_precision(before[1])


def describe(device: torch.device, dtype: torch.dtype, tf32: bool = False) -> dict[str, Any]:
    """What a record says of how its numbers were computed.

    Args:
        device: Where it runs.
        dtype: Of the images.
        tf32: Whether products may use TF32.

    Returns:
        `name` of the GPU, `precision` and `tf32`; the name is `CPU` without a GPU, where there is no TF32.
    """
    gpu = device.type == "cuda"
    return {
        "name": torch.cuda.get_device_name(device) if gpu else "CPU",
        "precision": str(dtype).removeprefix("torch."),
        "tf32": tf32 and gpu,
    }
