"""Source images in the target's look: each look against a second implementation, and what is drawn from the generator."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from dacal_addon.shadows import LOOKS, blurred, colour_statistics, low_frequencies, shadows


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def images(n=3, channels=3, size=(20, 31), seed=0, dtype=torch.float64):
    return torch.rand(n, channels, *size, generator=generator(seed), dtype=dtype)


@pytest.mark.parametrize("channels", [1, 3])
def test_colours_are_the_references(channels):
    image, reference = images(channels=channels), 3 * images(channels=channels, seed=1, size=(9, 50)) - 7
    for strength in (0.0, 0.5, 1.0, 1.5):
        found = colour_statistics(image, reference, strength=strength)
        mean = (1 - strength) * image.mean((2, 3)) + strength * reference.mean((2, 3))
        spread = image.numpy().std((2, 3)) ** (1 - strength) * reference.numpy().std((2, 3)) ** strength
        assert torch.allclose(found.mean((2, 3)), mean, rtol=1e-9)
        assert np.allclose(found.numpy().std((2, 3)), spread, rtol=1e-6)
        # Linear in the image: what was twice as far from the mean still is.
        one = (found - found.mean((2, 3), keepdim=True)) / (image - image.mean((2, 3), keepdim=True))
        assert torch.allclose(one, one[..., :1, :1].expand_as(one), rtol=1e-6)


def test_flat_images_stay_flat_and_flat_references_make_flat_ones():
    flat = torch.full((1, 3, 33, 47), 0.1)
    assert float((flat - flat.mean((2, 3), keepdim=True)).abs().max()) > 0  # but for rounding
    reference = images(1, size=(8, 8)).float()
    found = colour_statistics(flat, reference)
    assert torch.allclose(found.mean((2, 3)), reference.mean((2, 3)), atol=1e-5)
    assert bool(torch.isfinite(found).all())
    assert float((found - found.mean((2, 3), keepdim=True)).abs().max()) < 1e-5
    assert torch.allclose(colour_statistics(images(1).float(), flat), torch.full((1, 3, 20, 31), 0.1), atol=1e-6)


def fda(source, target, band, strength=1.0):
    """Yang and Soatto's code in numpy: shift the spectrum, put one centre into the other, back."""
    a, b = np.fft.fft2(source), np.fft.fft2(target)
    amplitude, other = np.fft.fftshift(np.abs(a), (-2, -1)), np.fft.fftshift(np.abs(b), (-2, -1))
    h, w = source.shape[-2:]
    r = int(np.floor(min(h, w) * band))
    y, x = h // 2, w // 2
    window = (Ellipsis, slice(y - r, y + r + 1), slice(x - r, x + r + 1))
    amplitude[window] = np.maximum((1 - strength) * amplitude[window] + strength * other[window], 0)
    return np.real(np.fft.ifft2(np.fft.ifftshift(amplitude, (-2, -1)) * np.exp(1j * np.angle(a))))


@pytest.mark.parametrize("size", [(20, 31), (32, 32), (21, 20)])
@pytest.mark.parametrize(("band", "strength"), [(0.05, 1.0), (0.1, 1.0), (0.1, 0.5), (0.2, 1.7)])
def test_low_frequencies_are_fdas(size, band, strength):
    # strength > 1 of the mean is no matter of amplitude: see the next test
    source, target = images(size=size), images(size=size, seed=1)
    if strength > 1:
        target = target - target.mean((2, 3), keepdim=True) + source.mean((2, 3), keepdim=True)
    found = low_frequencies(source, target, band=band, strength=strength)
    assert np.allclose(found.numpy(), fda(source.numpy(), target.numpy(), band, strength), atol=1e-9)
    single = low_frequencies(source.float(), target.float(), band=band, strength=strength)
    assert single.dtype == torch.float32
    assert torch.allclose(single.double(), found, atol=1e-5)


def test_low_frequencies_do_not_depend_on_where_zero_is():
    source, target = images(), images(seed=1)
    shifted = low_frequencies(source - 0.5, target - 0.7)
    assert torch.allclose(shifted, low_frequencies(source, target) - 0.7, atol=1e-9)
    assert torch.allclose(low_frequencies(source, target).mean((2, 3)), target.mean((2, 3)))


