"""What one folded temperature does to a trained student: by every estimator, by few labels, and the best there is."""

from typing import Any, Dict, List

import numpy as np
import torch
from torch import Tensor

from dacal_addon.calibrate import estimate_temperature
from dacal_addon.calibrate.estimate import with_labels, without_labels
from dacal_addon.calibrate.report import as_numbers
from dacal_addon.demo.datasets import Dataset, Split
from dacal_addon.demo.evaluation import predict
from dacal_addon.demo.network import SmallUNet
from dacal_addon.metrics import CalibrationStats, ece

LABELLED = (1, 2, 5, 10, 20)
"""How many target training images have labels."""
DRAWS = 4
CPU = torch.device("cpu")
CURVE = tuple(float(t) for t in np.geomspace(0.4, 4.0, 47).round(4))
"""Temperatures at which ECE is noted, 5 % apart: other rules and constants can be tried on the rows alone."""
SHARE, FALL = 0.75, 0.40
"""The aim: that share of what the best temperature takes off the ECE, or that fall."""


def row_of(
    student: SmallUNet, dataset: Dataset, held_out: Split, *, seed: int, typical: float, closely: bool
) -> Dict[str, Any]:
    """Figures of the student as it is and of every fold, on the target's test images. In percent, NLL in nats.

    Args:
        typical: see `estimate_temperature`.
        closely: whether to ask every estimator, and try a few labelled target images.
    """
    logits, label = predict(student, dataset.target_test.image, device=CPU), dataset.target_test.label

    def ece_at(temperature: float) -> float:
        return round(100 * ece(logits / temperature, label, input="logits"), 4)

    source: Any = tuple(held_out)
    options: Dict[str, Any] = {"source": source, "target": dataset.target_train.image, "layer": "head"}
    options.update(value_range=(0.0, 1.0), typical=typical)
    asked: Dict[str, Any] = {"generator": torch.Generator().manual_seed(seed), "estimators": None if closely else {}}
    found = estimate_temperature(student, **asked, **options)
    best = best_temperature(logits, label)
    folds: Dict[str, Any] = {
        "best": {"temperature": best, **figures(logits / best, label)},
        "taken": {"temperature": found.temperature, "reason": found.reason, "abstained": found.abstained},
    }
    folds["taken"].update(figures(logits / found.temperature, label))
    for name, estimate in as_numbers(found)["estimates"].items():
        if estimate["temperature"] is not None:
            folds[name] = {**estimate, "ece": ece_at(estimate["temperature"])}
    few: Dict[str, Any] = {}
    prior = without_labels(found.estimates)
    for k in LABELLED if closely else ():
        alone: List[float] = []
        combined: List[float] = []
        for draw in range(DRAWS):
            generator = torch.Generator().manual_seed(1000 * seed + draw)
            chosen = torch.randperm(len(dataset.target_train.image), generator=generator)[:k]
            images = (dataset.target_train.image[chosen], dataset.target_train.label[chosen])
            estimates = estimate_temperature(student, labelled_target=images, estimators={}, **options).estimates
            alone.append(ece_at(estimates["labelled"].temperature))
            combined.append(ece_at(with_labels(prior, estimates["labelled"]).temperature))
        few[str(k)] = {"alone": alone, "combined": combined}
    curve = [ece_at(temperature) for temperature in CURVE]
    return {**figures(logits, label), "folds": folds, "labelled": few, "curve": curve}


def figures(logits: Tensor, label: Tensor) -> Dict[str, float]:
    """The table's figures of some logits."""
    stats = CalibrationStats(logits.shape[1], input="logits", classwise=True)
    stats.update(logits, label)
    wrong = CalibrationStats(logits.shape[1], input="logits")
    wrong.update(logits, label.masked_fill(logits.argmax(1) == label, 255))
    percent = {
        "miou": stats.miou(),
        "accuracy": stats.accuracy(),
        "confidence": stats.mean_confidence(),
        "ece": stats.ece(),
        "ece_mass": stats.ece(binning="mass"),
        "ece_classwise": stats.classwise_ece(),
        "brier": stats.brier(),
        "ece_wrong": wrong.ece(),
    }
    return {**{name: round(100 * float(value), 4) for name, value in percent.items()}, "nll": round(float(stats.nll()), 5)}


def best_temperature(logits: Tensor, label: Tensor) -> float:
    """Bound: the temperature of the least ECE of these pixels, to half a percent."""

    def best(candidates: np.ndarray) -> float:
        return float(min(candidates, key=lambda temperature: ece(logits / float(temperature), label, input="logits")))

    coarse = best(np.geomspace(0.2, 5.0, 41))
    return best(coarse * np.geomspace(1 / 1.08, 1.08, 33))


def reached(before: float, after: float, best: float) -> bool:
    """Whether an ECE has come down as far as is aimed at.

    Example:
        >>> reached(10.0, 6.0, 2.0), reached(10.0, 7.0, 6.0), reached(10.0, 9.0, 6.0)
        (True, True, False)
    """
    return after <= (1 - FALL) * before or before - after >= SHARE * (before - best)
