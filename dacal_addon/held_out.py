"""Source images that the student never trains on, kept back for judging it."""

import hashlib
from typing import Any, List, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor
from torch.utils.data import Subset

from ._check import problem
from .ignoring import IgnoreIndex, is_ignored


def hold_out(
    dataset: Any, *, share: float = 0.125, generator: Optional[torch.Generator] = None
) -> "Tuple[Subset[Any], Subset[Any]]":
    """Split a source data set into images to train on and images to judge on; none is in both.

    Args:
        dataset: anything with a length and an index. Frames of one drive or slices of one volume resemble each other: split
            such data by drive or volume yourself.
        share: of the images to keep back, in (0, 1); at least one is kept back, and at least one trained on.
        generator: which ones; by default one with seed 0, so that a resumed run keeps back the same.

    Returns:
        Two `torch.utils.data.Subset`s: to train on, and held out.

    Raises:
        ValueError: fewer than two images; a share of all, of none or of less.

    Example:
        >>> train, held_out = hold_out(list(range(80)))
        >>> len(train), len(held_out), set(train.indices) & set(held_out.indices)
        (70, 10, set())
    """
    if not 0 < share < 1:  # also refuses NaN
        remedy = "choose a value in that range, for example 0.125"
        raise problem("hold_out", expected="share in (0, 1)", got=repr(share), remedy=remedy)
    count = len(dataset)
    if count < 2:
        remedy = "pass the whole source data set, before it is split"
        raise problem("hold_out", expected="a dataset of at least 2 images", got=f"{count}", remedy=remedy)
    draw = torch.Generator().manual_seed(0) if generator is None else generator
    order = torch.randperm(count, generator=draw, device=draw.device).tolist()
    kept_back = min(count - 1, max(1, round(share * count)))
    return Subset(dataset, sorted(order[kept_back:])), Subset(dataset, sorted(order[:kept_back]))


class Fingerprints:
    """Tells whether a label map is one of those that were kept back. Cropped or flipped ones cannot be told.

    Args:
        label: the maps (*S) that were kept back, of any integer kind.

    Example:
        >>> kept_back = torch.tensor([[[0, 1], [2, 3]]])
        >>> Fingerprints(kept_back).among(torch.cat([kept_back + 1, kept_back]), ignore_index=255)
        [1]
    """

    def __init__(self, label: Union[Tensor, Sequence[Tensor]]) -> None:
        self._known = {_fingerprint(x) for x in label}
        self._shapes = {tuple(x.shape) for x in label}  # crops of another size need no look at their pixels

    def among(self, label: Tensor, *, ignore_index: IgnoreIndex) -> List[int]:
        """Which of the label maps (N, *S) are. One of a single class, beside `ignore_index`, is nobody's own: never."""
        if tuple(label.shape[1:]) not in self._shapes:
            return []
        return [i for i, x in enumerate(label) if _fingerprint(x) in self._known and _tells(x, ignore_index)]


def check_apart(function: str, known: Fingerprints, label: Tensor, *, ignore_index: IgnoreIndex) -> None:
    """Raise where a training batch has an image that was kept back.

    Args:
        label: (N, *S), of the batch.

    Raises:
        ValueError: naming the image.
    """
    both = known.among(label, ignore_index=ignore_index)
    if both:
        raise problem(
            function,
            expected="held-out images that the student does not train on",
            got=f"a training batch whose image {both[0]} has the label map of a held-out one",
            remedy="train on the first part of hold_out(dataset), and judge on the second",
        )


def _tells(label: Tensor, ignore_index: IgnoreIndex) -> bool:
    judged = label[~is_ignored(label, ignore_index)]
    return bool((judged != judged[:1]).any())


def _fingerprint(label: Tensor) -> bytes:
    digest = hashlib.blake2b(repr(tuple(label.shape)).encode(), digest_size=16)
    digest.update(label.detach().to("cpu", torch.int64).numpy().tobytes())
    return digest.digest()