def test_a_reference_of_another_size_gives_its_amplitudes_per_pixel():
    wave = torch.cos(torch.arange(24, dtype=torch.float64) * 2 * math.pi / 24).view(1, 1, 24, 1)
    longer = torch.cos(torch.arange(40, dtype=torch.float64) * 2 * math.pi / 40).view(1, 1, 40, 1)
    found = low_frequencies(wave.expand(1, 1, 24, 24), 5 * longer.expand(1, 1, 40, 30))
    assert torch.allclose(found, 5 * wave.expand(1, 1, 24, 24), atol=1e-9)


def test_the_band_stays_below_the_highest_frequency():
    for size in ((4, 4), (5, 9), (2, 7), (1, 1)):
        source, target = images(size=size), images(size=size, seed=1)
        found = low_frequencies(source, target, band=0.5)
        assert bool(torch.isfinite(found).all())
        assert torch.allclose(found.mean((2, 3)), target.mean((2, 3)))


@pytest.mark.parametrize("sigma", [0.3, 0.8, 1.3])
def test_blur_is_scipys(sigma):
    image = images(size=(14, 11))
    radius = math.ceil(3 * sigma)
    oracle = gaussian_filter(image.numpy(), (0, 0, sigma, sigma), mode="nearest", truncate=radius / sigma)
    assert np.allclose(blurred(image, sigma).numpy(), oracle, atol=1e-12)


def test_each_image_may_have_a_blur_of_its_own():
    image, sigma = images(), torch.tensor([0.0, 0.5, 1.3])
    found = blurred(image, sigma)
    assert torch.allclose(found[:1], image[:1], atol=1e-12)
    assert torch.allclose(found[1:2], blurred(image[1:2], 0.5), atol=1e-6)
    assert torch.allclose(found[2:], blurred(image[2:], 1.3), atol=1e-12)
    with pytest.raises(ValueError, match="blurred: expected sigma >= 0, got -1; pass deviations in pixels"):
        blurred(image, -1.0)


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("channels", [1, 3])
def test_strength_nothing_is_the_image_and_one_has_the_targets_mean(look, channels):
    source, target = images(2, channels), 40 * images(1, channels, seed=1, size=(16, 16)) - 100
    options = {"generator": generator(), "looks": {look: LOOKS[look]}}
    assert torch.allclose(shadows(source, target, strength=0.0, **options), source, atol=1e-9)
    found = shadows(source, target, blur=0.0, **options)
    assert found.shape == source.shape
    assert torch.allclose(found.mean((2, 3)), target.mean((2, 3)).expand(2, channels))


def test_half_of_them_are_blurred_and_references_and_looks_vary():
    plain = {"one": lambda image, reference, **_: 0 * image + reference.mean(), "two": lambda image, reference, **_: image}
    source = images(400, 1, (6, 6))
    target = torch.arange(1.0, 6.0).view(5, 1, 1, 1).expand(5, 1, 6, 6).double() + 10
    found = shadows(source, target, generator=generator(), looks=plain)
    restyled = found.mean((1, 2, 3)) > 5
    assert 0.4 < float(restyled.double().mean()) < 0.6
    assert len(found[restyled][:, 0, 0, 0].round().unique()) == 5
    same = (found == source).flatten(1).all(1)[~restyled]
    assert 0.4 < float(same.double().mean()) < 0.6


def test_only_the_generator_is_drawn_from():
    source, target = images(), images(seed=1)
    state = torch.get_rng_state()
    first = shadows(source, target, generator=generator(3))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, shadows(source, target, generator=generator(3)))
    assert not torch.equal(first, shadows(source, target, generator=generator(4)))


def test_values_are_clamped_only_to_a_range_that_is_given():
    source, target = images(), images(seed=1) ** 4
    wide = shadows(source, target, generator=generator(), strength=3.0)
    assert float(wide.min()) < 0
    narrow = shadows(source, target, generator=generator(), strength=3.0, value_range=(0, 1))
    assert torch.equal(narrow, wide.clamp(0, 1))
    with pytest.raises(ValueError, match=r"shadows: expected value_range: \(low, high\), got \(1, 0\)"):
        shadows(source, target, generator=generator(), value_range=(1, 0))


