"""The meta-step: learn the temperatures by looking one student update ahead."""

from functools import partial
from typing import Any, List, Optional, Type, Union

import torch
from torch import Tensor, nn

from .._check import problem
from ..engines import Student, Update, check_supported, has_zero_step, hypergradient, ranks_of
from ..engines import backward as plain_backward
from ..ignoring import void_label
from ..losses import InnerLoss, soft_cross_entropy
from ..mixing import mix
from ..preserve import Preserved, preserved
from ..pseudo_labels import SoftPseudoLabeler
from ..ranks import Ranks
from .judged_sets import JudgedBatch, as_judged
from .learner import Defaults, Iteration, Learned, Learner, mean_over_all
from .skips import Skip


class BilevelCalibrationStep(Learner):
    """One meta-step of DA-Cal per call: update the temperature net so that one student step on its labels turns out better.

    Call it once per iteration, before the host labels the target images. It mixes the batch, takes a virtual step of the
    student on the soft labels (inner loss), judges the result on the complementary mix (outer loss), and descends the
    hypergradient with `meta_optimizer`. The live student (parameters, buffers, `.grad`, training flags), its optimizer and
    the global random states are bit for bit as before, also after an error. With `backward=True` the call is the host's pass
    over the mixed images as well, which makes it cheaper.

    Args:
        student: the live network, called as `student(image)`.
        labeler: its `temperature_net` is what is trained.
        optimizer: the student's own; only read (see `hypergradient`). None: it is told later, by `use_optimizer`.
        meta_optimizer: Adam with a learning rate of about 3e-4 is a good start; a larger one only drives temperatures to their
            bounds sooner.
        engine: "higher", "forward", "finite_difference" or "auto": see `hypergradient`, and `docs/costs.md`.
        inner_loss: `(logits, soft_label, weight) -> scalar`, the host's own loss on mixed images.
        update_rule, clip_norm, measure_before: see `hypergradient`.
        options: those of `Learner`. `warmup` is 1000 where none is given: a look-ahead of one step asks an untrained student
            for ever sharper labels, and an optimizer without state makes the hypergradient useless; let the student become good
            first.

    Raises:
        ValueError, TypeError: as `Learner`; a student or an optimizer that the engine would differentiate wrongly.

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
        >>> print(step(image, label, image, logits).skipped)
        warm-up: iteration 1 of 1
        >>> result = step(image, label, image, logits, generator=g)
        >>> result.skipped is None, result.hypergradient_norm > 0
        (True, True)

    Source: DA-Cal (Li et al., arXiv 2602.20860).
    """

    defaults = Defaults(
        judged_set="source_and_target_pixels",
        warmup=1000,
        learning_rate=3e-4,
        net_options={"sees": "logits", "kernel_size": 3},
    )

    def __init__(
        self,
        student: nn.Module,
        labeler: SoftPseudoLabeler,
        *,
        optimizer: Optional[torch.optim.Optimizer],
        meta_optimizer: torch.optim.Optimizer,
        engine: str = "auto",
        inner_loss: InnerLoss = soft_cross_entropy,
        update_rule: Optional[Update] = None,
        clip_norm: Optional[float] = None,
        measure_before: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(labeler, meta_optimizer=meta_optimizer, **options)
        self.student = student
        self.engine = engine
        self.inner_loss = inner_loss
        self.update_rule = update_rule
        self.clip_norm = clip_norm
        self.measure_before = measure_before
        self.optimizer: Optional[torch.optim.Optimizer] = None
        if optimizer is not None:
            self.use_optimizer(optimizer)

    @classmethod
    def for_loop(
        cls: "Type[BilevelCalibrationStep]",
        labeler: SoftPseudoLabeler,
        *,
        student: nn.Module,
        optimizer: Optional[torch.optim.Optimizer],
        meta_optimizer: torch.optim.Optimizer,
        **options: Any,
    ) -> "BilevelCalibrationStep":
        return cls(student, labeler, optimizer=optimizer, meta_optimizer=meta_optimizer, **options)

    def use_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Take this one for the student's.

        Raises:
            ValueError, TypeError: the engine would differentiate its step wrongly. Now, and not after a thousand iterations of
                warm-up.
        """
        check_supported(self.student, optimizer, engine=self.engine, update_rule=self.update_rule, clip_norm=self.clip_norm)
        self.optimizer = optimizer

    def ranks(self) -> Ranks:
        return ranks_of(self.student, self.process_group)

    def gradient(self, iteration: Iteration) -> Union[Learned, Skip]:
        optimizer = self._optimizer()
        mixed = _Mixed(self, iteration)
        judged = self.judged_batch(iteration)
        judged = judged._replace(weight=self.judged_weight(iteration.ranks, judged))
        result = hypergradient(
            self.student,
            iteration.own_loss or (lambda f: self.loss_on_mixed(f, mixed.image, mixed.soft_label(), mixed.weight)),
            lambda f: self.loss_on_judged(f, judged),
            self.meta_parameters,
            optimizer=optimizer,
            engine=self.engine,
            update_rule=self.update_rule,
            clip_norm=self.clip_norm,
            backward=iteration.backward,
            measure_before=self.measure_before,
            process_group=self.process_group,
        )
        return Learned(
            result.grads,
            mixed.temperature,
            outer_loss_before=result.outer_loss_before if self.measure_before else None,
            outer_loss_after=result.outer_loss_after,
            engine=result.engine,
            inner_loss=result.inner_loss,
            no_step=has_zero_step(optimizer, self.student.parameters()),
        )

    def train_student(self, iteration: Iteration) -> float:
        mixed = _Mixed(self, iteration)

        def loss(f: Student) -> Tensor:
            return self.loss_on_mixed(f, mixed.image, mixed.fixed_label, mixed.weight)

        return float(plain_backward(self.student, loss, process_group=self.process_group))

    def loss_on_mixed(self, f: Student, image: Tensor, soft_label: Tensor, weight: Tensor) -> Tensor:
        """The inner loss of `f`, the student. A host whose heads compute their own losses overrides this and the next one."""
        return self.inner_loss(self._logits(f, image), soft_label, weight)

    def loss_on_judged(self, f: Student, judged: JudgedBatch) -> Tensor:
        """The outer loss of `f`, the student with the live or the virtually updated parameters."""
        with as_judged(judged, f):
            logits = self._logits(f, judged.image)
        return self.outer_loss(logits, judged.label, judged.weight, ignore_index=void_label(self.ignore_index))

    def _logits(self, f: Student, image: Tensor) -> Tensor:
        return self.outputs.logits(self._name, f(image), image.shape[2:])

    def _optimizer(self) -> torch.optim.Optimizer:
        if self.optimizer is None:
            remedy = "tell it before the first call: .use_optimizer(optimizer)"
            raise problem(self._name, expected="the student's optimizer", got="none", remedy=remedy, error=RuntimeError)
        return self.optimizer


class _Mixed:
    """The mixed image of an iteration, and its labels: without a graph, or with one that is made once for all passes."""

    def __init__(self, learner: BilevelCalibrationStep, iteration: Iteration) -> None:
        self._net, self._label = learner.temperature_net, iteration.label
        self._before = Preserved(self._net)
        with torch.no_grad():
            labels = iteration.label()
        batch = iteration.batch
        self.temperature = labels.temperature
        self.image = mix(batch.mask, batch.source_image, batch.target_image)
        self._mix = partial(mix, batch.mask, batch.source_label, ignore_index=batch.ignore_index)
        self.fixed_label = self._mix(labels.soft_label)
        """(N, C, *S), without a graph."""
        self.weight = mix(batch.mask, torch.ones_like(batch.weight), batch.weight)
        if learner.inner_loss is soft_cross_entropy:
            self.weight = mean_over_all(iteration.ranks, self.weight, (self.fixed_label > 0).any(1))
        self._with_graph: List[Tensor] = []

    def soft_label(self) -> Tensor:
        """(N, C, *S), with the temperature net's gradient while its parameters require one."""
        # Its graph is large: not before an engine asks for it, and once for all its passes.
        if not any(parameter.requires_grad for parameter in self._net.parameters()):
            return self.fixed_label
        if not self._with_graph:
            with preserved(self._net):
                self._before.rewind()  # a net with dropout or BatchNorm must give the same labels again
                self._with_graph.append(self._mix(self._label().soft_label))
        return self._with_graph[0]
