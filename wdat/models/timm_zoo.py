"""Networks of timm by name, which take images in [0, 1] here: timm's own normalise outside."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from wdat.errors import SettingError, unknown
from wdat.models.checkpoint import check_finite, load_checkpoint
from wdat.models.local import seeded


def library() -> Any:
    """The package timm, without the warnings of its older versions about new versions of torch."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module("timm")


class Normalise:
    """A hook before a network's pass: takes the mean from its images and divides by the standard deviation."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.mean, self.std = tuple(map(float, mean)), tuple(map(float, std))

    def __call__(self, network: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The arguments of the pass with normalised images (N, C, H, W)."""
        x, *rest = arguments
        mean, std = (x.new_tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        return ((x - mean) / std, *rest)


def load_timm(
    name: str,
    num_classes: int = 10,
    pretrained: bool = True,
    checkpoint: str | Path | None = None,
    seed: int = 0,
    checkpoint_key: str | None = None,
    new_head: bool = False,
) -> nn.Module:
    """A network of timm, on the CPU and in eval mode. Its parameters have timm's names.

    Args:
        name: Of timm, with a tag of its weights or without: `resnet18.a1_in1k`.
        num_classes: Number of logits; where timm's weights have another one, the last layer is drawn by the seed.
        pretrained: Whether weights are timm's, which it downloads; else they are drawn by the seed.
        checkpoint: A state dict or a checkpoint of ours; nothing is downloaded then.
        seed: Of what is drawn.
        checkpoint_key: Which of several state dicts in the file is meant, such as `"ema"`.
        new_head: Whether the last layer is drawn anew afterwards, so that the file's may have other classes.

    Raises:
        SettingError: An unknown name, with the nearest ones; weights that can't be had or don't fit.
    """
    timm = library()
    if not timm.is_model(name):
        raise unknown("network of timm", name, timm.list_models(), "model.name")
    own = pretrained and checkpoint is None
    try:
        with seeded(seed):
            network: nn.Module = timm.create_model(name, pretrained=own, num_classes=num_classes)
    except Exception as error:  # of the network, the hub, or a tag that there isn't
        raise SettingError(
            f"model.name={name} has no weights here ({str(error).splitlines()[0]}): give a file as model.checkpoint=, "
            "or set model.pretrained=false"
        ) from error
    if checkpoint is not None:
        load_checkpoint(network, checkpoint, checkpoint_key, new_head)
    check_finite(network, name)
    settings: Any = network.pretrained_cfg
    network.register_forward_pre_hook(Normalise(settings["mean"], settings["std"]))
    return network.eval()
