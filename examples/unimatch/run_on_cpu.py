"""Run UniMatch's own script for a few iterations on a CPU: tiny random images, random weights, the README's lines put in.

    cd UniMatch-V2                                                       # a checkout, with its environment
    python /path/to/examples/unimatch/run_on_cpu.py unimatch_v2.py --learner fit --ranks 2

The script is the checkout's: its networks, data pipeline, losses, optimizer, DDP (on gloo), evaluation and checkpoints. What is
put in are the lines of `README.md`, read from that page; no file of the checkout is written. The network learns nothing worth
looking at; what you see is whether it runs, and the losses of every iteration. `--plain` leaves the script as it is: with hard
labels, the default, both print the same losses.
"""

import argparse
import importlib
import json
import os
import random
import re
import socket
import sys
import tempfile
import types
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.multiprocessing.spawn import spawn

README = Path(__file__).resolve().parent / "README.md"
SETTINGS: Dict[str, Dict[str, Any]] = {
    "unimatch_v2.py": {"backbone": "dinov2_small", "lock_backbone": False, "crop_size": 56, "lr": 1e-4, "lr_multi": 4.0},
    "unimatch.py": {
        "backbone": "resnet50",
        "replace_stride_with_dilation": [False, False, True],
        "dilations": [6, 12, 18],
        "crop_size": 65,
        "lr": 1e-3,
        "lr_multi": 10.0,
    },
}
"""Of each script, beside what all share."""
ITERATIONS = 8  # an epoch: the scripts log at every eighth of one
CLASSES = 21


def changes(page: str, script: str) -> List[Tuple[int, int, str]]:
    """(first, last, text) of a page's lines for a script: they replace lines first..last, or follow line `last` = first - 1.

    Raises:
        ValueError: lines below "delete".

    Example:
        >>> page = "```python\\n# a.py, after line 2\\nx\\n# a.py, instead of lines 4-5\\ny\\n# a.py, delete line 7\\n```"
        >>> changes(page, "a.py")
        [(3, 2, 'x\\n'), (4, 5, 'y\\n'), (7, 7, '')]
    """
    found = []
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        parts = re.split(
            rf"^ *# {re.escape(script)}, (after line|instead of lines|delete lines?) (\d+)(?:-(\d+))?\n",
            block,
            flags=re.MULTILINE,
        )
        for how, first, last, text in zip(*(parts[i::4] for i in range(1, 5))):
            if how.startswith("delete") and text:
                place = f"'{script}, {how} {first}'"
                raise ValueError(f"changes: expected nothing below {place}, got {text!r}; say 'instead of lines'")
            after = how == "after line"
            found.append((int(first) + after, int(first) if after else int(last or first), text))
    return sorted(found)


def changed(source: str, edits: List[Tuple[int, int, str]]) -> str:
    """A script with a page's lines put in.

    Example:
        >>> changed("1\\n2\\n3\\n", [(2, 1, "after 1\\n"), (3, 3, "instead of 3\\n")])
        '1\\nafter 1\\n2\\ninstead of 3\\n'
    """
    lines = source.splitlines(keepends=True)
    for first, last, text in reversed(edits):
        lines[first - 1 : last] = [text]
    return "".join(lines)


