"""Labels that do not count: one, or several; they may be classes too."""

from typing import Optional, Sequence, Tuple, Union

import torch
from torch import Tensor

from ._check import as_whole, problem

IgnoreIndex = Union[int, Sequence[int]]
"""The label, or the labels, of pixels that neither train nor judge."""
# Labels are compared as float64 by the metrics, which is exact up to here.
_FURTHEST = 1 << 52
USUAL = 255
"""The label that does not count where nothing is said of it."""


def ignored_labels(function: str, ignore_index: IgnoreIndex) -> Tuple[int, ...]:
    """The labels as a tuple, each once, in their order.

    Raises:
        ValueError: no label, one that is no whole number, one beyond 2^52.

    Example:
        >>> ignored_labels("f", 255), ignored_labels("f", [0, 255, 0])
        ((255,), (0, 255))
    """
    several = ignore_index if isinstance(ignore_index, (tuple, list)) else (ignore_index,)
    if not several:
        remedy = "pass a label that does not occur, such as 255, where every pixel counts"
        raise problem(function, expected="ignore_index: a label or several", got="none", remedy=remedy)
    labels = [as_whole(function, "ignore_index", label, low=-_FURTHEST, high=_FURTHEST) for label in several]
    return tuple(dict.fromkeys(labels))


def is_ignored(label: Tensor, ignore_index: IgnoreIndex) -> Tensor:
    """Where the label is one of `ignore_index`: bool, of the label's shape.

    Example:
        >>> is_ignored(torch.tensor([0, 1, 255]), (0, 255)).tolist()
        [True, False, True]
    """
    label = label.long()  # in uint8, -1 would equal 255
    if isinstance(ignore_index, (tuple, list)):
        found = torch.zeros_like(label, dtype=torch.bool)
        for one in ignore_index:
            found |= label == one
        return found
    return label.eq(void_label(ignore_index))


def void_label(ignore_index: IgnoreIndex) -> int:
    """What to write where a label shall not count: the last of `ignore_index`.

    Example:
        >>> void_label((0, 255))
        255
    """
    return int(ignore_index[-1] if isinstance(ignore_index, Sequence) else ignore_index)


def with_one_void(label: Tensor, ignore_index: IgnoreIndex) -> Tensor:
    """The label with `void_label` wherever it is one of several: for losses that know one label that does not count.

    Example:
        >>> with_one_void(torch.tensor([0, 1, 255]), (0, 255)).tolist()
        [255, 1, 255]
    """
    if not isinstance(ignore_index, (tuple, list)):
        return label
    return label.masked_fill(is_ignored(label, ignore_index), void_label(ignore_index))


def usual_is_class(num_classes: int, *, first_label: int = 0) -> bool:
    """Whether label 255 is a class, where class 0 has the label `first_label`.

    Example:
        >>> usual_is_class(255), usual_is_class(256), usual_is_class(255, first_label=1)
        (False, True, True)
    """
    return first_label + num_classes > USUAL


def ignored_or_255(
    function: str, ignore_index: Optional[IgnoreIndex], num_classes: Optional[int] = None, *, first_label: int = 0
) -> IgnoreIndex:
    """What was given, checked, or where nothing was 255, unless that is a class: then it must be said.

    Args:
        num_classes: C; None where it is not known yet.
        first_label: of class 0.

    Raises:
        ValueError: no labels; nothing given where 255 is a class.

    Example:
        >>> ignored_or_255("f", None), ignored_or_255("f", [0]), ignored_or_255("f", (0, 255))
        (255, 0, (0, 255))
    """
    if ignore_index is not None:
        labels = ignored_labels(function, ignore_index)
        return labels if len(labels) > 1 else labels[0]
    if num_classes is not None and usual_is_class(num_classes, first_label=first_label):
        remedy = f"pass ignore_index={USUAL} if class {USUAL - first_label} is not to count, "
        remedy += "else a label that does not occur, such as -1"
        expected = f"ignore_index to be given with {num_classes} classes, of which {USUAL} is one"
        raise problem(function, expected=expected, got="none", remedy=remedy)
    return USUAL
