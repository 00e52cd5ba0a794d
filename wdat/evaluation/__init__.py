"""Measuring robustness over a whole set of images, and showing it."""

from wdat.evaluation.evaluator import ImageTensors, evaluate

__all__ = ["ImageTensors", "evaluate"]
