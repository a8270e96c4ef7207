"""Every metric of any number of images, counted in constant memory."""

import copy
import functools
import math
from contextlib import ExitStack
from typing import Any, Callable, Dict, Iterable, List, Optional, Sequence, Tuple, Union, overload

import numpy as np
import torch
from torch import Tensor

from .._check import as_whole, check_choice, check_number, problem
from ..progress import Progress
from . import figures
from .binned import Cells, ReliabilityTable, calibration_error, mass_bins, tabulate, width_bins
from .bootstrap import Bootstrap, CountsOfImages, Drawn, draws, percentile_interval
from .catalogue import CATALOGUE, Metric
from .counting import Counting
from .figures import FIGURES, CountsOfTotals
from .grid import Grid, make_grid
from .images import pack
from .remarks import remarks
from .selective import ThresholdTable, selective

_Measure = Callable[["CalibrationStats"], float]
# Images keep no class-wise counts.
_BOOTSTRAPPED = [key for key, metric in CATALOGUE.items() if not metric.classwise]


class CalibrationStats(Counting):
    """Counts pixels by their confidence, exactly and in constant memory, and gives every metric of them.

    Args:
        num_classes: C in 2..4096.
        input: what `update` gets: "logits", "probs" (they sum to 1 over C), "log_probs", or "top1", a pair (confidence,
            predicted class), which has no NLL, Brier score or class-wise errors. Nothing is guessed from the values.
        ignore_index: the label, or several, of pixels that do not count, as the arrays have them. They may be classes, which
            every mean over the classes then leaves out. None: 255, unless it is a class; all pixels count then, and a warning
            says so.
        n_bins: bins of the reliability diagram and of ECE, at most 10,000.
        fine_bins: cells for equal mass, KS, smooth ECE and AURC, which take pixels of one cell for equal: a power of two from
            256 to 65536. With 4096, a cell is 0.0005 wide, and towards 1 half a percent of the doubt.
        classwise: count the probability of every class too, for `classwise_ece`; four to eight times slower.
        per_image: keep the counts of every image, for `bootstrap` and image means: those that are not zero, at most 180 KB
            with the defaults and 12 bytes a pair of classes that occurs. An image is a volume where there are three dimensions.
        device: of the counts; pixels are judged on the device they are on.
        backend: what judges pixels. "torch": its operations. "numba": a sweep in compiled code, three times faster, for scores
            on the CPU (extra `fast`; ten seconds at its very first call). "triton": one launch a batch, for what is on a GPU
            (triton >= 3.2, which torch >= 2.6 for CUDA brings; not yet run on a GPU). "compile": `torch.compile`
            (torch >= 2.0 and, on a CPU, a C++ compiler; some seconds in each process). None: on a GPU "triton", on a CPU, for
            batches of 4 million scores and more, "numba", each where it is to be had; else "torch". All count the same, to the
            last places of float64 sums; `judged_by` tells which one did.
        one_channel: `update` gets one sigmoid channel, (N, 1, *S) logits or probabilities of class 1; `num_classes` is 2.
        channels_last: `update` gets (N, *S, C).
        reduce_zero_label: label 0 does not count and label k is class k - 1, as ADE20K's annotations are; `ignore_index` speaks
            of the labels as they are.

    Memory: the counts (150 KB with the defaults) and a few MB of scratch, whatever the size and number of images. On a GPU, by
    estimate: 120 MB of scratch with "torch"; with "triton" 3 MB, and up to 256 with `per_image` or `classwise`.
    Precision: scores are taken as float64, whatever they are, counts are int64 and sums float64, so that the split into
    batches and their order do not matter. Predictions are the first largest score, as `argmax`.

    Raises:
        ValueError: a number outside its range, or settings that do not go together.
        UserWarning (a warning): class 255 counts, since nothing was said of it.
        RuntimeError: a backend that is not to be had.

    Example:
        >>> stats = CalibrationStats(2, input="probs", n_bins=2)
        >>> for p, label in [((0.75, 0.25), 0), ((0.625, 0.375), 1)]:  # one image each
        ...     stats.update(torch.tensor(p).view(1, 2, 1, 1), torch.full((1, 1, 1), label))
        >>> stats.accuracy(), stats.mean_confidence(), stats.ece(), stats.brier()
        (0.5, 0.6875, 0.1875, 0.453125)
    """

    # Metrics of calibration

    def ece(self, *, norm: str = "l1", binning: str = "width", debias: bool = False, reduce: str = "pooled") -> float:
        """Expected calibration error: the distance of accuracy and confidence over the bins. In 0..1.

        Args:
            norm: "l1", mean of |accuracy - confidence| weighted by pixels; "l2", root of the mean square; "max", the largest.
            binning: bins of equal "width", or of equal "mass" (adaptive; from the fine cells).
            debias: with "l2", subtract what the bins' own sampling noise adds.
            reduce: "pooled" over all pixels; "image_mean", the mean of the images' own errors (needs `per_image`), in which
                a small image counts as much as a large one and images without valid pixels do not.

        Raises:
            ValueError: another choice. RuntimeError: "image_mean" without `per_image`.

        Sources: Naeini et al. (AAAI 2015); Guo et al. (ICML 2017); "mass" Nixon et al. (CVPRW 2019); "l2" and `debias` Kumar
        et al. (NeurIPS 2019); "image_mean" Ding et al. (ICCV 2021).
        """
        check_choice("ece", "reduce", reduce, ("pooled", "image_mean"))
        options: Dict[str, Any] = {"norm": norm, "binning": binning, "debias": debias}
        if reduce == "pooled":
            return float(figures.ece(self._counts, **options))
        self._need_images("ece with reduce='image_mean'")
        if not self._images:
            return math.nan
        errors = figures.ece(CountsOfImages(pack(self._images, self._totals), self._settings), **options)
        errors = errors[~np.isnan(errors)]
        return math.fsum(errors) / len(errors) if len(errors) else math.nan

    def mce(self, *, binning: str = "width") -> float:
        """Maximum calibration error, `ece(norm="max")`: a single pixel in a bin of its own can set it. In 0..1."""
        return self.ece(norm="max", binning=binning)

    def ks(self) -> float:
        """Kolmogorov-Smirnov calibration error, which has no bins; see `ordered.ks`. In 0..1, to the width of a cell."""
        return float(figures.ks(self._counts))

    def smece(self) -> float:
        """Smooth calibration error; see `smooth.smece`. In 0..1, to the width of a cell."""
        return float(figures.smece(self._counts))

    def classwise_ece(
        self, average: Optional[str] = "macro", *, norm: str = "l1", binning: str = "width"
    ) -> Union[float, Tensor]:
        """Calibration error of every class's probability, over all pixels and not only where that class is predicted. In 0..1.

        Args:
            average: "macro", the mean over the classes that are not ignored; "prevalence", weighted by their share of the
                target; None, all of them, (C,) float64, NaN for an ignored one. Most pixels have a probability near 0 of most
                classes, which makes the mean small.
            norm, binning: see `ece`.

        Raises:
            ValueError: another choice. RuntimeError: without `classwise`.

        Sources: Kull et al., Beyond temperature scaling (NeurIPS 2019); "mass" Nixon et al. (CVPRW 2019).
        """
        if average not in ("macro", "prevalence", None):
            expected = "average to be 'macro', 'prevalence' or None"
            raise problem("classwise_ece", expected=expected, got=repr(average), remedy="choose one, for example 'macro'")
        classes = range(self.num_classes)
        errors = np.array([float(calibration_error(self._class_bins(c, binning), norm=norm)) for c in classes])
        errors[list(self.ignored_classes)] = math.nan
        if average is None:
            return torch.from_numpy(errors)
        if not self.pixels:
            return math.nan
        counted = [c for c in classes if c not in self.ignored_classes]
        weights = self.class_pixels().numpy()[counted] if average == "prevalence" else None
        return float(np.average(errors[counted], weights=weights))

    def brier(self) -> float:
        """Brier score: mean over the pixels of the sum over all classes of (probability - target)^2. In 0..2.

        Source: Brier (Monthly Weather Review 1950), in its original form, twice the one for two classes.
        """
        self._need_distribution("brier")
        return float(figures.brier(self._counts))

    def nll(self) -> float:
        """Mean negative log-likelihood of the target, in nats; infinite where a true class has probability 0."""
        self._need_distribution("nll")
        return float(figures.nll(self._counts))

    def aurc(self) -> float:
        """Area under the risk-coverage curve: how well confidence ranks right before wrong; see `ordered.aurc`. In 0..1,
        to the width of a cell."""
        return float(figures.aurc(self._counts))

    def mean_confidence(self) -> float:
        """Mean of the largest probability over the pixels; above `accuracy`, a network is overconfident. In 0..1."""
        return float(figures.mean_confidence(self._counts))

    # Metrics of segmentation

    def accuracy(self) -> float:
        """Share of the pixels whose most probable class is the target. In 0..1."""
        return float(figures.accuracy(self._counts))

    def confusion(self) -> Tensor:
        """Pixels by target (row) and predicted class: (C, C) int64."""
        return self._totals.confusion.cpu().clone()

    def class_pixels(self) -> Tensor:
        """Target pixels of every class: (C,) int64."""
        return self.confusion().sum(1)

    def predicted_confidence(self) -> Tensor:
        """Mean confidence of the pixels predicted as each class: (C,) float64 in 0..1, NaN for one that is never predicted.

        What it should equal is the precision of the class, `confusion().diag() / confusion().sum(0)`.
        """
        predicted = self._totals.confusion.sum(0).cpu().double()
        return self._totals.predicted_confidence.cpu() / torch.where(predicted > 0, predicted, predicted * math.nan)

    def iou(self) -> Tensor:
        """Intersection over union of every class, pooled over all images: (C,) float64, NaN for a class in neither and for an
        ignored one."""
        return torch.from_numpy(figures.iou(self._counts))

    def miou(self) -> float:
        """Mean of `iou` over the classes that occur in target or prediction and are not ignored. In 0..1.

        Source: the PASCAL VOC measure (Everingham et al., IJCV 2010).
        """
        return float(figures.miou(self._counts))

    # Everything at once

    def compute(self) -> Dict[str, float]:
        """Every metric of the catalogue that `input` and `classwise` allow, by its name, in the catalogue's order."""
        return {key: float(getattr(self, key)()) for key, metric in CATALOGUE.items() if self._has(metric)}

    def remarks(self, class_names: Optional[Sequence[str]] = None) -> List[str]:
        """What to know beside the figures, in sentences: classes that no target pixel has, and a share of ignored pixels above
        20 %.

        Args:
            class_names: C of them; numbers by default.

        Raises:
            ValueError: another number of names.

        Example:
            >>> stats = CalibrationStats(3, input="logits")
            >>> stats.update(torch.zeros(1, 3, 1, 4), torch.tensor([[[0, 1, 0, 255]]]))
            >>> stats.remarks(["road", "sidewalk", "rider"])[0]
            '1 of 3 classes has no target pixel: rider.'
            >>> stats.remarks()[1]
            '25.0 % of the pixels are ignored (1 of 4; labels 255).'
        """
        return remarks(self._totals, self._settings, class_names)

    def selective(self, thresholds: Sequence[float]) -> ThresholdTable:
        """How many pixels have at least a confidence, and how many of them are right; see `selective.selective`.

        Args:
            thresholds: of confidence, in 0..1; kept to the width of a cell.

        Raises:
            ValueError: no threshold, or one outside 0..1.

        Source: Geifman & El-Yaniv (NIPS 2017).
        """
        return selective(self._counts.cells, thresholds)

    def reliability(self, *, binning: str = "width", of_class: Optional[int] = None) -> ReliabilityTable:
        """The reliability diagram as numbers.

        Args:
            binning: bins of equal "width" or "mass".
            of_class: of the probability of this class (and the share of pixels that are of it) instead of the confidence.

        Raises:
            ValueError: another choice. RuntimeError: `of_class` without `classwise`.
        """
        if of_class is None:
            cells, grid = self._counts.cells, self._grid
            bins = self._binned(cells, grid, binning)
        else:
            of_class = as_whole("reliability", "of_class", of_class, low=0, high=self.num_classes - 1)
            bins = self._class_bins(of_class, binning)
            cells, grid = self._class_cells(of_class), self._class_grid
        edges = np.arange(self._settings.n_bins + 1) / self._settings.n_bins
        if binning == "mass":
            below = np.concatenate([[0.0], np.cumsum(cells.pixels)])
            edges = np.interp(below[-1] * edges, below, grid.edges) if below[-1] else edges
        return tabulate(bins, edges, whole=binning == "width")

    @overload
    def bootstrap(
        self,
        metric: Union[str, _Measure] = "ece",
        *,
        replicates: int = 1000,
        level: float = 0.95,
        generator: Optional[torch.Generator] = None,
        progress: bool = False,
        **options: Any,
    ) -> Bootstrap: ...

    @overload
    def bootstrap(
        self,
        metric: Union[List[str], Tuple[str, ...]],
        *,
        replicates: int = 1000,
        level: float = 0.95,
        generator: Optional[torch.Generator] = None,
        progress: bool = False,
    ) -> Dict[str, Bootstrap]: ...

    def bootstrap(
        self,
        metric: Union[str, _Measure, List[str], Tuple[str, ...]] = "ece",
        *,
        replicates: int = 1000,
        level: float = 0.95,
        generator: Optional[torch.Generator] = None,
        progress: bool = False,
        **options: Any,
    ) -> Union[Bootstrap, Dict[str, Bootstrap]]:
        """Percentile interval of a metric, from images drawn with replacement: pixels of one image are not independent.

        The same generator gives the same draws, whatever the metric. So of two networks judged on the same images in the same
        order, `b.bootstrap(...).samples - a.bootstrap(...).samples` are paired differences.

        Args:
            metric: the name of a method, in `catalogue` and not class-wise, called with `options`; a list of names, all of them
                computed on the same draws; or a function of a `CalibrationStats`, which has every draw counted out: slower.
            replicates: how many draws of as many images as there are.
            level: the share of the draws inside the interval.
            generator: of the draws, on the CPU; by default one with seed 0, so that the interval is reproducible.
            progress: show a bar on standard error.

        Returns:
            a `Bootstrap`, and of a list one for each name.

        Raises:
            RuntimeError: without `per_image`, without an image, or for what images do not keep (`classwise_ece`).
            ValueError: another metric, or a number outside its range.

        Source: Efron (Annals of Statistics 1979).
        """
        self._need_images("bootstrap")
        replicates = as_whole("bootstrap", "replicates", replicates, low=1)
        check_number("bootstrap", "level", level, low=0.0, high=1.0, rule="in 0..1")
        names = [metric] if isinstance(metric, str) else list(metric) if isinstance(metric, (list, tuple)) else []
        for name in names:
            check_choice("bootstrap", "metric", name, _BOOTSTRAPPED)
        if not isinstance(metric, str) and (options or not (names or callable(metric))):
            expected = "metric: the name of a method, with its options, or names or a function of a CalibrationStats, without"
            got = f"{type(metric).__name__} and {options}"
            raise problem("bootstrap", expected=expected, got=got, remedy="put the options into the function", error=TypeError)
        if options.pop("reduce", "pooled") == "image_mean":
            remedy = "average ece() of one CalibrationStats an image yourself"
            raise problem("bootstrap", expected="a metric of pooled pixels", got="reduce='image_mean'", remedy=remedy)
        if not self._images:
            raise problem("bootstrap", expected="at least one image", got="none", remedy="call update", error=RuntimeError)
        generator = torch.Generator().manual_seed(0) if generator is None else generator
        counts = CountsOfImages(pack(self._images, self._totals), self._settings)
        measures: Dict[str, Callable[[Drawn], Iterable[float]]]
        if callable(metric):
            measures, estimates = {"": self._one_by_one(metric, counts)}, {"": metric(self)}
        else:
            measures = {name: functools.partial(FIGURES[name], **options) for name in names}
            estimates = {name: getattr(self, name)(**options) for name in names}
        samples: Dict[str, List[float]] = {name: [] for name in measures}
        with ExitStack() as stack:
            bar = stack.enter_context(Progress("resampling images", replicates)) if progress else None
            for weights in draws(len(self._images), replicates, generator):
                drawn = Drawn(counts, weights)
                for name, measure in measures.items():
                    samples[name].extend(measure(drawn))
                if bar is not None:
                    for _ in weights:
                        bar.advance()
        found = {
            name: Bootstrap(estimates[name], *percentile_interval(column, level), torch.tensor(column, dtype=torch.float64))
            for name, column in samples.items()
        }
        return found if isinstance(metric, (list, tuple)) else next(iter(found.values()))

    # Inner parts

    @property
    def _counts(self) -> CountsOfTotals:
        return CountsOfTotals(self._totals, self._settings)

    @property
    def _grid(self) -> Grid:
        return make_grid(self._settings.n_bins, self._settings.fine_bins, both_ends=False)

    @property
    def _class_grid(self) -> Grid:
        return make_grid(self._settings.n_bins, self._settings.fine_bins, both_ends=True)

    def _class_cells(self, c: int) -> Cells:
        if not self._settings.classwise:
            remedy = "construct CalibrationStats with classwise=True"
            expected, got = "counts of every class's probability", "classwise=False"
            raise problem("classwise_ece", expected=expected, got=got, remedy=remedy, error=RuntimeError)
        counts = self._totals
        columns = (counts.class_pixels, counts.class_hits, counts.class_confidence)
        return Cells(*(figures.as_floats(column[c]) for column in columns))

    def _class_bins(self, c: int, binning: str) -> Cells:
        return self._binned(self._class_cells(c), self._class_grid, binning)

    def _binned(self, cells: Cells, grid: Grid, binning: str) -> Cells:
        check_choice("CalibrationStats", "binning", binning, ("width", "mass"))
        return width_bins(cells, grid.bin_of_cell) if binning == "width" else mass_bins(cells, self._settings.n_bins)

    def _one_by_one(self, measure: _Measure, counts: CountsOfImages) -> Callable[[Drawn], Iterable[float]]:
        """The measure of a statistics of each draw."""
        one = copy.copy(self)
        one._settings, one.per_image, one._images = self._settings._replace(classwise=False), False, []
        one.device = torch.device("cpu")

        def of_each(drawn: Drawn) -> List[float]:
            samples = []
            for weights in drawn.weights:
                one._totals = counts.totals(weights)
                samples.append(float(measure(one)))
            return samples

        return of_each

    def _has(self, metric: Metric) -> bool:
        return not (metric.distribution and self.input == "top1") and (not metric.classwise or self._settings.classwise)

    def _need_images(self, function: str) -> None:
        if not self.per_image:
            remedy = "construct CalibrationStats with per_image=True"
            raise problem(function, expected="counts of every image", got="per_image=False", remedy=remedy, error=RuntimeError)

    def _need_distribution(self, function: str) -> None:
        if self.input == "top1":
            remedy = "save logits or probabilities"
            raise problem(
                function, expected="the probability of every class", got="input='top1'", remedy=remedy, error=RuntimeError
            )
