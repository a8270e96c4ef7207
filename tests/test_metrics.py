import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax, softmax
from sklearn.calibration import calibration_curve
from sklearn.metrics import accuracy_score, jaccard_score, log_loss

from dacal_addon import metrics

seeds = st.integers(0, 10**6)


def predictions(seed=0, shape=(3, 4, 5, 6), dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    z = (3 * torch.randn(shape, generator=g, dtype=torch.float64)).to(dtype)
    target = torch.randint(0, shape[1], (shape[0], *shape[2:]), generator=g)
    target[torch.rand(target.shape, generator=g) < 0.3] = 255
    return z, target


def flat(z, target):
    """Probabilities (P, C) and labels (P,) of the valid pixels, by numpy."""
    p = softmax(z.double().numpy(), axis=1).transpose(0, 2, 3, 1).reshape(-1, z.shape[1])
    y = target.numpy().reshape(-1)
    return p[y != 255], y[y != 255]


def brute_ece(p, y, n_bins):
    confidence, right = p.max(1), p.argmax(1) == y
    total = 0.0
    for b in range(n_bins):
        inside = (confidence > b / n_bins) & (confidence <= (b + 1) / n_bins)
        if b == 0:
            inside |= confidence == 0
        if inside.any():
            total += inside.sum() * abs(right[inside].mean() - confidence[inside].mean())
    return total / len(y)


@settings(max_examples=30, deadline=None)
@given(seeds, st.integers(1, 30), st.integers(2, 9))
def test_ece_equals_brute_force(seed, n_bins, classes):
    z, target = predictions(seed, (2, classes, 5, 6))
    p, y = flat(z, target)
    assert metrics.ece(z, target, input="logits", n_bins=n_bins) == pytest.approx(brute_ece(p, y, n_bins), abs=1e-12)


@settings(max_examples=20, deadline=None)
@given(seeds)
def test_the_other_figures_equal_scikit_learns(seed):
    z, target = predictions(seed)
    p, y = flat(z, target)
    assert metrics.accuracy(z, target, input="logits") == pytest.approx(accuracy_score(y, p.argmax(1)), abs=1e-12)
    assert metrics.miou(z, target, input="logits") == pytest.approx(jaccard_score(y, p.argmax(1), average="macro"), abs=1e-12)
    assert metrics.nll(z, target, input="logits") == pytest.approx(log_loss(y, p, labels=range(4)), abs=1e-9)
    assert metrics.mean_confidence(z, target, input="logits") == pytest.approx(p.max(1).mean(), abs=1e-12)


def test_reliability_equals_scikit_learns_curve():
    z, target = predictions(1, (4, 3, 40, 40))
    p, y = flat(z, target)
    table = metrics.reliability(z, target, input="logits", n_bins=10)
    accuracy, confidence = calibration_curve(p.argmax(1) == y, p.max(1), n_bins=10)
    filled = table.pixels > 0
    np.testing.assert_allclose(table.accuracy[filled], accuracy, atol=1e-12)
    np.testing.assert_allclose(table.confidence[filled], confidence, atol=1e-12)
    assert int(table.pixels.sum()) == len(y)


@settings(max_examples=20, deadline=None)
@given(seeds)
def test_logits_probabilities_and_log_probabilities_agree(seed):
    z, target = predictions(seed)
    for metric in (metrics.ece, metrics.nll, metrics.accuracy, metrics.miou, metrics.mean_confidence):
        reference = metric(z, target, input="logits")
        assert metric(torch.softmax(z, 1), target, input="probs") == pytest.approx(reference, abs=1e-9)
        assert metric(log_softmax(z.numpy(), 1), target.numpy(), input="log_probs") == pytest.approx(reference, abs=1e-9)


@settings(max_examples=20, deadline=None)
@given(seeds)
def test_order_layout_and_ignored_pixels_do_not_matter(seed):
    z, target = predictions(seed)
    reference = [metric(z, target, input="logits") for metric in (metrics.ece, metrics.miou, metrics.nll)]
    order = torch.randperm(3, generator=torch.Generator().manual_seed(seed))
    shuffled = z[order].contiguous(memory_format=torch.channels_last)
    spoilt = torch.where((target[order] == 255).unsqueeze(1), torch.full_like(z, np.nan), shuffled)
    got = [metric(spoilt, target[order], input="logits") for metric in (metrics.ece, metrics.miou, metrics.nll)]
    np.testing.assert_allclose(got, reference, rtol=1e-12)


def two_class(confidences):
    p = torch.tensor(confidences, dtype=torch.float64)
    return torch.stack([p, 1 - p]).view(1, 2, 1, -1)


def test_bins_are_closed_on_the_right():
    x = two_class([0.5, 0.6, 0.75, 1.0])
    table = metrics.reliability(x, torch.zeros(1, 1, 4).long(), input="probs", n_bins=4)
    assert table.pixels.tolist() == [0, 1, 2, 1]
    assert (table.lower.tolist(), table.upper.tolist()) == ([0, 0.25, 0.5, 0.75], [0.25, 0.5, 0.75, 1])


def test_known_values():
    x, target = two_class([0.9, 0.9, 0.6, 0.6]), torch.tensor([[[0, 1, 0, 0]]])
    assert metrics.ece(x, target, input="probs") == pytest.approx((2 * 0.4 + 2 * 0.4) / 4)
    assert metrics.nll(x, target, input="probs") == pytest.approx(-(np.log(0.9) + np.log(0.1) + 2 * np.log(0.6)) / 4)
    assert metrics.miou(x, target, input="probs") == pytest.approx((3 / 4 + 0) / 2)


def test_float32_sums_would_be_wrong_at_this_size():
    """20 million pixels of confidence 0.7 and accuracy 0.7: a float32 sum sticks at 2^24."""
    n = 20_000_000
    x = torch.tensor([np.log(0.7), np.log(0.3)]).view(1, 2, 1, 1).expand(1, 2, 1, n)
    target = (torch.arange(n) % 10 >= 7).long().view(1, 1, n)
    assert metrics.ece(x, target, input="log_probs") < 1e-7


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_is_upcast_first(dtype):
    z, target = predictions(0, dtype=dtype)
    p, y = flat(z, target)
    assert metrics.ece(z, target, input="logits") == pytest.approx(brute_ece(p, y, 15), abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", ["probs", "log_probs"])
def test_rounded_probabilities_are_accepted(dtype, kind):
    z, target = predictions(0, (2, 150, 20, 20), dtype=torch.float32)
    x = (torch.softmax(z, 1) if kind == "probs" else torch.log_softmax(z, 1)).to(dtype)
    assert metrics.ece(x, target, input=kind) == pytest.approx(metrics.ece(z, target, input="logits"), abs=0.02)


def test_nothing_valid_gives_nan():
    z, target = predictions()
    for metric in (metrics.ece, metrics.nll, metrics.accuracy, metrics.miou, metrics.mean_confidence):
        assert math.isnan(metric(z, torch.full_like(target, 255), input="logits"))


def test_a_true_class_of_probability_zero_costs_infinitely_much():
    assert metrics.nll(two_class([1.0]), torch.ones(1, 1, 1).long(), input="probs") == math.inf


def spoilt(value):
    z, target = predictions()
    z[1, 2, 3, 4] = value
    target[1, 3, 4] = 0
    return z, target


@pytest.mark.parametrize(
    ("call", "error", "expected"),
    [
        (lambda: metrics.ece(*predictions(), input="logit"), ValueError, r"input to be one of 'logits', 'probs', 'log_probs'"),
        (lambda: metrics.ece(*predictions(), input="probs"), ValueError, r"sum to 1 over C, got .*pass input='logits'"),
        (lambda: metrics.ece(*predictions(), input="log_probs"), ValueError, r"log_probs whose .* sums off by"),
        (lambda: metrics.ece(*spoilt(math.nan), input="logits"), ValueError, r"finite values, got NaN or infinity"),
        (lambda: metrics.ece(*spoilt(math.inf), input="logits"), ValueError, r"finite values, got NaN or infinity"),
        (lambda: metrics.ece(torch.softmax(spoilt(math.nan)[0], 1), spoilt(0)[1], input="probs"), ValueError, r"got NaN"),
        (lambda: metrics.ece(predictions()[0], torch.full((3, 5, 6), 4), input="logits"), ValueError, r"0..3 .*the value 4"),
        (lambda: metrics.ece(predictions()[0], torch.full((3, 5, 6), -1), input="logits"), ValueError, r"the value -1"),
        (lambda: metrics.ece(predictions()[0], torch.zeros(3, 5, 6), input="logits"), ValueError, r"int64 tensor \(3, 5, 6\)"),
        (
            lambda: metrics.ece(predictions()[0], torch.zeros(3, 6, 5).long(), input="logits"),
            ValueError,
            r"got int64 \(3, 6, 5\)",
        ),
        (lambda: metrics.ece(*predictions(), input="logits", n_bins=0), ValueError, r"n_bins >= 1, got 0"),
        (lambda: metrics.miou(torch.zeros(3), torch.zeros(3), input="logits"), ValueError, r"got float32 \(3,\)"),
    ],
)
def test_errors_name_expected_got_and_remedy(call, error, expected):
    with pytest.raises(error, match=expected):
        call()
