"""Calibration metrics for dense predictions: exact, in float64, on any number of images.

Every function takes predictions `x`, is told what they are (`input`), and drops ignored pixels. Fractions, never percent; NaN
where no valid pixel is left. Images are gone through one at a time, so that the float64 copies stay small.
"""

import math
from typing import Iterator, NamedTuple, Tuple, Union

import numpy as np
import torch
from torch import Tensor

from ._check import check_choice, check_classes, check_label, check_logits, check_number, problem

INPUTS = ("logits", "probs", "log_probs")
Array = Union[Tensor, np.ndarray]


class ReliabilityTable(NamedTuple):
    """The reliability diagram as numbers, one row a bin of confidence (lower, upper]; the first bin is closed at 0."""

    lower: Tensor
    """(n_bins,) float64."""
    upper: Tensor
    """(n_bins,) float64."""
    pixels: Tensor
    """(n_bins,) int64: pixels in the bin."""
    confidence: Tensor
    """(n_bins,) float64: their mean confidence, NaN for an empty bin."""
    accuracy: Tensor
    """(n_bins,) float64: the share that is right, NaN for an empty bin."""


def reliability(x: Array, target: Array, *, input: str, n_bins: int = 15, ignore_index: int = 255) -> ReliabilityTable:
    """How often the prediction is right, by confidence.

    Args:
        x: (N, C, H, W) floating: what `input` says.
        target: (N, H, W) integer classes, or `ignore_index`.
        input: "logits", "probs" (sum to 1 over C) or "log_probs". Nothing is guessed from the values.
        n_bins: bins of equal width; a confidence on an edge belongs to the lower bin.

    Raises:
        ValueError, TypeError: other shapes or kinds, NaN or infinity, stray labels, probabilities that do not sum to 1.

    Example:
        >>> probs = torch.tensor([[0.9, 0.1], [0.6, 0.4]]).T.reshape(1, 2, 1, 2)
        >>> table = reliability(probs, torch.zeros(1, 1, 2, dtype=torch.long), input="probs", n_bins=2)
        >>> table.pixels.tolist(), [round(c, 4) for c in table.confidence.tolist()], table.accuracy.tolist()
        ([0, 2], [nan, 0.75], [nan, 1.0])
    """
    check_number("reliability", "n_bins", n_bins, low=1, rule=">= 1")
    count = torch.zeros(n_bins, dtype=torch.int64)
    confident, right = torch.zeros(2, n_bins, dtype=torch.float64)
    edges = torch.arange(n_bins + 1, dtype=torch.float64) / n_bins
    for log_p, label in _pixels("reliability", x, target, input, ignore_index):
        log_confidence, prediction = log_p.max(1)
        confidence = log_confidence.exp()
        # bucketize without `right` is right-closed: edge[i - 1] < value <= edge[i].
        index = torch.bucketize(confidence, edges[1:-1])
        count += torch.bincount(index, minlength=n_bins)
        confident += torch.bincount(index, confidence, minlength=n_bins)
        right += torch.bincount(index, (prediction == label).double(), minlength=n_bins)
    filled = torch.where(count > 0, count.double(), torch.full_like(confident, math.nan))
    return ReliabilityTable(edges[:-1], edges[1:], count, confident / filled, right / filled)


def ece(x: Array, target: Array, *, input: str, n_bins: int = 15, ignore_index: int = 255) -> float:
    """Expected calibration error: mean of |accuracy - confidence| over the bins, weighted by their pixels. In 0..1.

    Arguments and errors: see `reliability`.

    Example:
        >>> probs = torch.tensor([[0.9, 0.1], [0.6, 0.4]]).T.reshape(1, 2, 1, 2)
        >>> round(ece(probs, torch.zeros(1, 1, 2, dtype=torch.long), input="probs", n_bins=2), 6)  # |1 - 0.75|
        0.25

    Source: Naeini et al. (AAAI 2015); Guo et al. (ICML 2017).
    """
    table = reliability(x, target, input=input, n_bins=n_bins, ignore_index=ignore_index)
    filled = table.pixels > 0
    if not bool(filled.any()):
        return math.nan
    gap = (table.accuracy - table.confidence)[filled].abs()
    return float((gap * table.pixels[filled]).sum() / table.pixels.sum())


def mean_confidence(x: Array, target: Array, *, input: str, ignore_index: int = 255) -> float:
    """Mean of the largest probability over the valid pixels; above `accuracy`, a network is overconfident.

    Example:
        >>> mean_confidence(torch.zeros(1, 4, 1, 1), torch.zeros(1, 1, 1, dtype=torch.long), input="logits")
        0.25
    """
    return _mean_over_pixels((log_p.amax(1).exp() for log_p, _ in _pixels("mean_confidence", x, target, input, ignore_index)))