def test_wrong_images_are_named():
    with pytest.raises(ValueError, match=r"shadows: expected target_image: \(M, 3, \*spatial\).* got float64 \(3, 1, 20, 31\)"):
        shadows(images(), images(channels=1), generator=generator())
    with pytest.raises(ValueError, match=r"low_frequencies: expected reference: \(3, 3, 'H', 'W'\), one for each image"):
        low_frequencies(images(), images(2))
    with pytest.raises(ValueError, match=r"colour_statistics: expected strength >= 0, got -1"):
        colour_statistics(images(), images(), strength=-1)


def test_torchs_fft_stays_what_it_is():
    """In torch 1.7.1 the import of the module replaces the function of the same name, for everybody."""
    code = "import torch; before = torch.fft; import dacal_addon.calibrate; assert torch.fft is before"
    subprocess.run([sys.executable, "-c", code], check=True)


# Volumes, and rows of pixels


def fda_of_any_dimension(source, target, radius):
    """The same rule on numpy's n-dimensional spectrum; the mean with its sign."""
    axes = tuple(range(2, source.ndim))
    a, b = np.fft.fftn(source, axes=axes), np.fft.fftn(target, axes=axes)
    low = np.ones(source.shape[2:], dtype=bool)
    for axis, side in enumerate(source.shape[2:]):
        near = np.abs(np.fft.fftfreq(side) * side) <= radius
        low &= near.reshape([-1 if i == axis else 1 for i in range(len(axes))])
    mixed = np.where(low, np.abs(b) * np.exp(1j * np.angle(a)), a)
    return np.real(np.fft.ifftn(mixed, axes=axes))


@pytest.mark.parametrize(("size", "band", "radius"), [((40,), 0.1, 4), ((10, 12, 11), 0.2, 2), ((20, 30), 0.1, 2)])
def test_low_frequencies_of_volumes_and_rows_are_fdas(size, band, radius):
    source, target = images(size=size), images(size=size, seed=1)
    found = low_frequencies(source, target, band=band)
    assert np.allclose(found.numpy(), fda_of_any_dimension(source.numpy(), target.numpy(), radius), atol=1e-9)


@pytest.mark.parametrize("size", [(20,), (6, 7, 8)])
def test_blur_and_colours_of_volumes_and_rows(size):
    image, reference = images(size=size), 5 * images(size=size, seed=1) + 2
    sigma = (0.8,) * len(size)
    oracle = gaussian_filter(image.numpy(), (0, 0, *sigma), mode="nearest", truncate=3 / 0.8)
    assert np.allclose(blurred(image, 0.8).numpy(), oracle, atol=1e-12)
    found = colour_statistics(image, reference).flatten(2)
    assert torch.allclose(found.mean(2), reference.flatten(2).mean(2))
    assert np.allclose(found.numpy().std(2), reference.flatten(2).numpy().std(2), rtol=1e-6)


@pytest.mark.parametrize("size", [(20,), (6, 7, 8)])
def test_shadows_of_volumes_have_the_targets_mean(size):
    source, target = images(4, size=size), 3 * images(1, size=[n + 1 for n in size], seed=1) - 20
    found = shadows(source, target, generator=generator(), blur=0.0)
    assert torch.allclose(found.flatten(2).mean(2), target.flatten(2).mean(2).expand(4, 3))
    assert not torch.allclose(shadows(source, target, generator=generator(), blur=1.0), found)


def test_more_than_volumes_and_slices_beside_volumes_are_refused():
    for call in (lambda x: blurred(x, 1.0), lambda x: low_frequencies(x, x), lambda x: colour_statistics(x, x)):
        with pytest.raises(ValueError, match=r"image: one to three spatial dimensions, got float64 .*; flatten some of them"):
            call(images(size=(2, 3, 4, 5)))
    with pytest.raises(ValueError, match=r"shadows: expected target_image: \(M, 3, \*spatial\).* got float64 \(3, 3, 20, 31\)"):
        shadows(images(size=(4, 20, 31)), images(), generator=generator())
