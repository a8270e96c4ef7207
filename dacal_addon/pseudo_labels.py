"""From the teacher's logits and temperatures to what the student is taught: soft labels, hard labels, pixel weights.

`*S` stands for any number of spatial dimensions: H, W of pictures, D, H, W of volumes, whose voxels are pixels too.
"""

from typing import NamedTuple, Optional, Protocol, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._check import (
    as_whole,
    check_choice,
    check_classes,
    check_label,
    check_logits,
    check_number,
    check_tensor,
    describe,
    problem,
)
from ._upcast import LOGIT_FLOOR, at_least_float32
from .ignoring import IgnoreIndex, ignored_labels, ignored_or_255, is_ignored, void_label

WEIGHTS = ("ratio", "confidence", "threshold", "none")


class TemperatureNet(Protocol):
    """Logits (N, C, *S) and, if it wants any, features (N, F, *s) -> temperatures (N, 1, *S)."""

    def __call__(self, logits: Tensor, features: Tensor = ..., /) -> Tensor: ...


class SoftPseudoLabels(NamedTuple):
    """What `SoftPseudoLabeler` returns, for N images with the spatial dimensions S and C classes."""

    soft_label: Tensor
    """(N, C, *S) floating, sums to 1 over C; all zeros on padding. Carries the gradient of the temperature net, unless under
    `no_grad`."""
    pseudo_label: Tensor
    """(N, *S) int64, the teacher's argmax, which the temperature cannot change; the last of `ignore_index` on padding."""
    weight: Tensor
    """(N, *S) floating, >= 0, detached; 0 where the label must not be used."""
    temperature: Tensor
    """(N, 1, *S) floating, > 0. Carries the gradient of the temperature net, unless under `no_grad`."""


def soft_label(logits: Tensor, temperature: Tensor) -> Tensor:
    """softmax(logits / temperature) over the classes.

    Args:
        logits: (N, C, *S), floating; detached, since nobody trains a teacher through its labels.
        temperature: (N, 1, *S), > 0; the gradient flows through it.

    Returns:
        (N, C, *S), sums to 1 over C. float32 at least.

    Example:
        >>> z = torch.tensor([2.0, 0.0]).view(1, 2, 1, 1)
        >>> for T in (1.0, 2.0):
        ...     print([round(p, 3) for p in soft_label(z, torch.full((1, 1, 1, 1), T)).flatten().tolist()])
        [0.881, 0.119]
        [0.731, 0.269]
    """
    check_logits("soft_label", "logits", logits)
    shape = (len(logits), 1, *logits.shape[2:])
    expected = f"temperature: a floating tensor {shape}"
    t = check_tensor("soft_label", "temperature", temperature, expected=expected, remedy="use MetaTemperatureNet")
    if tuple(t.shape) != shape:
        raise problem("soft_label", expected=expected, got=describe(t), remedy="one temperature per pixel")
    z = logits.detach()
    # A class masked out with -inf would make the gradient of the temperature 0 * inf.
    z = at_least_float32(z).clamp(min=LOGIT_FLOOR)
    # The clamp is a copy, too: what `torch.inference_mode` made cannot be part of a graph.
    return F.softmax(z / t, dim=1)


def confidence_weight(logits: Tensor, *, mode: str = "ratio", threshold: float = 0.968) -> Tensor:
    """Per-pixel loss weights from the teacher's plain confidence, max softmax(logits).

    Never from the calibrated one: a weight that depends on the temperature would let the bilevel step lower its loss by
    switching pixels off.

    Args:
        logits: (N, C, *S), floating; detached.
        mode: "ratio": every pixel of the batch gets the share of pixels whose confidence is >= `threshold`, as in DACS
            and DAFormer; "confidence": the same on average, but within the batch in proportion to the square of a pixel's
            confidence, so that what the teacher doubts counts less;
            "threshold": 1 where the confidence is >= `threshold`, else 0; "none": 1 everywhere.
        threshold: in 0..1; 0.968 is DAFormer's.

    Returns:
        (N, *S) floating, >= 0, detached; at most 1 in all modes but "confidence".

    Example:
        >>> z = torch.tensor([9.0, 0.0, 0.0, 0.0]).view(1, 1, 2, 2)
        >>> z = torch.cat([z, torch.zeros_like(z)], dim=1)
        >>> confidence_weight(z, mode="ratio").flatten().tolist()
        [0.25, 0.25, 0.25, 0.25]
        >>> confidence_weight(z, mode="threshold").flatten().tolist()
        [1.0, 0.0, 0.0, 0.0]

    Source: DACS (Tranheden et al., WACV 2021); DAFormer (Hoyer et al., CVPR 2022), section 3.1.
    """
    check_logits("confidence_weight", "logits", logits)
    check_choice("confidence_weight", "mode", mode, WEIGHTS)
    check_number("confidence_weight", "threshold", threshold, low=0.0, high=1.0, rule="in [0, 1]")
    z = logits.detach()
    z = at_least_float32(z)
    if mode == "none":
        return torch.ones_like(z[:, 0])
    confidence = F.softmax(z, dim=1).amax(1)
    confident = (confidence >= threshold).to(z.dtype)
    if mode == "threshold":
        return confident
    if mode == "confidence":
        return confident.mean() * confidence.pow(2) / confidence.pow(2).mean()
    return confident.mean().expand_as(confident).clone()


