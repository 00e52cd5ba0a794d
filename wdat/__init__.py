"""Wasserstein distributional adversarial training of image classifiers.

From Python, with any network that takes images in [0, 1] and gives logits:

    threat = wdat.ThreatModel(p=2, norm="linf", delta="8/255")
    result = wdat.attack(network, x, y, threat, "wpgd")
    records = wdat.evaluate(network, loader, threat, attacks=["pgd", "wpgd"])  # a list that prints as a table
    distances = wdat.nearest_adversarial(network, x, y, norm="linf").distances
    trainer = lightning.Trainer(callbacks=[wdat.RobustEvaluation(threat, ["pgd", "wpgd"])])
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wdat.attacks import AttackResult, attack
    from wdat.attacks.minimum_norm import NearestAdversarial
    from wdat.attacks.nearest import nearest_adversarial
    from wdat.errors import ConstraintError, SettingError
    from wdat.evaluation import Results, evaluate
    from wdat.records import Record
    from wdat.reporting.frame import load_records, to_frame
    from wdat.threat import ThreatModel
    from wdat.training.callbacks import RobustEvaluation

__version__ = "0.1.0"  # which pyproject.toml reads

__all__ = [
    "AttackResult", "ConstraintError", "NearestAdversarial", "Record", "Results", "RobustEvaluation", "SettingError",
    "ThreatModel", "attack", "evaluate", "load_records", "nearest_adversarial", "to_frame",
]  # fmt: skip

_HOMES = {
    "AttackResult": "attacks", "attack": "attacks", "ConstraintError": "errors", "SettingError": "errors",
    "NearestAdversarial": "attacks.minimum_norm", "nearest_adversarial": "attacks.nearest",
    "evaluate": "evaluation", "Results": "evaluation", "Record": "records",
    "RobustEvaluation": "training.callbacks", "ThreatModel": "threat",
    "load_records": "reporting.frame", "to_frame": "reporting.frame",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """A public name, imported where it is first used, so that the command line answers at once."""
    if name not in _HOMES:
        raise AttributeError(f"module 'wdat' has no attribute {name!r}")
    return getattr(import_module(f"wdat.{_HOMES[name]}"), name)
