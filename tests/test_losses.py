import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from dacal_addon import SoftPseudoLabeler, SoftPseudoLabels, mixed_views_loss, soft_cross_entropy, two_channels
from dacal_addon.losses import CrossEntropyAndGap, brier, calibration_gap, cross_entropy
from dacal_addon.metrics import brier as brier_of_metrics
from dacal_addon.pseudo_labels import one_hot

seeds = st.integers(0, 10**6)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def logits(seed=0, shape=(2, 4, 5, 6)):
    return 3 * torch.randn(shape, generator=generator(seed), dtype=torch.float64)


def hard_label(seed=0, shape=(2, 5, 6)):
    label = torch.randint(0, 4, shape, generator=generator(seed))
    label[torch.rand(shape, generator=generator(seed + 1)) < 0.3] = 255
    return label


def weights(seed=0, shape=(2, 5, 6)):
    return torch.rand(shape, generator=generator(seed), dtype=torch.float64)


@settings(max_examples=30, deadline=None)
@given(seeds)
def test_with_one_hot_labels_it_is_torchs_cross_entropy(seed):
    z, label = logits(seed), hard_label(seed)
    expected = F.cross_entropy(z, label, ignore_index=255)
    np.testing.assert_allclose(soft_cross_entropy(z, one_hot(label, 4).double()), expected)
    np.testing.assert_allclose(cross_entropy(z, label), expected)


@settings(max_examples=30, deadline=None)
@given(seeds)
def test_equals_a_loop_over_pixels(seed):
    z, weight = logits(seed), weights(seed)
    y = torch.softmax(logits(seed + 1), 1)
    y[:, :, 0] = 0.0  # a row without labels
    total, count = 0.0, 0
    for n in range(2):
        for i in range(5):
            for j in range(6):
                p = np.exp(z[n, :, i, j].numpy())
                total += float(weight[n, i, j]) * -float((y[n, :, i, j].numpy() * np.log(p / p.sum())).sum())
                count += int(y[n, :, i, j].sum() > 0)
    assert count == 48
    assert soft_cross_entropy(z, y, weight).item() == pytest.approx(total / count, rel=1e-12)


def test_gradients_are_right_for_logits_labels_and_weights():
    z, y, w = logits().requires_grad_(), torch.softmax(logits(1), 1).requires_grad_(), weights().requires_grad_()
    assert torch.autograd.gradcheck(soft_cross_entropy, (z, y, w))


def test_ignored_pixels_count_exactly_zero_even_with_infinite_logits():
    z, label = logits(), hard_label()
    reference = soft_cross_entropy(z, one_hot(label, 4).double())
    spoilt = torch.where((label == 255).unsqueeze(1), torch.full_like(z, np.inf), z)
    loss = soft_cross_entropy(spoilt, one_hot(label, 4).double())
    assert float(loss) == float(reference)
    nothing = torch.full_like(label, 255)
    assert float(soft_cross_entropy(z, one_hot(nothing, 4).double())) == 0.0
    assert float(cross_entropy(z, nothing)) == 0.0
    assert float(calibration_gap(z, nothing)) == 0.0
    assert float(brier(z, nothing)) == 0.0
    assert float(brier(spoilt, label)) == float(brier(z, label))


def test_a_class_masked_out_costs_nothing_where_it_is_not_the_label():
    z, label = logits(), hard_label()
    z[:, 1] = -np.inf
    label[label == 1] = 255
    z.requires_grad_()
    loss = soft_cross_entropy(z, one_hot(label, 4).double())
    np.testing.assert_allclose(loss.item(), F.cross_entropy(z.detach(), label, ignore_index=255).item(), rtol=1e-12)
    (grad,) = torch.autograd.grad(loss, z)
    assert bool(torch.isfinite(grad).all())


def test_weights_scale_the_loss_and_do_not_renormalise_it():
    z, label, ones = logits(), hard_label(), torch.ones(2, 5, 6)
    assert float(cross_entropy(z, label, 0.25 * ones)) == pytest.approx(0.25 * float(cross_entropy(z, label)))


