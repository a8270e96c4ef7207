"""Train DAFormer, HRDA or MIC for a minute on a CPU: your own config, shrunk, on a tiny data set.

    cd DAFormer                                                       # the host's checkout, with its environment
    python /path/to/examples/mmseg/try_on_cpu.py configs/dacal/gta2cs.py --iters 20

Everything is the host's own: its `tools/train.py`, its data pipeline, losses, optimizer, hooks and evaluation. Shrunk are
images and crops (to `--crop`), the network (MiT-B0 with 32 decoder channels, unless `--whole-network` is said; without
pretrained weights) and the number of iterations. The network learns nothing worth looking at; what you see is whether it
runs, and what it logs.
"""

import argparse
import importlib
import importlib.util
import os
import sys
import time
import types
from pathlib import Path
from typing import Any, Dict, List

import torch
from tiny_data import write_all  # beside this file
from torch import nn

SMALL_NETWORK = {"in_channels": [32, 64, 160, 256], "channels": 32}


def shrink(config: Any, *, data: Path, iters: int, side: int = 128, whole_network: bool = False) -> None:
    """Turn a config of DAFormer, HRDA or MIC into a tiny one, in place."""
    pairs = config.data.train
    crop = next(step for step in pairs.target.pipeline if step["type"] == "RandomCrop")["crop_size"]
    factor = crop[0] // side
    for dataset in (pairs.source, pairs.target, config.data.val, config.data.test):
        dataset["data_root"] = str(data / Path(dataset["data_root"]).name)
        for step in dataset.pipeline:
            for key in ("img_scale", "crop_size", "size"):
                if key in step:
                    step[key] = tuple(n // factor for n in step[key])
    if "rare_class_sampling" in pairs:
        pairs.rare_class_sampling.update(min_pixels=20)
    config.data.update(workers_per_gpu=1)

    model = config.model
    model.update(pretrained=None)
    if not whole_network:
        model.backbone = {"type": "mit_b0"}
        model.decode_head.update(SMALL_NETWORK)
        model.decode_head.decoder_params.update(embed_dims=32)
    model.decode_head.decoder_params.embed_cfg.pop("pretrained", None)
    if "hr_crop_size" in model:
        model.update(hr_crop_size=[n // factor for n in model.hr_crop_size])
        if not whole_network:
            model.decode_head.update(attention_embed_dim=32)
    if model.test_cfg.mode == "slide":
        model.test_cfg.update(stride=[side // 2, side // 2], crop_size=[side, side])
    for key in ("pseudo_weight_ignore_top", "pseudo_weight_ignore_bottom"):
        config.uda[key] = config.uda[key] // factor
    # Few pixels of an untrained network are as sure as 0.968, and without them no pseudo-label has a weight.
    config.uda.update(pseudo_threshold=0.05, debug_img_interval=max(1, iters // 2))
    if config.uda.get("mask_generator"):
        config.uda.mask_generator.update(mask_block_size=config.uda.mask_generator.mask_block_size // factor)
    if "dacal" in config.uda:
        config.uda.dacal["warmup_iters"] = min(2, config.uda.dacal.get("warmup_iters", 2))

    config.runner.update(max_iters=iters)
    config.log_config.update(interval=1)
    config.lr_config.update(warmup_iters=2)
    config.checkpoint_config = {"by_epoch": False, "interval": max(1, iters // 2), "max_keep_ckpts": -1}
    config.evaluation = {"interval": iters, "metric": "mIoU"}
    config.seed = config.get("seed", 0)


def run_without_gpu() -> None:
    """What mmcv 1.3.7 and the hosts take for granted: a GPU, and on torch 2 libraries of its day."""
    nn.Module.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 0):
        _stand_in_for_timm()
        _stand_in_for_torchvision()
    functions: Any = importlib.import_module("mmcv.parallel._functions")
    runner: Any = importlib.import_module("mmcv.runner").IterBasedRunner
    resume = runner.resume
    runner.resume = lambda self, checkpoint, *args, **kwargs: resume(self, checkpoint, map_location="cpu")  # not to a GPU
    # Its list branch adds a dimension on a CPU that it does not add on a GPU.
    functions.scatter = lambda data, devices, streams=None: data if isinstance(data, list) else data.unsqueeze(0)


def _stand_in_for_timm() -> None:
    """timm 0.3.2 imports torch._six, which torch 2 has no more. Used of it are three helpers."""

    class DropPath(nn.Module):
        """Stochastic depth (Huang et al., ECCV 2016): in training, leave a residual branch out for some of the images."""

        def __init__(self, drop_prob: float = 0.0) -> None:
            super().__init__()
            self.drop_prob = drop_prob

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if not self.training or not self.drop_prob:
                return x
            keep = torch.rand(x.shape[0], *[1] * (x.dim() - 1), dtype=x.dtype, device=x.device) >= self.drop_prob
            return x * keep / (1.0 - self.drop_prob)

    layers = _module("timm.models.layers", trunc_normal_=nn.init.trunc_normal_, DropPath=DropPath)
    layers.to_2tuple = lambda x: tuple(x) if isinstance(x, (tuple, list)) else (x, x)  # type: ignore[attr-defined]
    _module("timm.models", layers=layers)
    _module("timm", models=sys.modules["timm.models"])


def _stand_in_for_torchvision() -> None:
    """mmcv lists its models, for names of checkpoints to download; there is no build for every torch."""
    if importlib.util.find_spec("torchvision") is None:
        models = _module("torchvision.models")
        models.__path__ = []
        _module("torchvision", models=models, __version__="0.0.0")


def _module(name: str, **content: Any) -> types.ModuleType:
    module = types.ModuleType(name)
    vars(module).update(content)
    sys.modules[name] = module
    return module


def main(arguments: List[str]) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("--iters", type=int, default=20)
    parser.add_argument("--work-dir", type=Path, default=Path("work_dirs/dacal_tiny"))
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="config options, after shrinking")
    parser.add_argument("--crop", type=int, default=128, help="side of the crops, in pixels")
    parser.add_argument("--whole-network", action="store_true", help="that of the config, MiT-B5")
    parser.add_argument("--processor-time", action="store_true", help="log that of this process as the time of an iteration")
    parser.add_argument("--resume-from", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # faster than two at this size
    sys.path.insert(0, os.getcwd())
    run_without_gpu()
    if options.processor_time:
        timer: Any = importlib.import_module("mmcv.runner.hooks.iter_timer")
        timer.time = types.SimpleNamespace(time=time.process_time)
    from mmcv import Config, DictAction

    data = options.work_dir / "data"
    if not data.exists():
        write_all(data)
    config = Config.fromfile(str(options.config))
    shrink(config, data=data, iters=options.iters, side=options.crop, whole_network=options.whole_network)
    changes: Dict[str, Any] = {}
    for item in options.set:
        key, value = item.split("=", 1)
        changes[key] = DictAction._parse_iterable(value)
    config.merge_from_dict(changes)
    small = options.work_dir / "tiny.py"
    config.dump(str(small))
    train = importlib.import_module("tools.train")
    resume = ["--resume-from", str(options.resume_from)] if options.resume_from else []
    train.main([str(small), "--work-dir", str(options.work_dir), *resume])


if __name__ == "__main__":
    main(sys.argv[1:])
