"""Outer sets: the images and labels on which the virtually updated student is judged.

An outer set is any function `(DomainBatch, *, generator) -> OuterBatch`; the three here are built in. What it should look
like is the open question of the method.
"""

from typing import Callable, Dict, NamedTuple

import torch
from torch import Tensor

from ._check import problem
from .mixing import complement, mix, mixup_pairs


class DomainBatch(NamedTuple):
    """What one iteration knows: N images of each domain and the mask that the inner mix uses."""

    source_image: Tensor
    """(N, K, H, W) floating."""
    source_label: Tensor
    """(N, H, W) int64, `ignore_index` where unlabelled."""
    target_image: Tensor
    """(N, K, H, W) floating."""
    pseudo_label: Tensor
    """(N, H, W) int64: the teacher's argmax on the target."""
    weight: Tensor
    """(N, H, W) floating: the pseudo-labels' weights, 0 where they must not be used."""
    mask: Tensor
    """(N, 1, H, W) bool, True = source pixel of the inner mix."""
    ignore_index: int


class OuterBatch(NamedTuple):
    """What the outer loss sees."""

    image: Tensor
    """(N, K, H, W) floating."""
    label: Tensor
    """(N, H, W) int64, `ignore_index` where a pixel is not judged."""
    weight: Tensor
    """(N, H, W) floating."""


OuterSet = Callable[..., OuterBatch]


def source_pixels(batch: DomainBatch, *, generator: torch.Generator) -> OuterBatch:
    """The complementary mix, judged by the ground truth of its source pixels; its target pixels are only context.

    Everything that is judged has a true label, in surroundings that are half the target's.
    """
    outer = source_and_target_pixels(batch, generator=generator)
    return outer._replace(label=outer.label.masked_fill(batch.mask[:, 0], batch.ignore_index))


def source_and_target_pixels(batch: DomainBatch, *, generator: torch.Generator) -> OuterBatch:
    """The complementary mix, judged by ground truth on source pixels and the teacher's hard label on target pixels.

    No target pixel is judged by the label it was trained with in the same step: the inner mix shows the other ones.

    Source: DA-Cal (arXiv 2602.20860), complementary domain mixing.
    """
    mask = complement(batch.mask)
    return OuterBatch(
        image=mix(mask, batch.source_image, batch.target_image),
        label=mix(mask, batch.source_label, _usable(batch)),
        weight=mix(mask, torch.ones_like(batch.weight), batch.weight),
    )


def target_mixup(batch: DomainBatch, *, generator: torch.Generator, share: float = 0.65, differing: bool = False) -> OuterBatch:
    """Pairs of target images, blended `share` to 1 - `share`, judged by the hard label of the dominant one.

    A student's accuracy on such blends, measured by these labels, resembles its accuracy on the target, measured by true
    ones (PseudoCal, Hu et al., ICML 2024). `differing`: judge only where the two labels differ, as PseudoCal does. Needs at
    least two target images.
    """
    n = batch.target_image.shape[0]
    if n < 2:
        remedy = "use a larger batch or another outer set"
        raise problem("target_mixup", expected="at least 2 target images", got=f"{n}", remedy=remedy)
    image, label = mixup_pairs(
        batch.target_image,
        _usable(batch),
        generator=generator,
        share=share,
        differing=differing,
        ignore_index=batch.ignore_index,
    )
    return OuterBatch(image=image, label=label, weight=batch.weight)


def _usable(batch: DomainBatch) -> Tensor:
    """The pseudo-labels, `ignore_index` where their weight is 0: they count neither in the loss nor in its mean."""
    return batch.pseudo_label.masked_fill(batch.weight == 0, batch.ignore_index)


OUTER_SETS: Dict[str, OuterSet] = {
    "source_and_target_pixels": source_and_target_pixels,
    "source_pixels": source_pixels,
    "target_mixup": target_mixup,
}
