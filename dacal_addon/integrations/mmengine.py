"""Self-training inside MMSegmentation 1.x: `DACalEncoderDecoder`, a segmentor that also learns from unlabelled images.

Switched on from the config alone:

    custom_imports = dict(imports=['dacal_addon.integrations.mmengine'], allow_failed_imports=False)
    model = dict(type='DACalEncoderDecoder', dacal=dict(threshold=0.968))
    train_dataloader = dict(dataset=dict(_delete_=True, type='SourceAndTarget', source=..., target=...))
    custom_hooks = [dict(type='DACalHook')]

`dacal` takes what `segmentor_options.SegmentorOptions` lists. The only file that imports mmengine and mmsegmentation; written
against mmengine 0.10.7 and mmsegmentation 1.2.2. The model's own parts and checkpoint keys stay as they are, so that a plain
`EncoderDecoder` loads its checkpoints, and the other way round; tests and inferencers use the student alone. The teacher and
the temperatures are kept beside the model, and saved under "dacal.".
"""

import copy
import inspect
import logging
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple

import numpy as np
import torch
from mmcv.transforms import Compose
from mmengine.dataset import pseudo_collate
from mmengine.dist import get_dist_info, is_main_process
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.model import is_model_wrapper
from mmengine.structures import PixelData
from mmseg.models.segmentors import CascadeEncoderDecoder, EncoderDecoder
from mmseg.registry import DATASETS, HOOKS, METRICS, MODELS
from mmseg.structures import SegDataSample
from torch import Tensor, nn

from .._check import as_whole, check_choice, describe, problem
from ..calibrate import TemperatureEstimate, classifiers, estimate_temperature, fold_checkpoint
from ..calibrate.estimators import TYPICAL
from ..calibrate.report import as_numbers, as_text
from ..metrics import CalibrationStats
from ..metrics.catalogue import CATALOGUE
from .segmentor_options import SegmentorOptions, parse
from .segmentor_training import Batch, Logits, SegmentorTraining, ignored_by

_STATE = "dacal."
_PADDING = "padding_size"  # of SegDataPreProcessor: left, right, top, bottom


class SelfTrained(nn.Module):
    """Comes before a segmentor's class among the bases of a class: it then learns from `SourceAndTarget`'s batches.

    Args:
        dacal: see `SegmentorOptions`.
        cfg: what the segmentor's class takes.

    Losses beside the segmentor's own: the same on mixed images, under "mix."; in the log also `dacal.target_weight`, the mean
    weight of the pseudo-labels, and with a learner `dacal.temperature_mean`, `_min`, `_max` over the target pixels of the
    batch, `dacal.judged`, the loss on the judged set, and `dacal.skipped_<kind>` for each `SkipKind`.

    Raises:
        ValueError, TypeError: an unknown key or value in `dacal`, heads that cannot be taught, batches of one domain.
    """

    def __init__(self, *args: Any, dacal: Optional[Mapping[str, Any]] = None, **cfg: Any) -> None:
        options = parse({} if dacal is None else dacal)
        super().__init__(*args, **cfg)
        own: Any = self
        own.data_preprocessor = BothDomains(own.data_preprocessor)
        own._register_state_dict_hook(_add_state)
        self.dacal_options: SegmentorOptions = options
        # Neither is a child: the optimizer owns every parameter of its model, and tests need neither.
        self._dacal: Optional[SegmentorTraining] = None
        self._dacal_saved: Dict[str, Tensor] = {}

    def loss(self, inputs: Any, data_samples: Any) -> Any:
        """As the segmentor's own; of both domains, one iteration of self-training."""
        own: Any = super()
        if not isinstance(inputs, Mapping):
            if self._dacal is None:
                expected = "batches of both domains"
                remedy = "set train_dataloader.dataset=dict(type='SourceAndTarget', source=..., target=...)"
                raise problem(type(self).__name__, expected=expected, got=describe(inputs), remedy=remedy)
            return own.loss(inputs, data_samples)  # the meta-step's own passes
        samples = data_samples["source"]
        batch = Batch(
            inputs["source"],
            torch.cat([sample.gt_sem_seg.data for sample in samples]),
            samples,
            inputs["target"],
            inputs.get("teacher"),
            inputs["valid"],
        )
        return self.self_training().losses(own.loss, batch)

    def self_training(self) -> SegmentorTraining:
        """Teacher, labels and temperatures; made when they are first asked for, from the weights of then, or a checkpoint."""
        if self._dacal is None:
            saved, self._dacal_saved = self._dacal_saved, {}
            try:
                teacher = MODELS.build(dict(self.dacal_options.teacher), default_args={"model": self})
                training = SegmentorTraining(self, teacher, self.dacal_options, samples_of=samples_of, say=_say)
                if saved:
                    training.load_state_dict(saved)
            except BaseException:
                self._dacal_saved = saved
                raise
            self._dacal = training
        return self._dacal

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        start = prefix + _STATE
        saved = {name[len(start) :]: value for name, value in state_dict.items() if name.startswith(start)}
        if saved and self._dacal is not None:
            self._dacal.load_state_dict(saved)
        elif saved:  # for `self_training`
            self._dacal_saved = {name: value.clone() for name, value in saved.items()}
        for name in saved:  # in place: what is left over is told as unexpected
            del state_dict[start + name]
        super()._load_from_state_dict(state_dict, prefix, *rest)


