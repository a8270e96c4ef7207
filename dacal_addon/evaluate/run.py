"""All images of an evaluation, several at a time, through `CalibrationStats`; then the report."""

import os
import sys
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Callable, Deque, Dict, List, NamedTuple, Optional, Sequence, TextIO, TypeVar

import numpy as np
import torch

from ..metrics import CalibrationStats, boundary_mask
from ..progress import Progress
from .files import BadFile, first_line, shown
from .labels import find_labels, read_class_names, read_label, read_label_map
from .predictions import Shape, find_predictions, read_prediction

CITYSCAPES = [
    "road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation", "terrain", "sky",
    "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle",
]  # fmt: skip
_Result = TypeVar("_Result")
BAD, WRONG_USE, SKIPPED, INTERRUPTED = 1, 2, 3, 130
"""Exit codes: a bad file stopped it; wrong arguments; finished, with files skipped (--keep-going); Ctrl-C."""


class Options(NamedTuple):
    """The arguments of the command; see its --help."""

    predictions: Path
    labels: Path
    num_classes: int
    input: Optional[str] = None
    key: Optional[str] = None
    label_map: Optional[Path] = None
    ignore_index: int = 255
    class_names: Optional[str] = None
    n_bins: int = 15
    classwise: bool = False
    boundary: int = 0
    out: Path = Path("evaluate-out")
    keep_going: bool = False
    jobs: int = 0


class ImageRow(NamedTuple):
    """One image of the report."""

    name: str
    pixels: int
    accuracy: float
    mean_confidence: float
    ece: float
    miou: float


class Results(NamedTuple):
    """What there is to report."""

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


class _Plan(NamedTuple):
    """What is to be read, and how."""

    predictions: Dict[str, Path]
    labels: Dict[str, Path]
    input: str
    table: Optional[np.ndarray]
    class_names: List[str]


def evaluate(options: Options, *, command: Sequence[str] = ()) -> int:
    """Run the command; returns its exit code. `command`: its words, for the report."""
    from .report import headline, write_report

    threads = torch.get_num_threads()
    try:
        plan = _make_plan(options)
        _writing(options, lambda: options.out.mkdir(parents=True, exist_ok=True))
        results = _run(plan, options)
        written = _writing(options, lambda: write_report(results, options, plan.input, command))
    except BadFile as error:
        return _complain(error, BAD)
    except ValueError as error:
        return _complain(error, WRONG_USE)
    except KeyboardInterrupt:
        return _complain("interrupted", INTERRUPTED)
    finally:
        torch.set_num_threads(threads)
    for bad in results.skipped:
        _complain(f"skipped {bad}", SKIPPED)
    _say(headline(results.stats), sys.stdout)
    _say(f"Written to {options.out}: {', '.join(written)}", sys.stdout)
    if not results.stats.pixels:
        return _complain("no valid pixel in any image", BAD)
    if results.skipped:
        return _complain(f"{len(results.skipped)} skipped, {len(results.images)} evaluated", SKIPPED)
    return 0


def _writing(options: Options, write: Callable[[], _Result]) -> _Result:
    try:
        return write()
    except OSError as error:
        raise BadFile(options.out, f"cannot be written to: {error.strerror}") from error


def _make_plan(options: Options) -> _Plan:
    """`BadFile` for what is wrong with a file, `ValueError` with the arguments."""
    predictions = find_predictions(options.predictions)
    labels = find_labels(options.labels, mapped=options.label_map is not None)
    pairs = [path.suffix.lower() == ".png" for path in predictions.values()]
    if any(pairs) and not all(pairs):
        raise ValueError(f"{options.predictions}: expected arrays or pairs of PNGs, got both; move one kind elsewhere")
    kind = "top1" if all(pairs) else options.input
    if kind is None:
        raise ValueError(
            "expected --input logits, probs or log_probs for saved arrays, got none; nothing is guessed from values"
        )
    if kind == "top1" and (options.input is not None or options.classwise):
        raise ValueError("pairs of PNGs hold confidences and classes alone; leave out --input and --classwise")
    if options.class_names == "cityscapes":
        if options.num_classes != len(CITYSCAPES):
            raise ValueError(
                f"expected --num-classes {len(CITYSCAPES)} with --class-names cityscapes, got {options.num_classes}"
            )
        names = list(CITYSCAPES)
    elif options.class_names is not None:
        names = read_class_names(Path(options.class_names), num_classes=options.num_classes)
    else:
        names = [f"class {c}" for c in range(options.num_classes)]
    table = None
    if options.label_map is not None:
        ids = {"num_classes": options.num_classes, "ignore_index": options.ignore_index}
        table = read_label_map(options.label_map, **ids)
    plan = _Plan(predictions, labels, kind, table, names)
    _new_stats(plan, options)  # complains of numbers that cannot be
    return plan


def _new_stats(plan: _Plan, options: Options) -> CalibrationStats:
    return CalibrationStats(
        options.num_classes,
        input=plan.input,
        ignore_index=options.ignore_index,
        n_bins=options.n_bins,
        classwise=options.classwise,
        per_image=True,
    )


def _run(plan: _Plan, options: Options) -> Results:
    """Judge every image, in threads of their own, and sum up in order; `BadFile` for the first one unless `keep_going`."""
    total = _new_stats(plan, options)
    near = _new_stats(plan, options) if options.boundary else None
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


def _judge(name: str, plan: _Plan, options: Options) -> _Judged:
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
    stats = _new_stats(plan, options)
    near = _new_stats(plan, options) if options.boundary else None
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


def _complain(what: object, code: int) -> int:
    _say(f"dacal evaluate: {what}", sys.stderr)
    return code


def _say(text: str, file: TextIO) -> None:
    """Print what the terminal can show, and spell out the rest."""
    encoding = file.encoding or "utf-8"
    print(shown(text).encode(encoding, "backslashreplace").decode(encoding), file=file)
