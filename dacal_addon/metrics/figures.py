"""Every metric of all pixels, as a function of counts: of one set of pixels, or of many at once.

The arrays of `Counts` have the same leading dimensions, none for `CalibrationStats` and (replicates,) for its bootstrap, and so
has what the functions return. NaN where nothing counts. Definitions and sources are at the methods of `CalibrationStats`.
"""

from abc import ABC, abstractmethod
from functools import cached_property
from typing import Callable, Dict, NamedTuple

import numpy as np
from torch import Tensor

from .._check import check_choice
from . import ordered, smooth
from .binned import Cells, calibration_error, mass_bins, width_bins
from .grid import make_grid
from .settings import Settings
from .totals import Totals


class Overlap(NamedTuple):
    """Pixels of every class, (..., C) float64."""

    intersection: np.ndarray
    """Of this target and predicted so."""
    target: np.ndarray
    """Of this target."""
    predicted: np.ndarray
    """Predicted so."""


class Losses(NamedTuple):
    """Sums over the valid pixels, (...) float64."""

    nll: np.ndarray
    brier: np.ndarray


class Counts(ABC):
    """What the metrics are made of, each computed when a metric asks for it."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    @property
    @abstractmethod
    def cells(self) -> Cells:
        """Of confidence, (..., cells), without those that are empty everywhere where that is known."""

    @property
    @abstractmethod
    def bins(self) -> Cells:
        """Of equal width, (..., n_bins)."""

    @property
    @abstractmethod
    def overlap(self) -> Overlap:
        """By class."""

    @property
    @abstractmethod
    def losses(self) -> Losses:
        """Of all pixels."""


class CountsOfTotals(Counts):
    """Of all pixels together."""

    def __init__(self, totals: Totals, settings: Settings) -> None:
        super().__init__(settings)
        self._totals = totals

    @cached_property
    def cells(self) -> Cells:
        totals = self._totals
        return Cells(*(as_floats(x) for x in (totals.pixels, totals.correct, totals.confidence)))

    @cached_property
    def bins(self) -> Cells:
        settings = self.settings
        return width_bins(self.cells, make_grid(settings.n_bins, settings.fine_bins, both_ends=False).bin_of_cell)

    @cached_property
    def overlap(self) -> Overlap:
        confusion = as_floats(self._totals.confusion)
        return Overlap(confusion.diagonal(), confusion.sum(1), confusion.sum(0))

    @cached_property
    def losses(self) -> Losses:
        return Losses(as_floats(self._totals.nll), as_floats(self._totals.brier))


def accuracy(counts: Counts) -> np.ndarray:
    """Share of the pixels that are right."""
    return _ratio(counts.bins.correct.sum(-1), counts.bins.pixels.sum(-1))


def mean_confidence(counts: Counts) -> np.ndarray:
    """Mean of the largest probability."""
    return _ratio(counts.bins.confidence.sum(-1), counts.bins.pixels.sum(-1))


def ece(counts: Counts, *, norm: str = "l1", binning: str = "width", debias: bool = False) -> np.ndarray:
    """Expected calibration error."""
    check_choice("ece", "binning", binning, ("width", "mass"))
    bins = counts.bins if binning == "width" else mass_bins(counts.cells, counts.settings.n_bins)
    return calibration_error(bins, norm=norm, debias=debias)


def mce(counts: Counts, *, binning: str = "width") -> np.ndarray:
    """Maximum calibration error."""
    return ece(counts, norm="max", binning=binning)


def ks(counts: Counts) -> np.ndarray:
    """Kolmogorov-Smirnov calibration error."""
    return ordered.ks(counts.cells)


def smece(counts: Counts) -> np.ndarray:
    """Smooth calibration error, one set of pixels after the other."""
    columns = np.broadcast_arrays(*counts.cells)
    rows = zip(*(column.reshape(-1, column.shape[-1]) for column in columns))
    return np.array([smooth.smece(Cells(*row)) for row in rows]).reshape(columns[0].shape[:-1])


def aurc(counts: Counts) -> np.ndarray:
    """Area under the risk-coverage curve."""
    return ordered.aurc(counts.cells)


def brier(counts: Counts) -> np.ndarray:
    """Brier score."""
    return _ratio(counts.losses.brier, counts.bins.pixels.sum(-1))


def nll(counts: Counts) -> np.ndarray:
    """Negative log-likelihood."""
    return _ratio(counts.losses.nll, counts.bins.pixels.sum(-1))


def iou(counts: Counts) -> np.ndarray:
    """Intersection over union, (..., C); NaN for a class in neither and for an ignored one."""
    union = counts.overlap.target + counts.overlap.predicted - counts.overlap.intersection
    values = _ratio(counts.overlap.intersection, union)
    values[..., list(counts.settings.ignored_classes)] = np.nan
    return values


def miou(counts: Counts) -> np.ndarray:
    """Mean of `iou` over the classes that have one."""
    values = iou(counts)
    known = ~np.isnan(values)
    return _ratio(np.where(known, values, 0.0).sum(-1), known.sum(-1))


# Class-wise errors need counts that images do not keep.
FIGURES: Dict[str, Callable[..., np.ndarray]] = {
    one.__name__: one for one in (accuracy, mean_confidence, ece, mce, ks, smece, aurc, brier, nll, miou)
}
"""By the catalogue's key."""


def as_floats(counts: Tensor) -> np.ndarray:
    """The counts as float64, on the CPU; exact below 2^53."""
    return counts.detach().cpu().double().numpy()


def _ratio(total: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """`total` / `pixels`, NaN where there is none."""
    return np.asarray(total) / np.where(np.asarray(pixels) > 0, pixels, np.nan)
