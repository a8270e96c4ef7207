"""Train with MMSegmentation 1.x on a CPU, in about a minute: on the source alone, then with self-training, then calibrated.

    python examples/mmengine/train_on_cpu.py --work-dir mmengine-out [--cfg-options KEY=VALUE ...]

The data set is `dacal demo`'s mitochondria (64 x 64, two looks); the configs are `source_only.py` and `dacal.py` beside this
file, and everything is the real Runner's. `--cfg-options` change the second config, for example
`model.dacal.learner=bilevel model.dacal.warmup=50`.
"""

import argparse
import os
from pathlib import Path
from typing import Any, Dict, List

import numpy as np
import without_ops  # noqa: F401  # before mmseg
from mmengine.config import Config, DictAction
from mmengine.runner import Runner
from PIL import Image

from dacal_addon.demo.datasets import Split, hold_out_source, load_dataset

# mmengine's checkpoints hold more than weights, and torch >= 2.6 loads such only where it is told to trust them.
os.environ.setdefault("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
HERE = Path(__file__).parent
SHOWN = ("mIoU", "calibration/ece", "calibration/mean_confidence")


def write(split: Split, folder: Path, *, labels: bool) -> None:
    """Images, and labels where there are to be some, as MMSegmentation reads them."""
    for name in ("images", "labels") if labels else ("images",):
        (folder / name).mkdir(parents=True)
    for i, (image, label) in enumerate(zip(*split)):
        pixels = np.rint(255 * image.numpy()).astype(np.uint8).transpose(1, 2, 0)
        Image.fromarray(pixels).save(folder / "images" / f"{i:04d}.png")
        if labels:
            Image.fromarray(label.numpy().astype(np.uint8)).save(folder / "labels" / f"{i:04d}.png")


def write_data(folder: Path, *, seed: int = 0) -> None:
    """The data set of both configs; held-out source images for the calibration, and no labels of target images to train on."""
    data, held_out = hold_out_source(load_dataset("mitochondria", seed=seed, train_images=256, test_images=64))
    write(data.source_train, folder / "source", labels=True)
    write(held_out, folder / "held_out", labels=True)
    write(data.target_train, folder / "target", labels=False)
    write(data.target_test, folder / "target_test", labels=True)


def config_of(name: str, *, data: Path, work_dir: Path, options: Dict[str, Any]) -> Config:
    """One of the two configs, on this data."""
    config = Config.fromfile(HERE / f"{name}.py")
    _set_root(config._cfg_dict, str(data))
    config.merge_from_dict({"work_dir": str(work_dir), **options})
    return config


def _set_root(node: Any, root: str) -> None:
    """Data sets are copied all over a config."""
    values = node.values() if isinstance(node, dict) else node if isinstance(node, (list, tuple)) else ()
    if isinstance(node, dict) and "data_root" in node:
        node["data_root"] = root
    for value in values:
        _set_root(value, root)


def tested(config: Config, checkpoint: Path, *, work_dir: Path) -> Dict[str, float]:
    """Accuracy and calibration of a checkpoint on the target's test images."""
    config = config.copy()
    config.merge_from_dict({"work_dir": str(work_dir), "load_from": str(checkpoint)})
    return dict(Runner.from_cfg(config).test())


def main(arguments: List[str]) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work-dir", type=Path, required=True, help="a new folder")
    parser.add_argument("--cfg-options", nargs="+", action=DictAction, default={}, help="changes of dacal.py")
    options = parser.parse_args(arguments)
    out = options.work_dir
    data = out / "data"
    write_data(data)
    plain = config_of("source_only", data=data, work_dir=out / "source_only", options={})
    Runner.from_cfg(plain).train()
    start = {"load_from": str(out / "source_only" / "iter_300.pth")}
    ours = config_of("dacal", data=data, work_dir=out / "dacal", options={**start, **options.cfg_options})
    Runner.from_cfg(ours).train()
    checkpoints = {
        "source only": out / "source_only" / "iter_300.pth",
        "self-trained": out / "dacal" / f"iter_{ours.train_cfg.max_iters}.pth",
        "calibrated": out / "dacal" / "calibrated.pth",
    }
    found = {name: tested(ours, path, work_dir=out / "tests") for name, path in checkpoints.items()}
    print(f"\n{'on target test images':24}" + "".join(f"{name:>28}" for name in SHOWN))
    for name, figures in found.items():
        print(f"{name:24}" + "".join(f"{figures[shown]:28.4f}" for shown in SHOWN))


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
