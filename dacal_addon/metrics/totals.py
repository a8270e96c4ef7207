"""What is counted, and nothing else: integers and float64 sums, so that parts merge by addition."""

from typing import NamedTuple

import torch
from torch import Tensor


class Totals(NamedTuple):
    """Counts are int64, sums float64.

    C classes, K cells of confidence, L cells of a class's probability (0 without `classwise`).
    """

    images: Tensor
    """()"""
    ignored: Tensor
    """(): pixels, inside the region if there is one, whose label does not count."""
    pixels: Tensor
    """(K,): valid pixels by their confidence."""
    correct: Tensor
    """(K,): those of them whose predicted class is the target."""
    confidence: Tensor
    """(K,): sum of their confidences."""
    confusion: Tensor
    """(C, C): by target (row) and predicted class."""
    predicted_confidence: Tensor
    """(C,): sum of the confidences of the pixels predicted as the class."""
    nll: Tensor
    """(): sum."""
    brier: Tensor
    """(): sum."""
    class_pixels: Tensor
    """(C, L): valid pixels by the probability of the class."""
    class_hits: Tensor
    """(C, L): those of them whose target is the class."""
    class_confidence: Tensor
    """(C, L): sum of these probabilities."""


def zeros(num_classes: int, cells: int, class_cells: int, device: torch.device) -> Totals:
    """Nothing counted yet."""

    def count(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int64, device=device)

    def total(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64, device=device)

    by_class = (num_classes, class_cells)
    return Totals(
        images=count(),
        ignored=count(),
        pixels=count(cells),
        correct=count(cells),
        confidence=total(cells),
        confusion=count(num_classes, num_classes),
        predicted_confidence=total(num_classes),
        nll=total(),
        brier=total(),
        class_pixels=count(*by_class),
        class_hits=count(*by_class),
        class_confidence=total(*by_class),
    )


def add_(totals: Totals, other: Totals) -> None:
    """Add `other` to `totals`, in place."""
    for mine, theirs in zip(totals, other):
        mine += theirs.to(mine.device)
