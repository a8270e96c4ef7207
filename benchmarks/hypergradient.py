"""What a meta-step costs with each engine, and how well the engines agree.

    python benchmarks/hypergradient.py                  # a quarter of an hour on two cores
    python benchmarks/hypergradient.py --device cuda

The student is `AttentionSegmenter` on 2 x 3 x 256 x 256 with 19 classes and AdamW. The self-training iteration is source pass,
teacher, uncalibrated soft labels, mixed pass, optimizer step and EMA; with DA-Cal, the meta-step comes in between, or, where
the inner gradient is shared (`backward=True`), in the place of the mixed pass. Meta-steps go without `outer_loss_before`, which
is one forward pass more. All works run in turn in one process, and medians of ratios within a round are printed; peak memory is
that of a fresh process each. Writes results/hypergradient.json and .png next to this file.
"""

import argparse
import copy
import json
import statistics
import sys
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence

import torch
import torch.nn.functional as F
from measuring import device_name, peak_bytes, peak_in_fresh_process, result_name, seconds
from networks import Activation, AttentionSegmenter
from torch import Tensor, nn

from dacal_addon import BilevelCalibrationStep, MetaTemperatureNet, SoftPseudoLabeler, hypergradient, soft_cross_entropy
from dacal_addon.losses import cross_entropy
from dacal_addon.mixing import class_mask, mix

CLASSES = 19
ENGINES = ("higher", "forward", "finite_difference")
OPTIMIZERS: Dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.01),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, weight_decay=1e-4),
    "Nesterov": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-3),
    "AMSGrad": lambda p: torch.optim.Adam(p, lr=1e-3, amsgrad=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.01),
}


class Trainer:
    """A self-training loop on one fixed batch, with and without DA-Cal."""

    def __init__(self, size: int, batch: int, device: torch.device, *, activation: Activation = nn.ReLU) -> None:
        g = torch.Generator().manual_seed(0)
        self.source, self.target = (torch.rand(batch, 3, size, size, generator=g).to(device) for _ in range(2))
        # Labels in blocks, as objects are.
        label = torch.randint(0, CLASSES, (batch, 1, 8, 8), generator=g).float()
        self.label = F.interpolate(label, size=(size, size)).long()[:, 0].to(device)
        self.mask = class_mask(self.label, generator=g)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.student = AttentionSegmenter(CLASSES, activation=activation).to(device)
        self.teacher = copy.deepcopy(self.student)
        self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(self.student.parameters(), lr=1e-4)
        self.net = MetaTemperatureNet(CLASSES, sees="logits", kernel_size=3).to(device)
        self.uncalibrated = SoftPseudoLabeler(None, weight="none")
        self.calibrated = SoftPseudoLabeler(self.net, weight="none")
        with torch.no_grad():
            self.logits = _resized(self.teacher(self.target), self.label)

    def calibration(self, engine: str, *, every: int = 1) -> BilevelCalibrationStep:
        return BilevelCalibrationStep(
            self.student,
            self.calibrated,
            optimizer=self.optimizer,
            meta_optimizer=torch.optim.Adam(self.net.parameters(), lr=3e-4),
            engine=engine,
            warmup=0,
            every=every,
            measure_before=False,
        )

    def plain_step(self) -> None:
        self.optimizer.zero_grad()
        self._source_pass()
        self.optimizer.step()

    def forward(self) -> None:
        with torch.no_grad():
            self.student(self.source)

    def meta_step(self, calibrate: BilevelCalibrationStep) -> None:
        calibrate(self.source, self.label, self.target, self.logits, mask=self.mask)

    def iteration(self, calibrate: Optional[BilevelCalibrationStep] = None, *, shared: bool = False, times: int = 1) -> None:
        for _ in range(times):
            self.optimizer.zero_grad()
            self._source_pass()
            with torch.no_grad():
                logits = _resized(self.teacher(self.target), self.label)
            if calibrate is not None:
                calibrate(self.source, self.label, self.target, logits, mask=self.mask, backward=shared)
            if not shared:
                with torch.no_grad():
                    labels = (self.calibrated if calibrate is not None else self.uncalibrated)(logits)
                mixed_label = mix(self.mask, self.label, labels.soft_label)
                weight = mix(self.mask, torch.ones_like(labels.weight), labels.weight)
                mixed_logits = self.student(mix(self.mask, self.source, self.target))
                soft_cross_entropy(_resized(mixed_logits, self.label), mixed_label, weight).backward()
            self.optimizer.step()
            with torch.no_grad():
                for mine, other in zip(self.teacher.parameters(), self.student.parameters()):
                    mine.lerp_(other, 0.001)

    def _source_pass(self) -> None:
        cross_entropy(_resized(self.student(self.source), self.label), self.label).backward()

    def works(self) -> Dict[str, Callable[[], None]]:
        """Name -> the work."""
        works: Dict[str, Callable[[], None]] = {
            "student forward": self.forward,
            "plain student step": self.plain_step,
            "iteration": self.iteration,
        }
        for engine in ENGINES:
            step = self.calibration(engine)
            works[f"{engine}: meta-step"] = partial(self.meta_step, step)
            works[f"{engine}: iteration"] = partial(self.iteration, step)
            works[f"{engine}: iteration, shared"] = partial(self.iteration, step, shared=True)
            seldom = self.calibration(engine, every=4)
            works[f"{engine}: 4 iterations, shared, every=4"] = partial(self.iteration, seldom, shared=True, times=4)
        return works


