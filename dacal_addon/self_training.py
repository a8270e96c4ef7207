"""The front door: one object around a self-training loop, which learns, labels and mixes."""

from typing import Any, Callable, Dict, Mapping, NamedTuple, Optional, Type, Union

import torch
from torch import Tensor, nn

from ._check import check_choice
from .learners import DEFAULT_LEARNER, LEARNERS, CalibrationStepResult, Learner
from .learners.networks import Network
from .mixing import class_mask, mix
from .pseudo_labels import SoftPseudoLabeler, SoftPseudoLabels
from .temperature import MetaTemperatureNet


class MixedBatch(NamedTuple):
    """What the student learns in one iteration beside the source images; everything detached."""

    image: Tensor
    """(N, K, H, W) floating: source pixels where the mask is True, target pixels elsewhere."""
    soft_label: Tensor
    """(N, C, H, W) floating: one-hot on source pixels, calibrated on target pixels, all zeros where nothing is known."""
    weight: Tensor
    """(N, H, W) floating: 1 on source pixels, the pseudo-label's weight on target pixels."""
    mask: Tensor
    """(N, 1, H, W) bool, True = source pixel."""
    labels: SoftPseudoLabels
    """Of the target images."""
    learned: CalibrationStepResult
    """How the temperatures learned, for the log."""


class DACal:
    """Calibrated self-training around a loop of your own: per iteration, one call that learns, labels and mixes.

    Nothing of the student or its optimizer changes; its pass over the mixed image, the source loss and the teacher's update
    stay yours. The teacher is asked about the target images once, in the mode that it is in.

    Args:
        student: the network that you train, called as `student(image)`.
        teacher: its EMA copy, likewise.
        optimizer: the student's. None with learner "fit", which does not need it, or to tell it later
            (`dacal.learner.use_optimizer`).
        num_classes: C.
        learner: a name in `dacal_addon.learners.LEARNERS`, or a class of your own: how the temperatures learn.
        temperature_net: by default the `MetaTemperatureNet` that the learner works best with, on the student's device.
        meta_optimizer: of the temperature net; by default Adam with the learner's own learning rate.
        weight, threshold, ignore_top, ignore_bottom: of the pseudo-labels, see `SoftPseudoLabeler`.
        logits_of: takes the logits out of what student and teacher return, if that is not a tensor, e.g.
            `lambda out: out.logits`. They may have a lower resolution than the labels.
        features_of: takes the features out of what the teacher returns, for a `temperature_net` with `feature_channels`.
        ignore_index: of source labels; may be a class.
        options: of the learner: `every`, `warmup`, `engine` and so on.

    Raises:
        ValueError, TypeError: what `SoftPseudoLabeler` and the learner refuse.

    Example:
        >>> from dacal_addon import soft_cross_entropy
        >>> g = torch.Generator().manual_seed(0)
        >>> student, teacher = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
        >>> optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
        >>> dacal = DACal(student, teacher, optimizer, num_classes=4, threshold=0.2)
        >>> image, label = torch.rand(2, 3, 8, 8, generator=g), torch.randint(0, 4, (2, 8, 8), generator=g)
        >>> mixed = dacal(image, label, image)
        >>> loss = soft_cross_entropy(student(mixed.image), mixed.soft_label, mixed.weight)
        >>> loss.requires_grad, mixed.soft_label.requires_grad
        (True, False)

    Source: DA-Cal (Li et al., arXiv 2602.20860).
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: Network,
        optimizer: Optional[torch.optim.Optimizer],
        *,
        num_classes: int,
        learner: Union[str, Type[Learner]] = DEFAULT_LEARNER,
        temperature_net: Optional[nn.Module] = None,
        meta_optimizer: Optional[torch.optim.Optimizer] = None,
        weight: str = "ratio",
        threshold: float = 0.968,
        ignore_top: int = 0,
        ignore_bottom: int = 0,
        logits_of: Optional[Callable[[Any], Tensor]] = None,
        features_of: Optional[Callable[[Any], Tensor]] = None,
        ignore_index: int = 255,
        **options: Any,
    ) -> None:
        if isinstance(learner, str):
            check_choice("DACal", "learner", learner, tuple(LEARNERS))
            learner = LEARNERS[learner]
        if temperature_net is None:
            temperature_net = MetaTemperatureNet(num_classes, **learner.defaults.net_options)
            temperature_net.to(next(student.parameters()).device)
        if meta_optimizer is None:
            meta_optimizer = torch.optim.Adam(temperature_net.parameters(), lr=learner.defaults.learning_rate)
        labeler = SoftPseudoLabeler(
            temperature_net,
            weight=weight,
            threshold=threshold,
            ignore_top=ignore_top,
            ignore_bottom=ignore_bottom,
        )
        self.teacher = teacher
        self.labeler = labeler
        self.learner = learner.for_loop(
            labeler,
            student=student,
            optimizer=optimizer,
            meta_optimizer=meta_optimizer,
            logits_of=logits_of,
            features_of=features_of,
            ignore_index=ignore_index,
            **options,
        )

    def __call__(
        self,
        source_image: Tensor,
        source_label: Tensor,
        target_image: Tensor,
        *,
        teacher_image: Optional[Tensor] = None,
        mask: Optional[Tensor] = None,
        valid: Optional[Tensor] = None,
    ) -> MixedBatch:
        """Learn the temperatures, label the target images with them, and mix.

        Args:
            source_image, target_image: (N, K, H, W), floating, as the student sees them.
            source_label: (N, H, W) int64.
            teacher_image: the target images as the teacher sees them, where that is another view of the same pixels.
            mask: (N, 1, H, W) bool, True = source pixel; by default half of the source's classes (`class_mask`).
            valid: (N, H, W) bool, False on the target's padding.

        Raises:
            ValueError, TypeError: tensors that do not fit each other; nothing has changed then.
        """
        learner = self.learner
        learner.check_batch(source_image, source_label, target_image, teacher_image=teacher_image, mask=mask)
        logits, features = learner.ask_teacher(self.teacher, target_image if teacher_image is None else teacher_image)
        if mask is None:
            mask = class_mask(source_label, generator=learner.generator, ignore_index=learner.ignore_index)
        learned = learner(
            source_image,
            source_label,
            target_image,
            logits,
            teacher=self.teacher,
            teacher_features=features,
            teacher_image=teacher_image,
            mask=mask,
            valid=valid,
        )
        with torch.no_grad():
            labels = self.labeler(logits, features=features, valid=valid, ignore_index=learner.ignore_index)
        return MixedBatch(
            mix(mask, source_image, target_image),
            mix(mask, source_label, labels.soft_label, ignore_index=learner.ignore_index),
            mix(mask, torch.ones_like(labels.weight), labels.weight),
            mask,
            labels,
            learned,
        )

    def state_dict(self) -> Dict[str, Any]:
        """Everything that a resumed run needs: save it with your checkpoints."""
        return self.learner.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue exactly where `state_dict` was taken."""
        self.learner.load_state_dict(state)
