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
_LN2 = math.log(2)
# What makes of a number |k| < 2^51 one whose lowest bits are k; and 2^52 and its bits, below which a whole number stands.
_LIFT, _WHOLE, _UINT_LIFT = 1.5 * 2.0**52, 2.0**52, np.uint64(0x433 << 52)
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
    """exp(x) of x <= 700: exactly 1 at 0, NaN of NaN, else to a relative 2e-15, growing to 3e-14 at -700."""
    x = -_LARGEST_EXPONENT if x < -_LARGEST_EXPONENT else x
    # As a number this large, k stands in the lowest bits. (AVX2 has no instruction that makes a 64-bit integer of a float.)
    lifted = x * _LOG2_E + _LIFT
    r = x - (lifted - _LIFT) * _LN2
    power = _as_float((_as_bits(lifted) << 52) + (1023 << 52))
    # (exp(r) - 1 - r) / r^2 on |r| <= log(2) / 2, interpolated in the nodes of Chebyshev. In pairs (Estrin), which do not wait
    # for each other.
    r2 = r * r
    r4 = r2 * r2
    low = (0.16666666666648294 * r + 0.5) + (0.008333333353728125 * r + 0.04166666666665134) * r2
    high = (0.00019841208729432568 * r + 0.001388888890550968) + (2.7625118447367895e-06 * r + 2.48015370286043e-05) * r2
    q = low + (high + 2.7613520147432447e-07 * r4) * r4
    return (q * r2 + r) * power + power


@_inlined
def _exp_of_any(x: Any) -> Any:
    return _exp(_LARGEST_EXPONENT if x > _LARGEST_EXPONENT else x)


@_inlined
def _log2(x: Any) -> Any:
    """log2(x) of a normal number x > 0, to 1e-12: the edges of the cells that it finds are irrational."""
    bits = np.uint64(_as_bits(x))
    # The exponent, put below a large number's, is a number again.
    whole = _as_float(np.int64((bits >> np.uint64(52)) | _UINT_LIFT)) - (_WHOLE + 1023.0)
    y = _as_float(np.int64((bits & np.uint64(0xFFFFFFFFFFFFF)) | np.uint64(1023 << 52)))
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


