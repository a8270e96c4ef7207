"""Calibration metrics for dense predictions: exact, in constant memory, for any number of images.

The files, in the order of the data: `settings` (what was declared) and `arrays` (what comes in) -> `batches` (checked) ->
`pieces` -> `pixels` (judged piece by piece, as `backends` says; `fused`, the same in one sweep; `faults`, what was wrong) ->
`grid` (the cells of confidence) -> `totals` and `images` (what is counted, of all and of each) -> `counting` (the state of
the class; `saved`, read back) -> `binned`, `ordered`, `smooth`, `selective` (functions of cells and bins) -> `figures` (the
metrics, functions of counts) -> `bootstrap` (of images drawn with replacement) -> `stats` (the class) -> `functional` (the
class used once). `catalogue` lists the metrics, and says how to add one. `remarks` says what to know beside them. `boundary`
makes regions.
"""

from . import functional
from .binned import ReliabilityTable
from .bootstrap import Bootstrap
from .boundary import boundary_mask
from .functional import *  # noqa: F403  # a metric more is one name more there
from .selective import ThresholdTable
from .stats import CalibrationStats

__all__ = ["Bootstrap", "CalibrationStats", "ReliabilityTable", "ThresholdTable", "boundary_mask"]
__all__ += functional.__all__
