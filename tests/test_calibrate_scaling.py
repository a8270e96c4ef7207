"""One temperature: by maximum likelihood and by a known accuracy, against scipy in float64."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from oracles import flat, predictions
from scipy.optimize import brentq, minimize_scalar
from scipy.special import log_softmax, softmax

from dacal_addon import two_channels
from dacal_addon.calibrate import fitted_temperature, matched_temperature, scaling
from dacal_addon.calibrate.curves import (
    accuracies,
    curves_of,
    fitted_spread,
    matched_spread,
    per_image,
    resamples,
)
from dacal_addon.calibrate.pixels import Sample
from dacal_addon.calibrate.scaling import GRID


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def of_pixels(z, *others):
    """(P, C) logits and (P,) of the others, in float64."""
    return [z.double().permute(0, 2, 3, 1).flatten(0, 2).numpy(), *(other.flatten().numpy() for other in others)]


def negative_log_likelihood(z, y, w, t):
    return -(w * log_softmax(z / t, 1)[np.arange(len(y)), y]).sum() / w.sum()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("weighted", [False, True])
def test_the_likelihood_is_greatest(seed, weighted):
    logits, label = predictions(seed)
    weight = torch.rand(label.shape, generator=generator(seed), dtype=torch.float64).round() * 3 if weighted else None
    z, y, w = of_pixels(logits, label, torch.ones_like(label) if weight is None else weight)
    z, y, w = z[y != 255], y[y != 255], w[y != 255]
    oracle = minimize_scalar(partial(negative_log_likelihood, z, y, w), bounds=(0.05, 20), method="bounded").x
    assert math.isclose(fitted_temperature(logits, label, weight=weight), oracle, rel_tol=1e-4)


def test_logits_that_are_scaled_scale_the_temperature_and_half_precision_does():
    logits, label = predictions(1)
    once = fitted_temperature(logits, label)
    assert math.isclose(fitted_temperature(3 * logits, label), 3 * once, rel_tol=1e-4)
    assert math.isclose(fitted_temperature(logits.half(), label), once, rel_tol=1e-2)
    confidence = 0.5 * float(softmax(flat(logits, label)[0], 1).max(1).mean()) + 0.3
    matched = matched_temperature(logits, confidence)
    assert math.isclose(matched_temperature(3 * logits, confidence), 3 * matched, rel_tol=1e-4)


def test_few_logits_at_a_time_give_the_same(monkeypatch):
    logits, label = predictions(2)
    weight = torch.rand(label.shape, generator=generator())
    before = fitted_temperature(logits, label, weight=weight), matched_temperature(logits, 0.7, weight=weight)
    monkeypatch.setattr(scaling, "_AT_ONCE", 28)
    assert len(list(scaling.parts(torch.zeros(90, 4)))) == 13
    after = fitted_temperature(logits, label, weight=weight), matched_temperature(logits, 0.7, weight=weight)
    assert before == pytest.approx(after, rel=1e-9)


@pytest.mark.parametrize("accuracy", [0.4, 0.7, 0.97])
def test_the_mean_confidence_meets_the_accuracy(accuracy):
    logits, _ = predictions(3)
    weight = torch.rand(logits[:, 0].shape, generator=generator(), dtype=torch.float64)
    z, w = of_pixels(logits, weight)
    oracle = brentq(lambda t: (w * softmax(z / t, 1).max(1)).sum() / w.sum() - accuracy, 0.05, 20)
    assert math.isclose(matched_temperature(logits, accuracy, weight=weight), oracle, rel_tol=1e-5)


def test_what_has_no_answer_inside_gives_a_bound_or_one():
    logits, label = predictions(0)
    assert fitted_temperature(logits, logits.argmax(1)) == pytest.approx(0.05)
    assert fitted_temperature(logits, logits.argmin(1)) == pytest.approx(20.0)
    assert fitted_temperature(torch.zeros(1, 4, 2, 2), torch.zeros(1, 2, 2).long()) == 1.0
    assert fitted_temperature(logits, torch.full_like(label, 255)) == 1.0
    assert fitted_temperature(logits, label, weight=torch.zeros(label.shape)) == 1.0
    assert matched_temperature(logits, 1.0) == 0.05
    assert matched_temperature(logits, 0.0) == 20.0
    assert matched_temperature(logits, 0.5, weight=torch.zeros(label.shape)) == 1.0


def test_a_class_masked_out_counts_as_one_that_nobody_expects():
    logits, label = predictions(0)
    masked = torch.cat([logits, torch.full_like(logits[:, :1], -math.inf)], 1)
    assert fitted_temperature(masked, label) == pytest.approx(fitted_temperature(logits, label), rel=1e-6)
    assert matched_temperature(masked, 0.7) == pytest.approx(matched_temperature(logits, 0.7), rel=1e-6)


def test_wrong_inputs_are_named():
    logits, label = predictions(0)
    for arguments, message in [
        ((logits[0, 0], label), "fitted_temperature: expected logits: a floating tensor"),
        ((logits, label[:, 1:]), r"fitted_temperature: expected logits at .* \(3, 'C', 4, 6\).*; interpolate the logits, not"),
        ((logits, label.clamp(max=77)), "expected label: classes 0..3 or ignore_index=255, got the value 77"),
    ]:
        with pytest.raises(ValueError, match=message):
            fitted_temperature(*arguments)
    with pytest.raises(ValueError, match=r"weight: a floating tensor \(3, 5, 6\), >= 0, got negative ones or NaN"):
        fitted_temperature(logits, label, weight=-torch.ones(label.shape))
    with pytest.raises(ValueError, match=r"matched_temperature: expected accuracy in \[0, 1\], got 1\.5"):
        matched_temperature(logits, 1.5)


# Pixels and curves


def sampled(pixels, seed=0):
    logits, label = predictions(seed, shape=(5, 4, 6, 7))
    sample = Sample(pixels, 255, generator())
    sample.add(logits[:2], label[:2])
    sample.add(logits[2:], label[2:])
    return sample.pixels(), logits, label


def test_a_sample_of_all_pixels_is_all_judged_ones():
    pixels, logits, label = sampled(99)
    assert pixels.images == 5
    assert bool((pixels.weight == 1).all())
    for i in range(5):
        judged = label[i] != 255
        rows = torch.cat([logits[i, :, judged].t().float(), label[i][judged][:, None].float()], 1)
        found = torch.cat([pixels.logits, pixels.label[:, None].float()], 1)[pixels.image == i]
        assert sorted(map(tuple, rows.tolist())) == sorted(map(tuple, found.tolist()))


def test_a_small_sample_stands_for_as_many_pixels_as_are_judged():
    pixels, _, label = sampled(5)
    judged = (label != 255).flatten(1).sum(1)
    assert torch.bincount(pixels.image).tolist() == [5] * 5
    assert per_image(pixels, pixels.weight).tolist() == pytest.approx(judged.tolist())


def test_curves_are_sums_over_each_images_pixels(monkeypatch):
    pixels, logits, label = sampled(99)
    monkeypatch.setattr(scaling, "_AT_ONCE", 40)
    curves, doubled = (curves_of(pixels._replace(weight=w * pixels.weight)) for w in (1, 2))
    assert all(np.allclose(2 * one, other, rtol=1e-12) for one, other in zip(curves, doubled))
    for i in range(5):
        z, y = of_pixels(logits[i : i + 1].float(), label[i : i + 1])
        z, y = z[y != 255], y[y != 255]
        for g in (0, 30, 44, 60):
            p = softmax(z / math.exp(GRID[g]), 1)
            assert curves.confidence[i, g] == pytest.approx(p.max(1).sum(), rel=1e-9)
            assert curves.likelihood[i, g] == pytest.approx(-np.log(p[np.arange(len(y)), y]).sum(), rel=1e-6)
        assert curves.correct[i] == (z.argmax(1) == y).sum()
        assert curves.weight[i] == len(y)


def test_images_that_are_drawn_anew_are_fitted_as_if_they_were_there():
    pixels, logits, label = sampled(99)
    curves, times = curves_of(pixels), resamples(5, generator())
    assert times.shape == (200, 5)
    assert bool((times.sum(1) == 5).all())
    log_t, right = [], []
    for row in times[:20]:
        index = np.repeat(np.arange(5), row.astype(int))
        log_t.append(math.log(fitted_temperature(logits[index].float(), label[index])))
        judged = label[index] != 255
        right.append(float((logits[index].argmax(1) == label[index])[judged].double().mean()))
    assert fitted_spread(curves, times[:20]) == pytest.approx(np.std(log_t), rel=0.02)
    assert accuracies(curves, times[:20]).tolist() == pytest.approx(right)
    # Curves know judged pixels alone, and so do these temperatures.
    judged = torch.ones_like(label, dtype=torch.float64).masked_fill(label == 255, 0.0)
    log_t = []
    for row, accuracy in zip(times[:20], right):
        index = np.repeat(np.arange(5), row.astype(int))
        log_t.append(math.log(matched_temperature(logits[index].float(), accuracy, weight=judged[index])))
    assert matched_spread(curves, times[:20], np.array(right)) == pytest.approx(np.std(log_t), rel=0.03)


@pytest.mark.parametrize("spatial", [(30,), (5, 2, 3)])
def test_a_voxel_counts_as_a_pixel_does(spatial):
    logits, label = predictions(4)
    weight = torch.rand(label.shape, generator=generator())
    shaped = logits.reshape(3, 4, *spatial), label.reshape(3, *spatial)
    found = fitted_temperature(*shaped, weight=weight.reshape(3, *spatial))
    assert found == pytest.approx(fitted_temperature(logits, label, weight=weight), rel=1e-9)
    assert matched_temperature(shaped[0], 0.7) == pytest.approx(matched_temperature(logits, 0.7), rel=1e-9)


def test_several_labels_are_not_judged():
    logits, label = predictions(4)
    one = label.masked_fill(label == 2, 255)
    found = fitted_temperature(logits, label, ignore_index=(255, 2))
    assert found == fitted_temperature(logits, one)
    assert found != pytest.approx(fitted_temperature(logits, label), rel=1e-3)


@pytest.mark.parametrize("spatial", [(2000,), (10, 10, 20)])
def test_one_sigmoid_channel_is_fitted_as_two(spatial):
    """Labels drawn at the sigmoid of the channel, which then is 3 times as large."""
    z = 2 * torch.randn(1, 1, *spatial, generator=generator(), dtype=torch.float64)
    label = (torch.rand(1, *spatial, generator=generator(1), dtype=torch.float64) < z.sigmoid()[:, 0]).long()
    z, y = 3 * z, label.flatten().numpy()
    x = z.flatten().numpy()
    oracle = minimize_scalar(lambda t: np.logaddexp(0, np.where(y == 1, -x, x) / t).mean(), bounds=(0.05, 20), method="bounded")
    found = fitted_temperature(two_channels(z), label)
    assert found == pytest.approx(oracle.x, rel=1e-3)
    assert found == pytest.approx(3, rel=0.15)


def test_class_255_is_not_dropped_in_silence():
    z = torch.randn(1, 256, 4, 5, generator=torch.Generator().manual_seed(0))
    label = z.argmax(1)
    label[:, 0], label[:, 1] = 255, 0
    with pytest.raises(ValueError, match=r"fitted_temperature: expected ignore_index to be given with 256 classes, .*-1"):
        fitted_temperature(z, label)
    judged = fitted_temperature(z[:, :, 1:], label[:, 1:], ignore_index=-1)
    assert fitted_temperature(z, label, ignore_index=255) == pytest.approx(judged, rel=1e-4)
    assert fitted_temperature(z, label, ignore_index=-1) != pytest.approx(judged, rel=1e-2)
