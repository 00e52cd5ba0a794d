"""The networks: local ones, RobustBench's zoo, and weights from files. All take images in [0, 1] and give logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from wdat.errors import SettingError
from wdat.models import build, zoo
from wdat.models.checkpoint import check_finite, digest, load_checkpoint
from wdat.models.finetune import find_head, keep_frozen_in_eval, prepare
from wdat.models.local import LOCAL, seeded
from wdat.models.speed import accelerate
from wdat.models.timm_zoo import load_timm

__all__ = [
    "LOCAL",
    "accelerate",
    "check_finite",
    "checkpoint_of",
    "describe",
    "digest",
    "find_head",
    "keep_frozen_in_eval",
    "load_checkpoint",
    "load_custom",
    "load_network",
    "load_timm",
    "origin",
    "prepare",
    "preprocessing",
    "title",
]

REGISTRY = "RobustBench's weights"


def load_network(
    name: str,
    num_classes: int = 10,
    checkpoint: str | Path | None = None,
    dataset: str = "cifar10",
    threat_model: str = "Linf",
    root: str | Path = "models",
    seed: int = 0,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    checkpoint_key: str | None = None,
    new_head: bool = False,
) -> nn.Module:
    """A network by name, on the CPU and in eval mode; whoever trains it calls `train()`.

    Args:
        name: A local network, an alias such as `Rebuffi2021`, or any full name of RobustBench's zoo.
        num_classes: Number of logits; a network of the zoo has that of its data set.
        checkpoint: A file of weights, as `load_checkpoint` takes it. A network of the zoo is then built without a
            download.
        dataset: For the zoo: `cifar10`, `cifar100` or `imagenet`.
        threat_model: For the zoo: what the weights were trained against, `Linf`, `L2` or `corruptions`.
        root: For the zoo: the folder of downloaded weights.
        seed: Seed of fresh weights.
        mean: For local networks: what the normalisation subtracts, one number a colour; CIFAR-10's where None.
        std: For local networks: what it divides by, likewise.
        checkpoint_key: Which of several state dicts in the file is meant, such as `"ema"`.
        new_head: Whether the last layer is drawn anew afterwards, so that the file's may have other classes.

    Raises:
        SettingError: An unknown name, with the nearest ones; a number of classes the network doesn't have; constants
            that can't be used; weights that can't be had or don't fit.
    """
    if name in LOCAL:
        given = {key: values for key, values in (("mean", mean), ("std", std)) if values is not None}
        with seeded(seed):
            network = LOCAL[name](num_classes, **given)  # a network of one's own need not take them
    elif mean is not None or std is not None:
        raise SettingError(f"{name} normalises by its own constants: model.mean and model.std are for local networks")
    else:
        entry = zoo.resolve(name, dataset, threat_model, others=LOCAL)
        if num_classes != zoo.CLASSES[dataset]:
            raise SettingError(
                f"{entry} has {zoo.CLASSES[dataset]} classes and the data {num_classes} (model.num_classes): choose "
                "model.dataset to match the data, or a local network"
            )
        if checkpoint is None:
            network = build.load_zoo(name, dataset, threat_model, root)
            check_finite(network, str(entry))
            return network
        with seeded(seed):
            network = build.architecture(entry)
    if checkpoint is not None:
        load_checkpoint(network, checkpoint, checkpoint_key, new_head)
    return network.eval()


def load_custom(
    network: Callable[[], nn.Module],
    num_classes: int = 10,
    checkpoint: str | Path | None = None,
    name: str = "custom",
    seed: int = 0,
    checkpoint_key: str | None = None,
    new_head: bool = False,
) -> nn.Module:
    """A network of the user's own class, on the CPU and in eval mode.

    Args:
        network: Makes it; fresh weights are those of the seed.
        num_classes: Number of classes of the data. How many logits the network has is the class's own business.
        checkpoint: A state dict or a checkpoint of ours.
        name: What records call it.
        seed: Seed of fresh weights.
        checkpoint_key: Which of several state dicts in the file is meant, such as `"ema"`.
        new_head: Whether the last layer is drawn anew afterwards, so that the file's may have other classes.

    Raises:
        SettingError: It is no `nn.Module`, or the weights don't fit.
    """
    with seeded(seed):
        made = network()
    if not isinstance(made, nn.Module):
        raise SettingError(f"model.network._target_={name} makes a {type(made).__name__}: name an nn.Module")
    if checkpoint is not None:
        load_checkpoint(made, checkpoint, checkpoint_key, new_head)
    return made.eval()


def origin(settings: Mapping[str, Any]) -> str:
    """Where a network's weights come from, in words: a file, RobustBench, or nowhere, `fresh weights (seed 0)`.

    Args:
        settings: What `load_network` is called with, by name; or those of a network of the user's own class.
    """
    checkpoint, key = settings.get("checkpoint"), settings.get("checkpoint_key")
    if checkpoint:
        return f"weights of {checkpoint}" + (f" ({key})" if key else "")
    if settings.get("name") in LOCAL:
        return f"fresh weights (seed {settings.get('seed', 0)})"
    if settings.get("_target_") == "wdat.models.load_timm":
        return (
            "timm's weights" if settings.get("pretrained", True) else f"fresh weights (seed {settings.get('seed', 0)})"
        )
    own = settings.get("_target_", "wdat.models.load_network") != "wdat.models.load_network"
    return "weights as its class makes them (no checkpoint)" if own else REGISTRY


def checkpoint_of(settings: Mapping[str, Any]) -> str:
    """What records say in the place of a checkpoint: its file, or where weights without one come from; "" for the zoo.

    Args:
        settings: As `origin` takes them.
    """
    found = origin(settings)
    return str(settings.get("checkpoint") or ("" if found == REGISTRY else found))


def title(settings: Mapping[str, Any]) -> str:
    """A network's name in records: names of the zoo mean other weights in another part of it, which is then added.

    Args:
        settings: What `load_network` is called with, by name.
    """
    name = str(settings["name"])
    part = [str(settings.get(key, usual)) for key, usual in (("dataset", "cifar10"), ("threat_model", "Linf"))]
    return name if name in LOCAL or part == ["cifar10", "Linf"] else f"{name} ({', '.join(part)})"


def preprocessing(settings: Mapping[str, Any]) -> str | None:
    """How a network's images are cut where they are of many sizes: as RobustBench cuts them for it.

    Args:
        settings: What `load_network` is called with, by name.

    Returns:
        A name such as `Res256Crop224`; None for local networks and those for CIFAR.

    Raises:
        SettingError: An unknown name, with the nearest ones.
    """
    name, dataset = settings["name"], settings.get("dataset")
    if name in LOCAL or dataset != "imagenet":
        return None
    return zoo.preprocessing(zoo.resolve(name, dataset, settings.get("threat_model", "Linf"), others=LOCAL))


def describe(network: nn.Module) -> tuple[str, int]:
    """The name of the network's class and its number of parameters, frozen ones included."""
    return type(network).__name__, sum(parameter.numel() for parameter in network.parameters())
