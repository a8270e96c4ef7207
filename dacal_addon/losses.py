"""The losses: soft cross-entropy trains the student, and the outer losses judge what it (or the teacher) says.

`*S` stands for any number of spatial dimensions: H, W of pictures, D, H, W of volumes.
"""

from functools import partial
from typing import Dict, Optional, Protocol, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ._check import as_whole, check_label, check_logits, check_number, check_tensor, describe, problem
from ._resize import MODES
from ._upcast import at_least_float32
from .ignoring import IgnoreIndex, ignored_or_255, is_ignored, void_label, with_one_void
from .mixing import mix
from .pseudo_labels import SoftPseudoLabels


class InnerLoss(Protocol):
    """What trains the student on mixed images: logits and soft labels (N, C, *S), weights (N, *S) -> scalar."""

    def __call__(self, logits: Tensor, soft_label: Tensor, weight: Tensor, /) -> Tensor: ...


class OuterLoss(Protocol):
    """How a judged set is judged: logits (N, C, *S), labels and weights (N, *S) -> scalar. `OUTER_LOSSES` has some.

    A learner writes one label wherever a pixel is not judged, and passes that one.
    """

    def __call__(
        self, logits: Tensor, label: Tensor, weight: Optional[Tensor] = None, *, ignore_index: int = 255
    ) -> Tensor: ...


def soft_cross_entropy(logits: Tensor, soft_label: Tensor, weight: Optional[Tensor] = None) -> Tensor:
    """Mean of -weight * sum_c soft_label * log_softmax(logits) over the labelled pixels.

    A pixel is labelled if its soft label is not all zeros; `one_hot` and `mix` write all zeros for `ignore_index`. The mean
    divides by the number of labelled pixels and not by the sum of the weights: DAFormer's weight is there to scale the
    loss down while few pixels are confident. With one-hot labels and no weight this is
    `F.cross_entropy(..., ignore_index=...)`; without any labelled pixel it is 0, where that is NaN.

    Args:
        logits: (N, C, *S), floating; half precision is upcast to float32.
        soft_label: (N, C, *S), floating, >= 0, sums to 1 over C or is all zeros.
        weight: (N, *S), floating, >= 0; None for 1 everywhere.

    Returns:
        A scalar. Gradient flows to `logits`, `soft_label` (that is how the temperature net learns) and `weight`.

    Raises:
        ValueError, TypeError: other shapes or kinds. Values are not checked: that would synchronise a GPU at every call.

    Example:
        >>> logits, label = torch.zeros(1, 4, 1, 2), torch.full((1, 4, 1, 2), 0.25)
        >>> round(soft_cross_entropy(logits, label).item(), 4)  # log 4
        1.3863

    Source: DA-Cal (arXiv 2602.20860), the loss on mixed images; weights as in DACS (Tranheden et al., WACV 2021).
    """
    check_logits("soft_cross_entropy", "logits", logits)
    expected = f"soft_label: a floating tensor {tuple(logits.shape)} like the logits"
    y = check_tensor("soft_cross_entropy", "soft_label", soft_label, expected=expected, remedy="see one_hot and mix")
    if y.dim() == logits.dim():
        check_resolution("soft_cross_entropy", logits, (len(y), *y.shape[2:]))
    if y.shape != logits.shape or not y.is_floating_point():
        remedy = "make hard labels soft with one_hot"
        raise problem("soft_cross_entropy", expected=expected, got=describe(y), remedy=remedy)
    log_p = F.log_softmax(at_least_float32(logits), dim=1)
    # A class masked out with -inf costs nothing where the label is 0 (0 * -inf would be NaN).
    loss = -(y * log_p.clamp(min=torch.finfo(log_p.dtype).min)).sum(1)
    labelled = (y.detach() > 0).any(1)
    return _mean_over(labelled, loss, _checked_weight("soft_cross_entropy", weight, loss))


