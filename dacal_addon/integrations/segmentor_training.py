"""The self-training of one segmentor: its teacher, its labels and temperatures, an iteration of it, and its state."""

import logging
import math
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Optional

import torch
from torch import Tensor, nn

from .._check import problem
from .._many import as_numbers
from ..learners import BilevelCalibrationStep, CalibrationStepResult, SkipKind
from ..one_channel import two_channels
from ..pseudo_labels import SoftPseudoLabels
from ..ranks import Ranks
from ..self_training import DACal
from . import checkpoint
from .segmentor_options import SegmentorOptions
from .segmentor_step import SamplesOf, SegmentorCalibrationStep
from .weighted_heads import WeightedHeads, hard_label_of, heads_of

Say = Callable[[int, str], None]
"""Writes a line to the host's log: level, message."""
_TEACHER, _LEARNER = "teacher.", "learner."
_STEP = {"bilevel": "meta-step"}  # what the log calls a step


class Logits(nn.Module):
    """A segmentor as a function of images (N, K, H, W): logits (N, C, H, W), in the mode that it is in."""

    def __init__(self, segmentor: nn.Module) -> None:
        super().__init__()
        self.module = segmentor  # by this name `classifiers` looks into it

    def forward(self, image: Tensor) -> Tensor:
        size = image.shape[2:]
        metas = [{"ori_shape": size, "img_shape": size, "pad_shape": size, "padding_size": [0, 0, 0, 0]} for _ in image]
        segmentor: Any = self.module
        logits: Tensor = segmentor.encode_decode(image, metas)
        return logits


class Batch(NamedTuple):
    """What one iteration is given."""

    source_image: Tensor
    """(N, K, H, W)."""
    source_label: Tensor
    """(N, H, W) int64."""
    source_samples: List[Any]
    """The host's own form of the labels."""
    target_image: Tensor
    """(N, K, H, W), as the student sees it."""
    teacher_image: Optional[Tensor]
    """The same pixels as the teacher sees them; None: alike."""
    valid: Optional[Tensor]
    """(N, H, W) bool, False on the target's padding."""


