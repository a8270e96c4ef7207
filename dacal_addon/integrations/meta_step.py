"""The paper's meta-step through a host's own heads: its mixed image, hard label and weights, its losses, its way in."""

from contextlib import contextmanager
from typing import Any, Dict, Iterator, Optional, Union

from torch import Tensor, nn

from .._check import describe, problem
from ..engines import Student
from ..learners import BilevelCalibrationStep, JudgedBatch
from ..learners.judged_sets import as_judged
from ..losses import OuterLoss
from ..pseudo_labels import SoftPseudoLabeler
from .criterion import TaughtHeads
from .listening import Call
from .shared_pass import InnerPass

IMAGE, METAS, LABEL, WEIGHT = "img", "img_metas", "gt_semantic_seg", "seg_weight"
"""What mmseg's students call the arguments of `forward_train`."""


class HostCalibrationStep(BilevelCalibrationStep):
    """A `BilevelCalibrationStep` whose losses are the host's: the virtual step is one on what the host is about to train on.

    Tell it by `about`, around a call, how the host is going to call its student.

    Args:
        student: its `forward_train` takes an image, metas, a hard label (N, 1, H, W) and a weight (N, H, W) under mmseg's
            names, and returns a dictionary of losses.
        heads: teach the student's heads soft labels.
        outer_loss: what the heads compute on the judged set; None: their own loss.
        options: those of `BilevelCalibrationStep`.
    """

    def __init__(
        self,
        student: nn.Module,
        labeler: SoftPseudoLabeler,
        *,
        heads: TaughtHeads,
        outer_loss: Union[str, OuterLoss, None] = None,
        **options: Any,
    ) -> None:
        super().__init__(student, labeler, outer_loss=outer_loss, measure_before=False, **options)
        self.heads = heads
        self.judge: Optional[OuterLoss] = None if outer_loss is None else self.outer_loss
        self._mixed: Optional[Call] = None
        self._inner = InnerPass()

    @contextmanager
    def about(self, mixed: Call) -> Iterator[InnerPass]:
        """Inside, `mixed` is how the host is going to call its student on the mixed images; yields what that call returns, once
        a pass has been made.

        Raises:
            TypeError, ValueError: the student cannot be called like that on other images. Now, and not after the warm-up.
        """
        mixed.changed(**{IMAGE: None, LABEL: None, WEIGHT: None})
        if self.engine == "higher" and list(mixed.arguments)[:2] != [IMAGE, METAS]:
            expected = f"a student whose forward_train begins with {IMAGE}, {METAS} (engine 'higher' knows no other way in)"
            got = f"forward_train({', '.join(mixed.arguments)})"
            raise problem("uda.dacal", expected=expected, got=got, remedy="choose engine='auto'")
        self._mixed, self._inner = mixed, InnerPass()
        try:
            yield self._inner
        finally:
            self._mixed, self._inner = None, InnerPass()  # the host's images and graphs are not kept

    def loss_on_mixed(self, f: Student, image: Tensor, soft_label: Tensor, weight: Tensor) -> Tensor:
        call = self._call()  # with the host's own image, jittered and blurred, and its own weight
        with self.heads.soft(call.argument(LABEL), soft_label):
            losses = entered(f, call)
        self._inner.heard(losses)
        return total_loss(losses)

    def loss_on_judged(self, f: Student, judged: JudgedBatch) -> Tensor:
        label = judged.label.unsqueeze(1).contiguous()
        call = self._call().changed(**{IMAGE: judged.image, LABEL: label, WEIGHT: judged.weight})
        with self.heads.judged(self.judge), as_judged(judged, f):
            return total_loss(entered(f, call))

    def _call(self) -> Call:
        if self._mixed is None:
            remedy = "call it inside of about(...)"
            raise problem(self._name, expected="the host's call of its student", got="none", remedy=remedy, error=RuntimeError)
        return self._mixed


def entered(f: Student, call: Call) -> Dict[str, Any]:
    """What `f` returns to this call of the student's `forward_train`."""
    forward_train = getattr(f, "forward_train", None)
    losses: Dict[str, Any]
    if forward_train is not None:
        losses = call.by(forward_train)
        return losses
    # Engine "higher" can only call f, and mmseg's `forward` hands on the image and the metas first, then the rest by name.
    arguments = call.arguments
    image, metas = arguments.pop(IMAGE), arguments.pop(METAS)
    losses = f(image, metas, **arguments)
    return losses


def total_loss(losses: Dict[str, Any]) -> Tensor:
    """The scalar that mmseg descends: everything whose name contains "loss".

    Example:
        >>> import torch
        >>> total_loss({"decode.loss_seg": torch.tensor(2.0), "aux.loss": [torch.tensor(1.0)], "decode.acc_seg": 50}).item()
        3.0
    """
    total: Any = 0.0
    for name, value in losses.items():
        if "loss" in name:
            total = total + (sum(part.mean() for part in value) if isinstance(value, list) else value.mean())
    if not isinstance(total, Tensor):
        got = f"{describe(losses)} of {', '.join(losses)}"
        raise problem("uda.dacal", expected="losses of the student's heads", got=got, remedy="give model.decode_head a loss")
    return total
