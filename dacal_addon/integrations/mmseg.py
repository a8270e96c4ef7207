"""DA-Cal inside DAFormer, HRDA and MIC: `DACalDACS`, the host's own `DACS` with calibrated soft labels.

Switched on from the config alone:

    custom_imports = dict(imports=['dacal_addon.integrations.mmseg'], allow_failed_imports=False)
    uda = dict(type='DACalDACS', dacal=dict(labels='soft'))

`dacal` takes what `options.Options` lists. The only file that imports the host. It was written against lhoyer/DAFormer e6f6e04,
lhoyer/HRDA c370b5b and lhoyer/MIC 2f932a9, and relies on this order in `DACS.forward_train`: source pass of the student, the
teacher's `encode_decode`, `get_class_masks`, the student's pass on mixed images, in MIC its pass on masked images. Each
iteration listens to these calls (`shadows`), has the temperatures learn just before the mixed pass (by a fit, or by the paper's
meta-step), and has the host's heads learn soft labels in the mixed and the masked pass (`criterion`). Everything else is the
host's own code.
"""

import logging
import math
import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import torch
from mmseg.models import UDA
from mmseg.models.uda.dacs import DACS
from torch import Tensor, nn

from .._check import describe, problem
from ..bilevel import CalibrationStepResult, descend, waiting
from ..engines import Student, check_supported, hypergradient
from ..losses import CrossEntropyAndGap
from ..mixing import mix
from ..outer_sets import OUTER_SETS, DomainBatch
from ..preserve import preserved
from ..pseudo_labels import SoftPseudoLabeler, SoftPseudoLabels
from ..temperature import MetaTemperatureNet
from ..temperature_fit import TemperatureFit
from . import checkpoint
from .criterion import Teaching
from .options import Options, parse
from .shadows import shadowed, unshadowed

_LOGGER = logging.getLogger("mmseg")  # the host's
_IGNORE = 255  # of mmseg's heads, and of its class masks
_STATE = "dacal."
# Why the temperatures did not learn, by how `waiting`, `descend`, `TemperatureFit` and `Iteration._fit` begin to say it.
_WAITING = {"warmup": ("warm-up",), "every": ("every",)}
_SKIPPED: Dict[str, Dict[str, Tuple[str, ...]]] = {
    "fit": {**_WAITING, "not_finite": ("teacher's logits", "loss or its gradient"), "unjudged": ("no pixel is judged",)},
    "bilevel": {
        **_WAITING,
        "not_finite": ("outer loss", "hypergradient is not finite"),
        "zero": ("hypergradient is zero",),
    },
}
_STEP = {"fit": "fit", "bilevel": "meta-step"}


@UDA.register_module()
class DACalDACS(DACS):  # type: ignore[misc]
    """The host's `DACS`, whose student learns calibrated soft labels.

    Args:
        dacal: see `options.Options`. With `labels='hard', every=0` every number is upstream's, to the bit.
        cfg: what the host's `DACS` takes.

    Log variables, beside the host's: `dacal.temperature_mean`, `_min`, `_max` over the target pixels of the batch; at
    iterations with a fit `dacal.fit_loss`, the negative log-likelihood of the blends before it; at those with a meta-step
    `dacal.outer_loss` after the virtual step, and the hypergradient's size, `dacal.hypergradient_log10`; `dacal.skipped_<why>`,
    1 where temperatures did not learn and else 0, why: `warmup`, `every`, `not_finite`, with learn='fit' `unjudged` (no two
    pseudo-labels with a weight differ), with 'bilevel' `zero` (the hypergradient).

    Raises:
        ValueError, TypeError: an unknown key or value in `dacal`, a host that it cannot calibrate, one target image alone.
        RuntimeError: several processes, or half precision.
    """

    def __init__(self, **cfg: Any) -> None:
        options = parse(cfg.pop("dacal", {}))
        super().__init__(**cfg)
        # Not a child module: the host's optimizer owns every parameter of its module, and its checkpoints list them in order.
        self._dacal = None if options.off else Calibration(options, self)
        self._register_state_dict_hook(_add_state)

    def train_step(self, data_batch: Any, optimizer: Any, **kwargs: Any) -> Any:
        if self._dacal is not None:
            self._dacal.meet(self.get_model(), optimizer)
        return super().train_step(data_batch, optimizer, **kwargs)

    def forward_train(
        self, img: Tensor, img_metas: Any, gt_semantic_seg: Tensor, target_img: Tensor, target_img_metas: Any, **extra: Any
    ) -> Any:
        arguments = (img, img_metas, gt_semantic_seg, target_img, target_img_metas)
        if self._dacal is None:
            return super().forward_train(*arguments, **extra)
        valid = extra.get("valid_pseudo_mask")
        iteration = Iteration(self, self._dacal, img, gt_semantic_seg[:, 0], target_img, target_img_metas, valid)
        plotted = self.local_iter % self.debug_img_interval == 0
        with iteration.listening():
            log_vars = super().forward_train(*arguments, **extra)
        self._dacal.local_iter = self.local_iter
        log_vars.update(iteration.log_vars)
        if plotted:
            try:
                iteration.plot(img_metas, Path(self.train_cfg["work_dir"]), self.local_iter)
            except Exception as error:  # a picture is no reason to lose days of training
                _LOGGER.warning("dacal: no temperature map: %r", error)
        return log_vars

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        own = prefix + _STATE
        ours = {name[len(own) :]: value for name, value in state_dict.items() if name.startswith(own)}
        if self._dacal is not None and ours:
            self._dacal.load_state_dict(ours)
            if self._dacal.options.restore_teacher:
                self.local_iter = self._dacal.local_iter
        elif self._dacal is not None:
            _LOGGER.warning("dacal: the checkpoint has no state of DACalDACS; temperatures and warm-up start anew")
        super()._load_from_state_dict(
            {name: value for name, value in state_dict.items() if not name.startswith(own)}, prefix, *rest
        )