class SegmentorTraining:
    """Teaches a segmentor on source images and, beside them, on mixed images with labels of its averaged copy.

    Args:
        segmentor: the student, of `mmseg`'s kind: `encode_decode`, heads, `num_classes`, `out_channels`.
        teacher: mmengine's averaged model around a copy of it: `module`, `update_parameters`.
        options: of the config.
        samples_of: hard labels (N, H, W) as data samples.
        say: writes to the host's log.

    Raises:
        ValueError: heads that cannot be taught.
    """

    def __init__(
        self, segmentor: nn.Module, teacher: Any, options: SegmentorOptions, *, samples_of: SamplesOf, say: Say
    ) -> None:
        self.segmentor = segmentor
        self.options = options
        self.samples_of = samples_of
        self.iteration = 0
        self._say_line = say
        self._said: Optional[SkipKind] = None
        self.ignore_index = ignored_by(segmentor)
        self.heads = WeightedHeads(segmentor, ignore_index=self.ignore_index)
        one_channel = _check_channels(segmentor, options)
        self.teacher = teacher.eval()
        learner: Any = options.learner
        own: Dict[str, Any] = {}
        if learner == "bilevel":
            learner = SegmentorCalibrationStep
            own = {"heads": self.heads, "samples_of": samples_of}
        self.dacal = DACal(
            segmentor,
            Logits(self.teacher.module),
            num_classes=max(2, int(getattr(segmentor, "num_classes"))),  # noqa: B009  # no attribute that a Module has
            learner=learner,
            weight=options.weight,
            threshold=options.threshold,
            ignore_top=options.ignore_top,
            ignore_bottom=options.ignore_bottom,
            logits_of=two_channels if one_channel else None,
            ignore_index=self.ignore_index,
            **options.of_learner(),
            **own,
        )
        if self.dacal.learner is not None:
            for group in self.dacal.learner.meta_optimizer.param_groups:
                group["lr"] = options.learning_rate

    def use_optimizer(self, optimizer: torch.optim.Optimizer, *, clip_norm: Optional[float]) -> None:
        """Tell which optimizer trains the student, and by which norm its gradients are clipped.

        Raises:
            ValueError, TypeError: a learner would differentiate its step wrongly.
        """
        learner = self.dacal.learner
        if isinstance(learner, BilevelCalibrationStep):
            learner.clip_norm = clip_norm
            learner.use_optimizer(optimizer)

    def losses(self, own_loss: Callable[[Tensor, List[Any]], Mapping[str, Any]], batch: Batch) -> Dict[str, Any]:
        """One iteration: the teacher follows, the target is labelled, and the student's losses on source and mixed images.

        Args:
            own_loss: the segmentor's own `loss(image, data_samples)`.
            batch: of both domains.

        Returns:
            The segmentor's own losses, on mixed images under "mix.", and figures for the log, none of which has "loss" in its
            name, since mmengine sums what has.

        Raises:
            RuntimeError: the meta-step does not know the student's optimizer.
        """
        self._check_optimizer()
        self.teacher.update_parameters(self.segmentor)
        self._draw_anew()
        with self.heads.listening():
            # The meta-step, if any, comes before the source pass: what it needs is free again when that pass is stored.
            mixed = self.dacal(
                batch.source_image,
                batch.source_label,
                batch.target_image,
                teacher_image=batch.teacher_image,
                valid=batch.valid,
            )
            losses = dict(own_loss(batch.source_image, batch.source_samples))
            label = hard_label_of(mixed.soft_label, ignore_index=self.ignore_index)
            soft = None if self.dacal.learner is None else mixed.soft_label
            with self.heads.lesson(label, mixed.weight, soft_label=soft):
                of_mixed = own_loss(mixed.image, self.samples_of(label))
        losses.update({f"mix.{name}": value for name, value in of_mixed.items()})
        self.iteration += 1
        like = batch.source_image
        told = self._told(mixed.labels, mixed.learned)
        values = like.new_tensor(list(told.values()), dtype=torch.float32).unbind()  # one transfer, and not one for each
        losses.update({f"dacal.{name}": value for name, value in zip(told, values)})
        return losses

    def state_dict(self) -> Dict[str, Tensor]:
        """Everything that a resumed run needs, as tensors under flat names."""
        state = {_TEACHER + name: value for name, value in self.teacher.state_dict().items()}
        if self.dacal.learner is not None:
            state.update({_LEARNER + name: value for name, value in checkpoint.flatten(self.dacal.learner).items()})
        return {**state, "iteration": torch.tensor(self.iteration)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue exactly where `state_dict` was taken.

        Raises:
            ValueError: something is missing, or another learner's or network's; nothing has changed then.
        """
        teacher, learned = (_below(prefix, state) for prefix in (_TEACHER, _LEARNER))
        own = {name: tuple(value.shape) for name, value in self.teacher.state_dict().items()}
        if own != {name: tuple(value.shape) for name, value in teacher.items()} or "iteration" not in state:
            remedy = "load a checkpoint of the same model, or remove its keys that begin with dacal."
            raise problem("model.dacal", expected="a checkpoint with this model's teacher", got="another one", remedy=remedy)
        learner = self.dacal.learner
        if (learner is None) != (not learned):
            got = "one without" if learner is not None else "one with temperatures"
            expected = f"a checkpoint of learner={self.options.learner!r}"
            remedy = "resume with the learner that it was written with; to begin from its weights, remove its keys dacal.*"
            raise problem("model.dacal", expected=expected, got=got, remedy=remedy)
        if learner is not None:
            checkpoint.restore(learned, learner)
        self.teacher.load_state_dict(teacher)
        self.iteration = int(state["iteration"])

    def _check_optimizer(self) -> None:
        learner = self.dacal.learner
        if isinstance(learner, BilevelCalibrationStep) and learner.optimizer is None:
            remedy = "add custom_hooks=[dict(type='DACalHook')] to the config"
            expected = "the student's optimizer, for learner='bilevel'"
            raise problem("model.dacal", expected=expected, got="none", remedy=remedy, error=RuntimeError)

    def _draw_anew(self) -> None:
        """Masks depend on seed, iteration and rank alone: a resumed run draws those of one that went on, on every rank."""
        ranks = Ranks()
        place = self.iteration * ranks.size + ranks.rank
        self.dacal.generator.manual_seed((self.options.seed * 2654435761 + place) % 2**32)  # seeds far apart (Knuth's factor)

    def _told(self, labels: SoftPseudoLabels, learned: CalibrationStepResult) -> Dict[str, float]:
        """Figures for the host's log; and a line in it where temperatures do not learn for another reason than before."""
        t = labels.temperature
        weight, mean, low, high = as_numbers([labels.weight.mean(), t.mean(), t.min(), t.max()])
        told = {"target_weight": weight}
        if self.dacal.learner is None:
            return told
        skip = learned.skipped
        self._say(skip)
        told.update(temperature_mean=mean, temperature_min=low, temperature_max=high)
        # All kinds at every iteration: mmengine goes on to report the last values of what is not there any more.
        told.update({f"skipped_{kind.value}": float(skip is not None and skip.kind is kind) for kind in SkipKind})
        figures = {"judged": learned.outer_loss_before}
        if self.options.learner == "bilevel":
            norm = learned.hypergradient_norm  # tiny, and the log has four decimals
            figures = {"judged": learned.outer_loss_after, "hypergradient_log10": math.log10(norm) if norm > 0 else math.nan}
        told.update({name: value for name, value in figures.items() if math.isfinite(value)})
        return told

    def _say(self, skip: Any) -> None:
        kind = None if skip is None else skip.kind
        if kind is self._said and self.iteration > 1:
            return
        if kind is not SkipKind.EVERY:
            step = _STEP.get(str(self.options.learner), self.options.learner)
            level = logging.WARNING if kind is SkipKind.NOT_FINITE else logging.INFO
            self._say_line(level, f"dacal: {step}s begin" if skip is None else f"dacal: no {step} ({skip})")
            self._said = kind


def ignored_by(segmentor: nn.Module) -> int:
    """The label that the heads ignore.

    Raises:
        ValueError: they do not agree.
    """
    found = {int(getattr(head, "ignore_index", 255)) for head in heads_of(segmentor)} or {255}
    if len(found) > 1:
        remedy = "give all heads one ignore_index"
        raise problem("model.dacal", expected="heads that ignore one label", got=f"{sorted(found)}", remedy=remedy)
    return found.pop()


def _check_channels(segmentor: Any, options: SegmentorOptions) -> bool:
    """Whether the segmentor has one sigmoid channel."""
    decode = segmentor.decode_head
    head: Any = decode[-1] if isinstance(decode, nn.ModuleList) else decode
    one = int(getattr(segmentor, "out_channels", 0)) == 1
    sigmoid = any("cls_criterion" in vars(loss) and getattr(loss, "use_sigmoid", False) for loss in head.loss_decode.modules())
    if sigmoid and not one:
        expected = "a decode_head that is taught by softmax, or has one channel"
        remedy = "use CrossEntropyLoss with use_sigmoid=False, or num_classes=2, out_channels=1"
        raise problem("model.dacal", expected=expected, got="a sigmoid for each class", remedy=remedy)
    if one and options.learner is not None:
        expected, remedy = "two channels, for soft labels", "use num_classes=2, out_channels=2, or learner=None"
        raise problem("model.dacal", expected=expected, got="one sigmoid channel", remedy=remedy)
    return one


def _below(prefix: str, state: Mapping[str, Tensor]) -> Dict[str, Tensor]:
    return {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}
