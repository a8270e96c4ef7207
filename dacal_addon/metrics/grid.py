"""The cells of probability in which pixels are counted: fine enough for every metric, and never across the edge of a bin.

A uniform grid is useless here: half of a segmentation network's confidences lie above 0.999. The fine grid is uniform in
-log2(1 - confidence), the octaves of doubt, down to a doubt of 2^-32. The edges of the bins of equal width are put into it, so
that one histogram gives those bins exactly, and to the width of a cell everything that needs the pixels in order (equal mass,
KS, AURC, smooth ECE).
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

OCTAVES = 32
# A probability within this of a bin's edge lies on it: 1 / (1 + 1 + 1) may come out one rounding above or below 5 / 15,
# depending on the vector lane that computed it, and must not change its bin for that. The fine cells need no such care: they
# are shifted by half a cell, so that 1/2, 1/4, ... lie in the middle of one, and their edges are irrational.
_ON_EDGE = 1e-12


class Grid(NamedTuple):
    """The cells, in the order of probability."""

    edges: np.ndarray
    """(cells + 1,) float64 from 0 to 1. Cell k holds the probabilities between edges k and k + 1."""
    bin_of_cell: np.ndarray
    """(cells,) int64: the bin of equal width in which a cell lies."""


@lru_cache(maxsize=None)
def make_grid(n_bins: int, fine_bins: int, *, both_ends: bool) -> Grid:
    """The cells that `cell_of` numbers. `both_ends`: octaves towards 0 as well, where most probabilities of a class lie.

    Example:
        >>> grid = make_grid(2, 32, both_ends=False)  # one cell an octave
        >>> grid.edges[:4].round(3), grid.bin_of_cell[:4]
        (array([0.   , 0.293, 0.5  , 0.646]), array([0, 0, 1, 1]))
    """
    count = fine_bins // 2 if both_ends else fine_bins
    doubt = 2.0 ** (-(np.arange(count - 1) + 0.5) * OCTAVES / count - both_ends)
    fine = np.concatenate([doubt[::-1], [0.5], 1 - doubt]) if both_ends else 1 - doubt
    inner = np.concatenate([fine, np.arange(1, n_bins) / n_bins])
    # Only 0.5 can be an edge of both. What lies up to _ON_EDGE above it is in the next fine cell and not in the next bin.
    order = np.argsort(inner, kind="stable")
    edges = np.concatenate([[0.0], inner[order], [1.0]])
    return Grid(edges, np.concatenate([[0], np.cumsum(order >= len(fine))]).astype(np.int64))


def cell_of(probability: Tensor, *, n_bins: int, fine_bins: int, both_ends: bool) -> Tensor:
    """The number of the cell of each probability, float64 of any shape, as a float64.

    Bins are right-closed, (l, r], the first one closed at 0; a probability above 1 by rounding is in the last cell.

    Example:
        >>> cell_of(torch.tensor([0.0, 0.5, 0.51, 1.0]).double(), n_bins=2, fine_bins=32, both_ends=False)
        tensor([ 0.,  1.,  2., 32.], dtype=torch.float64)
    """
    coarse = (probability * float(n_bins)).sub_(_ON_EDGE).ceil_().clamp_(1.0, float(n_bins))
    if not both_ends:
        return coarse.add_(_fine(1.0 - probability, fine_bins)).sub_(1.0)
    half = fine_bins // 2
    # Cells are counted from the middle: half, half + 1, ... above 0.5, half - 1, half - 2, ... below.
    steps = _fine(torch.min(probability, 1.0 - probability).mul_(2.0), half).add_(0.5)
    return coarse.add_(torch.where(probability > 0.5, steps, -steps)).add_(half - 1.5)


def _fine(doubt: Tensor, cells: int) -> Tensor:
    """How many cells lie between `doubt` and 1; at most cells - 1. Overwrites its argument."""
    octaves = doubt.clamp_(min=0.5**OCTAVES).log2_()
    return octaves.mul_(-cells / OCTAVES).add_(0.5).floor_().clamp_(0.0, cells - 1.0)
