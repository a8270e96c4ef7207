"""Half precision is upcast before anything is summed; float64 stays."""

import torch
from torch import Tensor

LOGIT_FLOOR = -1e4
"""The logit of a class that is masked out: exp(-10000) is 0 in any precision, and 0 times it is no NaN, as it is of -inf."""


def at_least_float32(x: Tensor) -> Tensor:
    """The tensor in float32, or in float64 if it is.

    >>> at_least_float32(torch.zeros(1, dtype=torch.float16)).dtype, at_least_float32(torch.zeros(1).double()).dtype
    (torch.float32, torch.float64)
    """
    return x if x.dtype == torch.float64 else x.float()
