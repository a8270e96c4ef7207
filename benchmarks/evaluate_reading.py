"""How much longer `dacal evaluate` takes than reading its predictions: 19 x 1024 x 2048 float16, 80 MB an image.

    python benchmarks/evaluate_reading.py                # writes 5 GB into the folder for temporary files; two minutes
    python benchmarks/evaluate_reading.py --images 16

Reading is `np.load` and the sum of all numbers in one thread; the command runs in a process of its own, with as many threads as
there are cores. Of the command there are two times: from its start to its end, with libraries, figures and report, and what the
report says that judging all images took. Both once with files that the system has in memory, and once with files that it has to
fetch from the disk (it is asked to forget them: Linux).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Dict, List

import numpy as np
import torch
from metrics_throughput import CLASSES, IGNORED, images
from PIL import Image


def write_images(folder: Path, count: int, height: int, width: int) -> None:
    """Predictions and labels; the same pixels, moved along the image, so that files differ."""
    x, label = images(height, width, torch.device("cpu"), torch.float16)
    for name in ("predictions", "labels"):
        (folder / name).mkdir()
    for number in range(count):
        by = 97 * number
        np.save(folder / "predictions" / f"{number:03d}.npy", x[0].roll(by, -1).numpy())
        Image.fromarray(label[0].roll(by, -1).to(torch.uint8).numpy()).save(folder / "labels" / f"{number:03d}.png")


def forget(folder: Path) -> None:
    """Have the system drop what it has of the files in memory."""
    for path in folder.rglob("*.*"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_all(folder: Path) -> float:
    """Seconds to read every byte of the predictions."""
    begun = time.perf_counter()
    for path in sorted((folder / "predictions").iterdir()):
        np.load(path).view(np.int16).sum()
    return time.perf_counter() - begun


def evaluate(folder: Path) -> Dict[str, float]:
    """Seconds of the command, and of judging as its report has it."""
    out = folder / "out"
    arguments = [str(folder / "predictions"), str(folder / "labels"), "--out", str(out)]
    settings = ["--num-classes", str(CLASSES), "--ignore-index", str(IGNORED), "--input", "logits"]
    begun = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "dacal_addon", "evaluate", *arguments, *settings],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    whole = time.perf_counter() - begun
    return {"command": whole, "judging": json.loads((out / "report.json").read_text())["seconds"]["judging_all"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--height", type=int, default=1024)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    rows: List[Dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_images(folder, options.images, options.height, options.width)
        read_all(folder)
        evaluate(folder)  # compiles, where numba has not yet
        for where in ("memory", "disk"):
            if where == "disk":
                forget(folder)
            reading = read_all(folder)
            if where == "disk":
                forget(folder)
            took = evaluate(folder)
            ratios = {f"{name}_reads": value / reading for name, value in took.items()}
            rows.append({"files_in": where, "reading": reading, **took, **ratios})
    print(
        f"{options.images} predictions {CLASSES} x {options.height} x {options.width} float16, {os.cpu_count()} cores; seconds"
    )
    print(f"{'files in':<10}{'reading':>9}{'judging':>9}{'x':>7}{'command':>9}{'x':>7}")
    for row in rows:
        told = f"{row['files_in']:<10}{row['reading']:9.2f}{row['judging']:9.2f}{row['judging_reads']:7.2f}"
        print(f"{told}{row['command']:9.2f}{row['command_reads']:7.2f}")
    report = {"images": options.images, "size": [CLASSES, options.height, options.width], "cores": os.cpu_count(), "rows": rows}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "evaluate_reading.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
