"""The judging of `pixels`, and the counting, as one sweep in compiled code, on a CPU. Needs the extra `fast` (numba).

A block of pixels stays in the cache while everything is done with it, where torch's operations would read it a dozen times.
Exponentials and logarithms are polynomials written here, of which the compiler makes vector instructions; those of the C
library it would call one by one.
"""

import math
from typing import Any, Callable, Tuple

import numba
import numba.extending
import numpy as np
import torch
from llvmlite import ir
from torch import Tensor

from .grid import OCTAVES, ON_EDGE, uniform_cells
from .pieces import Piece
from .settings import Settings

# Pixels at once. Their scores, of 19 classes in float32, and the arrays beside them take 75 KB.
_BLOCK = 512
# Blocks after which the logarithm of a product of sums is taken: each is at most 4096, and 4096^64 = 2^768.
_FACTORS = 64
_LOG2_E = 1 / math.log(2)
# log 2 in two parts, of which the first has so few bits that its multiples are exact.
_LN2, _LN2_REST = 6.93147180369123816490e-01, 1.90821492927058770002e-10
# Exponents are clamped here: exp(-700) = 1e-304 is as good as 0, and exp(700) is no probability.
_LARGEST_EXPONENT = 700.0
_SMALLEST_DOUBT = 0.5**OCTAVES
_KINDS = {"logits": 0, "probs": 1, "log_probs": 2}
# No assumption on NaN and infinity, which are looked for; sums keep their order.
_OPTIONS: Any = {"error_model": "numpy", "fastmath": {"contract", "nsz"}}


def _inlined(function: Callable[..., Any]) -> Any:
    return numba.njit(inline="always", **_OPTIONS)(function)


def _compiled(function: Callable[..., Any]) -> Any:
    return numba.njit(nogil=True, cache=True, **_OPTIONS)(function)


def _reinterpreted(given: Any, wanted: Any, code: Any) -> Any:
    """A function of compiled code that takes the 64 bits of one kind of number for another's; numba has it for arrays only."""

    def typed(context: Any, number: Any) -> Any:
        return wanted(given), lambda context, builder, signature, arguments: builder.bitcast(arguments[0], code)

    return numba.extending.intrinsic(typed)


_as_float = _reinterpreted(numba.types.int64, numba.types.float64, ir.DoubleType())
_as_bits = _reinterpreted(numba.types.float64, numba.types.int64, ir.IntType(64))


@_inlined
def _exp(x: Any) -> Any:
    """exp(x) to a relative 2e-15, exactly 1 at 0; NaN of NaN."""
    x = -_LARGEST_EXPONENT if x < -_LARGEST_EXPONENT else x
    x = _LARGEST_EXPONENT if x > _LARGEST_EXPONENT else x
    k = np.rint(x * _LOG2_E)
    r = (x - k * _LN2) - k * _LN2_REST
    # (exp(r) - 1 - r) / r^2 on |r| <= log(2) / 2, interpolated in the nodes of Chebyshev.
    q = 2.7613520147432447e-07
    q = q * r + 2.7625118447367895e-06
    q = q * r + 2.48015370286043e-05
    q = q * r + 0.00019841208729432568
    q = q * r + 0.001388888890550968
    q = q * r + 0.008333333353728125
    q = q * r + 0.04166666666665134
    q = q * r + 0.16666666666648294
    q = q * r + 0.5
    return (q * r * r + r + 1.0) * _as_float((np.int64(k) + 1023) << 52)


@_inlined
def _log2(x: Any) -> Any:
    """log2(x) of a normal number x > 0, to 1e-12: the edges of the cells that it finds are irrational."""
    bits = _as_bits(x)
    whole = np.float64((bits >> 52) - 1023)
    y = _as_float((bits & 0xFFFFFFFFFFFFF) | (1023 << 52))
    large = y > 1.4142135623730951
    y = y * 0.5 if large else y
    whole = whole + 1.0 if large else whole
    f = (y - 1.0) / (y + 1.0)  # |f| <= 0.172, and log(y) = 2 artanh(f)
    g = f * f
    p = 1 / 13.0
    p = p * g + 1 / 11.0
    p = p * g + 1 / 9.0
    p = p * g + 1 / 7.0
    p = p * g + 1 / 5.0
    p = p * g + 1 / 3.0
    p = p * g + 1.0
    return whole + 2.0 * _LOG2_E * f * p


