"""One iteration of a `DACS`, as DAFormer, HRDA, MIC and their forks have it: what is heard, learned and taught in it."""

import sys
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional

import torch
from torch import Tensor

from .._check import describe, problem
from .._many import as_numbers
from ..mixing import mix
from ..preserve import preserved
from ..pseudo_labels import SoftPseudoLabels
from .calibration import IGNORE, Calibration
from .listening import Call, FirstCall, shadowed, unshadowed, wants_pictures, without_pictures
from .meta_step import IMAGE, LABEL
from .teachers import network_of, teacher_of


def teachers_of(host: Any) -> List[Any]:
    """The networks that make pseudo-labels: the main teacher, and MIC's own one for masked images where it has one."""
    masks = getattr(getattr(host, "mic", None), "teacher", None)
    return [network_of(teacher) for teacher in (teacher_of(host), masks) if teacher is not None]


def mask_modules(host: Any) -> List[Any]:
    """The modules in which the host's classes find `get_class_masks`.

    Raises:
        TypeError: there are none.
    """
    modules = dict.fromkeys(sys.modules.get(cls.__module__) for cls in type(host).__mro__)
    found = [module for module in modules if "get_class_masks" in vars(module or object)]
    if not found:
        raise problem(
            "uda.dacal",
            expected="a host that draws its masks with get_class_masks, a name in its module",
            got=f"{type(host).__name__} without",
            remedy="import it there by that name, or set labels='hard', every=0",
            error=TypeError,
        )
    return found


def logits_of(calibration: Calibration, call: Call, answer: Any) -> Tensor:
    """The teacher's logits in its answer to a call, at the resolution of the image that it was asked about."""
    height, width = call.argument(IMAGE).shape[-2:]
    return calibration.logits(answer, (height, width))


class HostBatch(NamedTuple):
    """What the host's data loader gives."""

    image: Tensor
    """(N, K, H, W), of the source."""
    label: Tensor
    """(N, H, W) int64, of the source."""
    target: Tensor
    """(N, K, H, W)."""
    valid: Optional[Tensor]
    """(N, H, W) bool, False where the target's pseudo-labels must not be used."""


