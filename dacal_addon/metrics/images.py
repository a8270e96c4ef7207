"""The counts of every image, without the zeros: of 847 x 847 pairs of classes, an image has a few hundred."""

from typing import List, NamedTuple, Sequence

import torch
from torch import Tensor

from .totals import Totals


class Image(NamedTuple):
    """The totals of one image, without those of the classes' probabilities, which are most of it."""

    ignored: Tensor
    """() int64, as the next two in `Totals`."""
    nll: Tensor
    """() float64."""
    brier: Tensor
    """() float64."""
    predicted_confidence: Tensor
    """(C,) float64."""
    cell: Tensor
    """(k,) int32: the cells of confidence with pixels in them, in their order."""
    pixels: Tensor
    """(k,) int64: how many."""
    correct: Tensor
    """(k,) int64."""
    confidence: Tensor
    """(k,) float64."""
    pair: Tensor
    """(m,) int32: target x C + predicted class of the pairs that occur, in their order."""
    pair_pixels: Tensor
    """(m,) int64: how often."""


class Images(NamedTuple):
    """N images, one after the other in every field: K cells and M pairs in all. Kinds are those of `Image`."""

    cells: Tensor
    """(N,) int64: how many cells each has."""
    pairs: Tensor
    """(N,) int64: how many pairs each has."""
    ignored: Tensor
    """(N,)"""
    nll: Tensor
    """(N,)"""
    brier: Tensor
    """(N,)"""
    predicted_confidence: Tensor
    """(N, C)"""
    cell: Tensor
    """(K,)"""
    pixels: Tensor
    """(K,)"""
    correct: Tensor
    """(K,)"""
    confidence: Tensor
    """(K,)"""
    pair: Tensor
    """(M,)"""
    pair_pixels: Tensor
    """(M,)"""


LENGTH_OF = {**dict.fromkeys(("cell", "pixels", "correct", "confidence"), "cells"), "pair": "pairs", "pair_pixels": "pairs"}
"""The field of `Images` that says how many entries each image has; a field that is not here has one an image."""


def image_of(totals: Totals) -> Image:
    """The totals of one image, without their zeros."""
    cell = torch.nonzero(totals.pixels, as_tuple=True)[0]
    confusion = totals.confusion.reshape(-1)
    pair = torch.nonzero(confusion, as_tuple=True)[0]
    return Image(
        # Copies: a part of a tensor keeps all of it.
        totals.ignored.clone(),
        totals.nll.clone(),
        totals.brier.clone(),
        totals.predicted_confidence.clone(),
        cell.int(),
        totals.pixels[cell],
        totals.correct[cell],
        totals.confidence[cell],
        pair.int(),
        confusion[pair],
    )


def pack(images: Sequence[Image], like: Totals) -> Images:
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
    parts = list(images) or [image_of(like)]
    lengths = [torch.tensor([len(getattr(image, name)) for image in images], dtype=torch.int64) for name in ("cell", "pair")]
    fields = {}
    for name in Image._fields:
        column = [getattr(image, name) for image in parts]
        joined = torch.cat(column) if name in LENGTH_OF else torch.stack(column)
        fields[name] = joined if images else joined[:0]
    cells, pairs = (length.to(like.pixels.device) for length in lengths)
    return Images(cells, pairs, **fields)


def unpack(images: Images) -> List[Image]:
    """The inverse of `pack`."""
    lengths = {"cells": images.cells.tolist(), "pairs": images.pairs.tolist()}
    columns = [
        getattr(images, name).split(lengths[LENGTH_OF[name]]) if name in LENGTH_OF else getattr(images, name).unbind()
        for name in Image._fields
    ]
    # Copies: a part of a tensor keeps all of it.
    return [Image(*(field.clone() for field in row)) for row in zip(*columns)]
