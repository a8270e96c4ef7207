"""What each piece costs: time in student forward passes, and the peak memory of training with the meta-step over without.

    python benchmarks/costs.py            # four minutes on two cores
    python benchmarks/costs.py --device cuda

All pieces run in turn in one process, and the medians of their ratios to the forward pass beside them are printed, so that a
machine that slows down in between slows down both. Memory is taken in a fresh process each. The student has an encoder
shaped like ResNet-18; real hosts' students (MiT-B5, ResNet-101) are several times larger, and the temperature net's share is
smaller by as much.
"""

import argparse
import statistics
from functools import partial
from typing import Any, Callable, Dict, List

import torch
import torch.nn.functional as F
from measuring import device_name, peak_bytes, peak_in_fresh_process, seconds
from networks import ResidualSegmenter

from dacal_addon import BilevelCalibrationStep, MetaTemperatureNet, SoftPseudoLabeler, TemperatureFit
from dacal_addon.mixing import class_mask, mix
from dacal_addon.pseudo_labels import one_hot

CLASSES = 19
ENGINES = ["higher", "forward", "finite_difference"] if hasattr(torch, "func") else ["higher", "finite_difference"]


def pieces(size: int, device: torch.device) -> Dict[str, Callable[[], object]]:
    """Name -> the work, on one image of `size` x `size` of each domain."""
    g = torch.Generator().manual_seed(0)
    image = torch.rand(1, 3, size, size, generator=g).to(device)
    # Labels in blocks, as objects are; uniform noise would be the worst case for class_mask and nothing like it.
    label = torch.randint(0, CLASSES, (1, 1, 8, 8), generator=g).float()
    label = F.interpolate(label, size=(size, size)).long()[:, 0].to(device)
    logits = torch.randn(1, CLASSES, size, size, generator=g).to(device)
    student = ResidualSegmenter(CLASSES).to(device)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4)
    small_net = MetaTemperatureNet(CLASSES).to(device)
    adam = torch.optim.Adam(small_net.parameters(), lr=2e-3)
    fit = TemperatureFit(SoftPseudoLabeler(small_net, weight="none"), meta_optimizer=adam)
    pair, pair_label = image.repeat(2, 1, 1, 1), torch.cat([label, (label + 1) % CLASSES])
    pair_logits = 9 * one_hot(pair_label, CLASSES)
    # The larger net, which the bilevel step is used with.
    options: Dict[str, Any] = {"sees": "logits", "kernel_size": 3}
    net = MetaTemperatureNet(CLASSES, **options).to(device)
    rich_net = MetaTemperatureNet(CLASSES, feature_channels=student.feature_channels, **options).to(device)
    labeler = SoftPseudoLabeler(net)
    calibrate = {
        engine: BilevelCalibrationStep(
            student,
            labeler,
            optimizer=optimizer,
            meta_optimizer=torch.optim.Adam(net.parameters(), lr=3e-4),
            engine=engine,
            warmup=0,
        )
        for engine in ENGINES
    }
    with torch.no_grad():
        features = student.features(image)

    def without_grad(work: Callable[[], object]) -> Callable[[], object]:
        def run() -> object:
            with torch.no_grad():
                return work()

        return run

    def plain_step() -> None:
        optimizer.zero_grad()
        size_ = (size, size)
        F.cross_entropy(F.interpolate(student(image), size=size_, mode="bilinear", align_corners=False), label).backward()
        optimizer.step()

    def teacher(x: torch.Tensor) -> torch.Tensor:
        return F.interpolate(student(x), size=(size, size), mode="bilinear", align_corners=False)

    return {
        "student forward": without_grad(lambda: student(image)),
        "plain training step": plain_step,
        "MetaTemperatureNet": without_grad(lambda: small_net(logits)),
        "MetaTemperatureNet, the larger one": without_grad(lambda: net(logits)),
        "the same with features": without_grad(lambda: rich_net(logits, features)),
        "SoftPseudoLabeler": without_grad(lambda: SoftPseudoLabeler(small_net)(logits)),
        "SoftPseudoLabeler, the larger net": without_grad(lambda: labeler(logits)),
        "TemperatureFit, on 2 images": lambda: fit(pair, pair_label, pair, pair_logits, teacher=teacher),
        "class_mask": lambda: class_mask(label, generator=g),
        "mix, soft labels": lambda: mix(label.unsqueeze(1) > 9, label, logits),
        **{f"meta-step, engine {name}": partial(step, image, label, image, logits) for name, step in calibrate.items()},
    }


def training(name: str, size: int, device: torch.device) -> Callable[[], object]:
    """A training step (network, gradients, optimizer's state, activations) and one more piece."""
    works = pieces(size, device)
    return lambda: (works["plain training step"](), works[name]())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", type=int, default=512, help="height and width of the image")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    device = torch.device(options.device)
    if options.peak_of:
        print(peak_bytes(lambda: training(options.peak_of, options.size, device), device))
        return

    works = pieces(options.size, device)
    times: Dict[str, List[float]] = {name: [] for name in works}
    for run in range(options.runs + 1):
        for name, work in works.items():
            elapsed = seconds(work, device)
            if run:  # the first one warms up
                times[name].append(elapsed)
    arguments = [__file__, "--size", str(options.size), "--device", options.device, "--peak-of"]
    peaks = {
        name: peak_in_fresh_process(*arguments, name)
        for name in works
        if name == "plain training step" or name.startswith(("meta-step", "TemperatureFit"))
    }
    print(f"{CLASSES} x {options.size} x {options.size}, torch {torch.__version__}, {device_name(device)}")
    print(f"{'':<36}{'ms':>8}{'student forwards':>19}{'peak memory':>14}")
    for name, own in times.items():
        ratio = statistics.median(a / b for a, b in zip(own, times["student forward"]))
        memory = f"{peaks[name] / peaks['plain training step']:.1f} x" if name in peaks else ""
        print(f"{name:<36}{1000 * statistics.median(own):8.1f}{ratio:19.2f}{memory:>14}".rstrip())


if __name__ == "__main__":
    main()
