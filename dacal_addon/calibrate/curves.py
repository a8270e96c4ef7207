"""Sums over the pixels of each image, at many temperatures: what images that are drawn anew need to be fitted on again."""

from typing import NamedTuple, Tuple

import numpy as np
import torch
from torch import Tensor

from ..metrics.bootstrap import times_drawn
from .pixels import Pixels
from .scaling import GRID, at, least, parts, where

REPLICATES = 200


class Curves(NamedTuple):
    """Of n images, each row the sum of weights times a figure of its pixels; columns belong to `GRID`."""

    likelihood: np.ndarray
    """(n, G): negative log-likelihood."""
    confidence: np.ndarray
    """(n, G)."""
    correct: np.ndarray
    """(n,)."""
    weight: np.ndarray
    """(n,): of the pixels alone."""


def curves_of(pixels: Pixels) -> Curves:
    """Curves in float64; one pass over the pixels for each temperature."""
    n, grid = pixels.images, len(GRID)
    likelihood, confidence = torch.zeros(grid, n, dtype=torch.float64), torch.zeros(grid, n, dtype=torch.float64)
    for part in parts(pixels.logits):
        z, y, w, i = pixels.logits[part], pixels.label[part, None], pixels.weight[part], pixels.image[part]
        for g, log_t in enumerate(GRID.tolist()):
            x = at(z, log_t)
            total = torch.logsumexp(x, 1)
            likelihood[g].index_add_(0, i, w * (total - x.gather(1, y)[:, 0]))
            confidence[g].index_add_(0, i, w * (x.max(1)[0] - total).exp())
    return Curves(likelihood.t().numpy(), confidence.t().numpy(), *right_and_weight(pixels))


def resamples(count: int, generator: torch.Generator) -> np.ndarray:
    """How often each of n images is in each of 200 samples of n, drawn with replacement: (200, n), rows sum to n."""
    return times_drawn(count, REPLICATES, generator).numpy()


def fitted_spread(curves: Curves, times: np.ndarray) -> float:
    """The standard deviation of log T by maximum likelihood over samples of images."""
    return float(least(times @ curves.likelihood).std())


def accuracies(curves: Curves, times: np.ndarray) -> np.ndarray:
    """The accuracy of each sample of images (B,)."""
    out: np.ndarray = (times @ curves.correct) / np.maximum(times @ curves.weight, 1e-12)
    return out


def matched_spread(curves: Curves, times: np.ndarray, accuracy: np.ndarray) -> float:
    """The standard deviation of the log T at which samples of images are as confident as `accuracy` (B,)."""
    mean = (times @ curves.confidence) / np.maximum(times @ curves.weight, 1e-12)[:, None]
    return float(where(mean, accuracy).std())


def right_and_weight(pixels: Pixels) -> Tuple[np.ndarray, np.ndarray]:
    """`correct` and `weight` of `Curves`."""
    if not len(pixels.logits):  # of which torch 1.7.1 gives no argmax
        return np.zeros(pixels.images), np.zeros(pixels.images)
    right = (pixels.logits.argmax(1) == pixels.label).double()
    return per_image(pixels, pixels.weight * right), per_image(pixels, pixels.weight)


def per_image(pixels: Pixels, value: Tensor) -> np.ndarray:
    """Sums (n,) of a figure of each pixel (P,)."""
    out: np.ndarray = torch.zeros(pixels.images, dtype=torch.float64).index_add_(0, pixels.image, value).numpy()
    return out
