"""All images of an evaluation, several at a time, through `CalibrationStats`."""

import os
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Callable, Deque, List, NamedTuple, Optional, TypeVar

import torch

from ..metrics import CalibrationStats, boundary_mask
from ..progress import Progress
from .files import BadFile, first_line
from .labels import read_label
from .options import EvaluateOptions
from .plan import Plan, new_stats
from .predictions import Shape, read_prediction

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
    seconds: float
    reading_seconds: float
    """Summed over the threads that read and judge, as the next one."""
    judging_seconds: float
    jobs: int


class _Judged(NamedTuple):
    row: ImageRow
    stats: CalibrationStats
    boundary: Optional[CalibrationStats]
    reading_seconds: float
    judging_seconds: float


def judge_all(plan: Plan, options: EvaluateOptions) -> Results:
    """Judge every image, in threads of their own, and sum up in order; `BadFile` for the first one unless `keep_going`."""
    total = new_stats(plan, options)
    near = new_stats(plan, options) if options.boundary else None
    names = sorted({**plan.predictions, **plan.labels})
    jobs = options.jobs or os.cpu_count() or 1
    rows: List[ImageRow] = []
    skipped: List[BadFile] = []
    begun, reading, judging = time.perf_counter(), 0.0, 0.0
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
                    reading, judging = reading + judged.reading_seconds, judging + judged.judging_seconds
                bar.advance()
    finally:
        for future in waiting:
            future.cancel()
        pool.shutdown(wait=True)
    seconds = time.perf_counter() - begun
    return Results(total, near, rows, skipped, plan.class_names, seconds, reading, judging, jobs)


def _judge(name: str, plan: Plan, options: EvaluateOptions) -> _Judged:
    """Read one image's prediction and label and count it by itself."""
    if name not in plan.predictions:
        raise BadFile(plan.labels[name], f"no prediction of image {name!r}")
    path = plan.predictions[name]
    if name not in plan.labels:
        raise BadFile(path, f"no label of image {name!r} in {options.labels}")
    begun = time.perf_counter()
    folder = options.predictions if options.predictions.is_dir() else options.predictions.parent
    label_path = plan.labels[name]
    label = _guarded(label_path, lambda: read_label(label_path, folder=options.labels, table=plan.table))[None]
    shape = Shape(options.num_classes, *label.shape[1:])
    prediction = _guarded(path, lambda: read_prediction(path, folder=folder, shape=shape, key=options.key))
    read = time.perf_counter()
    stats = new_stats(plan, options)
    near = new_stats(plan, options) if options.boundary else None
    stray = (label != options.ignore_index) & ((label < 0) | (label >= options.num_classes))
    if stray.any():
        ids = f"0..{options.num_classes - 1} or {options.ignore_index}"
        raise BadFile(label_path, f"expected classes {ids}, got the value {label[stray][0]}; pass --label-map for raw ids")
    _guarded(path, lambda: stats.update(prediction, label))
    if near is not None:
        region = boundary_mask(label, options.boundary, ignore_index=options.ignore_index)
        _guarded(path, lambda: near.update(prediction, label, region))
    row = ImageRow(name, stats.pixels, stats.accuracy(), stats.mean_confidence(), stats.ece(), stats.miou())
    return _Judged(row, stats, near, read - begun, time.perf_counter() - read)


def _guarded(path: Path, work: Callable[[], _Result]) -> _Result:
    """The result, or a `BadFile` that names the file: whatever it makes fail, the other files can still be evaluated."""
    try:
        return work()
    except BadFile:
        raise
    except Exception as error:
        raise BadFile(path, first_line(error).replace("update: ", "", 1)) from error
