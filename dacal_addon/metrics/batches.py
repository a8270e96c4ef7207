"""What `update` is given, as a checked batch; each error names what to do about the layout it was given in."""

from typing import Mapping, Optional, Tuple

import numpy as np
import torch
from torch import Tensor

from .._check import check_logits, describe, problem
from .._resize import resized_scores
from .arrays import Array, Predictions, as_tensor
from .pieces import Batch
from .settings import Settings

_MULTI_LABEL = "not for multi-label outputs, where several classes may be right at a pixel: judge each channel by itself, "
_MULTI_LABEL += "x[:, c : c + 1] with num_classes=2, one_channel=True"


def as_batch(
    function: str,
    x: Predictions,
    target: Array,
    region: Optional[Array],
    settings: Settings,
    *,
    interpolate: bool = False,
    normalize: bool = False,
) -> Batch:
    """The batch as tensors, of the right kinds and shapes, all on the device of x (the CPU if that has no float64).

    With `interpolate`, its scores may have another size than its labels: `at_label_size`.
    """
    for name, allowed, kinds in (("interpolate", interpolate, ("logits", "probs")), ("normalize", normalize, ("probs",))):
        if allowed and settings.input not in kinds:
            expected = f"input={' or '.join(map(repr, kinds))} with {name}=True"
            remedy = f"leave {name} out, and do it to what these are made of"
            raise problem(function, expected=expected, got=f"input={settings.input!r}", remedy=remedy)
    label = as_tensor(function, "target", target)
    if label.is_floating_point() or label.is_complex() or label.dtype == torch.bool:
        soft = "; probabilistic targets have no calibration error" if label.dtype != torch.bool else ""
        remedy = f"convert it with .long(){soft}"
        expected = "target: an integer array (N, *spatial)"
        raise problem(function, expected=expected, got=describe(label), remedy=remedy, error=TypeError)
    if settings.input == "top1":
        pair = _as_pair(function, x, label)
        device = pair[0].device
    else:
        scores = _as_scores(function, x, label, settings)
        _check_label(function, scores, label, settings, interpolate)
        device = scores.device
    judged = None
    if region is not None:
        judged = as_tensor(function, "region", region)
        if judged.dtype != torch.bool or judged.shape != label.shape:
            remedy = "compare it: region > 0, one value a pixel of the target"
            expected = f"region: a bool array {tuple(label.shape)}"
            raise problem(function, expected=expected, got=describe(judged), remedy=remedy)
        judged = judged.to(device)
    if device.type == "mps":  # no float64 there
        device = torch.device("cpu")
        judged = None if judged is None else judged.to(device)
    if settings.input == "top1":
        return Batch((pair[0].to(device), pair[1].to(device)), label.to(device), judged)
    return Batch(scores.to(device), label.to(device), judged, normalize)


def at_label_size(function: str, batch: Batch) -> Batch:
    """The batch with scores, (N, C, *S) of any size, brought linearly to the size of its labels."""
    assert isinstance(batch.scores, Tensor)
    return batch._replace(scores=resized_scores(function, batch.scores, batch.label.shape[1:]))


