"""Calibrate a checkpoint that is trained: find one temperature for the target, and fold it into the last layer.

    cd DAFormer                                                        # the host's checkout, with its environment
    python /path/to/examples/mmseg/calibrate.py work_dirs/RUN/RUN.json work_dirs/RUN/latest.pth --out calibrated.pth
    python -m tools.test work_dirs/RUN/RUN.json calibrated.pth --eval mIoU

The new checkpoint has the keys, shapes and kinds of the old one, and the host's `tools/test.py` runs it as any other: the
argmax stays, softmax(z) has become softmax(z / T). Folded is the student alone, the EMA teacher is left as it was; what was
done is in the checkpoint's meta, under "dacal". To go on training, take the old checkpoint.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any, Dict, Iterable, Iterator, List, NamedTuple, Optional, Tuple

import torch
from loading import build_student, prepare, read_checkpoint, read_config  # beside this file
from torch import Tensor, nn

from dacal_addon._check import problem
from dacal_addon.calibrate import TemperatureEstimate, classifiers, estimate_temperature, fold_checkpoint, fold_temperature
from dacal_addon.calibrate.estimators import TYPICAL
from dacal_addon.calibrate.report import as_numbers, as_text

KEPT = ("LoadImageFromFile", "LoadAnnotations", "Resize", "Normalize")
"""The steps of a pipeline that are no augmentation."""
TRAINED_ON = (
    "the network has been trained on these source images, and is likely to look better on them than it is: "
    "name held-out ones with --source-split or --source-dir"
)


class Inference(nn.Module):
    """The student as it is tested, whole or in windows, without the softmax: (N, 3, H, W) to logits (N, C, H, W)."""

    def __init__(self, student: Any) -> None:
        super().__init__()
        self.module = student  # by this name `classifiers` looks into it

    @property
    def in_windows(self) -> bool:
        return bool(self.module.test_cfg.mode == "slide")

    def forward(self, image: Tensor) -> Tensor:
        infer: Any = self.module.slide_inference if self.in_windows else self.module.whole_inference
        return torch.cat([infer(one, [{}], False) for one in image.split(1)])  # one at a time, as the hosts test


class Images:
    """Some images of a host's dataset, at random, scaled and normalised but not augmented."""

    def __init__(
        self,
        dataset: Dict[str, Any],
        pipeline: List[Dict[str, Any]],
        *,
        labels: bool,
        limit: int,
        seed: int,
        split: Optional[str] = None,
    ) -> None:
        from mmseg.datasets import build_dataset

        self.labels = labels
        given = {key: value for key, value in dataset.items() if key != "crop_pseudo_margins"}  # it adds to the pipeline
        self.dataset: Any = build_dataset({**given, "pipeline": plain(pipeline, labels=labels), "test_mode": False})
        # The hosts list files in the order of the disk.
        by_name = dict(sorted((str(info["filename"]), i) for i, info in enumerate(self.dataset.img_infos)))
        if split is not None:
            by_name = {name: by_name[name] for name in _named(split, by_name, self.dataset.img_suffix)}
        if not by_name:
            remedy = "check data_root, and what --source-split or --source-dir names"
            raise problem("calibrate", expected="images to read", got=f"none in {self.dataset.img_dir}", remedy=remedy)
        order = torch.randperm(len(by_name), generator=torch.Generator().manual_seed(seed)).tolist()
        index = list(by_name.values())
        self.chosen = [index[i] for i in sorted(order[:limit])]

    def __len__(self) -> int:
        return len(self.chosen)

    def __iter__(self) -> Iterator[Tuple[Tensor, ...]]:
        for i in self.chosen:
            item: Any = self.dataset[i]
            image = item["img"].data.unsqueeze(0)
            yield (image, item["gt_semantic_seg"].data.long()) if self.labels else (image,)

    def names(self) -> List[str]:
        return [str(self.dataset.img_infos[i]["filename"]) for i in self.chosen]


def _named(split: str, names: Iterable[str], ending: str) -> List[str]:
    """The files that a split names, one a line without its ending. The hosts' GTA and SYNTHIA take no split of their own."""
    files, held = [line.strip() + ending for line in Path(split).read_text().splitlines() if line.strip()], set(names)
    for file in files:
        if file not in held:
            remedy = "write one name a line, below the source's img_dir and without the ending"
            raise problem("calibrate", expected=f"{split} to name source images", got=repr(file), remedy=remedy)
    return files


