"""Wasserstein distributional adversarial training of image classifiers.

From Python, with any network that takes images in [0, 1] and gives logits:

    threat = wdat.ThreatModel(p=2, norm="linf", delta="8/255")
    result = wdat.attack(network, x, y, threat, "wpgd")
    records = wdat.evaluate(network, loader, threat, attacks=["pgd", "wpgd"])
    trainer = lightning.Trainer(callbacks=[wdat.RobustEvaluation(threat, ["pgd", "wpgd"])])
"""

from typing import Any

from wdat.attacks import AttackResult, attack
from wdat.errors import ConstraintError, SettingError
from wdat.evaluation import evaluate
from wdat.records import Record
from wdat.threat import ThreatModel

__version__ = "0.1.0"

__all__ = [
    "AttackResult", "ConstraintError", "Record", "RobustEvaluation", "SettingError", "ThreatModel", "attack",
    "evaluate",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """`RobustEvaluation`, imported where it is used, because Lightning takes seconds."""
    if name != "RobustEvaluation":
        raise AttributeError(f"module 'wdat' has no attribute {name!r}")
    from wdat.training.callbacks import RobustEvaluation

    return RobustEvaluation
