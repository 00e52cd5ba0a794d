"""AutoAttack (Croce & Hein 2020, arXiv 2003.01690) through `pyautoattack`: the usual pointwise evaluation."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from wdat.attacks.base import Attack, Context, Moved
from wdat.attacks.fab import NORM_NAMES, as_found, plain
from wdat.errors import SettingError, unknown
from wdat.gradients import device_of, forward
from wdat.losses import correct
from wdat.threat import ThreatModel, contract, per_image

VERSIONS = {
    "standard": ("apgd-ce", "apgd-t", "fab-t", "square"),
    "plus": ("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"),
    "rand": ("apgd-ce", "apgd-dlr"),
}
FEWEST_CLASSES = {"apgd-ce": 2, "apgd-dlr": 3, "fab": 2, "square": 2, "apgd-t": 4, "fab-t": 2}
_VERSION = "attack_options.autoattack.version"
_ATTACKS = "attack_options.autoattack.attacks_to_run"


class _Log:
    """Stands for `pyautoattack`'s logger: drops its progress, keeps its warnings about the network."""

    def __init__(self) -> None:
        self.found: dict[str, str] = {}

    def debug(self, message: str) -> None:
        pass

    info = debug

    def warning(self, message: str) -> None:
        text = re.sub(r"\s*See flags_doc.md for details\.|!$", "", str(message)).strip()
        self.found.setdefault(re.sub(r"[\d.]+", "#", text), text)


