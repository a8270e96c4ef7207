"""All images of an evaluation, several at a time, through `CalibrationStats`."""

import os
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Callable, Deque, List, NamedTuple, Optional, Tuple, TypeVar

import numpy as np
import torch

from ..ignoring import is_ignored
from ..metrics import CalibrationStats, boundary_mask
from ..progress import Progress
from .doubts import label_doubts
from .files import BadFile, first_line
from .images import JPEG
from .labels import read_label
from .options import EvaluateOptions
from .plan import Plan, check_both, new_stats
from .predictions import Prediction, read_prediction
from .shapes import Shape

_Result = TypeVar("_Result")


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
    reading_seconds: float
    """Summed over the threads that read and judge, as the next one."""
    judging_seconds: float
    jobs: int


class _Judged(NamedTuple):
    row: ImageRow
    ignored: int
    stats: CalibrationStats
    boundary: Optional[CalibrationStats]
    reading_seconds: float
    judging_seconds: float


def judge_all(plan: Plan, options: EvaluateOptions) -> Results:
    """Judge every image, in threads of their own, and sum up in order.

    Raises:
        BadFile: the first bad file, unless `keep_going`; labels that plainly mean something else, unless `trust_labels`.
    """
    total = new_stats(plan, options)
    near = new_stats(plan, options) if options.boundary else None
    names = sorted({**plan.predictions, **plan.labels})
    jobs = options.jobs or os.cpu_count() or 1
    rows: List[ImageRow] = []
    skipped: List[BadFile] = []
    begun, reading, judging, ignored = time.perf_counter(), 0.0, 0.0, 0
    waiting: Deque[Future[_Judged]] = deque()
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
                    waiting.append(pool.submit(_judge, name, plan, options))
                if not waiting:
                    break
                try:
                    judged = waiting.popleft().result()
                except BadFile as error:
                    if not options.keep_going:
                        raise
                    skipped.append(error)
                else:
                    total.merge(judged.stats)
                    if near is not None and judged.boundary is not None:
                        near.merge(judged.boundary)
                    rows.append(judged.row)
                    ignored += judged.ignored
                    reading, judging = reading + judged.reading_seconds, judging + judged.judging_seconds
                bar.advance()
    finally:
        for future in waiting:
            future.cancel()
        pool.shutdown(wait=True)
    seconds = time.perf_counter() - begun
    remarks = plan.remarks + _doubts(total, ignored, plan, options)
    return Results(total, near, rows, skipped, plan.class_names, remarks, seconds, reading, judging, jobs)


def _doubts(total: CalibrationStats, ignored: int, plan: Plan, options: EvaluateOptions) -> List[str]:
    if options.trust_labels:
        return []
    mapped = plan.label_kind.map is not None
    found = label_doubts(total.confusion(), ignored, reduced=options.reduce_zero_label, mapped=mapped)
    for doubt in found:
        if doubt.plain:
            raise BadFile(options.labels, f"{doubt.what}; or --trust-labels if they are meant as they are")
    return [f"{doubt.what}; --trust-labels says that they are meant as they are" for doubt in found]


def read_image(name: str, plan: Plan, options: EvaluateOptions) -> Tuple[Prediction, np.ndarray]:
    """One image's prediction, (1, C, *S) or a pair of (1, H, W), and its label, (1, *S) int64.

    Raises:
        BadFile: one of them is missing or bad; a value of the label is no class and not ignored.
    """
    check_both(name, plan, options)
    path = plan.predictions[name]
    label_path = plan.labels[name]
    kind = plan.label_kind
    label = _guarded(label_path, lambda: read_label(label_path, folder=options.labels, kind=kind))
    _check_classes(label_path, label, plan, options)
    shape = Shape(
        options.num_classes, label.shape, options.one_channel, options.channels_last, upsample=options.upsample is not None
    )
    folder = options.predictions if options.predictions.is_dir() else options.predictions.parent
    found = _guarded(path, lambda: read_prediction(path, folder=folder, shape=shape, kind=plan.prediction_kind))
    return found, label[None]


def _check_classes(path: Path, label: np.ndarray, plan: Plan, options: EvaluateOptions) -> None:
    stray = (label < 0) | (label >= options.num_classes)
    stray &= ~is_ignored(torch.from_numpy(label), plan.label_kind.ignored).numpy()
    if not stray.any():
        return
    classes, ignored, found = options.num_classes, plan.label_kind.ignored, np.unique(label[stray])
    remedy = "pass --label-map for raw ids, or --ignore-index for a label that does not count"
    if path.suffix.lower() in JPEG:
        remedy = "JPEG changes numbers: save labels as PNG"
    elif plan.label_kind.map is not None or plan.label_kind.reduce_zero:
        remedy = "is it another kind of file?"
    elif classes == 2 and found.tolist() == [255]:
        remedy = "for masks of 0 and 255 pass --label-map binary"
    elif found.tolist() == [classes]:
        remedy = "pass --reduce-zero-label if 0 is unlabelled and classes begin with 1, --label-map for raw ids"
    elif classes == 19 and found.max() <= 33:
        remedy = "pass --label-map cityscapes for its raw ids, or mapillary, or a file"
    ids = f"0..{classes - 1} or {' or '.join(map(str, ignored))}"
    raise BadFile(path, f"expected classes {ids}, got the value {found[0]}; {remedy}")


def _judge(name: str, plan: Plan, options: EvaluateOptions) -> _Judged:
    """Read one image's prediction and label and count it by itself."""
    begun = time.perf_counter()
    prediction, label = read_image(name, plan, options)
    path = plan.predictions[name]
    read = time.perf_counter()
    stats = new_stats(plan, options)
    near = new_stats(plan, options) if options.boundary else None
    _guarded(path, lambda: stats.update(prediction, label, normalize=options.normalize))
    if near is not None:
        region = boundary_mask(label, options.boundary, ignore_index=plan.label_kind.ignored)
        _guarded(path, lambda: near.update(prediction, label, region, normalize=options.normalize))
    row = ImageRow(name, stats.pixels, stats.accuracy(), stats.mean_confidence(), stats.ece(), stats.miou())
    return _Judged(row, label.size - stats.pixels, stats, near, read - begun, time.perf_counter() - read)


def _guarded(path: Path, work: Callable[[], _Result]) -> _Result:
    """The result, or a `BadFile` that names the file: whatever it makes fail, the other files can still be evaluated."""
    try:
        return work()
    except BadFile:
        raise
    except Exception as error:
        raise BadFile(path, first_line(error).replace("update: ", "", 1)) from error
