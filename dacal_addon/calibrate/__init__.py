"""Calibrate a checkpoint that exists: find one temperature for the target, and fold it into the last layer.

`estimate` asks several `estimators` (those on shadows are in `shadow_regression`, TransCal in `transcal`, what they share in
`contract`) and takes one answer, with the reason; `fold` writes it into the weights; `report` tells it, `command` is `dacal
calibrate`. Below them: `scaling` fits one temperature, `curves` does so for images that are drawn anew, `material` holds
images (`pictures`) and what the network says at some of their pixels (`pixels`), `evaluating` asks it, `classifiers` finds its
last layer.
"""

from .classifiers import classifiers
from .contract import Estimate, Estimator
from .estimate import TemperatureEstimate, estimate_temperature
from .estimators import ESTIMATORS
from .fold import TemperatureScaled, fold_checkpoint, fold_temperature, folded_temperature
from .material import Material
from .pictures import Pictures
from .scaling import fitted_temperature, matched_temperature

__all__ = [
    "ESTIMATORS",
    "Estimate",
    "Estimator",
    "Material",
    "Pictures",
    "TemperatureEstimate",
    "TemperatureScaled",
    "classifiers",
    "estimate_temperature",
    "fitted_temperature",
    "fold_checkpoint",
    "fold_temperature",
    "folded_temperature",
    "matched_temperature",
]
