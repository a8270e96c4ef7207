"""Calibrated self-training for domain-adaptive semantic segmentation, after DA-Cal (arXiv 2602.20860).

The data flows one way, and so do the files:
teacher logits -> `temperature` -> `pseudo_labels` -> `mixing` -> `losses` -> `learners` and `engines` -> `metrics`;
`self_training` puts the pieces together for a training loop; `calibrate` is for a network that is trained already. Both judge
on source images that are `held_out`, in the target's look (`shadows`).
"""

from .engines import Hypergradient, hypergradient
from .learners import BilevelCalibrationStep, CalibrationStepResult, Skip, SkipKind, TemperatureFit
from .losses import mixed_views_loss, soft_cross_entropy
from .one_channel import two_channels
from .pseudo_labels import SoftPseudoLabeler, SoftPseudoLabels
from .self_training import DACal, MixedBatch
from .temperature import MetaTemperatureNet

__all__ = [
    "BilevelCalibrationStep",
    "CalibrationStepResult",
    "DACal",
    "Hypergradient",
    "MetaTemperatureNet",
    "MixedBatch",
    "Skip",
    "SkipKind",
    "SoftPseudoLabeler",
    "SoftPseudoLabels",
    "TemperatureFit",
    "hypergradient",
    "mixed_views_loss",
    "soft_cross_entropy",
    "two_channels",
]
__version__ = "0.2.0"
