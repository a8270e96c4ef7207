"""Estimators of the one temperature that calibrates a network on the target. All but `labelled` do without target labels."""

import math
from typing import Dict, Tuple

import numpy as np
import torch

from .._check import problem
from ..ignoring import is_ignored
from ..learners.temperature_fit import class_share_weights
from ..mixing import blend_pairs
from .contract import Estimate, Estimator
from .curves import Curves, accuracies, curves_of, fitted_spread, matched_spread, resamples
from .evaluating import evaluating
from .material import Material
from .pictures import batches
from .pixels import Pixels, Sample
from .scaling import GRID, fitted, matched
from .shadow_regression import shadow_fit, shadow_regression
from .transcal import transcal

TYPICAL = 1.25
"""What students of hard pseudo-labels need: chosen with the cells of `benchmarks/README.md` in view."""
TYPICAL_SPREAD = 0.15
"""Standard deviation of the best log T of such students, over data sets: near that of those cells."""
SHARE = 0.65
"""Of the dominant image in a blend: PseudoCal's."""
IMAGE_SPREAD = 0.35
"""Standard deviation of the log T that one labelled image gives, about the one that all give: a round figure."""
IMAGE_SPREAD_COUNTS = 3
"""As many images `IMAGE_SPREAD` stands for beside those that are there: the spread of a few says little of itself."""
_UNITY = int(np.argmin(np.abs(GRID)))  # T = 1


def typical_of(temperature: float) -> Estimate:
    """What networks of a kind need, without a look at this one.

    Example:
        >>> typical_of(TYPICAL).note
        'what students of hard labels typically need'
    """
    note = "what students of hard labels typically need" if temperature == TYPICAL else "what was said to be typical"
    return Estimate("typical", temperature, TYPICAL_SPREAD, note=note)


def source(material: Material) -> Estimate:
    """Maximum likelihood on the held-out source images.

    Source: temperature scaling (Guo et al., ICML 2017).
    """
    pixels = material.seen("source")
    return _by_likelihood(
        "source", material, pixels, material.curves("source"), f"maximum likelihood on {pixels.images} source images"
    )


def blends(material: Material) -> Estimate:
    """Maximum likelihood on blends of two target images, 65 to 35, by the pseudo-label of the dominant one.

    Judged where the two pseudo-labels differ, each class weighted to the share that it has on the target.

    Source: PseudoCal (Hu et al., ICML 2024), its cross-cluster rule; the class shares are ours.
    """
    return _blends("blends", material, mixed=False)


def mixed_blends(material: Material) -> Estimate:
    """The same blends, judged by argmax(0.65 p_a + 0.35 p_b) of the two images' probabilities.

    Source: PseudoCal (Hu et al., ICML 2024), with soft pseudo-labels.
    """
    return _blends("mixed_blends", material, mixed=True)


def doc(material: Material) -> Estimate:
    """The accuracy on the target falls from the source's by as much as the mean confidence does.

    Source: difference of confidences (Guillory et al., ICCV 2021).
    """
    source_curves, target_curves, of_source, of_target = _both(material, "doc")
    lost = _confidence(source_curves, of_source) - _confidence(target_curves, of_target)
    return _by_accuracy("doc", material, target_curves, of_target, accuracies(source_curves, of_source) - lost)


def atc(material: Material) -> Estimate:
    """A target pixel counts as right where it is surer than the threshold that as many source pixels pass as are right.

    Source: average thresholded confidence, by entropy (Garg et al., ICLR 2022).
    """
    source_curves, target_curves, of_source, of_target = _both(material, "atc")
    pixels, of = material.seen("source"), material.seen("target")
    sure, sure_target = _negative_entropy(pixels), _negative_entropy(of)
    order = np.argsort(sure)
    wrong = 1 - accuracies(source_curves, of_source)
    accuracy = np.empty(len(of_source))
    for b in range(len(of_source)):
        mass = (pixels.weight.numpy() * of_source[b][pixels.image.numpy()])[order]
        below = int(np.searchsorted(np.cumsum(mass), wrong[b] * mass.sum()))
        threshold = sure[order[min(below, len(order) - 1)]]
        mass_target = of.weight.numpy() * of_target[b][of.image.numpy()]
        accuracy[b] = mass_target[sure_target >= threshold].sum() / mass_target.sum()
    return _by_accuracy("atc", material, target_curves, of_target, accuracy)


def labelled(material: Material) -> Estimate:
    """Maximum likelihood on the labelled target images; the spread is that of samples of them, and of a constant while few.

    Raises:
        ValueError: there are none.
    """
    if material.labelled_target is None:
        remedy = "pass labelled_target=(image, label), or leave this estimator out"
        raise problem("labelled", expected="labelled target images", got="none", remedy=remedy)
    pixels, curves = material.seen("labelled_target"), material.curves("labelled_target")
    k = int((curves.weight > 0).sum())
    note = f"maximum likelihood on {k} labelled target image{'s' * (k > 1)}"
    found = _by_likelihood("labelled", material, pixels, curves, note)
    return found._replace(spread=pooled_spread(found.spread, k)) if k else found