@_inlined
def _both_ends(probability: Any, steps: Any, uniform: Any, half: Any) -> Any:
    """`grid.cell_of(both_ends=True)`, counted from the middle; `steps`: cells between it and the nearer end."""
    steps = steps + 0.5
    return _coarse(probability, uniform) + (steps if probability > 0.5 else -steps) + half - 1.5


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
    best_of: Any,
    sure_of: Any,
    largest_of: Any,
    octaves_of: Any,
) -> Any:
    """Add P pixels to the counts; returns the sums of NLL and Brier score, and how many pixels are not what `kind` says.

    `counted` is 0 afterwards where a pixel is not. `..._of`: (P,), written for `_sweep_classes`, or (0,) where classes do not
    count. `flat`: the scores, those of class c from c x `stride` on. Indices are made unsigned where it matters: of a signed
    one, numba asks each time whether it counts from the end.
    """
    pixels = len(label)
    best, own_class = np.empty(_BLOCK, np.int32), np.empty(_BLOCK, np.int32)
    place, pair = np.empty(_BLOCK, np.int32), np.empty(_BLOCK, np.int32)
    top = np.empty(_BLOCK, flat.dtype)
    largest, total, squares, own = np.empty(_BLOCK), np.empty(_BLOCK), np.empty(_BLOCK), np.empty(_BLOCK)
    sure, cell = np.empty(_BLOCK), np.empty(_BLOCK)
    product, nll, brier = np.ones(_BLOCK), np.zeros(_BLOCK), np.zeros(_BLOCK)
    strange = np.zeros(_BLOCK)
    keep = len(best_of) > 0
    last = classes - 1.0
    beyond_cells, beyond_pairs = len(by_cell) - 1.0, len(by_pair) - 1.0
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
            row = y[i] if y[i] > 0.0 else 0.0
            own_class[i] = np.int32(row if row < last else last)
        for i in range(n):
            own[i] = flat[np.uint64(np.int64(own_class[i]) * stride + begin + i)]
        if kind == 0:  # the first one by itself where they are odd
            if classes % 2 == 1:
                for i in range(n):
                    e = _exp(first[i] - largest[i])
                    total[i] = e
                    squares[i] = e * e
            for c in range(classes % 2, classes, 2):
                one = flat[c * stride + begin : c * stride + begin + n]
                other = flat[(c + 1) * stride + begin : (c + 1) * stride + begin + n]
                for i in range(n):
                    m = largest[i]
                    e, f = _exp(one[i] - m), _exp(other[i] - m)
                    total[i] += e + f
                    squares[i] += e * e + f * f
        for c in range(classes if kind != 0 else 0):
            one = flat[c * stride + begin : c * stride + begin + n]
            if kind == 1:
                for i in range(n):
                    p = np.float64(one[i])
                    total[i] += p if p >= 0.0 else np.nan
                    squares[i] += p * p
            else:
                for i in range(n):
                    p = _exp_of_any(np.float64(one[i]))
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
                p = own[i] if kind == 1 else _exp_of_any(own[i])
                sure[i] = largest[i] if kind == 1 else _exp_of_any(largest[i])
                brier[i] += squares[i] - 2.0 * p + 1.0 if counts[i] > 0 else 0.0
                total[i] = 1.0 if abs(total[i] - 1.0) <= allowed else np.nan
            for i in range(n):
                nll[i] -= (own[i] if kind == 2 else np.log(own[i])) if counts[i] > 0 else 0.0
        for i in range(n):
            cell[i] = _fine(1.0 - sure[i], fine) + _coarse(sure[i], uniform) - 1.0
        for i in range(n):
            well = sure[i] == sure[i] and total[i] == total[i]
            good = counts[i] > 0.0 and well  # NaN has no cell
            strange[i] += 1.0 if counts[i] > 0.0 and not well else 0.0
            counts[i] = 1.0 if good else 0.0
            # What does not count is counted beyond the last one: adding it costs less than asking.
            row = y[i] if y[i] > -1.0 else -1.0
            row = row if row < last + 1.0 else last + 1.0
            k = 2.0 * cell[i] + (1.0 if np.float64(best[i]) == row else 0.0)
            place[i] = np.int32(k if good else beyond_cells)
            k = (row + 1.0) * (last + 1.0) + np.float64(best[i])
            pair[i] = np.int32(k if good else beyond_pairs)
        for i in range(n):
            k, m = np.uint64(place[i]), np.uint64(pair[i])
            by_cell[k] += 1
            confidence[k] += sure[i]
            by_pair[m] += 1
            of_pair[m] += sure[i]
        if keep:
            for i in range(n):
                best_of[begin + i] = best[i]
                sure_of[begin + i] = sure[i]
                largest_of[begin + i] = largest[i]
                octaves_of[begin + i] = _log2(sure[i])
        if number % _FACTORS == _FACTORS - 1:
            for i in range(_BLOCK):
                nll[i] += np.log(product[i])
                product[i] = 1.0
    for i in range(_BLOCK):
        nll[i] += np.log(product[i])
    return nll.sum(), brier.sum(), strange.sum()


