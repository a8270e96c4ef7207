"""From predictions and labels to totals, a piece of them at a time.

A pass over the whole array per operation would be bound by memory, and a float64 copy of 19 x 1024 x 2048 logits would take
300 MB. In pieces it is 6 MB, on a GPU 32, and costs what the arithmetic costs.
"""

import math
from typing import Callable, Iterator, NamedTuple, Optional, Tuple, Union

import torch
from torch import Tensor

from .._check import problem
from .grid import cell_count, cell_of
from .totals import Totals

Prediction = Union[Tensor, Tuple[Tensor, Tensor]]
# Elements (classes x pixels) of a piece, whose float64 copy takes 6.4 MB. A quarter of it would fit the second-level cache of a
# CPU's core and is no faster; but several threads then wait for each other (0.21 s an image in two threads, 0.13 s with these).
# On a GPU launches are what counts: 19 x 1024 x 2048 in 86 pieces of 500,000 took an H100 14 ms, and the launches 105 ms (in
# torch.profiler). With its temporaries a piece takes, by estimate, 30 bytes an element there: 120 MB.
_ELEMENTS = {"cpu": 800_000, "cuda": 4_000_000}
# torch 1.7 cannot write a comparison into a float tensor.
_COMPARES_INTO_FLOATS = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (1, 9)


class Settings(NamedTuple):
    """How pixels are judged; see `CalibrationStats`."""

    num_classes: int
    input: str
    ignore_index: int
    n_bins: int
    fine_bins: int
    classwise: bool


class Judged(NamedTuple):
    """A piece of P pixels. Those that do not count have the number one beyond the last in `cell` and `pair`."""

    cell: Tensor
    """(P,) int64: twice the cell of the confidence, and one more where the prediction is right."""
    pair: Tensor
    """(P,) int64: (target + 1) x C + predicted class; stray labels make a row before the first and one after the last."""
    confidence: Tensor
    """(P,) float64."""
    nll: Tensor
    """() float64: sum over the pixels that count, as the next one."""
    brier: Tensor
    """() float64."""
    suspicion: Tensor
    """() float64: 0 if the scores are what `input` says; NaN or positive if not, also for NaN where nothing counts."""


class Scratch(NamedTuple):
    """Memory for the float64 copy and the comparison: taking it anew for every piece costs more than the arithmetic."""

    terms: Tensor
    """At least C x P, float64."""
    equal: Tensor
    """At least C x P, float32."""
    rank: Tensor
    """(C, 1) float32: C, C - 1, ..., 1."""


Judge = Callable[[Prediction, Tensor, Tensor, Settings, Optional[Scratch]], Judged]


def count_(
    totals: Totals,
    x: Prediction,
    target: Tensor,
    region: Optional[Tensor],
    settings: Settings,
    compiled: Optional[Judge] = None,
) -> bool:
    """Add the pixels of a batch to `totals`, all on one device; returns whether all was well: if not, `totals` is worthless.

    Args:
        x: (N, C, H, W) floating, or for "top1" confidence and predicted class, (N, H, W) each.
        target: (N, H, W) integer.
        region: (N, H, W) bool, or None for all.
        compiled: `judge` as torch.compile made it.
    """
    device, classes, cells = target.device, settings.num_classes, len(totals.pixels)
    size = _piece_size(settings, device)
    scratch = None
    if compiled is None and _COMPARES_INTO_FLOATS:
        terms, equal = (torch.empty(classes * size, dtype=d, device=device) for d in (torch.float64, torch.float32))
        scratch = Scratch(terms, equal, _rank(classes, device))
    # scatter_add_ takes half of bincount's time, which looks for the smallest and the largest number first.
    by_cell, by_pair = (torch.zeros(n, dtype=torch.int64, device=device) for n in (2 * cells + 1, (classes + 2) * classes + 1))
    confidence = torch.zeros(2 * cells + 1, dtype=torch.float64, device=device)
    ones = torch.ones(size, dtype=torch.int64, device=device)
    for scores, label, counted in _pieces(x, target, region, settings.ignore_index, size):
        judged = (compiled or judge)(scores, label, counted, settings, scratch)
        if not bool(judged.suspicion == 0):
            scores = _blank_out(scores, counted, settings)
            judged = judge(scores, label, counted, settings, scratch)
            if not bool(judged.suspicion == 0):
                return False
        by_cell.scatter_add_(0, judged.cell, ones[: len(label)])
        confidence.scatter_add_(0, judged.cell, judged.confidence)
        by_pair.scatter_add_(0, judged.pair, ones[: len(label)])
        totals.nll.add_(judged.nll)
        totals.brier.add_(judged.brier)
        if settings.classwise and isinstance(scores, Tensor):
            _count_classes_(totals, scores[:, counted > 0], label[counted > 0], settings)
    by_cell, confidence, by_pair = by_cell[:-1].view(cells, 2), confidence[:-1].view(cells, 2), by_pair[:-1].view(-1, classes)
    if bool((by_pair[[0, -1]] != 0).any()):
        return False
    totals.pixels.add_(by_cell.sum(1))
    totals.correct.add_(by_cell[:, 1])
    totals.confidence.add_(confidence.sum(1))
    totals.confusion.add_(by_pair[1:-1])
    totals.images.add_(len(target))
    return True


