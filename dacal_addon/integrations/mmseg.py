"""DA-Cal inside DAFormer, HRDA and MIC: `DACalDACS`, the host's own `DACS` with calibrated soft labels.

Switched on from the config alone:

    custom_imports = dict(imports=['dacal_addon.integrations.mmseg'], allow_failed_imports=False)
    uda = dict(type='DACalDACS', dacal=dict(labels='soft'))

`dacal` takes what `options.HostOptions` lists. The only file that imports the host. It was written against lhoyer/DAFormer
e6f6e04, lhoyer/HRDA c370b5b and lhoyer/MIC 2f932a9, and relies on this order in `DACS.forward_train`: source pass of the
student, the teacher's `encode_decode`, `get_class_masks`, the student's pass on mixed images, in MIC its pass on masked images.
Each iteration (`dacs_iteration`) listens to these calls, has the temperatures learn just before the mixed pass, and has the
host's heads learn soft labels in the mixed and the masked pass. Everything else is the host's own code.
"""

import functools
import importlib
import inspect
import logging
from pathlib import Path
from typing import Any, Dict

from mmseg.models import UDA
from torch import Tensor, nn

from .._check import problem
from .calibration import Calibration
from .criterion import TaughtHeads, teachable_losses
from .dacs_iteration import DacsIteration, HostBatch, teachers_of
from .options import HostOptions, parse
from .teachers import setting_of

_LOGGER = logging.getLogger("mmseg")  # the host's
_STATE = "dacal."


class Calibrated(nn.Module):
    """Comes before a host's `DACS` among the bases of a class: its student then learns calibrated soft labels.

    Args:
        dacal: see `options.HostOptions`. With `labels='hard', every=0` every number is upstream's, to the bit.
        cfg: what the host's class takes.

    Log variables, beside the host's: `dacal.temperature_mean`, `_min`, `_max` over the target pixels of the batch; at
    iterations with a fit `dacal.fit_loss`, the negative log-likelihood of the blends before it; at those with a meta-step
    `dacal.outer_loss` after the virtual step, and the hypergradient's size, `dacal.hypergradient_log10`; `dacal.skipped_<kind>`
    for each `SkipKind`, 1 where temperatures did not learn for that reason and else 0.

    Raises:
        ValueError, TypeError: an unknown key or value in `dacal`, a host that it cannot calibrate, one target image alone.
        RuntimeError: several processes, or half precision.
    """

    def __init__(self, **cfg: Any) -> None:
        options = parse(cfg.pop("dacal", {}))
        super().__init__(**cfg)
        # Not a child module: the host's optimizer owns every parameter of its module, and its checkpoints list them in order.
        self._dacal = None if options.off else calibration_of(self, options)
        host: Any = self
        host._register_state_dict_hook(_add_state)

    def train_step(self, data_batch: Any, optimizer: Any, **kwargs: Any) -> Any:
        host: Any = super()
        own: Any = self
        if self._dacal is not None:
            self._dacal.meet(own.get_model(), optimizer)
        return host.train_step(data_batch, optimizer, **kwargs)

    def forward_train(
        self, img: Tensor, img_metas: Any, gt_semantic_seg: Tensor, target_img: Tensor, target_img_metas: Any, **extra: Any
    ) -> Any:
        host: Any = super()
        own: Any = self
        arguments = (img, img_metas, gt_semantic_seg, target_img, target_img_metas)
        if self._dacal is None:
            return host.forward_train(*arguments, **extra)
        valid = extra.get("valid_pseudo_mask")
        batch = HostBatch(img, gt_semantic_seg[:, 0], target_img, None if valid is None else valid[:, 0] > 0)
        iteration = DacsIteration(self, self._dacal, batch)
        self._dacal.doubt(target_img, iterations=getattr(self, "max_iters", None))
        plotted = own.local_iter % own.debug_img_interval == 0
        with iteration.listening():
            log_vars = host.forward_train(*arguments, **extra)
        self._dacal.local_iter = own.local_iter
        log_vars.update(iteration.log_vars)
        if plotted:
            try:
                iteration.plot(img_metas, Path(own.train_cfg["work_dir"]), own.local_iter)
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
                # Upstream does that where it makes the teacher equal to the student, at iteration 0. Else the teacher's passes
                # would keep their graphs.
                for teacher in teachers_of(self):
                    teacher.requires_grad_(False)
        elif self._dacal is not None:
            _LOGGER.warning("dacal: the checkpoint has no state of DACalDACS; temperatures and warm-up start anew")
        super()._load_from_state_dict(
            {name: value for name, value in state_dict.items() if not name.startswith(own)}, prefix, *rest
        )


