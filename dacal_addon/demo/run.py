"""What `dacal demo` does: train every method, print the table, write table and pictures."""

import json
import platform
import sys
import time
from pathlib import Path
from typing import Any, Dict, List, NamedTuple

import torch
from torch import Tensor

from .. import __version__, metrics, plots
from .datasets import Dataset, load_dataset
from .evaluation import Scores, predict, score, temperature_of
from .methods import METHODS
from .plots import pick_images, predictions_figure
from .recipes import RECIPES, Recipe
from .training import Trained, train, train_start


class _Finished(NamedTuple):
    trained: Trained
    logits: Tensor
    """On the target's test images."""
    scores: Scores
    """Of these."""
    source_scores: Scores
    """On the source's test images: what the domain gap costs is measured from there."""


def run(dataset_name: str, *, seed: int, iterations: int, out: Path, device: torch.device) -> int:
    """Run the demo; returns the exit code, 130 after Ctrl-C. `iterations`: of each self-training run, 0 for the default."""
    recipe = RECIPES[dataset_name]
    if iterations:
        recipe = recipe.scaled(iterations)
    finished: Dict[str, _Finished] = {}
    begun, interrupted, dataset = time.perf_counter(), False, None
    try:
        dataset = load_dataset(dataset_name, seed=seed)
        start = train_start(dataset, recipe, seed=seed, device=device)
        for method in METHODS:
            trained = train(METHODS[method], start, dataset, recipe, seed=seed, device=device)
            logits = predict(trained.student, dataset.target_test.image, device=device)
            at_home = predict(trained.student, dataset.source_test.image, device=device)
            finished[method] = _Finished(
                trained, logits, score(logits, dataset.target_test.label), score(at_home, dataset.source_test.label)
            )
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
    written = ["results.json", *_write_pictures(out, dataset, finished, device=device)]
    print(f"Written to {out}: {', '.join(written)}")
    return 130 if interrupted else 0


def table(rows: Dict[str, Scores]) -> str:
    """The table as text; percentages, NLL in nats.

    Example:
        >>> print(table({"hard": Scores(miou=0.541, accuracy=0.8, confidence=0.897, ece=0.097, nll=0.61)}))
        labels on target             mIoU %  accuracy %  confidence %   ECE %     NLL
        hard pseudo-labels             54.1        80.0          89.7    9.70   0.610
    """
    lines = [f"{'labels on target':<27}  mIoU %  accuracy %  confidence %   ECE %     NLL"]
    for method, row in rows.items():
        figures = (
            f"{100 * row.miou:8.1f}{100 * row.accuracy:12.1f}{100 * row.confidence:14.1f}{100 * row.ece:8.2f}{row.nll:8.3f}"
        )
        lines.append(f"{METHODS[method].title:<27}{figures}")
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
                "seconds": one.trained.seconds,
            }
            for method, one in finished.items()
        ],
        "seconds": seconds,
        "device": str(device),
        "versions": {"dacal_addon": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }
    (out / "results.json").write_text(json.dumps(report, indent=2) + "\n")


def _write_pictures(out: Path, dataset: Dataset, finished: Dict[str, _Finished], *, device: torch.device) -> List[str]:
    """The pictures of what is finished; returns the names of their files."""
    image, label = dataset.target_test
    tables = {METHODS[method].title: metrics.reliability(one.logits, label, input="logits") for method, one in finished.items()}
    chosen = list(pick_images(label, 4))
    predictions = {METHODS[method].title: one.logits[chosen].argmax(1) for method, one in finished.items()}
    figures = {
        "reliability.png": plots.reliability_diagram(tables),
        "predictions.png": predictions_figure(dataset, image[chosen], label[chosen], predictions),
    }
    if "dacal" in finished:
        logits, trained = finished["dacal"].logits[chosen], finished["dacal"].trained
        temperature = temperature_of(trained.teaching, trained.student, image[chosen], device=device)
        assert temperature is not None  # for mypy
        figures["temperature.png"] = plots.temperature_map(image[chosen], temperature, wrong=logits.argmax(1) != label[chosen])
    for name, figure in figures.items():
        plots.save(figure, out / name)
    return list(figures)