def mixed_views_loss(
    logits: Tensor, labels: SoftPseudoLabels, masks: Sequence[Tensor], *, partner: Optional[SoftPseudoLabels] = None
) -> Tensor:
    """Mean of `soft_cross_entropy` over views of the target images, into each of which a part of another one was pasted.

    For loops that mix target with target. Labels and weights are mixed as the views were; a pixel that is padding in the image
    that it comes from counts neither in a view's loss nor in its mean. With hard labels and weights of "threshold" this is
    UniMatch's mean over the two strong views.

    Args:
        logits: (V * N, C, *S), floating: of N target images in V views, view by view, as of `torch.cat((view_1, view_2))`.
        labels: of the N target images.
        masks: V of them, each (N, 1, *S) bool: True where the view shows the other image.
        partner: labels of the images that were pasted; None where image i got a part of the image N - 1 - i of its own batch.

    Returns:
        A scalar; gradient as of `soft_cross_entropy`.

    Raises:
        ValueError, TypeError: another number of views; shapes or kinds that do not fit.

    Example (image 0 is of class 0, image 1 of class 1; the second pixel of each is the other one's):
        >>> from dacal_addon.pseudo_labels import SoftPseudoLabels, one_hot
        >>> hard = torch.tensor([[[0, 0]], [[1, 1]]])
        >>> labels = SoftPseudoLabels(one_hot(hard, 2), hard, torch.ones(2, 1, 2), torch.ones(2, 1, 1, 2))
        >>> mask = torch.tensor([False, True]).view(1, 1, 1, 2).expand(2, 1, 1, 2)
        >>> sure = torch.tensor([[[[9.0, -9.0]], [[-9.0, 9.0]]], [[[-9.0, 9.0]], [[9.0, -9.0]]]])
        >>> mixed_views_loss(sure, labels, [mask]).item() < 1e-7
        True

    Source: UniMatch (Yang et al., CVPR 2023) and UniMatch V2 (Yang et al., TPAMI 2025), whose strong views are CutMixed.
    """
    check_logits("mixed_views_loss", "logits", logits)
    n = len(labels.weight)
    if not masks or len(logits) != len(masks) * n:
        expected = f"logits of {n} images in as many views as there are masks, ({len(masks)} * {n}, C, *spatial)"
        remedy = "pass the logits of all views, torch.cat((view_1, view_2)), and one mask a view"
        raise problem("mixed_views_loss", expected=expected, got=describe(logits), remedy=remedy)
    if partner is None:
        partner = SoftPseudoLabels(*(part.flip(0) for part in labels))
    losses = [
        soft_cross_entropy(view, mix(mask, partner.soft_label, labels.soft_label), mix(mask, partner.weight, labels.weight))
        for view, mask in zip(logits.split(n), masks)
    ]
    return torch.stack(losses).mean()


def cross_entropy(
    logits: Tensor, label: Tensor, weight: Optional[Tensor] = None, *, ignore_index: Optional[IgnoreIndex] = None
) -> Tensor:
    """Outer loss: mean of weight * cross-entropy over the pixels whose label is not of `ignore_index`.

    `soft_cross_entropy` for hard labels, with the same mean.

    Args:
        logits: (N, C, *S), floating, at the resolution of the labels.
        label: (N, *S) int64, of `ignore_index` where not judged.
        weight: (N, *S), floating, >= 0; None for 1 everywhere.
        ignore_index: one label or several; they may be classes. None for 255; it must be given where that is one.

    Example:
        >>> logits = torch.zeros(1, 4, 1, 2)
        >>> round(cross_entropy(logits, torch.tensor([[[3, 255]]])).item(), 4)  # log 4
        1.3863
    """
    check_logits("cross_entropy", "logits", logits)
    _check_label("cross_entropy", logits, label)
    ignored = ignored_or_255("cross_entropy", ignore_index, logits.shape[1])
    label, void = with_one_void(label, ignored), void_label(ignored)
    loss = F.cross_entropy(at_least_float32(logits), label, ignore_index=void, reduction="none")
    return _mean_over(label != void, loss, _checked_weight("cross_entropy", weight, loss))


