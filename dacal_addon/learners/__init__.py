"""Whatever learns temperatures: one constructor, one call an iteration, one result, one state.

`learner` is the contract and what all share, `inputs` checks a batch and asks the teacher, `skips` says when a learner acts
and why it did not, `networks` reads what teacher and student return, `judged_sets` are the images that show how good
temperatures are (`shadow_set`: held-out ones); `temperature_fit` and `bilevel` are the learners.
"""

from typing import Dict, Optional, Type

from .bilevel import BilevelCalibrationStep
from .judged_sets import JUDGED_SETS, DomainBatch, JudgedBatch, JudgedSet
from .learner import CalibrationStepResult, Defaults, Iteration, Learned, Learner
from .shadow_set import ShadowSet
from .skips import Skip, SkipKind
from .temperature_fit import TemperatureFit

LEARNERS: Dict[str, Type[Learner]] = {"fit": TemperatureFit, "bilevel": BilevelCalibrationStep}
DEFAULT_LEARNER: Optional[str] = None
"""Of the front door: hard labels, and one temperature folded in afterwards, which no learner was better than in the cells of
`benchmarks/README.md`."""

__all__ = [
    "DEFAULT_LEARNER",
    "JUDGED_SETS",
    "LEARNERS",
    "BilevelCalibrationStep",
    "CalibrationStepResult",
    "Defaults",
    "DomainBatch",
    "Iteration",
    "JudgedBatch",
    "JudgedSet",
    "Learned",
    "Learner",
    "ShadowSet",
    "Skip",
    "SkipKind",
    "TemperatureFit",
]
