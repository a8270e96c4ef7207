import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import softmax

from dacal_addon import MetaTemperatureNet, SoftPseudoLabeler, two_channels
from dacal_addon.pseudo_labels import WEIGHTS, confidence_weight, one_hot, soft_label, without_classes


def logits(seed=0, shape=(2, 5, 6, 7), scale=4.0):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.05, 20.0))
def test_soft_label_is_the_softmax_of_divided_logits(seed, temperature):
    z = logits(seed)
    t = torch.full((2, 1, 6, 7), temperature, dtype=torch.float64)
    np.testing.assert_allclose(soft_label(z, t).numpy(), softmax(z.numpy() / temperature, axis=1), rtol=1e-12, atol=1e-300)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6))
def test_a_higher_temperature_never_makes_a_pixel_surer(seed):
    z = logits(seed)
    t = logits(seed + 1, (2, 1, 6, 7), 0.5).exp()
    sharper, softer = soft_label(z, t).amax(1), soft_label(z, 1.5 * t).amax(1)
    assert bool((softer <= sharper).all())


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.2, 1.0))
def test_weights_follow_daformer(seed, threshold):
    """Written after the description of DAFormer's trainer: the share of pixels above the threshold, the same everywhere."""
    z = logits(seed)
    confident = softmax(z.numpy(), axis=1).max(1) >= threshold
    np.testing.assert_allclose(confidence_weight(z, threshold=threshold).numpy(), np.full((2, 6, 7), confident.mean()))
    np.testing.assert_array_equal(confidence_weight(z, mode="threshold", threshold=threshold).numpy(), confident)
    assert bool((confidence_weight(z, mode="none", threshold=threshold) == 1).all())


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.2, 0.9))
def test_confidence_shares_the_same_weight_by_the_squared_confidence(seed, threshold):
    z = logits(seed)
    weight = confidence_weight(z, mode="confidence", threshold=threshold).numpy()
    confidence = softmax(z.numpy(), axis=1).max(1)
    np.testing.assert_allclose(weight.mean(), (confidence >= threshold).mean(), rtol=1e-9)
    np.testing.assert_allclose(weight * confidence[0, 0, 0] ** 2, confidence**2 * weight[0, 0, 0], rtol=1e-9)


def trained_net():
    net = MetaTemperatureNet(5)
    torch.nn.init.constant_(net.last.weight, 0.2)
    return net.double()


def test_labels_are_consistent_with_each_other():
    labels = SoftPseudoLabeler(trained_net(), weight="none")(logits())
    assert labels.temperature.detach().std() > 0
    assert labels.pseudo_label.dtype == torch.int64
    assert torch.equal(labels.soft_label.argmax(1), labels.pseudo_label)
    np.testing.assert_allclose(labels.soft_label.detach().sum(1), np.ones((2, 6, 7)), rtol=1e-12)
    np.testing.assert_allclose(
        labels.soft_label.detach().numpy(), softmax((logits() / labels.temperature.detach()).numpy(), axis=1), rtol=1e-12
    )


def test_only_soft_label_and_temperature_depend_on_the_temperature_net():
    net = trained_net()
    labels = SoftPseudoLabeler(net, threshold=0.9)(logits())
    assert not labels.weight.requires_grad
    assert not labels.pseudo_label.requires_grad
    (grad,) = torch.autograd.grad(labels.soft_label.pow(2).sum(), [net.last.weight])
    assert float(grad.abs().sum()) > 0
    plain = SoftPseudoLabeler(None, threshold=0.9)(logits())
    assert torch.equal(plain.weight, labels.weight)
    assert bool((plain.temperature == 1).all())


def test_ignored_rows_and_padding_have_weight_zero_and_nothing_else():
    valid = torch.ones(2, 6, 7, dtype=torch.bool)
    valid[1, :, 5:] = False
    weight = SoftPseudoLabeler(None, weight="none", ignore_top=1, ignore_bottom=2)(logits(), valid=valid).weight
    expected = np.ones((2, 6, 7))
    expected[:, 0] = expected[:, 4:] = expected[1, :, 5:] = 0
    np.testing.assert_array_equal(weight.numpy(), expected)


