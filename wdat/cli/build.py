"""Objects from the configuration: a node names a class by `_target_`, and its other keys are the class's arguments."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from hydra._internal.utils import _locate  # as `get_object`, which also logs what it does not find
from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import nn

from wdat.attacks import ATTACKS, Attack
from wdat.errors import RunError, SettingError, cause, unknown
from wdat.inputs import classes_of


def build(node: Any, setting: str, *arguments: Any, **given: Any) -> Any:
    """What a node of the configuration describes; None for a node that is null.

    Args:
        node: A mapping with `_target_`.
        setting: Its key on the command line, such as `"attack"`.
        arguments: Further arguments of the class.
        given: Further arguments by name, which win over the node's.

    Raises:
        SettingError: If the class can't be found or refuses its arguments; the message names the setting.
    """
    if node is None:
        return None
    _check(node, setting, bool(arguments), set(given))
    try:
        return instantiate(node, *arguments, **given)
    except InstantiationException as error:
        meant = cause(error, SettingError, RunError)
        if meant is not None:
            # Attacks speak of `attack.…`, wherever they stand.
            raise type(meant)(re.sub(r"\battack\.(?=\w+=)", f"{_attack_key(error, setting)}.", str(meant))) from error
        if isinstance(error.__cause__, (TypeError, ValueError, MisconfigurationException)):
            raise _unusable(node, setting, error.__cause__) from error
        raise


def accepts(node: Any, argument: str) -> bool:
    """Whether the class of a node has an argument of this name."""
    return argument in inspect.signature(get_object(node._target_)).parameters


def try_optimizer(factory: Any, setting: str, node: Any, parameters: Sequence[Any]) -> None:
    """Refuse arguments that an optimiser would refuse when it is made, before any work.

    Args:
        factory: The optimiser without parameters.
        setting: Its key on the command line.
        node: Its configuration.
        parameters: Any.
    """
    try:
        factory(parameters)
    except (TypeError, ValueError) as error:
        raise _unusable(node, setting, error) from error


def build_attacks(node: Any, setting: str = "evaluation") -> tuple[list[str | Attack], dict[str, Mapping[str, Any]]]:
    """The attacks of an evaluation, for `wdat.evaluate` and `RobustEvaluation`.

    Args:
        node: A configuration as `conf/evaluation/` composes it: `attacks`, a list of names and of mappings with
            `_target_`, and `attack_options`, settings by name, of which those with `_target_` define a name.
        setting: Its key on the command line; empty for the top level.

    Returns:
        Names and attacks, and the options of the names.

    Raises:
        SettingError: If a name is unknown or an attack can't be made.
    """
    prefix = f"{setting}." if setting else ""
    if not isinstance(node.attacks, (ListConfig, list)):
        raise SettingError(f"{prefix}attacks={node.attacks} must be a list: {prefix}attacks=[{node.attacks}]")
    options: dict[str, Any] = OmegaConf.to_container(node.attack_options, resolve=True)  # type: ignore[assignment]
    found: list[str | Attack] = []
    for position, chosen in enumerate(node.attacks):
        if isinstance(chosen, DictConfig):
            found.append(build(chosen, f"{prefix}attacks[{position}]", **_passes(node, chosen)))
        elif "_target_" in options.get(chosen, {}):
            own = node.attack_options[chosen]
            found.append(build(own, f"{prefix}attack_options.{chosen}", **_passes(node, own)))
        elif chosen not in ATTACKS:
            raise unknown("attack", chosen, {*ATTACKS, *options}, f"{prefix}attacks")
        elif ATTACKS[chosen].by_distance:
            raise SettingError(f"{prefix}attacks: {chosen} trains; to evaluate, use knapsack")
        else:
            found.append(chosen)
    return found, {name: given for name, given in options.items() if "_target_" not in given}


def check_number_of_classes(network: nn.Module, shape: Sequence[int], classes: int) -> None:
    """Warn of a network that tells more classes apart than the data have, which may number them in another way.

    Args:
        network: Takes images in [0, 1], gives logits (N, K).
        shape: (C, H, W) of the images.
        classes: Of the data.

    Raises:
        SettingError: The network can't take such images, or gives no logits.
    """
    like = next((p for p in network.parameters() if p.is_floating_point()), torch.zeros(0))
    found = classes_of(network, like.new_zeros((1, *shape)))
    if found > classes:
        warnings.warn(
            f"the network has {found} classes and data.num_classes={classes}: the first {classes} must be the data's",
            stacklevel=2,
        )


def _passes(node: Any, attack: Any) -> dict[str, Any]:
    return {} if "batch_size" in attack else {"batch_size": node.batch_size}


def _check(node: Any, setting: str, positional: bool, given: set[str]) -> None:
    """Refuse a class that can't be found and arguments that it doesn't have, in this node and those within."""
    for key, value in node.items():
        if isinstance(value, DictConfig) and "_target_" in value:
            _check(value, f"{setting}.{key}", False, set())
    name = node.get("_target_")
    if not isinstance(name, str):
        raise SettingError(f"{setting} names no class: set {setting}._target_=package.module.Class")
    try:
        target = _locate(name)
    except Exception as error:  # whatever the module raises when it is imported
        reason = str(error.__cause__ or error).splitlines()[0]
        raise SettingError(f"{setting}._target_={name} can't be imported ({reason})") from error
    if not callable(target):
        raise SettingError(f"{setting}._target_={name} is a {type(target).__name__}: name a class, {name}.Class")
    try:
        parameters = inspect.signature(target).parameters.values()
    except (TypeError, ValueError):  # made in C
        return
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return
    known = {p.name for p in parameters if p.kind is not p.VAR_POSITIONAL}
    others = [key for key in map(str, node) if not key.startswith("_") and key not in known]
    if others:
        wrong = unknown(f"argument of {name.rpartition('.')[2]}", others[0], known, f"{setting}.{others[0]}")
        raise SettingError(
            f"{wrong}; leave out what it doesn't have: {' '.join(f'~{setting}.{key}' for key in others)}"
        )
    required = [
        p.name for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    missing = [name for name in required if name not in node and name not in given]
    if missing and not positional and not node.get("_partial_"):
        raise SettingError(f"{setting}.{missing[0]} must be set: {name} needs it")


def _attack_key(error: InstantiationException, setting: str) -> str:
    """The key of the node that failed, as Hydra reports it, if it is one within `setting`."""
    found = re.search(r"full_key: (\S+)", str(error))
    within = found[1].rpartition(f"{setting}.")[2] if found and f"{setting}." in f"{found[1]}." else ""
    return f"{setting}.{within}" if within and within != setting else setting


def _unusable(node: Any, setting: str, error: BaseException) -> SettingError:
    kind = str(node["_target_"]).rpartition(".")[2]
    return SettingError(
        f"{setting} doesn't fit {kind} ({str(error).splitlines()[0]}); look at the settings {setting}.*"
    )