def judge(scores: Prediction, label: Tensor, counted: Tensor, settings: Settings, scratch: Optional[Scratch] = None) -> Judged:
    """Every pixel of a piece: how sure, right or wrong, and what it adds to NLL and Brier score.

    Args:
        scores: (C, P), or for "top1" confidence and predicted class, (P,) each.
        label: (P,) float64, whole numbers.
        counted: (P,) float64, 1 or 0.
    """
    classes = settings.num_classes
    row = label.clamp(-1.0, float(classes))
    if isinstance(scores, Tensor):
        own_class = row.clamp(0.0, classes - 1.0).long()
        confidence, prediction, nll, brier, suspicion = _judge_scores(scores, own_class, counted, settings.input, scratch)
    else:
        confidence, prediction = scores[0].double(), scores[1].double()
        nll = brier = torch.zeros_like(confidence)
        off = (confidence - 0.5).abs() - 0.5
        strange = (prediction - (classes - 1) / 2).abs() - (classes - 1) / 2
        suspicion = ((off.clamp(min=0) + strange.clamp(min=0)) * counted).sum()
    cell = cell_of(confidence, n_bins=settings.n_bins, fine_bins=settings.fine_bins, both_ends=False)
    right = _compare(torch.eq, prediction, label, scratch is not None)
    # Python's whole numbers would be turned into tensors of another kind and converted, at every operation.
    beyond_cells, beyond_pairs = 2.0 * cell_count(settings.n_bins, settings.fine_bins), float((classes + 2) * classes)
    return Judged(
        cell.mul_(2.0).add_(right).sub_(beyond_cells).mul_(counted).add_(beyond_cells).long(),
        row.add_(1.0).mul_(float(classes)).add_(prediction).sub_(beyond_pairs).mul_(counted).add_(beyond_pairs).long(),
        confidence,
        # A label that does not count may have probability 0, and infinity times 0 is NaN.
        (nll * counted).nansum(),
        torch.dot(brier, counted),
        suspicion,
    )


