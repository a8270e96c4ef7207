"""Torch or numpy in, torch tensors out."""

import warnings
from typing import Tuple, Union

import numpy as np
import torch
from torch import Tensor

from .._check import describe, problem

Array = Union[Tensor, np.ndarray]
Predictions = Union[Array, Tuple[Array, Array]]


def as_tensor(function: str, name: str, value: object) -> Tensor:
    """`value` without its graph; a numpy array shares its memory where torch can read it (read-only and mapped files too)."""
    if isinstance(value, Tensor):
        return value.detach()
    if not isinstance(value, np.ndarray):
        remedy = "convert it, for example with torch.as_tensor"
        raise problem(
            function, expected=f"{name}: a torch tensor or numpy array", got=describe(value), remedy=remedy, error=TypeError
        )
    if isinstance(value, np.ma.MaskedArray):
        remedy = "pass its data, and its mask as region"
        raise problem(function, expected=f"{name}: a plain array", got="a masked array", remedy=remedy, error=TypeError)
    array: np.ndarray = value
    if array.dtype.kind not in "fiub" or array.dtype.itemsize > 8:
        remedy = "convert it to float32 or int64"
        raise problem(function, expected=f"{name}: numbers", got=str(array.dtype), remedy=remedy, error=TypeError)
    if array.dtype.kind == "u" and array.dtype.itemsize > 1:  # not every torch has them
        if array.size and array.max() > np.iinfo(np.int64).max:
            raise problem(
                function, expected=f"{name}: values below 2^63", got=str(array.max()), remedy="look at where it is from"
            )
        array = array.astype(np.int64)
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    if any(stride < 0 or stride % array.itemsize for stride in array.strides):
        array = array.copy()
    if array.flags.writeable:
        return torch.from_numpy(array)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not writ", category=UserWarning)  # nothing here writes to it
        return torch.from_numpy(array)
