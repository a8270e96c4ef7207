"""What a `CalibrationStats` was told: how its pixels are judged, and which labels are which classes."""

import warnings
from typing import NamedTuple, Optional, Tuple

from .._check import as_whole, check_choice, problem
from ..ignoring import USUAL, IgnoreIndex, ignored_labels, ignored_or_255, usual_is_class

INPUTS = ("logits", "probs", "log_probs", "top1")
# The confusion matrix has the square of it.
_MOST_CLASSES = 4096
_MOST_BINS = 10_000


class Settings(NamedTuple):
    """How pixels are judged; see `CalibrationStats`. Counts of equal settings may be added."""

    num_classes: int
    input: str
    ignore_index: Tuple[int, ...]
    """Labels as they are in the arrays; none where every label is a class and nothing was said."""
    n_bins: int
    fine_bins: int
    classwise: bool
    one_channel: bool = False
    channels_last: bool = False
    reduce_zero_label: bool = False

    @property
    def first_label(self) -> int:
        """The label of class 0."""
        return 1 if self.reduce_zero_label else 0

    @property
    def ignored_classes(self) -> Tuple[int, ...]:
        """The classes among the ignored labels, in their order."""
        classes = (label - self.first_label for label in self.ignore_index)
        return tuple(sorted(c for c in classes if 0 <= c < self.num_classes))


def check_settings(
    name: str,
    *,
    num_classes: int,
    input: str,
    ignore_index: Optional[IgnoreIndex],
    n_bins: int,
    fine_bins: int,
    classwise: bool,
    one_channel: bool,
    channels_last: bool,
    reduce_zero_label: bool,
) -> Settings:
    """The settings, once they are in their ranges and go together; the error of `name` where not.

    Example:
        >>> options = dict(input="top1", n_bins=15, fine_bins=4096, classwise=False, one_channel=False, channels_last=False)
        >>> one = check_settings("f", num_classes=3, ignore_index=(0, 255), reduce_zero_label=True, **options)
        >>> one.ignored_classes, one._replace(reduce_zero_label=False).ignored_classes
        ((), (0,))
    """
    if num_classes == 1:
        remedy = "of one sigmoid channel say num_classes=2, one_channel=True"
        raise problem(name, expected=f"num_classes: 2..{_MOST_CLASSES}, a background too", got="1", remedy=remedy)
    num_classes = as_whole(name, "num_classes", num_classes, low=2, high=_MOST_CLASSES)
    check_choice(name, "input", input, INPUTS)
    n_bins = as_whole(name, "n_bins", n_bins, low=1, high=_MOST_BINS)
    fine_bins = as_whole(name, "fine_bins", fine_bins, low=1)
    if fine_bins not in {1 << power for power in range(8, 17)}:
        remedy = "take 4096, or more for many classes"
        raise problem(name, expected="fine_bins: a power of two from 256 to 65536", got=repr(fine_bins), remedy=remedy)
    if classwise and input == "top1":
        remedy = "pass probabilities or logits, or classwise=False"
        expected = "the probability of every class with classwise=True"
        raise problem(name, expected=expected, got="input='top1'", remedy=remedy)
    if one_channel and num_classes != 2:
        remedy = "of several sigmoids, judge each channel by itself"
        raise problem(name, expected="num_classes=2 with one_channel=True", got=str(num_classes), remedy=remedy)
    if one_channel and input not in ("logits", "probs"):
        remedy = "pass the channel before (logits) or after the sigmoid (probs)"
        raise problem(name, expected="input='logits' or 'probs' with one_channel=True", got=repr(input), remedy=remedy)
    if channels_last and input == "top1":
        remedy = "leave it out: a pair (confidence, predicted class) has no channels"
        raise problem(name, expected="channels_last=False with input='top1'", got="True", remedy=remedy)
    first = 1 if reduce_zero_label else 0
    if ignore_index is not None or not usual_is_class(num_classes, first_label=first):
        ignored = ignored_labels(name, ignored_or_255(name, ignore_index))
    else:
        ignored = ()
        warnings.warn(
            f"{name}: {USUAL} is a class here, of {num_classes}, and counts; pass ignore_index, the label that does not.",
            UserWarning,
            stacklevel=3,
        )
    return Settings(
        num_classes,
        input,
        ignored,
        n_bins,
        fine_bins,
        bool(classwise),
        bool(one_channel),
        bool(channels_last),
        bool(reduce_zero_label),
    )
