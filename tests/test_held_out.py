"""Source images that are kept back: none is in both parts, and one that is trained on all the same is noticed."""

import random

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dacal_addon.held_out import Fingerprints, check_apart, hold_out


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def maps(n=3, size=(5, 7), seed=0):
    return torch.randint(0, 4, (n, *size), generator=generator(seed))


@settings(deadline=None, max_examples=60)
@given(count=st.integers(2, 60), share=st.floats(0.0, 1.0, exclude_min=True, exclude_max=True), seed=st.integers(0, 9))
def test_every_image_is_in_one_part_and_neither_part_is_empty(count, share, seed):
    dataset = [f"image {i}" for i in range(count)]
    train, held_out = hold_out(dataset, share=share, generator=generator(seed))
    assert sorted([*train.indices, *held_out.indices]) == list(range(count))
    assert [*train] == [dataset[i] for i in train.indices]
    assert len(train) >= 1
    assert len(held_out) >= 1
    assert abs(len(held_out) - share * count) <= 0.5 + max(0, 1 - share * count, 1 - (1 - share) * count)


def test_the_seed_decides_which_and_nothing_else_does():
    torch.manual_seed(5)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    first = hold_out(range(200))[1].indices
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]
    torch.manual_seed(6)
    assert hold_out(range(200))[1].indices == first == hold_out(range(200), generator=generator(0))[1].indices
    others = {tuple(hold_out(range(200), generator=generator(seed))[1].indices) for seed in range(8)}
    assert len(others) == 8
    assert first not in (list(range(25)), list(range(175, 200)))  # at random, not from one end
    # Any of them: 8 x 25 draws of 200 reach both halves about equally.
    assert 60 < sum(i < 100 for indices in others for i in indices) < 140


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_a_share_of_all_or_nothing_is_refused(share):
    with pytest.raises(ValueError, match=rf"hold_out: expected share in \(0, 1\), got {share}; choose a value in that range"):
        hold_out(range(9), share=share)


@pytest.mark.parametrize("count", [0, 1])
def test_one_image_cannot_be_split(count):
    with pytest.raises(ValueError, match=f"hold_out: expected a dataset of at least 2 images, got {count}; pass the whole"):
        hold_out(range(count))


KINDS = [torch.uint8, torch.int16, torch.int32, torch.int64, torch.float32]


@settings(deadline=None, max_examples=60)
@given(
    kept=st.sampled_from(KINDS),
    trained=st.sampled_from(KINDS),
    place=st.integers(0, 3),
    which=st.integers(0, 2),
    sliced=st.booleans(),
)
def test_a_map_that_was_kept_back_is_found_in_any_kind_and_layout(kept, trained, place, which, sliced):
    known = Fingerprints([x.to(kept) for x in maps()])
    batch = maps(4, seed=1)
    batch[place] = maps()[which]
    batch = batch.to(trained)
    if sliced:  # the same values, at other strides
        wide = torch.full((7, 8, 5), 9, dtype=trained)
        wide[:, ::2] = batch.permute(2, 0, 1)
        batch = wide[:, ::2].permute(1, 2, 0)
        assert not batch[place].is_contiguous()
    assert known.among(batch, ignore_index=255) == [place]
    with pytest.raises(ValueError, match=f"a training batch whose image {place} has the label map of a held-out one; train on"):
        check_apart("f", known, batch, ignore_index=255)


@settings(deadline=None, max_examples=40)
@given(row=st.integers(0, 4), column=st.integers(0, 6), change=st.integers(1, 300))
@example(row=0, column=0, change=256)
def test_one_pixel_that_differs_makes_another_map(row, column, change):
    """By 256 too: labels are not cut to a byte."""
    batch = maps()
    batch[:, row, column] += change
    assert Fingerprints(maps()).among(batch, ignore_index=255) == []
    check_apart("f", Fingerprints(maps()), batch, ignore_index=255)


def test_all_of_a_batch_are_named():
    batch = torch.cat([maps(2, seed=1), maps(2)])
    assert Fingerprints(maps()).among(batch, ignore_index=255) == [2, 3]


@pytest.mark.parametrize("size", [(7, 5), (1, 35), (35, 1)])
def test_the_same_numbers_in_another_shape_are_no_match(size):
    known = Fingerprints(maps())
    assert known.among(maps(), ignore_index=255) == [0, 1, 2]
    assert known.among(maps().view(3, *size), ignore_index=255) == []
    assert known.among(maps().transpose(1, 2), ignore_index=255) == []


def test_maps_of_one_class_say_nothing_also_beside_pixels_that_are_ignored():
    plain = torch.full((1, 5, 7), 2)
    bordered, two = plain.clone(), plain.clone()
    bordered[:, 0] = 255
    two[:, 0] = 3
    for label in (plain, bordered, torch.full((1, 5, 7), 255)):
        assert Fingerprints(label).among(label, ignore_index=255) == []
        check_apart("f", Fingerprints(label), label, ignore_index=255)
    assert Fingerprints(two).among(two, ignore_index=255) == [0]
    assert Fingerprints(two).among(two, ignore_index=3) == []
    assert Fingerprints(bordered).among(bordered, ignore_index=-1) == [0]  # where 255 is a class
    assert Fingerprints(maps(1, (0, 7))).among(maps(1, (0, 7)), ignore_index=255) == []


def test_volumes_and_several_ignored_labels():
    volume = maps().view(1, 3, 5, 7)
    assert Fingerprints(volume).among(torch.cat([volume + 1, volume]), ignore_index=(0, 255)) == [1]
    two = torch.full((1, 2, 3, 4), 2)
    two[:, 0] = 0
    assert Fingerprints(two).among(two, ignore_index=255) == [0]
    assert Fingerprints(two).among(two, ignore_index=(255, 0)) == []  # one class beside what is ignored
