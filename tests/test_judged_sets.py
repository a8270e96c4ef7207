import pytest
import torch

from dacal_addon.learners.judged_sets import (
    DomainBatch,
    differing_blends,
    source_and_target_pixels,
    source_pixels,
    target_blends,
)
from dacal_addon.mixing import class_mask


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def batch():
    g = generator()
    source_label = torch.randint(0, 5, (3, 6, 8), generator=g)
    source_label[:, 0, 0] = 255
    weight = torch.full((3, 6, 8), 0.7)
    weight[:, -1] = 0.0
    return DomainBatch(
        source_image=torch.rand(3, 3, 6, 8, generator=g),
        source_label=source_label,
        target_image=torch.rand(3, 3, 6, 8, generator=g) + 1,  # disjoint from the source's range
        pseudo_label=torch.randint(0, 5, (3, 6, 8), generator=g),
        weight=weight,
        mask=class_mask(source_label, generator=g),
        ignore_index=255,
    )


def test_the_complementary_mix_shows_what_the_inner_one_hides(batch):
    outer = source_and_target_pixels(batch, generator=generator())
    inner_source = batch.mask[:, 0]
    from_target = outer.image[:, 0] >= 1
    assert torch.equal(from_target, inner_source)
    assert torch.equal(outer.label[~inner_source], batch.source_label[~inner_source])
    judged = inner_source & (batch.weight > 0)
    assert torch.equal(outer.label[judged], batch.pseudo_label[judged])
    assert bool((outer.label[inner_source & (batch.weight == 0)] == 255).all())
    assert bool((outer.weight[~inner_source] == 1).all())
    assert torch.equal(outer.weight[inner_source], batch.weight[inner_source])


def test_source_pixels_judges_by_ground_truth_alone(batch):
    outer = source_pixels(batch, generator=generator())
    assert torch.equal(outer.image, source_and_target_pixels(batch, generator=generator()).image)
    assert bool((outer.label[batch.mask[:, 0]] == 255).all())
    assert torch.equal(outer.label[~batch.mask[:, 0]], batch.source_label[~batch.mask[:, 0]])


@pytest.mark.parametrize("seed", range(5))
def test_blends_blends_each_image_with_another_one(batch, seed):
    outer = target_blends(batch, generator=generator(seed), share=0.65)
    other = (outer.image - 0.65 * batch.target_image) / 0.35
    for i in range(3):
        matches = [torch.allclose(other[i], batch.target_image[j], atol=1e-5) for j in range(3)]
        assert sum(matches) == 1
        assert not matches[i]
    assert torch.equal(outer.label[:, :-1], batch.pseudo_label[:, :-1])
    assert bool((outer.label[:, -1] == 255).all())


@pytest.mark.parametrize("seed", range(5))
def test_blends_can_judge_only_where_the_two_labels_differ(batch, seed):
    """Which image was blended in is read off the pixels."""
    outer = target_blends(batch, generator=generator(seed), share=0.65, differing=True)
    other = (outer.image - 0.65 * batch.target_image) / 0.35
    usable = batch.pseudo_label.masked_fill(batch.weight == 0, 255)
    for i in range(3):
        (partner,) = [j for j in range(3) if torch.allclose(other[i], batch.target_image[j], atol=1e-5)]
        differs = usable[i] != usable[partner]
        assert torch.equal(outer.label[i], torch.where(differs, usable[i], torch.full_like(usable[i], 255)))
        assert 0 < int(differs.sum()) < differs.numel()


def test_differing_blends_are_the_same_with_every_judged_pixel_alike(batch):
    blends = target_blends(batch, generator=generator(3), differing=True)
    alike = differing_blends(batch, generator=generator(3))
    assert torch.equal(alike.image, blends.image)
    assert torch.equal(alike.label, blends.label)
    assert bool((alike.weight == 1).all())
    assert torch.equal(blends.weight, batch.weight)


def test_blends_needs_two_images(batch):
    one = DomainBatch(*(value[:1] if isinstance(value, torch.Tensor) else value for value in batch))
    with pytest.raises(ValueError, match="expected at least 2 target images to blend, got 1"):
        target_blends(one, generator=generator())


def test_several_ignored_labels_are_written_as_the_last(batch):
    several = batch._replace(ignore_index=(255, 3))
    assert torch.equal(source_pixels(several, generator=generator()).label[batch.mask[:, 0]].unique(), torch.tensor([3]))
    unused = several._replace(weight=torch.zeros_like(batch.weight))
    assert torch.equal(target_blends(unused, generator=generator()).label.unique(), torch.tensor([3]))
