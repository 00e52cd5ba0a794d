"""Wasserstein distributional adversarial training of image classifiers.

From Python, with any network that takes images in [0, 1] and gives logits:

    threat = wdat.ThreatModel(p=2, norm="linf", delta="8/255")
    result = wdat.attack(network, x, y, threat, "wpgd")
    records = wdat.evaluate(network, loader, threat, attacks=["pgd", "wpgd"])
"""

from typing import TYPE_CHECKING, Any

from wdat.attacks import AttackResult, attack
from wdat.errors import ConstraintError, SettingError
from wdat.evaluation import evaluate
from wdat.records import Record
from wdat.threat import ThreatModel

if TYPE_CHECKING:
    from wdat.reporting.frame import load_records, to_frame

__version__ = "0.1.0"

__all__ = [
    "AttackResult",
    "ConstraintError",
    "Record",
    "SettingError",
    "ThreatModel",
    "attack",
    "evaluate",
    "load_records",
    "to_frame",
]


def __getattr__(name: str) -> Any:
    """`to_frame` and `load_records`, which import pandas only where they are used."""
    if name in ("load_records", "to_frame"):
        from wdat.reporting import frame

        return getattr(frame, name)
    raise AttributeError(f"module 'wdat' has no attribute '{name}'")
