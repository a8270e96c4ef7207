"""How far a figure would move with other images of the same kind: images drawn with replacement."""

import math
from typing import Iterator, NamedTuple, Sequence, Tuple

import numpy as np
import torch
from torch import Tensor

from . import totals as _totals
from .totals import Totals

# A replicate's counts are 150 KB.
_REPLICATES_AT_ONCE = 50


class Bootstrap(NamedTuple):
    """A metric and how far it would move with other images of the same kind."""

    estimate: float
    """On the images as they are."""
    low: float
    """Lower end of the interval."""
    high: float
    """Upper end."""
    samples: Tensor
    """(replicates,) float64: the metric on images drawn with replacement."""


def resampled(images: Sequence[Totals], replicates: int, generator: torch.Generator) -> Iterator[Totals]:
    """The totals of `replicates` draws of as many images as there are, on the CPU.

    Example:
        >>> one = _totals.zeros(2, 1, 0, torch.device("cpu"))._replace(images=torch.tensor(1))
        >>> [int(drawn.images) for drawn in resampled([one] * 5, 3, torch.Generator())]
        [5, 5, 5]
    """
    stacked = _totals.stack([Totals(*(field.cpu() for field in one)) for one in images], like=images[0])
    for begin in range(0, replicates, _REPLICATES_AT_ONCE):
        rows = min(_REPLICATES_AT_ONCE, replicates - begin)
        yield from _totals.weighted(stacked, times_drawn(len(images), rows, generator))


def times_drawn(count: int, replicates: int, generator: torch.Generator) -> Tensor:
    """How often each of `count` images is among as many drawn with replacement: (replicates, count) float64, on the CPU.

    Example:
        >>> times_drawn(5, 3, torch.Generator()).sum(1).tolist()
        [5.0, 5.0, 5.0]
    """
    picks = torch.randint(count, (replicates, count), generator=generator, device=generator.device).cpu()
    return torch.zeros(picks.shape, dtype=torch.float64).scatter_add_(1, picks, torch.ones(picks.shape).double())


def percentile_interval(samples: Sequence[float], level: float) -> Tuple[float, float]:
    """The interval that holds the share `level` of the samples that are a number, as much of the rest on either side.

    Example:
        >>> low, high = percentile_interval([3.0, 1.0, 2.0, float("nan")], 0.5)
        >>> float(low), float(high)
        (1.5, 2.5)
    """
    tail = (1 - level) / 2
    known = np.sort([sample for sample in samples if not math.isnan(sample)])
    if not len(known):
        return math.nan, math.nan
    # Infinite values cannot be interpolated: the nearest ones then.
    low, high = (
        np.quantile(known, q) if np.isfinite(known).all() else known[round(q * (len(known) - 1))] for q in (tail, 1 - tail)
    )
    return float(low), float(high)
