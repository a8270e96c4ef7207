"""Save what a trained student predicts on the validation images, for `dacal evaluate`.

    cd DAFormer                                                        # the host's checkout, with its environment
    python /path/to/examples/mmseg/save_predictions.py work_dirs/RUN/RUN.json work_dirs/RUN/latest.pth --out predictions
    dacal evaluate predictions data/cityscapes/gtFine/val --num-classes 19 --class-names cityscapes

Two PNGs an image, NAME_confidence.png (16 bits) and NAME_prediction.png, or with `--probabilities` NAME.npy, (C, H, W) float16,
which is 80 MB an image of Cityscapes but needed for NLL, Brier score and class-wise errors. The network is built and called as
in the host's `tools/test.py`, at the original resolution; nothing of DA-Cal takes part in it.
"""

import argparse
import sys
from pathlib import Path
from typing import Any, List

import numpy as np
import torch
from loading import build_student, prepare, read_checkpoint, read_config  # beside this file
from PIL import Image


def write(out: Path, probabilities: torch.Tensor, *, whole: bool) -> None:
    """One image's (C, H, W), under `out` without an ending."""
    out.parent.mkdir(parents=True, exist_ok=True)
    if whole:
        np.save(str(out) + ".npy", probabilities.cpu().numpy().astype(np.float16))
        return
    confidence, prediction = (part.cpu().numpy() for part in probabilities.max(0))
    Image.fromarray(np.rint(65535 * confidence).astype(np.uint16)).save(f"{out}_confidence.png")
    Image.fromarray(prediction.astype(np.uint8)).save(f"{out}_prediction.png")


def main(arguments: List[str]) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("config")
    parser.add_argument("checkpoint")
    parser.add_argument("--out", type=Path, default=Path("predictions"))
    parser.add_argument("--probabilities", action="store_true", help="all of them, not only the largest")
    options = parser.parse_args(arguments)
    device = prepare()
    from mmcv import ProgressBar
    from mmseg.datasets import build_dataset

    config = read_config(options.config)
    dataset = build_dataset(config.data.test)
    student, _ = build_student(config, read_checkpoint(options.checkpoint)["state_dict"])
    student.to(device)
    progress = ProgressBar(len(dataset))
    for i in range(len(dataset)):
        item: Any = dataset[i]
        image, meta = item["img"][0].unsqueeze(0).to(device), item["img_metas"][0].data
        with torch.no_grad():
            probabilities = student.inference(image, [meta], rescale=True)[0]
        name = meta["ori_filename"]
        if name.endswith(dataset.img_suffix):
            name = name[: -len(dataset.img_suffix)]
        write(options.out / name, probabilities, whole=options.probabilities)
        progress.update()


if __name__ == "__main__":
    main(sys.argv[1:])