def plain(pipeline: List[Dict[str, Any]], *, labels: bool) -> List[Dict[str, Any]]:
    """A pipeline, of training or of a test, without what is random in it.

    Raises:
        ValueError: no size or no normalisation in it.
    """
    steps: List[Dict[str, Any]] = []
    for step in pipeline:
        if step["type"] == "MultiScaleFlipAug":
            inner = [
                {**each, "img_scale": step["img_scale"]} if each["type"] == "Resize" else each for each in step["transforms"]
            ]
            steps += inner
        else:
            steps.append(step)
    kept = {step["type"]: dict(step) for step in steps if step["type"] in KEPT}
    missing = [name for name in KEPT if name not in kept and name != "LoadAnnotations"]
    if missing:
        remedy = "add it to the config, as the host's own configs have it"
        raise problem(
            "calibrate", expected=f"pipelines with {', '.join(missing)}", got=", ".join(kept) or "none", remedy=remedy
        )
    resize = kept["Resize"]
    scale = resize["img_scale"]
    # One size, the first of several; the JSON configs of the work folders have lists for tuples.
    scale = tuple(scale[0] if isinstance(scale[0], (list, tuple)) else scale)
    kept["Resize"] = {"type": "Resize", "img_scale": scale, "keep_ratio": resize.get("keep_ratio", True)}
    kept.setdefault("LoadAnnotations", {"type": "LoadAnnotations"})
    keys = ["img", "gt_semantic_seg"] if labels else ["img"]
    return [
        *(kept[name] for name in KEPT if labels or name != "LoadAnnotations"),
        {"type": "DefaultFormatBundle"},
        {"type": "Collect", "keys": keys, "meta_keys": ["ori_filename"]},
    ]


class Sets(NamedTuple):
    """What the temperature is found on."""

    source: Images
    target: Images
    labelled: Optional[Images]


def sets_of(config: Any, options: argparse.Namespace) -> Sets:
    """Source images as they are scaled in training, target images as they are scaled in a test.

    Raises:
        ValueError: no source or no target in the config, or no images.
    """
    pair = config.data.train
    if "source" not in pair or "target" not in pair:
        remedy = "pass a config of domain adaptation, or fold a temperature that you know: --temperature T"
        raise problem(
            "calibrate", expected="a config with data.train.source and data.train.target", got=pair.type, remedy=remedy
        )
    source = dict(pair.source)
    if options.source_dir:
        source["img_dir"], source["ann_dir"] = map(os.path.abspath, options.source_dir)
        source.pop("split", None)
    test = config.data.test.pipeline
    some = {"limit": options.images, "seed": options.seed}
    few = None
    if options.labelled:
        few = Images(dict(config.data.val), test, labels=True, limit=options.labelled, seed=options.seed)
        if len(few) < options.labelled:
            got = f"{len(few)} in {few.dataset.img_dir}"
            raise problem(
                "calibrate", expected=f"{options.labelled} labelled images", got=got, remedy="pass a smaller --labelled"
            )
    return Sets(
        Images(source, source["pipeline"], labels=True, split=options.source_split, **some),
        Images(dict(pair.target), test, labels=False, **some),
        few,
    )


def typical_for(config: Any) -> float:
    """What students of this config need: the typical temperature is that of hard labels.

    >>> typical_for({"uda": {"type": "DACS"}}) == TYPICAL, typical_for({"uda": {"type": "DACalDACS", "dacal": {}}})
    (True, 1.0)
    """
    uda = config.get("uda") or {}
    taught_soft = uda.get("type") == "DACalDACS" and (uda.get("dacal") or {}).get("labels", "soft") == "soft"
    return 1.0 if taught_soft else TYPICAL


def estimate(
    network: Inference, sets: Sets, *, device: torch.device, seed: int, typical: float = TYPICAL
) -> TemperatureEstimate:
    """The library's estimate, one image at a time."""
    # The last layer is given one window after another, so that the logits of the whole image have to do for features.
    features_of = (lambda logits: logits - logits.mean(1, keepdim=True)) if network.in_windows else None
    return estimate_temperature(
        network,
        source=sets.source,
        target=sets.target,
        labelled_target=sets.labelled,
        features_of=features_of,
        typical=typical,
        generator=torch.Generator().manual_seed(seed),
        max_images=max(len(sets.source), len(sets.target)),
        batch_size=1,
        ignore_index=sets.source.dataset.ignore_index,
        device=device,
    )


