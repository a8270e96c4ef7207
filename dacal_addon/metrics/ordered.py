"""Metrics that look at the pixels in the order of their confidence, without bins."""

import numpy as np
from scipy.special import digamma

from .binned import Cells


def ks(cells: Cells) -> float:
    """Kolmogorov-Smirnov calibration error: the largest gap of the cumulative confidence and accuracy. In 0..1, NaN if empty.

    Example:
        >>> cells = Cells(np.array([2.0, 2.0]), np.array([2.0, 0.0]), np.array([1.2, 1.8]))
        >>> round(ks(cells), 6)  # after the first cell (1.2 - 2) / 4, after both (3 - 2) / 4
        0.25

    Source: Gupta et al., Calibration of Neural Networks using Splines (ICLR 2021, eq. 5), top class.
    """
    total = cells.pixels.sum()
    return float(np.abs(np.cumsum(cells.confidence - cells.correct)).max() / total) if total else float("nan")


def aurc(cells: Cells) -> float:
    """Area under the risk-coverage curve: the error rate among the k most confident pixels, averaged over k. In 0..1.

    Pixels of one cell are taken in random order, and the mean over all orders is returned, in closed form.

    Example:
        >>> cells = Cells(np.array([1.0, 2.0]), np.array([0.0, 2.0]), np.array([0.6, 1.8]))
        >>> round(aurc(cells), 6)  # two right ones first: (0 + 0 + 1/3) / 3
        0.111111

    Source: Geifman & El-Yaniv, Selective Classification for Deep Neural Networks (NIPS 2017); the area is that of Geifman et
    al. (ICLR 2019, section 2). NaN if empty.
    """
    pixels, errors = cells.pixels[::-1], (cells.pixels - cells.correct)[::-1]
    pixels, errors = pixels[pixels > 0], errors[pixels > 0]
    if not len(pixels):
        return float("nan")
    seen, wrong = np.cumsum(pixels) - pixels, np.cumsum(errors) - errors
    # Sum over j = 1..n of (wrong + j e/n) / (seen + j), where the sum of 1 / (seen + j) is a difference of digammas.
    inverse = digamma(seen + pixels + 1) - digamma(seen + 1)
    rate = errors / pixels
    return float((errors + (wrong - rate * seen) * inverse).sum() / pixels.sum())
