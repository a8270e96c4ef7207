"""The temperature of a network that is trained: every estimate, the one that is taken, and why."""

import math
from typing import Any, Callable, Iterable, Mapping, NamedTuple, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor

from .._check import as_whole, check_number, problem
from ..ignoring import IgnoreIndex, ignored_or_255, is_ignored
from ..learners.networks import Network, Outputs
from .contract import Estimate, Estimator
from .estimators import ESTIMATORS, TYPICAL, TYPICAL_SPREAD, labelled, typical_of
from .material import Material
from .pictures import labelled as labelled_pictures
from .pictures import unlabelled as unlabelled_pictures
from .scaling import BOUNDS

CLEARLY = 1.1
"""An estimate denies overconfidence where it is below the inverse of this."""
UNKNOWN_SPREAD = 0.3
"""Standard deviation of the best log T about 0 where nothing is typical: about what the cells of all methods have."""

Labelled = Union[Tuple[Tensor, Tensor], Iterable[Sequence[Any]]]
Unlabelled = Union[Tensor, Iterable[Any]]


class TemperatureEstimate(NamedTuple):
    """What `estimate_temperature` returns."""

    temperature: float
    """The one to fold; 1 where it abstains."""
    taken: str
    """Which estimate that is: "typical", "labelled and prior", or "none" where T = 1 stands in."""
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
    typical: float = TYPICAL,
    estimators: Optional[Mapping[str, Estimator]] = None,
    max_images: int = 64,
    batch_size: int = 4,
    pixels: int = 2048,
    ignore_index: Optional[IgnoreIndex] = None,
    value_range: Optional[Tuple[float, float]] = None,
    device: Optional[torch.device] = None,
) -> TemperatureEstimate:
    """At which T the network's softmax(z / T) is calibrated on the target, with few target labels or without any.

    Without labels, by `without_labels`: the temperature that students of hard pseudo-labels typically need, unless shadows and
    blends both deny that the network is overconfident; the other estimators say what they say, and are not taken. With labels,
    by `with_labels`: theirs and the typical one, weighted by their precision.

    The network is run in evaluation mode and left as it was, and so are the random states. It costs 11 passes over the source
    images and 5 over the target's, without gradient.

    Args:
        student: the network, or any function of images; its outputs are logits.
        source: images (N, K, *S) and labels (N, *S) int64 that it was **not trained on**, scaled as in
            training. A pair of tensors, or an iterable of such batches.
        target: images without labels; a tensor, or an iterable of batches (of tuples, the first entry counts).
        labelled_target: as `source`, a few of them; they may be among those of `target`.
        logits_of: where the logits are in the output; None: it is the logits. `two_channels` declares one sigmoid channel.
            Smaller ones are interpolated.
        features_of: where features (N, F, *s) are in it; None: the input of the last layer, or the logits where there
            is no such layer.
        layer: the name of that layer, where `classifiers` does not find it, as for `fold_temperature`.
        generator: gives the seed; None for 0.
        typical: what networks of this kind need. The default is of students that self-training has taught hard pseudo-labels;
            pass 1 for others, of which nothing is known, and labels of target images if you can.
        estimators: names and functions; None for `ESTIMATORS`. {} is quickest, with `labelled_target` or where the typical
            temperature will do.
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

    How good it is in how many cells: `benchmarks/README.md`. Labels of ten images are better where they can be had.

    Source: shadows, the typical temperature and the rules are ours; the other estimators' papers are named with them.
    """
    max_images = as_whole("estimate_temperature", "max_images", max_images, low=1)
    check_number(
        "estimate_temperature", "typical", typical, low=BOUNDS[0], high=BOUNDS[1], rule=f"in {BOUNDS[0]:g}..{BOUNDS[1]:g}"
    )
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
    ignored = ignored_or_255("estimate_temperature", ignore_index)
    if not any(bool((~is_ignored(label, ignored)).any()) for label in material.source.label):
        remedy = "check labels and ignore_index"
        raise problem("estimate_temperature", expected="source labels that are classes", got="none", remedy=remedy)
    estimates = {"typical": typical_of(typical), **{name: estimator(material) for name, estimator in chosen.items()}}
    choice = without_labels(estimates)
    if few is not None:
        choice = with_labels(choice, estimates["labelled"])
    return TemperatureEstimate(*choice, estimates)


def without_labels(estimates: Mapping[str, Estimate]) -> Choice:
    """The "typical" temperature; T = 1 where "shadows" and "blends" both deny that there is overconfidence to take away.

    What the estimators say of the amount is not taken: in the cells of `benchmarks/README.md` a constant was nearer to the best
    temperature than any of them, or any mean of them, and did the least harm.

    Example:
        >>> typical = Estimate("typical", TYPICAL, TYPICAL_SPREAD)
        >>> without_labels({"typical": typical, "shadows": Estimate("shadows", 1.7), "blends": Estimate("blends", 0.8)})[:2]
        (1.25, 'typical')
        >>> without_labels({"typical": typical, "shadows": Estimate("shadows", 0.7), "blends": Estimate("blends", 0.8)}).reason
        'abstains, T = 1: by shadows (0.70) and blends (0.80) the network is not overconfident'
    """
    typical = estimates.get("typical")
    if typical is None or typical.temperature == 1:
        return Choice(1.0, "none", "T = 1: nothing is known of networks of this kind", True)
    said = [estimates[name] for name in ("shadows", "blends") if name in estimates]
    said = [each for each in said if math.isfinite(each.temperature) and each.covered]
    listed = " and ".join(f"{each.name} ({each.temperature:.2f})" for each in said)
    if len(said) == 2 and all(each.temperature < 1 / CLEARLY for each in said):
        return Choice(1.0, "none", f"abstains, T = 1: by {listed} the network is not overconfident", True)
    beside = f"; {listed} beside it" if said else ""
    return Choice(typical.temperature, "typical", f"{typical.note}{beside}", False)


def with_labels(prior: Choice, by_labels: Estimate) -> Choice:
    """The mean of the two log T, each weighted by its precision: one image changes little, twenty decide.

    Args:
        prior: the choice without labels; its log T is known to `TYPICAL_SPREAD`, or where it abstains to `UNKNOWN_SPREAD`.

    Example:
        >>> prior = Choice(2.0, "typical", "", False)
        >>> round(with_labels(prior, Estimate("labelled", 1.0, spread=TYPICAL_SPREAD)).temperature, 3)  # half way
        1.414
    """
    spread = UNKNOWN_SPREAD if prior.abstained else TYPICAL_SPREAD
    if not math.isfinite(by_labels.temperature):
        return prior._replace(reason=f"{prior.reason}; the labelled images say nothing ({by_labels.note})")
    precision, own = 1 / by_labels.spread**2, 1 / spread**2
    share = precision / (precision + own)
    log_t = share * math.log(by_labels.temperature) + (1 - share) * math.log(prior.temperature)
    reason = (
        f"labels of target images say {by_labels.temperature:.2f} (log T to {by_labels.spread:.2f}), the estimate without them "
        f"{prior.temperature:.2f} (to {spread:.2f}; {prior.reason}); by precision the labels count {share:.0%}"
    )
    return Choice(math.exp(log_t), "labelled and prior", reason, False)
