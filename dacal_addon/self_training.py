"""The front door: one object around a self-training loop, which labels, mixes, and at the end calibrates."""

from typing import Any, Callable, Dict, Mapping, NamedTuple, Optional, Type, Union

import torch
from torch import Tensor, nn

from ._check import check_choice, check_logits, problem
from .calibrate import TemperatureEstimate, estimate_temperature, fold_temperature
from .ignoring import IgnoreIndex, ignored_or_255
from .learners import DEFAULT_LEARNER, LEARNERS, CalibrationStepResult, Learner, Skip, SkipKind
from .learners.inputs import ask_teacher, check_batch
from .learners.learner import OwnLoss
from .learners.networks import Network, Outputs
from .mixing import class_mask, mix
from .pseudo_labels import SoftPseudoLabeler, SoftPseudoLabels, one_hot
from .temperature import MetaTemperatureNet, two_classes_at_least

_NO_TEMPERATURES = CalibrationStepResult(skipped=Skip(SkipKind.HARD_LABELS, "hard labels: there are no temperatures to learn"))


class MixedBatch(NamedTuple):
    """What the student learns in one iteration beside the source images; everything detached."""

    image: Tensor
    """(N, K, *S) floating: source pixels where the mask is True, target pixels elsewhere."""
    soft_label: Tensor
    """(N, C, *S) floating: one-hot on source pixels, the pseudo-label on target pixels (one-hot without a learner, else
    calibrated), all zeros where nothing is known."""
    weight: Tensor
    """(N, *S) floating: 1 on source pixels, the pseudo-label's weight on target pixels."""
    mask: Tensor
    """(N, 1, *S) bool, True = source pixel."""
    labels: SoftPseudoLabels
    """Of the target images."""
    learned: CalibrationStepResult
    """How the temperatures learned, for the log."""


