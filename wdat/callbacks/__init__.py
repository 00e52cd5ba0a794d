"""Callbacks: evaluation and checkpoints during training, averaging, stops, and what a step does and costs."""

from wdat.callbacks.attack_log import AttackLog
from wdat.callbacks.averaging import ExponentialAveraging
from wdat.callbacks.best_checkpoint import BestCheckpoint
from wdat.callbacks.cost import StepCost
from wdat.callbacks.last_checkpoint import LastCheckpoint
from wdat.callbacks.progress import WorkProgress
from wdat.callbacks.robust_evaluation import RobustEvaluation
from wdat.callbacks.stopping import GracefulStop

__all__ = [
    "AttackLog",
    "BestCheckpoint",
    "ExponentialAveraging",
    "GracefulStop",
    "LastCheckpoint",
    "RobustEvaluation",
    "StepCost",
    "WorkProgress",
]
