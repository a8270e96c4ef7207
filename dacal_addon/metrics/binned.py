"""Calibration errors over bins of confidence."""

import math
from typing import NamedTuple, Tuple

import numpy as np
import torch
from torch import Tensor

from .._check import check_choice, problem

NORMS = ("l1", "l2", "max")


class Cells(NamedTuple):
    """Pixels by their confidence (or the probability of one class), in its order: one entry a cell, or a bin.

    All float64 of one shape (..., cells): leading dimensions are sets of pixels of their own, such as the bootstrap's draws.
    """

    pixels: np.ndarray
    """How many."""
    correct: np.ndarray
    """How many of them are right (or are of that class)."""
    confidence: np.ndarray
    """The sum of their confidences."""


class ReliabilityTable(NamedTuple):
    """The reliability diagram as numbers, one row a bin of confidence (lower, upper]; the first bin is closed at 0."""

    lower: Tensor
    """(n_bins,) float64."""
    upper: Tensor
    """(n_bins,) float64."""
    pixels: Tensor
    """(n_bins,) int64: pixels in the bin; float64 for bins of equal mass, which share the pixels of a confidence."""
    confidence: Tensor
    """(n_bins,) float64: their mean confidence, NaN for an empty bin."""
    accuracy: Tensor
    """(n_bins,) float64: the share that is right, NaN for an empty bin."""


def width_bins(cells: Cells, bin_of_cell: np.ndarray) -> Cells:
    """Sum the cells of every bin of equal width: exact, since no cell crosses an edge.

    Args:
        cells: (..., K).
        bin_of_cell: (K,) integers, 0 first, and then each the one before or the next.

    Returns:
        (..., n_bins).

    Example:
        >>> cells = Cells(np.array([2.0, 0.0, 4.0]), np.array([1.0, 0.0, 3.0]), np.array([0.2, 0.0, 3.2]))
        >>> width_bins(cells, np.array([0, 1, 1])).pixels
        array([2., 4.])
    """
    first = np.flatnonzero(np.diff(bin_of_cell, prepend=-1))
    return Cells(*(np.add.reduceat(column, first, axis=-1) for column in cells))


def mass_bins(cells: Cells, n_bins: int) -> Cells:
    """Bins that hold the same number of pixels. A cell that crosses an edge is split in proportion, so no order is made up.

    Args:
        cells: (..., K).

    Returns:
        (..., n_bins).

    Example:
        >>> cells = Cells(np.array([2.0, 0.0, 4.0]), np.array([1.0, 0.0, 3.0]), np.array([0.2, 0.0, 3.2]))
        >>> mass_bins(cells, 2).correct  # three pixels each: the cell of four gives one of them to the first bin
        array([1.75, 2.25])

    Source: Nixon et al., Measuring Calibration in Deep Learning (CVPR workshops 2019), adaptive calibration error.
    """
    leading = cells.pixels.shape[:-1]
    rows = zip(*(column.reshape(-1, column.shape[-1]) for column in cells))
    split = [_mass_bins(Cells(*row), n_bins) for row in rows]
    return Cells(*(np.array(column).reshape(*leading, n_bins) for column in zip(*split)))


def _mass_bins(cells: Cells, n_bins: int) -> Cells:
    below = np.concatenate([[0.0], np.cumsum(cells.pixels)])
    at = below[-1] * np.arange(n_bins + 1) / n_bins
    sums = (np.concatenate([[0.0], np.cumsum(column)]) for column in cells)
    return Cells(*(np.diff(np.interp(at, below, column)) for column in sums))