def _add_state(module: SelfTrained, state: Dict[str, Tensor], prefix: str, metadata: Any) -> None:
    saved = module._dacal_saved if module._dacal is None else module._dacal.state_dict()
    state.update({f"{prefix}{_STATE}{name}": value for name, value in saved.items()})


def self_trained(base: Any) -> Any:
    """What `DACalEncoderDecoder` is of `EncoderDecoder`, of another class of segmentors; register it in mmseg's MODELS."""
    return type(f"DACal{base.__name__}", (SelfTrained, base), {"__module__": __name__, "__doc__": SelfTrained.__doc__})


DACalEncoderDecoder = self_trained(EncoderDecoder)
DACalCascadeEncoderDecoder = self_trained(CascadeEncoderDecoder)
for _kind in (DACalEncoderDecoder, DACalCascadeEncoderDecoder):
    MODELS.register_module(module=_kind)


def samples_of(label: Tensor) -> List[Any]:
    """Hard labels (N, H, W) as data samples."""
    size = label.shape[1:]
    meta = {"ori_shape": size, "img_shape": size, "pad_shape": size, _PADDING: [0, 0, 0, 0]}
    return [SegDataSample(metainfo=dict(meta), gt_sem_seg=PixelData(data=each.unsqueeze(0))) for each in label]


def _say(level: int, message: str) -> None:
    print_log(message, logger="current", level=level)


class BothDomains(nn.Module):
    """A segmentor's data preprocessor, for batches of both domains; all others it hands on."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    @property
    def device(self) -> torch.device:
        device: torch.device = self.inner.device  # type: ignore[assignment]  # mmengine's own property
        return device

    def forward(self, data: Any, training: bool = False) -> Any:
        if not isinstance(data, Mapping) or "source" not in data:
            return self.inner(data, training)
        if getattr(self.inner, "batch_augments", None) is not None:
            expected = "a data_preprocessor without batch_augments, which would mix target images unseen by the teacher"
            raise problem("model.dacal", expected=expected, got="some", remedy="remove them from the config")
        source = self.inner(data["source"], training)
        target = self.inner(data["target"], training)
        inputs = {"source": source["inputs"], "target": target["inputs"]}
        if "teacher" in data:
            # Padding is written into the samples: each view needs its own.
            view = {"inputs": data["teacher"]["inputs"], "data_samples": [SegDataSample() for _ in data["teacher"]["inputs"]]}
            inputs["teacher"] = self.inner(view, training)["inputs"]
        inputs["valid"] = _valid(inputs["target"], target["data_samples"])
        return {"inputs": inputs, "data_samples": {"source": source["data_samples"]}}


def _valid(image: Tensor, samples: Sequence[Any]) -> Optional[Tensor]:
    """(N, H, W) bool, False where an image was padded; None where none was."""
    sizes = [sample.metainfo.get(_PADDING, (0, 0, 0, 0)) for sample in samples]
    if not any(map(any, sizes)):
        return None
    height, width = image.shape[-2:]
    valid = torch.zeros(len(samples), height, width, dtype=torch.bool, device=image.device)
    for mask, (left, right, top, bottom) in zip(valid, sizes):
        mask[top : height - bottom, left : width - right] = True
    return valid


@DATASETS.register_module()
class SourceAndTarget:
    """Pairs of one labelled source image and one target image, whose labels are not looked at.

    One pair a source image; its target image is drawn at random: in a worker from the seed that torch gives it, another one in
    each epoch, else from numpy's state.

    Args:
        source, target: configs of datasets, or datasets. Both end in crops of one size. The target's pipeline needs no
            `LoadAnnotations`, and its `RandomCrop` no `cat_max_ratio`.
        strong: transforms of colour and blur, such as PhotoMetricDistortion, of the target images that the student sees; the
            teacher sees them without. They must leave every pixel in its place.

    Raises:
        ValueError: no images; a transform of `strong` that changes an image's size.
    """

    def __init__(self, source: Any, target: Any, strong: Sequence[Any] = ()) -> None:
        self.source, self.target = (DATASETS.build(each) if isinstance(each, dict) else each for each in (source, target))
        for name, dataset in (("source", self.source), ("target", self.target)):
            if not len(dataset):
                remedy = "check its data_root and data_prefix"
                raise problem("SourceAndTarget", expected=f"{name}: a dataset with images", got="none", remedy=remedy)
        self.strong = Compose(list(strong)) if strong else None
        self._draw: Any = None  # each process that loads images makes its own

    @property
    def metainfo(self) -> Any:
        """The source's."""
        return self.source.metainfo

    def full_init(self) -> None:
        for dataset in (self.source, self.target):
            dataset.full_init()

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Dict[str, Any]:
        if self._draw is None:
            worker = torch.utils.data.get_worker_info()
            # mmengine seeds numpy alike in each epoch's workers; torch's own seed of a worker is another in each.
            self._draw = np.random if worker is None else np.random.RandomState(worker.seed % 2**32)
        target = self.target[self._draw.randint(len(self.target))]
        item = {"source": self.source[index], "target": target}
        if self.strong is not None:
            item["teacher"] = {"inputs": target["inputs"]}
            item["target"] = {**target, "inputs": self._stronger(target["inputs"])}
        return item

    def _stronger(self, image: Tensor) -> Tensor:
        """(K, H, W) as packed."""
        assert self.strong is not None  # for mypy: `__getitem__` has checked
        pixels = image.numpy().transpose(1, 2, 0).copy()  # which the transforms may change in place
        changed = self.strong({"img": pixels, "img_shape": pixels.shape[:2], "seg_fields": []})["img"]
        if changed.shape != pixels.shape:
            expected = "strong: transforms that leave every pixel in its place"
            got = f"an image {pixels.shape} that became {changed.shape}"
            raise problem("SourceAndTarget", expected=expected, got=got, remedy="put them into the target's pipeline")
        return torch.from_numpy(np.ascontiguousarray(changed.transpose(2, 0, 1)))


