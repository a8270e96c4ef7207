"""Calibration metrics at segmentation scale: time and memory of one 19 x 1024 x 2048 image, here and in public libraries.

    pip install -e '.[bench]'                    # the libraries; those that are missing are left out
    python benchmarks/metrics_throughput.py      # some minutes on one core
    python benchmarks/metrics_throughput.py --device cuda   # two minutes; --quick without memory
    python benchmarks/metrics_throughput.py --speedup

Times are processor time in multiples of one read of the logits, `x.amax(1)`, taken in turn with everything else in one process
(on a GPU, time until it has finished, and beside it how many kernels and copies were launched). The libraries compute ECE
alone; `CalibrationStats` everything that it has. Memory is the peak above logits and labels, of a fresh process each, after 8
and after 64 images. Libraries that want probabilities, flat pixels or one-hot labels get them, and what that costs is theirs.
"""

import argparse
import importlib
import json
import statistics
import time
import warnings
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Tuple

import torch
from measuring import device_name, peak_bytes, peak_in_fresh_process, result_name, seconds
from torch import Tensor

from dacal_addon.metrics import CalibrationStats

CLASSES, IGNORED = 19, 255
Metric = Tuple[Callable[[Tensor, Tensor], object], Callable[[], object]]
"""Takes in one image; gives the result."""


def images(height: int, width: int, device: torch.device, dtype: torch.dtype) -> Tuple[Tensor, Tensor]:
    """Logits (1, C, H, W) that are right for nine pixels of ten, and labels, a tenth of them ignored."""
    g = torch.Generator().manual_seed(0)
    label = torch.randint(0, CLASSES, (1, height, width), generator=g)
    x = torch.randn(1, CLASSES, height, width, generator=g)
    x.scatter_add_(1, label.unsqueeze(1), 4.0 * torch.ones(1, 1, height, width))
    label[torch.rand(label.shape, generator=g) < 0.1] = IGNORED
    return x.to(device, dtype), label.to(device)


def ours(**options: Any) -> Callable[[torch.device], Metric]:
    def make(device: torch.device) -> Metric:
        stats = CalibrationStats(CLASSES, input="logits", **options)
        return stats.update, stats.ece

    return make


def torchmetrics(device: torch.device) -> Metric:
    module = importlib.import_module("torchmetrics.classification")
    metric = module.MulticlassCalibrationError(CLASSES, n_bins=15, ignore_index=IGNORED).to(device)
    return metric.update, metric.compute


def torch_uncertainty(device: torch.device) -> Metric:
    module = importlib.import_module("torch_uncertainty.metrics")
    metric = module.CalibrationError(task="multiclass", num_bins=15, num_classes=CLASSES).to(device)

    def update(x: Tensor, label: Tensor) -> None:
        valid = label != IGNORED
        metric.update(torch.softmax(x, 1).movedim(1, -1)[valid], label[valid])

    return update, metric.compute


def monai(device: torch.device) -> Metric:
    metric = importlib.import_module("monai.metrics").CalibrationErrorMetric(num_bins=15)

    def update(x: Tensor, label: Tensor) -> None:
        # It cannot ignore pixels: they are taken out, as one row.
        valid = label != IGNORED
        p = torch.softmax(x, 1).movedim(1, -1)[valid].T[None, :, None]
        y = torch.nn.functional.one_hot(label[valid], CLASSES).T[None, :, None]
        metric(p, y)

    return update, metric.aggregate


def netcal(device: torch.device) -> Metric:
    measure = importlib.import_module("netcal.metrics").ECE(15)
    parts: List[Any] = []

    def update(x: Tensor, label: Tensor) -> None:
        valid = label != IGNORED
        parts.append((torch.softmax(x, 1).movedim(1, -1)[valid].cpu().numpy(), label[valid].cpu().numpy()))

    def compute() -> object:
        return next(measure.measure(p, y) for p, y in parts)

    return update, compute


METRICS: Dict[str, Tuple[Callable[[torch.device], Metric], str]] = {
    "CalibrationStats, triton": (ours(backend="triton"), "triton"),
    "CalibrationStats, triton, per_image": (ours(backend="triton", per_image=True), "triton"),
    "CalibrationStats, triton, classwise": (ours(backend="triton", classwise=True), "triton"),
    "CalibrationStats, torch": (ours(backend="torch"), ""),
    "CalibrationStats, compile": (ours(backend="compile"), ""),
    "CalibrationStats, torch, classwise": (ours(backend="torch", classwise=True), ""),
    "CalibrationStats, numba": (ours(backend="numba"), "numba"),
    "CalibrationStats, numba, per_image": (ours(backend="numba", per_image=True), "numba"),
    "CalibrationStats, numba, classwise": (ours(backend="numba", classwise=True), "numba"),
    "torchmetrics": (torchmetrics, "torchmetrics"),
    "torch-uncertainty": (torch_uncertainty, "torch_uncertainty"),
    "MONAI": (monai, "monai"),
    "netcal": (netcal, "netcal"),
}
PLAIN = ("CalibrationStats, torch", "CalibrationStats, numba", "CalibrationStats, triton")
ELSEWHERE = {"cpu": "triton", "cuda": "numba"}
"""What judges on another device."""
# Images. The others keep what they get, up to 150 MB an image.
MEMORY_AFTER = {name: (8, 64) if name.startswith(("Calib", "torchm")) else (8,) for name in METRICS}


def version(module: str) -> Optional[str]:
    """Of an installed library, None where it cannot be imported."""
    try:
        return str(importlib.import_module(module).__version__)
    except ImportError:
        return None


