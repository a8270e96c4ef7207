import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dacal_addon.mixing import blend_pairs, class_mask, complement, cut_mask, mix


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def random_label(seed, shape=(3, 6, 8), classes=7, ignored=True):
    label = torch.randint(0, classes, shape, generator=generator(seed))
    if ignored:
        label[torch.rand(shape, generator=generator(seed + 1)) < 0.2] = 255
    return label


def random_mask(seed, shape=(3, 1, 6, 8)):
    return torch.rand(shape, generator=generator(seed)) < 0.5


seeds = st.integers(0, 10**6)


@settings(max_examples=40, deadline=None)
@given(seeds, st.integers(1, 9))
def test_class_mask_takes_half_of_each_images_classes_whole(seed, classes):
    label = random_label(seed, classes=classes)
    mask = class_mask(label, generator=generator(seed))
    assert mask.shape == (3, 1, 6, 8)
    assert mask.dtype == torch.bool
    for image, chosen in zip(label.numpy(), mask[:, 0].numpy()):
        present = set(np.unique(image)) - {255}
        inside, outside = set(np.unique(image[chosen])), set(np.unique(image[~chosen])) - {255}
        assert inside | outside == present
        assert not inside & outside
        assert 255 not in inside
        assert len(inside) == (len(present) + 1) // 2


@settings(max_examples=40, deadline=None)
@given(seeds)
def test_batch_scope_chooses_among_the_classes_of_all_images(seed):
    """With one class an image, an image's own scope always takes it; the batch's takes it half of the time."""
    label = torch.arange(8).view(8, 1, 1).expand(8, 4, 4).contiguous()
    assert bool(class_mask(label, generator=generator(seed)).all())
    mask = class_mask(label, generator=generator(seed), scope="batch")
    assert bool((mask.flatten(1).all(1) | ~mask.flatten(1).any(1)).all())
    many = torch.cat([class_mask(label, generator=generator(seed + i), scope="batch") for i in range(30)])
    assert 0.3 < float(many.float().mean()) < 0.7


def test_every_class_can_be_chosen():
    label = torch.arange(4).view(1, 2, 2)
    picks = sum(class_mask(label, generator=generator(seed)).float() for seed in range(200)) / 200
    assert bool(((picks > 0.35) & (picks < 0.65)).all())


def test_an_image_without_labels_gives_no_source_pixel():
    assert not bool(class_mask(torch.full((2, 3, 3), 255), generator=generator()).any())


@settings(max_examples=60, deadline=None)
@given(seeds, st.integers(1, 40), st.integers(1, 40), st.floats(0, 1), st.floats(0, 1))
def test_cut_mask_is_one_box_of_the_announced_share(seed, height, width, a, b):
    low, high = min(a, b), max(a, b)
    mask = cut_mask((2, height, width), generator=generator(seed), share=(low, high))
    assert mask.shape == (2, 1, height, width)
    for box in mask[:, 0].numpy():
        rows, columns = box.any(1).sum(), box.any(0).sum()
        assert box.sum() == rows * columns  # nothing but a rectangle has this
        ys, xs = np.flatnonzero(box.any(1)), np.flatnonzero(box.any(0))
        assert rows == 0 or (ys[-1] - ys[0] + 1 == rows and xs[-1] - xs[0] + 1 == columns)
        slack = 0.5 * (height + width) + 1  # half a pixel on either side
        assert low * height * width - slack <= box.sum() <= high * height * width + slack


def test_cut_mask_reaches_every_pixel():
    hits = sum(cut_mask((1, 8, 8), generator=generator(seed), share=(0.1, 0.3)).float() for seed in range(300))
    assert float(hits.min()) > 0


@settings(max_examples=40, deadline=None)
@given(seeds, st.sampled_from([(3, 4, 6, 8), (3, 6, 8)]))
def test_every_pixel_comes_from_exactly_one_side(seed, shape):
    mask = random_mask(seed)
    a = torch.rand(shape, generator=generator(seed + 1))
    b = a + 1
    mixed = mix(mask, a, b)
    where = mask.expand(3, 4, 6, 8) if len(shape) == 4 else mask[:, 0]
    assert torch.equal(mixed[where], a[where])
    assert torch.equal(mixed[~where], b[~where])
    assert torch.equal(mixed, mix(complement(mask), b, a))
    # what one mix leaves out, the complementary one shows
    assert torch.equal(mixed + mix(complement(mask), a, b), a + b)


