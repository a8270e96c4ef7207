"""Domain mixing: which pixels of a mixed image come from the source, and the mixing itself.

A mask is bool (N, 1, *S), True where the pixel is the source's; `complement` is the same cut with the sides swapped. `*S`
stands for any number of spatial dimensions: H, W of pictures, D, H, W of volumes.
"""

import math
from typing import List, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor

from ._check import as_whole, check_choice, check_label, check_number, check_tensor, describe, problem
from .ignoring import IgnoreIndex, ignored_labels, ignored_or_255, is_ignored, void_label
from .pseudo_labels import one_hot

SCOPES = ("image", "batch")


def class_mask(
    source_label: Tensor, *, generator: torch.Generator, scope: str = "image", ignore_index: IgnoreIndex = 255
) -> Tensor:
    """ClassMix: the pixels of half of the source classes (rounded up), chosen at random for each image.

    Args:
        source_label: (N, *S) int64.
        generator: the only source of randomness; may live on another device than the labels.
        scope: where an image's classes are chosen from. "image": those present in it. "batch": those present anywhere in
            the batch, as DACS and DAFormer do; with several images a mask may then hold few pixels or none.
        ignore_index: one label or several, never chosen (DAFormer, which does choose it, pastes unlabelled source pixels into
            the target).

    Returns:
        (N, 1, *S) bool, True = source pixel.

    Example:
        >>> label = torch.tensor([[[0, 0, 1], [2, 255, 3]]])
        >>> mask = class_mask(label, generator=torch.Generator().manual_seed(0))
        >>> len(label[mask[:, 0]].unique()), bool(mask[0, 0, 1, 1])
        (2, False)

    Source: ClassMix (Olsson et al., WACV 2021), across domains in DACS (Tranheden et al., WACV 2021).
    """
    check_label("class_mask", "source_label", source_label)
    check_choice("class_mask", "scope", scope, SCOPES)
    ignored = ignored_labels("class_mask", ignore_index)
    masks = []
    for label in source_label:
        classes = (label if scope == "image" else source_label).unique()
        classes = classes[~is_ignored(classes, ignored)]
        order = torch.randperm(len(classes), generator=generator, device=generator.device).to(classes.device)
        chosen = classes[order[: (len(classes) + 1) // 2]]
        masks.append((label.unsqueeze(0) == chosen.view(-1, *[1] * label.dim())).any(0, keepdim=True))
    return torch.stack(masks)


def cut_mask(
    size: Sequence[int],
    *,
    generator: torch.Generator,
    share: Tuple[float, float] = (0.25, 0.75),
    device: Union[torch.device, str] = "cpu",
) -> Tensor:
    """CutMix: one box of source pixels an image, its share of the area, aspect and place drawn at random.

    Args:
        size: (N, *S) of the labels, S of at least one spatial dimension.
        generator: the only source of randomness.
        share: the box's share of the image's area (or volume) is uniform in this range, within 0..1 (up to rounding to pixels).
        device: of the mask.

    Returns:
        (N, 1, *S) bool, True = source pixel. The box lies wholly inside the image.

    Example:
        >>> mask = cut_mask((2, 8, 8), generator=torch.Generator().manual_seed(0), share=(0.5, 0.5))
        >>> mask.shape, 0.4 < float(mask.float().mean()) < 0.6
        (torch.Size([2, 1, 8, 8]), True)

    Source: CutMix (Yun et al., ICCV 2019), for segmentation French et al. (BMVC 2020).
    """
    if len(size) < 2:
        remedy = "pass the size of the labels: label.shape"
        raise problem("cut_mask", expected="size: (N, *spatial), of two entries at least", got=repr(tuple(size)), remedy=remedy)
    n, *spatial = (as_whole("cut_mask", f"size[{i}]", value, low=1) for i, value in enumerate(size))
    check_number("cut_mask", "share[0]", share[0], low=0.0, high=1.0, rule="in [0, 1]")
    check_number("cut_mask", "share[1]", share[1], low=share[0], high=1.0, rule="in [share[0], 1]")
    d = len(spatial)
    u = torch.rand(n, 2 * d, generator=generator, device=generator.device, dtype=torch.float64).cpu()
    mask = torch.zeros(n, 1, *spatial, dtype=torch.bool)
    for i, (area, *aspects_and_place) in enumerate(u.tolist()):
        box = _box(spatial, share[0] + area * (share[1] - share[0]), aspects_and_place[: d - 1])
        corner = (math.floor(x * (side - cut + 1)) for x, side, cut in zip(aspects_and_place[d - 1 :], spatial, box))
        mask[i, 0][tuple(slice(start, start + cut) for start, cut in zip(corner, box))] = True
    return mask.to(device)


def _box(spatial: Sequence[int], area: float, aspects: Sequence[float]) -> List[int]:
    """The sides of a box with that share of the image.

    The logarithm of the share is cut at `aspects` into those of the sides, uniformly: each relative side runs from the share
    (all others are full) to 1.

    >>> _box((10, 10), 0.25, [0.5]), _box((10, 10), 0.25, [1.0]), _box((10, 10, 10), 0.125, [1 / 3, 2 / 3])
    ([5, 5], [10, 2], [5, 5, 5])
    """
    if area <= 0:
        return [0] * len(spatial)
    cuts = [1.0, *sorted(aspects, reverse=True)]
    relative = [area ** (high - low) for high, low in zip(cuts, cuts[1:])]
    last = spatial[-1] * area
    for side in relative:
        last /= side
    return [*(round(size * side) for size, side in zip(spatial, relative)), round(last)]


def complement(mask: Tensor) -> Tensor:
    """The same cut with source and target swapped.

    Example:
        >>> complement(torch.tensor([True, False]).view(1, 1, 1, 2)).flatten().tolist()
        [False, True]
    """
    check_mask("complement", mask)
    return ~mask


def mix(mask: Tensor, source: Tensor, target: Tensor, *, ignore_index: Optional[IgnoreIndex] = None) -> Tensor:
    """`source` where the mask is True, `target` elsewhere: every pixel comes from exactly one side, bit for bit.

    Args:
        mask: (N, 1, *S) bool; its number of dimensions tells hard labels from soft ones.
        source, target: both images or soft labels (N, K, *S), both hard labels or weights (N, *S), or one hard label
            (N, *S) int64 and one soft label (N, C, *S): the hard one then becomes one-hot, all zeros where it is of
            `ignore_index`.
        ignore_index: of hard labels that become one-hot; one or several. None for 255; it must be given where that is a class.

    Returns:
        A tensor like the inputs (the soft one, where they differ). Gradient flows to both sides.

    Raises:
        ValueError, TypeError: a mask that is not bool (N, 1, *S), sides that do not fit it or each other; no
            `ignore_index` where 255 is a class.

    Example:
        >>> mask = torch.tensor([True, False]).view(1, 1, 1, 2)
        >>> hard, soft = torch.tensor([[[1, 1]]]), torch.full((1, 2, 1, 2), 0.5)
        >>> mix(mask, hard, soft)[0, :, 0].T.tolist()
        [[0.0, 1.0], [0.5, 0.5]]
    """
    check_mask("mix", mask)
    for name, side in (("source", source), ("target", target)):
        n, size = len(mask), tuple(mask.shape[2:])
        expected = f"{name}: (N, K, *spatial) or (N, *spatial) with the mask's N, *spatial = {(n, *size)}"
        check_tensor("mix", name, side, expected=expected, remedy="pass tensors")
        remedy = "batch it like the mask; logits of a lower resolution are interpolated before they are labelled"
        shape = tuple(side.shape)
        if shape != (n, *size) and (side.dim() != mask.dim() or (shape[0], *shape[2:]) != (n, *size)):
            raise problem("mix", expected=expected, got=describe(side), remedy=remedy)
    if source.dim() != target.dim():
        hard, soft = (target, source) if source.dim() == mask.dim() else (source, target)
        check_label("mix", "the hard label beside a soft one", hard)
        ignored = ignored_or_255("mix", ignore_index, soft.shape[1])
        encoded = one_hot(hard, soft.shape[1], ignore_index=ignored).to(soft.dtype)
        source, target = (soft, encoded) if source.dim() == mask.dim() else (encoded, soft)
    if source.shape != target.shape or source.dtype != target.dtype:
        expected = "source and target of one shape and dtype"
        got = f"{describe(source)} and {describe(target)}"
        raise problem("mix", expected=expected, got=got, remedy="convert one of them with .to(...)")
    # where, not mask * a + (1 - mask) * b: that turns a NaN or an infinity of one side into a NaN of the other.
    return torch.where(mask if source.dim() == mask.dim() else mask[:, 0], source, target)


def blend_pairs(
    image: Tensor,
    label: Tensor,
    *,
    generator: torch.Generator,
    share: float = 0.65,
    differing: bool = False,
    ignore_index: IgnoreIndex = 255,
    shift: Optional[int] = None,
) -> Tuple[Tensor, Tensor]:
    """Blend each image with another one of the batch, `share` to 1 - `share`; the label is the dominant image's.

    Args:
        image: (N, K, *S) floating, N >= 2.
        label: (N, *S) int64, of `ignore_index` where unlabelled.
        generator: draws by how many places the batch is rotated, 1..N-1: no image meets itself.
        share: of the dominant image, in 0..1.
        differing: keep only pixels whose two labels are known and differ, the last of `ignore_index` elsewhere:
            PseudoCal's cross-cluster rule. A pixel whose two images agree is easier than any pixel of either.
        shift: by how many places, where that is drawn already.

    Returns:
        The blended images and their labels, of the shapes of the inputs.

    Raises:
        ValueError: fewer than two images, a share outside 0..1, a shift that leaves the images where they are.

    Example:
        >>> image, label = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1), torch.tensor([3, 5]).view(2, 1, 1)
        >>> blended, kept = blend_pairs(image, label, generator=torch.Generator().manual_seed(0), differing=True)
        >>> [round(x, 2) for x in blended.flatten().tolist()], kept.flatten().tolist()
        ([0.35, 0.65], [3, 5])

    Source: mixup (Zhang et al., ICLR 2018); PseudoCal (Hu et al., ICML 2024) for hard labels and the rule.
    """
    n, ignored = image.shape[0], ignored_labels("blend_pairs", ignore_index)
    if n < 2:
        raise problem("blend_pairs", expected="at least 2 images", got=f"{n}", remedy="use a larger batch")
    check_number("blend_pairs", "share", share, low=0.0, high=1.0, rule="in [0, 1]")
    if shift is None:
        shift = int(draw_shift(n, generator=generator))
    elif not 1 <= shift < n:
        remedy = "draw it by draw_shift"
        raise problem("blend_pairs", expected=f"shift: a whole number in 1..{n - 1}", got=f"{shift}", remedy=remedy)
    blended = share * image + (1 - share) * image.roll(shift, 0)
    if not differing:
        return blended, label
    other = label.roll(shift, 0)
    return blended, label.masked_fill((label == other) | is_ignored(other, ignored), void_label(ignored))


def draw_shift(n: int, *, generator: torch.Generator) -> Tensor:
    """By how many places `blend_pairs` rotates a batch of `n` images: a whole number in 1..n-1, (1,) int64."""
    return torch.randint(1, n, (1,), generator=generator, device=generator.device)


def check_mask(function: str, mask: object, *, size: Optional[Sequence[int]] = None) -> None:
    """`mask` must be a bool tensor (N, 1, *S), of the size (N, *S) where one is given."""
    expected = "mask: a bool tensor (N, 1, *spatial), True = source pixel"
    x = check_tensor(function, "mask", mask, expected=expected, remedy="use class_mask or cut_mask")
    if x.dtype != torch.bool or x.dim() < 3 or x.shape[1] != 1:
        raise problem(function, expected=expected, got=describe(x), remedy="use class_mask or cut_mask, or mask > 0.5")
    if size is not None and tuple(x.shape) != (size[0], 1, *size[1:]):
        expected = f"mask: a bool tensor {(size[0], 1, *size[1:])}"
        raise problem(function, expected=expected, got=describe(x), remedy="draw it for the label")