def brier(
    logits: Tensor, label: Tensor, weight: Optional[Tensor] = None, *, ignore_index: Optional[IgnoreIndex] = None
) -> Tensor:
    """Outer loss: mean of weight * |softmax - one-hot label|^2 over the judged pixels.

    Proper as cross-entropy is, but a pixel costs at most 2: labels that are themselves wrong now and then weigh less.

    Args and returns: as `cross_entropy`.

    Example:
        >>> brier(torch.zeros(1, 4, 1, 2), torch.tensor([[[3, 255]]])).item()  # 9/16 + 3/16
        0.75

    Source: Brier (Monthly Weather Review, 1950).
    """
    check_logits("brier", "logits", logits)
    _check_label("brier", logits, label)
    judged = ~is_ignored(label, ignored_or_255("brier", ignore_index, logits.shape[1]))
    p = F.softmax(at_least_float32(logits), dim=1)
    of_label = p.gather(1, label.masked_fill(~judged, 0).unsqueeze(1))[:, 0]
    return _mean_over(judged, p.pow(2).sum(1) - 2 * of_label + 1, _checked_weight("brier", weight, of_label))


def calibration_gap(
    logits: Tensor,
    label: Tensor,
    weight: Optional[Tensor] = None,
    *,
    n_bins: int = 15,
    ignore_index: Optional[IgnoreIndex] = None,
) -> Tensor:
    """Outer loss: the squared, binned calibration error with a gradient, sum_b share_b * (confidence_b - accuracy_b)^2.

    A pixel belongs to the two bins whose centres enclose its confidence, in proportion to its nearness, so that the gap is
    a continuous function of the logits; hard bins jump when a pixel changes its bin. Correctness (is the argmax the
    label?) is a constant; the gradient reaches the logits through the confidences and the bin shares.

    Args:
        logits: (N, C, *S), floating.
        label: (N, *S) int64, of `ignore_index` where not judged.
        weight: (N, *S), floating, >= 0: how much a pixel counts; None for 1 everywhere.
        n_bins: number of bins, >= 1.
        ignore_index: one label or several; they may be classes. None for 255; it must be given where that is one.

    Returns:
        A scalar in 0..1. 0 without any judged pixel.

    Example:
        >>> logits = torch.zeros(1, 2, 1, 2)  # confidence 1/2, half of the pixels right
        >>> calibration_gap(logits, torch.tensor([[[0, 1]]])).item()
        0.0
        >>> calibration_gap(logits, torch.tensor([[[0, 0]]]), n_bins=1).item()  # (1/2 - 1)^2
        0.25

    Source: the l2 calibration error of Kumar et al. (NeurIPS 2019), with soft bins after Karandikar et al. (NeurIPS 2021).
    """
    check_logits("calibration_gap", "logits", logits)
    n_bins = as_whole("calibration_gap", "n_bins", n_bins, low=1)
    _check_label("calibration_gap", logits, label)
    counted = ~is_ignored(label, ignored_or_255("calibration_gap", ignore_index, logits.shape[1]))
    judged = counted.to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
    weight = _checked_weight("calibration_gap", weight, judged)
    mass = (judged if weight is None else judged * weight).flatten()
    # max, not amax: amax shares the gradient among equal maxima, and argmax says which one is judged.
    confidence, prediction = F.softmax(at_least_float32(logits), dim=1).max(1)
    excess = confidence.flatten() - (prediction == label).flatten().to(confidence.dtype)
    position = (confidence.flatten() * n_bins - 0.5).clamp(0.0, n_bins - 1.0)
    lower = position.detach().floor().clamp(max=max(n_bins - 2, 0))
    upper_share = position - lower
    gaps, shares = confidence.new_zeros(n_bins), confidence.new_zeros(n_bins)
    for index, share in ((lower, 1 - upper_share), ((lower + 1).clamp(max=n_bins - 1), upper_share)):
        gaps = gaps.index_add(0, index.long(), mass * share * excess)
        shares = shares.index_add(0, index.long(), mass * share)
    return (gaps.pow(2) / shares.clamp(min=1e-12)).sum() / mass.sum().clamp(min=1e-12)


