"""The temperature of a network that is trained: every estimate, the one that is taken, and why."""

import math
from typing import Any, Callable, Iterable, Mapping, NamedTuple, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor

from .._check import check_whole, problem
from ..learners.networks import Network, Outputs
from .contract import Estimate, Estimator
from .estimators import ESTIMATORS, labelled
from .material import Material
from .pictures import labelled as labelled_pictures
from .pictures import unlabelled as unlabelled_pictures

CLEARLY = 1.1
"""Estimates contradict each other where one is above this and the other below its inverse. To be measured on more sets."""
PRIOR_SPREAD = 0.25
"""Standard deviation of log T of the estimate without labels, or of T = 1 where it abstains, about the truth. To be measured on
more sets."""

Labelled = Union[Tuple[Tensor, Tensor], Iterable[Sequence[Any]]]
Unlabelled = Union[Tensor, Iterable[Any]]


class TemperatureEstimate(NamedTuple):
    """What `estimate_temperature` returns."""

    temperature: float
    """The one to fold; 1 where it abstains."""
    taken: str
    """Which estimate that is: "shadows", "blends", "labelled and prior", or "none" where T = 1 stands in."""
    reason: str
    """In words."""
    abstained: bool
    estimates: Mapping[str, Estimate]
    """All, by name."""


class Choice(NamedTuple):
    """What a rule takes of several estimates."""

    temperature: float
    taken: str
    reason: str
    abstained: bool


def estimate_temperature(
    student: Network,
    *,
    source: Labelled,
    target: Unlabelled,
    labelled_target: Optional[Labelled] = None,
    logits_of: Optional[Callable[[Any], Tensor]] = None,
    features_of: Optional[Callable[[Any], Tensor]] = None,
    layer: Optional[str] = None,
    generator: Optional[torch.Generator] = None,
    estimators: Optional[Mapping[str, Estimator]] = None,
    max_images: int = 64,
    batch_size: int = 4,
    pixels: int = 2048,
    ignore_index: int = 255,
    value_range: Optional[Tuple[float, float]] = None,
    device: Optional[torch.device] = None,
) -> TemperatureEstimate:
    """At which T the network's softmax(z / T) is calibrated on the target, with few target labels or without any.

    Without labels, by `without_labels`: the larger of what shadows and blends say, never below 1; or it abstains. With labels,
    by `with_labels`: theirs and the one without, weighted by their precision.

    The network is run in evaluation mode and left as it was, and so are the random states. It costs 11 passes over the source
    images and 5 over the target's, without gradient.

    Args:
        student: the network, or any function of images; its outputs are logits.
        source: images (N, K, H, W) and labels (N, H, W) int64 that it was **not trained on**, scaled as in
            training. A pair of tensors, or an iterable of such batches.
        target: images without labels; a tensor, or an iterable of batches (of tuples, the first entry counts).
        labelled_target: as `source`, a few of them; they may be among those of `target`.
        logits_of: where the logits are in the output; None: it is the logits. Smaller ones are interpolated.
        features_of: where features (N, F, h, w) are in it; None: the input of the last layer, or the logits where there
            is no such layer.
        layer: the name of that layer, where `classifiers` does not find it, as for `fold_temperature`.
        generator: gives the seed; None for 0.
        estimators: names and functions; None for `ESTIMATORS`. The rules take "shadows" and "blends" from among them.
        max_images: of source and target each, held in memory: at random of tensors, the first ones of iterables. All labelled
            target images are used.
        batch_size, pixels, ignore_index, value_range, device: see `Material`.

    Raises:
        ValueError, TypeError: inputs of another shape or kind, logits that are not finite or were not found, stray labels.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> image, label = torch.rand(8, 4, 16, 16, generator=g), torch.randint(0, 4, (8, 16, 16), generator=g)
        >>> found = estimate_temperature(lambda x: 9 * x, source=(image, label), target=image, labelled_target=(image, label))
        >>> found.taken, found.temperature > 2, sorted(found.estimates)[:3]
        ('labelled and prior', True, ['atc', 'blends', 'doc'])

    How good the estimate without labels is differs between data sets, and it can do harm: `benchmarks/README.md`. Labels of
    ten images are better wherever they can be had.

    Source: shadows and the rules are ours; the other estimators' papers are named with them.
    """
    check_whole("estimate_temperature", "max_images", max_images, low=1)
    draw = torch.Generator().manual_seed(0) if generator is None else generator
    few: Any = None
    if labelled_target is not None:
        few = labelled_pictures("estimate_temperature", "labelled_target", labelled_target, limit=1 << 31, generator=draw)
    material = Material(
        student,
        source=labelled_pictures("estimate_temperature", "source", source, limit=max_images, generator=draw),
        target=unlabelled_pictures("estimate_temperature", "target", target, limit=max_images, generator=draw),
        labelled_target=few,
        outputs=Outputs(logits_of, features_of),
        layer=layer,
        generator=draw,
        device=device,
        batch_size=batch_size,
        pixels=pixels,
        ignore_index=ignore_index,
        value_range=value_range,
    )
    chosen = dict(ESTIMATORS if estimators is None else estimators)
    if few is not None:
        chosen["labelled"] = labelled
    if not any(bool((label != ignore_index).any()) for label in material.source.label):
        remedy = "check labels and ignore_index"
        raise problem("estimate_temperature", expected="source labels that are classes", got="none", remedy=remedy)
    if not chosen:
        raise problem("estimate_temperature", expected="estimators: at least one", got="none", remedy="leave it out")
    estimates = {name: estimator(material) for name, estimator in chosen.items()}
    choice = without_labels(estimates)
    if few is not None:
        choice = with_labels(choice, estimates["labelled"])
    return TemperatureEstimate(*choice, estimates)