def processor_seconds(work: Callable[[], object], device: torch.device) -> float:
    """Of all threads; on a GPU, the time until it has finished."""
    if device.type == "cuda":
        return seconds(work, device)
    begun = time.process_time()
    work()
    return time.process_time() - begun


def launches(work: Callable[[], object]) -> int:
    """Kernels and copies that a GPU is given, as the profiler counts them."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        work()
        torch.cuda.synchronize()
    return sum("CUDA" in str(event.device_type) for event in seen.events())


def speedup(x: Tensor, label: Tensor, runs: int) -> None:
    """Print how much faster the sweep is with two threads than with one, in turn; of the time that passes."""
    work = one_image(ours(backend="numba"), x, label)
    times: Dict[int, List[float]] = {1: [], 2: []}
    for run in range(runs + 1):
        for threads, own in times.items():
            torch.set_num_threads(threads)
            elapsed = seconds(work, x.device)
            if run:  # the first one warms up
                own.append(elapsed)
    ratio = statistics.median(one / two for one, two in zip(times[1], times[2]))
    one, two = (1000 * statistics.median(own) for own in times.values())
    print(f"One thread {one:.0f} ms, two {two:.0f} ms: {ratio:.2f} x")


def one_image(make: Callable[[torch.device], Metric], x: Tensor, label: Tensor) -> Callable[[], object]:
    """Taking in an image and computing the result, from nothing; what is compiled stays compiled."""
    update, compute = make(x.device)
    owner = getattr(update, "__self__", None)

    def work() -> object:
        if isinstance(owner, CalibrationStats):
            owner.reset()
            update(x, label)
            return compute()
        fresh, result = make(x.device)
        fresh(x, label)
        return result()

    return work


def taking_in(name: str, count: int, height: int, width: int, device: torch.device) -> Callable[[], Callable[[], object]]:
    """What `peak_bytes` builds: `count` images through one metric, above the memory of one image and of a warm process."""
    x, label = images(height, width, device, torch.float32)
    make = METRICS[name][0]
    work = one_image(make, x[..., :64, :64], label[..., :64, :64])
    work()  # loads what is loaded at the first call: libraries, compilers
    if "compile" in name:
        one_image(make, x, label)()

    def build() -> Callable[[], object]:
        update, compute = make(device)

        def run() -> object:
            for _ in range(count):
                update(x, label)
            return compute()

        return run

    return build


def main() -> None:
    warnings.simplefilter("ignore")  # the libraries' own
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--height", type=int, default=1024)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument(
        "--threads", type=int, default=1, help="of torch; more of them wait for each other and use time doing so"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="times only")
    parser.add_argument("--speedup", action="store_true", help="two threads against one only; writes nothing")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--peak-of", nargs=2, metavar=("NAME", "IMAGES"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device, size = torch.device(options.device), (options.height, options.width)
    if options.peak_of:
        name, count = options.peak_of
        print(peak_bytes(taking_in(name, int(count), *size, device), device, calls=1))
        return

    if options.speedup:
        speedup(*images(*size, device, torch.float32), options.runs)
        return
    versions = {name: version(module) for name, (_, module) in METRICS.items() if module}
    other = ELSEWHERE.get(device.type)
    names = [name for name, (_, module) in METRICS.items() if (not module or versions[name]) and module != other]
    x, label = images(*size, device, torch.float32)
    works: Dict[str, Callable[[], object]] = {"one read: amax": lambda: x.amax(1)}
    works.update({name: one_image(METRICS[name][0], x, label) for name in names})
    halves = x.half()
    works.update({f"{name}, float16 logits": one_image(METRICS[name][0], halves, label) for name in names if name in PLAIN})
    times: Dict[str, List[float]] = {name: [] for name in works}
    for run in range(options.runs + 1):
        for name, work in works.items():
            elapsed = processor_seconds(work, device)
            if run:  # the first one warms up
                times[name].append(elapsed)
    rows = []
    arguments = [__file__, "--height", str(size[0]), "--width", str(size[1]), "--device", options.device, "--peak-of"]
    for name, own in times.items():
        row: Dict[str, Any] = {
            "name": name,
            "milliseconds": 1000 * statistics.median(own),
            "reads": statistics.median(a / b for a, b in zip(own, times["one read: amax"])),
        }
        if device.type == "cuda":
            row["launches"] = launches(works[name])
        if name in METRICS and not options.quick:
            row["extra_bytes"] = {str(n): peak_in_fresh_process(*arguments, name, str(n)) for n in MEMORY_AFTER[name]}
        rows.append(row)
    missing = [name for name, found in versions.items() if not found and METRICS[name][1] != other]
    print(f"{CLASSES} x {size[0]} x {size[1]} float32, torch {torch.__version__}, {device_name(device)}")
    print(f"{'':<36}{'ms':>8}{'reads':>8}{'MB extra, 8 images':>20}{'64':>8}")
    for row in rows:
        extra = [f"{row['extra_bytes'][n] / 1e6:.0f}" if n in row.get("extra_bytes", {}) else "" for n in ("8", "64")]
        told = f"{row['name']:<36}{row['milliseconds']:8.2f}{row['reads']:8.1f}{extra[0]:>20}{extra[1]:>8}".rstrip()
        print(told + (f"  {row['launches']} launches" if "launches" in row else ""))
    if missing:
        print(f"Not installed: {', '.join(missing)}.")
    setting = {"size": [CLASSES, *size], "device": device_name(device), "runs": options.runs}
    report = {**setting, "versions": {"torch": torch.__version__, **versions}, "rows": rows}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"{result_name('metrics_throughput', device)}.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
