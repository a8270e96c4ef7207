"""The paper's meta-step through the heads of a segmentor of mmsegmentation 1.x: their losses, their weights."""

from typing import Any, Callable, List, Optional, Union

from torch import Tensor, nn

from .._check import problem
from ..engines import Student
from ..learners import BilevelCalibrationStep, JudgedBatch
from ..learners.judged_sets import as_judged
from ..losses import OuterLoss
from ..pseudo_labels import SoftPseudoLabeler
from ..ranks import Ranks
from .meta_step import total_loss
from .weighted_heads import WeightedHeads, hard_label_of

SamplesOf = Callable[[Tensor], List[Any]]
"""Hard labels (N, H, W) as the data samples that a segmentor's `loss` takes."""


class SegmentorCalibrationStep(BilevelCalibrationStep):
    """A `BilevelCalibrationStep` whose losses are those of all heads; called inside of `heads.listening()`.

    Args:
        student: called as `student(image, data_samples, mode="loss")`; returns a dictionary of losses.
        heads: the student's.
        samples_of: see `SamplesOf`.
        outer_loss: what the heads compute on the judged set; None: their own losses.
        options: those of `BilevelCalibrationStep`.
    """

    def __init__(
        self,
        student: nn.Module,
        labeler: SoftPseudoLabeler,
        *,
        heads: WeightedHeads,
        samples_of: SamplesOf,
        outer_loss: Union[str, OuterLoss, None] = None,
        **options: Any,
    ) -> None:
        super().__init__(student, labeler, outer_loss=outer_loss, inner_loss=_of_the_heads, measure_before=False, **options)
        self.heads = heads
        self.samples_of = samples_of
        self.judge: Optional[OuterLoss] = None if outer_loss is None else self.outer_loss

    def loss_on_mixed(self, f: Student, image: Tensor, soft_label: Tensor, weight: Tensor) -> Tensor:
        label = hard_label_of(soft_label, ignore_index=self.heads.ignore_index)
        with self.heads.lesson(label, weight, soft_label=soft_label):
            return total_loss(f(image, self.samples_of(label), mode="loss"))

    def loss_on_judged(self, f: Student, judged: JudgedBatch) -> Tensor:
        with self.heads.lesson(judged.label, judged.weight, judge=self.judge), as_judged(judged, f):
            return total_loss(f(judged.image, self.samples_of(judged.label), mode="loss"))

    def judged_weight(self, ranks: Ranks, judged: JudgedBatch) -> Tensor:
        """The ranks' losses count as equal parts, as in the training itself, where the heads judge by their own."""
        return judged.weight if self.judge is None else super().judged_weight(ranks, judged)


def _of_the_heads(logits: Tensor, soft_label: Tensor, weight: Tensor, /) -> Tensor:
    """Stands where `loss_on_mixed` needs nothing, so that weights stay those of a pass in training."""
    raise problem(
        "SegmentorCalibrationStep",
        expected="the heads to compute the loss",
        got="a call of its inner_loss",
        remedy="call loss_on_mixed",
        error=RuntimeError,
    )
