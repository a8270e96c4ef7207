"""From predictions and labels to totals, a piece of them at a time.

A pass over the whole array per operation would be bound by memory, and a float64 copy of 19 x 1024 x 2048 logits would take
300 MB. In pieces it is 6 MB, on a GPU 32, and costs what the arithmetic costs.
"""

from concurrent.futures import ThreadPoolExecutor
from typing import Callable, List, NamedTuple, Optional, Tuple

import torch
from torch import Tensor

from .grid import cell_count, cell_of
from .images import Images, image_of
from .pieces import COMPARES_INTO_FLOATS, Batch, Piece, Scores, blank_out, compare, pieces
from .settings import Settings
from .totals import Totals, add_

# Elements (classes x pixels) of a piece, whose float64 copy takes 6.4 MB. A quarter of it would fit the second-level cache of a
# CPU's core and is no faster; but several threads then wait for each other (0.21 s an image in two threads, 0.13 s with these).
# On a GPU launches are what counts: 19 x 1024 x 2048 in 86 pieces of 500,000 took an H100 14 ms, and the launches 105 ms (in
# torch.profiler). With its temporaries a piece takes, by estimate, 30 bytes an element there: 120 MB.
_ELEMENTS = {"cpu": 800_000, "cuda": 4_000_000}
_ONE_THREAD = 32_767  # below torch's at::internal::GRAIN_SIZE
# Pixels whose confidences are summed one by one, before the sum is added to that of all others: 268 million in one sum were
# off by 3e-9, since each addition rounds to the last place of the whole.
_PIXELS_IN_A_SUM = 500_000


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


Judge = Callable[[Scores, Tensor, Tensor, Settings, Optional[Scratch]], Judged]
Sweep = Callable[..., Tuple[float, float, bool]]
"""Like `fused.sweep_`."""
Launch = Callable[..., Optional[List[Images]]]
"""Like `triton_kernel.launch_`."""


def count_(
    totals: Totals,
    batch: Batch,
    settings: Settings,
    *,
    each: bool = False,
    compiled: Optional[Judge] = None,
    sweep: Optional[Sweep] = None,
    launch: Optional[Launch] = None,
) -> Optional[List[Images]]:
    """Add the pixels of a batch, all on one device, to `totals`.

    Args:
        totals: on the device of the batch; for `launch` on the CPU.
        each: the counts of every image are wanted.
        compiled: `judge` as torch.compile made it.
        sweep: `fused.sweep_`, which takes the place of `judge`; the batch must be of scores, on the CPU.
        launch: `triton_kernel.launch_`, which takes the place of all of this.

    Returns:
        the images' counts if `each`, none otherwise; None if not all was well: `totals` is worthless then.
    """
    if launch is not None:
        return launch(totals, batch, settings, each=each)
    found: List[Images] = []
    for part in [batch.image(i) for i in range(len(batch.label))] if each else [batch]:
        counts = Totals(*(torch.zeros_like(field) for field in totals))
        if not (_sweep_all(counts, part, settings, sweep) if sweep else _judge_all(counts, part, settings, compiled)):
            return None
        looked_at = part.label.numel() if part.region is None else part.region.sum()
        counts.ignored.add_(looked_at - counts.pixels.sum())
        counts.images.add_(len(part.label))
        if each:
            found.append(image_of(counts))
        add_(totals, counts)
    return found


def _judge_all(totals: Totals, batch: Batch, settings: Settings, compiled: Optional[Judge]) -> bool:
    device, classes = batch.label.device, settings.num_classes
    size = piece_size(settings, device)
    scratch = None
    if compiled is None and COMPARES_INTO_FLOATS:
        terms, equal = (torch.empty(classes * size, dtype=d, device=device) for d in (torch.float64, torch.float32))
        scratch = Scratch(terms, equal, _rank(classes, device))
    sums = _Sums(totals, size)
    for piece in pieces(batch, settings, size):
        judged = (compiled or judge)(*piece, settings, scratch)
        if not bool(judged.suspicion == 0):
            piece = blank_out(piece, settings)
            judged = judge(*piece, settings, scratch)
            if not bool(judged.suspicion == 0):
                return False
        sums.add(judged)
        if settings.classwise and isinstance(piece.scores, Tensor):
            counts = piece.counted > 0
            sums.add_classes(piece.scores[:, counts], piece.label[counts], settings)
    return sums.finish()