def _segmentor(model: Any, needs: str) -> SelfTrained:
    inner = model.module if is_model_wrapper(model) else model
    if not isinstance(inner, SelfTrained):
        remedy = "set model.type='DACalEncoderDecoder'"
        raise problem(needs, expected="a self-trained segmentor", got=type(inner).__name__, remedy=remedy, error=TypeError)
    return inner


@HOOKS.register_module()
class DACalHook(Hook):  # type: ignore[misc]  # mmengine has no types
    """Shows the runner's optimizer to `learner='bilevel'`, refuses what would go wrong later, and calibrates at the end.

    Args:
        calibrate: None, or the options of `calibrate_segmentor`: `source`, a dataset of labelled source images that training
            does not see; `target`, one of target images; `labelled_target`, `max_images`. After training one temperature is
            folded into a copy of the student.
        filename: of that checkpoint, in the work folder. It holds the student alone.

    Raises:
        TypeError, ValueError: before training: another model; a wrapper, an accumulation or a clipping of gradients that was
            not seen to work.
    """

    priority = "NORMAL"

    def __init__(self, calibrate: Optional[Mapping[str, Any]] = None, filename: str = "calibrated.pth") -> None:
        if calibrate is not None:
            missing = [name for name in ("source", "target") if name not in calibrate]
            if missing:
                expected = "calibrate=dict(source=..., target=...), two datasets"
                remedy = "name them, the source's of images that training does not see"
                raise problem("DACalHook", expected=expected, got=f"no {missing[0]}", remedy=remedy)
            known = {*_names_of(calibrate_segmentor), *_names_of(estimate_temperature)} - {"segmentor", "student", "options"}
            for name in calibrate:
                check_choice("DACalHook", "a key of calibrate", name, tuple(sorted(known)))
        self.calibrate = None if calibrate is None else dict(calibrate)
        self.filename = filename

    def before_train(self, runner: Any) -> None:
        segmentor = _segmentor(runner.model, "DACalHook")
        wrapper = type(runner.model).__name__
        if runner.model is not segmentor and not isinstance(runner.model, nn.parallel.DistributedDataParallel):
            remedy = "use model_wrapper_cfg=dict(type='MMDistributedDataParallel')"
            raise problem("DACalHook", expected="a model that is whole on every rank", got=wrapper, remedy=remedy)
        training = segmentor.self_training()
        if self.calibrate is not None:
            if int(getattr(segmentor, "out_channels", 0)) == 1:
                remedy = "use num_classes=2, out_channels=2, or leave calibrate out"
                raise problem("DACalHook", expected="two channels, to be calibrated", got="one", remedy=remedy)
            for name in ("source", "labelled_target"):
                if self.calibrate.get(name) is not None:  # now, and not after the training
                    draw = torch.Generator().manual_seed(0)
                    next(_labelled(segmentor.data_preprocessor, self.calibrate[name], limit=1, generator=draw), None)
        if segmentor.dacal_options.learner != "bilevel":
            return
        wrapped = runner.optim_wrapper
        if getattr(wrapped, "_accumulative_counts", 1) != 1:
            expected = "a step of the optimizer at every iteration, for learner='bilevel'"
            got, remedy = f"accumulative_counts={wrapped._accumulative_counts}", "set it to 1, or take another learner"
            raise problem("DACalHook", expected=expected, got=got, remedy=remedy)
        training.use_optimizer(wrapped.optimizer, clip_norm=_clip_norm(wrapped))

    def after_train(self, runner: Any) -> None:
        if self.calibrate is None or not is_main_process():
            return
        segmentor = _segmentor(runner.model, "DACalHook")
        found = calibrate_segmentor(segmentor, **self.calibrate)
        _say(logging.INFO, f"dacal: {as_text(found)}")
        state = {name: value.cpu() for name, value in segmentor.state_dict().items() if not name.startswith(_STATE)}
        meta = {"dataset_meta": getattr(runner.train_dataloader.dataset, "metainfo", None), "iter": runner.iter}
        saved = fold_checkpoint({"meta": meta, "state_dict": state}, found.temperature, layers=list(classifiers(segmentor)))
        saved["meta"]["dacal"].update(as_numbers(found))
        path = Path(runner.work_dir) / self.filename
        torch.save(saved, str(path))
        _say(logging.INFO, f"dacal: {path}: T = {found.temperature:.4g}")