def fault(x: Prediction, target: Tensor, region: Optional[Tensor], settings: Settings, *, function: str) -> Exception:
    """The `ValueError` for what `count_` found: the first offence, looked for where speed does not matter any more."""
    classes, kind = settings.num_classes, settings.input
    for scores, label, counted in _pieces(x, target, region, settings.ignore_index, _piece_size(settings, target.device)):
        counts = counted > 0
        label = label[counts]
        stray = label[(label < 0) | (label >= classes)]
        if len(stray):
            expected = f"target: classes 0..{classes - 1} or ignore_index={settings.ignore_index}"
            remedy = "map the labels to training ids, or set ignore_index"
            return problem(function, expected=expected, got=f"the value {int(stray[0])}", remedy=remedy)
        if not isinstance(scores, Tensor):
            confidence, prediction = scores[0][counts], scores[1][counts]
            wrong = confidence[~((confidence >= 0) & (confidence <= 1))]
            if len(wrong):
                remedy = "divide 8-bit values by 255, 16-bit ones by 65535"
                return problem(function, expected="x: confidences in 0..1", got=f"{float(wrong[0]):.4g}", remedy=remedy)
            other = prediction[(prediction < 0) | (prediction >= classes)]
            if len(other):
                remedy = "pass predictions as training ids"
                expected = f"x: predicted classes 0..{classes - 1}"
                return problem(function, expected=expected, got=f"the value {int(other[0])}", remedy=remedy)
            continue
        scores = scores[:, counts]
        if kind == "logits":
            if not bool(torch.isfinite(scores).all()):
                remedy = "look for a division by zero or an overflow in the network"
                return problem(function, expected="x: finite logits", got="NaN or infinity", remedy=remedy)
            continue
        p = scores.double() if kind == "probs" else scores.double().exp()
        if not len(label) or bool(((p.sum(0) - 1).abs() <= _tolerance(scores.dtype, kind)).all() & (p >= 0).all()):
            continue
        off, low = float((p.sum(0) - 1).abs().max()), float(p.min())
        got = "NaN" if bool(torch.isnan(p).any()) else f"a value of {low:.3g}" if low < 0 else f"sums off by up to {off:.3g}"
        expected = f"x: {kind} whose probabilities are >= 0 and sum to 1 over C"
        return problem(function, expected=expected, got=got, remedy="pass input='logits' if they are logits")
    remedy = "look for an overflow in the network"
    return problem(function, expected="x: logits whose sum over C is finite", got="a sum that overflows", remedy=remedy)


def _judge_scores(
    scores: Tensor, own_class: Tensor, counted: Tensor, kind: str, scratch: Optional[Scratch]
) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Confidence, predicted class, NLL, Brier score, (P,) float64 each, of scores (C, P); and the suspicion."""
    tolerance = _tolerance(scores.dtype, kind)
    if scores.dtype in (torch.float16, torch.bfloat16):
        scores = scores.float()
    largest = scores.amax(0)
    own = scores.gather(0, own_class.unsqueeze(0)).squeeze(0).double()
    prediction = _first_largest(scores, largest, scratch)
    largest = largest.double()
    terms = scores.to(torch.float64, copy=True) if scratch is None else _part(scratch.terms, scores).copy_(scores)
    if kind == "logits":
        # One sum finds NaN and infinities of either sign; times 0, they are NaN.
        suspicion = torch.dot(scores.sum(0).double(), counted) * 0.0
        terms = terms.sub_(largest).exp_()
        total = terms.sum(0)
        confidence = total.reciprocal()
        own = own - largest
        nll = total.log() - own
        own = own.exp_().mul_(confidence)
        squares = terms.mul_(terms).sum(0).mul_(confidence).mul_(confidence)
        return confidence, prediction, nll, squares.sub_(own, alpha=2.0).add_(1.0), suspicion
    suspicion = (scores.amin(0).double().clamp(max=0) * counted).sum().neg() if kind == "probs" else counted.new_zeros(())
    nll = -own.log() if kind == "probs" else -own
    if kind == "log_probs":
        terms, largest, own = terms.exp_(), largest.exp(), own.exp()
    off = (terms.sum(0) - 1).abs() - tolerance
    suspicion = suspicion + (off.clamp(min=0) * counted).sum()
    squares = terms.mul_(terms).sum(0)
    return largest, prediction, nll, squares.sub_(own, alpha=2.0).add_(1.0), suspicion


def _first_largest(scores: Tensor, largest: Tensor, scratch: Optional[Scratch]) -> Tensor:
    """argmax(0), the first class of a tie, in a tenth of its time: (P,) float64."""
    classes = len(scores)
    if scratch is None:
        rank = _rank(classes, scores.device)
        best = torch.where(scores == largest, rank, torch.zeros_like(rank)).amax(0)
    else:
        best = torch.eq(scores, largest, out=_part(scratch.equal, scores)).mul_(scratch.rank).amax(0)
    return best.double().neg_().add_(float(classes))


def _rank(classes: int, device: torch.device) -> Tensor:
    return torch.arange(classes, 0, -1, dtype=torch.float32, device=device).unsqueeze(1)


def _compare(comparison: Callable[..., Tensor], a: Tensor, b: Union[Tensor, float], fast: bool) -> Tensor:
    """1 or 0, of a's kind. `fast`: written there at once, for comparisons that make booleans take 7 x as long (torch 2.13)."""
    return comparison(a, b, out=torch.empty_like(a)) if fast else comparison(a, b).to(a.dtype)


