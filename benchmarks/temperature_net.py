"""What the temperatures cost, as a share of one student forward pass on the same images.

    python benchmarks/temperature_net.py

One run interleaves the student and the temperature nets and takes the median of the ratios, so that a machine that slows down
in between slows down both. The student has an encoder shaped like ResNet-18; real hosts' students (MiT-B5, ResNet-101) are
several times larger, and the share is smaller by as much.
"""

import argparse
import statistics
import time
from typing import Callable, Dict, List

import torch
from networks import ResidualSegmenter

from dacal_addon import MetaTemperatureNet
from dacal_addon.pseudo_labels import soft_label


def seconds(work: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begun = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--classes", type=int, default=19)
    parser.add_argument("--size", type=int, default=512, help="height and width of the image")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()

    device, g = torch.device(options.device), torch.Generator().manual_seed(0)
    image = torch.rand(1, 3, options.size, options.size, generator=g).to(device)
    logits = torch.randn(1, options.classes, options.size, options.size, generator=g).to(device)
    student = ResidualSegmenter(options.classes).to(device).eval()
    plain = MetaTemperatureNet(options.classes).to(device)
    with_features = MetaTemperatureNet(options.classes, feature_channels=student.feature_channels).to(device)
    with torch.no_grad():
        features = student.features(image)
        works: Dict[str, Callable[[], object]] = {
            "student": lambda: student(image),
            "MetaTemperatureNet": lambda: plain(logits),
            "MetaTemperatureNet + features": lambda: with_features(logits, features),
            "softmax(z / T)": lambda: soft_label(logits, torch.ones_like(logits[:, :1])),
        }
        times: Dict[str, List[float]] = {name: [] for name in works}
        for run in range(options.runs + 1):
            for name, work in works.items():
                elapsed = seconds(work, device)
                if run:  # the first one warms up
                    times[name].append(elapsed)
    million = sum(parameter.numel() for parameter in student.parameters()) / 1e6
    print(f"{options.classes} x {options.size} x {options.size}, student with {million:.1f} M parameters, {device}")
    for name, own in times.items():
        share = statistics.median(a / b for a, b in zip(own, times["student"]))
        print(f"{name:<30} {1000 * statistics.median(own):8.1f} ms {100 * share:6.0f} % of a student forward")


if __name__ == "__main__":
    main()