def _add_state(module: Calibrated, state: Dict[str, Tensor], prefix: str, metadata: Any) -> None:
    if module._dacal is not None:
        state.update({prefix + _STATE + name: value for name, value in module._dacal.state_dict().items()})


def _default_base() -> Any:
    """The hosts' `DACS`; for forks that have none, and name theirs in `uda.dacal.base`, a stand-in for it."""
    try:
        return importlib.import_module("mmseg.models.uda.dacs").DACS
    except (ImportError, AttributeError):
        return nn.Module


_DEFAULT: Any = _default_base()


@UDA.register_module()
class DACalDACS(Calibrated, _DEFAULT):  # type: ignore[misc]  # the host is untyped
    """The host's `DACS`, whose student learns calibrated soft labels: see `Calibrated`.

    With `dacal=dict(base=...)` the object is none of this class, but of one that is derived likewise from the named one.
    """

    def __new__(cls, **cfg: Any) -> Any:
        name = parse(cfg.get("dacal", {})).base
        base = _DEFAULT if name is None else base_class(name)
        if base is nn.Module:
            expected = "base: the host's class, since mmseg.models.uda.dacs has no DACS"
            remedy = "name it, for example base='mmseg.models.uda.dacs_infer.gta2csDACS'"
            raise problem("uda.dacal", expected=expected, got="none", remedy=remedy)
        return super().__new__(cls) if base is _DEFAULT else calibrated(base)(**cfg)


def base_class(name: str) -> Any:
    """The host's class of this name: 'module.Class', or one that is in the registry UDA.

    Raises:
        ValueError: there is none.
    """
    module, _, short = name.rpartition(".")
    try:
        base = getattr(importlib.import_module(module), short) if module else UDA.get(name)
    except (ImportError, AttributeError) as error:
        expected, got = "base: an importable 'module.Class'", f"{name!r} ({error})"
        raise problem("uda.dacal", expected=expected, got=got, remedy="use the path by which the host imports it") from error
    if not inspect.isclass(base) or not issubclass(base, nn.Module):
        remedy = "name it with its module: base='module.Class'"
        raise problem("uda.dacal", expected="base: a class in the registry UDA", got=f"{name!r}", remedy=remedy)
    return base


@functools.lru_cache(maxsize=None)
def calibrated(base: Any) -> Any:
    """What `DACalDACS` is of the hosts' `DACS`, of another class."""
    return type(f"DACal{base.__name__}", (Calibrated, base), {"__module__": __name__, "__doc__": Calibrated.__doc__})


def calibration_of(host: Any, options: HostOptions) -> Calibration:
    """What learns the temperatures of this host."""
    if getattr(host, "source_only", False):
        remedy = "remove uda.source_only, or train with uda.type='DACS'"
        raise problem("uda.dacal", expected="a host that trains on target images", got="source_only=True", remedy=remedy)
    return Calibration(
        options,
        student=host.get_model(),
        heads=TaughtHeads(teachable_losses(host.get_model())),
        num_classes=host.num_classes,
        threshold=setting_of(host, "pseudo_threshold"),
        ignore_top=setting_of(host, "psweight_ignore_top"),
        ignore_bottom=setting_of(host, "psweight_ignore_bottom"),
        logger=_LOGGER,
    )
