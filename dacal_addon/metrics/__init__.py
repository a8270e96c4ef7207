"""Calibration metrics for dense predictions: exact, in constant memory, for any number of images.

The files, in the order of the data: `arrays` (what comes in) -> `pixels` (judged piece by piece) -> `grid` (the cells of
confidence) -> `totals` (what is counted) -> `binned`, `ordered`, `smooth` (the metrics, functions of counts) -> `stats` (the
class) -> `functional` (the class used once). `boundary` makes regions.
"""

from .binned import ReliabilityTable
from .boundary import boundary_mask
from .functional import (
    accuracy,
    aurc,
    brier_score,
    classwise_ece,
    ece,
    ks,
    mce,
    mean_confidence,
    miou,
    nll,
    reliability,
    smece,
)
from .stats import Bootstrap, CalibrationStats

__all__ = [
    "Bootstrap",
    "CalibrationStats",
    "ReliabilityTable",
    "accuracy",
    "aurc",
    "boundary_mask",
    "brier_score",
    "classwise_ece",
    "ece",
    "ks",
    "mce",
    "mean_confidence",
    "miou",
    "nll",
    "reliability",
    "smece",
]