@_inlined
def _fine(doubt: Any, cells: Any) -> Any:
    """`grid._fine` of one number."""
    doubt = _SMALLEST_DOUBT if doubt < _SMALLEST_DOUBT else doubt
    step = np.floor(_log2(doubt) * (-cells / OCTAVES) + 0.5)
    step = 0.0 if step < 0.0 else step
    return cells - 1.0 if step > cells - 1.0 else step


@_inlined
def _coarse(probability: Any, uniform: Any) -> Any:
    step = np.ceil(probability * uniform - ON_EDGE)
    step = 1.0 if step < 1.0 else step
    return uniform if step > uniform else step


@_compiled
def _sweep(
    flat: Any,
    stride: Any,
    classes: Any,
    label: Any,
    counted: Any,
    kind: Any,
    allowed: Any,
    uniform: Any,
    fine: Any,
    by_cell: Any,
    confidence: Any,
    by_pair: Any,
    of_pair: Any,
    class_pixels: Any,
    class_hits: Any,
    class_confidence: Any,
) -> Any:
    """Add P pixels to the counts; returns the sums of NLL and Brier score, and how many pixels are not what `kind` says.

    `flat`: the scores, those of class c from c x `stride` on. Indices are made unsigned where it matters: of a signed one,
    numba asks each time whether it counts from the end.
    """
    pixels = len(label)
    best, own_class = np.empty(_BLOCK, np.int32), np.empty(_BLOCK, np.int64)
    top = np.empty(_BLOCK, flat.dtype)
    largest, total, squares, own = np.empty(_BLOCK), np.empty(_BLOCK), np.empty(_BLOCK), np.empty(_BLOCK)
    sure, cell = np.empty(_BLOCK), np.empty(_BLOCK)
    product, nll, brier = np.ones(_BLOCK), np.zeros(_BLOCK), np.zeros(_BLOCK)
    suspicious = 0
    for number, begin in enumerate(range(0, pixels, _BLOCK)):
        n = min(_BLOCK, pixels - begin)
        y, counts = label[begin : begin + n], counted[begin : begin + n]
        first = flat[begin : begin + n]
        for i in range(n):
            top[i] = first[i]
            best[i] = 0
            total[i] = 0.0
            squares[i] = 0.0
        # Two classes at a time: half of the reads and writes of what is known so far.
        for c in range(1, classes, 2):
            one = flat[c * stride + begin : c * stride + begin + n]
            d = c + 1 if c + 1 < classes else c
            other = flat[d * stride + begin : d * stride + begin + n]
            c32, d32 = np.int32(c), np.int32(d)
            for i in range(n):
                u, v = one[i], other[i]
                second = v > u
                w = v if second else u
                which = d32 if second else c32
                more = w > top[i]
                best[i] = which if more else best[i]
                top[i] = w if more else top[i]
        for i in range(n):
            largest[i] = top[i]
            row = np.int64(y[i])
            row = classes - 1 if row >= classes else row
            own_class[i] = 0 if row < 0 else row
        for i in range(n):
            own[i] = flat[np.uint64(own_class[i] * stride + begin + i)]
        for c in range(classes):
            one = flat[c * stride + begin : c * stride + begin + n]
            if kind == 0:
                for i in range(n):
                    e = _exp(one[i] - largest[i])
                    total[i] += e
                    squares[i] += e * e
            elif kind == 1:
                for i in range(n):
                    p = np.float64(one[i])
                    total[i] += p if p >= 0.0 else np.nan
                    squares[i] += p * p
            else:
                for i in range(n):
                    p = _exp(np.float64(one[i]))
                    total[i] += p
                    squares[i] += p * p
        if kind == 0:
            for i in range(n):
                of_sum = 1.0 / total[i]  # NaN if a score is, if one is +infinity or all are -infinity
                p = _exp(own[i] - largest[i]) * of_sum
                nll[i] -= own[i] - largest[i] if counts[i] > 0 else 0.0
                product[i] *= total[i] if counts[i] > 0 else 1.0
                brier[i] += squares[i] * of_sum * of_sum - 2.0 * p + 1.0 if counts[i] > 0 else 0.0
                sure[i] = of_sum
        else:
            for i in range(n):
                p = own[i] if kind == 1 else _exp(own[i])
                sure[i] = largest[i] if kind == 1 else _exp(largest[i])
                brier[i] += squares[i] - 2.0 * p + 1.0 if counts[i] > 0 else 0.0
                total[i] = 1.0 if abs(total[i] - 1.0) <= allowed else np.nan
            for i in range(n):
                nll[i] -= (own[i] if kind == 2 else np.log(own[i])) if counts[i] > 0 else 0.0
        for i in range(n):
            cell[i] = _fine(1.0 - sure[i], fine) + _coarse(sure[i], uniform) - 1.0
        for i in range(n):
            if counts[i] == 0:
                continue
            if not (sure[i] == sure[i] and total[i] == total[i]):
                suspicious += 1
                counts[i] = 0.0  # NaN has no cell; what is here is not used any more
                continue
            row = np.int64(min(max(y[i], -1.0), np.float64(classes)))
            k = np.uint64(2 * np.int64(cell[i]) + (1 if best[i] == row else 0))
            pair = np.uint64((row + 1) * classes + best[i])
            by_cell[k] += 1
            confidence[k] += sure[i]
            by_pair[pair] += 1
            of_pair[pair] += sure[i]
        if class_pixels.shape[1] > 0:
            half = np.floor(fine / 2.0)
            for c in range(classes):
                one = flat[c * stride + begin : c * stride + begin + n]
                pixels_of, hits_of, confidence_of = class_pixels[c], class_hits[c], class_confidence[c]
                if kind == 0:
                    for i in range(n):
                        squares[i] = _exp(one[i] - largest[i]) * sure[i]
                elif kind == 1:
                    for i in range(n):
                        squares[i] = one[i]
                else:
                    for i in range(n):
                        squares[i] = _exp(np.float64(one[i]))
                # As cell_of(both_ends=True), counted from the middle.
                for i in range(n):
                    p = squares[i]
                    rest = 1.0 - p
                    steps = _fine(2.0 * (p if p < rest else rest), half) + 0.5
                    cell[i] = _coarse(p, uniform) + (steps if p > 0.5 else -steps) + half - 1.5
                for i in range(n):
                    if counts[i] == 0:
                        continue
                    k = np.uint64(np.int64(cell[i]))
                    pixels_of[k] += 1
                    confidence_of[k] += squares[i]
                    if own_class[i] == c:
                        hits_of[k] += 1
        if number % _FACTORS == _FACTORS - 1:
            for i in range(_BLOCK):
                nll[i] += np.log(product[i])
                product[i] = 1.0
    for i in range(_BLOCK):
        nll[i] += np.log(product[i])
    return nll.sum(), brier.sum(), suspicious