@settings(max_examples=40, deadline=None)
@given(seeds)
def test_hard_and_soft_labels_mix(seed):
    mask, hard = random_mask(seed), random_label(seed)
    soft = torch.rand(3, 7, 6, 8, generator=generator(seed)).softmax(1)
    mixed = mix(mask, hard, soft)
    assert torch.equal(mixed, mix(complement(mask), soft, hard))
    total = mixed.sum(1)
    ignored = mask[:, 0] & (hard == 255)
    assert bool((total[ignored] == 0).all())
    np.testing.assert_allclose(total[~ignored], 1.0, rtol=1e-6)
    known = mask[:, 0] & (hard != 255)
    assert torch.equal(mixed.argmax(1)[known], hard[known])


def test_nan_on_the_hidden_side_stays_hidden():
    mask = torch.tensor([True, False]).view(1, 1, 1, 2)
    a, b = torch.tensor([[[1.0, np.nan]]]), torch.tensor([[[np.inf, 2.0]]])
    assert mix(mask, a, b).tolist() == [[[1.0, 2.0]]]


def test_gradient_flows_to_the_side_that_shows():
    mask = random_mask(0)
    a, b = torch.zeros(3, 2, 6, 8, requires_grad=True), torch.zeros(3, 2, 6, 8, requires_grad=True)
    mix(mask, a, b).sum().backward()
    assert torch.equal(a.grad, mask.expand_as(a).float())
    assert torch.equal(b.grad, (~mask).expand_as(a).float())


def test_randomness_comes_from_the_generator_alone():
    state = torch.get_rng_state()
    label = random_label(0)
    assert torch.equal(class_mask(label, generator=generator(3)), class_mask(label, generator=generator(3)))
    assert torch.equal(cut_mask((4, 9, 9), generator=generator(3)), cut_mask((4, 9, 9), generator=generator(3)))
    assert not torch.equal(cut_mask((4, 9, 9), generator=generator(3)), cut_mask((4, 9, 9), generator=generator(4)))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("call", "error", "expected"),
    [
        (lambda: class_mask(torch.zeros(2, 1, 4, 4).long(), generator=generator()), ValueError, r"squeeze\(1\)"),
        (lambda: class_mask(random_label(0), generator=generator(), scope="all"), ValueError, r"'image', 'batch'"),
        (lambda: cut_mask((1, 4, 4), generator=generator(), share=(0.6, 0.4)), ValueError, r"share\[1\] in \[share\[0\], 1\]"),
        (lambda: cut_mask((1, 0, 4), generator=generator()), ValueError, r"H of size >= 1, got 0"),
        (
            lambda: blend_pairs(torch.zeros(1, 3, 4, 4), torch.zeros(1, 4, 4).long(), generator=generator()),
            ValueError,
            r"blend_pairs: expected at least 2 images, got 1; use a larger batch",
        ),
        (
            lambda: blend_pairs(torch.zeros(2, 3, 4, 4), torch.zeros(2, 4, 4).long(), generator=generator(), share=1.5),
            ValueError,
            r"share in \[0, 1\], got 1.5",
        ),
        (lambda: complement(torch.ones(1, 1, 2, 2)), ValueError, r"a bool tensor \(N, 1, H, W\).*got float32.*mask > 0.5"),
        (lambda: mix(random_mask(0), torch.zeros(3, 6, 9), torch.zeros(3, 6, 9)), ValueError, r"N, H, W = \(3, 6, 8\)"),
        (lambda: mix(random_mask(0), torch.zeros(3, 6, 8), random_label(0)), ValueError, r"one shape and dtype"),
        (lambda: mix(random_mask(0), torch.zeros(3, 6, 8), torch.zeros(3, 2, 6, 8)), ValueError, r"int64 tensor"),
        (lambda: mix(random_mask(0), None, torch.zeros(3, 6, 8)), TypeError, r"source: .*got NoneType"),
        (lambda: mix(random_mask(0), random_label(0, classes=9), torch.zeros(3, 2, 6, 8)), ValueError, r"classes 0..1"),
    ],
)
def test_errors_name_expected_got_and_remedy(call, error, expected):
    with pytest.raises(error, match=expected):
        call()
