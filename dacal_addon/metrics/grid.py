"""The cells of probability in which pixels are counted: fine enough for every metric, and never across the edge of a bin.

Half of a segmentation network's confidences lie above 0.999, where equal steps of confidence would not tell them apart. The
cells are therefore those of two grids laid over each other: one uniform in -log2(1 - confidence), the octaves of doubt, down to
a doubt of 2^-32, and one uniform in confidence, half as fine, whose edges include those of the bins of equal width. So one
histogram gives those bins exactly, and to the width of a cell everything that needs the pixels in order (equal mass, KS, AURC,
smooth ECE).
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

OCTAVES = 32
# In cells: a probability no further above an edge lies on it. 1 / (1 + 1 + 1) may come out one rounding above or below 5 / 15,
# depending on the vector lane that computed it, and must not change its bin for that. The octaves' cells need no such care:
# they are shifted by half a cell, so that 1/2, 1/4, ... lie in the middle of one, and their edges are irrational.
ON_EDGE = 1e-12


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
        >>> grid = make_grid(2, 32, both_ends=False)  # one cell an octave, and sixteen of equal width
        >>> grid.edges[4:8].round(4), grid.bin_of_cell[6:10]
        (array([0.25  , 0.2929, 0.3125, 0.375 ]), array([0, 0, 0, 1]))
    """
    count = fine_bins // 2 if both_ends else fine_bins
    doubt = 2.0 ** (-(np.arange(count - 1) + 0.5) * OCTAVES / count - both_ends)
    fine = np.concatenate([doubt[::-1], [0.5], 1 - doubt]) if both_ends else 1 - doubt
    uniform = uniform_cells(n_bins, fine_bins)
    inner = np.concatenate([fine, np.arange(1, uniform) / uniform])
    # Only 0.5 can be an edge of both. What lies up to ON_EDGE above it is in the next fine cell and not in the next bin.
    order = np.argsort(inner, kind="stable")
    edges = np.concatenate([[0.0], inner[order], [1.0]])
    of_uniform = np.concatenate([[0], np.cumsum(order >= len(fine))]).astype(np.int64)
    return Grid(edges, of_uniform // (uniform // n_bins))


def cell_count(n_bins: int, fine_bins: int) -> int:
    """How many cells there are.

    >>> cell_count(15, 4096) == len(make_grid(15, 4096, both_ends=True).bin_of_cell)
    True
    """
    return fine_bins + uniform_cells(n_bins, fine_bins) - 1


def cell_of(probability: Tensor, *, n_bins: int, fine_bins: int, both_ends: bool) -> Tensor:
    """The number of the cell of each probability, float64 of any shape, as a float64.

    Bins are right-closed, (l, r], the first one closed at 0; a probability above 1 by rounding is in the last cell.

    Example:
        >>> cell_of(torch.tensor([0.0, 0.5, 0.51, 1.0]).double(), n_bins=2, fine_bins=32, both_ends=False)
        tensor([ 0.,  8.,  9., 46.], dtype=torch.float64)
    """
    uniform = float(uniform_cells(n_bins, fine_bins))
    coarse = (probability * uniform).sub_(ON_EDGE).ceil_().clamp_(1.0, uniform)
    if not both_ends:
        return coarse.add_(_fine(1.0 - probability, fine_bins)).sub_(1.0)
    half = fine_bins // 2
    # Cells are counted from the middle: half, half + 1, ... above 0.5, half - 1, half - 2, ... below.
    steps = _fine(torch.min(probability, 1.0 - probability).mul_(2.0), half).add_(0.5)
    return coarse.add_(torch.where(probability > 0.5, steps, -steps)).add_(half - 1.5)


def uniform_cells(n_bins: int, fine_bins: int) -> int:
    """Cells of equal width: half of `fine_bins` or a few more, a multiple of the bins."""
    return n_bins * -(-fine_bins // (2 * n_bins))


def _fine(doubt: Tensor, cells: int) -> Tensor:
    """How many cells lie between `doubt` and 1; at most cells - 1. Overwrites its argument."""
    octaves = doubt.clamp_(min=0.5**OCTAVES).log2_()
    return octaves.mul_(-cells / OCTAVES).add_(0.5).floor_().clamp_(0.0, cells - 1.0)
