"""Calibrate a checkpoint that exists: find one temperature for the target, and fold it into the last layer.

`estimate` asks several `estimators` (the one on shadows is in `shadow_regression`, what they share in `contract`) and takes one
answer, with the reason; `fold` writes it into the weights. Below them: `shadows` are source images in the target's look,
`scaling` fits one temperature, `curves` does so for images that are drawn anew, `material` holds images (`pictures`) and what
the network says at some of their pixels (`pixels`), `evaluating` asks it, `classifiers` finds its last layer.
"""

from ..shadows import LOOKS, Look, blurred, colour_statistics, low_frequencies, shadows
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
    "LOOKS",
    "Estimate",
    "Estimator",
    "Look",
    "Material",
    "Pictures",
    "TemperatureEstimate",
    "TemperatureScaled",
    "blurred",
    "classifiers",
    "colour_statistics",
    "estimate_temperature",
    "fitted_temperature",
    "fold_checkpoint",
    "fold_temperature",
    "folded_temperature",
    "low_frequencies",
    "matched_temperature",
    "shadows",
]
