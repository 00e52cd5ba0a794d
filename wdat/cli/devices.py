"""Where a run computes: what is said of it, BatchNorm over several devices, and memory that is full."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import lightning as L
import torch
from omegaconf import DictConfig
from torch import nn

from wdat.errors import RunError, SettingError, chain


def active_batchnorm(network: nn.Module) -> bool:
    """Whether a BatchNorm of the network takes its statistics from the batches of a training, frozen ones aside."""
    kinds = nn.modules.batchnorm._BatchNorm
    return any(
        isinstance(module, kinds) and any(p.requires_grad for p in module.parameters()) for module in network.modules()
    )


def synchronised(trainer: DictConfig, network: nn.Module, world_size: int, on_gpus: bool) -> bool:
    """Whether BatchNorm takes its statistics over all processes: unless it is told otherwise, it does.

    Args:
        trainer: The settings of the trainer; `sync_batchnorm` null leaves it to this function.
        network: The network, frozen where it will be.
        world_size: Processes that train together.
        on_gpus: Whether they train on GPUs.

    Raises:
        SettingError: If the network's statistics can't be taken over processes, and nobody has said that each process
            shall have its own.
    """
    if world_size == 1 or not active_batchnorm(network):
        return False
    if trainer.sync_batchnorm is False:
        return False
    if not on_gpus:
        raise SettingError(
            f"the network has BatchNorm, which PyTorch synchronises on GPUs only, and {world_size} processes would "
            "each normalise their own part of a batch: set trainer.devices=1, or trainer.sync_batchnorm=false if that "
            "is meant"
        )
    return True


def told(trainer: L.Trainer, batch_size: int, network: nn.Module, sync_batchnorm: bool) -> str:
    """One line on the devices of a training, its precision, and how they share a batch."""
    device = trainer.strategy.root_device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    world = trainer.world_size
    parts = [f"{world} × {name}" if world > 1 else f"{name} ({device})" if device.type != "cpu" else name]
    parts.append(f"precision {trainer.precision}")
    if world > 1:
        parts.append(f"{batch_size // world} of each batch's {batch_size} images on each")
        if active_batchnorm(network):
            parts.append(f"BatchNorm {'over all of them' if sync_batchnorm else 'of each part alone'}")
    return ", ".join(parts)


@contextmanager
def memory_errors(remedy: Callable[[], str]) -> Iterator[None]:
    """Tell in a `RunError` of a GPU whose memory is full.

    Args:
        remedy: What to set, asked for where it is needed.

    Raises:
        RunError: If the block ran out of memory.
    """
    try:
        yield
    except Exception as error:
        if not any(isinstance(e, torch.OutOfMemoryError) or "ALLOC_FAILED" in str(e) for e in chain(error)):
            raise
        asked = re.search(r"[Tt]ried to allocate ([\d.]+ \w+)", " ".join(map(str, chain(error))))
        wanted = f" (another {asked[1]} were wanted)" if asked else ""
        raise RunError(f"the memory of the GPU is full{wanted}: {remedy()}") from error
