"""The meta-step: learn the temperatures by looking one student update ahead."""

import math
from functools import partial
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._check import (
    check_choice,
    check_classes,
    check_image,
    check_label,
    check_number,
    check_owner,
    check_tensor,
    describe,
    problem,
)
from .engines import Hypergradient, Student, check_supported, hypergradient, ranks_of
from .engines import backward as plain_backward
from .losses import CrossEntropyAndGap, cross_entropy, soft_cross_entropy
from .mixing import class_mask, mix
from .outer_sets import OUTER_SETS, DomainBatch, OuterSet
from .preserve import Preserved, preserved
from .pseudo_labels import SoftPseudoLabeler
from .ranks import Ranks

OUTER_LOSSES = ("cross_entropy", "cross_entropy_and_gap")


class CalibrationStepResult(NamedTuple):
    """What one call of `BilevelCalibrationStep` did, as plain numbers for a log; NaN where a figure was not computed."""

    outer_loss_before: float
    """Outer loss of the live student."""
    outer_loss_after: float
    """Outer loss after the virtual step."""
    temperature_mean: float
    """Over all pixels of the batch, with the temperatures the virtual step used; likewise `temperature_min`, `_max`."""
    temperature_min: float
    temperature_max: float
    hypergradient_norm: float
    """Euclidean norm over all parameters of the temperature net."""
    engine: str
    """The engine that computed the hypergradient; of interest with "auto"."""
    skipped: Optional[str]
    """Why the temperature net was left as it was; None if it was updated."""
    inner_loss: float = math.nan
    """The loss on the mixed images, which `backward=True` has trained the student with."""


def waiting(iteration: int, *, warmup: int, every: int) -> Optional[str]:
    """Why iteration `iteration`, counted from 0, takes no meta-step; None if it takes one.

    Example:
        >>> [waiting(i, warmup=1, every=2) for i in range(3)]
        ['warm-up: iteration 1 of 1', None, 'every=2: 1 more until the next meta-step']
    """
    if iteration < warmup:
        return f"warm-up: iteration {iteration + 1} of {warmup}"
    turn = (iteration - warmup) % every
    return f"every={every}: {every - turn} more until the next meta-step" if turn else None


def descend(
    result: Hypergradient,
    meta_parameters: Sequence[Tensor],
    meta_optimizer: torch.optim.Optimizer,
    *,
    temperature: Tensor,
    measured_before: bool = True,
) -> CalibrationStepResult:
    """Update the meta parameters by a hypergradient, unless it is no use; says in `skipped` why it is not.

    Args:
        temperature: what the virtual step used, for the report.
        measured_before: the `measure_before` of the hypergradient; without it, that loss is NaN and means nothing.
    """
    norm = math.sqrt(sum(float(grad.double().pow(2).sum()) for grad in result.grads))
    before, after = float(result.outer_loss_before), float(result.outer_loss_after)
    reason = None
    if not (math.isfinite(after) and (math.isfinite(before) or not measured_before)):
        reason = f"outer loss is not finite: {before} before, {after} after the virtual step"
    elif not math.isfinite(norm):
        reason = "hypergradient is not finite"
    elif norm == 0.0:  # Adam would move on by its momentum
        reason = "hypergradient is zero: no target pixel has a weight in the inner mix, or no pixel is judged"
    else:
        # .grad is None outside these lines: a host whose optimizer owns every parameter of its module must not see it.
        try:
            for parameter, grad in zip(meta_parameters, result.grads):
                parameter.grad = grad
            meta_optimizer.step()
        finally:
            for parameter in meta_parameters:
                parameter.grad = None
    return CalibrationStepResult(
        before,
        after,
        float(temperature.mean()),
        float(temperature.min()),
        float(temperature.max()),
        norm,
        result.engine,
        reason,
        float(result.inner_loss),
    )