def _add_state(module: DACalDACS, state: Dict[str, Tensor], prefix: str, metadata: Any) -> None:
    if module._dacal is not None:
        state.update({prefix + _STATE + name: value for name, value in module._dacal.state_dict().items()})


class Calibration:
    """What outlives an iteration: the temperature net, its optimizer, and how many iterations there were."""

    def __init__(self, options: Options, host: Any) -> None:
        if getattr(host, "source_only", False):
            remedy = "remove uda.source_only, or train with uda.type='DACS'"
            raise problem("uda.dacal", expected="a host that trains on target images", got="source_only=True", remedy=remedy)
        self.options = options
        fitted = options.learn == "fit"
        self.net = MetaTemperatureNet(
            host.num_classes,
            sees="confidence" if fitted else "logits",
            kernel_size=1 if fitted else 3,
            hidden_channels=options.hidden_channels,
            initial_temperature=options.initial_temperature,
            max_ratio=options.max_ratio,
        )
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=options.learning_rate)
        self.fit = TemperatureFit(self.net, self.optimizer, ignore_index=_IGNORE) if fitted else None
        self.labeler = SoftPseudoLabeler(
            self.net,
            threshold=host.pseudo_threshold,
            ignore_top=host.psweight_ignore_top,
            ignore_bottom=host.psweight_ignore_bottom,
        )
        self.outer_loss = CrossEntropyAndGap() if options.outer_loss == "cross_entropy_and_gap" else None
        self.iteration = 0
        self.local_iter = 0  # the host's, for its checkpoints
        self.generator = torch.Generator().manual_seed(options.seed)
        self.student_optimizer: Any = None
        self._said: Optional[str] = None
        criteria(host.get_model())

    def meet(self, student: nn.Module, optimizer: Any) -> None:
        """Take note of the optimizer that this iteration uses; refuse, at the first one, what would go wrong later."""
        if self.student_optimizer is optimizer:
            return
        if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            got, remedy = f"{torch.distributed.get_world_size()} processes", "train on one GPU, as the hosts' configs do"
            raise problem("DACalDACS", expected="one process", got=got, remedy=remedy, error=RuntimeError)
        if any(getattr(module, "fp16_enabled", False) for module in student.modules()):
            remedy = "remove fp16 from the config"
            raise problem("DACalDACS", expected="float32 training", got="fp16", remedy=remedy, error=RuntimeError)
        if self.options.every and self.options.learn == "bilevel":
            check_supported(student, optimizer, engine=self.options.engine)
        self.student_optimizer = optimizer

    def check_batch(self, target: Tensor) -> None:
        """Refuse, also during the warm-up, what cannot be blended."""
        if self.options.every and self.fit is not None and len(target) < 2:
            remedy = "use data.samples_per_gpu >= 2 or uda.dacal.learn='bilevel'"
            raise problem(
                "DACalDACS", expected="batches of at least 2 target images to blend", got=f"{len(target)}", remedy=remedy
            )

    def to(self, device: torch.device) -> None:
        """The hosts move their module, of which the net is no part; its optimizer's state has to follow, too."""
        if next(self.net.parameters()).device != device:
            self.net.to(device)
            self.optimizer.load_state_dict(self.optimizer.state_dict())

    def waiting(self) -> Optional[str]:
        """Why the temperatures do not learn at this iteration; None if they do."""
        if self.options.every == 0:
            return "every=0: temperatures do not learn"
        return waiting(self.iteration, warmup=self.options.warmup, every=self.options.every)

    def say(self, reason: Optional[str]) -> None:
        """Tell the host's log why temperatures did not learn, if that was for another reason than the last time."""
        kind = reason.split(":")[0] if reason is not None else None
        if kind != self._said and not (kind or "").startswith("every"):
            step = _STEP[self.options.learn]
            _LOGGER.info("dacal: %s", f"no {step} ({reason})" if reason else f"{step}s begin")
            self._said = kind

    def state_dict(self) -> Dict[str, Tensor]:
        """Everything that a resumed run needs, as tensors under flat names."""
        flat = checkpoint.flatten(self.net, self.optimizer, self._counters())
        flat["generator"] = self.generator.get_state()
        return flat

    def load_state_dict(self, flat: Dict[str, Tensor]) -> None:
        """Continue exactly where `state_dict` was taken."""
        counters = checkpoint.restore(flat, self.net, self.optimizer, self._counters())
        self.iteration, self.local_iter = counters["iteration"], counters["local_iter"]
        self.generator.set_state(flat["generator"].cpu())

    def _counters(self) -> Dict[str, int]:
        return {"iteration": self.iteration, "local_iter": self.local_iter}


