"""What an architecture is called: `WideResNet-34-10`, as in RobustBench's tables, else the name of its class."""

from __future__ import annotations

import re

from torch import nn

_RESNETS = (18, 34, 50, 101, 152)


def label(network: nn.Module) -> str:
    """The usual name of a network's architecture, as far as its layers tell.

    A WideResNet-d-k has d − 3 convolutions of 3x3 and k·64 features before its last layer. A ResNet-d has d − 1
    convolutions outside its shortcuts. Networks of timm carry their name. All others are named by their class.

    Args:
        network: Its weights may be on the meta device.
    """
    core = _inside(network)
    family = _family(core)
    # RobustBench's second WideResNet has spare blocks that its forward pass leaves out.
    convolutions = {n: m for n, m in core.named_modules() if isinstance(m, nn.Conv2d) and "sub_block1" not in n}
    heads = [m for m in core.modules() if isinstance(m, nn.Linear)]
    if family == "WideResNet" and heads:
        depth = 3 + sum(m.kernel_size == (3, 3) for m in convolutions.values())
        return f"{family}-{depth}-{heads[-1].in_features // 64}"
    if family.endswith("ResNet"):
        depth = 1 + sum(not re.search("shortcut|downsample", name) for name in convolutions)
        width = getattr(core, "base_width", 64) // 64  # torchvision's word for a wide ResNet
        if depth in _RESNETS:
            return f"Wide{family}-{depth}-{width}" if width > 1 else f"{family}-{depth}"
    return _name_in_timm(core) or family


def _inside(network: nn.Module) -> nn.Module:
    """The network without the normalisation that is put before it, or another small part beside it."""
    while isinstance(network, nn.Sequential):
        network = max(network, key=lambda part: sum(p.numel() for p in part.parameters()))
    return network


def _family(network: nn.Module) -> str:
    """Name of the class from which the network's own class is derived, without DeepMind's initials."""
    bases = [kind for kind in type(network).__mro__ if kind not in (nn.Module, object)]
    return bases[-1].__name__.removeprefix("DM")


def _name_in_timm(network: nn.Module) -> str:
    """The name of an architecture of timm's own; empty for others, which RobustBench has registered under theirs."""
    settings = getattr(network, "pretrained_cfg", None) or {}
    name = str(settings.get("architecture", "") if isinstance(settings, dict) else settings.architecture)
    return "" if re.search("_(cifar10|cifar100|imagenet)_", name) else name
