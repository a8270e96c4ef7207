"""Calibration metrics for dense predictions: exact, in constant memory, for any number of images.

The files, in the order of the data: `arrays` (what comes in) -> `pixels` (judged piece by piece) -> `grid` (the cells of
confidence) -> `totals` (what is counted) -> `binned`, `ordered`, `smooth` (the metrics, functions of counts) -> `bootstrap`
(images drawn with replacement) -> `stats` (the class) -> `functional` (the class used once). `catalogue` lists the metrics, and
says how to add one. `boundary` makes regions.
"""

from . import functional
from .binned import ReliabilityTable
from .bootstrap import Bootstrap
from .boundary import boundary_mask
from .functional import *  # noqa: F403  # a metric more is one name more there
from .stats import CalibrationStats

__all__ = ["Bootstrap", "CalibrationStats", "ReliabilityTable", "boundary_mask"]
__all__ += functional.__all__