def test_no_rows_are_ignored_by_default():
    assert bool((SoftPseudoLabeler(None, weight="none")(logits()).weight == 1).all())


@pytest.mark.parametrize("rows", [6, 8, 60])
def test_ignoring_all_rows_leaves_no_weight(rows):
    assert float(SoftPseudoLabeler(None, weight="none", ignore_bottom=rows)(logits()).weight.sum()) == 0
    assert float(SoftPseudoLabeler(None, weight="none", ignore_top=rows)(logits()).weight.sum()) == 0


def test_half_precision_logits_give_full_precision_labels():
    z = torch.full((1, 150, 1, 1), 3.0).half()
    labels = SoftPseudoLabeler(None)(z)
    assert labels.soft_label.dtype == torch.float32
    assert float(labels.soft_label.sum()) == pytest.approx(1.0, abs=1e-5)


def test_one_hot_writes_zeros_for_ignored_pixels():
    label = torch.tensor([[[0, 2, 255]]])
    assert one_hot(label, 3)[0, :, 0].T.tolist() == [[1, 0, 0], [0, 0, 1], [0, 0, 0]]


@pytest.mark.parametrize(
    ("call", "error", "expected"),
    [
        (
            lambda: SoftPseudoLabeler(None, weight="share"),
            ValueError,
            r"weight to be one of 'ratio', 'confidence', 'threshold', 'none'",
        ),
        (lambda: SoftPseudoLabeler(None, threshold=1.5), ValueError, r"expected threshold in \[0, 1\], got 1.5"),
        (lambda: SoftPseudoLabeler(None, ignore_top=-1), ValueError, r"a whole number ignore_top >= 0, got -1"),
        (lambda: SoftPseudoLabeler(None)(torch.zeros(5, 6)), ValueError, r"got float32 \(5, 6\)"),
        (lambda: SoftPseudoLabeler(None)([1.0]), TypeError, r"got list"),
        (lambda: SoftPseudoLabeler(None)(logits(), valid=torch.ones(2, 6, 7)), ValueError, r"valid: a bool tensor \(2, 6, 7\)"),
        (lambda: soft_label(logits(), torch.ones(2, 6, 7)), ValueError, r"temperature: a floating tensor \(2, 1, 6, 7\)"),
        (lambda: one_hot(torch.tensor([[[7]]]), 3), ValueError, r"classes 0..2 or ignore_index=255, got the value 7"),
        (
            lambda: one_hot(torch.zeros(1, 1, 1), 3),
            ValueError,
            r"int64 tensor .*got float32 \(1, 1, 1\); convert it with .long",
        ),
    ],
)
def test_errors_name_expected_got_and_remedy(call, error, expected):
    with pytest.raises(error, match=expected):
        call()


@pytest.mark.parametrize("ignore_index", [0, 2, 255, 299])
def test_an_ignored_label_is_all_zeros_also_where_it_is_a_class(ignore_index):
    label = torch.arange(300).view(1, 15, 20)
    encoded = one_hot(label, 300, ignore_index=ignore_index)
    expected = torch.eye(300)
    expected[ignore_index] = 0
    assert torch.equal(encoded.flatten(2)[0].T, expected)


def test_the_ignored_class_is_ruled_out_before_anything_is_labelled():
    z = torch.randn(2, 4, 3, 5, generator=torch.Generator().manual_seed(0))
    z[:, 1] += 9
    labeler = SoftPseudoLabeler(None, threshold=0.6)
    labels, without = labeler(z, ignore_index=1), labeler(z[:, [0, 2, 3]])
    assert torch.equal(labels.soft_label[:, [0, 2, 3]], without.soft_label)
    assert float(labels.soft_label[:, 1].abs().max()) == 0.0
    assert torch.equal(labels.pseudo_label, torch.tensor([0, 2, 3])[without.pseudo_label])
    assert torch.allclose(labels.weight, without.weight)


