"""The counts of every image, without the zeros: of 847 x 847 pairs of classes, an image has a few hundred."""

from typing import List, NamedTuple, Sequence

import torch
from torch import Tensor

from .totals import Totals


class Images(NamedTuple):
    """The totals of N images, one after the other in every field, without those of the classes' probabilities, which are most
    of them: K cells and M pairs in all."""

    cells: Tensor
    """(N,) int64: how many cells each has."""
    pairs: Tensor
    """(N,) int64: how many pairs each has."""
    ignored: Tensor
    """(N,) int64, as the next two in `Totals`."""
    nll: Tensor
    """(N,) float64."""
    brier: Tensor
    """(N,) float64."""
    predicted_confidence: Tensor
    """(N, C) float64."""
    cell: Tensor
    """(K,) int32: the cells of confidence with pixels in them, in their order."""
    pixels: Tensor
    """(K,) int64: how many."""
    correct: Tensor
    """(K,) int64."""
    confidence: Tensor
    """(K,) float64."""
    pair: Tensor
    """(M,) int32: target x C + predicted class of the pairs that occur, in their order."""
    pair_pixels: Tensor
    """(M,) int64: how often."""


"""`Images` of one."""
LENGTH_OF = {**dict.fromkeys(("cell", "pixels", "correct", "confidence"), "cells"), "pair": "pairs", "pair_pixels": "pairs"}
"""The field of `Images` that says how many entries each image has; a field that is not here has one an image."""


def image_of(totals: Totals) -> Images:
    """The totals of one image, without their zeros."""
    cell = torch.nonzero(totals.pixels, as_tuple=True)[0]
    confusion = totals.confusion.reshape(-1)
    pair = torch.nonzero(confusion, as_tuple=True)[0]
    return Images(
        totals.pixels.new_tensor([len(cell)]),
        totals.pixels.new_tensor([len(pair)]),
        # Copies: a part of a tensor keeps all of it.
        totals.ignored[None].clone(),
        totals.nll[None].clone(),
        totals.brier[None].clone(),
        totals.predicted_confidence[None].clone(),
        cell.int(),
        totals.pixels[cell],
        totals.correct[cell],
        totals.confidence[cell],
        pair.int(),
        confusion[pair],
    )


def pack(images: Sequence[Images], like: Totals) -> Images:
    """All of them as one. `like`: gives classes, kinds and device where there is none.

    Example:
        >>> from .totals import zeros
        >>> like = zeros(2, 4, 0, torch.device("cpu"))
        >>> one = image_of(like._replace(pixels=torch.tensor([0, 3, 0, 1]), confusion=torch.tensor([[3, 0], [1, 0]])))
        >>> both = pack([one, one], like)
        >>> both.cell.tolist(), both.pixels.tolist(), both.pair.tolist()
        ([1, 3, 1, 3], [3, 1, 3, 1], [0, 2, 0, 2])
        >>> [image.pair_pixels.tolist() for image in unpack(both)]
        [[3, 1], [3, 1]]
    """
    if not images:
        return Images(*(field[:0] for field in image_of(like)))
    return Images(*(torch.cat(column) for column in zip(*images)))


def unpack(images: Images) -> List[Images]:
    """The inverse of `pack`."""
    lengths = {"cells": images.cells.tolist(), "pairs": images.pairs.tolist()}
    columns = (field.split(lengths[LENGTH_OF[name]] if name in LENGTH_OF else 1) for name, field in images._asdict().items())
    # Copies: a part of a tensor keeps all of it.
    return [Images(*(field.clone() for field in row)) for row in zip(*columns)]
