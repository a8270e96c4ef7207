"""What a whole set tells about its labels, shifted by one, or a mask whose foreground was ignored; and about its logits."""

from typing import List, NamedTuple, Optional

import numpy as np
import torch
from torch import Tensor

from .predictions import Prediction

# A network that predicts one class everywhere agrees with the neighbours of one class, and of no other.
_FEWEST_CLASSES = 3
# How far from 1 probabilities may sum.
_ROUNDED = 1e-3


class Doubt(NamedTuple):
    """What seems wrong with the labels."""

    what: str
    plain: bool
    """So plain that no report is to be written."""


def shift(confusion: Tensor, by: int) -> float:
    """How well predictions agree with labels moved by `by`: the mean over classes of the share that is predicted so. In 0..1.

    Args:
        confusion: (C, C), pixels by target (row) and predicted class.

    Returns:
        0 unless half of the pixels agree in at least three classes.

    Example:
        >>> shift(torch.tensor([[0, 0, 0, 0], [9, 1, 0, 0], [0, 9, 1, 0], [0, 0, 9, 1]]), -1)
        0.9
    """
    moved = torch.diagonal(confusion.double(), by)
    pixels = confusion.double().sum(1)
    pixels = pixels[:-by] if by > 0 else pixels[-by:]
    shares = (moved / pixels)[pixels > 0]
    return float(shares.mean()) if int((shares > 0.5).sum()) >= _FEWEST_CLASSES else 0.0


def shifted(confusion: Tensor, *, reduced: bool) -> Optional[Doubt]:
    """Whether labels moved by one agree far better with the predictions: 0 is "unlabelled" in them, or is no longer.

    Plain are 90 % against less than 10 %; 50 % and twice as much as without is a remark. `reduced`: --reduce-zero-label was
    given.
    """
    by, remedy = (1, "leave out --reduce-zero-label") if reduced else (-1, "pass --reduce-zero-label if 0 is unlabelled")
    pixels = float(confusion.sum())
    accuracy = float(confusion.double().diag().sum()) / pixels if pixels else 0.0
    agreement = shift(confusion, by)
    if agreement < 0.5 or agreement < 2 * accuracy:
        return None
    found = f"labels look shifted by one: {100 * accuracy:.1f} % of the pixels agree with the predictions as they are, moved"
    what = f"{found} by {by:+d} {100 * agreement:.1f} % (mean over classes); {remedy}"
    return Doubt(what, plain=agreement > 0.9 and accuracy < 0.1)


def foreground_ignored(class_pixels: Tensor, ignored_pixels: int) -> Optional[Doubt]:
    """Whether all of class 1 of two classes is missing, and pixels are ignored instead: masks of 0 and 255."""
    if len(class_pixels) != 2 or not ignored_pixels or int(class_pixels[1]) or not int(class_pixels[0]):
        return None
    found = f"no pixel is of class 1, and {ignored_pixels} are ignored"
    return Doubt(f"{found}: for masks of 0 and 255 pass --label-map binary", plain=True)


def label_doubts(confusion: Tensor, ignored_pixels: int, *, reduced: bool, mapped: bool) -> List[Doubt]:
    """All of them. `mapped`: the labels went through a label map or a palette, which says what they mean."""
    if mapped:
        return []
    found = [shifted(confusion, reduced=reduced), foreground_ignored(confusion.sum(1), ignored_pixels)]
    return [doubt for doubt in found if doubt is not None]


def like_probabilities(scores: Prediction, counted: np.ndarray) -> bool:
    """Whether scores, (1, C, *S), are >= 0 and sum to 1 (within 1e-3) at every pixel that counts, (1, *S) bool: logits do not.

    Example:
        >>> like_probabilities(np.array([[[0.2, 5.0], [0.8, 0.0]]]), np.array([[True, False]]))
        True
        >>> like_probabilities(np.array([[[0.2, 5.0], [0.8, 0.0]]]), np.array([[True, True]]))
        False
    """
    if isinstance(scores, tuple):
        return False
    values, counts = torch.as_tensor(scores)[0], torch.from_numpy(counted)[0]
    some = counts.reshape(len(counts), -1).any(1)
    for row in torch.nonzero(some, as_tuple=False).flatten().tolist():  # of logits, the first one tells nearly always
        p = values[:, row].float()
        fits = ((p.sum(0) - 1).abs() <= _ROUNDED) & (p >= 0).all(0)
        if not bool((fits | ~counts[row]).all()):
            return False
    return True


def probabilities() -> str:
    """What such logits are, and what to do."""
    return "logits are >= 0 and sum to 1 at every pixel, as probabilities do: pass --input probs if they are"
