"""The pixels near the edges of objects, where segmentation networks are least sure."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .._check import as_whole, describe, problem
from .arrays import Array, as_tensor


def boundary_mask(target: Array, width: int, *, ignore_index: int = 255) -> Tensor:
    """Which pixels have another class within `width` pixels, diagonals included; to be passed as `region`.

    Args:
        target: (N, H, W) integer classes, or `ignore_index`, which is no class: next to it is no boundary.
        width: >= 1, in pixels.

    Returns:
        (N, H, W) bool on the target's device; False at ignored pixels.

    Raises:
        ValueError, TypeError: another shape or kind, or a width below 1.

    Example:
        >>> boundary_mask(torch.tensor([[[0, 0, 0, 1, 255, 2]]]), width=1)
        tensor([[[False, False,  True,  True, False, False]]])

    Source: the boundary regions of Ding et al., Local Temperature Scaling for Probability Calibration (ICCV 2021, section 4).
    """
    as_whole("boundary_mask", "width", width, low=1)
    label = as_tensor("boundary_mask", "target", target)
    if label.is_floating_point() or label.dtype == torch.bool or label.dim() != 3:
        expected = "target: an integer array (N, H, W)"
        raise problem("boundary_mask", expected=expected, got=describe(label), remedy="pass class indices")
    masks = [_of_one(one.long(), min(width, max(one.shape)), ignore_index) for one in label if label.numel()]
    return torch.stack(masks) if masks else torch.zeros(label.shape, dtype=torch.bool, device=label.device)


def _of_one(label: Tensor, width: int, ignore_index: int) -> Tensor:
    # A pixel is near a boundary where the largest and the smallest class of its window differ. Ignored pixels must be neither;
    # pooling pads with -inf, which is neither too.
    void = label == ignore_index
    values = label.double()
    below = torch.full_like(values, -float("inf"))
    highest, lowest = (_window_max(torch.where(void, below, signed), width) for signed in (values, -values))
    return (highest != -lowest) & ~void


def _window_max(values: Tensor, width: int) -> Tensor:
    """Maximum over (2 width + 1)^2 pixels, rows first: a square window is a product of two."""
    rows = F.max_pool2d(values[None, None], (2 * width + 1, 1), 1, (width, 0))
    return F.max_pool2d(rows, (1, 2 * width + 1), 1, (0, width))[0, 0]
