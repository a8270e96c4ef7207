"""Calibration statistics of any number of images in constant memory."""

import functools
import math
from operator import methodcaller
from typing import Any, Callable, Dict, List, Optional, Tuple, TypeVar, Union, cast

import numpy as np
import torch
from torch import Tensor

from .._check import as_whole, check_choice, check_number, describe, problem
from ..ranks import Ranks
from . import ordered, smooth
from . import totals as _totals
from .arrays import Array, Predictions, as_batch
from .binned import NORMS, Cells, ReliabilityTable, calibration_error, mass_bins, tabulate, width_bins
from .bootstrap import Bootstrap, percentile_interval, resampled
from .catalogue import CATALOGUE
from .grid import Grid, cell_count, make_grid
from .pixels import Judge, Settings, count_, fault, judge
from .totals import Totals

INPUTS = ("logits", "probs", "log_probs", "top1")
_Method = TypeVar("_Method", bound=Callable[..., Any])
# Images keep no class-wise counts.
_BOOTSTRAPPED = [key for key, metric in CATALOGUE.items() if not metric.classwise]
# The confusion matrix has the square of it.
_MOST_CLASSES = 4096
_MOST_BINS = 10_000


def _counting(method: _Method) -> _Method:
    """Without graphs, and with tensors that can be written to later: evaluation loops run in `torch.inference_mode`."""

    @functools.wraps(method)
    def inner(*arguments: Any, **options: Any) -> Any:
        with torch.no_grad():
            if not hasattr(torch, "inference_mode"):
                return method(*arguments, **options)
            with torch.inference_mode(False):
                return method(*arguments, **options)

    return cast(_Method, inner)


