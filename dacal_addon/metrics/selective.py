"""What is left, and how right it is, where a network may say nothing below a confidence."""

from typing import NamedTuple, Sequence

import numpy as np
import torch
from torch import Tensor

from .._check import check_number, problem
from .binned import Cells

# A mean of equal confidences may be this far below them.
_ROUNDING = 1e-12


class ThresholdTable(NamedTuple):
    """One row a threshold, each (T,) float64."""

    threshold: Tensor
    """Of confidence, as given."""
    share: Tensor
    """Of the valid pixels, those with a confidence of at least that. In 0..1, NaN without a pixel."""
    accuracy: Tensor
    """Of these pixels, the share that is right; NaN where there is none."""


def selective(cells: Cells, thresholds: Sequence[float]) -> ThresholdTable:
    """Coverage and accuracy above each threshold. The pixels of a cell are in where their mean confidence is.

    Raises:
        ValueError: no threshold, or one outside 0..1.

    Example:
        >>> cells = Cells(np.array([2.0, 2.0]), np.array([1.0, 2.0]), np.array([1.2, 1.8]))  # confidences 0.6 and 0.9
        >>> table = selective(cells, [0.5, 0.9, 0.95])
        >>> table.share.tolist(), table.accuracy.tolist()
        ([1.0, 0.5, 0.0], [0.75, 1.0, nan])

    Source: Geifman & El-Yaniv, Selective Classification for Deep Neural Networks (NIPS 2017): coverage and selective risk.
    """
    levels = [float(level) for level in thresholds]
    if not levels:
        raise problem("selective", expected="thresholds: at least one", got="none", remedy="pass for example [0.5, 0.9, 0.99]")
    for level in levels:
        check_number("selective", "thresholds", level, low=0.0, high=1.0, rule="in 0..1")
    filled = cells.pixels > 0
    pixels, correct, confidence = (column[filled] for column in cells)
    # From the top, so that the sums are over whole numbers from the first cell that is in.
    seen, right = (np.concatenate([np.cumsum(column[::-1])[::-1], [0.0]]) for column in (pixels, correct))
    first = np.searchsorted(confidence / pixels, np.array(levels) - _ROUNDING)
    above = np.where(seen[first] > 0, seen[first], np.nan)
    share = seen[first] / (seen[0] if seen[0] else np.nan)
    return ThresholdTable(*(torch.from_numpy(np.array(column)) for column in (levels, share, right[first] / above)))
