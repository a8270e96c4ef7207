"""What is counted, and nothing else: integers and float64 sums, so that parts merge by addition."""

from typing import List, NamedTuple, Sequence

import torch
from torch import Tensor


class Totals(NamedTuple):
    """Counts are int64, sums float64.

    C classes, K cells of confidence, L cells of a class's probability (0 without `classwise`).
    """

    images: Tensor
    """()"""
    pixels: Tensor
    """(K,): valid pixels by their confidence."""
    correct: Tensor
    """(K,): those of them whose predicted class is the target."""
    confidence: Tensor
    """(K,): sum of their confidences."""
    confusion: Tensor
    """(C, C): by target (row) and predicted class."""
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
        pixels=count(cells),
        correct=count(cells),
        confidence=total(cells),
        confusion=count(num_classes, num_classes),
        nll=total(),
        brier=total(),
        class_pixels=count(*by_class),
        class_hits=count(*by_class),
        class_confidence=total(*by_class),
    )


def without_classes(totals: Totals) -> Totals:
    """The same without the cells of the classes' probabilities, which are most of it."""
    # New tensors: a part of the old ones would keep all of them alive.
    names = ("class_pixels", "class_hits", "class_confidence")
    return totals._replace(**{name: getattr(totals, name).new_zeros((len(totals.confusion), 0)) for name in names})


def add_(totals: Totals, other: Totals) -> None:
    """Add `other` to `totals`, in place."""
    for mine, theirs in zip(totals, other):
        mine += theirs.to(mine.device)


def stack(parts: Sequence[Totals], like: Totals) -> Totals:
    """One totals an image -> one with a leading dimension of images. `like`: gives the shapes where there is none."""
    if not parts:
        return Totals(*(field.new_zeros((0, *field.shape)) for field in like))
    return Totals(*(torch.stack(column) for column in zip(*parts)))


def unstack(stacked: Totals) -> List[Totals]:
    """The inverse of `stack`."""
    return [Totals(*row) for row in zip(*(field.unbind() for field in stacked))]


def weighted(stacked: Totals, weights: Tensor) -> List[Totals]:
    """Sums of the images' totals, each image as often as a row of `weights`, (replicates, images) float64, says."""
    rows = []
    for field in stacked:
        # Products of integers below 2^53: exact in float64, in which a matrix product is fast. 0 times infinity (the NLL of an
        # image that is not drawn) has to be 0.
        flat = field.reshape(len(field), -1).double()
        infinite = torch.isinf(flat)
        total = weights @ flat.masked_fill(infinite, 0.0)
        if bool(infinite.any()):
            total = total.masked_fill((weights @ infinite.double()) > 0, float("inf"))
        rows.append(total.to(field.dtype).reshape(len(weights), *field.shape[1:]))
    return unstack(Totals(*rows))