class SoftPseudoLabeler:
    """Calibrated soft pseudo-labels for target images, with DAFormer's pixel weights.

    Args:
        temperature_net: maps (logits, features) to temperatures (N, 1, *S), as `MetaTemperatureNet` does; None for
            T = 1, uncalibrated soft labels.
        weight: "ratio" (DACS and DAFormer), "confidence", "threshold" or "none", see `confidence_weight`.
        threshold: the confidence that counts as sure, in 0..1.
        ignore_top, ignore_bottom: rows (of the dimension before the last) at the image's edges whose weight is 0. DAFormer
            ignores the rectification border (15 rows) and the car's bonnet (120 rows) of Cityscapes.

    Example:
        >>> labeler = SoftPseudoLabeler(None, weight="none", ignore_top=1)
        >>> labels = labeler(torch.randn(2, 5, 4, 4, generator=torch.Generator().manual_seed(0)))
        >>> bool((labels.soft_label.argmax(1) == labels.pseudo_label).all()), labels.weight[0, :, 0].tolist()
        (True, [0.0, 1.0, 1.0, 1.0])
    """

    def __init__(
        self,
        temperature_net: Optional[TemperatureNet],
        *,
        weight: str = "ratio",
        threshold: float = 0.968,
        ignore_top: int = 0,
        ignore_bottom: int = 0,
    ) -> None:
        check_choice("SoftPseudoLabeler", "weight", weight, WEIGHTS)
        check_number("SoftPseudoLabeler", "threshold", threshold, low=0.0, high=1.0, rule="in [0, 1]")
        self.temperature_net = temperature_net
        self.weight = weight
        self.threshold = threshold
        self.ignore_top = as_whole("SoftPseudoLabeler", "ignore_top", ignore_top, low=0)
        self.ignore_bottom = as_whole("SoftPseudoLabeler", "ignore_bottom", ignore_bottom, low=0)

    def __call__(
        self,
        teacher_logits: Tensor,
        *,
        features: Optional[Tensor] = None,
        valid: Optional[Tensor] = None,
        ignore_index: Optional[IgnoreIndex] = None,
    ) -> SoftPseudoLabels:
        """Label a batch.

        Args:
            teacher_logits: (N, C, *S) at the resolution of the labels; detached.
            features: (N, F, *s), handed to the temperature net; detached by `MetaTemperatureNet`.
            valid: (N, *S) bool, False where the image is padding: weight and soft label are 0 there, so that the pixel counts
                neither in the loss nor in its mean.
            ignore_index: one label or several; the last is what `pseudo_label` is on padding. Those that are classes too, as in
                data sets whose class 0 is "unlabelled", the teacher is never asked for, and nothing is taught them. None for
                255; it must be given where that is a class.

        Raises:
            ValueError, TypeError: inputs of another shape or kind; rows to ignore in what has none.
        """
        z, ignored = _taught(teacher_logits, ignore_index)
        if self.temperature_net is None:
            temperature = torch.ones_like(z[:, :1], dtype=torch.float64 if z.dtype == torch.float64 else torch.float32)
        elif features is None:
            temperature = self.temperature_net(z)
        else:
            temperature = self.temperature_net(z, features)
        pseudo_label, weight = self._hard_labels(z, valid, ignored)
        soft = soft_label(z, temperature)
        if valid is not None:
            soft = soft.masked_fill(~valid.unsqueeze(1), 0.0)
        return SoftPseudoLabels(soft, pseudo_label, weight, temperature)

    def hard_labels(
        self, teacher_logits: Tensor, *, valid: Optional[Tensor] = None, ignore_index: Optional[IgnoreIndex] = None
    ) -> Tuple[Tensor, Tensor]:
        """(`pseudo_label`, `weight`) of the same call, which do not need the temperatures."""
        z, ignored = _taught(teacher_logits, ignore_index)
        return self._hard_labels(z, valid, ignored)

    def _hard_labels(self, z: Tensor, valid: Optional[Tensor], ignore_index: IgnoreIndex) -> Tuple[Tensor, Tensor]:
        pseudo_label, weight = z.argmax(1), confidence_weight(z, mode=self.weight, threshold=self.threshold)
        if self.ignore_top or self.ignore_bottom:
            if z.dim() < 4:
                expected = "teacher_logits (N, C, ..., rows, columns), of which to ignore rows"
                raise problem("SoftPseudoLabeler", expected=expected, got=describe(z), remedy="pass valid=... instead")
            weight[..., : self.ignore_top, :] = 0.0
            weight[..., max(0, weight.shape[-2] - self.ignore_bottom) :, :] = 0.0
        if valid is not None:
            expected = f"a bool tensor {tuple(weight.shape)}, False on padding"
            mask = check_tensor("SoftPseudoLabeler", "valid", valid, expected=expected, remedy="pass a bool tensor")
            if mask.dtype != torch.bool or mask.shape != weight.shape:
                remedy = "squeeze the channel dimension and compare: valid > 0"
                raise problem("SoftPseudoLabeler", expected=f"valid: {expected}", got=describe(mask), remedy=remedy)
            weight = weight.masked_fill(~mask, 0.0)
            pseudo_label = pseudo_label.masked_fill(~mask, void_label(ignore_index))
        return pseudo_label, weight


