"""Each metric as a function of one batch: `CalibrationStats`, used once.

Arguments, everywhere: x (N, C, *S) floating, torch or numpy, S any number >= 1 of spatial dimensions; target (N, *S) integer;
`input`, what x is: "logits", "probs" or "log_probs"; `options`, those of `CalibrationStats` (`ignore_index`, `one_channel`,
`channels_last`, `reduce_zero_label`, `fine_bins`) and of its `update` (`region`, `interpolate`, `normalize`). The results are
the methods' of the same name: fractions, never percent; NaN where no pixel counts. Errors are those of the class. Several
batches, or more than one metric of the same one, are better served by the class.
"""

from typing import Any, Dict, Optional, Union

import numpy as np
import torch

from .._check import check_choice
from .arrays import Array
from .binned import ReliabilityTable
from .stats import CalibrationStats

__all__ = [
    "accuracy",
    "aurc",
    "brier",
    "classwise_ece",
    "ece",
    "ks",
    "mce",
    "mean_confidence",
    "miou",
    "nll",
    "reliability",
    "smece",
]


def reliability(
    x: Array, target: Array, *, input: str, n_bins: int = 15, binning: str = "width", **options: Any
) -> ReliabilityTable:
    """How often the prediction is right, by confidence.

    Example:
        >>> probs = torch.tensor([[0.9, 0.1], [0.6, 0.4]]).T.reshape(1, 2, 1, 2)
        >>> table = reliability(probs, torch.zeros(1, 1, 2, dtype=torch.long), input="probs", n_bins=2)
        >>> table.pixels.tolist(), [round(c, 4) for c in table.confidence.tolist()], table.accuracy.tolist()
        ([0, 2], [nan, 0.75], [nan, 1.0])
    """
    return _of(x, target, input, options, n_bins=n_bins).reliability(binning=binning)


def ece(
    x: Array,
    target: Array,
    *,
    input: str,
    n_bins: int = 15,
    norm: str = "l1",
    binning: str = "width",
    debias: bool = False,
    reduce: str = "pooled",
    **options: Any,
) -> float:
    """Expected calibration error: mean of |accuracy - confidence| over the bins, weighted by their pixels. In 0..1.

    Example:
        >>> probs = torch.tensor([[0.9, 0.1], [0.6, 0.4]]).T.reshape(1, 2, 1, 2)
        >>> round(ece(probs, torch.zeros(1, 1, 2, dtype=torch.long), input="probs", n_bins=2), 6)  # |1 - 0.75|
        0.25

    Source: Naeini et al. (AAAI 2015); Guo et al. (ICML 2017); for the options see `CalibrationStats.ece`.
    """
    stats = _of(x, target, input, options, n_bins=n_bins, per_image=reduce == "image_mean")
    return stats.ece(norm=norm, binning=binning, debias=debias, reduce=reduce)


def classwise_ece(
    x: Array,
    target: Array,
    *,
    input: str,
    average: Optional[str] = "macro",
    n_bins: int = 15,
    norm: str = "l1",
    binning: str = "width",
    **options: Any,
) -> Union[float, torch.Tensor]:
    """Calibration error of every class's probability, averaged over the classes. In 0..1.

    Example:
        >>> probs = torch.tensor([[0.75, 0.25], [0.5, 0.5]]).T.reshape(1, 2, 1, 2)
        >>> classwise_ece(probs, torch.zeros(1, 1, 2, dtype=torch.long), input="probs", n_bins=1)  # |1 - 0.625|, |0 - 0.375|
        0.375

    Source: Kull et al. (NeurIPS 2019).
    """
    stats = _of(x, target, input, options, n_bins=n_bins, classwise=True)
    return stats.classwise_ece(average, norm=norm, binning=binning)


def mce(x: Array, target: Array, *, input: str, n_bins: int = 15, **options: Any) -> float:
    """Maximum calibration error: the largest |accuracy - confidence| of a bin. In 0..1.

    Example:
        >>> probs = torch.tensor([[0.875, 0.125], [0.5, 0.5]]).T.reshape(1, 2, 1, 2)
        >>> mce(probs, torch.zeros(1, 1, 2, dtype=torch.long), input="probs", n_bins=2)  # 0.5 is in the lower bin
        0.5

    Source: Naeini et al. (AAAI 2015).
    """
    return _of(x, target, input, options, n_bins=n_bins).mce()