def calibration_error(bins: Cells, *, norm: str = "l1", debias: bool = False) -> np.ndarray:
    """Distance of accuracy and confidence over the bins: mean ("l1"), root mean square ("l2") or largest ("max"); NaN if empty.

    Args:
        bins: (..., n_bins).

    Returns:
        (...) float64, in 0..1.

    Example:
        >>> bins = Cells(np.array([2.0, 4.0]), np.array([1.0, 3.0]), np.array([0.2, 3.2]))  # gaps 0.4 and 0.05
        >>> [round(float(calibration_error(bins, norm=norm)), 6) for norm in ("l1", "l2", "max")]
        [0.166667, 0.234521, 0.4]

    Sources: "l1" Naeini et al. (AAAI 2015), Guo et al. (ICML 2017, eq. 3); "max" the same (eq. 5); "l2" and its debiased
    form Kumar et al., Verified Uncertainty Calibration (NeurIPS 2019, section 4): the variance of each bin's accuracy,
    estimated from the bin, is subtracted from its squared gap; a bin of one pixel adds nothing, a negative sum counts as 0.
    """
    check_choice("calibration_error", "norm", norm, NORMS)
    if debias and norm != "l2":
        remedy = "pass norm='l2', or debias=False"
        raise problem("calibration_error", expected="norm='l2' with debias=True", got=f"norm={norm!r}", remedy=remedy)
    filled = bins.pixels > 0
    pixels = np.where(filled, bins.pixels, 1.0)
    gap = np.where(filled, bins.correct - bins.confidence, 0.0) / pixels
    total = bins.pixels.sum(-1, keepdims=True)
    # Without a pixel everything is NaN.
    weight = bins.pixels / np.where(total > 0, total, np.nan)
    if norm == "max":
        return np.asarray(np.abs(gap + 0 * weight).max(-1))
    if norm == "l1":
        return np.asarray((weight * np.abs(gap)).sum(-1))
    square = gap**2
    if debias:
        accuracy, more = bins.correct / pixels, bins.pixels > 1
        square = np.where(more, square - accuracy * (1 - accuracy) / np.where(more, pixels - 1, 1), 0.0)
    return np.asarray(np.sqrt(np.maximum(0.0, (weight * square).sum(-1))))


def tabulate(bins: Cells, edges: np.ndarray, *, whole: bool) -> ReliabilityTable:
    """The bins as a table. `whole`: the counts are integers."""
    filled = np.where(bins.pixels > 0, bins.pixels, np.nan)
    pixels = np.rint(bins.pixels).astype(np.int64) if whole else bins.pixels
    columns = (edges[:-1], edges[1:], pixels, bins.confidence / filled, bins.correct / filled)
    return ReliabilityTable(*(torch.from_numpy(np.ascontiguousarray(column)) for column in columns))


def class_gap(table: ReliabilityTable) -> float:
    """The mean gap of the bins of one class, each with the weight of its pixels of the class; NaN where there are none.

    sum(w |share - probability|) / sum(w) over the bins, w = pixels x max(share, probability): the bin's pixels of the class
    by label, or as many as its probabilities sum to, whichever are more. In 0..1. Class-wise ECE has w = pixels, and so is
    small for every rare class: most pixels neither are of it nor could be.

    Example:
        >>> edges = torch.tensor([0.0, 0.5, 1.0]).double()
        >>> pixels, probability, share = torch.tensor([[99.0, 1.0], [0.0, 0.75], [0.0, 0.25]]).double()
        >>> table = ReliabilityTable(edges[:-1], edges[1:], pixels.long(), probability, share)
        >>> class_gap(table), table_ece(table)
        (0.5, 0.005)
    """
    pixels, probability, share = filled_columns(table)
    weight = pixels * np.maximum(share, probability)
    return float((weight * np.abs(share - probability)).sum() / weight.sum()) if weight.sum() else math.nan


def table_ece(table: ReliabilityTable) -> float:
    """The l1 calibration error of a table's bins, NaN if they are empty.

    Example:
        >>> edges = torch.tensor([0.0, 0.5, 1.0]).double()
        >>> pixels, confidence, accuracy = torch.tensor([[1.0, 3.0], [0.5, 0.75], [0.5, 0.25]]).double()
        >>> table_ece(ReliabilityTable(edges[:-1], edges[1:], pixels.long(), confidence, accuracy))  # 3/4 x 0.5
        0.375
    """
    pixels, confidence, accuracy = filled_columns(table)
    return float(calibration_error(Cells(pixels, pixels * accuracy, pixels * confidence)))


def filled_columns(table: ReliabilityTable) -> Tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pixels, mean confidence and accuracy, 0 where a bin is empty."""
    pixels = table.pixels.double()
    confidence, accuracy = (column.masked_fill(pixels == 0, 0.0).numpy() for column in (table.confidence, table.accuracy))
    return pixels.numpy(), confidence, accuracy
