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
        (lambda: class_mask(torch.zeros(2).long(), generator=generator()), ValueError, r"int64 tensor \(N, \*spatial\)"),
        (lambda: class_mask(random_label(0), generator=generator(), scope="all"), ValueError, r"'image', 'batch'"),
        (lambda: cut_mask((1, 4, 4), generator=generator(), share=(0.6, 0.4)), ValueError, r"share\[1\] in \[share\[0\], 1\]"),
        (lambda: cut_mask((1, 0, 4), generator=generator()), ValueError, r"whole number size\[1\] >= 1, got 0"),
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
        (lambda: complement(torch.ones(1, 1, 2, 2)), ValueError, r"a bool tensor \(N, 1, \*spatial\).*got float32.*mask > 0.5"),
        (lambda: mix(random_mask(0), torch.zeros(3, 6, 9), torch.zeros(3, 6, 9)), ValueError, r"N, \*spatial = \(3, 6, 8\)"),
        (lambda: mix(random_mask(0), random_label(0), torch.zeros(3, 7, 3, 4)), ValueError, "logits of a lower .*interpolated"),
        (lambda: mix(random_mask(0), torch.zeros(3, 6, 8), random_label(0)), ValueError, r"one shape and dtype"),
        (lambda: mix(random_mask(0), torch.zeros(3, 6, 8), torch.zeros(3, 2, 6, 8)), ValueError, r"int64 tensor"),
        (lambda: mix(random_mask(0), None, torch.zeros(3, 6, 8)), TypeError, r"source: .*got NoneType"),
        (lambda: mix(random_mask(0), random_label(0, classes=9), torch.zeros(3, 2, 6, 8)), ValueError, r"classes 0..1"),
    ],
)
def test_errors_name_expected_got_and_remedy(call, error, expected):
    with pytest.raises(error, match=expected):
        call()


# Volumes, and rows of pixels


SHAPES = [(48,), (6, 8), (2, 3, 8), (1, 2, 3, 8)]


@pytest.mark.parametrize("spatial", SHAPES)
@pytest.mark.parametrize("scope", ["image", "batch"])
def test_classes_are_chosen_and_mixed_alike_whatever_the_dimensions(spatial, scope):
    label, soft = random_label(3), torch.rand(3, 7, 6, 8, generator=generator(1)).softmax(1)
    mask = class_mask(label, generator=generator(5), scope=scope)
    shaped = class_mask(label.reshape(3, *spatial), generator=generator(5), scope=scope)
    assert shaped.shape == (3, 1, *spatial)
    assert torch.equal(shaped.reshape(mask.shape), mask)
    for a, b in ((label, soft), (soft, label), (label, label.flip(0)), (soft, soft.flip(0))):
        expected = mix(mask, a, b)
        found = mix(shaped, *(x.reshape(*x.shape[: x.dim() - 2], *spatial) for x in (a, b)))
        assert found.shape[-len(spatial) :] == spatial
        assert torch.equal(found.reshape(expected.shape), expected)


def test_the_mask_tells_a_volumes_hard_label_from_a_pictures_soft_one():
    """(2, 3, 4, 5) is a soft label of a picture and a hard one of a volume."""
    label = torch.randint(0, 2, (2, 3, 4, 5), generator=generator())
    volume, picture = torch.ones(2, 1, 3, 4, 5, dtype=torch.bool), torch.ones(2, 1, 4, 5, dtype=torch.bool)
    assert mix(volume, label, torch.zeros(2, 2, 3, 4, 5))[:, 1].sum() == label.sum()
    assert torch.equal(mix(picture, label, label), label)


@settings(max_examples=60, deadline=None)
@given(seeds, st.lists(st.integers(1, 12), min_size=1, max_size=4), st.floats(0, 1), st.floats(0, 1))
def test_cut_mask_is_one_box_in_any_number_of_dimensions(seed, size, a, b):
    low, high = min(a, b), max(a, b)
    for box in cut_mask((2, *size), generator=generator(seed), share=(low, high))[:, 0].numpy():
        sides = []
        for axis in range(len(size)):
            along = np.flatnonzero(box.any(tuple(i for i in range(len(size)) if i != axis)))
            sides.append(len(along))
            assert not len(along) or along[-1] - along[0] + 1 == len(along)
        assert box.sum() == np.prod(sides)
        if not box.any():  # a side of less than half a pixel
            assert low * min(size) <= 0.5
            continue
        # Half a pixel on either side of each dimension.
        least, most = np.array(sides) - 0.5, np.minimum(np.array(sides) + 0.5, size)
        assert np.prod(least) <= high * np.prod(size) * (1 + 1e-9)
        assert low * np.prod(size) <= np.prod(most) * (1 + 1e-9)


