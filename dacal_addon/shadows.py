"""Shadows of the target: source images in the target's look. Their labels are true ones, and for judging alone.

A look is any function `(image, reference, *, strength, generator) -> image`; those in `LOOKS` are built in. Images may have any
number of channels and any range, normalised ones too; no global random state is touched. `*S` stands for one to three spatial
dimensions: H, W of pictures, D, H, W of volumes.
"""

import math
from typing import Dict, Mapping, Optional, Protocol, Sequence, Tuple, Union

import torch
import torch.nn.functional as F
from torch import Tensor

from ._check import check_image, check_number, check_tensor, describe, problem
from ._upcast import at_least_float32

BAND = (0.05, 0.10)
"""Of FDA, as a share of the shorter side: drawn uniformly for each image."""
SIGMA = (0.3, 1.3)
"""Of the blur, in pixels."""
_CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_FLAT = 1e-6  # the least deviation of a channel, relative to the image's largest value: a flat one has no contrast to change


class Look(Protocol):
    """Source images in the look of as many target images; what it draws comes from `generator`."""

    def __call__(self, image: Tensor, reference: Tensor, *, strength: float, generator: torch.Generator) -> Tensor: ...


def colour_statistics(image: Tensor, reference: Tensor, *, strength: float = 1.0) -> Tensor:
    """Each channel of each image with the mean and the standard deviation that it has in the reference.

    Args:
        image: (N, K, *S) floating.
        reference: (N, K, *S') floating, one reference for each image; of any size.
        strength: 0 for the image itself, 1 for the reference's statistics; above 1 beyond them. Means change linearly,
            deviations geometrically. >= 0.

    Example:
        >>> image, reference = torch.tensor([0.0, 2.0]).view(1, 1, 1, 2), torch.tensor([4.0, 12.0]).view(1, 1, 1, 2)
        >>> colour_statistics(image, reference).flatten().tolist()
        [4.0, 12.0]
        >>> colour_statistics(image, reference, strength=0.5).flatten().tolist()  # mean (1 + 8) / 2, deviation 1 * 4 ** 0.5
        [2.5, 6.5]

    Source: Reinhard et al. (IEEE CG&A 2001), in the images' own channels.
    """
    x, y = _checked("colour_statistics", image, reference, strength)
    own, new = _mean(x), _mean(y)
    spread, wanted = _mean((x - own).pow(2)).sqrt(), _mean((y - new).pow(2)).sqrt()
    floor = _FLAT * _largest(x).clamp(min=1e-30)
    # A flat image stays flat, and a flat reference makes one.
    ratio = torch.where(spread > floor, wanted / torch.max(spread, floor), torch.ones_like(spread)).pow(strength)
    return ((x - own) * ratio + own + strength * (new - own)).to(image.dtype)


def low_frequencies(image: Tensor, reference: Tensor, *, band: float = 0.05, strength: float = 1.0) -> Tensor:
    """The amplitudes of the reference's low frequencies under the image's phases.

    The few frequencies are summed directly: `torch.fft` is another thing in torch 1.7.1, and an import there would change it
    for everybody. The mean is set to the reference's, whatever its sign, so that images need not be positive.

    Args:
        image: (N, K, *S) floating.
        reference: (N, K, *S') floating; of any size, amplitudes are per pixel.
        band: frequencies up to `band` times the shorter side, at least one, in each direction; in 0..0.5. FDA's beta.
        strength: 0 for the image itself, 1 for the reference's amplitudes; above 1 beyond them, but not below 0. >= 0.

    Example:
        >>> wave = torch.cos(torch.arange(16) * 2 * math.pi / 16).view(1, 1, 1, 16).expand(1, 1, 16, 16)
        >>> bool(torch.allclose(low_frequencies(wave, 3 * wave + 5), 3 * wave + 5, atol=1e-5))
        True

    Source: FDA (Yang and Soatto, CVPR 2020).
    """
    x, y = _checked("low_frequencies", image, reference, strength)
    check_number("low_frequencies", "band", band, low=0.0, high=0.5, rule="in 0..0.5, a share of the shorter side")
    size = x.shape[2:]
    # The highest frequency of an even side is its own mirror image, and beyond it there is none.
    most = (min(*size, *y.shape[2:]) - 1) // 2
    radius = min(max(1, math.floor(band * min(size))), most)
    waves = [_waves(side, radius, x) for side in size]
    real, imaginary = _spectrum(x, waves)
    wanted = _amplitude(*_spectrum(y, [_waves(side, radius, y) for side in y.shape[2:]]))
    own = _amplitude(real, imaginary)
    new = (own + strength * (wanted - own)).clamp(min=0.0)
    tiny = 1e-12 * _largest(own).clamp(min=1e-30)
    # Phase 0 where the image has nothing of a frequency.
    change = torch.where(own > tiny, new / torch.max(own, tiny) - 1, torch.zeros_like(own))
    real_change = torch.where(own > tiny, real * change, new - real)
    imaginary_change = torch.where(own > tiny, imaginary * change, -imaginary)
    middle = (..., *[radius] * len(size))
    real_change[middle], imaginary_change[middle] = strength * (_mean(y) - _mean(x)).flatten(1), 0.0
    return (x + _image(real_change, imaginary_change, waves)).to(image.dtype)