class CrossEntropyAndGap:
    """Outer loss: cross-entropy plus `gap_weight` times the calibration gap.

    Cross-entropy alone gains accuracy and some calibration, the gap alone calibrates at the cost of accuracy; the weight
    chooses between them.

    Example:
        >>> logits, label = torch.zeros(1, 2, 1, 2), torch.tensor([[[0, 0]]])
        >>> round(CrossEntropyAndGap(gap_weight=10.0)(logits, label).item(), 4)  # log 2 + 10 * (1/2 - 1)^2
        3.1931
    """

    def __init__(self, *, gap_weight: float = 10.0, n_bins: int = 15) -> None:
        check_number("CrossEntropyAndGap", "gap_weight", gap_weight, low=0.0, rule=">= 0")
        self.gap_weight = gap_weight
        self.n_bins = as_whole("CrossEntropyAndGap", "n_bins", n_bins, low=1)

    def __call__(
        self, logits: Tensor, label: Tensor, weight: Optional[Tensor] = None, *, ignore_index: Optional[IgnoreIndex] = None
    ) -> Tensor:
        gap = calibration_gap(logits, label, weight, n_bins=self.n_bins, ignore_index=ignore_index)
        return cross_entropy(logits, label, weight, ignore_index=ignore_index) + self.gap_weight * gap


OUTER_LOSSES: Dict[str, OuterLoss] = {
    "cross_entropy": cross_entropy,
    "brier": brier,
    "calibration_gap": calibration_gap,
    "cross_entropy_and_gap": CrossEntropyAndGap(),
}


def is_mean_over_labelled(loss: OuterLoss) -> bool:
    """Whether a loss is built in: a mean over labelled pixels (or a ratio that the scale of the weights does not change).

    Several processes get one process's value of such a loss, if each scales its weights by its share of the labelled pixels.

    Example:
        >>> is_mean_over_labelled(partial(brier, ignore_index=0)), is_mean_over_labelled(lambda *_, ignore_index: 0)
        (True, False)
    """
    while isinstance(loss, partial):
        loss = loss.func
    return isinstance(loss, CrossEntropyAndGap) or any(loss is own for own in OUTER_LOSSES.values())


def _check_label(function: str, logits: Tensor, label: object) -> None:
    check_resolution(function, logits, check_label(function, "label", label).shape)


def check_resolution(function: str, logits: Tensor, labelled: Sequence[int]) -> None:
    """`logits` must be at the resolution of labels of the size `labelled`, (N, *S): what is to be resized are the logits."""
    n, *size = labelled
    if (n, *size) == (len(logits), *logits.shape[2:]):
        return
    remedy = "pass logits and label of the same images"
    if n == len(logits) and size == list(logits.shape[1:-1]):
        remedy = f"the classes are last: logits.permute{(0, logits.dim() - 1, *range(1, logits.dim() - 1))}"
    elif n == len(logits) and len(size) == logits.dim() - 2 and len(size) in MODES:
        how = f"size={tuple(size)}, mode={MODES[len(size)]!r}, align_corners=False"
        remedy = f"interpolate the logits, not the label: F.interpolate(logits, {how})"
    elif len(size) == logits.dim() - 1 and size[0] == 1:
        remedy = "drop the label's channel dimension: label.squeeze(1)"
    expected = f"logits at the resolution of the label, {(n, 'C', *size)}"
    raise problem(function, expected=expected, got=describe(logits), remedy=remedy)


def _checked_weight(function: str, weight: Optional[Tensor], like: Tensor) -> Optional[Tensor]:
    if weight is None:
        return None
    expected = f"weight: a floating tensor {tuple(like.shape)}, one per pixel"
    x = check_tensor(function, "weight", weight, expected=expected, remedy="pass one weight per pixel")
    if x.shape != like.shape or not x.is_floating_point():
        raise problem(function, expected=expected, got=describe(x), remedy="squeeze or expand it to the labels' shape")
    return x.to(like.dtype)


def _mean_over(counted: Tensor, loss: Tensor, weight: Optional[Tensor]) -> Tensor:
    if weight is not None:
        loss = loss * weight
    # masked_fill and not a product: a NaN under an ignored pixel must not turn the mean into NaN.
    return loss.masked_fill(~counted, 0.0).sum() / counted.sum().clamp(min=1)
