"""Several folders of predictions against the same labels: which networks there are, and their images in pairs."""

import math
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Set

from ..metrics.bootstrap import Bootstrap, percentile_interval
from .files import BadFile
from .judging import Results, judge_together
from .options import EvaluateOptions
from .plan import Plan, check_both, make_plan

_LEVEL = 0.95
_HIGHER_IS_BETTER = ("accuracy", "miou")
_NEITHER_IS_BETTER = ("mean_confidence",)


class Network(NamedTuple):
    """One folder of predictions, and what is to be read of it."""

    name: str
    plan: Plan
    options: EvaluateOptions


def plan_networks(options: EvaluateOptions) -> List[Network]:
    """PREDICTIONS first, then those of --compare; without --keep-going `make_plan` wants every image in each of them.

    Raises:
        BadFile: a file is missing, in one of them. ValueError: the arguments do not fit; two networks of one name.
    """
    folders = _folders(options)
    networks = []
    for name, folder in folders.items():
        own = options._replace(predictions=folder)
        networks.append(Network(name, make_plan(own), own))
    return networks


def _folders(options: EvaluateOptions) -> Dict[str, Path]:
    """Name -> folder.

    >>> given = EvaluateOptions(Path("runs/hard"), Path("gt"), 19, compare=("soft=runs/a=b", "runs/fold"))
    >>> [f"{name}: {folder}" for name, folder in _folders(given).items()]
    ['hard: runs/hard', 'soft: runs/a=b', 'fold: runs/fold']
    """
    found = {options.name or _named(options.predictions): options.predictions}
    for text in options.compare:
        name, equals, rest = text.partition("=")
        given = bool(equals and name) and not Path(text).exists()
        folder = Path(rest) if given else Path(text)
        name = name if given else _named(folder)
        if name in found:
            raise ValueError(
                f"expected networks of different names, got {name!r} twice; pass --compare NAME={folder}, or --name"
            )
        found[name] = folder
    return found


def _named(folder: Path) -> str:
    """`.` and `..` have no name of their own."""
    return (folder.name if folder.name not in ("", "..") else folder.resolve().name) or str(folder)


def judge_networks(networks: List[Network]) -> List[Results]:
    """Judge every network on the same images in the same order, so that they can be compared image by image.

    With --keep-going, what cannot be used of one network is left out of all.

    Raises:
        BadFile: as of `judge_together`.
    """
    if len(networks) == 1:
        return judge_together([(networks[0].plan, networks[0].options)])
    missing = []
    of_each: List[Set[Path]] = []
    for network in networks:
        plan = network.plan
        for image in sorted({*plan.predictions} ^ {*plan.labels}):
            try:
                check_both(image, plan, network.options)
            except BadFile as error:
                missing.append(BadFile(error.path, f"{error.reason}; missing in {network.name}, left out of all networks"))
        of_each.append({plan.labels[image] for image in plan.predictions if image in plan.labels})
    images, every = set.intersection(*of_each), set.union(*of_each)
    found = judge_together([(_restricted(network.plan, images, networks[0].plan), network.options) for network in networks])
    if len(images) < len(every):
        told = f"{len(images)} of {len(every)} images are in every network; the others are left out of all"
        found[0].remarks.insert(0, told)
    return [results._replace(skipped=_each_once([*missing, *results.skipped])) for results in found]


def _restricted(plan: Plan, images: Set[Path], first: Plan) -> Plan:
    """The plan for some images, given as their labels, under the names that the first plan has for them."""
    own = {path: name for name, path in plan.labels.items()}
    names = {name: path for name, path in first.labels.items() if path in images}
    predictions = {name: plan.predictions[own[path]] for name, path in names.items()}
    return plan._replace(predictions=predictions, labels=names)


def _each_once(bad: List[BadFile]) -> List[BadFile]:
    return list({(one.path, one.reason): one for one in bad}.values())


def difference(key: str, first: Bootstrap, other: Bootstrap) -> Dict[str, Any]:
    """How much more `other` has of a metric: the difference, its interval, and which is better: "first", "other" or None.

    Both must have been drawn from the same images with the same seed: then draw i has the same images in both, what is hard
    in an image cancels, and the interval is much narrower than the two networks' own. None is better where it contains 0.

    Example:
        >>> import torch
        >>> samples = torch.linspace(0.10, 0.12, 101).double()
        >>> first, other = Bootstrap(0.11, 0.10, 0.12, samples), Bootstrap(0.09, 0.08, 0.1, samples - 0.02)
        >>> found = difference("ece", first, other)
        >>> round(found["high"], 6), found["better"]
        (-0.02, 'other')

    Source: Efron & Tibshirani, An Introduction to the Bootstrap (1993), section 13.3, on differences of paired draws.
    """
    low, high = percentile_interval((other.samples - first.samples).tolist(), _LEVEL)
    better = None
    if key not in _NEITHER_IS_BETTER and not low <= 0 <= high and not math.isnan(low):
        better = "other" if (low > 0) == (key in _HIGHER_IS_BETTER) else "first"
    return {"value": other.estimate - first.estimate, "low": low, "high": high, "better": better}
