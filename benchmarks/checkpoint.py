"""What one temperature, folded into a trained network, does: by every estimator, and with few labelled target images.

    python benchmarks/checkpoint.py                       # three embedded sets, 600 iterations, seeds 0 to 2: 25 minutes
    python benchmarks/checkpoint.py --iterations 2400     # longer trainings
    python benchmarks/checkpoint.py --data FOLDER         # and the real pictures in FOLDER/*.npz, where there are some
    python benchmarks/checkpoint.py --quick --out /tmp/checkpoint

The network is a student that was trained with hard pseudo-labels, in a cell: one data set at one length of training. Writes
checkpoint.json (a row a cell and seed, each as soon as it is finished: the same command goes on after an interruption) and
checkpoint.md. ECE in percent, on the target's test images, which no estimator sees.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import numpy as np
import torch
from post_hoc import best_temperature

from dacal_addon.calibrate import estimate_temperature
from dacal_addon.calibrate.estimate import with_labels, without_labels
from dacal_addon.demo.datasets import NAMES, Dataset, Split, load_dataset
from dacal_addon.demo.evaluation import predict, score
from dacal_addon.demo.methods import METHODS
from dacal_addon.demo.network import SmallUNet
from dacal_addon.demo.recipes import RECIPES, Recipe
from dacal_addon.demo.training import train, train_start
from dacal_addon.metrics import ece

LABELLED = (1, 2, 5, 10, 20)
DRAWS = 4
CPU = torch.device("cpu")


def real_dataset(path: Path) -> Dataset:
    """A file of real pictures: for each split images (N, H, W, 1 or 3) and labels (N, H, W), uint8, 255 = ignored."""
    arrays = np.load(path)

    def split(name: str) -> Split:
        image = torch.from_numpy(arrays[f"{name}_image"]).permute(0, 3, 1, 2).float() / 255
        label = torch.from_numpy(arrays[f"{name}_label"].astype(np.int64))
        return Split(image.expand(-1, 3, -1, -1).contiguous(), label)

    splits = {name: split(name) for name in ("source_train", "target_train", "source_test", "target_test")}
    return Dataset(path.stem, tuple(map(str, arrays["class_names"])), arrays["palette"], **splits)


def trained(dataset: Dataset, recipe: Recipe, seed: int, path: Path) -> SmallUNet:
    """The student of a cell, from the cache where it is there."""
    student = SmallUNet(len(dataset.class_names), width=recipe.width, seed=seed)
    if not path.exists():
        start = train_start(dataset, recipe, seed=seed, device=CPU)
        # As in uda.py: a seventh less time on a CPU. torch's annotations of Module.to lack the keyword.
        start.student.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        done = train(METHODS["hard"], start, dataset, recipe, seed=seed, device=CPU)
        unfinished = path.with_suffix(f".{os.getpid()}")
        torch.save(done.student.state_dict(), unfinished)
        unfinished.replace(path)
    student.load_state_dict(torch.load(path, map_location="cpu"))
    return student.eval()


def row_of(dataset: Dataset, student: SmallUNet, seed: int) -> Dict[str, Any]:
    """Every estimate, and what it does on the target's test images."""
    logits, label = predict(student, dataset.target_test.image, device=CPU), dataset.target_test.label

    def ece_at(temperature: float) -> float:
        return round(100 * ece(logits / temperature, label, input="logits"), 4)

    options: Dict[str, Any] = {"source": tuple(dataset.source_test), "target": dataset.target_train.image, "layer": "head"}
    options["value_range"] = (0.0, 1.0)
    begun = time.perf_counter()
    found = estimate_temperature(student, generator=torch.Generator().manual_seed(seed), **options)
    seconds = time.perf_counter() - begun
    scores, bound = score(logits, label), best_temperature(logits, label)
    row: Dict[str, Any] = {
        **{name: round(100 * value, 3) for name, value in scores._asdict().items()},
        "bound": {"temperature": round(bound, 3), "ece": ece_at(bound)},
        "taken": {"temperature": round(found.temperature, 3), "ece": ece_at(found.temperature), "reason": found.reason},
        "abstained": found.abstained,
        "seconds": round(seconds, 1),
        "estimates": {},
        "labelled": {},
    }
    for name, estimate in found.estimates.items():
        if np.isfinite(estimate.temperature):
            row["estimates"][name] = {
                "temperature": round(estimate.temperature, 3),
                "ece": ece_at(estimate.temperature),
                "accuracy_off": round(100 * (estimate.accuracy - scores.accuracy), 2),
            }
    prior = without_labels(found.estimates)
    for k in LABELLED:
        alone, combined = [], []
        for draw in range(DRAWS):
            generator = torch.Generator().manual_seed(1000 * seed + draw)
            chosen = torch.randperm(len(dataset.target_train.image), generator=generator)[:k]
            few = (dataset.target_train.image[chosen], dataset.target_train.label[chosen])
            estimates = estimate_temperature(student, labelled_target=few, estimators={}, **options).estimates
            alone.append(ece_at(estimates["labelled"].temperature))
            combined.append(ece_at(with_labels(prior, estimates["labelled"]).temperature))
        row["labelled"][k] = {"alone": alone, "combined": combined}
    return row


