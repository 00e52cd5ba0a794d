"""Measuring robustness over a whole set of images, and showing it."""

from wdat.evaluation.evaluator import ImageTensors, evaluate
from wdat.evaluation.results import Results

__all__ = ["ImageTensors", "Results", "evaluate"]
