"""One temperature for all pixels: by maximum likelihood where there are labels, by a known accuracy where there are none."""

import math
from typing import Callable, Iterator, Optional

import numpy as np
import torch
from scipy.optimize import brentq, minimize_scalar
from torch import Tensor

from .._check import check_classes, check_label, check_logits, check_number, check_tensor, describe, problem
from .._upcast import LOGIT_FLOOR
from ..ignoring import IgnoreIndex, ignored_or_255, is_ignored
from ..losses import check_resolution

BOUNDS = (0.05, 20.0)
"""Temperatures are looked for in this range."""
_LOG_BOUNDS = (math.log(BOUNDS[0]), math.log(BOUNDS[1]))
_AT_ONCE = 1 << 22  # logits that are held in float64: 32 MB


def fitted_temperature(
    logits: Tensor, label: Tensor, *, weight: Optional[Tensor] = None, ignore_index: Optional[IgnoreIndex] = None
) -> float:
    """The T in 0.05..20 with the least mean of weight * negative log-likelihood of softmax(z / T).

    The likelihood is concave in 1 / T, so that there is one maximum. Logits are turned to float64 a part at a time.

    Args:
        logits: (N, C, *S), floating.
        label: (N, *S) int64, of `ignore_index` where not judged.
        weight: (N, *S) floating, >= 0; None for 1 everywhere.
        ignore_index: one label or several; they may be classes. None for 255; it must be given where that is one.

    Returns:
        1 where no pixel is judged, or none says anything; a bound where the likelihood has no maximum inside: 0.05 if every
        pixel is right.

    Raises:
        ValueError, TypeError: inputs of another shape or kind, labels that are no classes.

    Example:
        >>> z = torch.tensor([2.0, 0.0]).view(1, 2, 1, 1).expand(1, 2, 1, 4)
        >>> fitted = fitted_temperature(z, torch.tensor([[[0, 0, 0, 1]]]))  # sigmoid(2 / T) = 3/4
        >>> math.isclose(2 / fitted, math.log(3), rel_tol=1e-4)
        True

    Source: temperature scaling (Guo et al., ICML 2017).
    """
    check_logits("fitted_temperature", "logits", logits)
    check_label("fitted_temperature", "label", label)
    check_resolution("fitted_temperature", logits, label.shape)
    ignored = ignored_or_255("fitted_temperature", ignore_index, logits.shape[1])
    check_classes("fitted_temperature", "label", label, logits.shape[1], ignored)
    mass = _mass("fitted_temperature", weight, label)
    judged = ~is_ignored(label, ignored) & (mass > 0)
    return fitted(logits.detach().movedim(1, -1)[judged], label[judged], mass[judged])


def matched_temperature(logits: Tensor, accuracy: float, *, weight: Optional[Tensor] = None) -> float:
    """The T in 0.05..20 at which the mean confidence of softmax(z / T) equals `accuracy`.

    Args:
        logits: (N, C, *S), floating.
        accuracy: in 0..1.
        weight: (N, *S) floating, >= 0: what a pixel counts; None for 1 everywhere.

    Returns:
        The bound that comes nearest where none does; 1 without any pixel.

    Example:
        >>> z = torch.tensor([2.0, 0.0]).view(1, 2, 1, 1)
        >>> math.isclose(2 / matched_temperature(z, 0.75), math.log(3), rel_tol=1e-4)
        True

    Source: as DoC (Guillory et al., ICCV 2021) and ATC (Garg et al., ICLR 2022) turn an accuracy into confidences.
    """
    check_logits("matched_temperature", "logits", logits)
    check_number("matched_temperature", "accuracy", accuracy, low=0.0, high=1.0, rule="in [0, 1]")
    mass = _mass("matched_temperature", weight, logits[:, 0])
    counted = mass > 0
    return matched(logits.detach().movedim(1, -1)[counted], accuracy, mass[counted])


def fitted(z: Tensor, label: Tensor, mass: Tensor) -> float:
    """`fitted_temperature` of P pixels: z (P, C), label (P,), mass (P,)."""
    if not len(z):
        return 1.0
    found = minimize_scalar(
        lambda log_t: likelihood(z, label, mass, log_t), bounds=_LOG_BOUNDS, method="bounded", options={"xatol": 1e-5}
    )
    # The search stops short of its bounds; a likelihood without a maximum inside is highest at one.
    ends = [float(end) for end in _LOG_BOUNDS if likelihood(z, label, mass, end) <= float(found.fun)]
    if len(ends) == 2:  # flat: logits that say nothing
        return 1.0
    return math.exp(ends[0] if ends else float(found.x))


