"""Torch or numpy in, checked torch tensors out."""

import warnings
from typing import Optional, Tuple, Union

import numpy as np
import torch
from torch import Tensor

from .._check import check_logits, describe, problem

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


def as_batch(
    function: str, x: Predictions, target: Array, region: Optional[Array], *, num_classes: int, input: str
) -> Tuple[Union[Tensor, Tuple[Tensor, Tensor]], Tensor, Optional[Tensor]]:
    """The batch as tensors, of the right kinds and shapes, all on the device of x (the CPU if that has no float64)."""
    labels = as_tensor(function, "target", target)
    expected = "target: an integer array (N, H, W)"
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        remedy = "convert it with .long(); probabilistic targets have no calibration error"
        raise problem(function, expected=expected, got=describe(labels), remedy=remedy, error=TypeError)
    if labels.dim() != 3:
        remedy = "add a leading dimension to a single image, drop a channel dimension with .squeeze(1)"
        raise problem(function, expected=expected, got=describe(labels), remedy=remedy)
    shape = tuple(labels.shape)
    scores: Union[Tensor, Tuple[Tensor, Tensor]]
    if input == "top1":
        scores = _as_pair(function, x, shape)
        device = scores[0].device
    else:
        scores = as_tensor(function, "x", x)
        check_logits(function, "x", scores, num_classes=num_classes)
        if (scores.shape[0], *scores.shape[2:]) != shape:
            remedy = "resize the label with nearest-neighbour sampling, or the logits bilinearly, yourself"
            expected = f"target of shape {(scores.shape[0], *scores.shape[2:])} for x of shape {tuple(scores.shape)}"
            raise problem(function, expected=expected, got=describe(labels), remedy=remedy)
        device = scores.device
    judged = None
    if region is not None:
        judged = as_tensor(function, "region", region)
        if judged.dtype != torch.bool or tuple(judged.shape) != shape:
            remedy = "compare it: region > 0, one value a pixel of the target"
            raise problem(function, expected=f"region: a bool array {shape}", got=describe(judged), remedy=remedy)
    if device.type == "mps":  # no float64 there
        device = torch.device("cpu")
    scores = scores.to(device) if isinstance(scores, Tensor) else (scores[0].to(device), scores[1].to(device))
    return scores, labels.to(device), None if judged is None else judged.to(device)


def _as_pair(function: str, x: object, shape: Tuple[int, ...]) -> Tuple[Tensor, Tensor]:
    expected = f"x: a pair (confidence, predicted class) of arrays {shape}, floating and integer"
    remedy = "pass x=(confidence, prediction)"
    if not isinstance(x, (tuple, list)) or len(x) != 2:
        raise problem(function, expected=expected, got=describe(x), remedy=remedy, error=TypeError)
    confidence, prediction = (as_tensor(function, "x", part) for part in x)
    kinds = confidence.is_floating_point() and not prediction.is_floating_point() and prediction.dtype != torch.bool
    if not kinds or tuple(confidence.shape) != shape or tuple(prediction.shape) != shape:
        raise problem(function, expected=expected, got=f"{describe(confidence)} and {describe(prediction)}", remedy=remedy)
    return confidence, prediction
