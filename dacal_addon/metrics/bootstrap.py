"""How far a figure would move with other images of the same kind: images drawn with replacement."""

import math
from functools import cached_property
from typing import Iterator, NamedTuple, Sequence, Tuple

import numpy as np
import torch
from torch import Tensor

from .binned import Cells
from .figures import Counts, Losses, Overlap, as_floats
from .grid import make_grid
from .images import Images
from .settings import Settings
from .totals import Totals, zeros

# A replicate's cells are 150 KB.
REPLICATES_AT_ONCE = 50


class Bootstrap(NamedTuple):
    """A metric and how far it would move with other images of the same kind. In print: `0.0421 [0.0380, 0.0467]`."""

    estimate: float
    """On the images as they are."""
    low: float
    """Lower end of the interval."""
    high: float
    """Upper end."""
    samples: Tensor
    """(replicates,) float64: the metric on images drawn with replacement."""

    def __repr__(self) -> str:
        return f"{self.estimate:.4f} [{self.low:.4f}, {self.high:.4f}]"


class CountsOfImages(Counts):
    """Of each image, (N, ...)."""

    def __init__(self, images: Images, settings: Settings) -> None:
        super().__init__(settings)
        self.images, self._grid = images, make_grid(settings.n_bins, settings.fine_bins, both_ends=False)
        self._of_cell, self._of_pair = (
            np.repeat(np.arange(len(lengths)), lengths.cpu().numpy()) for lengths in (images.cells, images.pairs)
        )

    @cached_property
    def filled(self) -> np.ndarray:
        """The first cell and those that have a pixel in any image, in their order: (K,) integers."""
        return np.union1d([0], self.images.cell.cpu().numpy())

    @cached_property
    def cells(self) -> Cells:
        place = np.searchsorted(self.filled, self.images.cell.cpu().numpy())
        return self._table(place, len(self.filled))

    @cached_property
    def bins(self) -> Cells:
        place = self._grid.bin_of_cell[self.images.cell.cpu().numpy()]
        return self._table(place, self.settings.n_bins)

    @cached_property
    def overlap(self) -> Overlap:
        classes = self.settings.num_classes
        target, predicted = np.divmod(self.images.pair.cpu().numpy(), classes)
        pixels = as_floats(self.images.pair_pixels)
        same = np.where(target == predicted, pixels, 0.0)
        columns = ((target, same), (target, pixels), (predicted, pixels))
        return Overlap(*(self._sums(self._of_pair, place, weights, classes) for place, weights in columns))

    @cached_property
    def losses(self) -> Losses:
        return Losses(as_floats(self.images.nll), as_floats(self.images.brier))

    def totals(self, weights: np.ndarray) -> Totals:
        """All of the images' counts together, each as often as `weights`, (N,) float64, says."""
        images, settings = self.images, self.settings
        none = zeros(settings.num_classes, len(self._grid.bin_of_cell), 0, torch.device("cpu"))
        times = torch.from_numpy(weights)
        pair = images.pair.long().cpu()
        sums = Drawn(self, weights[None])
        cells = [torch.zeros(len(none.pixels), dtype=torch.float64) for _ in sums.cells]
        for field, column in zip(cells, sums.cells):
            field[torch.from_numpy(self.filled).long()] = torch.from_numpy(column[0])
        drawn = (times[torch.from_numpy(self._of_pair)] * images.pair_pixels.cpu()).long()
        nll, brier = (torch.from_numpy(loss)[0] for loss in sums.losses)
        return none._replace(
            images=times.sum().long(),
            ignored=(times * images.ignored.cpu()).sum().long(),
            pixels=cells[0].long(),
            correct=cells[1].long(),
            confidence=cells[2],
            confusion=none.confusion.view(-1).index_add(0, pair, drawn).view_as(none.confusion),
            predicted_confidence=times @ images.predicted_confidence.cpu(),
            nll=nll,
            brier=brier,
        )

    def _table(self, place: np.ndarray, width: int) -> Cells:
        columns = (self.images.pixels, self.images.correct, self.images.confidence)
        return Cells(*(self._sums(self._of_cell, place, as_floats(column), width) for column in columns))

    def _sums(self, image: np.ndarray, place: np.ndarray, weights: np.ndarray, width: int) -> np.ndarray:
        count = len(self.images.cells)
        return np.bincount(image * width + place, weights, minlength=count * width).reshape(count, width)


class Drawn(Counts):
    """Of several draws of images: each image as often as a row of `weights`, (replicates, N) float64, says."""

    def __init__(self, images: CountsOfImages, weights: np.ndarray) -> None:
        super().__init__(images.settings)
        self._images, self.weights = images, weights

    @cached_property
    def cells(self) -> Cells:
        # Products of integers below 2^53: exact in float64, in which a matrix product is fast.
        return Cells(*(self.weights @ column for column in self._images.cells))

    @cached_property
    def bins(self) -> Cells:
        return Cells(*(self.weights @ column for column in self._images.bins))

    @cached_property
    def overlap(self) -> Overlap:
        return Overlap(*(self.weights @ column for column in self._images.overlap))

    @cached_property
    def losses(self) -> Losses:
        return Losses(*(self._finite_or_not(column) for column in self._images.losses))

    def _finite_or_not(self, loss: np.ndarray) -> np.ndarray:
        """0 times infinity, the NLL of an image that is not drawn, is 0 here."""
        infinite = np.isinf(loss)
        total = self.weights @ np.where(infinite, 0.0, loss)
        return np.where(self.weights[:, infinite].any(-1), np.inf, total)


def draws(count: int, replicates: int, generator: torch.Generator) -> Iterator[np.ndarray]:
    """`times_drawn`, some replicates at a time: (rows, count) float64 each.

    Example:
        >>> [rows.shape for rows in draws(5, 60, torch.Generator())]
        [(50, 5), (10, 5)]
    """
    for begin in range(0, replicates, REPLICATES_AT_ONCE):
        yield times_drawn(count, min(REPLICATES_AT_ONCE, replicates - begin), generator).numpy()


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