def matched(z: Tensor, accuracy: float, mass: Tensor) -> float:
    """`matched_temperature` of P pixels: z (P, C), mass (P,)."""
    if not len(z):
        return 1.0

    def excess(log_t: float) -> float:
        return confidence(z, mass, log_t) - accuracy

    # Confidence falls with T.
    if excess(_LOG_BOUNDS[0]) <= 0:
        return BOUNDS[0]
    if excess(_LOG_BOUNDS[1]) >= 0:
        return BOUNDS[1]
    return math.exp(float(brentq(excess, *_LOG_BOUNDS, xtol=1e-6)))


def likelihood(z: Tensor, label: Tensor, mass: Tensor, log_t: float) -> float:
    """The weighted mean of the negative log-likelihood at one T."""
    return _mean(z, mass, lambda x, part: torch.logsumexp(x, 1) - x.gather(1, label[part, None])[:, 0], log_t)


def confidence(z: Tensor, mass: Tensor, log_t: float) -> float:
    """The weighted mean of max softmax(z / T)."""
    return _mean(z, mass, lambda x, part: (x.max(1)[0] - torch.logsumexp(x, 1)).exp(), log_t)


def parts(z: Tensor) -> Iterator[slice]:
    """Pixels that are turned to float64 together."""
    step = max(1, _AT_ONCE // max(1, z.shape[1]))
    for start in range(0, len(z), step):
        yield slice(start, start + step)


def at(z: Tensor, log_t: float) -> Tensor:
    """z / T in float64; a class masked out with -inf stays finite, as elsewhere in the package."""
    return z.double().clamp(min=LOGIT_FLOOR) / math.exp(log_t)


def _mean(z: Tensor, mass: Tensor, of: Callable[[Tensor, slice], Tensor], log_t: float) -> float:
    total = 0.0
    for part in parts(z):
        total += float((of(at(z[part], log_t), part) * mass[part]).sum())
    return total / float(mass.sum())


def _mass(function: str, weight: Optional[Tensor], like: Tensor) -> Tensor:
    if weight is None:
        return torch.ones_like(like, dtype=torch.float64)
    expected = f"weight: a floating tensor {tuple(like.shape)}, >= 0"
    x = check_tensor(function, "weight", weight, expected=expected, remedy="pass one weight per pixel")
    if x.shape != like.shape or not x.is_floating_point():
        raise problem(function, expected=expected, got=describe(x), remedy="squeeze or expand it to the labels' shape")
    if not bool((x >= 0).all()):
        raise problem(function, expected=expected, got="negative ones or NaN", remedy="clamp or mask them")
    return x.double()


GRID = np.linspace(*_LOG_BOUNDS, 61)
"""Values of log T, a tenth apart: what resampled images are fitted on."""


def least(curves: np.ndarray) -> np.ndarray:
    """log T of the minimum of each of B curves (B, len(GRID)), by a parabola through the least value and its neighbours.

    Example:
        >>> least((GRID[None] - np.array([[0.33], [9.0]])) ** 2).round(4).tolist()
        [0.33, 2.9957]
    """
    i = curves.argmin(1)
    inner = i.clip(1, len(GRID) - 2)
    rows = np.arange(len(curves))
    left, middle, right = (curves[rows, inner + shift] for shift in (-1, 0, 1))
    bend = left - 2 * middle + right
    step = np.where(bend > 0, (left - right) / np.where(bend > 0, 2 * bend, 1.0), 0.0).clip(-1.0, 1.0)
    out: np.ndarray = np.where(i == inner, GRID[inner] + step * (GRID[1] - GRID[0]), GRID[i])
    return out


def where(curves: np.ndarray, level: np.ndarray) -> np.ndarray:
    """log T at which each of B falling curves (B, len(GRID)) has come down to its `level` (B,); a bound where it has not.

    Example:
        >>> where(-GRID[None].repeat(2, 0), np.array([0.0, 9.0])).round(4).tolist()
        [0.0, -2.9957]
    """
    out: np.ndarray = np.array([np.interp(-y, -curve, GRID) for curve, y in zip(curves, level)])
    return out
