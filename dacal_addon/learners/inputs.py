"""What an iteration gets: images of both domains that fit each other, and what the teacher says of the target's."""

from typing import Any, List, Optional, Tuple

import torch
from torch import Tensor

from .._check import check_image, check_label, problem
from ..mixing import check_mask
from .networks import Network, Outputs


def check_batch(
    function: str, source_image: Any, source_label: Any, target_image: Any, *, teacher_image: Any = None, mask: Any = None
) -> None:
    """Raise where tensors do not fit each other, before any network is asked.

    Raises:
        ValueError, TypeError: shapes or kinds that do not fit. RuntimeError: under `torch.inference_mode`.
    """
    if getattr(torch, "is_inference_mode_enabled", bool)():  # torch >= 1.9
        remedy = "call it outside; a teacher's logits that were made inside will do"
        expected = "gradients that can be enabled"
        raise problem(function, expected=expected, got="torch.inference_mode", remedy=remedy, error=RuntimeError)
    images: List[Any] = [("source_image", source_image), ("target_image", target_image)]
    images += [] if teacher_image is None else [("teacher_image", teacher_image)]
    for what, image in images:
        check_image(function, what, image)
        if image.shape != source_image.shape:
            expected = "source and target images of one shape"
            got = f"source_image {tuple(source_image.shape)} and {what} {tuple(image.shape)}"
            raise problem(function, expected=expected, got=got, remedy="crop both domains to one size and batch")
    size = (len(source_image), *source_image.shape[2:])
    check_label(function, "source_label", source_label, shape=size)
    if mask is not None:
        check_mask(function, mask, size=size)


def ask_teacher(function: str, outputs: Outputs, teacher: Optional[Network], image: Tensor) -> Tuple[Tensor, Optional[Tensor]]:
    """(logits, features or None) of the target images, without gradient: the pass that the host would make."""
    if teacher is None:
        remedy = "pass teacher_logits=teacher(target_image), or teacher=teacher"
        raise problem(function, expected="teacher_logits or teacher", got="neither", remedy=remedy, error=TypeError)
    with torch.no_grad():
        output = teacher(image)
    return outputs.logits(function, output, image.shape[2:]), outputs.features(function, output)