def record(found: TemperatureEstimate, sets: Sets, *, held_out: bool) -> Dict[str, Any]:
    """For the checkpoint's meta: plain numbers and text."""
    return {
        **as_numbers(found),
        "source_images": len(sets.source),
        "source_held_out": held_out,
        "target_images": len(sets.target),
        "labelled_target": sets.labelled.names() if sets.labelled is not None else [],
    }


def fold(network: Inference, checkpoint: Dict[str, Any], t: float, *, prefix: str) -> Dict[str, Any]:
    """The checkpoint with T in it, once it has been seen that the logits of the network become z / T."""
    size = tuple(network.module.test_cfg.crop_size) if network.in_windows else (512, 1024)
    noise = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
    device = next(network.parameters()).device
    layers = [name[len("module.") :] for name in fold_temperature(network, t, check_on=noise.to(device))]
    return fold_checkpoint(checkpoint, t, layers=layers, prefix=prefix)


def options_of(arguments: List[str]) -> argparse.Namespace:
    """The command's options.

    Raises:
        ValueError: such as cannot be.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("config")
    parser.add_argument("checkpoint")
    parser.add_argument("--out", type=Path, required=True, help="the new checkpoint")
    parser.add_argument("--labelled", type=int, default=0, metavar="K", help="use the labels of K images of data.val")
    parser.add_argument("--images", type=int, default=64, help="of source and target each")
    parser.add_argument("--temperature", type=float, metavar="T", help="fold this one; nothing is estimated")
    held_out = parser.add_mutually_exclusive_group()
    held_out.add_argument("--source-split", metavar="FILE", help="held-out source images, one name a line without its ending")
    held_out.add_argument("--source-dir", nargs=2, metavar=("IMAGES", "LABELS"), help="folders of held-out source images")
    parser.add_argument("--seed", type=int, default=0, help="draws the images")
    options = parser.parse_args(arguments)
    for name, least in (("labelled", 0), ("images", 2)):
        if getattr(options, name) < least:
            got = getattr(options, name)
            raise problem("calibrate", expected=f"--{name} >= {least}", got=got, remedy="leave it out")
    if not os.path.isfile(options.checkpoint):
        got = f"{options.checkpoint}, " + ("a folder" if os.path.isdir(options.checkpoint) else "which does not exist")
        raise problem("calibrate", expected="checkpoint to be a file", got=got, remedy="check the path")
    if options.out.exists() and options.out.samefile(options.checkpoint):
        remedy = "name a new file, and keep the original to train on or to calibrate again"
        raise problem("calibrate", expected="--out to be another file than the checkpoint", got=options.out, remedy=remedy)
    return options


def main(arguments: List[str]) -> None:
    options = options_of(arguments)
    device = prepare()
    config = read_config(options.config)
    checkpoint = read_checkpoint(options.checkpoint)
    checkpoint["meta"] = dict(checkpoint.get("meta") or {})
    student, prefix = build_student(config, checkpoint["state_dict"])
    network = Inference(student.to(device))
    # What cannot be folded, or is folded already, is an error before the work and not after it.
    fold_checkpoint(checkpoint, 1.0, layers=list(classifiers(student)), prefix=prefix)
    if options.temperature is None:
        sets, held_out = sets_of(config, options), bool(options.source_split or options.source_dir)
        print(f"calibrate: {len(sets.source)} source images of {sets.source.dataset.img_dir}, ", end="")
        print(f"{len(sets.target)} target images of {sets.target.dataset.img_dir}")
        if not held_out:
            print(f"calibrate: {TRAINED_ON}")
        if sets.labelled is not None:
            print(f"calibrate: labels of {len(sets.labelled)} images, which no test should count: ", end="")
            print(", ".join(sets.labelled.names()))
        found = estimate(network, sets, device=device, seed=options.seed, typical=typical_for(config))
        print(as_text(found))
        t, done = found.temperature, record(found, sets, held_out=held_out)
    else:
        t, done = options.temperature, {"taken": "given", "reason": "--temperature"}
    saved = fold(network, checkpoint, t, prefix=prefix)
    saved["meta"]["dacal"].update(done)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    torch.save(saved, str(options.out))
    layers = ", ".join(saved["meta"]["dacal"]["layers"])
    print(f"{options.out}: " + (f"T = {t:.4g} in {layers}" if t != 1 else "T = 1, all weights are as they were"))


if __name__ == "__main__":
    main(sys.argv[1:])
