"""What `model.dacal` in a config of MMSegmentation 1.x may say: `DACal`'s own words."""

from typing import Any, Dict, Mapping, NamedTuple, Optional

from .._check import as_whole, check_choice, check_config, check_number, problem
from ..engines import ENGINES
from ..learners import JUDGED_SETS, LEARNERS
from ..losses import OUTER_LOSSES
from ..pseudo_labels import WEIGHTS

_NAME = "model.dacal"
_OF_LEARNERS = ("every", "warmup", "meta_lr", "judged_set", "outer_loss", "engine")


class SegmentorOptions(NamedTuple):
    """The keys of `model.dacal`. What is None is as the learner has it."""

    learner: Optional[str] = None
    """None: hard pseudo-labels. A name in `LEARNERS`: soft ones, whose temperatures learn along."""
    threshold: float = 0.968
    """The confidence of the teacher that counts as sure."""
    weight: str = "ratio"
    """Of the pseudo-labels, see `confidence_weight`."""
    ignore_top: int = 0
    """Rows of the target's crops, at the top, whose pseudo-labels have the weight 0; likewise at the bottom."""
    ignore_bottom: int = 0
    teacher: Mapping[str, Any] = {"type": "MomentumAnnealingEMA", "momentum": 0.001, "gamma": 1}
    """The averaged model of mmengine that makes the pseudo-labels. This one averages as DAFormer does."""
    seed: int = 0
    """Of masks and blends."""
    every: Optional[int] = None
    """Learn the temperatures at every k-th iteration after the warm-up; this and what follows need a learner."""
    warmup: Optional[int] = None
    meta_lr: Optional[float] = None
    """Learning rate of Adam for the temperature net."""
    judged_set: Optional[str] = None
    outer_loss: Optional[str] = None
    """With "bilevel", None: the heads' own losses."""
    engine: Optional[str] = None
    """With "bilevel"."""

    def of_learner(self) -> Dict[str, Any]:
        """The options that go to the learner itself."""
        named = {name: getattr(self, name) for name in _OF_LEARNERS if name != "meta_lr"}
        return {name: value for name, value in named.items() if value is not None}

    @property
    def learning_rate(self) -> float:
        """`meta_lr`, or what stands for None; there is a learner."""
        return self.meta_lr if self.meta_lr is not None else LEARNERS[str(self.learner)].defaults.learning_rate


def parse(config: Mapping[str, Any]) -> SegmentorOptions:
    """Check `model.dacal`.

    Raises:
        TypeError: not a dict.
        ValueError: an unknown key, a value out of range, an option of a learner where there is none.

    Example:
        >>> parse(dict(threshold=0.9)).learner, parse(dict(learner="bilevel", every=4)).of_learner()
        (None, {'every': 4})
        >>> parse(dict(every=4))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: model.dacal: expected a learner, whose option every is, got learner=None; name one, or remove the option
    """
    check_config(_NAME, config, SegmentorOptions._fields, example="dacal=dict(threshold=0.968)")
    options = SegmentorOptions(**config)
    _check_learner(options)
    check_choice(_NAME, "weight", options.weight, WEIGHTS)
    check_number(_NAME, "threshold", options.threshold, low=0.0, high=1.0, rule="in [0, 1]")
    for key in ("ignore_top", "ignore_bottom", "seed"):
        as_whole(_NAME, key, getattr(options, key), low=0)
    if not isinstance(options.teacher, Mapping) or "type" not in options.teacher:
        remedy = "write teacher=dict(type='ExponentialMovingAverage', momentum=0.001)"
        raise problem(_NAME, expected="teacher: a dict with a type", got=repr(options.teacher), remedy=remedy)
    return options


def _check_learner(options: SegmentorOptions) -> None:
    if options.learner is None:
        odd = [name for name in _OF_LEARNERS if getattr(options, name) is not None]
        if odd:
            expected, remedy = f"a learner, whose option {odd[0]} is", "name one, or remove the option"
            raise problem(_NAME, expected=expected, got="learner=None", remedy=remedy)
        return
    check_choice(_NAME, "learner", options.learner, tuple(LEARNERS))
    if options.engine is not None and options.learner != "bilevel":
        remedy = "remove engine"
        raise problem(_NAME, expected="learner='bilevel', whose option engine is", got=f"{options.learner!r}", remedy=remedy)
    choices = {"judged_set": tuple(JUDGED_SETS), "outer_loss": tuple(OUTER_LOSSES), "engine": ENGINES}
    for key, names in choices.items():
        if getattr(options, key) is not None:
            check_choice(_NAME, key, getattr(options, key), tuple(names))
    for key, low in (("every", 1), ("warmup", 0)):
        if getattr(options, key) is not None:
            as_whole(_NAME, key, getattr(options, key), low=low)
    if options.meta_lr is not None:
        check_number(_NAME, "meta_lr", options.meta_lr, low=0.0, rule=">= 0")
