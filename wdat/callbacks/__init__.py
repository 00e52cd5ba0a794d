"""Callbacks: robust evaluation during training, what the attack does in a step, and what a step costs."""

from wdat.callbacks.attack_log import AttackLog
from wdat.callbacks.cost import StepCost
from wdat.callbacks.progress import WorkProgress
from wdat.callbacks.robust_evaluation import RobustEvaluation

__all__ = ["AttackLog", "RobustEvaluation", "StepCost", "WorkProgress"]
