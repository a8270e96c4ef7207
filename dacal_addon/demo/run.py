"""What `dacal demo` does: train every method, print the table, write table and pictures."""

import copy
import json
import platform
import sys
import time
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Tuple

import torch
from torch import Tensor

from .. import __version__, metrics, plots
from ..calibrate import estimate_temperature, fold_temperature
from .datasets import Dataset, Split, hold_out_source, load_dataset
from .evaluation import Scores, predict, score
from .methods import METHODS
from .plots import confidence_figure, pick_images
from .recipes import RECIPES, Recipe
from .training import Trained, train, train_start

FOLDED = "hard+fold"
"""Not trained: the student of hard labels, with one temperature folded in."""
TITLES = {**{name: teaching.title for name, teaching in METHODS.items()}, FOLDED: "hard, one folded temperature"}


class _Finished(NamedTuple):
    logits: Tensor
    """On the target's test images."""
    scores: Scores
    """Of these."""
    source_scores: Scores
    """On the source's test images: what the domain gap costs is measured from there."""
    seconds: float
    temperature: float = 1.0
    """That was folded in."""


def run(dataset_name: str, *, seed: int, iterations: int, out: Path, device: torch.device) -> int:
    """Run the demo; returns the exit code, 130 after Ctrl-C. `iterations`: of each self-training run, 0 for the default."""
    recipe = RECIPES[dataset_name]
    if iterations:
        recipe = recipe.scaled(iterations)
    finished: Dict[str, _Finished] = {}
    begun, interrupted, dataset = time.perf_counter(), False, None
    try:
        dataset, held_out = hold_out_source(load_dataset(dataset_name, seed=seed))
        start = train_start(dataset, recipe, seed=seed, device=device)
        for method in METHODS:
            trained = train(METHODS[method], start, dataset, recipe, seed=seed, device=device)
            finished[method] = _scored(trained, dataset, device=device)
            if method == "hard":
                finished[FOLDED] = _folded(finished[method], trained, dataset, held_out, seed=seed, device=device)
            seconds = time.perf_counter() - begun
            _write_table(out, dataset, finished, recipe, seed=seed, seconds=seconds, device=device)
    except KeyboardInterrupt:
        interrupted = True
        left = ", ".join(METHODS[method].title for method in METHODS if method not in finished)
        print(f"\ndacal demo: interrupted. Not finished: {left}.", file=sys.stderr)
    if dataset is None or not finished:
        print(f"dacal demo: nothing was finished; nothing was written to {out}.", file=sys.stderr)
        return 130
    print(f"\n{dataset_name}, target test images, seed {seed}, {recipe.iterations} iterations\n")
    print(table({method: one.scores for method, one in finished.items()}))
    reference = finished["source-only"]
    here, lost = reference.source_scores.miou, reference.source_scores.miou - reference.scores.miou
    print(f"\nOn source test images source-only has {100 * here:.1f} mIoU: it loses {100 * lost:.1f} points on the target.")
    if FOLDED in finished:
        print(_gained(finished))
    written = ["results.json", *_write_pictures(out, dataset, finished)]
    print(f"Written to {out}: {', '.join(written)}")
    return 130 if interrupted else 0


def _scored(trained: Trained, dataset: Dataset, *, device: torch.device) -> _Finished:
    logits = predict(trained.student, dataset.target_test.image, device=device)
    at_home = predict(trained.student, dataset.source_test.image, device=device)
    here, there = score(at_home, dataset.source_test.label), score(logits, dataset.target_test.label)
    return _Finished(logits, there, here, trained.seconds)


def _folded(
    hard: _Finished, trained: Trained, dataset: Dataset, held_out: Split, *, seed: int, device: torch.device
) -> _Finished:
    """What the student of hard labels is with one temperature, found without target labels."""
    begun = time.perf_counter()
    source: Tuple[Tensor, Tensor] = (held_out.image, held_out.label)
    draw = torch.Generator().manual_seed(seed)
    options: Dict[str, Any] = {"value_range": (0.0, 1.0), "layer": "head", "device": device, "generator": draw}
    found = estimate_temperature(trained.student, source=source, target=dataset.target_train.image, **options)
    network = copy.deepcopy(trained.student)
    fold_temperature(network, found.temperature, layer="head")
    scored = _scored(trained._replace(student=network), dataset, device=device)
    return scored._replace(seconds=hard.seconds + time.perf_counter() - begun, temperature=found.temperature)


def _gained(finished: Dict[str, _Finished]) -> str:
    before, after = finished["hard"].scores, finished[FOLDED]
    return (
        f"One temperature, {after.temperature:.2f}, found without target labels and folded into the last layer, takes "
        f"the calibration error of hard labels from {100 * before.ece:.2f} to {100 * after.scores.ece:.2f} %; no "
        "prediction changes."
    )


def table(rows: Dict[str, Scores]) -> str:
    """The table as text; percentages, NLL in nats.

    Example:
        >>> print(table({"hard": Scores(miou=0.541, accuracy=0.8, confidence=0.897, ece=0.097, nll=0.61)}))
        labels on target               mIoU %  accuracy %  confidence %   ECE %     NLL
        hard pseudo-labels               54.1        80.0          89.7    9.70   0.610
    """
    lines = [f"{'labels on target':<29}  mIoU %  accuracy %  confidence %   ECE %     NLL"]
    for method, row in rows.items():
        figures = (
            f"{100 * row.miou:8.1f}{100 * row.accuracy:12.1f}{100 * row.confidence:14.1f}{100 * row.ece:8.2f}{row.nll:8.3f}"
        )
        lines.append(f"{TITLES[method]:<29}{figures}")
    return "\n".join(lines)


def _write_table(
    out: Path,
    dataset: Dataset,
    finished: Dict[str, _Finished],
    recipe: Recipe,
    *,
    seed: int,
    seconds: float,
    device: torch.device,
) -> None:
    """`results.json` with what is finished so far."""
    report: Dict[str, Any] = {
        "dataset": dataset.name,
        "seed": seed,
        "recipe": recipe._asdict(),
        "rows": [
            {
                "method": method,
                **one.scores._asdict(),
                "source_miou": one.source_scores.miou,
                "temperature": one.temperature,
                "seconds": one.seconds,
            }
            for method, one in finished.items()
        ],
        "seconds": seconds,
        "device": str(device),
        "versions": {"dacal_addon": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }
    (out / "results.json").write_text(json.dumps(report, indent=2) + "\n")


def _write_pictures(out: Path, dataset: Dataset, finished: Dict[str, _Finished]) -> List[str]:
    """The pictures of what is finished; returns the names of their files."""
    image, label = dataset.target_test
    tables = {TITLES[method]: metrics.reliability(one.logits, label, input="logits") for method, one in finished.items()}
    figures = {"reliability.png": plots.reliability_diagram(tables)}
    if FOLDED in finished:
        chosen = list(pick_images(label, 4))
        before, after = (finished[name].logits[chosen] for name in ("hard", FOLDED))
        figures["confidence.png"] = confidence_figure(dataset, image[chosen], label[chosen], before, after)
    for name, figure in figures.items():
        plots.save(figure, out / name)
    return list(figures)
