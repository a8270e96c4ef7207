"""What an estimator is: given `Material`, it says at which one temperature the network is calibrated on the target."""

import math
from typing import NamedTuple, Protocol

from .material import Material


class Estimate(NamedTuple):
    """One estimator's answer."""

    name: str
    temperature: float
    """NaN where it has none; the note says why."""
    spread: float = math.nan
    """Standard deviation of log T; NaN where it is not known."""
    accuracy: float = math.nan
    """The network's accuracy on the target as the estimator sees it, 0..1; NaN where it says none."""
    note: str = ""
    """What it rests on, in words."""
    covered: bool = True
    """Whether the target lies within what the estimator has seen examples of."""


class Estimator(Protocol):
    """A function of the material; what it draws comes from `material.generator_for(its name)`."""

    def __call__(self, material: Material) -> Estimate: ...