def cells(options: argparse.Namespace) -> List[Tuple[str, Optional[Path]]]:
    named: List[Tuple[str, Optional[Path]]] = [(name, None) for name in options.datasets]
    if options.data is not None:
        real = sorted(options.data.glob("*.npz"))
        if not real:
            print(f"{options.data}: no *.npz there; real pictures are skipped")
        named += [(path.stem, path) for path in real]
    return named


def by_cell(rows: List[Dict[str, Any]]) -> List[List[Dict[str, Any]]]:
    """The rows of each cell, which differ in their seeds."""
    keys = [(row["dataset"], row["iterations"]) for row in rows]
    return [[row for row, key in zip(rows, keys) if key == cell] for cell in dict.fromkeys(keys)]


def name_of(own: List[Dict[str, Any]]) -> str:
    return f"{own[0]['dataset']}, {own[0]['iterations']}"


def table(rows: List[Dict[str, Any]]) -> str:
    """The rows as Markdown: means over the seeds of a cell."""
    names = list(rows[0]["estimates"])
    head = ["cell", "seeds", "mIoU", "hard", "best single T", "taken", "worst seed", "abstained", *names]
    head += [f"{k} labelled" for k in LABELLED]
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join(["---"] * len(head)) + " |"]
    for own in by_cell(rows):

        def mean(values: List[float]) -> str:
            return f"{statistics.mean(values):.2f}" if values else ""

        line = [name_of(own), f"{len(own)}", mean([row["miou"] for row in own]), mean([row["ece"] for row in own])]
        line += [mean([row[key]["ece"] for row in own]) for key in ("bound", "taken")]
        line += [f"{max(row['taken']['ece'] - row['ece'] for row in own):+.2f}", f"{sum(row['abstained'] for row in own)}"]
        line += [mean([row["estimates"][name]["ece"] for row in own if name in row["estimates"]]) for name in names]
        for k in LABELLED:
            combined = [ece_ for row in own for ece_ in row["labelled"][str(k)]["combined"]]
            alone = [ece_ for row in own for ece_ in row["labelled"][str(k)]["alone"]]
            line.append(f"{mean(combined)} ({max(combined):.2f}); alone {mean(alone)} ({max(alone):.2f})")
        lines.append("| " + " | ".join(line) + " |")
    return "\n".join(lines)


def summary(rows: List[Dict[str, Any]]) -> str:
    """In how many cells (means over seeds and draws) a temperature does what it should, and the worst one."""
    cells_ = by_cell(rows)
    hard = [statistics.mean(row["ece"] for row in own) for own in cells_]
    bound, without = ([statistics.mean(row[key]["ece"] for row in own) for own in cells_] for key in ("bound", "taken"))
    lines = []
    figures = {"without labels": without}
    for k in map(str, LABELLED):
        figures[f"{k} labelled"] = [
            statistics.mean(ece_ for row in own for ece_ in row["labelled"][k]["combined"]) for own in cells_
        ]
    for name, found in figures.items():
        good = sum(f <= 0.6 * h or h - f >= 0.75 * (h - b) > 0 for f, h, b in zip(found, hard, bound))
        worst = max(range(len(cells_)), key=lambda i: found[i] - hard[i])
        rose, than = found[worst] - hard[worst], sum(f > w for f, w in zip(found, without))
        cell = name_of(cells_[worst])
        lines.append(
            f"- {name}: ECE 40 % lower, or by 75 % of the bound, in {good} of {len(cells_)} cells; worst {cell}, {rose:+.2f}; "
            f"higher than without labels in {than}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--datasets", nargs="*", choices=NAMES, default=list(NAMES))
    parser.add_argument("--data", type=Path, help="a folder of real pictures, *.npz")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--iterations", type=int, default=600)
    parser.add_argument("--quick", action="store_true", help="one seed, a few iterations: does it run?")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "dacal-checkpoint", help="students")
    options = parser.parse_args()
    if options.quick:
        options.seeds, options.iterations = options.seeds[:1], 8
    torch.set_num_threads(1)
    for folder in (options.out, options.cache):
        folder.mkdir(parents=True, exist_ok=True)
    path = options.out / "checkpoint.json"
    rows: List[Dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    for seed in options.seeds:
        for name, file in cells(options):
            key = {"dataset": name, "seed": seed, "iterations": options.iterations}
            if any(all(row[part] == value for part, value in key.items()) for row in rows):
                continue
            dataset = load_dataset(name, seed=seed) if file is None else real_dataset(file)
            recipe = RECIPES.get(name, Recipe(source_iterations=600, crop=96)).scaled(options.iterations)
            student = trained(dataset, recipe, seed, options.cache / f"{name}-{seed}-{options.iterations}.pt")
            rows.append(json.loads(json.dumps({**key, **row_of(dataset, student, seed)})))
            path.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
            last = rows[-1]
            figures = f"ECE {last['ece']:.2f} -> {last['taken']['ece']:.2f} (bound {last['bound']['ece']:.2f})"
            print(f"{name} {options.iterations}, seed {seed}: {figures}; {last['taken']['reason']}", flush=True)
    if rows:
        text = f"{table(rows)}\n\n{summary(rows)}\n"
        (options.out / "checkpoint.md").write_text(text)
        print(text, end="")


if __name__ == "__main__":
    main()