class BilevelCalibrationStep:
    """One meta-step of DA-Cal per call: update the temperature net so that one student step on its labels turns out better.

    Call it once per iteration, before the host labels the target images. It mixes the batch, takes a virtual step of the
    student on the soft labels (inner loss), judges the result on the complementary mix (outer loss), and descends the
    hypergradient with `meta_optimizer`. The live student (parameters, buffers, `.grad`, training flags), its optimizer and
    the global random states are bit for bit as before, also after an error. With `backward=True` the call is the host's pass
    over the mixed images as well, which makes it cheaper.

    Under `torch.distributed` every rank calls it with its part of the batch, and all temperature nets stay the same, to the
    bit: the first call broadcasts the first rank's, and the built-in losses are means over the labelled pixels of all ranks
    ("cross_entropy_and_gap" takes each rank's gap by itself, and losses of the host's own count as equal parts).

    Args:
        student: the live network, called as `student(image)`.
        labeler: its `temperature_net` is what is trained.
        optimizer: the student's own; only read (see `hypergradient`).
        meta_optimizer: owns the parameters of `labeler.temperature_net`, and nothing else. Adam with a learning rate of
            about 3e-4 is a good start; a larger one only drives temperatures to their bounds sooner.
        engine: "higher", "forward", "finite_difference" or "auto": see `hypergradient`, and the README for their costs.
        outer_set: what the outer loss sees, one of "source_and_target_pixels", "source_pixels", "target_mixup", or a function
            `(DomainBatch, *, generator) -> OuterBatch`.
        outer_loss: "cross_entropy", "cross_entropy_and_gap" (plus 10 x the calibration gap; `CrossEntropyAndGap` sets another
            factor), or a function `(logits, label, weight) -> scalar`.
        inner_loss: `(logits, soft_label, weight) -> scalar`, the host's own loss on mixed images.
        warmup: iterations without a meta-step. A look-ahead of one step asks an untrained student for ever sharper labels,
            and an optimizer without state makes the hypergradient useless; let the student become good first.
        every: take a meta-step at every k-th iteration after the warm-up.
        logits_of: takes the logits out of what the student returns, if that is not a tensor, e.g. `lambda out: out["out"]`.
            Logits of a lower resolution are interpolated to the labels', inside the differentiated function.
        ignore_index: of source labels.
        seed: of the generator that draws what a call is not given one for.
        update_rule, clip_norm, measure_before, process_group: see `hypergradient`.

    Raises:
        ValueError: a `meta_optimizer` that owns other parameters than the temperature net's; options out of range.

    Example (`examples/plain_loop.py` is a whole training loop):
        >>> from dacal_addon import MetaTemperatureNet, SoftPseudoLabeler
        >>> g = torch.Generator().manual_seed(0)
        >>> student = nn.Conv2d(3, 4, 1)
        >>> net = MetaTemperatureNet(num_classes=4)
        >>> step = BilevelCalibrationStep(
        ...     student,
        ...     SoftPseudoLabeler(net, weight="none"),
        ...     optimizer=torch.optim.SGD(student.parameters(), lr=0.1),
        ...     meta_optimizer=torch.optim.Adam(net.parameters(), lr=3e-4),
        ...     warmup=1,
        ... )
        >>> image, label = torch.rand(2, 3, 8, 8, generator=g), torch.randint(0, 4, (2, 8, 8), generator=g)
        >>> logits = torch.randn(2, 4, 8, 8, generator=g)
        >>> step(image, label, image, logits).skipped
        'warm-up: iteration 1 of 1'
        >>> result = step(image, label, image, logits, generator=g)
        >>> result.skipped is None, result.hypergradient_norm > 0
        (True, True)

    Source: DA-Cal (Li et al., arXiv 2602.20860).
    """

    def __init__(
        self,
        student: nn.Module,
        labeler: SoftPseudoLabeler,
        *,
        optimizer: torch.optim.Optimizer,
        meta_optimizer: torch.optim.Optimizer,
        engine: str = "higher",
        outer_set: Union[str, OuterSet] = "source_and_target_pixels",
        outer_loss: Union[str, Callable[..., Tensor]] = "cross_entropy",
        inner_loss: Callable[..., Tensor] = soft_cross_entropy,
        warmup: int = 1000,
        every: int = 1,
        logits_of: Optional[Callable[[Any], Tensor]] = None,
        ignore_index: int = 255,
        seed: int = 0,
        update_rule: Optional[Callable[..., Tensor]] = None,
        clip_norm: Optional[float] = None,
        measure_before: bool = True,
        process_group: Any = None,
    ) -> None:
        name = "BilevelCalibrationStep"
        check_number(name, "warmup", warmup, low=0, rule=">= 0 iterations")
        check_number(name, "every", every, low=1, rule=">= 1")
        if isinstance(outer_set, str):
            check_choice(name, "outer_set", outer_set, tuple(OUTER_SETS))
        if isinstance(outer_loss, str):
            check_choice(name, "outer_loss", outer_loss, OUTER_LOSSES)
        net = labeler.temperature_net
        if not isinstance(net, nn.Module):
            expected = "labeler.temperature_net: a torch.nn.Module to train"
            remedy = "give the SoftPseudoLabeler a MetaTemperatureNet"
            raise problem(name, expected=expected, got=describe(net), remedy=remedy, error=TypeError)
        self.temperature_net = net
        self._meta_parameters = check_owner(name, "meta_optimizer", meta_optimizer, net, of="labeler.temperature_net")
        # Now, and not after a thousand iterations of warm-up.
        check_supported(student, optimizer, engine=engine, update_rule=update_rule, clip_norm=clip_norm)
        self.student = student
        self.labeler = labeler
        self.optimizer = optimizer
        self.meta_optimizer = meta_optimizer
        self.engine = engine
        # See `_for_all`.
        self._divides_by_labelled = isinstance(outer_loss, (str, CrossEntropyAndGap)) or outer_loss is cross_entropy
        self.outer_set = OUTER_SETS[outer_set] if isinstance(outer_set, str) else outer_set
        if outer_loss == "cross_entropy":
            outer_loss = partial(cross_entropy, ignore_index=ignore_index)
        elif outer_loss == "cross_entropy_and_gap":
            outer_loss = CrossEntropyAndGap(ignore_index=ignore_index)
        self.outer_loss: Callable[..., Tensor] = outer_loss  # type: ignore[assignment]  # no string is left
        self.inner_loss = inner_loss
        self.update_rule = update_rule
        self.clip_norm = clip_norm
        self.measure_before = measure_before
        self.process_group = process_group
        self.warmup = warmup
        self.every = every
        self.logits_of = logits_of
        self.ignore_index = ignore_index
        self.iteration = 0
        self._generator = torch.Generator().manual_seed(seed)
        self._broadcast = False

    def __call__(
        self,
        source_image: Tensor,
        source_label: Tensor,
        target_image: Tensor,
        teacher_logits: Tensor,
        *,
        mask: Optional[Tensor] = None,
        teacher_features: Optional[Tensor] = None,
        valid: Optional[Tensor] = None,
        backward: bool = False,
        generator: Optional[torch.Generator] = None,
    ) -> CalibrationStepResult:
        """Count one iteration and, unless in warm-up or between two `every`, take the meta-step.

        Args:
            source_image, target_image: (N, K, H, W), floating.
            source_label: (N, H, W) int64.
            teacher_logits: (N, C, H, W) of the target images, at the resolution of the labels.
            mask: (N, 1, H, W) bool, True = source pixel: the mask with which the host will mix. Drawn by `class_mask` if
                not given.
            teacher_features: (N, F, h, w) for a temperature net with `feature_channels`.
            valid: (N, H, W) bool, False on the target's padding.
            backward: also train: add the gradient of the loss on the mixed images, with the labels of this call's temperatures,
                to `.grad` of the student's parameters, and leave buffers and random states as that pass leaves them. At
                every iteration, whether there is a meta-step or not; the host does its source loss and the optimizer's step.
            generator: for the mask and for outer sets that draw; by default the step's own, which is part of its state.

        Raises:
            ValueError, TypeError: tensors that do not fit each other; nothing has changed then.
        """
        self._check_batch(source_image, source_label, target_image, teacher_logits)
        if mask is not None:
            mix(mask, source_label, source_label)  # for its checks
        reason = waiting(self.iteration, warmup=self.warmup, every=self.every)
        if reason is not None and self.iteration and not backward:
            self.iteration += 1
            return self._skipped(reason)
        ranks = ranks_of(self.student, self.process_group)
        if not self._broadcast:
            ranks.broadcast([*self.temperature_net.parameters(), *self.temperature_net.buffers()])
            self._broadcast = True
        label = partial(self.labeler, teacher_logits, features=teacher_features, valid=valid)
        before_labels = Preserved(self.temperature_net)
        with torch.no_grad():
            # At the first iteration also in the warm-up, so that features or padding that do not fit are found at once.
            labels = label()
        if reason is not None and not backward:
            self.iteration += 1
            return self._skipped(reason)

        generator = generator if generator is not None else self._generator
        if mask is None:
            mask = class_mask(source_label, generator=generator, ignore_index=self.ignore_index)
        inner_image = mix(mask, source_image, target_image)
        mix_labels = partial(mix, mask, source_label, ignore_index=self.ignore_index)
        inner_label = mix_labels(labels.soft_label)
        inner_weight = mix(mask, torch.ones_like(labels.weight), labels.weight)
        if self.inner_loss is soft_cross_entropy:
            inner_weight = _for_all(ranks, inner_weight, (inner_label > 0).any(1))
        with_graph: List[Tensor] = []

        def inner_loss(f: Student) -> Tensor:
            # The labels' graph is large: not before an engine asks for it, and once for all its passes.
            differentiated = reason is None and any(parameter.requires_grad for parameter in self._meta_parameters)
            if differentiated and not with_graph:
                with preserved(self.temperature_net):
                    before_labels.rewind()  # a net with dropout or BatchNorm must give the same labels again
                    with_graph.append(mix_labels(label().soft_label))
            soft_label = with_graph[0] if differentiated else inner_label
            return self.inner_loss(self._logits(f, inner_image), soft_label, inner_weight)

        if reason is not None:
            loss = float(plain_backward(self.student, inner_loss, process_group=self.process_group))
            self.iteration += 1
            return self._skipped(reason)._replace(inner_loss=loss)

        batch = DomainBatch(
            source_image, source_label, target_image, labels.pseudo_label, labels.weight, mask, self.ignore_index
        )
        outer = self.outer_set(batch, generator=generator)
        if self._divides_by_labelled:
            outer = outer._replace(weight=_for_all(ranks, outer.weight, outer.label != self.ignore_index))

        result = hypergradient(
            self.student,
            inner_loss,
            lambda f: self.outer_loss(self._logits(f, outer.image), outer.label, outer.weight),
            self._meta_parameters,
            optimizer=self.optimizer,
            engine=self.engine,
            update_rule=self.update_rule,
            clip_norm=self.clip_norm,
            backward=backward,
            measure_before=self.measure_before,
            process_group=self.process_group,
        )
        self.iteration += 1
        return descend(
            result,
            self._meta_parameters,
            self.meta_optimizer,
            temperature=labels.temperature,
            measured_before=self.measure_before,
        )

    def state_dict(self) -> Dict[str, Any]:
        """Everything that a resumed run needs: iteration, temperature net, meta-optimizer, generator."""
        return {
            "iteration": self.iteration,
            "temperature_net": self.temperature_net.state_dict(),
            "meta_optimizer": self.meta_optimizer.state_dict(),
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """Continue exactly where `state_dict` was taken."""
        missing = {"iteration", "temperature_net", "meta_optimizer", "generator"} - set(state)
        if missing:
            expected = "the result of BilevelCalibrationStep.state_dict()"
            got = f"a dict without {', '.join(sorted(missing))}"
            raise problem("BilevelCalibrationStep", expected=expected, got=got, remedy="load another checkpoint")
        self.temperature_net.load_state_dict(state["temperature_net"])
        self.meta_optimizer.load_state_dict(state["meta_optimizer"])
        self._generator.set_state(state["generator"].cpu())  # map_location may have moved it
        self.iteration = state["iteration"]

    def _skipped(self, reason: str) -> CalibrationStepResult:
        nan = float("nan")
        return CalibrationStepResult(nan, nan, nan, nan, nan, nan, self.engine, reason)

    def _logits(self, f: Student, image: Tensor) -> Tensor:
        output = f(image)
        logits: Tensor = output if self.logits_of is None else self.logits_of(output)
        if not isinstance(logits, Tensor):
            remedy = "say with logits_of where they are, e.g. logits_of=lambda out: out['out']"
            expected = "the student to return logits"
            raise problem("BilevelCalibrationStep", expected=expected, got=describe(logits), remedy=remedy, error=TypeError)
        if logits.shape[-2:] != image.shape[-2:]:
            logits = F.interpolate(logits, size=image.shape[-2:], mode="bilinear", align_corners=False)
        return logits

    def _check_batch(self, source_image: Any, source_label: Any, target_image: Any, teacher_logits: Any) -> None:
        name = "BilevelCalibrationStep"
        for what, image in (("source_image", source_image), ("target_image", target_image)):
            check_image(name, what, image)
        if source_image.shape != target_image.shape:
            expected = "source and target images of one shape"
            got = f"{tuple(source_image.shape)} and {tuple(target_image.shape)}"
            raise problem(name, expected=expected, got=got, remedy="crop both domains to one size and batch")
        n, _, h, w = source_image.shape
        check_label(name, "source_label", source_label, shape=(n, h, w))
        expected = f"teacher_logits: a floating tensor {(n, 'C', h, w)}"
        z = check_tensor(name, "teacher_logits", teacher_logits, expected=expected, remedy="pass the teacher's logits")
        if z.dim() != 4 or (z.shape[0], *z.shape[-2:]) != (n, h, w):
            raise problem(name, expected=expected, got=describe(z), remedy="interpolate them to the size of the image")
        check_classes(name, "source_label", source_label, z.shape[1], self.ignore_index)


def _for_all(ranks: Ranks, weight: Tensor, labelled: Tensor) -> Tensor:
    """Weights with which the ranks' means over labelled pixels average to the mean over the labelled pixels of all ranks."""
    if ranks.size == 1:
        return weight
    count = labelled.sum().double()
    share = count / ranks.average_number(count).clamp(min=1e-12)
    return weight * share.to(weight.dtype)
