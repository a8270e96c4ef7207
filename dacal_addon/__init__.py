"""Calibrated self-training for domain-adaptive semantic segmentation, after DA-Cal (arXiv 2602.20860).

The data flows one way, and so do the files:
teacher logits -> `temperature` -> `pseudo_labels` -> `mixing` -> `outer_sets`, `losses` -> `temperature_fit` or `bilevel` and
`engines` -> `metrics`.
"""

from .bilevel import BilevelCalibrationStep, CalibrationStepResult
from .engines import Hypergradient, hypergradient
from .losses import soft_cross_entropy
from .pseudo_labels import SoftPseudoLabeler, SoftPseudoLabels
from .temperature import MetaTemperatureNet
from .temperature_fit import TemperatureFit, TemperatureFitResult

__all__ = [
    "BilevelCalibrationStep",
    "CalibrationStepResult",
    "Hypergradient",
    "MetaTemperatureNet",
    "SoftPseudoLabeler",
    "SoftPseudoLabels",
    "TemperatureFit",
    "TemperatureFitResult",
    "hypergradient",
    "soft_cross_entropy",
]
__version__ = "0.1.0"