def write_data(folder: Path, *, images: int, validation: int = 2) -> None:
    """Random pictures with random rectangles as labels, of sizes that need padding, as the lists of UniMatch name them."""
    rng = np.random.default_rng(0)
    (folder / "splits" / "pascal").mkdir(parents=True)
    for name, count in (("labeled", images), ("unlabeled", images), ("val", validation)):
        lines = []
        for i in range(count):
            height, width = (int(n) for n in rng.integers(50, 90, 2))
            label = np.zeros((height, width), np.uint8)
            for kind in rng.integers(1, CLASSES, 4):
                top, left = rng.integers(0, height - 20), rng.integers(0, width - 20)
                label[top : top + 20, left : left + 20] = kind
            colour = np.random.default_rng(1).integers(0, 256, (CLASSES, 3))
            picture = np.clip(colour[label] + rng.normal(0, 20, (height, width, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(picture).save(folder / f"{name}_{i}.png")
            Image.fromarray(label).save(folder / f"{name}_{i}_label.png")
            lines.append(f"{name}_{i}.png {name}_{i}_label.png\n")
        target = folder / "splits" / "pascal" / "val.txt" if name == "val" else folder / f"{name}.txt"
        target.write_text("".join(lines))


def write_weights(folder: Path, backbone: str) -> None:
    """Random weights where a script looks for pretrained ones."""
    torch.manual_seed(0)
    if backbone.startswith("dinov2"):
        network = importlib.import_module("model.backbone.dinov2").DINOv2(model_name=backbone.split("_")[1])
    else:
        network = getattr(importlib.import_module("model.backbone.resnet"), backbone)(pretrained=False)
    (folder / "pretrained").mkdir()
    torch.save(network.state_dict(), folder / "pretrained" / f"{backbone}.pth")


def write_config(folder: Path, script: str, *, options: argparse.Namespace) -> None:
    config = {
        **SETTINGS[script],
        "dataset": "pascal",
        "nclass": CLASSES,
        "data_root": str(folder),
        "epochs": options.epochs,
        "batch_size": options.batch,
        "criterion": {"name": "CELoss", "kwargs": {"ignore_index": 255}},
        "conf_thresh": 0.06,  # few pixels of an untrained network are surer
        "dacal": {"learner": options.learner, "warmup": 2} if options.learner else {},
    }
    (folder / "config.yaml").write_text(json.dumps(config))  # which YAML reads too


class Losses:
    """In the place of tensorboard's writer: prints the losses of every iteration."""

    def __init__(self, folder: str) -> None:
        self.row: Dict[str, float] = {}

    def add_scalar(self, name: str, value: Any, step: int) -> None:
        if not name.startswith("train/"):
            return
        self.row[name[len("train/") :]] = float(value)
        if "mask_ratio" in name:
            print(f"iteration {step}: " + ", ".join(f"{key} {loss:.5f}" for key, loss in self.row.items()), flush=True)


def run_without_gpu(bf16: bool) -> None:
    """What the scripts take for granted: GPUs, and processes that load images."""
    library: Any = torch  # Any: parts of it are replaced
    library.Tensor.cuda = library.nn.Module.cuda = lambda self, *args, **options: self
    library.cuda.device_count = lambda: 1
    library.cuda.set_device = lambda device: None
    # torch's own needs a GPU. Statistics are each rank's own then.
    library.nn.SyncBatchNorm.convert_sync_batchnorm = lambda module, process_group=None: module
    start, wrap, load = (
        library.distributed.init_process_group,
        library.nn.parallel.DistributedDataParallel,
        library.utils.data.DataLoader,
    )

    class Wrapped(wrap):  # type: ignore[misc,valid-type]  # what mypy cannot know: the library is Any
        def __init__(self, module: nn.Module, device_ids: Any = None, output_device: Any = None, **options: Any) -> None:
            super().__init__(module, **options)

        def forward(self, *args: Any, **options: Any) -> Any:
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                return super().forward(*args, **options)

    library.distributed.init_process_group = lambda backend, **options: start(backend="gloo", **options)
    library.nn.parallel.DistributedDataParallel = Wrapped
    library.utils.data.DataLoader = lambda *args, **options: load(*args, **{**options, "num_workers": 0})
    tensorboard: Any = types.ModuleType("torch.utils.tensorboard")
    tensorboard.SummaryWriter = Losses
    sys.modules["torch.utils.tensorboard"] = tensorboard


def tell_temperatures() -> None:
    """Print at every iteration what a learner did."""
    from dacal_addon import DACal

    learn = DACal.learn

    def told(self: DACal, *args: Any, **options: Any) -> Any:
        result = learn(self, *args, **options)
        if self.learner is not None:
            done = f"{result.temperature_mean:.5f} before this step, gradient {result.hypergradient_norm:.1e} {result.engine}"
            print(f"temperatures: {result.skipped or done}", flush=True)
        return result

    front_door: Any = DACal
    front_door.learn = told


def run(rank: int, checkout: str, folder: str, port: int, options: argparse.Namespace) -> None:
    """One rank: the script, with the page's lines put in, in a folder of its own."""
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK="0", WORLD_SIZE=str(options.ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    sys.path.insert(0, checkout)
    os.chdir(folder)
    run_without_gpu(options.bf16)
    if rank == 0:
        tell_temperatures()
    torch.manual_seed(rank)
    np.random.seed(rank)  # noqa: NPY002  # the scripts draw from the legacy state
    random.seed(rank)
    script = Path(checkout) / options.script
    edits = [] if options.plain else changes(README.read_text(), options.script)
    source = changed(script.read_text(), edits)
    sys.argv = [
        *(str(script), "--config", "config.yaml", "--save-path", options.save_path or "run"),
        *("--labeled-id-path", "labeled.txt", "--unlabeled-id-path", "unlabeled.txt"),
    ]
    exec(compile(source, str(script), "exec"), {"__name__": "__main__", "__file__": str(script)})


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def main(arguments: Optional[List[str]] = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("script", choices=tuple(SETTINGS))
    parser.add_argument("--plain", action="store_true", help="the script as it is")
    parser.add_argument("--learner", choices=("fit", "bilevel"), help="of the temperatures; default: none, labels are hard")
    parser.add_argument("--ranks", type=int, default=1, help="processes, on gloo")
    parser.add_argument("--batch", type=int, default=2, help="images of each rank")
    parser.add_argument("--epochs", type=int, default=1, help=f"of {ITERATIONS} iterations")
    parser.add_argument("--bf16", action="store_true", help="the network in bfloat16 autocast")
    parser.add_argument("--save-path", help="where to save checkpoints, and to resume from the one there; default: nowhere")
    options = parser.parse_args(arguments)
    checkout = os.getcwd()
    if not Path(options.script).exists():
        parser.error(f"expected {options.script} in {checkout}, found none; run it inside of the checkout")
    if options.save_path:
        options.save_path = os.path.abspath(options.save_path)
    sys.path.insert(0, checkout)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_data(folder, images=ITERATIONS * options.batch * options.ranks)
        write_weights(folder, SETTINGS[options.script]["backbone"])
        write_config(folder, options.script, options=options)
        spawn(run, (checkout, name, free_port(), options), nprocs=options.ranks)


if __name__ == "__main__":
    main()