class Iteration:
    """One call of the host's `forward_train`: what was heard of it, and what is done in between."""

    def __init__(
        self,
        host: Any,
        calibration: Calibration,
        image: Tensor,
        label: Tensor,
        target: Tensor,
        target_metas: Any,
        valid: Optional[Tensor],
    ) -> None:
        calibration.check_batch(target)
        self.host, self.calibration = host, calibration
        self.image, self.label, self.target, self.target_metas = image, label, target, target_metas
        self.valid = None if valid is None else valid[:, 0] > 0
        self.teaching = Teaching()
        self.logits: List[Tensor] = []
        self.own_teacher_logits: List[Tensor] = []
        self.masks: List[Tensor] = []
        self.labels: Optional[SoftPseudoLabels] = None
        self.log_vars: Dict[str, float] = {}
        calibration.to(image.device)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, the host's `forward_train` may run."""
        host, student = self.host, self.host.get_model()
        own_teacher = getattr(getattr(host, "mic", None), "teacher", None)
        with ExitStack() as stack:
            stack.enter_context(shadowed(host.get_ema_model(), "encode_decode", _noted(self.logits)))
            if own_teacher is not None:
                model = own_teacher.get_ema_model()
                stack.enter_context(shadowed(model, "encode_decode", _noted(self.own_teacher_logits)))
            stack.enter_context(shadowed(sys.modules[DACS.__module__], "get_class_masks", _noted(self.masks, detach=False)))
            stack.enter_context(shadowed(student, "forward_train", self._student))
            for loss in criteria(student):
                stack.enter_context(shadowed(loss, "cls_criterion", self.teaching.criterion))
            yield
        if self.labels is None:
            raise problem(
                "DACalDACS",
                expected="DACS.forward_train to call the student after the teacher's encode_decode and get_class_masks",
                got="another order of calls",
                remedy="use DAFormer, HRDA or MIC as published, or set labels='hard', every=0",
                error=RuntimeError,
            )

    def _student(self, forward_train: Callable[..., Any]) -> Callable[..., Any]:
        """The student's `forward_train`, called first with source images, then mixed ones, then masked ones."""

        def called(
            img: Tensor, img_metas: Any, gt_semantic_seg: Tensor, seg_weight: Optional[Tensor] = None, **options: Any
        ) -> Any:
            arguments = (img, img_metas, gt_semantic_seg, seg_weight)
            if not self.logits or not self.masks:
                return forward_train(*arguments, **options)
            soft_label: Optional[Tensor]
            if self.labels is None:
                with unshadowed(self.host.get_model(), "forward_train"):
                    soft_label = self._mixed(*arguments)
            else:
                soft_label = self._masked(gt_semantic_seg)
            if soft_label is None or self.calibration.options.labels == "hard":
                return forward_train(*arguments, **options)
            hard_label = gt_semantic_seg.contiguous()  # whose windows `criterion` can tell
            with self.teaching.soft(hard_label, soft_label):
                return forward_train(img, img_metas, hard_label, seg_weight, **options)

        return called

    def _mixed(self, image: Tensor, img_metas: Any, hard_label: Tensor, weight: Optional[Tensor]) -> Tensor:
        """Before the pass on mixed images: learn the temperatures, and label the target. Returns the mixed soft label."""
        mask = torch.stack([mask[0] for mask in self.masks[0]]) > 0
        reason = self.calibration.waiting()
        if reason is None and self.calibration.fit is not None:
            reason = self._fit(self.calibration.fit)
        elif reason is None:
            reason = self._meta_step(image, img_metas, hard_label.contiguous(), weight, mask)
        # All of them at every iteration: mmcv goes on to report the last values of what is not there any more.
        for why, starts in _SKIPPED[self.calibration.options.learn].items():
            self.log_vars[f"dacal.skipped_{why}"] = float(reason is not None and reason.startswith(starts))
        self.calibration.say(reason)
        self.calibration.iteration += 1
        with torch.no_grad():
            self.labels = self.calibration.labeler(self.logits[0], valid=self.valid)
            temperature = self.labels.temperature
            for name, value in (("mean", temperature.mean()), ("min", temperature.min()), ("max", temperature.max())):
                self.log_vars[f"dacal.temperature_{name}"] = float(value)
            return mix(mask, self.label, self.labels.soft_label, ignore_index=_IGNORE)

    def _fit(self, fit: TemperatureFit) -> Optional[str]:
        """A step of the temperatures on blends of the target images, labelled by the host's teacher.

        Returns:
            Why there was none; None if there was one.
        """
        teacher = self.host.get_ema_model()
        if not bool(torch.isfinite(self.logits[0]).all()):
            return "teacher's logits are not finite"
        with torch.no_grad():
            labels = self.calibration.labeler(self.logits[0], valid=self.valid)
        pseudo_label = labels.pseudo_label.masked_fill(labels.weight == 0, _IGNORE)

        def on_blends(image: Tensor) -> Tensor:
            logits: Tensor = teacher.encode_decode(image, self.target_metas)
            return logits

        # A pass that the host does not make: nothing listens to it, and it leaves nothing behind.
        with unshadowed(teacher, "encode_decode"), _without_pictures(teacher), preserved(teacher):
            result = fit(on_blends, self.target, pseudo_label, generator=self.calibration.generator)
        if result.skipped is None:
            self.log_vars["dacal.fit_loss"] = result.loss
        return result.skipped

    def _meta_step(
        self, image: Tensor, img_metas: Any, hard_label: Tensor, weight: Optional[Tensor], mask: Tensor
    ) -> Optional[str]:
        """The paper's meta-step; returns why the temperatures did not learn, None if they did."""
        result = self._descend(image, img_metas, hard_label, weight, mask)
        sizes = {"outer_loss": result.outer_loss_after, "hypergradient_log10": _log10(result.hypergradient_norm)}
        self.log_vars.update({f"dacal.{name}": value for name, value in sizes.items() if math.isfinite(value)})
        return result.skipped

    def _descend(
        self, image: Tensor, img_metas: Any, hard_label: Tensor, weight: Optional[Tensor], mask: Tensor
    ) -> CalibrationStepResult:
        """The virtual step is one on the host's mixed images, judged by its own heads and losses."""
        calibration, student, teaching = self.calibration, self.host.get_model(), self.teaching
        meta = list(calibration.net.parameters())
        with torch.no_grad():
            labels = calibration.labeler(self.logits[0], valid=self.valid)
        batch = DomainBatch(self.image, self.label, self.target, labels.pseudo_label, labels.weight, mask, _IGNORE)
        outer = OUTER_SETS[calibration.options.outer_set](batch, generator=calibration.generator)
        outer_label = outer.label.unsqueeze(1).contiguous()
        with_graph: List[Tensor] = []

        def soft_label() -> Tensor:
            # Its graph is large: not before an engine asks for it, and once for all its passes.
            if not any(parameter.requires_grad for parameter in meta):
                return mix(mask, self.label, labels.soft_label, ignore_index=_IGNORE)
            if not with_graph:
                with_graph.append(mix(mask, self.label, calibration.labeler(self.logits[0]).soft_label, ignore_index=_IGNORE))
            return with_graph[0]

        def inner_loss(f: Student) -> Tensor:
            with teaching.soft(hard_label, soft_label()):
                return _total(f(image, img_metas, gt_semantic_seg=hard_label, seg_weight=weight))

        def outer_loss(f: Student) -> Tensor:
            with teaching.judged(calibration.outer_loss):
                return _total(f(outer.image, img_metas, gt_semantic_seg=outer_label, seg_weight=outer.weight))

        with _without_pictures(student):
            result = hypergradient(
                student,
                inner_loss,
                outer_loss,
                meta,
                optimizer=calibration.student_optimizer,
                engine=calibration.options.engine,
                measure_before=False,
            )
        return descend(result, meta, calibration.optimizer, temperature=labels.temperature, measured_before=False)

    def _masked(self, hard_label: Tensor) -> Optional[Tensor]:
        """MIC's masked images: the soft label of the target ones among them, None if there are none."""
        mode = self.host.mask_mode
        if mode.startswith("separatesrc"):
            return None
        with torch.no_grad():
            if self.own_teacher_logits:  # MIC's own, with another EMA decay or threshold
                soft_label = self.calibration.labeler(self.own_teacher_logits[0]).soft_label
            else:
                assert self.labels is not None  # the mixed pass came first
                soft_label = self.labels.soft_label
            if mode.startswith("separatetrg"):
                return soft_label
            # One source image, then one target image.
            source = torch.zeros_like(hard_label, dtype=torch.bool)
            source[0] = True
            return mix(source, hard_label[:, 0], torch.stack([soft_label[0], soft_label[0]]), ignore_index=_IGNORE)

    def plot(self, img_metas: Any, work_dir: Path, iteration: int) -> None:
        """Temperature maps beside the host's debug images, `<iteration>_temperature.png`."""
        from ..plots import save, temperature_map  # needs matplotlib, which the hosts have

        assert self.labels is not None  # `listening` has checked
        folders = [work_dir / name for name in ("class_mix_debug", "debug")]  # DAFormer's and HRDA's; MIC's
        folder = next((folder for folder in folders if folder.is_dir()), folders[1])
        folder.mkdir(parents=True, exist_ok=True)
        scale = img_metas[0]["img_norm_cfg"]
        mean, std = (torch.as_tensor(scale[name], dtype=torch.float32).view(1, 3, 1, 1) for name in ("mean", "std"))
        picture = ((self.target.detach().cpu() * std + mean) / 255.0).clamp(0.0, 1.0)
        save(temperature_map(picture, self.labels.temperature), folder / f"{iteration:06d}_temperature.png")