def test_half_precision_is_upcast():
    z = torch.full((1, 4, 1, 1), 1.0).half()
    assert soft_cross_entropy(z, torch.full((1, 4, 1, 1), 0.25).half()).dtype == torch.float32


@settings(max_examples=30, deadline=None)
@given(seeds)
def test_brier_equals_a_loop_over_pixels(seed):
    z, label, weight = logits(seed), hard_label(seed), weights(seed)
    p = torch.softmax(z, 1).numpy()
    costs = []
    for n, i, j in np.ndindex(2, 5, 6):
        if label[n, i, j] != 255:
            costs.append(float(weight[n, i, j]) * ((p[n, :, i, j] - np.eye(4)[label[n, i, j]]) ** 2).sum())
    assert brier(z, label, weight).item() == pytest.approx(np.mean(costs), rel=1e-9)
    assert brier(z, label).item() == pytest.approx(brier_of_metrics(z, label, input="logits"), rel=1e-9)


@settings(max_examples=30, deadline=None)
@given(seeds, st.integers(1, 20))
def test_gap_equals_a_loop_over_pixels_and_bins(seed, n_bins):
    z, label, weight = logits(seed), hard_label(seed), weights(seed)
    p = torch.softmax(z, 1).numpy()
    gap, mass = np.zeros(n_bins), np.zeros(n_bins)
    centres = (np.arange(n_bins) + 0.5) / n_bins
    for n, i, j in np.ndindex(2, 5, 6):
        if label[n, i, j] == 255:
            continue
        confidence, right = p[n, :, i, j].max(), p[n, :, i, j].argmax() == int(label[n, i, j])
        inside = np.clip(confidence, centres[0], centres[-1])
        share = np.maximum(0, 1 - np.abs(inside - centres) * n_bins)  # hat functions around the centres
        gap += float(weight[n, i, j]) * share * (confidence - right)
        mass += float(weight[n, i, j]) * share
    filled = mass > 0
    expected = (gap[filled] ** 2 / mass[filled]).sum() / mass.sum()
    assert calibration_gap(z, label, weight, n_bins=n_bins).item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_brier_has_the_gradient_of_finite_differences():
    z, label, weight = logits().requires_grad_(), hard_label(), weights()
    assert torch.autograd.gradcheck(lambda z: brier(z, label, weight), (z,))


def test_gap_has_the_gradient_of_finite_differences():
    assert torch.autograd.gradcheck(lambda z: calibration_gap(z, hard_label()), (logits(3).requires_grad_(),))


def test_gap_of_a_calibrated_predictor_vanishes_and_of_a_sharpened_one_does_not():
    """Labels drawn from the predicted probabilities themselves."""
    z = logits(5, (1, 4, 300, 300)) / 2
    label = torch.multinomial(torch.softmax(z, 1)[0].flatten(1).T, 1, generator=generator(6)).view(1, 300, 300)
    assert float(calibration_gap(z, label)) < 5e-4
    assert float(calibration_gap(3 * z, label)) > 0.02


def test_gap_descent_calibrates():
    """One temperature, fitted on the gap alone, finds that the logits are three times too large."""
    z = logits(5, (1, 4, 200, 200)) / 2
    label = torch.multinomial(torch.softmax(z, 1)[0].flatten(1).T, 1, generator=generator(6)).view(1, 200, 200)
    log_t = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([log_t], lr=0.05)
    for _ in range(120):
        optimizer.zero_grad()
        calibration_gap(3 * z / log_t.exp(), label).backward()
        optimizer.step()
    assert float(log_t.exp().detach()) == pytest.approx(3.0, rel=0.1)


def test_the_sum_is_the_sum():
    z, label, weight = logits(), hard_label(), weights()
    both = CrossEntropyAndGap(gap_weight=7.0, n_bins=9)(z, label, weight)
    expected = cross_entropy(z, label, weight) + 7 * calibration_gap(z, label, weight, n_bins=9)
    np.testing.assert_allclose(both, expected)


