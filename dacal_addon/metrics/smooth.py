"""Smooth calibration error, which has no bins."""

import numpy as np
from scipy.fft import dct, idct

from .binned import Cells

# Points at which the smoothed residual is known. The kernel is as wide as the result, so that errors down to 1e-3 are
# resolved by 16 points; below that the sum over them still tends to the unsmoothed one.
_POINTS = 1 << 14
_STEPS = 50


def smece(cells: Cells) -> float:
    """The smooth ECE whose kernel is as wide as its value: s with s = integral of |(K_s * residual)(t)| dt. In 0..1.

    The residual, correct - confidence of every pixel at its confidence, is smoothed by a Gaussian reflected at 0 and 1 (in
    the frequencies of a cosine transform, where that is a product), and s is found by bisection. NaN if empty.

    Example:
        >>> cells = Cells(np.array([4.0]), np.array([2.0]), np.array([2.8]))  # 0.5 right at 0.7: smoothing keeps the area
        >>> round(smece(cells), 6)
        0.2

    Source: Błasiok & Nakkiran, Smooth ECE: Principled Reliability Diagrams via Kernel Smoothing (ICLR 2024, section 3).
    """
    total = cells.pixels.sum()
    if not total:
        return float("nan")
    filled = cells.pixels > 0
    position = np.clip(cells.confidence[filled] / cells.pixels[filled], 0, 1) * _POINTS - 0.5
    residual = (cells.correct - cells.confidence)[filled] / total
    # Each is shared by the two points beside it (the middles of the _POINTS intervals), so that its mean position is kept.
    left = np.floor(position)
    share = position - left
    grid = sum(
        np.bincount(np.clip(index, 0, _POINTS - 1).astype(int), part * residual, minlength=_POINTS)
        for index, part in ((left, 1 - share), (left + 1, share))
    )
    spectrum, frequency = dct(grid), np.pi * np.arange(_POINTS)

    def smoothed(width: float) -> float:
        return float(np.abs(idct(spectrum * np.exp(-0.5 * (width * frequency) ** 2))).sum())

    low, high = 0.0, 1.0  # smoothed(0) >= 0 and smoothed(1) <= 1, and it falls as the kernel widens
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if smoothed(middle) > middle else (low, middle)
    return (low + high) / 2
