"""Soft labels for heads that know hard ones only: what stands in for the loss function inside mmseg's `CrossEntropyLoss`."""

from contextlib import contextmanager
from typing import Any, Callable, Iterator, NamedTuple, Optional

import torch.nn.functional as F
from torch import Tensor

from .._check import describe, problem

Criterion = Callable[..., Tensor]


class _Lesson(NamedTuple):
    hard_label: Tensor
    """(N, 1, H, W) int64: what the heads are given."""
    soft_label: Tensor
    """(N, C, H, W)."""


class Teaching:
    """What the heads' criteria compute at present, shared by all of them: the host's loss, soft labels, or an outer loss."""

    def __init__(self) -> None:
        self.lesson: Optional[_Lesson] = None
        self.judge: Optional[Criterion] = None

    @contextmanager
    def soft(self, hard_label: Tensor, soft_label: Tensor) -> Iterator[None]:
        """Inside, heads that are given `hard_label` (N, 1, H, W), or a window of it, learn `soft_label` (N, C, H, W)."""
        self.lesson = _Lesson(hard_label, soft_label)
        try:
            yield
        finally:
            self.lesson = None

    @contextmanager
    def judged(self, loss: Optional[Criterion]) -> Iterator[None]:
        """Inside, heads compute `loss(logits, label, weight)`; None: the host's own loss."""
        self.judge = loss
        try:
            yield
        finally:
            self.judge = None

    def criterion(self, host: Criterion) -> Criterion:
        """What to put in the place of `host`, the criterion of one head's loss."""

        def criterion(logits: Tensor, label: Tensor, weight: Optional[Tensor] = None, **options: Any) -> Tensor:
            if self.judge is not None:
                return self.judge(logits, label, weight)
            if self.lesson is None:
                return host(logits, label, weight, **options)
            soft_label = window_like(label, self.lesson.hard_label, self.lesson.soft_label)
            return soft_label_loss(logits, soft_label, weight, **options)

        return criterion


def soft_label_loss(
    logits: Tensor,
    soft_label: Tensor,
    weight: Optional[Tensor] = None,
    *,
    class_weight: Optional[Tensor] = None,
    reduction: str = "mean",
    avg_factor: Optional[float] = None,
    ignore_index: int = 255,
) -> Tensor:
    """mmseg's `cross_entropy` with soft labels: the same number where a label is one-hot, 0 where it is all zeros.

    Like there, and unlike `dacal_addon.soft_cross_entropy`, the mean is over all pixels, the ignored ones included.

    Args:
        logits: (N, C, H, W); the gradient flows through them.
        soft_label: (N, C, H, W), sums to 1 or, at ignored pixels, to 0; the gradient flows through it.
        weight: (N, H, W), or None for 1.
        class_weight: (C,), or None for 1.
        reduction: "mean", "sum" or "none".
        avg_factor: what to divide the sum by, instead of the number of pixels.
        ignore_index: of the hard label; not used, since the soft one says what is ignored.

    Example:
        >>> import torch
        >>> loss = soft_label_loss(torch.zeros(1, 2, 1, 1), torch.tensor([0.25, 0.75]).view(1, 2, 1, 1))
        >>> round(loss.item(), 4)  # log 2
        0.6931
    """
    terms = soft_label * F.log_softmax(logits, dim=1)
    if class_weight is not None:
        terms = terms * class_weight.view(1, -1, 1, 1)
    loss = -terms.sum(1)
    if weight is not None:
        loss = loss * weight.float()
    if reduction == "none":
        return loss
    if avg_factor is not None:
        return loss.sum() / avg_factor
    return loss.sum() if reduction == "sum" else loss.mean()


def window_like(part: Tensor, whole: Tensor, other: Tensor) -> Tensor:
    """The window of `other` (N, C, H, W) that `part` (N, h, w), a view into `whole` (N, 1, H, W), is of `whole`.

    HRDA teaches its detail crop a window of the label. Where it lies is known to that head alone, but also from the memory it
    points to, and that whichever copy of the network an engine runs.

    Example:
        >>> import torch
        >>> label = torch.arange(24).view(1, 1, 4, 6)
        >>> window_like(label[:, 0, 1:3, 2:5], label, label)[0, 0].tolist()
        [[8, 9, 10], [14, 15, 16]]
    """
    offset, rest = divmod(part.data_ptr() - whole.data_ptr(), whole.element_size())
    (height, width), (h, w) = whole.shape[-2:], part.shape[-2:]
    y, x = divmod(offset, width)
    inside = whole.is_contiguous() and rest == 0 and 0 <= y <= height - h and 0 <= x <= width - w
    if not inside or part.shape[0] != whole.shape[0] or part.stride()[-2:] != whole.stride()[-2:]:
        raise problem(
            "window_like",
            expected=f"the head to be taught the label it is given, {describe(whole)}, or a window of it",
            got=describe(part),
            remedy="use heads that neither copy nor resize the label, as those of DAFormer, HRDA and MIC",
        )
    return other[:, :, y : y + h, x : x + w]