def nll(x: Array, target: Array, *, input: str, ignore_index: int = 255) -> float:
    """Mean negative log-likelihood of the target, in nats; infinite where a true class has probability 0.

    Example:
        >>> round(nll(torch.zeros(1, 4, 1, 1), torch.zeros(1, 1, 1, dtype=torch.long), input="logits"), 4)  # log 4
        1.3863
    """
    return _mean_over_pixels(
        (-log_p.gather(1, label.unsqueeze(1)).squeeze(1) for log_p, label in _pixels("nll", x, target, input, ignore_index))
    )


def accuracy(x: Array, target: Array, *, input: str, ignore_index: int = 255) -> float:
    """Share of the valid pixels whose most probable class is the target.

    Example:
        >>> accuracy(torch.eye(2).view(1, 2, 1, 2), torch.tensor([[[0, 0]]]), input="logits")
        0.5
    """
    return _mean_over_pixels(
        ((log_p.argmax(1) == label).double() for log_p, label in _pixels("accuracy", x, target, input, ignore_index))
    )


def miou(x: Array, target: Array, *, input: str, ignore_index: int = 255) -> float:
    """Mean over the classes of intersection / union, pooled over all images; classes in neither are skipped.

    Example:
        >>> miou(torch.eye(2).view(1, 2, 1, 2), torch.tensor([[[0, 0]]]), input="logits")  # (1/2 + 0/1) / 2
        0.25

    Source: the PASCAL VOC measure (Everingham et al., IJCV 2010).
    """
    classes = x.shape[1] if len(x.shape) > 1 else 0
    confusion = torch.zeros(classes, classes, dtype=torch.int64)
    for log_p, label in _pixels("miou", x, target, input, ignore_index):
        pairs = torch.bincount(label * classes + log_p.argmax(1), minlength=classes * classes)
        confusion += pairs.reshape(classes, classes)
    intersection = confusion.diag().double()
    union = (confusion.sum(0) + confusion.sum(1)).double() - intersection
    present = union > 0
    return float((intersection[present] / union[present]).mean()) if bool(present.any()) else math.nan


def _mean_over_pixels(values: Iterator[Tensor]) -> float:
    total, count = 0.0, 0
    for value in values:
        total += float(value.sum())
        count += value.numel()
    return total / count if count else math.nan


def _pixels(function: str, x: Array, target: Array, input: str, ignore_index: int) -> Iterator[Tuple[Tensor, Tensor]]:
    """For each image: log-probabilities (P, C) float64 and labels (P,) of its valid pixels, on the CPU."""
    check_choice(function, "input", input, INPUTS)
    scores, labels = torch.as_tensor(x).detach(), torch.as_tensor(target).detach()
    check_logits(function, "x", scores)
    if not labels.is_floating_point() and labels.dtype != torch.bool:
        labels = labels.long()
    n, classes, height, width = scores.shape
    check_label(function, "target", labels, shape=(n, height, width))
    check_classes(function, "target", labels, classes, ignore_index)
    # Rounding moves the sum of the probabilities by less than a relative error of each; a log-probability, at most about -10
    # where it matters, is rounded more coarsely than the probability itself.
    tolerance = max(1e-3, (2.0 if input == "probs" else 20.0) * torch.finfo(scores.dtype).eps)
    for image, label in zip(scores, labels):
        label = label.flatten().cpu()
        valid = label != ignore_index
        if not bool(valid.any()):  # torch 1.7 cannot take the maximum of nothing
            continue
        rows = image.flatten(1).T.cpu()[valid].double()
        if input == "logits":
            if not bool(torch.isfinite(rows).all()):
                remedy = "look for a division by zero or an overflow in the network"
                raise problem(function, expected="finite values", got="NaN or infinity", remedy=remedy)
            yield torch.log_softmax(rows, 1), label[valid]
            continue
        p = rows if input == "probs" else rows.exp()
        off = (p.sum(1) - 1).abs()
        if not bool((off <= tolerance).all()) or bool((p < 0).any()):
            got = "NaN" if bool(torch.isnan(p).any()) else f"sums off by up to {float(off.max()):.3g}, or a negative value"
            expected = f"{input} whose probabilities are >= 0 and sum to 1 over C"
            raise problem(function, expected=expected, got=got, remedy="pass input='logits' if they are logits")
        yield (rows.log() if input == "probs" else rows), label[valid]
