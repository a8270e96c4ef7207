"""The target's accuracy, read off what shadows of several looks and strengths show: those have labels."""

import math
from typing import Callable, NamedTuple, Tuple

import numpy as np
import torch
from torch import Tensor

from ..shadows import LOOKS, shadows
from .contract import Estimate
from .curves import curves_of, fitted_spread, matched_spread, per_image, resamples, right_and_weight
from .material import Material
from .pixels import Pixels
from .scaling import fitted, matched

STRENGTHS = (0.5, 1.0, 2.0)
"""Of the shadows; beside them counts the source as it is. These and the next two are to be measured on more sets."""
RIDGE = 0.1
"""Shrinks the regression's coefficients: added to the correlations' diagonal."""
COVERAGE = 1.5
"""The target may be this many times as far from the source as the farthest shadow."""
_DIMENSIONS = 16  # principal components of the source's features that are looked at
_RANK = 1e-3  # the least variance of such a component, relative to the first


def shadow_fit(material: Material) -> Estimate:
    """Maximum likelihood on shadows of strength 1, of all looks."""
    pixels = _shadows_of(material, "shadow_fit", tuple(LOOKS), 1.0)
    curves = curves_of(pixels)
    times = resamples(pixels.images, material.generator_for("shadow_fit spread"))
    return Estimate(
        "shadow_fit",
        fitted(pixels.logits, pixels.label, pixels.weight),
        fitted_spread(curves, times) if pixels.images > 1 else math.nan,
        float(curves.correct.sum() / max(curves.weight.sum(), 1e-12)),
        f"maximum likelihood on {pixels.images} shadows",
    )


def shadow_regression(material: Material) -> Estimate:
    """From what can be seen without labels to accuracy: learnt on shadows, read off at the target.

    Seen are the mean confidence, and the distances of the features' mean and covariance to the source's, in units of the
    source's principal deviations. One T then makes the target's mean confidence the accuracy that was read off. The spread
    joins that of samples of images and the regression's own error.

    Source: regression from distances (Deng and Zheng, CVPR 2021), here on shadows of the target.
    """
    source, target = material.seen("source"), material.seen("target")
    basis = _basis(source)
    domains = [_seen(source, basis)]
    for look in LOOKS:
        for strength in STRENGTHS:
            domains.append(_seen(_shadows_of(material, f"shadows {look} {strength}", (look,), strength), basis))
    seen = _seen(target, basis)
    draw = material.generator_for("shadows spread")
    # The first sample is all images as they are.
    of_source, of_target = (np.concatenate([np.ones((1, n)), resamples(n, draw)]) for n in (source.images, target.images))
    places = np.stack([_place(domain, domains[0], of_source, of_source) for domain in domains], 1)
    place = _place(seen, domains[0], of_target, of_source)
    truth = _logit(np.stack([_mean(domain.correct, domain, of_source) for domain in domains], 1))
    said, error = predicted(places, truth, place)
    floor = 1 / source.logits.shape[1]
    accuracy = _expit(said).clip(floor, 1 - 1e-6)
    temperature, low, high = (
        matched(target.logits, float(_expit(said[0] + shift).clip(floor, 1 - 1e-6)), target.weight)
        for shift in (0.0, -error, error)
    )
    of_images = (
        matched_spread(material.curves("target"), of_target, accuracy) if min(source.images, target.images) > 1 else math.nan
    )
    farthest, far = places[0, :, 1:].max(0), place[0, 1:]
    covered = bool((far <= COVERAGE * np.maximum(farthest, 1e-12)).all())
    return Estimate(
        "shadows",
        temperature,
        math.hypot(of_images, math.log(low / high) / 2),
        float(accuracy[0]),
        f"accuracy {accuracy[0]:.3f} by {len(domains)} sets of shadows; the target's distance is "
        f"{(far / np.maximum(farthest, 1e-12)).max():.2f} of their farthest",
        covered,
    )


def predicted(places: np.ndarray, truth: np.ndarray, place: np.ndarray, *, ridge: float = RIDGE) -> Tuple[np.ndarray, float]:
    """Ridge regression of `truth` on `places`, at `place`, for B samples; and the error of the first one.

    Args:
        places: (B, D, k), what is seen of D domains.
        truth: (B, D), what is true of them.
        place: (B, k).
        ridge: added to the diagonal of the correlations of what is seen.

    Returns:
        (B,), and the standard deviation of the residuals.

    Example:
        >>> places = np.arange(5.0).reshape(1, 5, 1)
        >>> said, error = predicted(places, 2 * places[..., 0] + 1, np.array([[6.0]]), ridge=0.0)
        >>> said.round(6).tolist(), round(error, 6)
        ([13.0], 0.0)
    """
    middle, spread = places.mean(1, keepdims=True), places.std(1, keepdims=True)
    spread = np.where(spread > 1e-9, spread, 1.0)  # what is the same of all domains says nothing
    x, mean = (places - middle) / spread, truth.mean(1, keepdims=True)
    turned = x.transpose(0, 2, 1)
    gram = turned @ x / x.shape[1] + max(ridge, 1e-9) * np.eye(x.shape[2])
    slopes = np.linalg.solve(gram, turned @ (truth - mean)[..., None] / x.shape[1])
    said = mean[:, 0] + ((place[:, None] - middle) / spread @ slopes)[:, 0, 0]
    residuals = truth[0] - mean[0] - (x[0] @ slopes[0])[:, 0]
    free = max(1, x.shape[1] - x.shape[2] - 1)
    return said, float(np.sqrt((residuals**2).sum() / free))


