"""Callbacks: evaluation and checkpoints during training, averaging, stops, and what a step does and costs."""

from wdat.training.callbacks.attack_log import AttackLog
from wdat.training.callbacks.averaging import ExponentialAveraging
from wdat.training.callbacks.best_checkpoint import BestCheckpoint
from wdat.training.callbacks.cost import StepCost
from wdat.training.callbacks.last_checkpoint import LastCheckpoint
from wdat.training.callbacks.progress import WorkProgress
from wdat.training.callbacks.robust_evaluation import RobustEvaluation
from wdat.training.callbacks.stopping import GracefulStop

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
