"""Judged sets: images with labels on which the student (bilevel step) or the teacher (fit) is judged.

A judged set is any function `(DomainBatch, *, generator) -> JudgedBatch`; those in `JUDGED_SETS` are built in. What it should
look like is the open question of the method.
"""

from contextlib import nullcontext
from typing import Any, ContextManager, Dict, NamedTuple, Optional, Protocol

import torch
from torch import Tensor

from .._check import problem
from ..ignoring import IgnoreIndex, void_label
from ..mixing import blend_pairs, complement, draw_shift, mix
from ..preserve import in_evaluation_mode
from ..ranks import Ranks


class DomainBatch(NamedTuple):
    """What one iteration knows: N images of each domain, with the spatial dimensions S, and the mask of the mixed image."""

    source_image: Tensor
    """(N, K, *S) floating."""
    source_label: Tensor
    """(N, *S) int64, of `ignore_index` where unlabelled."""
    target_image: Tensor
    """(N, K, *S) floating, as the network sees it that is judged."""
    pseudo_label: Tensor
    """(N, *S) int64: the teacher's argmax on the target, the last of `ignore_index` on padding."""
    weight: Tensor
    """(N, *S) floating: the pseudo-labels' weights, 0 where they must not be used."""
    mask: Tensor
    """(N, 1, *S) bool, True = source pixel of the mixed image."""
    ignore_index: IgnoreIndex
    """One label, or several where the learner was given several."""
    ranks: Optional[Ranks] = None
    """The processes that share the batch, of which this is one's part; None: it is the whole batch."""


class JudgedBatch(NamedTuple):
    """Images, and what is known of them."""

    image: Tensor
    """(N, K, *S) floating."""
    label: Tensor
    """(N, *S) int64, of `ignore_index` where a pixel is not judged."""
    weight: Tensor
    """(N, *S) floating."""
    evaluation: bool = False
    """Whether the network is asked in evaluation mode, as it will be used, instead of in the mode that it is in."""


def as_judged(judged: JudgedBatch, network: Any) -> ContextManager[None]:
    """Inside, the network is in the mode in which the judged set is for it to be asked."""
    return in_evaluation_mode(network) if judged.evaluation else nullcontext()


class JudgedSet(Protocol):
    """A function of the batch; what it draws comes from `generator`."""

    def __call__(self, batch: DomainBatch, *, generator: torch.Generator) -> JudgedBatch: ...


def source_pixels(batch: DomainBatch, *, generator: torch.Generator) -> JudgedBatch:
    """The complementary mix, judged by the ground truth of its source pixels; its target pixels are only context.

    Everything that is judged has a true label, in surroundings that are half the target's.
    """
    judged = source_and_target_pixels(batch, generator=generator)
    return judged._replace(label=judged.label.masked_fill(batch.mask[:, 0], void_label(batch.ignore_index)))


def source_and_target_pixels(batch: DomainBatch, *, generator: torch.Generator) -> JudgedBatch:
    """The complementary mix, judged by ground truth on source pixels and the teacher's hard label on target pixels.

    No target pixel is judged by the label it was trained with in the same step: the inner mix shows the other ones.

    Source: DA-Cal (arXiv 2602.20860), complementary domain mixing.
    """
    mask = complement(batch.mask)
    return JudgedBatch(
        image=mix(mask, batch.source_image, batch.target_image),
        label=mix(mask, batch.source_label, usable(batch)),
        weight=mix(mask, torch.ones_like(batch.weight), batch.weight),
    )


def target_blends(
    batch: DomainBatch, *, generator: torch.Generator, share: float = 0.65, differing: bool = False
) -> JudgedBatch:
    """Pairs of target images, blended `share` to 1 - `share`, judged by the hard label of the dominant one.

    A network's accuracy on such blends, measured by these labels, resembles its accuracy on the target, measured by true
    ones (PseudoCal, Hu et al., ICML 2024). Needs at least two target images: of one process, or, where a rank has one alone,
    of all ranks, which then exchange theirs and must have as many, of one size.

    Args:
        share: of the dominant image.
        differing: judge only where the two labels differ.
    """
    image, label, ranks = batch.target_image, usable(batch), batch.ranks
    n, first, shift = len(image), 0, None
    if ranks is not None and ranks.size > 1 and ranks.anywhere(n < 2, like=batch.weight):
        image = ranks.gather("target_blends", "target_image", image)
        label = ranks.gather("target_blends", "pseudo_label", label)
        # One rotation for all: the ranks' generators need not agree.
        shift = int(ranks.first(draw_shift(len(image), generator=generator)))
        first = ranks.rank * n
    if len(image) < 2:
        remedy = "use a larger batch (also the last one: drop_last=True) or another judged set, as learner='bilevel' has"
        raise problem("target_blends", expected="at least 2 target images to blend", got=f"{n}", remedy=remedy)
    blended, kept = blend_pairs(
        image,
        label,
        generator=generator,
        share=share,
        differing=differing,
        ignore_index=batch.ignore_index,
        shift=shift,
    )
    return JudgedBatch(blended[first : first + n], kept[first : first + n], batch.weight)


def differing_blends(batch: DomainBatch, *, generator: torch.Generator, share: float = 0.65) -> JudgedBatch:
    """`target_blends`, judged only where the two labels differ, and every such pixel alike.

    Source: PseudoCal (Hu et al., ICML 2024), its cross-cluster rule.
    """
    judged = target_blends(batch, generator=generator, share=share, differing=True)
    return judged._replace(weight=torch.ones_like(judged.weight))


def usable(batch: DomainBatch) -> Tensor:
    """The pseudo-labels, the last of `ignore_index` where their weight is 0: they count neither in the loss nor in its mean."""
    return batch.pseudo_label.masked_fill(batch.weight == 0, void_label(batch.ignore_index))


NEED_TWO_IMAGES = ("target_blends", "differing_blends")
"""Names of the judged sets that blend two images of a batch: of one process, or of all ranks where each has one."""
JUDGED_SETS: Dict[str, JudgedSet] = {
    "source_and_target_pixels": source_and_target_pixels,
    "source_pixels": source_pixels,
    "target_blends": target_blends,
    "differing_blends": differing_blends,
}