def _resized(logits: Tensor, label: Tensor) -> Tensor:
    return F.interpolate(logits, size=label.shape[-2:], mode="bilinear", align_corners=False)


def times(trainer: Trainer, runs: int, device: torch.device) -> Dict[str, List[float]]:
    """Seconds of each work, one figure a round; the first round, which warms up, is not counted."""
    works = trainer.works()
    found: Dict[str, List[float]] = {name: [] for name in works}
    for run in range(runs + 1):
        for name, work in works.items():
            elapsed = seconds(work, device)
            if run:
                found[name].append(elapsed)
        print(f"round {run} of {runs}", file=sys.stderr)
    return found


def training(name: str, size: int, batch: int, device: torch.device) -> Callable[[], object]:
    """What a peak is taken of: plain steps, and the work after each."""
    trainer = Trainer(size, batch, device)
    work = trainer.works()[name]

    def step() -> None:
        trainer.plain_step()
        work()

    return step


def agreement(
    device: torch.device, activation: Activation, optimizers: Sequence[str], *, size: int = 64
) -> List[Dict[str, Any]]:
    """Relative distance of every engine's hypergradient to the unrolled one in float64, per optimizer, at one warm state.

    With ignored rows and uneven pixel weights. Dropout is off: it draws other masks in another precision. A network of ReLUs
    is not differentiable where one of them is at 0: another precision, or a step of differences, crosses some of these.
    """
    rows = []
    for name in optimizers:
        make, trainer = OPTIMIZERS[name], Trainer(size, 2, device, activation=activation)
        trainer.label[:, :8] = 255
        trainer.student.dropout.eval()
        optimizer = trainer.optimizer = make(trainer.student.parameters())
        for _ in range(3):
            trainer.plain_step()
        torch.nn.init.constant_(trainer.net.last.weight, 0.05)
        found = {}
        for dtype in (torch.float64, torch.float32):
            student = copy.deepcopy(trainer.student).to(dtype)
            twin = make(student.parameters())
            twin.load_state_dict(optimizer.state_dict())
            net = copy.deepcopy(trainer.net).to(dtype)
            for engine in ENGINES:
                inner, outer = _closures(trainer, net, dtype)
                result = hypergradient(
                    student,
                    inner,
                    outer,
                    list(net.parameters()),
                    optimizer=twin,
                    engine=engine,
                    measure_before=False,
                )
                found[f"{engine}, {dtype}"] = torch.cat([grad.double().flatten() for grad in result.grads])
        reference = found.pop("higher, torch.float64")
        row: Dict[str, Any] = {"optimizer": name}
        for key, value in found.items():
            row[key.replace("torch.", "")] = float((value - reference).norm() / reference.norm())
        rows.append(row)
    return rows


def _closures(trainer: Trainer, net: MetaTemperatureNet, dtype: torch.dtype) -> Any:
    """The inner and the outer loss of DA-Cal, in this precision."""
    source, target, logits = (x.to(dtype) for x in (trainer.source, trainer.target, trainer.logits))
    mask, label = trainer.mask, trainer.label
    labels = SoftPseudoLabeler(net, weight="none")(logits)
    inner_label, outer_label = mix(mask, label, labels.soft_label), mix(~mask, label, labels.pseudo_label)
    weight = torch.linspace(0, 1, label.numel(), dtype=dtype, device=label.device).view(label.shape)

    def inner(f: Any) -> Tensor:
        return soft_cross_entropy(_resized(f(mix(mask, source, target)), label), inner_label, weight)

    def outer(f: Any) -> Tensor:
        return cross_entropy(_resized(f(mix(~mask, source, target)), label), outer_label)

    return inner, outer


