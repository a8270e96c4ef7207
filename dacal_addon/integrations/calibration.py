"""What outlives an iteration of a host: the learner, its lines in the host's log, its state, its device."""

import logging
import math
from contextlib import ExitStack
from typing import Any, Dict, Mapping, NamedTuple, Optional, Type

import torch
from torch import Tensor, nn

from .._check import problem
from ..learners import LEARNERS, BilevelCalibrationStep, CalibrationStepResult, Learner, Skip, SkipKind
from ..learners.judged_sets import NEED_TWO_IMAGES
from ..learners.networks import Network
from ..learners.skips import waiting
from ..pseudo_labels import SoftPseudoLabeler
from ..temperature import MetaTemperatureNet
from . import checkpoint
from .criterion import TaughtHeads
from .doubts import Run, doubts
from .listening import Call
from .meta_step import HostCalibrationStep
from .options import HostOptions
from .teachers import TeacherLogits

IGNORE = 255  # of mmseg's heads, and of its class masks
_STEP = {"bilevel": "meta-step"}  # what the log calls a step


class Told(NamedTuple):
    """What an iteration of the learner gives the host."""

    variables: Dict[str, float]
    """For its log."""
    losses: Optional[Dict[str, Any]] = None
    """What its student has returned to its call on the mixed images and has been trained on already; None: it has not yet been
    called."""