@dataclass
class AutoAttack(Attack):
    """The ensemble of parameter-free attacks; each sub-attack gets the images that the earlier ones couldn't break.

    An image that stays correct is returned as it was. Its random numbers belong to batches, so `batch_size` and the
    number of processes may decide about single images.

    Attributes:
        version: `standard` (APGD-CE, targeted APGD and FAB, Square), `plus` (all six, with restarts), `rand` (for
            randomised networks) or `custom`.
        attacks_to_run: Of `custom`: names of sub-attacks, with the settings of `standard`.
        seed: Of every random start.
    """

    name: ClassVar[str] = "autoattack"
    pointwise: ClassVar[bool] = True
    version: str = field(default="standard", kw_only=True)
    attacks_to_run: tuple[str, ...] | None = field(default=None, kw_only=True)
    seed: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.version not in (*VERSIONS, "custom"):
            raise unknown("version of AutoAttack", self.version, (*VERSIONS, "custom"), _VERSION)
        given = self.attacks_to_run
        self.attacks_to_run = (given,) if isinstance(given, str) else given and tuple(given)
        if bool(self.attacks_to_run) != (self.version == "custom"):
            raise SettingError(
                f"{_ATTACKS}={given} goes with {_VERSION}=custom and with no other version: set both or neither"
            )
        for name in self.attacks_to_run or ():
            if name not in FEWEST_CLASSES:
                raise unknown("attack of AutoAttack", name, FEWEST_CLASSES, f"{_ATTACKS}, {_VERSION}=custom")

    @property
    def sub_attacks(self) -> tuple[str, ...]:
        """Names of the sub-attacks, in their order."""
        return self.attacks_to_run or VERSIONS[self.version]

    def check(self, shape: Sequence[int], classes: int, threat: ThreatModel) -> None:
        super().check(shape, classes, threat)
        if threat.delta > 0:
            self._refuse(shape, classes, threat.norm)

    def _run(self, network: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, context: Context) -> Moved:
        radii = torch.full((len(x),), threat.delta, dtype=x.dtype, device=x.device)
        if threat.delta == 0:
            return Moved(x, radii, threat.delta)
        self._refuse(x.shape[1:], forward(network, x[:1]).shape[1], threat.norm)
        if not len(x):
            return Moved(x, radii, threat.delta)
        log = _Log()
        with as_found(device_of(network, x)):
            x_adv = self._ensemble(network, x, y, threat, log, context)
        for message in log.found.values():
            warnings.warn(f"{self.name}: {message}", stacklevel=4)
        return Moved(x_adv, radii, threat.delta)

    def _refuse(self, shape: Sequence[int], classes: int, norm: str) -> None:
        """Refuse what a sub-attack can't handle."""
        for name in self.sub_attacks:
            if classes < FEWEST_CLASSES[name]:
                able = ",".join(n for n in ("apgd-ce", "apgd-dlr", "fab-t", "square") if classes >= FEWEST_CLASSES[n])
                raise SettingError(
                    f"{name} of {_VERSION}={self.version} needs {FEWEST_CLASSES[name]} classes, not {classes}; "
                    f"set {_VERSION}=custom and {_ATTACKS}=[{able}]"
                )
        square = len(shape) == 3 and (norm != "l2" or (shape[1] == shape[2] and shape[1] >= 5))
        if "square" in self.sub_attacks and not square:
            raise SettingError(
                f"square of {_VERSION}={self.version} needs images (N, C, H, W), for l2 square ones of 5 × 5 pixels or "
                f"more, not of {'×'.join(map(str, shape))}; set {_VERSION}=custom and {_ATTACKS}=[apgd-ce,apgd-t,fab-t]"
            )

    def _ensemble(
        self, network: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, log: _Log, context: Context
    ) -> Tensor:
        """Each sub-attack on the images that are left, packed into full batches; seeded anew in every batch."""
        device = device_of(network, x)
        ensemble = _build(plain(network, x.dtype), self.version, threat, self.seed, device, log)
        classes = forward(network, x[:1]).shape[1]
        ensemble.fab.n_target_classes = ensemble.apgd_targeted.n_target_classes = min(9, classes - 1)
        robust = correct(forward(network, x, self.batch_size), y)
        x_adv, whole = x.clone(), len(self.sub_attacks) * len(x)
        for number, name in enumerate(self.sub_attacks):
            left = robust.nonzero().squeeze(1)
            ensemble.attacks_to_run = [name]
            ensemble.fab.n_restarts = 5 if self.version == "plus" else 1  # fab-t takes it to 1 for good
            for start in range(0, len(left), self.batch_size):
                rows = left[start : start + self.batch_size]
                images = x[rows].to(device, torch.float32).contiguous()
                found, _ = ensemble.run_standard_evaluation(images, y[rows].to(device), batch_size=self.batch_size)
                found = _inside(x[rows], found.to(x), threat)
                broken = ~correct(forward(network, found, self.batch_size), y[rows])
                x_adv[rows[broken]], robust[rows[broken]] = found[broken], False
                if context.progress:
                    done = len(x) - len(left) + start + len(rows)
                    context.progress(number * len(x) + done, whole)
        if context.progress:
            context.progress(whole, whole)
        return x_adv


def _build(predict: Any, version: str, threat: ThreatModel, seed: int, device: torch.device, log: _Log) -> Any:
    """`pyautoattack`'s object, silent."""
    import pyautoattack

    options: dict[str, Any] = {"norm": NORM_NAMES[threat.norm], "eps": threat.delta, "seed": seed, "device": device}
    ensemble = pyautoattack.AutoAttack(predict, version="standard" if version == "custom" else version, **options)
    ensemble.verbose = False
    ensemble.logger = ensemble.apgd.logger = ensemble.apgd_targeted.logger = log
    return ensemble


def _inside(x: Tensor, found: Tensor, threat: ThreatModel) -> Tensor:
    """Points that rounding left outside the ball or [0, 1] brought in; those that aren't finite given up."""
    found = torch.where(per_image(found.flatten(1).isfinite().all(1), x).bool(), found, x).clamp(0, 1)
    distances = threat.distances(x, found)
    inside = contract(x, found, torch.full_like(distances, threat.delta), threat.norm)
    return torch.where(per_image(distances > threat.delta, x).bool(), inside, found)