def _as_scores(function: str, x: object, label: Tensor, settings: Settings) -> Tensor:
    """Scores with their channels in the second dimension."""
    several = list(x.values()) if isinstance(x, Mapping) else x if isinstance(x, (tuple, list)) else ()
    if any(isinstance(one, (Tensor, np.ndarray)) for one in several):
        check_logits(function, "x", x)  # says where in the outputs they may be
    scores = as_tensor(function, "x", x)
    channels = 1 if settings.one_channel else settings.num_classes
    layout = "(N, *spatial, C)" if settings.channels_last else "(N, C, *spatial)"
    shape = tuple(scores.shape)
    at = scores.dim() - 1 if settings.channels_last else 1
    if scores.is_floating_point() and len(shape) >= 3 and shape[at] == channels:
        return scores.permute(0, at, *range(1, at)) if settings.channels_last else scores
    if not scores.is_floating_point():
        remedy = "convert counts or 8-bit scores to floating probabilities or logits"
    elif shape[:1] == (channels,) and shape[1:] == tuple(label.shape):
        remedy = "add a leading dimension to a single image: x[None] and target[None]"
    elif len(shape) < 3:
        remedy = "pass scores of every class and pixel"
    elif settings.channels_last and shape[1] == channels:
        remedy = "construct with channels_last=False"
    elif not settings.channels_last and shape[-1] == channels:
        remedy = _classes_last(len(shape))
    elif shape[at] == 1:
        remedy = "of one sigmoid channel say num_classes=2, one_channel=True"
    elif settings.one_channel:
        remedy = "construct with one_channel=False for two channels of a softmax"
        remedy = remedy if shape[at] == 2 else f"pass num_classes={shape[at]}, one_channel=False; {_MULTI_LABEL}"
    else:
        remedy = f"say num_classes={shape[at]}, or pass scores of {channels} classes"
    expected = f"x: a floating array {layout} with C = {channels}"
    raise problem(function, expected=expected, got=describe(scores), remedy=remedy)


def _check_label(function: str, scores: Tensor, label: Tensor, settings: Settings, interpolate: bool) -> None:
    """One label a pixel; only their number may differ where they are interpolated, and that not by a swap."""
    size, found = (scores.shape[0], *scores.shape[2:]), tuple(label.shape)
    swapped = len(found) >= 3 and found != size and found == (*size[:-2], size[-1], size[-2])
    if found == size or (interpolate and not swapped and len(found) == len(size) and found[0] == size[0]):
        return
    if found == tuple(scores.shape) and scores.shape[1] > 1:  # of one channel, argmax would make every label 0
        remedy = f"of one-hot labels take target.argmax(1); {_MULTI_LABEL}"
    elif len(found) == scores.dim() and 1 in (found[1], found[-1]):
        remedy = f"drop its channel dimension with .squeeze({1 if found[1] == 1 else -1})"
    elif found == size[1:]:
        remedy = "add a leading dimension to a single image: target[None]"
    elif found == tuple(scores.shape[:-1]) and not settings.channels_last:
        remedy = _classes_last(scores.dim())
    elif swapped:
        remedy = "height and width are swapped in one of them: x.transpose(-1, -2)"
    elif len(found) != len(size):
        remedy = "pass one label a pixel, in as many dimensions"
    elif found[0] != size[0]:
        remedy = "pass as many labels as images"
    elif settings.input == "log_probs":
        remedy = "resize what they are made of, the logits, to the label's size with F.interpolate"
    else:
        remedy = f"pass interpolate=True, or F.interpolate the {settings.input} (not the label) to the label's size"
    raise problem(
        function, expected=f"target of shape {size} for x of shape {tuple(scores.shape)}", got=describe(label), remedy=remedy
    )


def _classes_last(dimensions: int) -> str:
    order = (0, dimensions - 1, *range(1, dimensions - 1))
    return f"the classes are last: x.permute{order}, or construct with channels_last=True"


def _as_pair(function: str, x: object, label: Tensor) -> Tuple[Tensor, Tensor]:
    shape = tuple(label.shape)
    if len(shape) < 2:
        remedy = "add a leading dimension to a single image"
        raise problem(function, expected="target: an integer array (N, *spatial)", got=describe(label), remedy=remedy)
    expected = f"x: a pair (confidence, predicted class) of arrays {shape}, floating and integer"
    remedy = "pass x=(confidence, prediction)"
    if not isinstance(x, (tuple, list)) or len(x) != 2:
        raise problem(function, expected=expected, got=describe(x), remedy=remedy, error=TypeError)
    confidence, prediction = (as_tensor(function, "x", part) for part in x)
    kinds = confidence.is_floating_point() and not prediction.is_floating_point() and prediction.dtype != torch.bool
    if not kinds or tuple(confidence.shape) != shape or tuple(prediction.shape) != shape:
        raise problem(function, expected=expected, got=f"{describe(confidence)} and {describe(prediction)}", remedy=remedy)
    return confidence, prediction
