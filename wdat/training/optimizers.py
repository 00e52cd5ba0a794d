"""What the optimiser is given: the peak rate for a batch size, and which parameters decay."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from wdat.errors import check_whole, unknown

EXEMPT = ("norm", "bias")
NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)  # _NormBase: BatchNorm, InstanceNorm, SyncBatchNorm
NAMED_NORM = re.compile(r"Norm(Act)?(\dd)?$")  # the types of networks that bring their own, such as timm's RmsNorm


def peak_rate(lr: float, batch_size: int, per_batch: int | None) -> float:
    """The rate for a batch size by linear scaling: lr max(batch_size/per_batch, 1) (Goyal et al. 2017).

    Smaller batches keep `lr`, as in Gowal et al. 2020 and Rebuffi et al. 2021.

    Args:
        lr: The rate for `per_batch` images.
        batch_size: Images in a step, over all devices.
        per_batch: From 1; None leaves the rate as it is.

    Raises:
        SettingError: If `per_batch` is below 1.
    """
    if per_batch is None:
        return lr
    check_whole("optimizer.per_batch", per_batch, hint="images, or null")
    return lr * max(batch_size / per_batch, 1.0)


def is_norm(module: nn.Module) -> bool:
    """Whether a module normalises, by its type."""
    return isinstance(module, NORMS) or any(NAMED_NORM.search(kind.__name__) for kind in type(module).__mro__)


def decay_groups(network: nn.Module, exempt: Sequence[str]) -> list[dict[str, Any]]:
    """Groups of the trainable parameters for an optimiser: those with its weight decay, then those without.

    A parameter that several modules share is listed once, and exempt only if it is so in all of them.

    Args:
        network: Frozen parameters are left out.
        exempt: Of `norm`, the parameters of normalisation layers, and `bias`, those that are a layer's `bias`.

    Returns:
        At most two groups in the network's order; empty ones are left out.

    Raises:
        SettingError: If `exempt` names something else.
    """
    for name in exempt:
        if name not in EXEMPT:
            raise unknown("kind of parameter", name, EXEMPT, "optimizer.exempt")
    decayed: dict[nn.Parameter, bool] = {}
    for parameter, kinds in _kinds(network):
        decayed[parameter] = decayed.get(parameter, False) or not kinds & set(exempt)
    groups: list[dict[str, Any]] = [
        {"params": [p for p, decays in decayed.items() if decays]},
        {"params": [p for p, decays in decayed.items() if not decays], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _kinds(network: nn.Module) -> Iterator[tuple[nn.Parameter, set[str]]]:
    """Each trainable parameter of each module, and what it is there."""
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            bias = name == "bias" or name.endswith("_bias")  # such as in_proj_bias of MultiheadAttention
            if parameter.requires_grad:
                yield parameter, {kind for kind, is_so in (("norm", is_norm(module)), ("bias", bias)) if is_so}