def criteria(student: nn.Module) -> List[nn.Module]:
    """The losses of the student's heads that can be taught soft labels.

    Raises:
        ValueError: the decode head's loss is none of them.
    """
    losses = [module for module in student.modules() if "cls_criterion" in vars(module)]
    own: Any = getattr(getattr(student, "decode_head", None), "loss_decode", None)
    sigmoid = getattr(own, "use_sigmoid", False) or getattr(own, "use_mask", False)
    if own is None or own not in losses or sigmoid:
        raise problem(
            "uda.dacal",
            expected="model.decode_head.loss_decode: dict(type='CrossEntropyLoss', use_sigmoid=False)",
            got=f"{type(own).__name__}{' with sigmoid or mask' if sigmoid else ''}",
            remedy="use the softmax cross-entropy, or labels='hard', every=0",
        )
    return losses


def _noted(heard: List[Any], *, detach: bool = True) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A listener that appends what a function returns to `heard`."""

    def listener(function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            heard.append(result.detach() if detach else result)
            return result

        return called

    return listener


@contextmanager
def _without_pictures(network: nn.Module) -> Iterator[None]:
    """Inside, the network makes no debug images, which a pass that the host does not make has no use for."""
    with ExitStack() as stack:
        for module in network.modules():
            if vars(module).get("debug"):
                stack.enter_context(shadowed(module, "debug", lambda debug: False))
        yield


def _total(losses: Dict[str, Any]) -> Tensor:
    """The scalar that mmseg descends: everything whose name contains "loss"."""
    total: Any = 0.0
    for name, value in losses.items():
        if "loss" in name:
            total = total + (sum(part.mean() for part in value) if isinstance(value, list) else value.mean())
    if not isinstance(total, Tensor):
        got = f"{describe(losses)} of {', '.join(losses)}"
        raise problem("DACalDACS", expected="losses of the student's heads", got=got, remedy="give model.decode_head a loss")
    return total


def _log10(value: float) -> float:
    """The hypergradient is tiny, and the host's log has four decimals."""
    return math.log10(value) if value > 0 else -math.inf
