"""A batch in pieces: what is judged at once."""

import itertools
import math
from typing import Callable, Iterator, List, NamedTuple, Optional, Tuple, Union

import torch
from torch import Tensor

from ..one_channel import two_channels
from .settings import Settings

Scores = Union[Tensor, Tuple[Tensor, Tensor]]
# torch 1.7 cannot write a comparison into a float tensor.
COMPARES_INTO_FLOATS = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (1, 9)


class Batch(NamedTuple):
    """Checked arrays of one device. N images (or volumes) with any number of spatial dimensions *S."""

    scores: Scores
    """(N, C, *S) floating, or for "top1" confidence and predicted class, (N, *S) each."""
    label: Tensor
    """(N, *S) integer."""
    region: Optional[Tensor]
    """(N, *S) bool, or None for all."""
    normalize: bool = False
    """Probabilities are to be divided by their sum."""

    def image(self, i: int) -> "Batch":
        """One of its images, as a batch."""
        part = slice(i, i + 1)
        scores = self.scores[part] if isinstance(self.scores, Tensor) else (self.scores[0][part], self.scores[1][part])
        return Batch(scores, self.label[part], None if self.region is None else self.region[part], self.normalize)


class Piece(NamedTuple):
    """P pixels."""

    scores: Scores
    """(C, P), or for "top1" confidence and predicted class, (P,) each."""
    label: Tensor
    """(P,) float64: the class, a whole number; anything where nothing counts."""
    counted: Tensor
    """(P,) float64, 1 or 0."""


def pieces(batch: Batch, settings: Settings, size: int, *, begin: int = 0, step: int = 1) -> Iterator[Piece]:
    """All of the batch, at most `size` pixels at a time; or every `step`-th of these pieces, from number `begin` on.

    Example:
        >>> settings = Settings(2, "logits", (255,), 15, 4096, False)
        >>> batch = Batch(torch.zeros(1, 2, 3, 4), torch.tensor([[[0, 1, 1, 255]] * 3]), None)
        >>> [(len(piece.label), int(piece.counted.sum())) for piece in pieces(batch, settings, 8)]
        [(8, 6), (4, 3)]
    """
    # Blocks of the last dimensions first: where they are whole, what is copied lies together. The first one takes small images
    # together, and only one where an image has more than one piece.
    steps: List[int] = []
    room = max(1, size)
    for extent in reversed(batch.label.shape):
        steps.insert(0, max(1, min(extent, room)))
        room = max(1, room // steps[0])
    corners = itertools.product(*(range(0, extent, some) for extent, some in zip(batch.label.shape, steps)))
    for corner in itertools.islice(corners, begin, None, step):
        window = tuple(slice(at, at + some) for at, some in zip(corner, steps))
        label = batch.label[window].reshape(-1).double()
        counted = _counted(label, settings)
        if batch.region is not None:
            counted *= batch.region[window].reshape(-1)
        if settings.reduce_zero_label:
            label = label.sub_(1.0)
        if not isinstance(batch.scores, Tensor):
            yield Piece((batch.scores[0][window].reshape(-1), batch.scores[1][window].reshape(-1)), label, counted)
            continue
        channels = (window[0], slice(None), *window[1:])
        part = batch.scores[channels]
        if settings.one_channel:
            # In float64: of a probability in half precision, 1 - p would be rounded once more.
            part = two_channels(part.double(), input=settings.input)
        scores = part.transpose(0, 1).reshape(settings.num_classes, -1)
        yield Piece(_normalized(scores) if batch.normalize else scores, label, counted)


def blank_out(piece: Piece, settings: Settings) -> Piece:
    """The same with something harmless where nothing counts; NaN there is allowed."""
    counts, scores = piece.counted > 0, piece.scores
    if not isinstance(scores, Tensor):
        confidence, prediction = (torch.where(counts, part, torch.zeros_like(part)) for part in scores)
        return piece._replace(scores=(confidence, prediction))
    even = {"logits": 0.0, "probs": 1 / settings.num_classes, "log_probs": -math.log(settings.num_classes)}[settings.input]
    # Filled and not chosen: torch 1.7 has no `where` of half precision on a CPU.
    return piece._replace(scores=scores.masked_fill(~counts, even))


def compare(comparison: Callable[..., Tensor], a: Tensor, b: Union[Tensor, float], *, fast: bool) -> Tensor:
    """1 or 0, of a's kind. `fast`: written there at once, for comparisons that make booleans take 7 x as long (torch 2.13).

    >>> compare(torch.ne, torch.tensor([1.0, 2.0]), 2.0, fast=False)
    tensor([1., 0.])
    """
    return comparison(a, b, out=torch.empty_like(a)) if fast else comparison(a, b).to(a.dtype)


def _counted(label: Tensor, settings: Settings) -> Tensor:
    ignored = {*settings.ignore_index, 0} if settings.reduce_zero_label else settings.ignore_index
    counted = None
    for one in ignored:
        other = compare(torch.ne, label, float(one), fast=COMPARES_INTO_FLOATS)
        counted = other if counted is None else counted.mul_(other)
    return torch.ones_like(label) if counted is None else counted


def _normalized(scores: Tensor) -> Tensor:
    p = scores.double()
    # Of negative ones only, shares would be in 0..1 too, the larger the less probable.
    return p / p.sum(0).masked_fill(~(p.amin(0) >= 0), math.nan)