def _sweep_all(totals: Totals, batch: Batch, settings: Settings, sweep: Sweep) -> bool:
    # Of so few pixels torch computes in one thread: its others, waiting for more work, would take time from the sweeps.
    size = min(_ONE_THREAD, piece_size(settings, batch.label.device))
    threads = min(torch.get_num_threads(), -(-batch.label.numel() // size))
    # A thread adds to counts of its own, and always the same pieces, so that sums are the same in every run.
    parts = [totals, *(Totals(*(field.clone() for field in totals)) for _ in range(threads - 1))]

    def sweep_some(number: int) -> bool:
        sums = _Sums(parts[number], 0)
        some = pieces(batch, settings, size, begin=number, step=len(parts))
        return all(sums.sweep(piece, settings, sweep) for piece in some) and sums.finish()

    if len(parts) == 1:
        return sweep_some(0)
    with ThreadPoolExecutor(threads) as pool:
        if not all(list(pool.map(sweep_some, range(threads)))):
            return False
    for part in parts[1:]:
        add_(totals, part)
    return True


class _Sums:
    """The totals of a batch in the making: `totals`, zero as yet, on the device of the pieces, of `size` pixels each."""

    def __init__(self, totals: Totals, size: int) -> None:
        device, classes, cells = totals.pixels.device, len(totals.confusion), len(totals.pixels)
        self._totals, self._pixels = totals, 0
        # scatter_add_ takes half of bincount's time, which looks for the smallest and the largest number first.
        self._by_cell, self._by_pair = (
            torch.zeros(n, dtype=torch.int64, device=device) for n in (2 * cells + 1, (classes + 2) * classes + 1)
        )
        self._confidence, self._of_pair = (torch.zeros_like(x, dtype=torch.float64) for x in (self._by_cell, self._by_pair))
        # Pixels and probabilities of a class's cell lie side by side.
        self._of_class = torch.zeros(*totals.class_confidence.shape, 2, dtype=torch.float64, device=device)
        self._ones = torch.ones(size, dtype=torch.int64, device=device)

    def add(self, judged: Judged) -> None:
        """Add a piece."""
        self._flush(len(judged.cell))
        ones = self._ones[: len(judged.cell)]
        self._by_cell.scatter_add_(0, judged.cell, ones)
        self._confidence.scatter_add_(0, judged.cell, judged.confidence)
        self._by_pair.scatter_add_(0, judged.pair, ones)
        self._of_pair.scatter_add_(0, judged.pair, judged.confidence)
        self._totals.nll.add_(judged.nll)
        self._totals.brier.add_(judged.brier)

    def sweep(self, piece: Piece, settings: Settings, sweep: Sweep) -> bool:
        """Add a piece of scores, with the classes' probabilities where they count; whether all was well."""
        self._flush(len(piece.label))
        totals = self._totals
        nll, brier, well = sweep(
            piece,
            settings,
            allowed=tolerance(piece.scores.dtype, settings.input) if isinstance(piece.scores, Tensor) else 0.0,
            by_cell=self._by_cell,
            confidence=self._confidence,
            by_pair=self._by_pair,
            of_pair=self._of_pair,
            of_class=self._of_class,
            class_hits=totals.class_hits,
        )
        totals.nll.add_(nll)
        totals.brier.add_(brier)
        return well

    def add_classes(self, scores: Tensor, label: Tensor, settings: Settings) -> None:
        """Add the cells of every class's probability of a piece; all of (C, P) and (P,) count."""
        if not len(label):
            return
        totals, p = self._totals, scores.double()
        p = torch.softmax(p, 0) if settings.input == "logits" else p.exp() if settings.input == "log_probs" else p
        cell = cell_of(p, n_bins=settings.n_bins, fine_bins=settings.fine_bins, both_ends=True).long()
        pixels, confidence = self._of_class.unbind(2)
        pixels.scatter_add_(1, cell, torch.ones_like(p))
        confidence.scatter_add_(1, cell, p)
        # A stray label is complained of when all pieces are done; here it must do no harm.
        own = label.clamp(0.0, settings.num_classes - 1.0).long().unsqueeze(0)
        number = cell.gather(0, own).add_(cell.new_tensor(totals.class_hits.shape[1]) * own).squeeze(0)
        totals.class_hits.view(-1).scatter_add_(0, number, torch.ones_like(number))

    def finish(self) -> bool:
        """Put everything into the totals; whether there was no stray label."""
        totals, classes = self._totals, len(self._totals.confusion)
        self._flush(_PIXELS_IN_A_SUM)
        by_cell, by_pair = self._by_cell[:-1].view(-1, 2), self._by_pair[:-1].view(-1, classes)
        if bool((by_pair[[0, -1]] != 0).any()):
            return False
        totals.pixels.add_(by_cell.sum(1))
        totals.correct.add_(by_cell[:, 1])
        totals.confusion.add_(by_pair[1:-1])
        return True

    def _flush(self, more: int) -> None:
        """Add the sums so far to the totals, where `more` pixels would make them too many."""
        self._pixels += more
        if self._pixels < _PIXELS_IN_A_SUM:
            return
        totals, self._pixels = self._totals, more
        totals.confidence.add_(self._confidence[:-1].view(-1, 2).sum(1))
        totals.predicted_confidence.add_(self._of_pair[:-1].view(-1, len(totals.confusion)).sum(0))
        totals.class_pixels.add_(self._of_class[..., 0].long())
        totals.class_confidence.add_(self._of_class[..., 1])
        for one in (self._confidence, self._of_pair, self._of_class):
            one.zero_()


def judge(scores: Scores, label: Tensor, counted: Tensor, settings: Settings, scratch: Optional[Scratch] = None) -> Judged:
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
    right = compare(torch.eq, prediction, label, fast=scratch is not None)
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


def tolerance(dtype: torch.dtype, kind: str) -> float:
    """How far from 1 probabilities may sum: rounding moves the sum by less than a relative error of each; a log-probability, at
    most about -10 where it matters, is rounded more coarsely than the probability itself."""
    return max(1e-3, (2.0 if kind == "probs" else 20.0) * torch.finfo(dtype).eps)


def piece_size(settings: Settings, device: torch.device) -> int:
    """Pixels of a piece."""
    elements = _ELEMENTS["cpu" if device.type == "cpu" else "cuda"]
    # Class-wise counts take a dozen temporaries of this size, the rest takes two.
    return max(256, elements // (4 if settings.classwise else 1) // settings.num_classes)


def _judge_scores(
    scores: Tensor, own_class: Tensor, counted: Tensor, kind: str, scratch: Optional[Scratch]
) -> Tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Confidence, predicted class, NLL, Brier score, (P,) float64 each, of scores (C, P); and the suspicion."""
    allowed = tolerance(scores.dtype, kind)
    if scores.dtype in (torch.float16, torch.bfloat16):
        scores = scores.float()
    largest = scores.amax(0)
    own = scores.gather(0, own_class.unsqueeze(0)).squeeze(0).double()
    prediction = _first_largest(scores, largest, scratch)
    largest = largest.double()
    terms = scores.to(torch.float64, copy=True) if scratch is None else _part(scratch.terms, scores).copy_(scores)
    if kind == "logits":
        # NaN if one is, infinite if one is +infinity or all are -infinity; times 0, these are NaN. Some may be -infinity.
        suspicion = torch.dot(largest * 0.0, counted)
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
    off = (terms.sum(0) - 1).abs() - allowed
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


def _part(memory: Tensor, like: Tensor) -> Tensor:
    return memory[: like.numel()].view(like.shape)