def without_labels(estimates: Mapping[str, Estimate]) -> Choice:
    """The larger of "shadows" and "blends", never below 1; none where they contradict each other or shadows do not reach.

    Never below 1, because a network after self-training is overconfident as a rule; the larger, because images that are made
    of what the network has learned are easier for it than the target.

    Example:
        >>> without_labels({"shadows": Estimate("shadows", 1.5), "blends": Estimate("blends", 1.2)})[:2]
        (1.5, 'shadows')
        >>> without_labels({"shadows": Estimate("shadows", 1.5), "blends": Estimate("blends", 0.8)}).reason
        'abstains, T = 1: shadows (1.50) and blends (0.80) contradict each other'
    """
    found = [estimates[name] for name in ("shadows", "blends") if name in estimates]
    outside = [each for each in found if not each.covered]
    if outside:
        reason = f"abstains, T = 1: the target lies outside of what the {outside[0].name} cover ({outside[0].note})"
        return Choice(1.0, "none", reason, True)
    said = [each for each in found if math.isfinite(each.temperature)]
    if not said:
        missing = "; ".join(f"{each.name}: {each.note}" for each in found) or "neither shadows nor blends were asked"
        return Choice(1.0, "none", f"abstains, T = 1: no estimate without labels ({missing})", True)
    largest, least = max(said, key=_temperature), min(said, key=_temperature)
    if largest.temperature > CLEARLY and least.temperature < 1 / CLEARLY:
        both = " and ".join(f"{each.name} ({each.temperature:.2f})" for each in said)
        return Choice(1.0, "none", f"abstains, T = 1: {both} contradict each other", True)
    others = " and ".join(f"{each.name} ({each.temperature:.2f})" for each in said)
    if largest.temperature <= 1:
        return Choice(1.0, "none", f"T = 1: {others} say{'s' * (len(said) == 1)} that none above it is needed", False)
    reason = f"the larger of {others}" if len(said) == 2 else f"{others} alone; the other has no estimate"
    return Choice(largest.temperature, largest.name, reason, False)


def with_labels(prior: Choice, by_labels: Estimate) -> Choice:
    """The mean of the two log T, each weighted by its precision: one image changes little, ten decide.

    Example:
        >>> prior = Choice(2.0, "shadows", "", False)
        >>> round(with_labels(prior, Estimate("labelled", 1.0, spread=PRIOR_SPREAD)).temperature, 3)  # half way
        1.414
    """
    if not math.isfinite(by_labels.temperature):
        return prior._replace(reason=f"{prior.reason}; the labelled images say nothing ({by_labels.note})")
    precision, own = 1 / by_labels.spread**2, 1 / PRIOR_SPREAD**2
    share = precision / (precision + own)
    log_t = share * math.log(by_labels.temperature) + (1 - share) * math.log(prior.temperature)
    reason = (
        f"labels of target images say {by_labels.temperature:.2f} (log T to {by_labels.spread:.2f}), the estimate without them "
        f"{prior.temperature:.2f} (to {PRIOR_SPREAD:.2f}; {prior.reason}); by precision the labels count {share:.0%}"
    )
    return Choice(math.exp(log_t), "labelled and prior", reason, False)


def _temperature(estimate: Estimate) -> float:
    return estimate.temperature