def blurred(image: Tensor, sigma: Union[float, Tensor]) -> Tensor:
    """Each image under a Gaussian blur.

    Args:
        image: (N, K, *S) floating.
        sigma: in pixels, >= 0; one, or one for each image, (N,). The border is continued.

    Example:
        >>> dot = torch.zeros(1, 1, 5, 5)
        >>> dot[..., 2, 2] = 1
        >>> [round(x, 3) for x in blurred(dot, 0.5)[0, 0, 2].tolist()]
        [0.0, 0.084, 0.619, 0.084, 0.0]
    """
    x = at_least_float32(_at_most_volumes("blurred", "image", check_image("blurred", "image", image)))
    n, channels, *size = x.shape
    sigmas = torch.as_tensor(sigma, dtype=x.dtype, device=x.device).expand(n)
    if not bool((sigmas >= 0).all()):
        remedy = "pass deviations in pixels"
        raise problem("blurred", expected="sigma >= 0", got=f"{float(sigmas.min()):g}", remedy=remedy)
    radius = math.ceil(3 * float(sigmas.max())) if n else 0
    if radius == 0:
        return image
    steps = torch.arange(-radius, radius + 1, dtype=x.dtype, device=x.device)
    kernel = torch.exp(-0.5 * (steps / sigmas.clamp(min=1e-3).view(-1, 1)) ** 2)
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(channels, 0)
    x = x.reshape(1, n * channels, *size)
    d = len(size)
    for i in range(d):  # the last dimension first, as `F.pad` counts
        shape, padding = [1] * d, [0] * (2 * d)
        shape[d - 1 - i], padding[2 * i : 2 * i + 2] = 2 * radius + 1, (radius, radius)
        padded = F.pad(x, padding, mode="replicate")
        x = _CONVOLVE[d](padded, kernel.view(-1, 1, *shape), groups=n * channels)
    return x.view(n, channels, *size).to(image.dtype)


def _colour(image: Tensor, reference: Tensor, *, strength: float, generator: torch.Generator) -> Tensor:
    return colour_statistics(image, reference, strength=strength)


def _frequencies(image: Tensor, reference: Tensor, *, strength: float, generator: torch.Generator) -> Tensor:
    return low_frequencies(image, reference, band=_uniform(BAND, generator), strength=strength)


def _both(image: Tensor, reference: Tensor, *, strength: float, generator: torch.Generator) -> Tensor:
    """The frequencies of what has the reference's colours already, so that contrast and gradients both are the target's."""
    return _frequencies(
        colour_statistics(image, reference, strength=strength), reference, strength=strength, generator=generator
    )


LOOKS: Dict[str, Look] = {"colour": _colour, "frequencies": _frequencies, "both": _both}


def shadows(
    source_image: Tensor,
    target_image: Tensor,
    *,
    generator: torch.Generator,
    strength: float = 1.0,
    looks: Optional[Mapping[str, Look]] = None,
    blur: float = 0.5,
    value_range: Optional[Tuple[float, float]] = None,
) -> Tensor:
    """Source images in the look of target images; their labels are still true.

    Each image gets a target image and a look at random, and with the chance `blur` a Gaussian blur of sigma 0.3 to 1.3 pixels.

    Args:
        source_image: (N, K, *S) floating.
        target_image: (M, K, *S') floating, M >= 1, as the network sees them, like the source's.
        generator: the only source of randomness.
        strength: of look and blur, >= 0: 0 leaves the images as they are, 1 has the target's statistics, more exaggerates.
        looks: names and functions to draw from; None for `LOOKS`.
        blur: the chance of a blur, in 0..1.
        value_range: clamp to it, as (0, 1) for images that are not normalised; None: no clamp.

    Returns:
        (N, K, *S), of the source's kind.

    Raises:
        ValueError, TypeError: images of another shape or kind; other channels than the source's.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> source, target = torch.rand(4, 3, 16, 16, generator=g), 5 + torch.rand(2, 3, 16, 16, generator=g)
        >>> round(float(shadows(source, target, generator=g).mean()), 1)
        5.5

    Source: the looks are FDA's (Yang and Soatto, CVPR 2020) and Reinhard's (Reinhard et al., IEEE CG&A 2001).
    """
    source = check_image("shadows", "source_image", source_image)
    target = check_image("shadows", "target_image", target_image)
    if not len(target) or target.shape[1] != source.shape[1] or target.dim() != source.dim():
        expected = f"target_image: (M, {source.shape[1]}, *spatial), M >= 1, with the source's channels"
        raise problem("shadows", expected=expected, got=describe(target), remedy="pass target images as the network sees them")
    check_number("shadows", "strength", strength, low=0.0, rule=">= 0")
    check_number("shadows", "blur", blur, low=0.0, high=1.0, rule="in 0..1")
    if value_range is not None and not value_range[0] < value_range[1]:
        remedy = "pass the least and the largest value of an image"
        raise problem("shadows", expected="value_range: (low, high)", got=repr(value_range), remedy=remedy)
    chosen = list((LOOKS if looks is None else looks).values())
    if not chosen:
        raise problem("shadows", expected="looks: at least one", got="none", remedy="leave it out for LOOKS")
    images = []
    for image in source.split(1):
        reference = target[_below(len(target), generator)].unsqueeze(0).to(image.device)
        restyled = chosen[_below(len(chosen), generator)](image, reference, strength=strength, generator=generator)
        sigma = strength * _uniform(SIGMA, generator)
        images.append(blurred(restyled, sigma) if _uniform((0.0, 1.0), generator) < blur else restyled)
    if not images:
        return source
    image = torch.cat(images)
    return image if value_range is None else image.clamp(*value_range)