class DACal:
    """Self-training that ends calibrated: per iteration, one call that labels and mixes; at the end, one that calibrates.

    Nothing of the student or its optimizer changes in an iteration; its pass over the mixed image, the source loss and the
    teacher's update stay yours. The teacher is asked about the target images once, in the mode that it is in.

    Without a learner the student is taught hard pseudo-labels, and `calibrate` folds one temperature into it afterwards: what
    did best in `benchmarks/README.md`. With one, labels are soft, and their temperatures learn along: DA-Cal's way.

    Args:
        student: the network that you train, called as `student(image)`.
        teacher: its EMA copy, likewise.
        optimizer: the student's. None where no learner needs it, or to tell it later (`dacal.learner.use_optimizer`).
        num_classes: C; 2 of a network with one sigmoid channel, which `logits_of=two_channels` declares.
        learner: None for hard labels; a name in `dacal_addon.learners.LEARNERS`, or a class of your own: how the temperatures
            of soft labels learn.
        temperature_net: by default the `MetaTemperatureNet` that the learner works best with, on the student's device.
        spatial_dims: of that net, the images' number of spatial dimensions: 3 for volumes.
        meta_optimizer: of the temperature net; by default Adam with the learner's own learning rate.
        weight, threshold, ignore_top, ignore_bottom: of the pseudo-labels, see `SoftPseudoLabeler`.
        logits_of: takes the logits out of what student and teacher return, if that is not a tensor, e.g.
            `lambda out: out.logits`; `two_channels` of one sigmoid channel. They may have a lower resolution than the labels.
        features_of: takes the features out of what the teacher returns, for a `temperature_net` with `feature_channels`.
        ignore_index: of source labels, one or several, which may be classes. None for 255; it must be given where that is one.
        generator: for masks, and judged sets that draw; by default one with seed 0. Part of the state.
        options: of the learner: `every`, `warmup`, `engine`, `judged_set` and so on.

    Raises:
        ValueError, TypeError: what `SoftPseudoLabeler` and the learner refuse; options of a learner where there is none.

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
        >>> found = dacal.calibrate(source=(image, label), target=image)  # once, when training is over
        >>> found.temperature > 0
        True

    Source: DACS (Tranheden et al., WACV 2021); with a learner DA-Cal (Li et al., arXiv 2602.20860).
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: Network,
        optimizer: Optional[torch.optim.Optimizer] = None,
        *,
        num_classes: int,
        learner: Union[str, Type[Learner], None] = DEFAULT_LEARNER,
        temperature_net: Optional[nn.Module] = None,
        spatial_dims: int = 2,
        meta_optimizer: Optional[torch.optim.Optimizer] = None,
        weight: str = "ratio",
        threshold: float = 0.968,
        ignore_top: int = 0,
        ignore_bottom: int = 0,
        logits_of: Optional[Callable[[Any], Tensor]] = None,
        features_of: Optional[Callable[[Any], Tensor]] = None,
        ignore_index: Optional[IgnoreIndex] = None,
        generator: Optional[torch.Generator] = None,
        **options: Any,
    ) -> None:
        num_classes = two_classes_at_least("DACal", num_classes)
        self.ignore_index = ignored_or_255("DACal", ignore_index, num_classes)
        if isinstance(learner, str):
            check_choice("DACal", "learner", learner, tuple(LEARNERS))
            learner = LEARNERS[learner]
        if learner is None:
            given = {"temperature_net": temperature_net, "meta_optimizer": meta_optimizer, "features_of": features_of}
            odd = sorted([*options, *(name for name, value in given.items() if value is not None)])
            if odd:
                remedy = f"name one of {', '.join(map(repr, LEARNERS))}"
                raise problem("DACal", expected=f"a learner, whose option {odd[0]} is", got="learner=None", remedy=remedy)
        elif temperature_net is None:
            temperature_net = MetaTemperatureNet(num_classes, spatial_dims=spatial_dims, **learner.defaults.net_options)
            temperature_net.to(next(student.parameters()).device)
        labeler = SoftPseudoLabeler(
            temperature_net,
            weight=weight,
            threshold=threshold,
            ignore_top=ignore_top,
            ignore_bottom=ignore_bottom,
        )
        self.student = student
        self.teacher = teacher
        self.labeler = labeler
        self.generator = generator if generator is not None else torch.Generator().manual_seed(0)
        self._num_classes = num_classes
        self._outputs = Outputs(logits_of, features_of)
        self.learner: Optional[Learner] = None
        if learner is not None:
            if meta_optimizer is None:
                assert temperature_net is not None  # for mypy: made above
                meta_optimizer = torch.optim.Adam(temperature_net.parameters(), lr=learner.defaults.learning_rate)
            self.learner = learner.for_loop(
                labeler,
                student=student,
                optimizer=optimizer,
                meta_optimizer=meta_optimizer,
                logits_of=logits_of,
                features_of=features_of,
                ignore_index=self.ignore_index,
                generator=self.generator,
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
        """Label the target images and mix; with a learner, its temperatures learn first.

        Args:
            source_image, target_image: (N, K, *S), floating, as the student sees them.
            source_label: (N, *S) int64.
            teacher_image: the target images as the teacher sees them, where that is another view of the same pixels.
            mask: (N, 1, *S) bool, True = source pixel; by default half of the source's classes (`class_mask`).
            valid: (N, *S) bool, False on the target's padding.

        Raises:
            ValueError, TypeError: tensors that do not fit each other; nothing has changed then.
        """
        seen = teacher_image
        check_batch(self._name, source_image, source_label, target_image, teacher_image=teacher_image, mask=mask)
        logits, features = ask_teacher(self._name, self._outputs, self.teacher, target_image if seen is None else seen)
        if self.learner is None:  # else its temperature net looks
            check_logits(self._name, "logits", logits, num_classes=self._num_classes)
        if mask is None:
            mask = class_mask(source_label, generator=self.generator, ignore_index=self.ignore_index)
        learned = self.learn(
            source_image,
            source_label,
            target_image,
            logits,
            features=features,
            teacher_image=teacher_image,
            mask=mask,
            valid=valid,
        )
        with torch.no_grad():
            labels = self.labeler(logits, features=features, valid=valid, ignore_index=self.ignore_index)
        taught = self._taught(labels)
        return MixedBatch(
            mix(mask, source_image, target_image),
            mix(mask, source_label, taught, ignore_index=self.ignore_index),
            mix(mask, torch.ones_like(labels.weight), labels.weight),
            mask,
            labels,
            learned,
        )

    def learn(
        self,
        source_image: Tensor,
        source_label: Tensor,
        target_image: Tensor,
        logits: Tensor,
        *,
        features: Optional[Tensor] = None,
        teacher_image: Optional[Tensor] = None,
        mask: Optional[Tensor] = None,
        valid: Optional[Tensor] = None,
        own_loss: Optional[OwnLoss] = None,
    ) -> CalibrationStepResult:
        """For a loop that mixes by itself: let the temperatures learn, once an iteration, before `label`.

        Without a learner there are none, and nothing happens. The student's graphs that the loop holds stay valid.

        Args:
            source_image, source_label, target_image, teacher_image, mask, valid: as for a call.
            logits, features: what the teacher says of the target images.
            own_loss: `(f, label) -> scalar`, the loop's own loss on its mixed images, for a learner that looks at it
                ("bilevel"): it calls the student by `f`, and labels by `label(logits)`. The loop itself trains on
                `own_loss(student, dacal.label)`.

        Raises:
            ValueError, TypeError: tensors that do not fit each other; nothing has changed then.

        Example (target images with boxes cut out of each other, as in UniMatch):
            >>> from dacal_addon.losses import mixed_views_loss
            >>> from dacal_addon.mixing import cut_mask
            >>> g = torch.Generator().manual_seed(0)
            >>> student, teacher = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
            >>> optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
            >>> dacal = DACal(student, teacher, optimizer, num_classes=4, learner="bilevel", warmup=0, weight="none")
            >>> image, label = torch.rand(2, 3, 8, 8, generator=g), torch.randint(0, 4, (2, 8, 8), generator=g)
            >>> box, logits = cut_mask((2, 8, 8), generator=g), teacher(image)
            >>> view = mix(box, image.flip(0), image)
            >>> own_loss = lambda f, label: mixed_views_loss(f(view), label(logits), [box])
            >>> dacal.learn(image, label, image, logits, own_loss=own_loss).skipped is None
            True
            >>> own_loss(student, dacal.label).requires_grad
            True
        """
        if self.learner is None:
            return _NO_TEMPERATURES
        return self.learner(
            source_image,
            source_label,
            target_image,
            logits,
            teacher=self.teacher,
            teacher_features=features,
            teacher_image=teacher_image,
            mask=mask,
            valid=valid,
            own_loss=own_loss,
        )

    def label(self, logits: Tensor, *, features: Optional[Tensor] = None, valid: Optional[Tensor] = None) -> SoftPseudoLabels:
        """For a loop that mixes by itself: what the student is taught on target images; detached.

        Args:
            logits: (N, C, *S), floating: what the teacher says of them, at the resolution of the labels.
            features: (N, F, *s), for a `temperature_net` with `feature_channels`.
            valid: (N, *S) bool, False on padding, which counts neither in a loss nor in its mean.

        Returns:
            Labels whose `soft_label` is the calibrated one; without a learner one-hot, and all zeros on padding.

        Raises:
            ValueError, TypeError: shapes or kinds that do not fit.
        """
        check_logits("DACal.label", "logits", logits, num_classes=self._num_classes)
        with torch.no_grad():
            labels = self.labeler(logits, features=features, valid=valid, ignore_index=self.ignore_index)
        return labels._replace(soft_label=self._taught(labels))

    def calibrate(self, *, source: Any, target: Any, labelled_target: Any = None, **options: Any) -> TemperatureEstimate:
        """When training is over: find one temperature for the target, and fold it into the student's last layer, in place.

        Save the student for inference after this, and for further training before.

        Args:
            source, target, labelled_target, options: see `dacal_addon.calibrate.estimate_temperature`; `layer` goes to
                `fold_temperature` too, and `typical` is 1 after training with a learner, whose students differ.

        Raises:
            ValueError, TypeError: what both refuse, among that a student that is calibrated already; nothing has changed then.
        """
        layer = options.get("layer")
        fold_temperature(self.student, 1.0, layer=layer)  # what cannot be folded is an error before the work
        found = estimate_temperature(
            self.student,
            source=source,
            target=target,
            labelled_target=labelled_target,
            **{**self._calibration_options(), **options},
        )
        fold_temperature(self.student, found.temperature, layer=layer)
        return found

    @property
    def _name(self) -> str:
        """For messages."""
        return "DACal" if self.learner is None else type(self.learner).__name__

    def _taught(self, labels: SoftPseudoLabels) -> Tensor:
        """The soft label of what a student is taught: the calibrated one, or the hard one where nothing calibrates."""
        soft = labels.soft_label
        if self.learner is not None:
            return soft
        return one_hot(labels.pseudo_label, soft.shape[1], ignore_index=self.ignore_index).to(soft.dtype)

    def _calibration_options(self) -> Dict[str, Any]:
        options: Dict[str, Any] = {"logits_of": self._outputs.logits_of, "ignore_index": self.ignore_index}
        return options if self.learner is None else {**options, "typical": 1.0}

    def state_dict(self) -> Dict[str, Any]:
        """Everything that a resumed run needs: save it with your checkpoints."""
        if self.learner is not None:
            return self.learner.state_dict()
        return {"learner": None, "generator": self.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue exactly where `state_dict` was taken.

        Raises:
            ValueError: it was taken with another learner; nothing has changed then.
        """
        if self.learner is not None:
            if state.get("learner", "") is None:
                remedy = "resume without a learner, as it was written"
                expected = f"the state of a {type(self.learner).__name__}"
                raise problem("DACal", expected=expected, got="one of hard labels", remedy=remedy)
            self.learner.load_state_dict(state)
            return
        if state.get("learner", "") is not None or "generator" not in state:
            got = f"that of {state.get('learner', 'something else')}"
            remedy = "resume with the learner that it was written with"
            raise problem("DACal", expected="a state without a learner", got=got, remedy=remedy)
        self.generator.set_state(state["generator"].cpu())  # map_location may have moved it