def table(result: Dict[str, Any]) -> str:
    """The report as text."""
    lines = [
        f"{result['student']}, {result['batch']} x 3 x {result['size']} x {result['size']}, "
        f"torch {result['torch']}, {result['device']}",
        f"{'':<46}{'student forwards':>17}{'plain steps':>13}{'iterations':>12}{'peak memory':>13}",
    ]
    for row in result["rows"]:
        lines.append(
            f"{row['work']:<46}{row['forwards']:17.2f}{row['plain_steps']:13.2f}{row['iterations']:12.2f}"
            + (f"{row['peak']:11.2f} x" if row["peak"] is not None else "")
        )
    for activation, rows in result["agreement"].items():
        keys = [key for key in rows[0] if key != "optimizer"]
        lines += ["", f"relative distance to the unrolled hypergradient in float64, with {activation}"]
        lines.append(f"{'':<10}" + "".join(f"{key:>28}" for key in keys))
        lines += [f"{row['optimizer']:<10}" + "".join(f"{row[key]:28.1e}" for key in keys) for row in rows]
    return "\n".join(lines)


def draw(result: Dict[str, Any], path: Path) -> None:
    """Time of an iteration and peak memory, per engine."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = {row["work"]: row for row in result["rows"]}
    kinds = {
        "own inner pass": ("{}: iteration", "#0072B2"),
        "inner gradient shared": ("{}: iteration, shared", "#56B4E9"),
        "shared, every=4": ("{}: 4 iterations, shared, every=4", "#E69F00"),
    }
    columns = {"iterations": "time of a self-training iteration, without DA-Cal = 1"}
    if rows["iteration"]["peak"] is not None:
        columns["peak"] = "peak memory, plain training step = 1"
    figure, panels = plt.subplots(1, len(columns), figsize=(4.5 * len(columns), 3.2), squeeze=False, constrained_layout=True)
    for axes, (column, label) in zip(panels[0], columns.items()):
        for k, (title, (name, colour)) in enumerate(kinds.items()):
            values = [rows[name.format(engine)][column] for engine in ENGINES]
            bars = axes.barh([i + 0.26 * (k - 1) for i in range(len(ENGINES))], values, 0.24, color=colour, label=title)
            for bar, value in zip(bars, values):
                axes.text(value + 0.03, bar.get_y() + bar.get_height() / 2, f"{value:.2f}", va="center", fontsize=8)
        axes.set_xlabel(label)
        axes.set_yticks(range(len(ENGINES)))
        axes.set_yticklabels(ENGINES if column == "iterations" else [])
        axes.axvline(1.0, color="0.4", linewidth=1)
        axes.set_xlim(0, 1.15 * axes.get_xlim()[1])
        axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)
    panels[0][-1].legend(frameon=False, fontsize=8, loc="lower right")
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", type=int, default=256, help="height and width of the images")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--quick", action="store_true", help="no peak memory, and the agreement of AdamW alone")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    device = torch.device(options.device)
    if options.peak_of:
        print(peak_bytes(lambda: training(options.peak_of, options.size, options.batch, device), device))
        return

    trainer = Trainer(options.size, options.batch, device)
    found = times(trainer, options.runs, device)
    arguments = [__file__, "--size", str(options.size), "--batch", str(options.batch), "--device", options.device, "--peak-of"]
    peaks = {} if options.quick else {name: peak_in_fresh_process(*arguments, name) for name in found}

    def ratio(own: List[float], name: str, times: int) -> float:
        return statistics.median(a / b for a, b in zip(own, found[name])) / times

    rows = []
    for name, own in found.items():
        count = 4 if "4 iterations" in name else 1
        rows.append(
            {
                "work": name,
                "seconds": [round(value, 4) for value in own],
                "forwards": ratio(own, "student forward", count),
                "plain_steps": ratio(own, "plain student step", count),
                "iterations": ratio(own, "iteration", count),
                "peak": peaks[name] / peaks["plain student step"] if peaks else None,
            }
        )
    optimizers = ["AdamW"] if options.quick else list(OPTIMIZERS)
    result = {
        "student": f"AttentionSegmenter, {sum(p.numel() for p in trainer.student.parameters()) / 1e6:.1f} M parameters",
        "size": options.size,
        "batch": options.batch,
        "torch": torch.__version__,
        "device": device_name(device),
        "rows": rows,
        "agreement": {kind.__name__: agreement(device, kind, optimizers) for kind in (nn.GELU, nn.ReLU)},
    }
    options.out.mkdir(parents=True, exist_ok=True)
    name = result_name("hypergradient", device)
    (options.out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(result, options.out / f"{name}.png")
    print(table(result))


if __name__ == "__main__":
    main()