def test_padding_has_no_label_at_all():
    z, valid = torch.randn(1, 3, 2, 4), torch.tensor([True, True, False, False]).expand(1, 2, 4)
    labels = SoftPseudoLabeler(None, weight="none")(z, valid=valid, ignore_index=7)
    assert labels.soft_label.sum(1)[0, 0].tolist() == pytest.approx([1, 1, 0, 0])
    assert (labels.pseudo_label[0, 0] == 7).tolist() == [False, False, True, True]
    assert labels.weight[0, 0].tolist() == [1, 1, 0, 0]


def test_a_class_masked_out_leaves_the_temperatures_gradient_finite():
    z = torch.tensor([2.0, 1.0, -math.inf]).view(1, 3, 1, 1)
    temperature = torch.ones(1, 1, 1, 1, requires_grad=True)
    soft_label(z, temperature)[:, 0].sum().backward()
    twin = torch.ones(1, 1, 1, 1, requires_grad=True)
    soft_label(z[:, :2], twin)[:, 0].sum().backward()
    assert temperature.grad.item() == pytest.approx(twin.grad.item())


@pytest.mark.skipif(not hasattr(torch, "inference_mode"), reason="torch < 1.9")
def test_logits_that_were_made_under_inference_mode_can_be_labelled_with_a_gradient():
    with torch.inference_mode():
        z = torch.arange(3.0).view(1, 3, 1, 1) * 1.0
    temperature = torch.ones(1, 1, 1, 1, requires_grad=True)
    soft_label(z, temperature)[:, 0].sum().backward()
    assert temperature.grad.item() > 0


# The same pixels in a row, on a picture, in a volume.
SHAPES = [(42,), (6, 7), (2, 3, 7), (1, 2, 3, 7)]


@pytest.mark.parametrize("spatial", SHAPES)
@pytest.mark.parametrize("weight", WEIGHTS)
def test_a_voxel_is_labelled_as_a_pixel_is(spatial, weight):
    z, t = logits(), logits(1, (2, 1, 6, 7), 0.5).exp()
    valid = torch.rand(2, 6, 7, generator=torch.Generator().manual_seed(2)) < 0.8
    labeler = SoftPseudoLabeler(lambda z: t.reshape(2, 1, *z.shape[2:]), weight=weight, threshold=0.8)
    flat = labeler(z, valid=valid, ignore_index=(1, 255))
    labels = labeler(z.reshape(2, 5, *spatial), valid=valid.reshape(2, *spatial), ignore_index=(1, 255))
    for found, expected in zip(labels, flat):
        assert found.shape[-len(spatial) :] == spatial
        assert torch.equal(found.reshape(expected.shape), expected)


@pytest.mark.parametrize("spatial", SHAPES)
def test_a_voxels_label_becomes_one_hot(spatial):
    label = logits().argmax(1)
    encoded = one_hot(label.reshape(2, *spatial), 5, ignore_index=[0, 3])
    assert encoded.shape == (2, 5, *spatial)
    expected = np.eye(5)
    expected[[0, 3]] = 0
    np.testing.assert_array_equal(encoded.reshape(2, 5, 42).numpy(), expected[label.reshape(2, 42).numpy()].transpose(0, 2, 1))


def test_rows_of_a_volume_are_those_of_its_slices():
    weight = SoftPseudoLabeler(None, weight="none", ignore_top=1, ignore_bottom=2)(logits(shape=(2, 5, 3, 6, 7))).weight
    expected = np.ones((2, 3, 6, 7))
    expected[:, :, 0] = expected[:, :, 4:] = 0
    np.testing.assert_array_equal(weight.numpy(), expected)
    with pytest.raises(ValueError, match=r"SoftPseudoLabeler: expected .*rows, columns.*got float64 \(2, 5, 42\)"):
        SoftPseudoLabeler(None, ignore_top=1)(logits().flatten(2))