def _blank_out(scores: Prediction, counted: Tensor, settings: Settings) -> Prediction:
    """The same with something harmless where nothing counts; NaN there is allowed."""
    if not isinstance(scores, Tensor):
        return tuple(torch.where(counted > 0, part, torch.zeros_like(part)) for part in scores)  # type: ignore[return-value]
    even = {"logits": 0.0, "probs": 1 / settings.num_classes, "log_probs": -math.log(settings.num_classes)}[settings.input]
    return torch.where(counted > 0, scores, torch.full_like(scores[:, :1], even))


def _count_classes_(totals: Totals, scores: Tensor, label: Tensor, settings: Settings) -> None:
    """Add the cells of every class's probability; all of (C, P) and (P,) count."""
    if not len(label):
        return
    p = scores.double()
    p = torch.softmax(p, 0) if settings.input == "logits" else p.exp() if settings.input == "log_probs" else p
    cell = cell_of(p, n_bins=settings.n_bins, fine_bins=settings.fine_bins, both_ends=True).long()
    totals.class_pixels.scatter_add_(1, cell, torch.ones_like(cell))
    totals.class_confidence.scatter_add_(1, cell, p)
    # A stray label is complained of when all pieces are done; here it must do no harm.
    own = label.clamp(0.0, settings.num_classes - 1.0).long().unsqueeze(0)
    number = cell.gather(0, own).add_(cell.new_tensor(totals.class_hits.shape[1]) * own).squeeze(0)
    totals.class_hits.view(-1).scatter_add_(0, number, torch.ones_like(number))


def _pieces(
    x: Prediction, target: Tensor, region: Optional[Tensor], ignore_index: int, size: int
) -> Iterator[Tuple[Prediction, Tensor, Tensor]]:
    """Scores (C, P), or a pair of (P,), labels (P,) and which pixels count, 1 or 0, (P,), both float64; P <= size."""
    images, height, width = target.shape
    columns = max(1, min(width, size))
    rows = max(1, min(height, size // columns))
    together = max(1, size // (rows * columns))  # small images; 1 where one image has more than one piece
    for i in range(0, images, together):
        for j in range(0, height, rows):
            for k in range(0, width, columns):
                window = (slice(i, i + together), slice(j, j + rows), slice(k, k + columns))
                label = target[window].reshape(-1).double()
                counted = _compare(torch.ne, label, float(ignore_index), _COMPARES_INTO_FLOATS)
                if region is not None:
                    counted *= region[window].reshape(-1)
                if isinstance(x, Tensor):
                    part = x[window[0], :, window[1], window[2]]
                    yield part.transpose(0, 1).reshape(x.shape[1], -1), label, counted
                else:
                    yield (x[0][window].reshape(-1), x[1][window].reshape(-1)), label, counted


def _piece_size(settings: Settings, device: torch.device) -> int:
    elements = _ELEMENTS["cpu" if device.type == "cpu" else "cuda"]
    # Class-wise counts take a dozen temporaries of this size, the rest takes two.
    return max(256, elements // (4 if settings.classwise else 1) // settings.num_classes)


def _part(memory: Tensor, like: Tensor) -> Tensor:
    return memory[: like.numel()].view(like.shape)


def _tolerance(dtype: torch.dtype, kind: str) -> float:
    """How far from 1 probabilities may sum: rounding moves the sum by less than a relative error of each; a log-probability, at
    most about -10 where it matters, is rounded more coarsely than the probability itself."""
    return max(1e-3, (2.0 if kind == "probs" else 20.0) * torch.finfo(dtype).eps)