class Calibration:
    """Learns temperatures beside a host's training: built before it, and saved with its checkpoints.

    Args:
        options: of the host's config.
        student: what the host trains; only read.
        heads: the student's.
        num_classes, threshold, ignore_top, ignore_bottom: of the host's pseudo-labels, see `SoftPseudoLabeler`; a threshold of
            None: every label counts.
        logger: the host's.
    """

    def __init__(
        self,
        options: HostOptions,
        *,
        student: nn.Module,
        heads: TaughtHeads,
        num_classes: int,
        threshold: Optional[float],
        ignore_top: int = 0,
        ignore_bottom: int = 0,
        logger: logging.Logger,
    ) -> None:
        self.options = options
        self.heads = heads
        self.logits = TeacherLogits(num_classes, options.logits_of, logger=logger)
        kind: Type[Learner] = HostCalibrationStep if options.learner == "bilevel" else LEARNERS[options.learner]
        net = MetaTemperatureNet(
            num_classes,
            hidden_channels=options.hidden_channels,
            initial_temperature=options.initial_temperature,
            max_ratio=options.max_ratio,
            **kind.defaults.net_options,
        )
        self.labeler = SoftPseudoLabeler(
            net,
            weight="none" if threshold is None else "ratio",
            threshold=0.0 if threshold is None else threshold,
            ignore_top=ignore_top,
            ignore_bottom=ignore_bottom,
        )
        own: Dict[str, Any] = {}
        if options.learner == "bilevel":
            own = {"heads": heads, "engine": options.engine, "clip_norm": options.clip_norm}
        self.learner = kind.for_loop(
            self.labeler,
            student=student,
            optimizer=None,  # hosts build it later, and may load a checkpoint before
            meta_optimizer=torch.optim.Adam(net.parameters(), lr=options.learning_rate),
            judged_set=options.judged_set,
            outer_loss=None if options.outer_loss == "host" else options.outer_loss,
            every=max(1, options.every),
            warmup=options.warmup,
            ignore_index=IGNORE,
            generator=torch.Generator().manual_seed(options.seed),
            **own,
        )
        self.local_iter = 0  # the host's, for its checkpoints
        self._student_optimizer: Any = None
        self._logger = logger
        self._said: Optional[SkipKind] = None
        self._doubted = False

    def meet(self, student: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Take note of the optimizer that this iteration uses; refuse, at the first one, what would go wrong later.

        Raises:
            RuntimeError: several processes, or half precision.
            ValueError, TypeError: an optimizer or a student that the engine would differentiate wrongly.
        """
        if self._student_optimizer is optimizer:
            return
        if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            got, remedy = f"{torch.distributed.get_world_size()} processes", "train on one GPU, as the hosts' configs do"
            raise problem("DACalDACS", expected="one process", got=got, remedy=remedy, error=RuntimeError)
        if any(getattr(module, "fp16_enabled", False) for module in student.modules()):
            remedy = "remove fp16 from the config"
            raise problem("DACalDACS", expected="float32 training", got="fp16", remedy=remedy, error=RuntimeError)
        if self.options.every and isinstance(self.learner, BilevelCalibrationStep):
            self.learner.use_optimizer(optimizer)
        self._student_optimizer = optimizer

    def check_batch(self, target: Tensor) -> None:
        """Refuse, also during the warm-up, what cannot be blended."""
        judged_set = self.options.judged_set or self.learner.defaults.judged_set
        if self.options.every and judged_set in NEED_TWO_IMAGES and len(target) < 2:
            other = "learner='bilevel'" if self.options.judged_set is None else "judged_set='source_and_target_pixels'"
            expected = "batches of at least 2 target images to blend"
            remedy = f"use data.samples_per_gpu >= 2 or uda.dacal.{other}"
            raise problem("DACalDACS", expected=expected, got=f"{len(target)}", remedy=remedy)

    def doubt(self, target: Tensor, *, iterations: Optional[int]) -> None:
        """Warn, at the first iteration, of settings that cannot work together.

        Args:
            target: the batch's (N, K, H, W).
            iterations: of the whole run, where the host knows.
        """
        if self._doubted:
            return
        self._doubted = True
        ignored_rows = self.labeler.ignore_top + self.labeler.ignore_bottom
        run = Run(iterations=iterations, ignored_rows=ignored_rows, height=target.shape[-2])
        for one in doubts(self.options, run):
            self._logger.warning("dacal: %s", one)

    def to(self, device: torch.device) -> None:
        """The hosts move their module, of which the net is no part."""
        if next(self.learner.temperature_net.parameters()).device != device:
            self.learner.to(device)

    def learn(
        self,
        source_image: Tensor,
        source_label: Tensor,
        target_image: Tensor,
        logits: Tensor,
        *,
        teacher: Network,
        teacher_image: Tensor,
        mask: Tensor,
        valid: Optional[Tensor],
        mixed: Call,
        share: bool = False,
    ) -> Told:
        """One iteration of the learner.

        Args:
            source_image, source_label, target_image, teacher_image, mask, valid: as a learner takes them.
            logits: the teacher's, on the target images.
            teacher: asked about further images, returns logits.
            mixed: how the host is going to call its student on the mixed images.
            share: whether the meta-step's first pass may be that call, with the labels of the temperatures before the step.
        """
        if not self.options.every:
            self.learner.iteration += 1  # so that a run that is resumed with another `every` has had its warm-up
            skip = Skip(SkipKind.EVERY, "every=0: temperatures do not learn")
            return Told(self._variables(CalibrationStepResult(skipped=skip)))
        learner, inner = self.learner, None
        with ExitStack() as stack:
            if isinstance(learner, HostCalibrationStep):
                inner = stack.enter_context(learner.about(mixed))
                share = share and waiting(learner.iteration, warmup=learner.warmup, every=learner.every) is None
            result = learner(
                source_image,
                source_label,
                target_image,
                logits,
                teacher=teacher,
                teacher_image=teacher_image,
                mask=mask,
                valid=valid,
                backward=inner is not None and share,
            )
        return Told(self._variables(result), inner.for_host() if inner is not None and share else None)

    def state_dict(self) -> Dict[str, Tensor]:
        """Everything that a resumed run needs, as tensors under flat names."""
        return {**checkpoint.flatten(self.learner), "local_iter": torch.tensor(self.local_iter)}

    def load_state_dict(self, flat: Mapping[str, Tensor]) -> None:
        """Continue exactly where `state_dict` was taken.

        Raises:
            ValueError: something is missing, or another net's; nothing has changed then.
        """
        if "local_iter" not in flat:
            remedy = "resume from a checkpoint that DACalDACS wrote"
            raise problem("uda.dacal", expected="a checkpoint with local_iter", got="none", remedy=remedy)
        checkpoint.restore(flat, self.learner)
        self.local_iter = int(flat["local_iter"])

    def _variables(self, result: CalibrationStepResult) -> Dict[str, float]:
        """The variables for the host's log; and a line in it where temperatures do not learn for another reason than before."""
        skip = result.skipped
        self._say(skip)
        # All kinds at every iteration: mmcv goes on to report the last values of what is not there any more.
        variables = {f"dacal.skipped_{kind.value}": float(skip is not None and skip.kind is kind) for kind in SkipKind}
        figures = {f"{self.options.learner}_loss": result.outer_loss_before}
        if self.options.learner == "bilevel":
            figures = {"outer_loss": result.outer_loss_after, "hypergradient_log10": _log10(result.hypergradient_norm)}
        variables.update({f"dacal.{name}": value for name, value in figures.items() if math.isfinite(value)})
        return variables

    def _say(self, skip: Optional[Skip]) -> None:
        kind = None if skip is None else skip.kind
        if kind is self._said or kind is SkipKind.EVERY:
            return
        level = logging.WARNING if kind is SkipKind.NOT_FINITE else logging.INFO
        step = _STEP.get(self.options.learner, self.options.learner)
        self._logger.log(level, "dacal: %s", f"{step}s begin" if skip is None else f"no {step} ({skip})")
        self._said = kind


def _log10(value: float) -> float:
    """The hypergradient is tiny, and the host's log has four decimals."""
    return math.log10(value) if value > 0 else -math.inf
