"""What every learner of temperatures shares: one constructor, one call an iteration, one result, one state.

A learner says in `gradient` which way the temperature net should go; everything around it is here. To add one, write a file
with a subclass of `Learner` (`CONTRIBUTING.md`).
"""

import copy
import math
from abc import ABC, abstractmethod
from functools import partial
from typing import Any, Callable, ClassVar, Dict, Mapping, NamedTuple, Optional, Protocol, Sequence, Type, TypeVar, Union

import torch
from torch import Tensor, nn

from .._check import as_whole, check_choice, check_classes, check_logits, check_owner, check_tensor, describe, problem
from .._many import as_numbers
from ..ignoring import IgnoreIndex, ignored_or_255, void_label, with_one_void
from ..losses import OUTER_LOSSES, OuterLoss, is_mean_over_labelled
from ..mixing import class_mask
from ..preserve import preserved
from ..pseudo_labels import SoftPseudoLabeler, SoftPseudoLabels
from ..ranks import Ranks
from .inputs import ask_teacher, check_batch
from .judged_sets import JUDGED_SETS, DomainBatch, JudgedBatch, JudgedSet
from .networks import Network, Outputs, at_size
from .skips import Skip, SkipKind, waiting

_Self = TypeVar("_Self", bound="Learner")


class Labelling(Protocol):
    """Labels target images: the teacher's logits (N, C, *S), features and `valid` as for `SoftPseudoLabeler`."""

    def __call__(
        self, logits: Tensor, *, features: Optional[Tensor] = None, valid: Optional[Tensor] = None
    ) -> SoftPseudoLabels: ...


class OwnLoss(Protocol):
    """A loop's own loss on images that it has mixed by itself: `(f, label) -> scalar`.

    `f` is the student to call, with the live parameters or others; `label` makes the labels that it is taught.
    """

    def __call__(self, f: Any, label: Labelling, /) -> Tensor: ...


class CalibrationStepResult(NamedTuple):
    """What one call of a learner did, as plain numbers for a log; NaN where a figure was not computed."""

    outer_loss_before: float = math.nan
    """Loss on the judged set: of the live student (bilevel step), of the temperatures before their step (fit)."""
    outer_loss_after: float = math.nan
    """The same after the student's virtual step (bilevel step)."""
    temperature_mean: float = math.nan
    """Over the pixels that the step's temperatures were for: the target images of the batch (bilevel step), the judged images
    (fit); likewise `temperature_min`, `temperature_max`."""
    temperature_min: float = math.nan
    temperature_max: float = math.nan
    hypergradient_norm: float = math.nan
    """Euclidean norm of the gradient over all parameters of the temperature net."""
    engine: str = ""
    """The engine that computed the hypergradient (bilevel step); of interest with "auto"."""
    skipped: Optional[Skip] = None
    """Why the temperature net was left as it was; None if it was updated."""
    inner_loss: float = math.nan
    """The loss on the mixed images, with which `backward=True` has trained the student."""


class Iteration(NamedTuple):
    """What a learner knows at an iteration at which it learns."""

    batch: DomainBatch
    teacher_logits: Tensor
    """(N, C, *S), of the target images."""
    label: Callable[[], SoftPseudoLabels]
    """Labels the target images with the temperatures as they are; with gradient, unless under `no_grad`."""
    teacher: Optional[Network]
    """None where only its logits were passed."""
    backward: bool
    """Whether to do the host's pass over the mixed images too."""
    generator: torch.Generator
    ranks: Ranks
    own_loss: Optional[Callable[[Any], Tensor]] = None
    """`f` -> what trains the student, with the temperature net's gradient, where the loop mixes by itself."""


class Learned(NamedTuple):
    """What a learner found out: the gradient of the temperature net, and figures for the log."""

    grads: Sequence[Optional[Tensor]]
    """One a trainable parameter of the temperature net, the same on every rank."""
    temperature: Tensor
    """The temperatures that were used, any shape."""
    outer_loss_before: Union[float, Tensor, None] = None
    """A number or a scalar, as in `CalibrationStepResult`, likewise the next ones; None where it was not measured."""
    outer_loss_after: Union[float, Tensor, None] = None
    engine: str = ""
    inner_loss: Union[float, Tensor] = math.nan
    no_step: bool = False
    """Whether a gradient of zero comes from a student that does not move."""