@settings(max_examples=40, deadline=None)
@given(seeds, st.integers(1, 40), st.integers(1, 40))
def test_pictures_boxes_are_drawn_as_they_are_published(seed, height, width):
    """To the bit: tables that name a seed rest on it."""
    mask = torch.zeros(2, 1, height, width, dtype=torch.bool)
    for i, (area, aspect, top, left) in enumerate(torch.rand(2, 4, generator=generator(seed), dtype=torch.float64).tolist()):
        area = 0.25 + area * 0.5
        tall = area ** (1 - aspect)
        rows, columns = round(height * tall), round(width * area / tall)
        y, x = int(top * (height - rows + 1)), int(left * (width - columns + 1))
        mask[i, 0, y : y + rows, x : x + columns] = True
    assert torch.equal(cut_mask((2, height, width), generator=generator(seed)), mask)


def test_a_volumes_boxes_reach_every_voxel_and_are_long_in_every_direction():
    masks = [cut_mask((1, 6, 6, 6), generator=generator(seed), share=(0.1, 0.3))[0, 0] for seed in range(300)]
    assert float(sum(mask.float() for mask in masks).min()) > 0
    full = [[mask.any(j).any(i).all() for mask in masks] for i, j in ((0, 1), (0, 2), (1, 2))]
    assert all(0.05 < np.mean(each) < 0.5 for each in full)


def test_several_ignored_classes_are_never_chosen():
    label = random_label(0, classes=6)
    for seed in range(20):
        chosen = label[class_mask(label, generator=generator(seed), ignore_index=(0, 3, 255))[:, 0]]
        assert not set(chosen.tolist()) & {0, 3, 255}
    assert len(chosen)


@pytest.mark.parametrize("shape", [(3, 30), (3, 5, 6), (3, 2, 3, 5)])
def test_pairs_with_an_ignored_label_are_not_judged(shape):
    label = torch.randint(0, 4, shape, generator=generator())
    image = torch.rand(3, 2, *shape[1:], generator=generator(1))
    blended, kept = blend_pairs(image, label, generator=generator(2), differing=True, ignore_index=(1, 255, 9))
    shift = next(s for s in (1, 2) if torch.allclose(blended, 0.65 * image + 0.35 * image.roll(s, 0)))
    other = label.roll(shift, 0)
    judged = (label != other) & (label != 1) & (other != 1)
    assert torch.equal(kept[judged], label[judged])
    assert set(kept[~judged].tolist()) == {1, 9}


def test_sizes_may_be_numpys():
    size = np.array([2, 5, 6])
    assert torch.equal(cut_mask(size, generator=generator()), cut_mask((2, 5, 6), generator=generator()))
    with pytest.raises(ValueError, match=r"cut_mask: expected size: \(N, \*spatial\), of two entries at least, got \(2,\)"):
        cut_mask((2,), generator=generator())


def test_class_255_is_not_dropped_in_silence():
    mask, hard = torch.ones(1, 1, 1, 2, dtype=torch.bool), torch.tensor([[[255, 1]]])
    soft = torch.full((1, 300, 1, 2), 1 / 300)
    with pytest.raises(ValueError, match=r"mix: expected ignore_index to be given with 300 classes, .* got none; .*-1"):
        mix(mask, hard, soft)
    assert mix(mask, hard, soft, ignore_index=255).sum(1).flatten().tolist() == [0.0, 1.0]
    assert mix(mask, hard, soft, ignore_index=-1)[0, 255, 0, 0] == 1.0
    assert mix(mask, hard, soft[:, :255]).sum(1).flatten().tolist() == [0.0, 1.0]
    assert torch.equal(mix(mask, soft, 2 * soft), soft)  # nothing becomes one-hot


@pytest.mark.parametrize("shift", [0, 3, -1])
def test_a_shift_by_which_an_image_would_meet_itself_is_refused(shift):
    image, label = torch.rand(3, 1, 2, 2), torch.zeros(3, 2, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"expected shift: a whole number in 1\.\.2, got"):
        blend_pairs(image, label, generator=torch.Generator(), shift=shift)
