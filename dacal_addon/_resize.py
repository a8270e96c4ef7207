"""Scores and features at another resolution."""

import math
from typing import Sequence

import torch.nn.functional as F
from torch import Tensor

from ._check import describe, problem
from ._upcast import LOGIT_FLOOR, at_least_float32

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


def resized_scores(function: str, x: Tensor, size: Sequence[int]) -> Tensor:
    """Scores (N, C, *s), logits, probabilities or their logarithms, in at least float32 and `resized` to `size`.

    A class masked out with -infinity gets `LOGIT_FLOOR`: its probability is 0 with it too, and 0 times it is no NaN.
    Scores that have the size already are returned as they are.

    >>> import torch
    >>> resized_scores("f", torch.tensor([0.0, -math.inf]).half().view(1, 1, 2), (4,)).tolist()
    [[[0.0, -2500.0, -7500.0, -10000.0]]]
    """
    if tuple(x.shape[2:]) == tuple(size):
        return x
    x = at_least_float32(x)
    return resized(function, x.masked_fill(x == -math.inf, LOGIT_FLOOR), size)
