"""All images of an evaluation, several at a time, through `CalibrationStats`."""

import os
import re
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Callable, Deque, List, NamedTuple, Optional, Sequence, Tuple, TypeVar, Union

import numpy as np
import torch

from ..metrics import CalibrationStats, boundary_mask
from ..progress import Progress
from .doubts import label_doubts, like_probabilities, probabilities
from .files import BadFile, first_line
from .images import JPEG
from .labels import read_label
from .options import EvaluateOptions
from .plan import Plan, check_both, new_stats
from .predictions import Prediction, read_prediction
from .shapes import Shape
from .wording import as_options

_Result = TypeVar("_Result")
# How errors begin that `_check.problem` makes: of `CalibrationStats.update`, of `resized_scores`, of `two_channels`.
_CHECKS = re.compile("(update|evaluate|two_channels): expected ")


class ImageRow(NamedTuple):
    """One image of the report."""

    name: str
    pixels: int
    accuracy: float
    mean_confidence: float
    ece: float
    miou: float


class Results(NamedTuple):
    """What was found, for the report."""

    stats: CalibrationStats
    boundary: Optional[CalibrationStats]
    images: List[ImageRow]
    skipped: List[BadFile]
    class_names: List[str]
    remarks: List[str]
    """On files, names and labels, as sentences; nothing that the figures themselves say."""
    seconds: float
    """Of several networks judged together, this one's part of the whole."""
    reading_seconds: float
    """Summed over the threads that read and judge, as the next one."""
    judging_seconds: float
    jobs: int


class _Judged(NamedTuple):
    row: ImageRow
    stats: CalibrationStats
    boundary: Optional[CalibrationStats]
    like_probabilities: bool
    reading_seconds: float
    judging_seconds: float


class _Sums:
    """All images of one network so far."""

    def __init__(self, plan: Plan, options: EvaluateOptions) -> None:
        self.total = new_stats(plan, options)
        self.near = new_stats(plan, options) if options.boundary else None
        self.rows: List[ImageRow] = []
        self.like_probabilities = True
        self.reading = self.judging = 0.0

    def add(self, judged: _Judged) -> None:
        """Add an image."""
        self.total.merge(judged.stats)
        if self.near is not None and judged.boundary is not None:
            self.near.merge(judged.boundary)
        self.rows.append(judged.row)
        self.like_probabilities &= judged.like_probabilities
        self.reading += judged.reading_seconds
        self.judging += judged.judging_seconds


def judge_all(plan: Plan, options: EvaluateOptions) -> Results:
    """Judge every image of one network; see `judge_together`."""
    return judge_together([(plan, options)])[0]


def judge_together(networks: Sequence[Tuple[Plan, EvaluateOptions]]) -> List[Results]:
    """Judge every image in each of the networks, several at a time in threads of their own, and sum up in order.

    An image that is bad in one of them is left out of all. Their options differ in `predictions` alone.

    Raises:
        BadFile: the first bad file, unless `keep_going`; labels or logits that plainly are something else, unless `trust`.
    """
    options = networks[0][1]
    sums = [_Sums(*network) for network in networks]
    names = sorted({name for plan, _ in networks for name in (*plan.predictions, *plan.labels)})
    jobs = options.jobs or os.cpu_count() or 1
    skipped: List[BadFile] = []
    begun = time.perf_counter()
    waiting: Deque[Future[List[Union[_Judged, BadFile]]]] = deque()
    # One image a thread: threads inside an operation would wait for each other at every one of its pieces.
    pool = ThreadPoolExecutor(jobs, initializer=torch.set_num_threads, initargs=(1,))
    try:
        with Progress("evaluating", len(names)) as bar:
            left = iter(names)
            while True:
                while len(waiting) <= jobs:  # so that memory holds no more than `jobs` predictions, and none waits
                    name = next(left, None)
                    if name is None:
                        break
                    waiting.append(pool.submit(_judge_in_each, name, networks))
                if not waiting:
                    break
                found = waiting.popleft().result()
                bad = [one for one in found if isinstance(one, BadFile)]
                if bad and not options.keep_going:
                    raise bad[0]
                skipped += bad
                for own, judged in zip(sums, found if not bad else []):
                    if isinstance(judged, _Judged):
                        own.add(judged)
                bar.advance()
    finally:
        for future in waiting:
            future.cancel()
        pool.shutdown(wait=True)
    seconds = time.perf_counter() - begun
    busy = sum(own.reading + own.judging for own in sums)
    results = []
    for (plan, its), own in zip(networks, sums):
        remarks = plan.remarks + _doubts(own, plan, its)
        share = (own.reading + own.judging) / busy if busy else 1 / len(sums)
        times = seconds * share, own.reading, own.judging
        results.append(Results(own.total, own.near, own.rows, skipped, plan.class_names, remarks, *times, jobs))
    return results


def _doubts(sums: _Sums, plan: Plan, options: EvaluateOptions) -> List[str]:
    if options.trust:
        return []
    total = sums.total
    if sums.like_probabilities and total.pixels and plan.input == "logits":
        raise BadFile(options.predictions, f"{probabilities()}; or --trust if they are logits")
    mapped = plan.label_kind.map is not None
    found = label_doubts(total.confusion(), total.ignored_pixels, reduced=options.reduce_zero_label, mapped=mapped)
    for doubt in found:
        if doubt.plain:
            raise BadFile(options.labels, f"{doubt.what}; or --trust if they are meant as they are")
    return [f"{doubt.what}; --trust says that they are meant as they are" for doubt in found]