def _names_of(function: Any) -> List[str]:
    """Of its parameters."""
    return list(inspect.signature(function).parameters)


def _clip_norm(wrapped: Any) -> Optional[float]:
    """The norm to which an OptimWrapper clips gradients.

    Raises:
        ValueError: it clips otherwise.
    """
    clip = wrapped.clip_grad_kwargs
    if not clip:
        return None
    plain = wrapped.clip_func is nn.utils.clip_grad_norm_ and float(clip.get("norm_type", 2)) == 2.0
    if not plain or "max_norm" not in clip:
        expected = "clip_grad=dict(max_norm=...), of the Euclidean norm, for learner='bilevel'"
        raise problem("DACalHook", expected=expected, got=repr(clip), remedy="clip by that norm, or take another learner")
    return float(clip["max_norm"])


def calibrate_segmentor(
    segmentor: nn.Module,
    *,
    source: Any,
    target: Any,
    labelled_target: Any = None,
    max_images: int = 64,
    seed: int = 0,
    **options: Any,
) -> TemperatureEstimate:
    """Find one temperature for a segmentor on the target; `fold_checkpoint` writes it into its checkpoint.

    Args:
        segmentor: any of mmseg 1.x; asked whole, not in windows.
        source, labelled_target: configs of datasets, or datasets, with labels of the images' size (`LoadAnnotations` before
            `Resize`), without augmentation. The source's images are such as training did not see.
        target: the same; labels are not looked at.
        max_images: of source and target each, drawn at random.
        seed: draws them.
        options: of `estimate_temperature`. `typical` is that of hard labels, 1 for a segmentor with a learner.

    Raises:
        ValueError: no images; labels of another size.
    """
    max_images = as_whole("calibrate_segmentor", "max_images", max_images, low=1)
    learner = segmentor.dacal_options.learner if isinstance(segmentor, SelfTrained) else None
    own: Any = segmentor
    draw = torch.Generator().manual_seed(seed)
    kept: Dict[str, Any] = {"typical": TYPICAL if learner is None else 1.0, "batch_size": 1, "max_images": max_images}
    kept["ignore_index"] = ignored_by(segmentor)  # and not 255, whatever they were trained with
    few = labelled_target
    return estimate_temperature(
        Logits(segmentor),
        source=_labelled(own.data_preprocessor, source, limit=max_images, generator=draw),
        target=(image for image, _ in _batches(own.data_preprocessor, target, limit=max_images, generator=draw)),
        labelled_target=None if few is None else _labelled(own.data_preprocessor, few, limit=None, generator=draw),
        generator=torch.Generator().manual_seed(seed),
        device=next(segmentor.parameters()).device,
        **{**kept, **options},
    )


