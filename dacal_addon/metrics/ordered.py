"""Metrics that look at the pixels in the order of their confidence, without bins.

Of cells (..., K); leading dimensions are sets of pixels of their own, and those of the result.
"""

import numpy as np
from scipy.special import digamma

from .binned import Cells


def ks(cells: Cells) -> np.ndarray:
    """Kolmogorov-Smirnov calibration error: the largest gap of the cumulative confidence and accuracy. In 0..1, NaN if empty.

    Example:
        >>> cells = Cells(np.array([2.0, 2.0]), np.array([2.0, 0.0]), np.array([1.2, 1.8]))
        >>> round(float(ks(cells)), 6)  # after the first cell (1.2 - 2) / 4, after both (3 - 2) / 4
        0.25

    Source: Gupta et al., Calibration of Neural Networks using Splines (ICLR 2021, eq. 5), top class.
    """
    gap = np.cumsum(cells.confidence - cells.correct, axis=-1)
    return np.asarray(np.abs(gap, out=gap).max(-1) / _or_nan(cells.pixels.sum(-1)))


def aurc(cells: Cells) -> np.ndarray:
    """Area under the risk-coverage curve: the error rate among the k most confident pixels, averaged over k. In 0..1.

    Pixels of one cell are taken in random order, and the mean over all orders is returned, in closed form.

    Example:
        >>> cells = Cells(np.array([1.0, 2.0]), np.array([0.0, 2.0]), np.array([0.6, 1.8]))
        >>> round(float(aurc(cells)), 6)  # two right ones first: (0 + 0 + 1/3) / 3
        0.111111

    Source: Geifman & El-Yaniv, Selective Classification for Deep Neural Networks (NIPS 2017); the area is that of Geifman et
    al. (ICLR 2019, section 2). NaN if empty.
    """
    pixels, errors = cells.pixels[..., ::-1], (cells.pixels - cells.correct)[..., ::-1]
    seen, wrong = np.cumsum(pixels, axis=-1), np.cumsum(errors, axis=-1)
    # Sum over j = 1..n of (wrong + j e/n) / (seen + j), before the cell's own n pixels and e errors, where the sum of
    # 1 / (seen + j) is a difference of digammas: the cell's end is the next one's begin.
    after = digamma(seen + 1)
    inverse = np.diff(after, prepend=digamma(1.0), axis=-1)
    seen -= pixels
    wrong -= errors
    rate = errors / np.where(pixels > 0, pixels, 1.0)
    return np.asarray((errors + (wrong - rate * seen) * inverse).sum(-1) / _or_nan(cells.pixels.sum(-1)))


def _or_nan(pixels: np.ndarray) -> np.ndarray:
    return np.where(pixels > 0, pixels, np.nan)