def ks(x: Array, target: Array, *, input: str, **options: Any) -> float:
    """Kolmogorov-Smirnov calibration error: the largest gap of the cumulative confidence and accuracy. In 0..1.

    Example:
        >>> probs = torch.tensor([[0.75, 0.25], [0.5, 0.5]]).T.reshape(1, 2, 1, 2)
        >>> ks(probs, torch.zeros(1, 1, 2, dtype=torch.long), input="probs")  # (0.5 + 0.25) / 2 in the end
        0.375

    Source: Gupta et al. (ICLR 2021).
    """
    return _of(x, target, input, options).ks()


def smece(x: Array, target: Array, *, input: str, **options: Any) -> float:
    """Smooth calibration error: the ECE without bins, smoothed by a kernel as wide as its value. In 0..1.

    Example:
        >>> probs = torch.tensor([[0.75, 0.25]] * 4).T.reshape(1, 2, 2, 2)
        >>> round(smece(probs, torch.tensor([[[0, 0], [1, 1]]]), input="probs"), 6)  # 0.75 and half of them right
        0.25

    Source: Błasiok & Nakkiran (ICLR 2024).
    """
    return _of(x, target, input, options).smece()


def brier(x: Array, target: Array, *, input: str, **options: Any) -> float:
    """Mean over the pixels of the sum over all classes of (probability - target)^2. In 0..2.

    Example:
        >>> brier(torch.zeros(1, 4, 1, 1), torch.zeros(1, 1, 1, dtype=torch.long), input="logits")  # 9/16 + 3/16
        0.75

    Source: Brier (Monthly Weather Review 1950).
    """
    return _of(x, target, input, options).brier()


def nll(x: Array, target: Array, *, input: str, **options: Any) -> float:
    """Mean negative log-likelihood of the target, in nats; infinite where a true class has probability 0.

    Example:
        >>> round(nll(torch.zeros(1, 4, 1, 1), torch.zeros(1, 1, 1, dtype=torch.long), input="logits"), 4)  # log 4
        1.3863
    """
    return _of(x, target, input, options).nll()


def aurc(x: Array, target: Array, *, input: str, **options: Any) -> float:
    """Area under the risk-coverage curve: the error rate among the k most confident pixels, averaged over k. In 0..1.

    Example:
        >>> probs = torch.tensor([[0.875, 0.125], [0.625, 0.375]]).T.reshape(1, 2, 1, 2)
        >>> aurc(probs, torch.tensor([[[0, 1]]]), input="probs")  # (0/1 + 1/2) / 2
        0.25

    Source: Geifman & El-Yaniv (NIPS 2017).
    """
    return _of(x, target, input, options).aurc()


def mean_confidence(x: Array, target: Array, *, input: str, **options: Any) -> float:
    """Mean of the largest probability over the valid pixels; above `accuracy`, a network is overconfident.

    Example:
        >>> mean_confidence(torch.zeros(1, 4, 1, 1), torch.zeros(1, 1, 1, dtype=torch.long), input="logits")
        0.25
    """
    return _of(x, target, input, options).mean_confidence()


def accuracy(x: Array, target: Array, *, input: str, **options: Any) -> float:
    """Share of the valid pixels whose most probable class is the target.

    Example:
        >>> accuracy(torch.eye(2).view(1, 2, 1, 2), torch.tensor([[[0, 0]]]), input="logits")
        0.5
    """
    return _of(x, target, input, options).accuracy()


def miou(x: Array, target: Array, *, input: str, **options: Any) -> float:
    """Mean over the classes of intersection / union, pooled over all images; classes in neither are skipped.

    Example:
        >>> miou(torch.eye(2).view(1, 2, 1, 2), torch.tensor([[[0, 0]]]), input="logits")  # (1/2 + 0/1) / 2
        0.25

    Source: the PASCAL VOC measure (Everingham et al., IJCV 2010).
    """
    return _of(x, target, input, options).miou()


def _of(x: Array, target: Array, input: str, options: Dict[str, Any], **settings: Any) -> CalibrationStats:
    check_choice("input", "input", input, ("logits", "probs", "log_probs"))
    batch = {name: options.pop(name) for name in ("region", "interpolate", "normalize") if name in options}
    # A shape without C gets a message from `update`, and so has one channel that was not declared.
    at = -1 if options.get("channels_last") else 1
    shape = x.shape if isinstance(x, (torch.Tensor, np.ndarray)) else ()
    classes = shape[at] if len(shape) > 1 and shape[at] > 1 and not options.get("one_channel") else 2
    stats = CalibrationStats(classes, input=input, **settings, **options)
    stats.update(x, target, **batch)
    return stats