@pytest.mark.parametrize(
    ("call", "error", "expected"),
    [
        (lambda: soft_cross_entropy(logits(), hard_label()), ValueError, r"soft_label: a floating.*one_hot"),
        (lambda: soft_cross_entropy(logits(), logits(0, (2, 3, 5, 6))), ValueError, r"\(2, 4, 5, 6\) like the logits, got"),
        (
            lambda: soft_cross_entropy(logits(), logits(0, (2, 4, 5, 7))),
            ValueError,
            r"\(2, 'C', 5, 7\), got .*F.interpolate\(logits",
        ),
        (lambda: soft_cross_entropy(logits(), logits(), torch.ones(2, 1, 5, 6)), ValueError, r"weight: .*\(2, 5, 6\)"),
        (lambda: soft_cross_entropy(logits(), None), TypeError, r"got NoneType"),
        (
            lambda: cross_entropy(logits(), hard_label(0, (2, 5, 7))),
            ValueError,
            r"cross_entropy: expected logits at the resol.*F.inter",
        ),
        (
            lambda: brier(logits(), hard_label(0, (3, 5, 6))),
            ValueError,
            r"\(3, 'C', 5, 6\), got .*logits and label of the same images",
        ),
        (lambda: calibration_gap(logits(), hard_label().float()), ValueError, r"label: an int64 tensor \(N, \*spatial\)"),
        (lambda: calibration_gap(logits(), hard_label(), n_bins=0), ValueError, r"a whole number n_bins >= 1, got 0"),
        (lambda: CrossEntropyAndGap(gap_weight=-1.0), ValueError, r"gap_weight >= 0"),
    ],
)
def test_errors_name_expected_got_and_remedy(call, error, expected):
    with pytest.raises(error, match=expected):
        call()


# The same pixels in a row, on a picture, in a volume.
SHAPES = [(30,), (5, 6), (5, 2, 3), (1, 5, 2, 3)]
JUDGES = [cross_entropy, brier, calibration_gap, CrossEntropyAndGap()]


@pytest.mark.parametrize("spatial", SHAPES)
def test_a_voxel_is_judged_as_a_pixel_is(spatial):
    z, label, weight = logits(), hard_label(), weights()
    shaped = z.reshape(2, 4, *spatial), label.reshape(2, *spatial), weight.reshape(2, *spatial)
    for loss in JUDGES:
        np.testing.assert_allclose(loss(*shaped), loss(z, label, weight), rtol=1e-12)
    soft = torch.softmax(logits(1), 1)
    np.testing.assert_allclose(
        soft_cross_entropy(shaped[0], soft.reshape(shaped[0].shape), shaped[2]), soft_cross_entropy(z, soft, weight), rtol=1e-12
    )


@pytest.mark.parametrize("ignored", [(0, 255), [255, 2, 0], (255,)])
@pytest.mark.parametrize("loss", JUDGES)
def test_several_ignored_labels_are_as_one(loss, ignored):
    z, label, weight = logits(), hard_label(), weights()
    one = label.clone()
    for each in ignored:
        one[label == each] = 255
    assert loss(z, label, weight, ignore_index=ignored).item() == pytest.approx(loss(z, one, weight).item(), rel=1e-12)
    spoilt = torch.where((one == 255).unsqueeze(1), torch.full_like(z, np.nan), z)
    if loss is cross_entropy or loss is brier:
        assert loss(spoilt, label, weight, ignore_index=ignored).item() == loss(z, one, weight).item()


@pytest.mark.parametrize("loss", JUDGES)
def test_class_255_is_not_dropped_in_silence(loss):
    z, label = logits(0, (2, 256, 5, 6)), hard_label()
    label[:, 0] = 255
    with pytest.raises(ValueError, match=r"ignore_index to be given with 256 classes, of which 255 is one, got none; .*-1"):
        loss(z, label)
    label[:, 1:] = label[:, 1:].clamp(max=254)
    judged, all_of_them = loss(z, label, ignore_index=255), loss(z, label, ignore_index=-1)
    assert judged.item() == pytest.approx(loss(z[:, :, 1:], label[:, 1:], ignore_index=-1).item(), rel=1e-9)
    assert judged.item() != pytest.approx(all_of_them.item(), rel=1e-6)
    assert loss(z[:, :255], label).item() == loss(z[:, :255], label, ignore_index=255).item()