def sweep_(
    piece: Piece,
    settings: Settings,
    *,
    allowed: float,
    by_cell: Tensor,
    confidence: Tensor,
    by_pair: Tensor,
    of_pair: Tensor,
    class_pixels: Tensor,
    class_hits: Tensor,
    class_confidence: Tensor,
) -> Tuple[float, float, bool]:
    """Add a piece's pixels to counts on the CPU, in place; returns the sums of NLL and Brier score, and whether all was well.

    Args:
        piece: of scores and not of confidences.
        allowed: how far from 1 probabilities may sum.
        by_cell, confidence: 2 K or more, pixels and their confidences by cell, as `pixels.Judged.cell` numbers them.
        by_pair, of_pair: the same by `pixels.Judged.pair`.
        class_pixels, class_hits, class_confidence: those of `Totals`; without `classwise` they have no column.
    """
    scores = piece.scores
    assert isinstance(scores, Tensor)  # for mypy
    if scores.dtype in (torch.float16, torch.bfloat16):
        half, scores = scores, torch.empty(scores.shape)
        for wide, narrow in zip(scores, half):  # a class at a time: torch would take several threads for all of them
            wide.copy_(narrow)
    classes, pixels = scores.shape
    if pixels > 1 and scores.stride(1) != 1:
        scores = scores.contiguous()
    # In one dimension: of two, the compiler would not know that pixels lie side by side.
    stride = scores.stride(0)
    flat = scores.as_strided((stride * (classes - 1) + pixels,), (1,))
    counts = (by_cell, confidence, by_pair, of_pair, class_pixels, class_hits, class_confidence)
    nll, brier, suspicious = _sweep(
        flat.numpy(),
        stride,
        classes,
        piece.label.numpy(),
        piece.counted.numpy(),
        _KINDS[settings.input],
        allowed,
        float(uniform_cells(settings.n_bins, settings.fine_bins)),
        float(settings.fine_bins),
        *(one.numpy() for one in counts),
    )
    return nll, brier, suspicious == 0