def _taught(teacher_logits: Tensor, ignore_index: Optional[IgnoreIndex]) -> Tuple[Tensor, IgnoreIndex]:
    """The logits of what is taught, and the labels that do not count."""
    check_logits("SoftPseudoLabeler", "teacher_logits", teacher_logits)
    ignored = ignored_or_255("SoftPseudoLabeler", ignore_index, teacher_logits.shape[1])
    return without_classes("SoftPseudoLabeler", teacher_logits, ignored), ignored


def without_classes(function: str, teacher_logits: Tensor, ignore_index: IgnoreIndex) -> Tensor:
    """A teacher's logits, detached; they rule out the classes among `ignore_index`.

    Raises:
        ValueError, TypeError: no logits; no class is left.

    Example:
        >>> z = torch.tensor([9.0, 5.0, 1.0]).view(1, 3, 1, 1)
        >>> [without_classes("f", z, ignored).argmax(1).item() for ignored in (255, 0, (0, 1, 255))]
        [0, 1, 2]
    """
    check_logits(function, "teacher_logits", teacher_logits)
    z = teacher_logits.detach()
    ruled_out = [label for label in ignored_labels(function, ignore_index) if 0 <= label < z.shape[1]]
    if len(ruled_out) == z.shape[1]:
        remedy = "leave at least one class that is taught"
        raise problem(function, expected="classes beside ignore_index", got=f"{ignore_index}, all of them", remedy=remedy)
    if ruled_out:
        z = z.clone()
        z[:, ruled_out] = LOGIT_FLOOR
    return z


def one_hot(label: Tensor, num_classes: int, *, ignore_index: IgnoreIndex = 255) -> Tensor:
    """Hard labels as soft ones: 1 at the class, all zeros where the label is of `ignore_index` (so its loss is zero).

    Args:
        label: (N, *S) int64 of classes or `ignore_index`.
        num_classes: C.
        ignore_index: one label or several; they may be classes. The default ignores 255 of more than 255 classes too, where
            everything else in the package asks.

    Returns:
        (N, C, *S) float32.

    Raises:
        ValueError: a label that is neither a class nor of `ignore_index`.

    Example:
        >>> one_hot(torch.tensor([[[1, 255]]]), 2)[0, :, 0].T.tolist()
        [[0.0, 1.0], [0.0, 0.0]]
    """
    check_label("one_hot", "label", label)
    num_classes = as_whole("one_hot", "num_classes", num_classes, low=1)
    ignored = ignored_labels("one_hot", ignore_index)
    check_classes("one_hot", "label", label, num_classes, ignore_index)
    # Comparing instead of scattering: the ignored pixels come out as zeros without a class of their own.
    classes = torch.arange(num_classes, device=label.device).view(-1, *[1] * (label.dim() - 1))
    return ((label.unsqueeze(1) == classes) & ~is_ignored(label, ignored).unsqueeze(1)).float()