class Defaults(NamedTuple):
    """What a kind of learner works best with, where its user does not say."""

    judged_set: str
    outer_loss: str = "cross_entropy"
    warmup: int = 0
    learning_rate: float = 1e-3
    """Of Adam as `meta_optimizer`."""
    net_options: Mapping[str, Any] = {}
    """Of the `MetaTemperatureNet`."""


class Learner(ABC):
    """Learns the temperatures of a labeler, one step of its optimizer per call.

    Call it once per iteration, before the host labels the target images. A learner changes the temperature net and the state of
    `meta_optimizer`, and nothing else: `.grad` is None before and after, networks, other optimizers and global random states
    are bit for bit as before (but for what `backward=True` asks for, and a teacher that is asked for its labels, which is the
    host's own pass).

    Gradient: reaches the temperature net alone. Also under `torch.no_grad`.

    Under `torch.distributed` every rank calls it with its part of the batch, and all temperature nets stay the same, to the
    bit: the first call broadcasts the first rank's, and the built-in losses are means over the judged pixels of all ranks (the
    calibration gap is each rank's own; losses of the host's own count as equal parts). One image a rank will do, also where two
    are blended: the other one is another rank's.

    Args (None: what `defaults` of the kind of learner says):
        labeler: its `temperature_net` is what learns; its weights say which target pixels may be used.
        meta_optimizer: owns the parameters of `labeler.temperature_net`, and nothing else.
        judged_set: what shows how good the temperatures are: a name in `JUDGED_SETS`, or a function
            `(DomainBatch, *, generator) -> JudgedBatch`.
        outer_loss: how it is judged: a name in `dacal_addon.losses.OUTER_LOSSES`, or a function
            `(logits, label, weight, *, ignore_index) -> scalar`.
        logits_of: takes the logits out of what teacher and student return, if that is not a tensor, e.g.
            `lambda out: out["out"]`, and declares one sigmoid channel: `two_channels`. Logits of a lower resolution are
            interpolated to the labels'.
        features_of: takes the features out of what the teacher returns, for a temperature net with `feature_channels`.
        every: learn at every k-th iteration after the warm-up.
        warmup: iterations before the first one at which to learn.
        ignore_index: one label or several, which may be classes: pixels of the source, and of judged sets, that neither train
            nor judge. None for 255; it must be given where that is a class. A host's own losses are passed the last one alone,
            which then stands for all.
        process_group: the ranks that share a batch; None for all.
        generator: for masks, and judged sets that draw, where a call is given none; by default one with seed 0. Part of the
            state.

    Raises:
        ValueError: a `meta_optimizer` that owns other parameters than the temperature net's; options out of range.
        TypeError: a labeler without a net.
    """

    defaults: ClassVar[Defaults]
    judges_teacher: ClassVar[bool] = False
    """Whether the judged set is for the teacher, which sees `teacher_image`; a call then needs the teacher itself."""

    def __init__(
        self,
        labeler: SoftPseudoLabeler,
        *,
        meta_optimizer: torch.optim.Optimizer,
        judged_set: Union[str, JudgedSet, None] = None,
        outer_loss: Union[str, OuterLoss, None] = None,
        logits_of: Optional[Callable[[Any], Tensor]] = None,
        features_of: Optional[Callable[[Any], Tensor]] = None,
        every: int = 1,
        warmup: Optional[int] = None,
        ignore_index: Optional[IgnoreIndex] = None,
        process_group: Any = None,
        generator: Optional[torch.Generator] = None,
    ) -> None:
        name = self._name
        warmup = self.defaults.warmup if warmup is None else warmup
        judged_set = self.defaults.judged_set if judged_set is None else judged_set
        outer_loss = self.defaults.outer_loss if outer_loss is None else outer_loss
        warmup, every = as_whole(name, "warmup", warmup, low=0), as_whole(name, "every", every, low=1)
        if isinstance(judged_set, str):
            check_choice(name, "judged_set", judged_set, tuple(JUDGED_SETS))
        if isinstance(outer_loss, str):
            check_choice(name, "outer_loss", outer_loss, tuple(OUTER_LOSSES))
        net = getattr(labeler, "temperature_net", None)
        if not isinstance(net, nn.Module):
            expected = "labeler: a SoftPseudoLabeler whose temperature_net is a torch.nn.Module to train"
            got = f"{describe(labeler)} with {describe(net)}" if isinstance(labeler, SoftPseudoLabeler) else describe(labeler)
            remedy = "SoftPseudoLabeler(MetaTemperatureNet(num_classes))"
            raise problem(name, expected=expected, got=got, remedy=remedy, error=TypeError)
        self.meta_parameters = check_owner(name, "meta_optimizer", meta_optimizer, net, of="labeler.temperature_net")
        self.labeler = labeler
        self.temperature_net = net
        self.meta_optimizer = meta_optimizer
        self.judged_set: JudgedSet = JUDGED_SETS[judged_set] if isinstance(judged_set, str) else judged_set
        self.outer_loss: OuterLoss = OUTER_LOSSES[outer_loss] if isinstance(outer_loss, str) else outer_loss
        self.outputs = Outputs(logits_of, features_of)
        self.every = every
        self.warmup = warmup
        self.ignore_index = ignored_or_255(name, ignore_index)
        self._ignore_given = ignore_index
        self.process_group = process_group
        self.generator = generator if generator is not None else torch.Generator().manual_seed(0)
        self.iteration = 0
        self._called = False

    @classmethod
    def for_loop(
        cls: Type[_Self],
        labeler: SoftPseudoLabeler,
        *,
        student: nn.Module,
        optimizer: Optional[torch.optim.Optimizer],
        meta_optimizer: torch.optim.Optimizer,
        **options: Any,
    ) -> _Self:
        """A learner of this kind from what every training loop has; `options` are those of its constructor."""
        return cls(labeler, meta_optimizer=meta_optimizer, **options)

    @abstractmethod
    def gradient(self, iteration: Iteration) -> Union[Learned, Skip]:
        """Which way the temperature net should go, or why that cannot be said. Called with gradients enabled."""

    def use_optimizer(self, optimizer: torch.optim.Optimizer) -> None:  # noqa: B027  # most learners have no use for it
        """Take this one for the student's, where it was not known before; a learner that needs none goes on without."""

    def train_student(self, iteration: Iteration) -> float:
        """At an iteration without a step: the host's pass over the mixed images, for `backward=True`; returns its loss."""
        remedy = "do the pass over the mixed images yourself, or take BilevelCalibrationStep"
        raise problem(self._name, expected="backward=False (it has no student to train)", got="True", remedy=remedy)

    def __call__(
        self,
        source_image: Tensor,
        source_label: Tensor,
        target_image: Tensor,
        teacher_logits: Optional[Tensor] = None,
        *,
        teacher: Optional[Network] = None,
        teacher_features: Optional[Tensor] = None,
        teacher_image: Optional[Tensor] = None,
        mask: Optional[Tensor] = None,
        valid: Optional[Tensor] = None,
        backward: bool = False,
        own_loss: Optional[OwnLoss] = None,
        generator: Optional[torch.Generator] = None,
    ) -> CalibrationStepResult:
        """Count one iteration and, unless in warm-up or between two `every`, take one step of the temperature net.

        Args:
            source_image, target_image: (N, K, *S), floating, as the student sees them.
            source_label: (N, *S) int64.
            teacher_logits: (N, C, *s): what the teacher says of the target images. None: `teacher` is asked.
            teacher: the network itself; needed where it is asked about further images (`TemperatureFit`). Of a function, the
                buffers of the network inside are not put back: pass the module.
            teacher_features: (N, F, *s) beside `teacher_logits`, for a temperature net with `feature_channels`.
            teacher_image: the target images as the teacher sees them, where that is another view of the same pixels.
            mask: (N, 1, *S) bool, True = source pixel: the mask with which the host will mix. Drawn by `class_mask` if not
                given.
            valid: (N, *S) bool, False on the target's padding.
            backward: also train (`BilevelCalibrationStep` alone): add the gradient of the loss on the mixed images, with the
                labels of this call's temperatures, to `.grad` of the student's parameters, and leave buffers and random states
                as that pass leaves them. At every iteration, whether the temperatures learn or not; the host does its source
                loss and the optimizer's step.
            own_loss: `(f, label) -> scalar` for a loop that mixes by itself (`BilevelCalibrationStep`): the student trains on
                this loss, not on that of source images mixed into target images. It calls the student by `f`, and labels by
                `label(logits)`, which carries the temperature net's gradient. Not with `backward=True`.
            generator: for the mask and judged sets that draw; by default the learner's own.

        Raises:
            ValueError, TypeError: tensors that do not fit each other; nothing has changed then.
            RuntimeError: called under `torch.inference_mode`.
        """
        check_batch(self._name, source_image, source_label, target_image, teacher_image=teacher_image, mask=mask)
        if self.judges_teacher and teacher is None:
            remedy = "pass teacher=teacher, the network: it is asked about images that it has not seen yet"
            raise problem(self._name, expected="teacher", got="its logits alone", remedy=remedy, error=TypeError)
        if backward and own_loss is not None:
            remedy = "do the backward pass of your own loss yourself"
            raise problem(self._name, expected="backward or own_loss", got="both", remedy=remedy)
        skip = waiting(self.iteration, warmup=self.warmup, every=self.every)
        if skip is not None and self._called and not backward:
            return self._counted(skip)
        seen = target_image if teacher_image is None else teacher_image
        if teacher_logits is None:
            teacher_logits, teacher_features = ask_teacher(self._name, self.outputs, teacher, seen)
        logits = self._checked_logits(source_label, teacher_logits)
        # A first call in the warm-up only looks whether the batch fits: it draws nothing that a later one would have drawn.
        draw = generator or self.generator if skip is None or backward else torch.Generator().manual_seed(0)
        if mask is None:
            mask = class_mask(source_label, generator=draw, ignore_index=self.ignore_index)
        pseudo_label, weight = self.labeler.hard_labels(logits, valid=valid, ignore_index=self.ignore_index)
        image, ranks = seen if self.judges_teacher else target_image, self.ranks()
        iteration = Iteration(
            DomainBatch(source_image, source_label, image, pseudo_label, weight, mask, self.ignore_index, ranks),
            logits,
            partial(self.labeler, logits, features=teacher_features, valid=valid, ignore_index=self.ignore_index),
            teacher,
            backward,
            draw,
            ranks,
            None if own_loss is None else lambda f: own_loss(f, self._label),
        )
        if not self._called:
            self._meet(iteration)
        skip = skip or self._useless(iteration)
        with torch.enable_grad():
            learned = skip or self.gradient(iteration)
            if isinstance(learned, Learned):
                return self._descend(learned)
            return self._counted(learned, inner_loss=self.train_student(iteration) if backward else math.nan)

    def to(self, device: Union[torch.device, str]) -> None:
        """Move the temperature net, and the state of its optimizer, which does not follow by itself."""
        self.temperature_net.to(device)
        self.meta_optimizer.load_state_dict(self.meta_optimizer.state_dict())

    def ranks(self) -> Ranks:
        """The processes that share a batch."""
        return Ranks(self.process_group)

    def judged_weight(self, ranks: Ranks, judged: JudgedBatch) -> Tensor:
        """The weights of judged pixels with which the ranks' losses average to that of one process."""
        if not is_mean_over_labelled(self.outer_loss):
            return judged.weight
        return mean_over_all(ranks, judged.weight, judged.label != void_label(self.ignore_index))

    def judged_batch(self, iteration: Iteration) -> JudgedBatch:
        """The judged set of the iteration; the last of `ignore_index` stands for all in its label."""
        judged = self.judged_set(iteration.batch, generator=iteration.generator)
        return judged._replace(label=with_one_void(judged.label, self.ignore_index))

    def state_dict(self) -> Dict[str, Any]:
        """Everything that a resumed run needs: temperature net, its optimizer, generator, counter."""
        return {
            "learner": self._name,
            "iteration": self.iteration,
            "temperature_net": self.temperature_net.state_dict(),
            "meta_optimizer": self.meta_optimizer.state_dict(),
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue exactly where `state_dict` was taken.

        Raises:
            ValueError: something is missing, or another learner's, net's or optimizer's; nothing has changed then.
        """
        missing = {"learner", "iteration", "temperature_net", "meta_optimizer", "generator"} - set(state)
        if missing:
            expected = f"the result of {self._name}.state_dict()"
            got = f"a dict without {', '.join(sorted(missing))}"
            raise problem(self._name, expected=expected, got=got, remedy="load another checkpoint")
        if state["learner"] != self._name:
            expected, remedy = f"the state of a {self._name}", "resume with the learner that it was written with"
            raise problem(self._name, expected=expected, got=f"that of a {state['learner']}", remedy=remedy)
        own = {name: tuple(value.shape) for name, value in self.temperature_net.state_dict().items()}
        theirs = {name: tuple(value.shape) for name, value in state["temperature_net"].items()}
        if own != theirs:
            name = sorted(name for name in {**own, **theirs} if own.get(name) != theirs.get(name))[0]
            raise problem(
                self._name,
                expected=f"the state of a temperature net with {name} of shape {own.get(name, 'none')}",
                got=f"{theirs.get(name, 'none')}",
                remedy="resume with the learner, the net and the classes that it was written with",
            )
        self._load_optimizer(state["meta_optimizer"])
        self.temperature_net.load_state_dict(state["temperature_net"])
        self.generator.set_state(state["generator"].cpu())  # map_location may have moved it
        self.iteration = state["iteration"]

    def _load_optimizer(self, state: Mapping[str, Any]) -> None:
        before = copy.deepcopy(self.meta_optimizer.state_dict())
        settings = set(before["param_groups"][0])
        try:
            theirs = [set(group) for group in state["param_groups"]]
            # An optimizer of another kind has settings of its own; a newer torch adds some, and fills in what is missing.
            if not all(settings <= group or group <= settings for group in theirs):
                raise ValueError(f"its settings are {', '.join(sorted(theirs[0]))}")
            self.meta_optimizer.load_state_dict(dict(state))
        except (ValueError, KeyError) as error:
            self.meta_optimizer.load_state_dict(before)
            expected = f"the state of a {type(self.meta_optimizer).__name__} of the temperature net"
            remedy = "resume with the meta_optimizer that it was written with"
            raise problem(self._name, expected=expected, got=f"another one ({error})", remedy=remedy) from error

    @property
    def _name(self) -> str:
        """For messages."""
        return type(self).__name__

    def _label(self, logits: Tensor, *, features: Optional[Tensor] = None, valid: Optional[Tensor] = None) -> SoftPseudoLabels:
        with preserved(self.temperature_net):  # every pass of a loss must get the same labels of a net with BatchNorm
            return self.labeler(logits, features=features, valid=valid, ignore_index=self.ignore_index)

    def _counted(self, skip: Optional[Skip], **figures: Any) -> CalibrationStepResult:
        self.iteration += 1
        return CalibrationStepResult(skipped=skip, **figures)

    def _meet(self, iteration: Iteration) -> None:
        """At the first call: one temperature net for all ranks; and what does not fit is found before the warm-up ends."""
        iteration.ranks.broadcast([*self.temperature_net.parameters(), *self.temperature_net.buffers()])
        with torch.no_grad(), preserved(self.temperature_net):
            iteration.label()
        judged = self.judged_set(iteration.batch, generator=torch.Generator().manual_seed(0))
        classes = iteration.teacher_logits.shape[1]
        check_classes(self._name, "label of the judged set", judged.label, classes, self.ignore_index)
        self._called = True

    def _useless(self, iteration: Iteration) -> Optional[Skip]:
        """Why nothing can be learned from what the teacher says. All ranks decide alike."""
        weight, ranks = iteration.batch.weight, iteration.ranks
        # -inf is a class that is masked out.
        finite, weighted = as_numbers([(iteration.teacher_logits < math.inf).all(), (weight > 0).any()])
        if ranks.anywhere(not finite, like=weight):
            return Skip(SkipKind.NOT_FINITE, "the teacher's logits are not finite")
        if not ranks.anywhere(bool(weighted), like=weight):
            return Skip(SkipKind.UNWEIGHTED, self._why_no_weight(iteration.teacher_logits))
        return None

    def _why_no_weight(self, logits: Tensor) -> str:
        threshold = getattr(self.labeler, "threshold", None)
        message = f"every target pixel has the weight 0: no confidence reaches threshold={threshold}, or no pixel is valid"
        sums = logits.sum(1)
        if bool((logits >= 0).all()) and bool(torch.allclose(sums, torch.ones_like(sums), atol=1e-3)):
            return f"{message}; the teacher returns probabilities, it seems: logits are expected"
        return f"{message}; in short trainings lower it"

    def _descend(self, learned: Learned) -> CalibrationStepResult:
        """One step of the optimizer along a gradient, unless it is no use."""
        used, grads = learned.temperature.detach(), [grad.detach() for grad in learned.grads if grad is not None]
        square = torch.cat([grad.reshape(-1) for grad in grads]).double().pow(2).sum() if grads else 0.0
        losses = {"before": learned.outer_loss_before, "after the virtual step": learned.outer_loss_after}
        measured = {when: loss for when, loss in losses.items() if loss is not None}
        square, inner, mean, low, high, *numbers = as_numbers(
            [square, learned.inner_loss, used.mean(), used.min(), used.max(), *measured.values()]
        )
        norm, measured = math.sqrt(square), dict(zip(measured, numbers))
        skip = None
        if not all(map(math.isfinite, measured.values())):
            found = ", ".join(f"{loss} {when}" for when, loss in measured.items())
            skip = Skip(SkipKind.NOT_FINITE, f"the loss on the judged set is not finite: {found}")
        elif not math.isfinite(norm):
            skip = Skip(SkipKind.NOT_FINITE, "the temperature net's gradient is not finite")
        elif norm == 0.0 and learned.no_step:
            skip = Skip(SkipKind.NO_STEP, "the student's learning rate is 0: its virtual step leads nowhere")
        elif norm == 0.0:  # Adam would move on by its momentum
            message = "the temperature net's gradient is zero: no target pixel with a weight is trained on, or none is judged"
            skip = Skip(SkipKind.ZERO, message)
        else:
            self._guarded_step(learned.grads)
        return self._counted(
            skip,
            outer_loss_before=measured.get("before", math.nan),
            outer_loss_after=measured.get("after the virtual step", math.nan),
            temperature_mean=mean,
            temperature_min=low,
            temperature_max=high,
            hypergradient_norm=norm,
            engine=learned.engine,
            inner_loss=inner,
        )

    def _guarded_step(self, grads: Sequence[Optional[Tensor]]) -> None:
        # .grad is None outside these lines: a host whose optimizer owns every parameter of its module must not see it.
        try:
            for parameter, grad in zip(self.meta_parameters, grads):
                parameter.grad = grad
            self.meta_optimizer.step()
        finally:
            for parameter in self.meta_parameters:
                parameter.grad = None

    def _checked_logits(self, source_label: Tensor, teacher_logits: Any) -> Tensor:
        """The teacher's logits at the resolution of the labels."""
        remedy = "pass teacher=teacher, the network, and logits_of for what it returns"
        expected = "teacher_logits: a floating tensor (N, C, *spatial), or of a lower resolution"
        check_tensor(self._name, "teacher_logits", teacher_logits, expected=expected, remedy=remedy)
        if len(teacher_logits) != len(source_label):
            expected = f"teacher_logits of {len(source_label)} images"
            raise problem(
                self._name, expected=expected, got=describe(teacher_logits), remedy="ask the teacher about target_image"
            )
        logits = at_size(self._name, "teacher_logits", teacher_logits, source_label.shape[1:])
        check_logits(self._name, "teacher_logits", logits)
        ignored_or_255(self._name, self._ignore_given, logits.shape[1])
        check_classes(self._name, "source_label", source_label, logits.shape[1], self.ignore_index)
        return logits


def mean_over_all(ranks: Ranks, weight: Tensor, labelled: Tensor) -> Tensor:
    """Weights with which the ranks' means over labelled pixels average to the mean over the labelled pixels of all ranks."""
    if ranks.size == 1:
        return weight
    count = labelled.sum().double()
    share = count / ranks.average_number(count).clamp(min=1e-12)
    return weight * share.to(weight.dtype)
