"""Soft labels for heads that know hard ones only: what stands in for the loss function inside mmseg's `CrossEntropyLoss`."""

from contextlib import ExitStack, contextmanager
from typing import Any, Iterator, List, NamedTuple, Optional, Protocol, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._check import describe, problem
from ..losses import OuterLoss
from .listening import shadowed


class Criterion(Protocol):
    """The loss function inside a head's loss, as mmseg's `cross_entropy`; its options are the host's."""

    def __call__(self, logits: Tensor, label: Tensor, weight: Optional[Tensor] = None, **options: Any) -> Tensor: ...


class _Lesson(NamedTuple):
    hard_label: Tensor
    """(N, 1, H, W) int64: what the heads are given."""
    soft_label: Tensor
    """(N, C, H, W)."""


class TaughtHeads:
    """A student's heads, whose criteria compute at present, all alike: the host's loss, that of soft labels, or an outer loss.

    Args:
        losses: the heads' own, see `teachable_losses`.
    """

    def __init__(self, losses: Sequence[nn.Module]) -> None:
        self.losses = losses
        self._lesson: Optional[_Lesson] = None
        self._judge: Optional[OuterLoss] = None
        self._taught = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, the next two have an effect on the heads."""
        with ExitStack() as stack:
            for loss in self.losses:
                stack.enter_context(shadowed(loss, "cls_criterion", self.criterion))
            yield

    @contextmanager
    def soft(self, hard_label: Tensor, soft_label: Tensor) -> Iterator[None]:
        """Inside, heads that are given `hard_label` (N, 1, H, W), or a window of it, learn `soft_label` (N, C, H, W).

        Raises:
            RuntimeError: no head has asked its criterion for a loss, so that the student did not learn these labels.
        """
        self._lesson, self._taught = _Lesson(hard_label, soft_label), False
        try:
            yield
        finally:
            self._lesson = None
        if not self._taught:
            raise problem(
                "uda.dacal",
                expected="heads that ask their loss_decode.cls_criterion for the loss",
                got="a pass of the student in which none did",
                remedy="use mmseg's CrossEntropyLoss, or labels='hard', every=0",
                error=RuntimeError,
            )

    @contextmanager
    def judged(self, loss: Optional[OuterLoss]) -> Iterator[None]:
        """Inside, heads compute `loss(logits, label, weight)`; None: the host's own loss."""
        self._judge = loss
        try:
            yield
        finally:
            self._judge = None

    def criterion(self, host: Criterion) -> Criterion:
        """What to put in the place of `host`, the criterion of one head's loss."""

        def criterion(logits: Tensor, label: Tensor, weight: Optional[Tensor] = None, **options: Any) -> Tensor:
            if self._judge is not None:
                return self._judge(logits, label, weight)
            if self._lesson is None:
                return host(logits, label, weight, **options)
            self._taught = True
            soft_label = window_like(label, self._lesson.hard_label, self._lesson.soft_label)
            return soft_label_loss(logits, soft_label, weight, **options)

        return criterion


def teachable_losses(student: nn.Module) -> List[nn.Module]:
    """The losses of the student's heads that can be taught soft labels.

    Raises:
        ValueError: the decode head's loss is none of them.
    """
    losses = [module for module in student.modules() if "cls_criterion" in vars(module)]
    own: Any = getattr(getattr(student, "decode_head", None), "loss_decode", None)
    sigmoid = getattr(own, "use_sigmoid", False) or getattr(own, "use_mask", False)
    if own is None or own not in losses or sigmoid:
        raise problem(
            "uda.dacal",
            expected="model.decode_head.loss_decode: dict(type='CrossEntropyLoss', use_sigmoid=False)",
            got=f"{type(own).__name__}{' with sigmoid or mask' if sigmoid else ''}",
            remedy="use the softmax cross-entropy, or labels='hard', every=0",
        )
    return losses


def soft_label_loss(
    logits: Tensor,
    soft_label: Tensor,
    weight: Optional[Tensor] = None,
    *,
    class_weight: Optional[Tensor] = None,
    reduction: str = "mean",
    avg_factor: Optional[float] = None,
    ignore_index: int = 255,
    avg_non_ignore: Optional[bool] = None,
) -> Tensor:
    """mmseg's `cross_entropy` with soft labels: the same number where a label is one-hot, 0 where it is all zeros.

    Like there, and unlike `dacal_addon.soft_cross_entropy`, the mean is over all pixels, the ignored ones included, unless
    `avg_non_ignore` says otherwise.

    Args:
        logits: (N, C, H, W); the gradient flows through them.
        soft_label: (N, C, H, W), sums to 1 or, at ignored pixels, to 0; the gradient flows through it.
        weight: (N, H, W), or None for 1.
        class_weight: (C,), or None for 1.
        reduction: "mean", "sum" or "none".
        avg_factor: what to divide the sum by, instead of the number of pixels.
        ignore_index: of the hard label; not used, since the soft one says what is ignored.
        avg_non_ignore: what the mean divides by. None, in the mmseg of DAFormer, HRDA and MIC: the number of pixels. mmseg 1.x
            passes False for the sum of the pixels' class weights (1 each without), or True for that sum over the pixels that
            are not ignored. A soft label's class weight is its mean; an ignored pixel has none, where mmseg looks for that of
            class 255, and fails.

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
    if reduction == "sum":
        return loss.sum()
    return loss.mean() if avg_non_ignore is None else loss.sum() / _divisor(soft_label, class_weight, avg_non_ignore)


def _divisor(soft_label: Tensor, class_weight: Optional[Tensor], avg_non_ignore: bool) -> Tensor:
    """What the mean of mmseg 1.x divides by, never 0."""
    if class_weight is not None:
        total = (soft_label * class_weight.view(1, -1, 1, 1)).sum()
    elif avg_non_ignore:
        total = (soft_label.detach() > 0).any(1).sum().to(soft_label.dtype)
    else:
        total = soft_label.new_tensor(float(soft_label[:, 0].numel()))
    return total.clamp(min=torch.finfo(torch.float32).eps)


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