def _batches(
    preprocess: Any, dataset: Any, *, limit: Optional[int], generator: torch.Generator
) -> Iterator[Tuple[Tensor, Any]]:
    """Images (1, K, H, W) of a dataset, as a test preprocesses them, and their data samples; at random."""
    built = DATASETS.build(dataset) if isinstance(dataset, dict) else dataset
    for index in torch.randperm(len(built), generator=generator).tolist()[:limit]:
        data = preprocess(pseudo_collate([built[index]]), False)
        yield data["inputs"], data["data_samples"][0]


def _labelled(preprocess: Any, dataset: Any, **options: Any) -> Iterator[Tuple[Tensor, Tensor]]:
    """The same with labels (1, H, W)."""
    for image, sample in _batches(preprocess, dataset, **options):
        label: Tensor = sample.gt_sem_seg.data
        if label.shape[-2:] != image.shape[-2:]:
            got = f"{describe(image)} and {describe(label)}"
            remedy = "put LoadAnnotations before Resize in the pipeline"
            raise problem("calibrate_segmentor", expected="labels of the images' size", got=got, remedy=remedy)
        yield image, label.long()


@METRICS.register_module()
class CalibrationMetric(BaseMetric):  # type: ignore[misc]  # mmengine has no types
    """Calibration beside mIoU: `val_evaluator = [dict(type='IoUMetric'), dict(type='CalibrationMetric')]`.

    Counts as `CalibrationStats` does, in constant memory, over all ranks; images that a sampler repeats to fill up the ranks
    count once. Figures are fractions, under "calibration/"; `save_best='calibration/ece'` wants `rule='less'`.

    Args:
        metric: names of the catalogue, of metrics that are one number.
        input: what `seg_logits` are: "logits"; "probs" with test-time augmentation, which averages probabilities. Of one
            channel they are probabilities always.
        ignore_index, options: of `CalibrationStats`.
        prefix: before the names.

    Raises:
        ValueError, TypeError: as `CalibrationStats`.
    """

    default_prefix = "calibration"

    def __init__(
        self,
        metric: Sequence[str] = ("ece", "mean_confidence", "nll", "brier"),
        *,
        input: str = "logits",
        ignore_index: int = 255,
        prefix: Optional[str] = None,
        **options: Any,
    ) -> None:
        super().__init__(prefix=prefix)
        self.metric = [metric] if isinstance(metric, str) else list(metric)
        for each in self.metric:  # now, and not after a whole validation
            check_choice(
                "CalibrationMetric", "metric", each, tuple(name for name, known in CATALOGUE.items() if not known.classwise)
            )
        self.options = {"input": input, "ignore_index": ignore_index, **options}
        self._stats: Optional[CalibrationStats] = None
        self._last: Optional[CalibrationStats] = None
        """Of this rank's last image, which may be one that a sampler repeats."""
        self._images = 0

    def process(self, data_batch: Any, data_samples: Sequence[Mapping[str, Any]]) -> None:
        for sample in data_samples:
            scores, label = sample["seg_logits"]["data"].detach(), sample["gt_sem_seg"]["data"]
            if self._stats is None or self._last is None:
                self._stats, self._last = (self._made(len(scores)) for _ in range(2))
            self._stats.merge(self._last)
            self._last.reset()
            self._last.update(scores.unsqueeze(0).cpu(), label.reshape(1, *scores.shape[1:]).long().cpu())
            self._images += 1

    def evaluate(self, size: int) -> Dict[str, float]:
        """The figures of all ranks, on every rank.

        Raises:
            RuntimeError: no image was processed on this rank.
        """
        if self._stats is None or self._last is None:
            remedy = "use at most as many ranks as images"
            raise problem("CalibrationMetric", expected="images on every rank", got="none", remedy=remedy, error=RuntimeError)
        rank, ranks = get_dist_info()
        stats, last, images = self._stats, self._last, self._images
        self._stats, self._last, self._images = None, None, 0
        if (images - 1) * ranks + rank < size:
            stats.merge(last)
        stats.sync()
        found = self.compute_metrics([stats])
        return {f"{self.prefix}/{name}": value for name, value in found.items()}

    def compute_metrics(self, results: Sequence[CalibrationStats]) -> Dict[str, float]:
        """The figures of one `CalibrationStats`."""
        return {name: float(getattr(results[0], name)()) for name in self.metric}

    def _made(self, channels: int) -> CalibrationStats:
        if channels == 1:  # mmseg has taken the sigmoid
            return CalibrationStats(2, **{**self.options, "input": "probs", "one_channel": True})
        return CalibrationStats(channels, **copy.deepcopy(self.options))