class CalibrationStats:
    """Counts pixels by their confidence, exactly and in constant memory, and gives every metric of them.

    Args:
        num_classes: C >= 2.
        input: what `update` gets: "logits", "probs" (they sum to 1 over C), "log_probs", or "top1", a pair (confidence,
            predicted class), which has no NLL, Brier score or class-wise errors. Nothing is guessed from the values.
        ignore_index: the label of pixels that do not count; it may be one of the classes.
        n_bins: bins of the reliability diagram and of ECE, at most 10,000.
        fine_bins: cells for equal mass, KS, smooth ECE and AURC, which take pixels of one cell for equal: a power of two from
            256 to 65536. With 4096, a cell is 0.0005 wide, and towards 1 half a percent of the doubt.
        classwise: count the probability of every class too, for `classwise_ece`; four to eight times slower.
        per_image: keep the counts of every image (150 KB each with the defaults), for `bootstrap` and image means.
        device: of the counts; pixels are judged on the device they are on.
        compile: judge pixels with `torch.compile` (torch >= 2.0 and, on a CPU, a C++ compiler; some seconds at the first call).

    Memory: the counts (150 KB with the defaults) and a few MB of scratch (on a GPU, by estimate, 120), whatever the size and
    number of images.
    Precision: scores are taken as float64, whatever they are, counts are int64 and sums float64, so that the split into
    batches and their order do not matter. Predictions are the first largest score, as `argmax`.

    Raises:
        ValueError: a number outside its range.
        RuntimeError: `compile` without `torch.compile`.

    Example:
        >>> stats = CalibrationStats(2, input="probs", n_bins=2)
        >>> for p, label in [((0.75, 0.25), 0), ((0.625, 0.375), 1)]:  # one image each
        ...     stats.update(torch.tensor(p).view(1, 2, 1, 1), torch.full((1, 1, 1), label))
        >>> stats.accuracy(), stats.mean_confidence(), stats.ece(), stats.brier()
        (0.5, 0.6875, 0.1875, 0.453125)
    """

    def __init__(
        self,
        num_classes: int,
        *,
        input: str,
        ignore_index: int = 255,
        n_bins: int = 15,
        fine_bins: int = 4096,
        classwise: bool = False,
        per_image: bool = False,
        device: Union[str, torch.device, None] = None,
        compile: bool = False,
    ) -> None:
        name = "CalibrationStats"
        as_whole(name, "num_classes", num_classes, low=2, high=_MOST_CLASSES)
        check_choice(name, "input", input, INPUTS)
        as_whole(name, "n_bins", n_bins, low=1, high=_MOST_BINS)
        as_whole(name, "ignore_index", ignore_index, low=-(1 << 52), high=1 << 52)
        as_whole(name, "fine_bins", fine_bins, low=1)
        if fine_bins not in {1 << power for power in range(8, 17)}:
            remedy = "take 4096, or more for many classes"
            raise problem(name, expected="fine_bins: a power of two from 256 to 65536", got=repr(fine_bins), remedy=remedy)
        if classwise and input == "top1":
            remedy = "pass probabilities or logits, or classwise=False"
            raise problem(
                name, expected="the probability of every class with classwise=True", got="input='top1'", remedy=remedy
            )
        self._settings = Settings(num_classes, input, ignore_index, n_bins, fine_bins, classwise)
        self.per_image = per_image
        self.device = torch.device("cpu" if device is None else device)
        self.compile = compile
        self._compiled = _compile(name) if compile else None
        self._synced = False
        self._totals = self._zeros(self.device)
        self._images: List[Totals] = []

    # What it is

    @property
    def num_classes(self) -> int:
        """C."""
        return self._settings.num_classes

    @property
    def input(self) -> str:
        """What `update` gets."""
        return self._settings.input

    @property
    def pixels(self) -> int:
        """Valid pixels so far."""
        return int(self._totals.pixels.sum())

    @property
    def images(self) -> int:
        """Images so far, with or without valid pixels."""
        return int(self._totals.images)

    def __getstate__(self) -> Dict[str, Any]:
        return {**self.__dict__, "_compiled": None}  # a compiled function cannot be pickled

    def __setstate__(self, state: Dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._compiled = _compile("CalibrationStats") if self.compile else None

    def __repr__(self) -> str:
        settings = {**self._settings._asdict(), "per_image": self.per_image}
        listed = ", ".join(f"{key}={value!r}" for key, value in settings.items())
        return f"CalibrationStats({listed}): {self.images} images, {self.pixels} pixels"

    # Counting

    @_counting
    def update(self, x: Predictions, target: Array, region: Optional[Array] = None) -> None:
        """Count a batch; torch or numpy, on any device, contiguous or not. Nothing is kept of it but counts.

        Args:
            x: (N, C, H, W) floating, what `input` says; for "top1" a pair of (N, H, W), floating in 0..1 and integer.
            target: (N, H, W) integers: classes, or `ignore_index`.
            region: (N, H, W) bool, the pixels to count, for example `boundary_mask(target, 3)`; all if None.

        Raises:
            ValueError: another shape; NaN or infinity, probabilities that do not sum to 1, stray labels, at a pixel that
                counts. Nothing of the batch has been counted then.
            TypeError: another kind of array.
            RuntimeError: the counts were already summed over the processes by `sync`.
        """
        if self._synced:
            remedy = "call reset() first; the other processes would not learn of this batch"
            raise problem(
                "update", expected="counts of this process alone", got="counts after sync()", remedy=remedy, error=RuntimeError
            )
        scores, label, judged = as_batch("update", x, target, region, num_classes=self.num_classes, input=self.input)
        parts = [slice(i, i + 1) for i in range(len(label))] if self.per_image else [slice(None)]
        counted = []
        for part in parts:
            counts = self._zeros(label.device)
            one = scores[part] if isinstance(scores, Tensor) else (scores[0][part], scores[1][part])
            batch = one, label[part], None if judged is None else judged[part]
            if not count_(counts, *batch, self._settings, self._compiled):
                raise fault(*batch, self._settings, function="update")
            counted.append(Totals(*(field.to(self.device) for field in counts)))
        for counts in counted:
            _totals.add_(self._totals, counts)
        if self.per_image:
            self._images += [_totals.without_classes(counts) for counts in counted]

    @_counting
    def merge(self, other: "CalibrationStats") -> None:
        """Add what another one has counted, with the same settings; its images follow after this one's.

        Raises:
            ValueError: other settings. TypeError: something else. RuntimeError: only one of them has been summed by `sync`.
        """
        if not isinstance(other, CalibrationStats):
            remedy = "pass a CalibrationStats"
            raise problem("merge", expected="a CalibrationStats", got=type(other).__name__, remedy=remedy, error=TypeError)
        if (self._settings, self.per_image) != (other._settings, other.per_image):
            raise problem("merge", expected=repr(self), got=repr(other), remedy="construct both with the same settings")
        if self._synced != other._synced:
            remedy = "merge before sync(), or after it on both"
            got = "counts of one process and of all"
            raise problem("merge", expected="both before sync() or both after it", got=got, remedy=remedy, error=RuntimeError)
        images = [Totals(*(field.to(self.device) for field in one)) for one in other._images]
        _totals.add_(self._totals, other._totals)
        self._images += images

    @_counting
    def sync(self, group: Any = None) -> None:
        """Sum over all processes of a group of `torch.distributed`, in place, so that each has the counts of all.

        By all-reduces (SUM) alone. Every process of the group has to call it, also one that has counted nothing. Images
        follow in the order of the ranks. Without `torch.distributed` initialised, nothing happens.

        Raises:
            RuntimeError: called twice, which would count everything several times; `reset` first.
        """
        ranks = Ranks(group)
        if ranks.size == 1:
            return
        if self._synced:
            remedy = "call reset() before the next epoch's updates"
            raise problem(
                "sync", expected="counts that were not summed yet", got="a second call", remedy=remedy, error=RuntimeError
            )
        self._check_same_settings(ranks)
        counts = Totals(*(ranks.total(field) for field in self._totals))
        images = []
        if self.per_image:
            # Every process puts its images into a place of their own, and the sum puts them together.
            lengths = torch.zeros(ranks.size, dtype=torch.int64)
            lengths[ranks.rank] = len(self._images)
            lengths = ranks.total(lengths)
            begin = int(lengths[: ranks.rank].sum())
            stacked = []
            for field in _totals.stack(self._images, like=_totals.without_classes(self._totals)):
                everyones = field.new_zeros((int(lengths.sum()), *field.shape[1:]))
                everyones[begin : begin + len(field)] = field
                stacked.append(ranks.total(everyones))
            images = _totals.unstack(Totals(*stacked))
        self._totals, self._images, self._synced = counts, images, True

    def reset(self) -> None:
        """Forget everything that was counted."""
        self._totals, self._images, self._synced = self._zeros(self.device), [], False

    def state_dict(self) -> Dict[str, Any]:
        """Settings and counts, as plain values and tensors; for `torch.save`."""
        images = _totals.stack(self._images, like=_totals.without_classes(self._totals))
        return {
            "settings": {**self._settings._asdict(), "per_image": self.per_image},
            "totals": {name: field.clone() for name, field in self._totals._asdict().items()},
            "images": images._asdict(),
            "synced": self._synced,
        }

    @_counting
    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """Put back what `state_dict` gave; the counts so far are dropped.

        Raises:
            ValueError: counts of other settings, or of other shapes and kinds. KeyError: not such a state.
        """
        mine = {**self._settings._asdict(), "per_image": self.per_image}
        if state["settings"] != mine:
            remedy = "construct it with the settings of the saved one"
            raise problem("load_state_dict", expected=f"counts for {mine}", got=f"for {state['settings']}", remedy=remedy)
        like = self._zeros(torch.device("cpu"))
        few = _totals.without_classes(like)
        length = int(state["totals"]["images"]) if self.per_image else 0
        counts = Totals(*(self._loaded(state["totals"], name, field, ()) for name, field in like._asdict().items()))
        images = Totals(*(self._loaded(state["images"], name, field, (length,)) for name, field in few._asdict().items()))
        self._totals, self._images, self._synced = counts, _totals.unstack(images), bool(state["synced"])

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
        check_choice("ece", "norm", norm, NORMS)
        check_choice("ece", "reduce", reduce, ("pooled", "image_mean"))
        if debias and norm != "l2":
            raise problem("ece", expected="norm='l2' with debias=True", got=f"norm={norm!r}", remedy="pass norm='l2'")
        if reduce == "pooled":
            return calibration_error(self._bins(self._totals, binning), norm=norm, debias=debias)
        self._need_images("ece with reduce='image_mean'")
        errors = [calibration_error(self._bins(one, binning), norm=norm, debias=debias) for one in self._images]
        errors = [error for error in errors if not math.isnan(error)]
        return math.fsum(errors) / len(errors) if errors else math.nan

    def mce(self, *, binning: str = "width") -> float:
        """Maximum calibration error, `ece(norm="max")`: a single pixel in a bin of its own can set it. In 0..1."""
        return self.ece(norm="max", binning=binning)

    def ks(self) -> float:
        """Kolmogorov-Smirnov calibration error, which has no bins; see `ordered.ks`. In 0..1, to the width of a cell."""
        return ordered.ks(self._cells(self._totals))

    def smece(self) -> float:
        """Smooth calibration error; see `smooth.smece`. In 0..1, to the width of a cell."""
        return smooth.smece(self._cells(self._totals))

    def classwise_ece(
        self, average: Optional[str] = "macro", *, norm: str = "l1", binning: str = "width"
    ) -> Union[float, Tensor]:
        """Calibration error of every class's probability, over all pixels and not only where that class is predicted. In 0..1.

        Args:
            average: "macro", the mean over the classes; "prevalence", weighted by their share of the target; None, all of
                them, (C,) float64. Most pixels have a probability near 0 of most classes, which makes the mean small.
            norm, binning: see `ece`.

        Raises:
            ValueError: another choice. RuntimeError: without `classwise`.

        Sources: Kull et al., Beyond temperature scaling (NeurIPS 2019); "mass" Nixon et al. (CVPRW 2019).
        """
        if average not in ("macro", "prevalence", None):
            expected = "average to be 'macro', 'prevalence' or None"
            raise problem("classwise_ece", expected=expected, got=repr(average), remedy="choose one, for example 'macro'")
        check_choice("classwise_ece", "norm", norm, NORMS)
        errors = np.array([calibration_error(self._class_bins(c, binning), norm=norm) for c in range(self.num_classes)])
        if average is None:
            return torch.from_numpy(errors)
        if not self.pixels:
            return math.nan
        return float(np.average(errors, weights=self.class_pixels().numpy() if average == "prevalence" else None))

    def brier(self) -> float:
        """Brier score: mean over the pixels of the sum over all classes of (probability - target)^2. In 0..2.

        Source: Brier (Monthly Weather Review 1950), in its original form, twice the one for two classes.
        """
        self._need_distribution("brier")
        return self._mean(self._totals.brier)

    def nll(self) -> float:
        """Mean negative log-likelihood of the target, in nats; infinite where a true class has probability 0."""
        self._need_distribution("nll")
        return self._mean(self._totals.nll)

    def aurc(self) -> float:
        """Area under the risk-coverage curve: how well confidence ranks right before wrong; see `ordered.aurc`. In 0..1,
        to the width of a cell."""
        return ordered.aurc(self._cells(self._totals))

    def mean_confidence(self) -> float:
        """Mean of the largest probability over the pixels; above `accuracy`, a network is overconfident. In 0..1."""
        return self._mean(self._totals.confidence.sum())

    # Metrics of segmentation

    def accuracy(self) -> float:
        """Share of the pixels whose most probable class is the target. In 0..1."""
        return self._mean(self._totals.correct.sum())

    def confusion(self) -> Tensor:
        """Pixels by target (row) and predicted class: (C, C) int64."""
        return self._totals.confusion.cpu().clone()

    def class_pixels(self) -> Tensor:
        """Target pixels of every class: (C,) int64."""
        return self.confusion().sum(1)

    def iou(self) -> Tensor:
        """Intersection over union of every class, pooled over all images: (C,) float64, NaN for a class in neither."""
        confusion = self.confusion().double()
        intersection = confusion.diag()
        return intersection / (confusion.sum(0) + confusion.sum(1) - intersection)

    def miou(self) -> float:
        """Mean of `iou` over the classes that occur in target or prediction. In 0..1.

        Source: the PASCAL VOC measure (Everingham et al., IJCV 2010).
        """
        iou = self.iou()
        iou = iou[~torch.isnan(iou)]
        return float(iou.mean()) if len(iou) else math.nan

    # Everything at once

    def reliability(self, *, binning: str = "width", of_class: Optional[int] = None) -> ReliabilityTable:
        """The reliability diagram as numbers.

        Args:
            binning: bins of equal "width" or "mass".
            of_class: of the probability of this class (and the share of pixels that are of it) instead of the confidence.

        Raises:
            ValueError: another choice. RuntimeError: `of_class` without `classwise`.
        """
        if of_class is None:
            cells, grid = self._cells(self._totals), self._grid
            bins = self._bins(self._totals, binning)
        else:
            as_whole("reliability", "of_class", of_class, low=0, high=self.num_classes - 1)
            bins = self._class_bins(of_class, binning)
            cells, grid = self._class_cells(of_class), self._class_grid
        edges = np.arange(self._settings.n_bins + 1) / self._settings.n_bins
        if binning == "mass":
            below = np.concatenate([[0.0], np.cumsum(cells.pixels)])
            edges = np.interp(below[-1] * edges, below, grid.edges) if below[-1] else edges
        return tabulate(bins, edges, whole=binning == "width")

    def plot(self, *, title: str = "") -> Any:
        """The reliability diagram with the histogram of confidences: a matplotlib `Figure` (needs the extra `plot`)."""
        from ..plots import reliability_diagram  # here, since pictures are made from metrics and not the other way round

        return reliability_diagram({title: self.reliability()})

    def bootstrap(
        self,
        metric: Union[str, Callable[["CalibrationStats"], float]] = "ece",
        *,
        replicates: int = 1000,
        level: float = 0.95,
        generator: Optional[torch.Generator] = None,
        **options: Any,
    ) -> Bootstrap:
        """Percentile interval of a metric, from images drawn with replacement: pixels of one image are not independent.

        Args:
            metric: the name of a method, in `catalogue`, called with `options`, or a function of a `CalibrationStats`.
            replicates: how many draws of as many images as there are.
            level: the share of the draws inside the interval.
            generator: of the draws, on the CPU; by default one with seed 0, so that the interval is reproducible.

        Raises:
            RuntimeError: without `per_image`, without an image, or for what images do not keep (`classwise_ece`).
            ValueError: another metric, or a number outside its range.

        Source: Efron (Annals of Statistics 1979).
        """
        self._need_images("bootstrap")
        as_whole("bootstrap", "replicates", replicates, low=1)
        check_number("bootstrap", "level", level, low=0.0, high=1.0, rule="in 0..1")
        if isinstance(metric, str):
            check_choice("bootstrap", "metric", metric, _BOOTSTRAPPED)
            measure: Callable[[CalibrationStats], float] = methodcaller(metric, **options)
        elif callable(metric) and not options:
            measure = metric
        else:
            expected = "metric: the name of a method, with its options, or a function of a CalibrationStats, without"
            got = f"{type(metric).__name__} and {options}"
            raise problem("bootstrap", expected=expected, got=got, remedy="put the options into the function", error=TypeError)
        if options.get("reduce") == "image_mean":
            remedy = "average ece() of one CalibrationStats an image yourself"
            raise problem("bootstrap", expected="a metric of pooled pixels", got="reduce='image_mean'", remedy=remedy)
        if not self._images:
            raise problem("bootstrap", expected="at least one image", got="none", remedy="call update", error=RuntimeError)
        generator = torch.Generator().manual_seed(0) if generator is None else generator
        drawn = CalibrationStats(**self._settings._replace(classwise=False)._asdict())
        samples = []
        for counts in resampled(self._images, replicates, generator):
            drawn._totals = counts
            samples.append(measure(drawn))
        low, high = percentile_interval(samples, level)
        return Bootstrap(measure(self), low, high, torch.tensor(samples, dtype=torch.float64))

    # Inner parts

    @_counting
    def _zeros(self, device: torch.device) -> Totals:
        settings = self._settings
        cells = cell_count(settings.n_bins, settings.fine_bins)
        return _totals.zeros(settings.num_classes, cells, cells if settings.classwise else 0, device)

    @property
    def _grid(self) -> Grid:
        return make_grid(self._settings.n_bins, self._settings.fine_bins, both_ends=False)

    @property
    def _class_grid(self) -> Grid:
        return make_grid(self._settings.n_bins, self._settings.fine_bins, both_ends=True)

    def _cells(self, counts: Totals) -> Cells:
        return Cells(*(x.cpu().double().numpy() for x in (counts.pixels, counts.correct, counts.confidence)))

    def _class_cells(self, c: int) -> Cells:
        if not self._settings.classwise:
            remedy = "construct CalibrationStats with classwise=True"
            got = "classwise=False"
            raise problem(
                "classwise_ece", expected="counts of every class's probability", got=got, remedy=remedy, error=RuntimeError
            )
        counts = self._totals
        columns = (counts.class_pixels, counts.class_hits, counts.class_confidence)
        return Cells(*(x[c].cpu().double().numpy() for x in columns))

    def _bins(self, counts: Totals, binning: str) -> Cells:
        return self._binned(self._cells(counts), self._grid, binning)

    def _class_bins(self, c: int, binning: str) -> Cells:
        return self._binned(self._class_cells(c), self._class_grid, binning)

    def _binned(self, cells: Cells, grid: Grid, binning: str) -> Cells:
        check_choice("CalibrationStats", "binning", binning, ("width", "mass"))
        n_bins = self._settings.n_bins
        return width_bins(cells, grid.bin_of_cell, n_bins) if binning == "width" else mass_bins(cells, n_bins)

    def _loaded(self, saved: Dict[str, Any], name: str, like: Tensor, leading: Tuple[int, ...]) -> Tensor:
        """A copy of a saved field, which must have the kind and shape of `like` after the leading dimensions."""
        found, shape = saved[name], (*leading, *like.shape)
        if not isinstance(found, Tensor) or found.dtype != like.dtype or tuple(found.shape) != shape:
            expected = f"{name}: {str(like.dtype).replace('torch.', '')} {shape}"
            remedy = "pass what state_dict() returned"
            raise problem("load_state_dict", expected=expected, got=describe(found), remedy=remedy)
        return found.detach().to(self.device, copy=True)

    def _mean(self, total: Tensor) -> float:
        pixels = self.pixels
        return float(total) / pixels if pixels else math.nan

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

    def _check_same_settings(self, ranks: Ranks) -> None:
        numbers = [float(x) for x in (*self._settings._replace(input=str(INPUTS.index(self.input))), self.per_image)]
        mine = torch.tensor(numbers, dtype=torch.float64)
        # A sum tells the mean, which may be one's own although others differ; the squares then sum to more.
        both = torch.stack([mine, mine**2])
        if not torch.equal(ranks.total(both), ranks.size * both):
            remedy = "construct it with the same arguments everywhere"
            raise problem("sync", expected="the same settings in every process", got=repr(self), remedy=remedy)


def _compile(function: str) -> Judge:
    if not hasattr(torch, "compile"):
        remedy = "pass compile=False, or use torch >= 2.0"
        got = f"torch {torch.__version__}"
        raise problem(function, expected="torch.compile with compile=True", got=got, remedy=remedy, error=RuntimeError)
    compiled: Judge = torch.compile(judge)
    return compiled