@pytest.mark.parametrize("spatial", [(8,), (8, 6), (2, 8, 6)])
def test_logits_of_a_quarter_of_the_resolution_are_told_how_to_grow(spatial):
    """Of the label it says nothing: what is resized is what the network says."""
    z, label = logits(0, (2, 4, *(n // 2 for n in spatial))), hard_label(0, (2, *spatial))
    for call in (lambda z: cross_entropy(z, label), lambda z: soft_cross_entropy(z, one_hot(label, 4).double())):
        with pytest.raises(ValueError, match="expected logits at the resolution of the label") as caught:
            call(z)
        remedy = str(caught.value).split("; ")[1]
        assert remedy.startswith("interpolate the logits, not the label: F.interpolate(logits, size=")
        grown = eval(remedy.split(": ")[1], {"F": F, "logits": z})  # the remedy has to run
        assert bool(torch.isfinite(call(grown)))


@pytest.mark.parametrize(
    ("z", "label", "remedy"),
    [
        (logits(0, (2, 5, 6, 4)), hard_label(), r"the classes are last: logits.permute\(0, 3, 1, 2\)"),
        (logits(0, (2, 5, 6, 7, 4)), hard_label(0, (2, 5, 6, 7)), r"the classes are last: logits.permute\(0, 4, 1, 2, 3\)"),
        (logits(), hard_label(0, (2, 1, 5, 6)), r"drop the label's channel dimension: label.squeeze\(1\)"),
        (logits(0, (2, 1, 5, 6)), hard_label(), "two_channels"),
        (
            {"out": logits(), "aux": logits()},
            hard_label(),
            r"the logits out of the network's output, for example x\['out'\]",
        ),
        ((logits(), logits()), hard_label(), r"for example x\[0\]"),
    ],
)
def test_other_layouts_are_told_the_way(z, label, remedy):
    for loss in JUDGES:
        with pytest.raises((ValueError, TypeError), match=remedy):
            loss(z, label)


@settings(max_examples=30, deadline=None)
@given(seeds, st.sampled_from([(30,), (5, 6), (5, 2, 3)]))
def test_one_sigmoid_channel_is_judged_by_the_binary_cross_entropy(seed, spatial):
    z = logits(seed, (2, 1, *spatial))
    target, weight = weights(seed, (2, *spatial)), weights(seed + 1, (2, *spatial))
    soft = torch.stack([1 - target, target], 1)
    expected = F.binary_cross_entropy_with_logits(z[:, 0], target, weight)
    np.testing.assert_allclose(soft_cross_entropy(two_channels(z), soft, weight), expected, rtol=1e-9)


def test_a_class_masked_out_is_taken_in_volumes_and_of_one_channel():
    z, label = logits(0, (2, 4, 2, 3, 5)), hard_label(0, (2, 2, 3, 5))
    label[label == 1] = 255
    without = z[:, [0, 2, 3]]
    z[:, 1] = -np.inf
    fewer = label - (label == 2).long() - (label == 3).long()
    np.testing.assert_allclose(cross_entropy(z, label), cross_entropy(without, fewer), rtol=1e-12)
    np.testing.assert_allclose(brier(z, label), brier(without, fewer), rtol=1e-12)
    sure = torch.tensor([-np.inf, 0.0]).view(1, 1, 2)
    assert soft_cross_entropy(two_channels(sure), one_hot(torch.tensor([[0, 255]]), 2)).item() == 0.0


def test_bfloat16_is_upcast():
    z, label = logits().bfloat16(), hard_label()
    for loss in JUDGES:
        assert loss(z, label).item() == pytest.approx(loss(z.float(), label).item(), rel=1e-6)


def test_the_number_of_bins_may_be_numpys():
    z, label = logits(), hard_label()
    expected = calibration_gap(z, label, n_bins=7).item()
    assert calibration_gap(z, label, n_bins=np.int64(7)).item() == expected
    assert CrossEntropyAndGap(gap_weight=1.0, n_bins=np.int64(7))(z, label).item() == pytest.approx(
        expected + cross_entropy(z, label).item()
    )


def unimatchs(z, label, confidence, ignored, threshold):
    """The loss of one view by UniMatch's rule: sure pixels that are no padding, over all pixels that are none."""
    total, count = 0.0, 0
    for pixel in np.ndindex(*label.shape):
        n, i, j = pixel
        if ignored[pixel]:
            continue
        count += 1
        if confidence[pixel] >= threshold:
            total += float(torch.logsumexp(z[n, :, i, j], 0) - z[n, label[pixel], i, j])
    return total / count


@pytest.mark.parametrize("own_batch", [True, False])
def test_with_hard_labels_it_is_unimatchs_loss_on_its_views(own_batch):
    """Labels, confidences and paddings are pasted pixel by pixel here, and the weak views' padding differs."""
    threshold = 0.8
    teacher, other = logits(1, (3, 4, 5, 6)), logits(1 if own_batch else 2, (3, 4, 5, 6))
    valid, other_valid = (torch.rand(3, 5, 6, generator=generator(seed)) < 0.7 for seed in (3, 3 if own_batch else 4))
    if own_batch:
        other, other_valid = other.flip(0), other_valid.flip(0)
    masks = [torch.rand(3, 1, 5, 6, generator=generator(seed)) < 0.4 for seed in (5, 6)]
    views = [logits(seed, (3, 4, 5, 6)) for seed in (7, 8)]
    expected = []
    for z, mask in zip(views, masks):
        paste = mask[:, 0]
        mixed = torch.where(mask, other, teacher)
        confidence, label = mixed.softmax(1).max(1)
        expected.append(unimatchs(z, label, confidence, ~((paste & other_valid) | (~paste & valid)), threshold))

    labeler = SoftPseudoLabeler(None, weight="threshold", threshold=threshold)

    def hard(z, valid):
        labels = labeler(z, valid=valid)
        return labels._replace(soft_label=one_hot(labels.pseudo_label, 4).double())

    partner = None if own_batch else hard(other, other_valid)
    found = mixed_views_loss(torch.cat(views), hard(teacher, valid), masks, partner=partner)
    assert found.item() == pytest.approx(sum(expected) / 2, rel=1e-12)
    assert expected[0] != pytest.approx(expected[1], rel=1e-3)


def test_mixed_views_carry_the_gradient_of_both_sides_labels():
    soft = torch.softmax(logits(1), 1).requires_grad_()
    labels = SoftPseudoLabels(soft, soft.argmax(1), torch.ones(2, 5, 6).double(), torch.ones(2, 1, 5, 6).double())
    mask = torch.zeros(2, 1, 5, 6).bool()
    mask[0] = True  # view 0 shows image 1 alone, and so does view 1: image 0 is nowhere
    z = logits(2).requires_grad_()
    (grad,) = torch.autograd.grad(mixed_views_loss(z, labels, [mask]), soft)
    np.testing.assert_allclose(grad[0], torch.zeros(4, 5, 6))
    np.testing.assert_allclose(grad[1], -z.log_softmax(1).sum(0).detach() / 60)


def test_mixed_views_are_counted():
    labels = SoftPseudoLabeler(None)(logits(1))
    mask = torch.zeros(2, 1, 5, 6).bool()
    for z, masks in ((logits(2), [mask, mask]), (logits(2, (4, 4, 5, 6)), [mask]), (logits(2), [])):
        with pytest.raises(ValueError, match=r"expected logits of 2 images in as many views as there are masks, \(\d \* 2, C"):
            mixed_views_loss(z, labels, masks)
    with pytest.raises(ValueError, match="expected mask: a bool tensor"):
        mixed_views_loss(logits(2), labels, [mask[:, 0]])
