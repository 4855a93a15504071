"""The protocols by which patching methods are compared, and what their figures over tasks and seeds say."""

from .measuring import Measurement
from .pictures import draw_accuracy_matrix
from .running import ProtocolResult, joint, parallel, sequential, single_task
from .scores import AccuracyMatrix, distance_to_optimal, harmonic_mean, mean
from .seeds import SeedComparison, Spread, compare_over_seeds
from .splits import joint_task, test_selected
from .steps import Step
from .subsets import few_shot, subsample
from .supporting import Supporting

__all__ = [
    "AccuracyMatrix",
    "Measurement",
    "ProtocolResult",
    "SeedComparison",
    "Spread",
    "Step",
    "Supporting",
    "compare_over_seeds",
    "distance_to_optimal",
    "draw_accuracy_matrix",
    "few_shot",
    "harmonic_mean",
    "joint",
    "joint_task",
    "mean",
    "parallel",
    "sequential",
    "single_task",
    "subsample",
    "test_selected",
]
