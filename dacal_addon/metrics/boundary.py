"""The pixels near the edges of objects, where segmentation networks are least sure."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .._check import as_whole, describe, problem
from ..ignoring import IgnoreIndex, is_ignored
from .arrays import Array, as_tensor


def boundary_mask(target: Array, width: int, *, ignore_index: IgnoreIndex = 255) -> Tensor:
    """Which pixels have another class within `width` pixels, diagonals included; to be passed as `region`.

    Args:
        target: (N, *S) integer classes, S any number >= 1 of spatial dimensions; or labels of `ignore_index`, which are no
            classes: next to them is no boundary.
        width: >= 1, in pixels, in every dimension.

    Returns:
        (N, *S) bool on the target's device; False at ignored pixels.

    Raises:
        ValueError, TypeError: another shape or kind, or a width below 1.

    Example:
        >>> boundary_mask(torch.tensor([[[0, 0, 0, 1, 255, 2]]]), width=1)
        tensor([[[False, False,  True,  True, False, False]]])

    Source: the boundary regions of Ding et al., Local Temperature Scaling for Probability Calibration (ICCV 2021, section 4).
    """
    width = as_whole("boundary_mask", "width", width, low=1)
    label = as_tensor("boundary_mask", "target", target)
    if label.is_floating_point() or label.dtype == torch.bool or label.dim() < 2:
        expected = "target: an integer array (N, *spatial)"
        remedy = "pass class indices, with a leading dimension of images"
        raise problem("boundary_mask", expected=expected, got=describe(label), remedy=remedy)
    masks = [_of_one(one.long(), width, ignore_index) for one in label if label.numel()]
    return torch.stack(masks) if masks else torch.zeros(label.shape, dtype=torch.bool, device=label.device)


def _of_one(label: Tensor, width: int, ignore_index: IgnoreIndex) -> Tensor:
    # A pixel is near a boundary where the largest and the smallest class of its window differ. Ignored pixels must be neither;
    # pooling pads with -inf, which is neither too.
    void = is_ignored(label, ignore_index)
    values = label.double()
    below = torch.full_like(values, -float("inf"))
    highest, lowest = (_window_max(torch.where(void, below, signed), width) for signed in (values, -values))
    return (highest != -lowest) & ~void


def _window_max(values: Tensor, width: int) -> Tensor:
    """Maximum over 2 width + 1 pixels in every dimension, one dimension after the other: the window is a product."""
    for dimension, extent in enumerate(values.shape):
        reach = min(width, extent)
        # As the rows of an image, whose columns are all dimensions behind and whose channels those in front.
        front, behind = values.shape[:dimension].numel(), values.shape[dimension + 1 :].numel()
        rows = values.reshape(1, front, extent, behind)
        values = F.max_pool2d(rows, (2 * reach + 1, 1), 1, (reach, 0)).view(values.shape)
    return values