def test_several_classes_are_ruled_out():
    z, labeler = logits(), SoftPseudoLabeler(None, threshold=0.6)
    z[:, 1] += 9
    valid = torch.ones(2, 6, 7, dtype=torch.bool)
    valid[0, 2] = False
    labels, without = labeler(z, ignore_index=(1, 255, 4), valid=valid), labeler(z[:, [0, 2, 3]], valid=valid)
    assert torch.equal(labels.soft_label[:, [0, 2, 3]], without.soft_label)
    assert float(labels.soft_label[:, [1, 4]].abs().max()) == 0.0
    assert torch.allclose(labels.weight, without.weight)
    assert torch.equal(labels.pseudo_label[valid], torch.tensor([0, 2, 3])[without.pseudo_label[valid]])
    assert labels.pseudo_label[~valid].unique().tolist() == [4]
    hard, weight = labeler.hard_labels(z, valid=valid, ignore_index=(1, 255, 4))
    assert torch.equal(hard, labels.pseudo_label)
    assert torch.equal(weight, labels.weight)


def test_a_teacher_is_left_a_class():
    with pytest.raises(ValueError, match=r"f: expected classes beside ignore_index, got \(0, 1, 255\), all of them"):
        without_classes("f", torch.zeros(1, 2, 1, 1), (0, 1, 255))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.1, 10.0))
def test_one_sigmoid_channel_is_labelled_with_the_sigmoid(seed, temperature):
    z = logits(seed, (2, 1, 3, 4, 5))
    labels = SoftPseudoLabeler(lambda z: torch.full_like(z[:, :1], temperature), weight="none")(two_channels(z))
    np.testing.assert_allclose(labels.soft_label[:, 1:], 1 / (1 + np.exp(-z.numpy() / temperature)), rtol=1e-9)
    assert torch.equal(labels.pseudo_label, (z[:, 0] > 0).long())


@pytest.mark.parametrize("call", [confidence_weight, SoftPseudoLabeler(None), lambda z: soft_label(z, z)])
def test_one_channel_that_is_not_declared_is_told_how(call):
    with pytest.raises(ValueError, match=r"C >= 2, got float32 \(2, 1, 4, 4\); .*two_channels"):
        call(torch.zeros(2, 1, 4, 4))


def test_counts_may_be_numpys():
    labeler = SoftPseudoLabeler(None, weight="none", ignore_top=np.int64(2))
    assert type(labeler.ignore_top) is int
    assert float(labeler(logits()).weight[:, :2].abs().max()) == 0.0
    assert torch.equal(one_hot(torch.tensor([[2]]), np.int32(3), ignore_index=np.int64(1)), one_hot(torch.tensor([[2]]), 3))


def test_bfloat16_logits_are_upcast_before_the_softmax():
    z = logits().bfloat16()
    found = soft_label(z, torch.ones(2, 1, 6, 7)).double().numpy()
    np.testing.assert_allclose(found, softmax(z.double().numpy(), axis=1), rtol=1e-5)


def test_class_255_is_not_dropped_in_silence():
    z = logits(shape=(1, 300, 2, 3), scale=0.1)
    z[:, 255, 0] = 50.0
    labeler = SoftPseudoLabeler(None, weight="none")
    for call in (labeler, labeler.hard_labels):
        with pytest.raises(ValueError, match=r"SoftPseudoLabeler: expected ignore_index to be given with 300 classes, .*-1"):
            call(z)
    assert (labeler(z, ignore_index=-1).pseudo_label[:, 0] == 255).all()
    for said in (labeler(z, ignore_index=255).pseudo_label, labeler.hard_labels(z, ignore_index=255)[0]):
        assert (said != 255).all()
    fewer, padding = z[:, :255], torch.zeros(1, 2, 3, dtype=torch.bool)
    assert (labeler(fewer, valid=padding).pseudo_label == 255).all()
    assert (labeler.hard_labels(fewer, valid=padding)[0] == 255).all()
