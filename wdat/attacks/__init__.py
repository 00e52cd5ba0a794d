"""Attacks under a Wasserstein budget, one file per idea.

`attack` is for users with a network of their own; `build` makes an attack of the package by its name.
Configurations name a class.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

from torch import Tensor, nn

from wdat.attacks.allocation import allocate, capped_radii, granted_share, sensitivity_radii
from wdat.attacks.autoattack import AutoAttack
from wdat.attacks.base import Attack, AttackResult, Context
from wdat.attacks.budget import FGSM, PGD, WFGSM, WPGDBudget
from wdat.attacks.knapsack import Knapsack
from wdat.attacks.knapsack_budget import Critical, CriticalDraw, KnapsackBudget
from wdat.attacks.udr import UDR
from wdat.attacks.wpgd import WPGD
from wdat.attacks.wrm import WRM
from wdat.errors import SettingError, unknown
from wdat.inputs import as_images, as_labels, as_network
from wdat.threat import ThreatModel

ATTACKS: dict[str, type[Attack]] = {
    a.name: a
    for a in (
        FGSM,
        PGD,
        WFGSM,
        WPGD,
        WPGDBudget,
        Knapsack,
        AutoAttack,
        KnapsackBudget,
        Critical,
        CriticalDraw,
        WRM,
        UDR,
    )
}

__all__ = [
    "ATTACKS",
    "FGSM",
    "PGD",
    "UDR",
    "WFGSM",
    "WPGD",
    "WRM",
    "Attack",
    "AttackResult",
    "AutoAttack",
    "Context",
    "Critical",
    "CriticalDraw",
    "Knapsack",
    "KnapsackBudget",
    "WPGDBudget",
    "allocate",
    "attack",
    "build",
    "capped_radii",
    "granted_share",
    "sensitivity_radii",
]


def build(name: str, **options: Any) -> Attack:
    """An attack by name, with options that override its defaults (those of evaluation).

    Raises:
        SettingError: If the name or an option is unknown, or an option can't be used.
    """
    if name not in ATTACKS:
        raise unknown("attack", name, ATTACKS, "attack.name")
    known = {f.name for f in fields(ATTACKS[name]) if f.init}
    for option in options:
        if option not in known:
            raise unknown(f"option of {name}", option, known, f"attack.{option}")
    try:
        return ATTACKS[name](**options)
    except TypeError as error:
        given = ", ".join(f"attack.{option}={value!r}" for option, value in options.items())
        raise SettingError(f"{name} with {given} has a value of the wrong type ({error})") from error


def attack(
    network: nn.Module | Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    name: str = "wpgd",
    **options: Any,
) -> AttackResult:
    """Attack images that share one Wasserstein budget.

    Args:
        network: Any module or function that takes images in [0, 1] and gives logits (N, K); left as it was found.
        x: Images (N, C, H, W), float, in [0, 1]; a tensor, or an array of NumPy.
        y: Labels (N,), whole numbers.
        threat: Order, norm and budget.
        name: One of `ATTACKS`.
        options: The attack's settings, such as `loss="redlr"`, `steps=100`, `batch_size=256`.

    Returns:
        The verified perturbation, its distances, and the accuracy that is left.

    Raises:
        SettingError: If a setting or an input can't be used; the message says which and what to do.

    Example:
        >>> import torch
        >>> network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
        >>> x, y = torch.rand(8, 3, 2, 2), torch.arange(8) % 3
        >>> result = attack(network, x, y, ThreatModel(p=2, norm="linf", delta="8/255"), "wpgd", steps=10)
        >>> result.distance <= 8 / 255 + 1e-6
        True
    """
    if not isinstance(threat, ThreatModel):
        raise SettingError(f"threat={threat!r} is no threat: give wdat.ThreatModel(p=2, norm='linf', delta='8/255')")
    chosen, network = build(name, **options), as_network(network)
    images = as_images(x, network)
    return chosen(network, images, as_labels(y).to(images.device), threat)
