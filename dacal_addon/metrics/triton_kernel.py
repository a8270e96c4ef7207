"""The judging of `pixels`, and the counting, in one launch a batch, on a GPU. Needs triton, which torch for CUDA brings.

torch's operations are launched a hundred times a piece, and a GPU waits for most of them. Here each program takes blocks of
pixels: it reads their scores from memory, again from the cache, and adds to counts that all programs share.
Sums of confidences are whole numbers of a small share of 1, so that they are the same in whatever order programs add to them.

With TRITON_INTERPRET=1 in the environment before triton is loaded, its interpreter runs the same on a CPU, slowly: for tests.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
# (Triton takes a kernel's annotations for its own, and refuses those of Python.)

import functools
import warnings
from contextlib import nullcontext
from typing import Any, Callable, ContextManager, Dict, List, NamedTuple, Optional, Tuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .grid import OCTAVES, ON_EDGE, cell_count, uniform_cells
from .images import Images, image_of
from .pieces import Batch
from .pixels import count_, tolerance
from .settings import Settings
from .totals import Totals, zeros

# What many pixels have in common, their class, a confidence of 1, has one address in memory: programs would queue for it. Each
# adds to one of so many copies of all counts.
_COPIES = 16
# Of the counts in all copies together, in bytes; of many classes, the confusion matrix alone has 134 MB.
_MOST_BYTES = 1 << 28
# Scores of a block, which the cache keeps between the passes over the classes: 32 KB in float32.
_SCORES = 8192
_PROGRAMS_A_PROCESSOR = 8
_PROGRAMS_INTERPRETED = 3
# Bits of a sum of confidences, which are at most 1 and a little more (probabilities may sum to 1.001).
_BITS, _MOST_BITS = 62, 52
_KINDS = {"logits": 0, "probs": 1, "log_probs": 2, "top1": 3}
_OCTAVES, _ON_EDGE, _SMALLEST_DOUBT = tl.constexpr(OCTAVES), tl.constexpr(ON_EDGE), tl.constexpr(0.5**OCTAVES)


def _compiled(function: Callable[..., None]) -> Any:
    return triton.jit(function)


@_compiled
def _fine(doubt, cells: tl.constexpr):
    """`grid._fine`."""
    octaves = tl.log2(tl.maximum(doubt, _SMALLEST_DOUBT))
    step = tl.floor(octaves * (-cells / _OCTAVES) + 0.5)
    return tl.minimum(tl.maximum(step, 0.0), cells - 1.0)


@_compiled
def _coarse(probability, uniform: tl.constexpr):
    return tl.minimum(tl.maximum(tl.ceil(probability * uniform - _ON_EDGE), 1.0), uniform)


@_compiled
def _score(pointer, of_class, inside, divisor, kind: tl.constexpr, one_channel: tl.constexpr, normalize: tl.constexpr):
    """Scores of a class, in float64, divided by their sum."""
    x = tl.load(pointer, mask=inside, other=0.0).to(tl.float64)
    if one_channel:  # as `two_channels`
        rest = 1.0 - x if kind == 1 else tl.zeros_like(x)
        x = tl.where(of_class == 0, rest, x)
    if normalize:
        x = x / divisor
    return x


@_compiled
def _count(
    scores,
    predicted,
    label,
    region,
    ignored,
    counts,
    losses,
    images,
    pixels,
    classes,
    scores_n,
    scores_c,
    scores_s,
    predicted_n,
    predicted_s,
    label_n,
    label_s,
    region_n,
    region_s,
    copy_size,
    row_size,
    classes_at,
    cells,
    scale,
    kind: tl.constexpr,
    allowed: tl.constexpr,
    one_channel: tl.constexpr,
    normalize: tl.constexpr,
    reduced: tl.constexpr,
    in_region: tl.constexpr,
    ignored_count: tl.constexpr,
    each: tl.constexpr,
    classwise: tl.constexpr,
    uniform: tl.constexpr,
    fine: tl.constexpr,
    copies: tl.constexpr,
    block: tl.constexpr,
):
    """Add the pixels of N images to counts; see `_Layout` for where. `..._n`, `..._c`, `..._s`: strides."""
    program = tl.program_id(0)
    image = (program % images).to(tl.int64)
    part = program // images
    parts = tl.num_programs(0) // images
    if each:
        copy = counts + (part % copies) * copy_size
        row = copy + image * row_size
    else:
        copy = counts + (program % copies) * copy_size
        row = copy
    lane = tl.arange(0, block)
    nll = tl.zeros([block], tl.float64)
    brier = tl.zeros([block], tl.float64)
    suspicious = tl.zeros([block], tl.int64)
    left_out = tl.zeros([block], tl.int64)
    one = tl.full([block], 1, tl.int64)
    for number in range(part, tl.cdiv(pixels, block), parts):
        at = (number * block + lane).to(tl.int64)
        inside = at < pixels
        y = tl.load(label + image * label_n + at * label_s, mask=inside, other=0).to(tl.int64)
        looked_at = inside
        if in_region:
            looked_at = inside & (tl.load(region + image * region_n + at * region_s, mask=inside, other=0) != 0)
        counted = looked_at
        for i in tl.static_range(ignored_count):
            counted = counted & (y != tl.load(ignored + i))
        left_out += (looked_at ^ counted).to(tl.int64)
        if reduced:
            y -= 1
        own_class = tl.minimum(tl.maximum(y, 0), classes - 1)
        first = scores + image * scores_n + at * scores_s
        divisor = tl.full([block], 1.0, tl.float64)
        if kind == 3:
            sure = tl.load(first, mask=inside, other=0.0).to(tl.float64)
            best = tl.load(predicted + image * predicted_n + at * predicted_s, mask=inside, other=0).to(tl.int64)
            fits = (sure >= 0.0) & (sure <= 1.0) & (best >= 0) & (best < classes)
        else:
            if normalize:
                sum_of_all = tl.zeros([block], tl.float64)
                place = first
                for c in tl.range(0, classes, loop_unroll_factor=4):
                    p = _score(place, c, inside, divisor, kind, one_channel, False)
                    sum_of_all += tl.where(p >= 0.0, p, float("nan"))
                    place += scores_c
                divisor = sum_of_all
            top = _score(first, 0, inside, divisor, kind, one_channel, normalize)
            winner = tl.zeros([block], tl.int32)
            place = first
            for c in tl.range(1, classes, loop_unroll_factor=4):
                place += scores_c
                v = _score(place, c, inside, divisor, kind, one_channel, normalize)
                more = v > top
                winner = tl.where(more, c, winner)
                top = tl.where(more, v, top)
            best = winner.to(tl.int64)
            total = tl.zeros([block], tl.float64)
            squares = tl.zeros([block], tl.float64)
            place = first
            for c in tl.range(0, classes, loop_unroll_factor=4):
                v = _score(place, c, inside, divisor, kind, one_channel, normalize)
                place += scores_c
                if kind == 0:
                    p = tl.exp(v - top)
                elif kind == 1:
                    p = tl.where(v >= 0.0, v, float("nan"))
                else:
                    p = tl.exp(v)
                total += p
                squares += p * p
            own = _score(first + own_class * scores_c, own_class, inside, divisor, kind, one_channel, normalize)
            if kind == 0:
                sure = 1.0 / total  # NaN if a score is, if one is +infinity or all are -infinity
                fits = total == total
                probability = tl.exp(own - top) * sure
                squares = squares * sure * sure
                lost = tl.log(total) - (own - top)
            elif kind == 1:
                sure = top
                fits = tl.abs(total - 1.0) <= allowed
                probability = own
                lost = -tl.log(own)
            else:
                sure = tl.exp(top)
                fits = tl.abs(total - 1.0) <= allowed
                probability = tl.exp(own)
                lost = -own
            nll += tl.where(counted, lost, 0.0)
            brier += tl.where(counted, squares - 2.0 * probability + 1.0, 0.0)
        good = counted & fits
        suspicious += (counted ^ good).to(tl.int64)
        # Nothing but a good pixel has a cell: numbers of NaN would be anything.
        sure = tl.where(good, sure, 1.0)
        best = tl.where(good, best, 0)
        cell = (_fine(1.0 - sure, fine) + _coarse(sure, uniform) - 1.0).to(tl.int64)
        target = tl.minimum(tl.maximum(y, -1), classes)
        shares = (sure * scale + 0.5).to(tl.int64)
        tl.atomic_add(row + 2 * cell + (best == target).to(tl.int64), one, mask=good, sem="relaxed")
        tl.atomic_add(row + 2 * cells + cell, shares, mask=good, sem="relaxed")
        pairs = row + 3 * cells
        tl.atomic_add(pairs + (target + 1) * classes + best, one, mask=good, sem="relaxed")
        tl.atomic_add(pairs + (classes + 2) * classes + best, shares, mask=good, sem="relaxed")
        if classwise:
            place = first
            of_class = copy + classes_at
            for c in tl.range(0, classes, loop_unroll_factor=4):
                v = _score(place, c, inside, divisor, kind, one_channel, normalize)
                place += scores_c
                if kind == 0:
                    p = tl.exp(v - top) * sure
                elif kind == 1:
                    p = v
                else:
                    p = tl.exp(v)
                p = tl.where(good, p, 0.0)
                # As cell_of(both_ends=True), counted from the middle.
                half: tl.constexpr = fine // 2
                steps = _fine(2.0 * tl.minimum(p, 1.0 - p), half) + 0.5
                cell = (_coarse(p, uniform) + tl.where(p > 0.5, steps, -steps) + (half - 1.5)).to(tl.int64)
                tl.atomic_add(of_class + cell, one, mask=good, sem="relaxed")
                tl.atomic_add(of_class + cells + cell, one, mask=good & (own_class == c), sem="relaxed")
                tl.atomic_add(of_class + 2 * cells + cell, (p * scale + 0.5).to(tl.int64), mask=good, sem="relaxed")
                of_class += 3 * cells
    tail = row + 3 * cells + (classes + 3) * classes
    tl.atomic_add(tail, tl.sum(suspicious, 0), sem="relaxed")
    tl.atomic_add(tail + 1, tl.sum(left_out, 0), sem="relaxed")
    tl.store(losses + 2 * program, tl.sum(nll, 0))
    tl.store(losses + 2 * program + 1, tl.sum(brier, 0))


class _Layout(NamedTuple):
    """Where counts are in a copy: a row, or one an image, and after these the class-wise ones.

    A row: pixels by cell, wrong and right in turn, (2 K); their confidences (K); pixels by target + 1 and predicted class
    (C + 2, C); confidences by predicted class (C); pixels that are not what `input` says; pixels that are ignored.
    Class-wise, for each class: pixels, those that are of it, and probabilities, (K) each.
    """

    classes: int
    cells: int
    rows: int
    classwise: bool

    @property
    def row_size(self) -> int:
        return 3 * self.cells + (self.classes + 3) * self.classes + 2

    @property
    def classes_at(self) -> int:
        return self.rows * self.row_size

    @property
    def copy_size(self) -> int:
        return self.classes_at + (3 * self.classes * self.cells if self.classwise else 0)

    @property
    def copies(self) -> int:
        return max(1, min(_COPIES, _MOST_BYTES // (8 * self.copy_size)))


def launch_(totals: Totals, batch: Batch, settings: Settings, *, each: bool) -> Optional[List[Images]]:
    """Add the pixels of a batch to `totals`, in one launch and one transfer, which tells too whether all was well.

    Args:
        totals: on the CPU.
        batch: on a GPU; on the CPU with triton's interpreter.
        each: the counts of every image are wanted. They take a launch each where 256 MB do not hold those of all.

    Returns:
        the images' counts if `each`, none otherwise; None if something was not what `settings` say: `totals` is worthless then.
    """
    classes, cells, count = settings.num_classes, cell_count(settings.n_bins, settings.fine_bins), len(batch.label)
    if not count:
        return []
    together = not each or 8 * _Layout(classes, cells, count, settings.classwise).copy_size <= _MOST_BYTES
    found: List[Images] = []
    for some in [batch] if together else [batch.image(i) for i in range(count)]:
        images = _launch_(totals, some, settings, each)
        if images is None:
            return None
        found += images
    return found


def _launch_(totals: Totals, batch: Batch, settings: Settings, each: bool) -> Optional[List[Images]]:
    label = batch.label.flatten(1)
    device, (images, pixels) = label.device, label.shape
    scores, predicted, kind = batch.scores, label, settings.input
    if isinstance(scores, Tensor):
        scores = scores.flatten(2)
        strides = (scores.stride(0), 0 if settings.one_channel else scores.stride(1), scores.stride(2))
        # One channel and shares of a sum are float64, as in `pieces`.
        allowed = tolerance(torch.float64 if settings.one_channel or batch.normalize else scores.dtype, kind)
    else:
        scores, predicted = (part.flatten(1) for part in scores)
        strides, allowed = (scores.stride(0), 0, scores.stride(1)), 0.0
    region = label if batch.region is None else batch.region.flatten(1).view(torch.uint8)
    ignored = {*settings.ignore_index, 0} if settings.reduce_zero_label else settings.ignore_index

    classes, cells = settings.num_classes, cell_count(settings.n_bins, settings.fine_bins)
    # Pairs of confidence and class have no class-wise counts.
    classwise = settings.classwise and kind != "top1"
    layout = _Layout(classes, cells, images if each else 1, classwise)
    block = max(32, min(256, triton.next_power_of_2(_SCORES // classes + 1) // 2))
    parts = max(1, min(triton.cdiv(pixels, block), _programs(device) // images))
    bits = min(_MOST_BITS, _BITS - (pixels if each else images * pixels).bit_length())
    counts = torch.zeros(layout.copies, layout.copy_size, dtype=torch.int64, device=device)
    losses = torch.empty(parts, images, 2, dtype=torch.float64, device=device)
    with _on(device):
        _count[(images * parts,)](
            scores,
            predicted,
            label,
            region,
            _labels(tuple(sorted(ignored)), device),
            counts,
            losses,
            images,
            pixels,
            classes,
            *strides,
            *predicted.stride(),
            *label.stride(),
            *region.stride(),
            layout.copy_size,
            layout.row_size,
            layout.classes_at,
            cells,
            2.0**bits,
            kind=_KINDS[kind],
            allowed=allowed,
            one_channel=settings.one_channel,
            normalize=batch.normalize,
            reduced=settings.reduce_zero_label,
            in_region=batch.region is not None,
            ignored_count=len(ignored),
            each=each,
            classwise=classwise,
            uniform=float(uniform_cells(settings.n_bins, settings.fine_bins)),
            fine=settings.fine_bins,
            copies=layout.copies,
            block=block,
            num_warps=max(1, block // 64),
            enable_fp_fusion=False,  # rounded as torch's operations are, one by one
        )
    # Both kinds of numbers in one piece of memory, so that there is one transfer.
    result = torch.empty(layout.copy_size + 2 * images, dtype=torch.int64, device=device)
    torch.sum(counts, 0, out=result[: layout.copy_size])
    torch.sum(losses, 0, out=result[layout.copy_size :].view(torch.float64).view(images, 2))
    return _add_(totals, result.cpu(), layout, each=each, share=0.5**bits)


def _add_(totals: Totals, result: Tensor, layout: _Layout, *, each: bool, share: float) -> Optional[List[Images]]:
    """Add what a launch found; as `launch_`."""
    classes, cells = layout.classes, layout.cells
    losses = result[layout.copy_size :].view(torch.float64).view(-1, 2)
    images = len(losses)
    losses = losses if each else losses.sum(0, keepdim=True)
    found = []
    for row, loss in zip(result[: layout.classes_at].view(layout.rows, layout.row_size), losses):
        sizes = [2 * cells, cells, (classes + 2) * classes, classes, 1, 1]
        by_cell, confidence, by_pair, predicted_confidence, suspicious, left_out = row.split(sizes)
        by_cell, by_pair = by_cell.view(cells, 2), by_pair.view(classes + 2, classes)
        if bool(suspicious) or bool((by_pair[[0, -1]] != 0).any()):
            return None
        own: Dict[str, Tensor] = {
            "images": totals.images.new_tensor(1 if each else images),
            "ignored": left_out[0],
            "pixels": by_cell.sum(1),
            "correct": by_cell[:, 1],
            "confidence": confidence.double() * share,
            "confusion": by_pair[1:-1],
            "predicted_confidence": predicted_confidence.double() * share,
            "nll": loss[0],
            "brier": loss[1],
        }
        for name, value in own.items():
            getattr(totals, name).add_(value)
        if each:
            found.append(image_of(totals._replace(**own)))
    if layout.classwise:
        by_class = result[layout.classes_at : layout.copy_size].view(classes, 3, cells)
        totals.class_pixels.add_(by_class[:, 0])
        totals.class_hits.add_(by_class[:, 1])
        totals.class_confidence.add_(by_class[:, 2].double() * share)
    return found


@functools.lru_cache(maxsize=None)
def works(device: torch.device) -> bool:
    """Whether the kernel runs on this GPU and counts a few pixels as torch's operations do; a warning says why not: no C
    compiler, too old a GPU."""
    try:
        g = torch.Generator().manual_seed(0)
        scores, label = torch.randn(2, 3, 50, generator=g), torch.randint(0, 4, (2, 50), generator=g)
        settings = Settings(3, "logits", (3,), n_bins=15, fine_bins=4096, classwise=True)
        cells = cell_count(settings.n_bins, settings.fine_bins)
        ours, torchs = (zeros(3, cells, cells, torch.device("cpu")) for _ in range(2))
        launch_(ours, Batch(scores.to(device), label.to(device), None), settings, each=False)
        count_(torchs, Batch(scores, label, None), settings)
        differing = [
            name for name, a, b in zip(ours._fields, ours, torchs) if not torch.allclose(a.double(), b.double(), rtol=1e-9)
        ]
        said = f"counts other {', '.join(differing)} than torch" if differing else ""
    except Exception as error:  # of many kinds: of the compiler, of the driver, of whatever calls them
        said = f"does not work here ({(str(error).strip().splitlines() or [type(error).__name__])[0]})"
    if said:
        told = f"triton {triton.__version__} {said}; torch's operations judge, more slowly."
        warnings.warn(f"CalibrationStats: {told}", UserWarning, stacklevel=2)
    return not said


def _on(device: torch.device) -> ContextManager[Any]:
    """Triton launches on the present GPU."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@functools.lru_cache(maxsize=None)
def _labels(values: Tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(values or (0,), dtype=torch.int64, device=device)


@functools.lru_cache(maxsize=None)
def _programs(device: torch.device) -> int:
    """How many programs run at once."""
    if device.type != "cuda":
        return _PROGRAMS_INTERPRETED
    return _PROGRAMS_A_PROCESSOR * int(torch.cuda.get_device_properties(device).multi_processor_count)
