"""What was wrong with a batch that could not be counted: looked for where speed does not matter any more."""

import math
from typing import Callable, List, Optional

import torch
from torch import Tensor

from .._check import problem
from .pieces import Batch, Piece, pieces
from .pixels import piece_size, tolerance
from .settings import Settings

# Sums of probabilities further from 1 are none of rounding: 8 bits of mantissa leave 1e-2.
_ROUNDED = 0.1
_Where = Callable[[Callable[[Tensor], Tensor]], str]
"""Of what tells for scores (C, P) or confidences (P,) which pixels (P,) are wrong: where the first one is."""


def fault(batch: Batch, settings: Settings, *, function: str) -> Exception:
    """The `ValueError` for what `count_` found: the first offence."""

    def where(wrong: Callable[[Tensor], Tensor]) -> str:
        return _first(batch, settings, wrong)

    # As they were given: what cannot be normalised is NaN afterwards.
    for piece in pieces(batch._replace(normalize=False), settings, piece_size(settings, batch.label.device)):
        counts, scores = piece.counted > 0, piece.scores
        found = _of_labels(piece.label[counts], settings, function)
        if found is None and isinstance(scores, Tensor):
            found = _of_scores(scores[:, counts], batch.normalize, settings, function, where)
        elif found is None:
            found = _of_pair(piece._replace(scores=(scores[0][counts], scores[1][counts])), settings, function, where)
        if found is not None:
            return found
    remedy = "report it: this is a bug of dacal_addon"
    return problem(function, expected="scores that can be counted", got="a sum that is not finite", remedy=remedy)


def _first(batch: Batch, settings: Settings, wrong: Callable[[Tensor], Tensor]) -> str:
    """Where the first pixel is that counts and is wrong, in the order of the arrays: " in image 1 at (0, 3)"."""
    for i in range(len(batch.label)):
        # One image at a time, each as one piece, whose pixels are in order.
        one = batch.image(i)._replace(normalize=False)
        (piece,) = pieces(one, settings, one.label.numel())
        scores = piece.scores if isinstance(piece.scores, Tensor) else piece.scores[0]
        found = torch.nonzero((piece.counted > 0) & wrong(scores), as_tuple=False)
        if len(found):
            place: List[int] = []
            number = int(found[0])
            for size in reversed(batch.label.shape[1:]):
                place.insert(0, number % size)
                number //= size
            # The only image of a batch may be one of several that are counted one by one.
            return f"{f' in image {i}' if len(batch.label) > 1 else ''} at {tuple(place)}"
    return ""


def _of_labels(label: Tensor, settings: Settings, function: str) -> Optional[Exception]:
    classes, first = settings.num_classes, settings.first_label
    stray = label[(label < 0) | (label >= classes)]
    if not len(stray):
        return None
    value = int(stray[0]) + first
    ignored = settings.ignore_index[0] if len(settings.ignore_index) == 1 else settings.ignore_index
    expected = f"target: classes {first}..{first + classes - 1} or ignore_index={ignored}"
    remedy = "map the labels to training ids, or set ignore_index"
    if value == classes and not first:
        remedy += "; labels 1 to C, with 0 for no class, want reduce_zero_label=True"
    return problem(function, expected=expected, got=f"the value {value}", remedy=remedy)


def _of_pair(piece: Piece, settings: Settings, function: str, where: _Where) -> Optional[Exception]:
    confidence, prediction = piece.scores
    wrong = confidence[~((confidence >= 0) & (confidence <= 1))]
    if len(wrong):
        value = float(wrong[0])
        remedy = "divide 8-bit values by 255, 16-bit ones by 65535"
        if -0.01 < value < 1.01:
            remedy = "if rounding did that, clamp it: confidence.clamp(0, 1)"
        got = f"{value:.9g}" if value == value else "NaN" + where(torch.isnan)
        return problem(function, expected="x: confidences in 0..1", got=got, remedy=remedy)
    other = prediction[(prediction < 0) | (prediction >= settings.num_classes)]
    if len(other):
        expected = f"x: predicted classes 0..{settings.num_classes - 1}"
        remedy = "pass predictions as training ids"
        return problem(function, expected=expected, got=f"the value {int(other[0])}", remedy=remedy)
    return None


def _of_scores(scores: Tensor, normalized: bool, settings: Settings, function: str, where: _Where) -> Optional[Exception]:
    kind = settings.input
    if kind == "logits":
        if bool(torch.isfinite(scores.double().amax(0)).all() if scores.numel() else True):
            return None
        got = "only -infinity" + where(lambda x: (x == -math.inf).all(0))
        if bool(torch.isnan(scores).any()):
            got = "NaN" + where(_any_nan)
        elif bool((scores == math.inf).any()):
            got = "infinity" + where(lambda x: (x == math.inf).any(0))
        remedy = "look for a division by zero or an overflow in the network"
        return problem(function, expected="x: logits below infinity, one of them finite", got=got, remedy=remedy)
    p = scores.double() if kind == "probs" else scores.double().exp()
    total = (p / p.sum(0)).sum(0) if normalized else p.sum(0)
    if bool(((total - 1).abs() <= tolerance(scores.dtype, kind)).all() & (p >= 0).all()):
        return None
    off, low, high = float((total - 1).abs().max()), float(p.min()), float(p.max())
    expected = f"x: {kind} whose probabilities are >= 0 and sum to 1 over C"
    got, remedy = f"sums off by up to {off:.3g}", "pass input='logits' if they are logits"
    if bool(torch.isnan(p).any()):
        got, remedy = "NaN" + where(_any_nan), "look for a division by zero or an overflow in the network"
    elif low < 0:
        got = f"a value of {low:.3g}"
        if high <= 0 and bool(((p.exp().sum(0) - 1).abs() <= _ROUNDED).all()):
            remedy = "pass input='log_probs' if they are logarithms"
    elif normalized:
        got = "infinity" if high == math.inf else "only zeros"
        remedy = "neither can be divided by its sum"
    elif off <= _ROUNDED and kind == "probs":
        remedy = "if rounding did that (bfloat16 leaves 1e-2), pass normalize=True"
    elif off <= _ROUNDED:
        remedy = "if rounding did that, take log_softmax of float32 logits"
    elif kind == "probs" and high > 1 and float((total / 100 - 1).abs().max()) <= _ROUNDED:
        remedy = "divide percent by 100"
    elif high <= 1:
        remedy = "8-bit scores want normalize=True, logits input='logits'; not for multi-label outputs, whose sigmoids need "
        remedy += "not sum to 1: judge each channel by itself, with num_classes=2, one_channel=True"
    return problem(function, expected=expected, got=got, remedy=remedy)


def _any_nan(scores: Tensor) -> Tensor:
    return torch.isnan(scores).any(0)