def pooled_spread(bootstrap: float, images: int) -> float:
    """The standard deviation of log T from k images, of which the bootstrap over them knows a part.

    The variance of one image is the mean of the bootstrap's, with k - 1 degrees of freedom, and of `IMAGE_SPREAD`'s, with
    `IMAGE_SPREAD_COUNTS`.

    Example:
        >>> pooled_spread(math.nan, 1) == IMAGE_SPREAD, round(pooled_spread(0.05, 400), 2)
        (True, 0.05)
    """
    own = 0.0 if images < 2 else bootstrap**2 * images * images / (images - 1)
    known, assumed = images - 1, IMAGE_SPREAD_COUNTS
    return math.sqrt((known * own + assumed * IMAGE_SPREAD**2) / (known + assumed) / images)


ESTIMATORS: Dict[str, Estimator] = {
    "shadows": shadow_regression,
    "blends": blends,
    "source": source,
    "shadow_fit": shadow_fit,
    "mixed_blends": mixed_blends,
    "doc": doc,
    "atc": atc,
    "transcal": transcal,
}
"""Those without target labels. `labelled` joins them where there are labelled images."""


def _by_likelihood(name: str, material: Material, pixels: Pixels, curves: Curves, note: str) -> Estimate:
    held = curves.weight > 0  # an image without a judged pixel is none
    if not held.any():
        return Estimate(name, math.nan, note="no pixel is judged")
    curves = Curves(*(part[held] for part in curves))
    times = resamples(len(curves.weight), material.generator_for(f"{name} spread"))
    return Estimate(
        name,
        fitted(pixels.logits, pixels.label, pixels.weight),
        fitted_spread(curves, times) if len(curves.weight) > 1 else math.nan,
        float(curves.correct.sum() / curves.weight.sum()),
        note,
    )


def _blends(name: str, material: Material, *, mixed: bool) -> Estimate:
    draw = material.generator_for("blends")  # of both rules, so that they are compared on the same pairs
    order = torch.randperm(len(material.target.image), generator=draw).tolist()
    image = [material.target.image[i] for i in order]
    sample = Sample(material.pixels, material.ignore_index, draw)
    shares = torch.zeros(0, dtype=torch.float64)
    with evaluating(material.student, of=[torch.empty(0, device=material.device)]):
        for index in batches(image, max(2, material.batch_size)):
            if len(index) < 2:  # nothing to blend it with
                continue
            batch = torch.stack([image[i] for i in index]).to(material.device)
            logits, _ = material.logits(batch)
            label = logits.argmax(1)
            counts = torch.bincount(label.flatten(), minlength=logits.shape[1]).double().cpu()
            shares = counts if not len(shares) else shares + counts
            # The probabilities go along as further channels, so that they are blended as the images are.
            both = torch.cat([batch.to(torch.float32), logits.float().softmax(1)], 1)
            blended, kept = blend_pairs(
                both, label, generator=draw, share=SHARE, differing=True, ignore_index=material.ignore_index
            )
            channels = batch.shape[1]
            if mixed:
                dominant = blended[:, channels:].argmax(1)
                kept = torch.where(is_ignored(kept, material.ignore_index), kept, dominant)
            sample.add(material.logits(blended[:, :channels].to(batch.dtype))[0], kept)
    if not len(shares):
        return Estimate(name, math.nan, note="no two target images of one size to blend")
    pixels = sample.pixels()
    if not len(pixels.logits):
        return Estimate(name, math.nan, note="no pixel is judged: the pseudo-labels of blended images are all the same")
    judged = torch.bincount(pixels.label, weights=pixels.weight, minlength=len(shares))
    pixels = pixels._replace(weight=pixels.weight * class_share_weights(judged, shares)[pixels.label])
    note = f"maximum likelihood on {pixels.images} blends of target images"
    return _by_likelihood(name, material, pixels, curves_of(pixels), note)


def _both(material: Material, name: str) -> Tuple[Curves, Curves, np.ndarray, np.ndarray]:
    """Curves of source and target, and samples of their images; the first sample is all of them as they are."""
    seen = (material.seen("source"), material.seen("target"))
    draw = material.generator_for(f"{name} spread")
    samples = [np.concatenate([np.ones((1, pixels.images)), resamples(pixels.images, draw)]) for pixels in seen]
    return material.curves("source"), material.curves("target"), samples[0], samples[1]


def _by_accuracy(name: str, material: Material, curves: Curves, times: np.ndarray, accuracy: np.ndarray) -> Estimate:
    """The T at which the target's mean confidence is an accuracy (B,), of which the first is the estimate."""
    target = material.seen("target")
    accuracy = accuracy.clip(1 / target.logits.shape[1], 1 - 1e-6)
    return Estimate(
        name,
        matched(target.logits, float(accuracy[0]), target.weight),
        matched_spread(curves, times, accuracy) if min(material.seen("source").images, target.images) > 1 else math.nan,
        float(accuracy[0]),
        f"accuracy {accuracy[0]:.3f} by its rule",
    )


def _confidence(curves: Curves, times: np.ndarray) -> np.ndarray:
    out: np.ndarray = times @ curves.confidence[:, _UNITY] / np.maximum(times @ curves.weight, 1e-12)
    return out


def _negative_entropy(pixels: Pixels) -> np.ndarray:
    log_p = pixels.logits.double().log_softmax(1)
    out: np.ndarray = (log_p.exp() * log_p.clamp(min=-1e4)).sum(1).numpy()
    return out