def read_image(name: str, plan: Plan, options: EvaluateOptions) -> Tuple[Prediction, np.ndarray]:
    """One image's prediction, (1, C, *S) or a pair of (1, H, W), and its labels as `read_label` gives them, (1, *S) int64.

    A label of a first dimension of one loses it, and so do its scores, volumes of one slice as well as batches of one.

    Raises:
        BadFile: one of them is missing or bad; a value of the label is no class and not ignored.
    """
    check_both(name, plan, options)
    path = plan.predictions[name]
    label_path = plan.labels[name]
    kind = plan.label_kind
    label = _guarded(label_path, lambda: read_label(label_path, folder=options.labels, kind=kind))
    one_slice = label.ndim > 2 and label.shape[0] == 1
    label = label[0] if one_slice else label
    counted = counts(label, kind.uncounted)
    _check_classes(label_path, label[counted], plan, options)
    low = options.upsample is not None
    shape = Shape(options.num_classes, label.shape, options.one_channel, options.channels_last, low, one_slice, label_path)
    folder = options.predictions if options.predictions.is_dir() else options.predictions.parent
    prediction_kind = plan.prediction_kind
    found = _guarded(path, lambda: read_prediction(path, folder=folder, shape=shape, kind=prediction_kind, counted=counted))
    return found, label[None]


def counts(label: np.ndarray, uncounted: Sequence[int]) -> np.ndarray:
    """Whether a label is none of those that do not count: bool.

    >>> counts(np.array([0, 1, 255]), (0, 255)).tolist()
    [False, True, False]
    """
    found = np.ones(label.shape, bool)
    for one in uncounted:
        found &= label != one
    return found


def _check_classes(path: Path, label: np.ndarray, plan: Plan, options: EvaluateOptions) -> None:
    """`BadFile` for a label that counts and is no class."""
    classes, kind = options.num_classes, plan.label_kind
    found = np.unique(label[(label < kind.first) | (label >= kind.first + classes)])
    if not len(found):
        return
    remedy = "pass --label-map for raw ids, or --ignore-index for a label that does not count"
    if path.suffix.lower() in JPEG:
        remedy = "JPEG changes numbers: save labels as PNG"
    elif kind.map is not None or kind.reduce_zero:
        remedy = "is it another kind of file?"
    elif classes == 2 and found.tolist() == [255]:
        remedy = "for masks of 0 and 255 pass --label-map binary"
    elif found.tolist() == [classes]:
        remedy = "pass --reduce-zero-label if 0 is unlabelled and classes begin with 1, --label-map for raw ids"
    elif classes == 19 and found.max() <= 33:
        remedy = "pass --label-map cityscapes for its raw ids, or mapillary, or a file"
    ids = f"{kind.first}..{kind.first + classes - 1} or {' or '.join(map(str, kind.uncounted))}"
    raise BadFile(path, f"expected classes {ids}, got the value {found[0]}; {remedy}")


def _judge_in_each(name: str, networks: Sequence[Tuple[Plan, EvaluateOptions]]) -> List[Union[_Judged, BadFile]]:
    found: List[Union[_Judged, BadFile]] = []
    for plan, options in networks:
        try:
            found.append(_judge(name, plan, options))
        except BadFile as error:
            found.append(error)
    return found


def _judge(name: str, plan: Plan, options: EvaluateOptions) -> _Judged:
    """Read one image's prediction and label and count it by itself."""
    begun = time.perf_counter()
    prediction, label = read_image(name, plan, options)
    path = plan.predictions[name]
    read = time.perf_counter()
    ignored = plan.label_kind.uncounted
    stats = new_stats(plan, options)
    near = new_stats(plan, options) if options.boundary else None
    _guarded(path, lambda: stats.update(prediction, label, normalize=options.normalize))
    if near is not None:
        region = boundary_mask(label, options.boundary, ignore_index=ignored)
        _guarded(path, lambda: near.update(prediction, label, region, normalize=options.normalize))
    like = plan.input == "logits" and not options.trust and like_probabilities(prediction, counts(label, ignored))
    row = ImageRow(name, stats.pixels, stats.accuracy(), stats.mean_confidence(), stats.ece(), stats.miou())
    return _Judged(row, stats, near, like, read - begun, time.perf_counter() - read)


def _guarded(path: Path, work: Callable[[], _Result]) -> _Result:
    """The result, or a `BadFile` that names the file for what it is to blame for: the other files can still be evaluated."""
    try:
        return work()
    except Exception as error:
        if not _of_file(error):
            raise
        raise BadFile(path, as_options(first_line(error))) from error


def _of_file(error: Exception) -> bool:
    """Whether a file can have made it: reading failed, it takes too much memory, or a check of what was read speaks."""
    if isinstance(error, RuntimeError):
        return bool(re.search("alloc.*memory|not enough memory", str(error)))  # torch's own kind of MemoryError
    if isinstance(error, (ValueError, TypeError)):
        return bool(_CHECKS.match(str(error)))
    return isinstance(error, (OSError, MemoryError, OverflowError))