class _Seen(NamedTuple):
    """Sums over the pixels of each of n images, and moments of their features in the source's basis."""

    correct: np.ndarray
    """(n,)."""
    weight: np.ndarray
    """(n,)."""
    confidence: np.ndarray
    """(n,), at T = 1."""
    mean: np.ndarray
    """(n, d)."""
    product: np.ndarray
    """(n, d, d), the mean of outer products."""


def _seen(pixels: Pixels, basis: Callable[[Tensor], np.ndarray]) -> _Seen:
    top = pixels.logits.double().softmax(1).max(1)[0]
    of = [basis(pixels.features[pixels.feature_image == i]) for i in range(pixels.images)]
    mean, product = np.stack([x.mean(0) for x in of]), np.stack([x.T @ x / len(x) for x in of])
    return _Seen(*right_and_weight(pixels), per_image(pixels, pixels.weight * top), mean, product)


def _place(domain: _Seen, source: _Seen, times: np.ndarray, source_times: np.ndarray) -> np.ndarray:
    """What is seen of a domain, in B samples of its images: (B, 3)."""
    confidence = _mean(domain.confidence, domain, times)
    (mean, covariance), (own_mean, own_covariance) = _moments(domain, times), _moments(source, source_times)
    size = math.sqrt(mean.shape[1])
    shift = np.linalg.norm(mean - own_mean, axis=1) / size
    change = np.linalg.norm((covariance - own_covariance).reshape(len(mean), -1), axis=1) / size
    return np.stack([_logit(confidence), shift, change], 1)


def _mean(figure: np.ndarray, domain: _Seen, times: np.ndarray) -> np.ndarray:
    """A figure's mean over the pixels, in B samples of images."""
    out: np.ndarray = times @ figure / np.maximum(times @ domain.weight, 1e-12)
    return out


def _moments(domain: _Seen, times: np.ndarray) -> Tuple[np.ndarray, np.ndarray]:
    share = times / times.sum(1, keepdims=True)
    mean = share @ domain.mean
    product = np.tensordot(share, domain.product, 1)
    return mean, product - mean[:, :, None] * mean[:, None, :]


def _basis(source: Pixels) -> Callable[[Tensor], np.ndarray]:
    """Features (Q, F) -> the source's principal components (Q, d), each of variance 1 there."""
    x = source.features.double().numpy()
    middle = x.mean(0)
    values, vectors = np.linalg.eigh((x - middle).T @ (x - middle) / len(x))
    values, vectors = values[::-1][:_DIMENSIONS], vectors[:, ::-1][:, :_DIMENSIONS]
    kept = values > _RANK * max(float(values[0]), 1e-30)
    project = vectors[:, kept] / np.sqrt(values[kept]) if kept.any() else np.zeros((x.shape[1], 1))

    def turned(features: Tensor) -> np.ndarray:
        out: np.ndarray = (features.double().numpy() - middle) @ project
        return out

    return turned


def _shadows_of(material: Material, name: str, looks: Tuple[str, ...], strength: float) -> Pixels:
    """What the student says of shadows of all source images."""
    draw = material.generator_for(name)

    def restyle(image: Tensor) -> Tensor:
        chosen = int(torch.randint(len(material.target.image), (1,), generator=draw))
        return shadows(
            image,
            material.target.image[chosen].unsqueeze(0),
            generator=draw,
            strength=strength,
            looks={look: LOOKS[look] for look in looks},
            value_range=material.value_range,
        )

    def one_by_one(image: Tensor) -> Tensor:  # target images may differ in size: each shadow has one of its own
        return torch.cat([restyle(x) for x in image.split(1)])

    return material.look(material.source, generator=material.generator_for(f"{name} pixels"), restyle=one_by_one)


def _logit(p: np.ndarray) -> np.ndarray:
    p = p.clip(1e-6, 1 - 1e-6)
    out: np.ndarray = np.log(p / (1 - p))
    return out


def _expit(x: np.ndarray) -> np.ndarray:
    out: np.ndarray = 1 / (1 + np.exp(-np.asarray(x)))
    return out
