"""Pixel weights and soft labels for the heads of a segmentor that have no way to pass them: those of mmsegmentation 1.x."""

from contextlib import ExitStack, contextmanager
from typing import Any, Callable, Iterator, List, NamedTuple, Optional

import torch
from torch import Tensor, nn

from .._check import problem
from ..losses import OuterLoss
from .criterion import Criterion, soft_label_loss
from .listening import shadowed


class _Lesson(NamedTuple):
    """What the heads learn in one pass."""

    hard_label: Tensor
    """(N, H, W) int64: what they are given."""
    weight: Tensor
    """(N, H, W)."""
    soft_label: Optional[Tensor]
    """(N, C, H, W); None: they learn the hard one."""
    judge: Optional[OuterLoss]
    """What they compute instead of their own loss."""
    mean_weight: Tensor
    """Over the pixels that are not ignored."""

    def is_about(self, label: Tensor) -> bool:
        """Whether a head's loss has been given this label. mmseg 1.x stacks it anew for each head, hence by its values."""
        return label.shape == self.hard_label.shape and bool(torch.equal(label, self.hard_label))


class WeightedHeads:
    """A segmentor's heads, decode head and auxiliary ones alike: inside of `lesson` their losses weigh pixels.

    A loss with a `cls_criterion` (`CrossEntropyLoss`) that is given the label of the whole image weighs each pixel, and learns
    the soft label where there is one, unless it is a sigmoid's. Any other loss (Dice, Lovász, one that samples points) learns
    the hard label and is multiplied by the mean weight. All else of a loss stays its own: its weight, class weights, reduction,
    `avg_non_ignore`, samplers.

    Args:
        segmentor: its heads have their losses under names that begin with "loss".
        ignore_index: of the hard label.

    Raises:
        ValueError: a decode head without such a loss.

    Example:
        >>> class Loss(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.cls_criterion = lambda logits, label, weight: (logits[:, 0] * weight).mean()
        ...     def forward(self, logits, label):
        ...         return self.cls_criterion(logits, label, torch.ones(1, 1, 2))
        >>> segmentor = nn.Module()
        >>> segmentor.decode_head = nn.Module()
        >>> segmentor.decode_head.loss_decode = Loss()
        >>> heads = WeightedHeads(segmentor)
        >>> logits, label, weight = torch.ones(1, 2, 1, 2), torch.tensor([[[0, 1]]]), torch.tensor([[[1.0, 0.5]]])
        >>> with heads.listening(), heads.lesson(label, weight):
        ...     print(segmentor.decode_head.loss_decode(logits, label).item())
        0.75
    """

    def __init__(self, segmentor: nn.Module, *, ignore_index: int = 255) -> None:
        self.ignore_index = ignore_index
        self.losses = losses_of(segmentor)
        self._lesson: Optional[_Lesson] = None
        self._taught = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, `lesson` has an effect on the heads."""
        with ExitStack() as stack:
            for loss in self.losses:
                if "cls_criterion" in vars(loss):
                    softens = not (getattr(loss, "use_sigmoid", False) or getattr(loss, "use_mask", False))
                    replacement = self._criterion(softens)
                    stack.enter_context(shadowed(loss, "cls_criterion", replacement))
                else:
                    stack.enter_context(shadowed(loss, "forward", self._scaled))
            yield

    @contextmanager
    def lesson(
        self, hard_label: Tensor, weight: Tensor, *, soft_label: Optional[Tensor] = None, judge: Optional[OuterLoss] = None
    ) -> Iterator[None]:
        """Inside, heads that are given `hard_label` learn it, or the soft one, with these weights.

        Args:
            hard_label: (N, H, W) int64, of `ignore_index` where nothing is known.
            weight: (N, H, W) floating.
            soft_label: (N, C, H, W), zeros where nothing is known.
            judge: what losses with a criterion compute instead of their own.

        Raises:
            RuntimeError: no loss could weigh pixels, though there is a soft label.
        """
        known = (hard_label != self.ignore_index).to(weight.dtype)
        mean = (weight * known).sum() / known.sum().clamp(min=1)
        self._lesson, self._taught = _Lesson(hard_label, weight, soft_label, judge, mean), False
        try:
            yield
        finally:
            self._lesson = None
        if soft_label is not None and not self._taught:
            raise problem(
                "DACal",
                expected="a head that teaches the label of the whole image by softmax cross-entropy",
                got="a pass of the segmentor in which none did",
                remedy="give decode_head a CrossEntropyLoss, or learn hard labels: dacal=dict(learner=None)",
                error=RuntimeError,
            )

    def _criterion(self, softens: bool) -> Callable[[Criterion], Criterion]:
        """The replacement of a loss's criterion; `softens`: whether soft labels mean to it what they mean to a softmax."""

        def replacement(host: Criterion) -> Criterion:
            def criterion(logits: Tensor, label: Tensor, weight: Optional[Tensor] = None, **options: Any) -> Tensor:
                lesson = self._lesson
                if lesson is None:
                    return host(logits, label, weight, **options)
                if not lesson.is_about(label):
                    return host(logits, label, weight, **options) * lesson.mean_weight
                weight = lesson.weight if weight is None else weight * lesson.weight
                if lesson.judge is not None and softens:
                    return lesson.judge(logits, label, weight, ignore_index=self.ignore_index)
                if lesson.soft_label is None or not softens:
                    return host(logits, label, weight, **options)
                self._taught = True
                return soft_label_loss(logits, lesson.soft_label, weight, **options)

            return criterion

        return replacement

    def _scaled(self, host: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """The replacement of a loss that takes no weights."""

        def forward(*args: Any, **options: Any) -> Tensor:
            loss = host(*args, **options)
            return loss if self._lesson is None else loss * self._lesson.mean_weight

        return forward


def heads_of(segmentor: nn.Module) -> List[nn.Module]:
    """The decode head, or all of a cascade, and the auxiliary heads."""
    heads: List[nn.Module] = []
    for name in ("decode_head", "auxiliary_head"):
        head = getattr(segmentor, name, None)
        heads += list(head) if isinstance(head, nn.ModuleList) else [head] if isinstance(head, nn.Module) else []
    return heads


def losses_of(segmentor: nn.Module) -> List[nn.Module]:
    """The losses of all heads of a segmentor.

    Raises:
        ValueError: the decode head has no `loss_decode`.
    """
    decode: Any = getattr(segmentor, "decode_head", None)
    last = decode[-1] if isinstance(decode, nn.ModuleList) and len(decode) else decode
    if not isinstance(getattr(last, "loss_decode", None), nn.Module):
        raise problem(
            "DACal",
            expected="a decode_head with loss_decode, as mmseg's BaseDecodeHead has it",
            got=type(last).__name__,
            remedy="choose a head that classifies pixels, and no masks",
        )
    losses: List[nn.Module] = []
    for head in heads_of(segmentor):
        for name, child in head.named_children():
            if name.startswith("loss"):
                losses += list(child) if isinstance(child, nn.ModuleList) else [child]
    return losses


def hard_label_of(soft_label: Tensor, *, ignore_index: int) -> Tensor:
    """(N, H, W) int64: the most probable class of a soft label (N, C, H, W), `ignore_index` where that is all zeros.

    Example:
        >>> hard_label_of(torch.tensor([[0.2, 0.0], [0.8, 0.0]]).view(1, 2, 1, 2), ignore_index=255).tolist()
        [[[1, 255]]]
    """
    soft_label = soft_label.detach()
    return soft_label.argmax(1).masked_fill((soft_label == 0).all(1), ignore_index)
