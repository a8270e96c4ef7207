"""What `uda.dacal` in a host's config may say."""

from typing import Any, Mapping, NamedTuple, Optional

from .._check import check_choice, check_number, check_whole, describe, problem
from ..engines import ENGINES
from ..outer_sets import OUTER_SETS

LABELS = ("soft", "hard")
LEARN = ("fit", "bilevel")
OUTER_LOSSES = ("host", "cross_entropy_and_gap")


class Options(NamedTuple):
    """The keys of `uda.dacal` and their defaults, which are meant for a run of 40,000 iterations."""

    labels: str = "soft"
    """What the student is taught on target pixels: "soft", softmax(z / T), or "hard", the host's own pseudo-labels."""
    learn: str = "fit"
    """How the temperatures learn: "fit", directly, on blends of target images (`TemperatureFit`), by a net that sees
    a pixel's confidence alone; or "bilevel", the paper's meta-step, by a net that sees all log-probabilities of its
    neighbourhood."""
    every: int = 1
    """Learn the temperatures at every k-th iteration after the warm-up; 0: never, T stays as it is."""
    warmup_iters: Optional[int] = None
    """Iterations before the temperatures first learn. None: 0 with learn="fit"; 3000 with "bilevel", twice the hosts'
    learning-rate warm-up, since an untrained student would only ask for sharper labels (see `BilevelCalibrationStep`)."""
    meta_lr: Optional[float] = None
    """Learning rate of Adam for the temperature net. None: 2e-3 with learn="fit", 3e-4 with "bilevel"."""
    engine: str = "auto"
    """Of `hypergradient`. "auto" is "forward", or "finite_difference" where that is not possible, as before torch 2.0. This and
    the next two matter for learn="bilevel" alone."""
    outer_set: str = "source_and_target_pixels"
    """What the virtually updated student is judged on, see `BilevelCalibrationStep`."""
    outer_loss: str = "host"
    """How: "host", the losses of the host's heads, or "cross_entropy_and_gap", at each of its heads."""
    hidden_channels: int = 16
    """Of the temperature net, as the next two."""
    initial_temperature: float = 1.0
    max_ratio: float = 5.0
    restore_teacher: bool = False
    """Upstream's checkpoints lack the iteration counter, so that a resumed run begins with a teacher equal to the student.
    True: go on with the checkpoint's teacher and counter."""
    seed: int = 0
    """Of the generator that pairs images for blends, with learn="bilevel" of that for outer sets that draw."""

    @property
    def off(self) -> bool:
        """Nothing differs from upstream."""
        return self.labels == "hard" and self.every == 0

    @property
    def warmup(self) -> int:
        """`warmup_iters`, or what stands for None."""
        if self.warmup_iters is not None:
            return self.warmup_iters
        return 0 if self.learn == "fit" else 3000

    @property
    def learning_rate(self) -> float:
        """`meta_lr`, or what stands for None."""
        if self.meta_lr is not None:
            return self.meta_lr
        return 2e-3 if self.learn == "fit" else 3e-4


def parse(config: Mapping[str, Any]) -> Options:
    """Check `uda.dacal`.

    Raises:
        TypeError: not a dict.
        ValueError: an unknown key, a value out of range.

    Example:
        >>> parse(dict(every=4)).labels, parse(dict(labels="hard", every=0)).off
        ('soft', True)
        >>> parse(dict(evry=4))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: uda.dacal: expected keys among labels, learn, ..., got 'evry'; mend or remove it
    """
    name = "uda.dacal"
    if not isinstance(config, Mapping):
        remedy = "write dacal=dict(labels='soft')"
        raise problem(name, expected="a dict", got=describe(config), remedy=remedy, error=TypeError)
    for key in config:
        if key not in Options._fields:
            expected = f"keys among {', '.join(Options._fields)}"
            raise problem(name, expected=expected, got=repr(key), remedy="mend or remove it")
    options = Options(**config)
    check_choice(name, "labels", options.labels, LABELS)
    check_choice(name, "learn", options.learn, LEARN)
    check_choice(name, "engine", options.engine, ENGINES)
    check_choice(name, "outer_set", options.outer_set, tuple(OUTER_SETS))
    check_choice(name, "outer_loss", options.outer_loss, OUTER_LOSSES)
    for key, value, low in (
        ("every", options.every, 0),
        ("warmup_iters", options.warmup, 0),
        ("hidden_channels", options.hidden_channels, 1),
        ("seed", options.seed, 0),
    ):
        check_whole(name, key, value, low=low)
    for key, number in (
        ("meta_lr", options.learning_rate),
        ("initial_temperature", options.initial_temperature),
        ("max_ratio", options.max_ratio),
    ):
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            raise problem(name, expected=f"{key}: a number", got=repr(number), remedy=f"leave it at {Options()._asdict()[key]}")
    check_number(name, "meta_lr", options.learning_rate, low=0.0, rule=">= 0")
    if not isinstance(options.restore_teacher, bool):
        remedy = "write restore_teacher=True"
        raise problem(name, expected="restore_teacher: True or False", got=repr(options.restore_teacher), remedy=remedy)
    return options
