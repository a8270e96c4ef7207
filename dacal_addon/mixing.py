"""Domain mixing: which pixels of a mixed image come from the source, and the mixing itself.

A mask is bool (N, 1, H, W), True where the pixel is the source's; `complement` is the same cut with the sides swapped.
"""

import math
from typing import Optional, Sequence, Tuple, Union

import torch
from torch import Tensor

from ._check import check_choice, check_label, check_number, check_tensor, describe, problem
from .pseudo_labels import one_hot

SCOPES = ("image", "batch")


def class_mask(source_label: Tensor, *, generator: torch.Generator, scope: str = "image", ignore_index: int = 255) -> Tensor:
    """ClassMix: the pixels of half of the source classes (rounded up), chosen at random for each image.

    Args:
        source_label: (N, H, W) int64.
        generator: the only source of randomness; may live on another device than the labels.
        scope: where an image's classes are chosen from. "image": those present in it. "batch": those present anywhere in
            the batch, as DACS and DAFormer do; with several images a mask may then hold few pixels or none.
        ignore_index: never chosen (DAFormer, which does choose it, pastes unlabelled source pixels into the target).

    Returns:
        (N, 1, H, W) bool, True = source pixel.

    Example:
        >>> label = torch.tensor([[[0, 0, 1], [2, 255, 3]]])
        >>> mask = class_mask(label, generator=torch.Generator().manual_seed(0))
        >>> len(label[mask[:, 0]].unique()), bool(mask[0, 0, 1, 1])
        (2, False)

    Source: ClassMix (Olsson et al., WACV 2021), across domains in DACS (Tranheden et al., WACV 2021).
    """
    check_label("class_mask", "source_label", source_label)
    check_choice("class_mask", "scope", scope, SCOPES)
    masks = []
    for label in source_label:
        classes = (label if scope == "image" else source_label).unique()
        classes = classes[classes != ignore_index]
        order = torch.randperm(len(classes), generator=generator, device=generator.device).to(classes.device)
        chosen = classes[order[: (len(classes) + 1) // 2]]
        masks.append((label.unsqueeze(0) == chosen.view(-1, 1, 1)).any(0, keepdim=True))
    return torch.stack(masks)


def cut_mask(
    size: Tuple[int, int, int],
    *,
    generator: torch.Generator,
    share: Tuple[float, float] = (0.25, 0.75),
    device: Union[torch.device, str] = "cpu",
) -> Tensor:
    """CutMix: one box of source pixels an image, its share of the area, aspect and place drawn at random.

    Args:
        size: (N, H, W) of the labels.
        generator: the only source of randomness.
        share: the box's share of the image's area is uniform in this range, within 0..1 (up to rounding to pixels).
        device: of the mask.

    Returns:
        (N, 1, H, W) bool, True = source pixel. The box lies wholly inside the image.

    Example:
        >>> mask = cut_mask((2, 8, 8), generator=torch.Generator().manual_seed(0), share=(0.5, 0.5))
        >>> mask.shape, 0.4 < float(mask.float().mean()) < 0.6
        (torch.Size([2, 1, 8, 8]), True)

    Source: CutMix (Yun et al., ICCV 2019), for segmentation French et al. (BMVC 2020).
    """
    n, height, width = size
    for name, value in zip("NHW", size):
        check_number("cut_mask", f"{name} of size", value, low=1, rule=">= 1")
    check_number("cut_mask", "share[0]", share[0], low=0.0, high=1.0, rule="in [0, 1]")
    check_number("cut_mask", "share[1]", share[1], low=share[0], high=1.0, rule="in [share[0], 1]")
    u = torch.rand(n, 4, generator=generator, device=generator.device, dtype=torch.float64).cpu()
    mask = torch.zeros(n, 1, height, width, dtype=torch.bool)
    for i, (area, aspect, top, left) in enumerate(u.tolist()):
        area = share[0] + area * (share[1] - share[0])
        # The box's relative height runs from `area` (full width) to 1 (full height), uniformly in its logarithm.
        tall = area ** (1 - aspect) if area > 0 else 0.0
        rows, columns = round(height * tall), round(width * area / tall) if tall else 0
        y, x = math.floor(top * (height - rows + 1)), math.floor(left * (width - columns + 1))
        mask[i, 0, y : y + rows, x : x + columns] = True
    return mask.to(device)


def complement(mask: Tensor) -> Tensor:
    """The same cut with source and target swapped.

    Example:
        >>> complement(torch.tensor([True, False]).view(1, 1, 1, 2)).flatten().tolist()
        [False, True]
    """
    check_mask("complement", mask)
    return ~mask


def mix(mask: Tensor, source: Tensor, target: Tensor, *, ignore_index: int = 255) -> Tensor:
    """`source` where the mask is True, `target` elsewhere: every pixel comes from exactly one side, bit for bit.

    Args:
        mask: (N, 1, H, W) bool.
        source, target: both images or soft labels (N, K, H, W), both hard labels or weights (N, H, W), or one hard label
            (N, H, W) int64 and one soft label (N, C, H, W): the hard one then becomes one-hot, all zeros where it is
            `ignore_index`.
        ignore_index: of hard labels that become one-hot.

    Returns:
        A tensor like the inputs (the soft one, where they differ). Gradient flows to both sides.

    Raises:
        ValueError, TypeError: a mask that is not bool (N, 1, H, W), sides that do not fit it or each other.

    Example:
        >>> mask = torch.tensor([True, False]).view(1, 1, 1, 2)
        >>> hard, soft = torch.tensor([[[1, 1]]]), torch.full((1, 2, 1, 2), 0.5)
        >>> mix(mask, hard, soft)[0, :, 0].T.tolist()
        [[0.0, 1.0], [0.5, 0.5]]
    """
    check_mask("mix", mask)
    for name, side in (("source", source), ("target", target)):
        expected = f"{name}: (N, K, H, W) or (N, H, W) with the mask's N, H, W = {_pixels(mask)}"
        check_tensor("mix", name, side, expected=expected, remedy="pass tensors")
        if side.dim() not in (3, 4) or _pixels(side) != _pixels(mask):
            raise problem("mix", expected=expected, got=describe(side), remedy="resize or batch it like the mask")
    if source.dim() != target.dim():
        hard, soft = (source, target) if source.dim() == 3 else (target, source)
        check_label("mix", "the hard label beside a soft one", hard)
        encoded = one_hot(hard, soft.shape[1], ignore_index=ignore_index).to(soft.dtype)
        source, target = (encoded, soft) if source.dim() == 3 else (soft, encoded)
    if source.shape != target.shape or source.dtype != target.dtype:
        expected = "source and target of one shape and dtype"
        got = f"{describe(source)} and {describe(target)}"
        raise problem("mix", expected=expected, got=got, remedy="convert one of them with .to(...)")
    # where, not mask * a + (1 - mask) * b: that turns a NaN or an infinity of one side into a NaN of the other.
    return torch.where(mask if source.dim() == 4 else mask[:, 0], source, target)


def blend_pairs(
    image: Tensor,
    label: Tensor,
    *,
    generator: torch.Generator,
    share: float = 0.65,
    differing: bool = False,
    ignore_index: int = 255,
) -> Tuple[Tensor, Tensor]:
    """Blend each image with another one of the batch, `share` to 1 - `share`; the label is the dominant image's.

    Args:
        image: (N, K, H, W) floating, N >= 2.
        label: (N, H, W) int64, `ignore_index` where unlabelled.
        generator: draws by how many places the batch is rotated, 1..N-1: no image meets itself.
        share: of the dominant image, in 0..1.
        differing: keep only pixels whose two labels are known and differ, `ignore_index` elsewhere: PseudoCal's
            cross-cluster rule. A pixel whose two images agree is easier than any pixel of either.

    Returns:
        The blended images and their labels, of the shapes of the inputs.

    Raises:
        ValueError: fewer than two images, a share outside 0..1.

    Example:
        >>> image, label = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1), torch.tensor([3, 5]).view(2, 1, 1)
        >>> blended, kept = blend_pairs(image, label, generator=torch.Generator().manual_seed(0), differing=True)
        >>> [round(x, 2) for x in blended.flatten().tolist()], kept.flatten().tolist()
        ([0.35, 0.65], [3, 5])

    Source: mixup (Zhang et al., ICLR 2018); PseudoCal (Hu et al., ICML 2024) for hard labels and the rule.
    """
    n = image.shape[0]
    if n < 2:
        raise problem("blend_pairs", expected="at least 2 images", got=f"{n}", remedy="use a larger batch")
    check_number("blend_pairs", "share", share, low=0.0, high=1.0, rule="in [0, 1]")
    shift = int(torch.randint(1, n, (1,), generator=generator, device=generator.device))
    blended = share * image + (1 - share) * image.roll(shift, 0)
    if not differing:
        return blended, label
    other = label.roll(shift, 0)
    return blended, label.masked_fill((label == other) | (other == ignore_index), ignore_index)


def _pixels(tensor: Tensor) -> Sequence[int]:
    return (tensor.shape[0], *tensor.shape[-2:])


def check_mask(function: str, mask: object, *, size: Optional[Tuple[int, int, int]] = None) -> None:
    """`mask` must be a bool tensor (N, 1, H, W), of the size (N, H, W) where one is given."""
    expected = "mask: a bool tensor (N, 1, H, W), True = source pixel"
    x = check_tensor(function, "mask", mask, expected=expected, remedy="use class_mask or cut_mask")
    if x.dtype != torch.bool or x.dim() != 4 or x.shape[1] != 1:
        raise problem(function, expected=expected, got=describe(x), remedy="use class_mask or cut_mask, or mask > 0.5")
    if size is not None and tuple(_pixels(x)) != tuple(size):
        n, h, w = size
        raise problem(function, expected=f"mask: a bool tensor {(n, 1, h, w)}", got=describe(x), remedy="draw it for the label")
