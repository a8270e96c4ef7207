"""Scores and features at another resolution."""

from typing import Sequence

import torch.nn.functional as F
from torch import Tensor

from ._check import describe, problem

MODES = {1: "linear", 2: "bilinear", 3: "trilinear"}
"""Of `F.interpolate`, by the number of spatial dimensions."""


def resized(function: str, x: Tensor, size: Sequence[int]) -> Tensor:
    """Linear interpolation to `size` in each of one to three spatial dimensions; corners are not aligned. Carries gradient.

    >>> import torch
    >>> resized("f", torch.arange(4.0).view(1, 1, 4), (2,)).tolist()
    [[[0.5, 2.5]]]
    """
    if tuple(x.shape[2:]) == tuple(size):
        return x
    if x.dim() - 2 not in MODES or len(size) != x.dim() - 2:
        remedy = "resize it yourself"
        raise problem(
            function, expected=f"one to three spatial dimensions, {len(size)} of them", got=describe(x), remedy=remedy
        )
    return F.interpolate(x, size=tuple(size), mode=MODES[x.dim() - 2], align_corners=False)