class DacsIteration:
    """One call of the host's `forward_train`: listens to it, and at the student's passes learns and teaches."""

    def __init__(self, host: Any, calibration: Calibration, batch: HostBatch) -> None:
        calibration.check_batch(batch.target)
        calibration.to(batch.image.device)
        self.host, self.calibration, self.batch = host, calibration, batch
        # No method of this object, which would then refer to itself, and hold its tensors until the garbage collector comes.
        logits = partial(logits_of, calibration)
        self.teacher, self.own_teacher = FirstCall(logits), FirstCall(logits)
        self.masks = FirstCall()
        self.labels: Optional[SoftPseudoLabels] = None
        self.log_vars: Dict[str, float] = {}

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, the host's `forward_train` may run."""
        with ExitStack() as stack:
            for network, heard in zip(teachers_of(self.host), (self.teacher, self.own_teacher)):
                stack.enter_context(shadowed(network, "encode_decode", heard))
            for module in mask_modules(self.host):
                stack.enter_context(shadowed(module, "get_class_masks", self.masks))
            stack.enter_context(shadowed(self.host.get_model(), "forward_train", self._student))
            stack.enter_context(self.calibration.heads.listening())
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

        def called(*args: Any, **kwargs: Any) -> Any:
            call = Call.of(forward_train, *args, **kwargs)
            if self.teacher.call is None or self.masks.call is None:
                return call()
            hard_label = call.argument(LABEL).contiguous()  # whose windows `criterion` can tell
            call = call.changed(**{LABEL: hard_label})
            if self.labels is None:
                return self._mixed(call)
            return self._taught(call, self._masked(hard_label))

        return called

    def _taught(self, call: Call, soft_label: Optional[Tensor]) -> Any:
        """The student's own answer to a call, taught a soft label where there is one and labels are to be soft."""
        if soft_label is None or self.calibration.options.labels == "hard":
            return call()
        with self.calibration.heads.soft(call.argument(LABEL), soft_label):
            return call()

    def _mixed(self, call: Call) -> Any:
        """The pass on mixed images; before it, or in it, the temperatures learn."""
        mask = self._mask()
        losses = self._learn(call, mask)
        with torch.no_grad():
            # Without `valid`: which pixels count in the student's passes, the host's own weights say.
            self.labels = self.calibration.labeler(self.teacher.kept, ignore_index=IGNORE)
            t = self.labels.temperature
            for name, value in zip(("mean", "min", "max"), as_numbers([t.mean(), t.min(), t.max()])):
                self.log_vars[f"dacal.temperature_{name}"] = value
            if losses is not None:
                return losses
            soft_label = mix(mask, self.batch.label, self.labels.soft_label, ignore_index=IGNORE)
        return self._taught(call, soft_label)

    def _learn(self, call: Call, mask: Tensor) -> Optional[Dict[str, Any]]:
        """What the student has returned to the call, if a meta-step has made its pass."""
        assert self.teacher.call is not None  # `_student` has waited for it
        student, options = self.host.get_model(), self.calibration.options
        # Where the host wants pictures of the pass, it makes it.
        share = options.share_pass and options.labels == "soft" and not wants_pictures(student)
        with unshadowed(student, "forward_train"), without_pictures(student):
            told = self.calibration.learn(
                self.batch.image,
                self.batch.label,
                self.batch.target,
                self.teacher.kept,
                teacher=self._ask_teacher,
                teacher_image=self.teacher.call.argument(IMAGE),
                mask=mask,
                valid=self.batch.valid,
                mixed=call,
                share=share,
            )
        self.log_vars.update(told.variables)
        return told.losses

    def _mask(self) -> Tensor:
        """(N, 1, H, W) bool, True = source pixel."""
        masks = self.masks.kept
        n, height, width = self.batch.label.shape
        if not isinstance(masks, (list, tuple)) or [tuple(mask.shape) for mask in masks] != n * [(1, 1, height, width)]:
            got = describe(masks) + (f" of {describe(masks[0])}" if isinstance(masks, (list, tuple)) and masks else "")
            expected = f"get_class_masks to return a list of {n} masks (1, 1, {height}, {width})"
            raise problem("uda.dacal", expected=expected, got=got, remedy="mend it, or set labels='hard', every=0")
        return torch.cat(list(masks)) > 0

    def _ask_teacher(self, image: Tensor) -> Tensor:
        """What the teacher says of further images: a pass that the host does not make, and that leaves nothing behind."""
        assert self.teacher.call is not None  # it has been asked about the target images
        call, network = self.teacher.call.changed(**{IMAGE: image}), network_of(teacher_of(self.host))
        with without_pictures(network), preserved(network):
            return logits_of(self.calibration, call, call())

    def _masked(self, hard_label: Tensor) -> Optional[Tensor]:
        """MIC's masked images: the soft label of the target ones among them, None if there are none."""
        mode = getattr(self.host, "mask_mode", None) or "separatesrc"  # a further pass of a fork: its own labels
        if mode.startswith("separatesrc"):
            return None
        with torch.no_grad():
            if self.own_teacher.call is not None:  # MIC's own, with another EMA decay or threshold
                soft_label = self.calibration.labeler(self.own_teacher.kept, ignore_index=IGNORE).soft_label
            else:
                assert self.labels is not None  # the mixed pass came first
                soft_label = self.labels.soft_label
            if mode.startswith("separatetrg"):
                return soft_label
            # One source image, then one target image.
            source = torch.zeros_like(hard_label, dtype=torch.bool)
            source[0] = True
            return mix(source, hard_label[:, 0], torch.stack([soft_label[0], soft_label[0]]), ignore_index=IGNORE)

    def plot(self, img_metas: Any, work_dir: Path, iteration: int) -> None:
        """Temperature maps beside the host's debug images, `<iteration>_temperature.png`."""
        from ..plots import save, temperature_map  # needs matplotlib, which the hosts have

        assert self.labels is not None  # `listening` has checked
        folders = [work_dir / name for name in ("class_mix_debug", "debug")]  # DAFormer's and HRDA's; MIC's
        folder = next((folder for folder in folders if folder.is_dir()), folders[1])
        folder.mkdir(parents=True, exist_ok=True)
        scale = img_metas[0]["img_norm_cfg"]
        mean, std = (torch.as_tensor(scale[name], dtype=torch.float32).view(1, 3, 1, 1) for name in ("mean", "std"))
        picture = ((self.batch.target.detach().cpu() * std + mean) / 255.0).clamp(0.0, 1.0)
        save(temperature_map(picture, self.labels.temperature), folder / f"{iteration:06d}_temperature.png")