@_compiled
def _sweep_classes(
    flat: Any,
    stride: Any,
    classes: Any,
    label: Any,
    counted: Any,
    kind: Any,
    uniform: Any,
    fine: Any,
    best_of: Any,
    sure_of: Any,
    largest_of: Any,
    octaves_of: Any,
    of_class: Any,
    class_hits: Any,
) -> None:
    """Add the probability of every class of P pixels to the counts; what `_sweep` tells of them begins as it does there.

    A class after the other takes all pixels, so that its counts stay in the cache. Pixels and probabilities lie side by side,
    both as floats, since each cell is another place in memory.
    """
    pixels, half = len(label), np.floor(fine / 2.0)
    share, cell, place = np.empty(_BLOCK), np.empty(_BLOCK), np.empty(_BLOCK, np.int32)
    # Of logits, a probability's logarithm is known. That of its rest is not: it is needed above 1/2, where only the best is.
    of_best = np.empty(pixels if kind == 0 else 0)
    for i in range(len(of_best)):
        p = sure_of[i]
        of_best[i] = _both_ends(p, _fine(2.0 * (p if p < 1.0 - p else 1.0 - p), half), uniform, half)
    for c in range(classes):
        counts, hits = of_class[c], class_hits[c]
        for begin in range(0, pixels, _BLOCK):
            n = min(_BLOCK, pixels - begin)
            one = flat[c * stride + begin : c * stride + begin + n]
            y, good = label[begin : begin + n], counted[begin : begin + n]
            if kind == 0:
                best, sure, top = best_of[begin : begin + n], sure_of[begin : begin + n], largest_of[begin : begin + n]
                octaves, highest = octaves_of[begin : begin + n], of_best[begin : begin + n]
                for i in range(n):
                    x = one[i] - top[i]
                    p = _exp(x) * sure[i]
                    steps = np.floor((x * _LOG2_E + octaves[i] + 1.0) * (-half / OCTAVES) + 0.5)
                    steps = steps if steps < half - 1.0 else half - 1.0
                    cell[i] = highest[i] if best[i] == np.int32(c) else _coarse(p, uniform) - steps + half - 2.0
                    share[i] = p
            else:
                for i in range(n):
                    p = np.float64(one[i]) if kind == 1 else _exp_of_any(np.float64(one[i]))
                    cell[i] = _both_ends(p, _fine(2.0 * (p if p < 1.0 - p else 1.0 - p), half), uniform, half)
                    share[i] = p
            for i in range(n):
                place[i] = np.int32(2.0 * cell[i] if good[i] > 0.0 else 0.0)
                share[i] = share[i] if good[i] > 0.0 else 0.0
            for i in range(n):
                k = np.uint64(place[i])
                counts[k] += good[i]
                counts[k + np.uint64(1)] += share[i]
            for i in range(n):
                if y[i] == c:
                    hits[np.uint64(place[i] >> 1)] += np.int64(good[i])


def sweep_(
    piece: Piece,
    settings: Settings,
    *,
    allowed: float,
    by_cell: Tensor,
    confidence: Tensor,
    by_pair: Tensor,
    of_pair: Tensor,
    of_class: Tensor,
    class_hits: Tensor,
) -> Tuple[float, float, bool]:
    """Add a piece's pixels to counts on the CPU, in place; returns the sums of NLL and Brier score, and whether all was well.

    Args:
        piece: of scores and not of confidences.
        allowed: how far from 1 probabilities may sum.
        by_cell, confidence: 2 K + 1, pixels and their confidences by cell, as `pixels.Judged.cell` numbers them.
        by_pair, of_pair: the same by `pixels.Judged.pair`, (C + 2) x C + 1. The last of both is for what does not count.
        of_class: (C, L, 2) float64, pixels and probabilities by the cell of a class's probability; without `classwise` L is 0.
        class_hits: that of `Totals`.
    """
    scores = piece.scores
    assert isinstance(scores, Tensor)  # for mypy
    if scores.dtype in (torch.float16, torch.bfloat16):
        half, scores = scores, torch.empty(scores.shape, dtype=torch.float32, device="cpu")
        for wide, narrow in zip(scores, half):  # a class at a time: torch would take several threads for all of them
            wide.copy_(narrow)
    classes, pixels = scores.shape
    if pixels > 1 and scores.stride(1) != 1:
        scores = scores.contiguous()
    # In one dimension: of two, the compiler would not know that pixels lie side by side.
    stride = scores.stride(0)
    flat = scores.as_strided((stride * (classes - 1) + pixels,), (1,))
    numbers, label, counted = flat.numpy(), piece.label.numpy(), piece.counted.numpy()
    kind, fine = _KINDS[settings.input], float(settings.fine_bins)
    uniform = float(uniform_cells(settings.n_bins, settings.fine_bins))
    kept = pixels if of_class.shape[1] else 0
    of_pixels = (np.empty(kept, np.int32), np.empty(kept), np.empty(kept), np.empty(kept))
    counts = (one.numpy() for one in (by_cell, confidence, by_pair, of_pair))
    nll, brier, suspicious = _sweep(numbers, stride, classes, label, counted, kind, allowed, uniform, fine, *counts, *of_pixels)
    if kept:
        both = of_class.view(classes, -1).numpy()
        _sweep_classes(numbers, stride, classes, label, counted, kind, uniform, fine, *of_pixels, both, class_hits.numpy())
    return nll, brier, suspicious == 0