def _below(limit: int, generator: torch.Generator) -> int:
    return int(torch.randint(limit, (1,), generator=generator, device=generator.device))


def _uniform(limits: Tuple[float, float], generator: torch.Generator) -> float:
    u = float(torch.rand(1, generator=generator, device=generator.device, dtype=torch.float64))
    return limits[0] + u * (limits[1] - limits[0])


def _checked(function: str, image: Tensor, reference: Tensor, strength: float) -> Tuple[Tensor, Tensor]:
    _at_most_volumes(function, "image", check_image(function, "image", image))
    expected = f"reference: {(*image.shape[:2], *'DHW'[5 - image.dim() :])}, one for each image"
    other = check_tensor(function, "reference", reference, expected=expected, remedy="pass target images")
    if other.dim() != image.dim() or other.shape[:2] != image.shape[:2] or not other.is_floating_point():
        raise problem(function, expected=expected, got=describe(other), remedy="repeat or choose target images to match")
    check_number(function, "strength", strength, low=0.0, rule=">= 0")
    return at_least_float32(image), at_least_float32(other)


def _at_most_volumes(function: str, name: str, image: Tensor) -> Tensor:
    if image.dim() > 5:
        expected, remedy = f"{name}: one to three spatial dimensions", "flatten some of them"
        raise problem(function, expected=expected, got=describe(image), remedy=remedy)
    return image


def _mean(x: Tensor) -> Tensor:
    """Of each channel of each image."""
    return x.mean(tuple(range(2, x.dim())), keepdim=True)


def _largest(x: Tensor) -> Tensor:
    """The largest absolute value of each image."""
    return x.abs().flatten(1).max(1)[0].view(-1, *[1] * (x.dim() - 1))


def _waves(size: int, radius: int, like: Tensor) -> Tuple[Tensor, Tensor]:
    """Cosines and sines (2 * radius + 1, size) of the frequencies -radius..radius."""
    # In float64: at the phases of a large image float32 has no digits left.
    steps = torch.arange(size, dtype=torch.float64)
    angle = 2 * math.pi / size * torch.arange(-radius, radius + 1, dtype=torch.float64)[:, None] * steps
    return angle.cos().to(like), angle.sin().to(like)


def _spectrum(x: Tensor, waves: Sequence[Tuple[Tensor, Tensor]]) -> Tuple[Tensor, Tensor]:
    """Real and imaginary parts (N, K, 2 radius + 1, ...) of the mean of x * exp(-i angle), one angle a dimension."""
    pixels = x[0, 0].numel()
    (cosines, sines), *others = waves
    real, imaginary = _along(2, cosines, x), -_along(2, sines, x)
    for dim, (cosines, sines) in enumerate(others, start=3):
        in_phase = _along(dim, cosines, real) + _along(dim, sines, imaginary)
        imaginary = _along(dim, cosines, imaginary) - _along(dim, sines, real)
        real = in_phase
    return real / pixels, imaginary / pixels


def _image(real: Tensor, imaginary: Tensor, waves: Sequence[Tuple[Tensor, Tensor]]) -> Tensor:
    """The real part of the sum of a spectrum times exp(i angle)."""
    *others, (last_cosines, last_sines) = waves
    for dim, (cosines, sines) in enumerate(others, start=2):
        in_phase = _along(dim, cosines.t(), real) - _along(dim, sines.t(), imaginary)
        imaginary = _along(dim, sines.t(), real) + _along(dim, cosines.t(), imaginary)
        real = in_phase
    return _along(-1, last_cosines.t(), real) - _along(-1, last_sines.t(), imaginary)


def _along(dim: int, matrix: Tensor, x: Tensor) -> Tensor:
    """The matrix times each vector of x along one dimension."""
    return x.transpose(dim, -1).matmul(matrix.t()).transpose(dim, -1)


def _amplitude(real: Tensor, imaginary: Tensor) -> Tensor:
    return (real.pow(2) + imaginary.pow(2)).sqrt()
