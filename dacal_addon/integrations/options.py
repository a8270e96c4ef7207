"""What `uda.dacal` in a host's config may say."""

from typing import Any, Mapping, NamedTuple, Optional, Union

from .._check import as_whole, check_choice, check_config, check_number, problem
from ..engines import ENGINES
from ..learners import JUDGED_SETS, LEARNERS
from ..losses import OUTER_LOSSES

LABELS = ("soft", "hard")


class HostOptions(NamedTuple):
    """The keys of `uda.dacal` and their defaults, which are meant for a run of 40,000 iterations."""

    labels: str = "soft"
    """What the student is taught on target pixels: "soft", softmax(z / T), or "hard", the host's own pseudo-labels."""
    learner: str = "bilevel"
    """How the temperatures learn, a name in `LEARNERS`: "bilevel", the paper's meta-step, by a net that sees all
    log-probabilities of its neighbourhood; or "fit", directly, on blends of target images (`TemperatureFit`), by a net that
    sees a pixel's confidence alone."""
    every: int = 4
    """Learn the temperatures at every k-th iteration after the warm-up; 0: never, T stays as it is. A meta-step takes longer
    than an iteration of the host, so that 1 more than doubles the time. The fit is cheap enough for 1."""
    warmup_iters: Optional[int] = None
    """Iterations before the temperatures first learn. None: 3000 with learner="bilevel", twice the warm-up of the hosts'
    learning rate, since an untrained student would only ask for sharper labels (see `BilevelCalibrationStep`); 0 with "fit"."""
    meta_lr: Optional[float] = None
    """Learning rate of Adam for the temperature net. None: the learner's own, 3e-4 with learner="bilevel", 2e-3 with "fit"."""
    judged_set: Optional[str] = None
    """On which images temperatures are judged, a name in `JUDGED_SETS`. None: the learner's own, with "bilevel" the
    complementary mix, with "fit" blends of target images."""
    outer_loss: str = "host"
    """How they are judged: "host", with "bilevel" the losses of the host's heads, with "fit" plain cross-entropy; or a name in
    `OUTER_LOSSES`, with "bilevel" at each of the heads."""
    engine: str = "auto"
    """Of `hypergradient`. "auto" is "forward", or "finite_difference" where that is not possible, as before torch 2.0. This and
    the next matter for learner="bilevel" alone."""
    clip_norm: Optional[float] = None
    """The `max_norm` of the host's `clip_grad_norm_`, if it clips the student's gradients (`optimizer_config.grad_clip`; 5 in
    DIFF)."""
    share_pass: bool = True
    """With learner="bilevel" and labels="soft": at iterations with a meta-step, its first pass is the host's own over the mixed
    images too, with the labels of the temperatures before that step. False: the host makes one more, with those after it."""
    hidden_channels: int = 16
    """Of the temperature net, as the next two."""
    initial_temperature: float = 1.0
    max_ratio: float = 5.0
    base: Optional[str] = None
    """The host's class, for forks whose `DACS` has another name or place: 'module.Class', or the name under which it is in the
    registry UDA. None: mmseg.models.uda.dacs.DACS."""
    logits_of: Union[int, str, None] = None
    """Which entry of what the teacher's `encode_decode` returns are the logits, an index or a key, where more than one could
    be. None: the only one with as many channels as there are classes."""
    restore_teacher: bool = False
    """Upstream's checkpoints lack the iteration counter, so that a resumed run begins with a teacher equal to the student.
    True: go on with the checkpoint's teacher and counter."""
    seed: int = 0
    """Of the generator that pairs images for blends."""

    @property
    def off(self) -> bool:
        """Nothing differs from upstream."""
        return self.labels == "hard" and self.every == 0

    @property
    def warmup(self) -> int:
        """`warmup_iters`, or what stands for None."""
        if self.warmup_iters is not None:
            return self.warmup_iters
        return 3000 if self.learner == "bilevel" else LEARNERS[self.learner].defaults.warmup

    @property
    def learning_rate(self) -> float:
        """`meta_lr`, or what stands for None."""
        return self.meta_lr if self.meta_lr is not None else LEARNERS[self.learner].defaults.learning_rate


def parse(config: Mapping[str, Any]) -> HostOptions:
    """Check `uda.dacal`.

    Raises:
        TypeError: not a dict.
        ValueError: an unknown key, a value out of range.

    Example:
        >>> parse(dict(every=1)).labels, parse(dict(labels="hard", every=0)).off
        ('soft', True)
        >>> parse(dict(evry=4))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: uda.dacal: expected keys among labels, learner, ..., got 'evry'; mend or remove it
    """
    name = "uda.dacal"
    check_config(name, config, HostOptions._fields, example="dacal=dict(labels='soft')")
    options = HostOptions(**config)
    _check_choices(name, options)
    _check_numbers(name, options)
    _check_kinds(name, options)
    return options


def _check_choices(name: str, options: HostOptions) -> None:
    check_choice(name, "labels", options.labels, LABELS)
    check_choice(name, "learner", options.learner, tuple(LEARNERS))
    check_choice(name, "engine", options.engine, ENGINES)
    check_choice(name, "outer_loss", options.outer_loss, ("host", *OUTER_LOSSES))
    if options.judged_set is not None:
        check_choice(name, "judged_set", options.judged_set, tuple(JUDGED_SETS))


def _check_numbers(name: str, options: HostOptions) -> None:
    for key, value, low in (
        ("every", options.every, 0),
        ("warmup_iters", options.warmup, 0),
        ("hidden_channels", options.hidden_channels, 1),
        ("seed", options.seed, 0),
    ):
        as_whole(name, key, value, low=low)
    numbers = {key: getattr(options, key) for key in ("initial_temperature", "max_ratio")}
    numbers["meta_lr"] = options.learning_rate
    if options.clip_norm is not None:
        numbers["clip_norm"] = options.clip_norm
    for key, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            remedy = f"leave it at {HostOptions()._asdict()[key]}"
            raise problem(name, expected=f"{key}: a number", got=repr(number), remedy=remedy)
    check_number(name, "meta_lr", numbers["meta_lr"], low=0.0, rule=">= 0")
    check_number(name, "clip_norm", numbers.get("clip_norm", 1.0), low=1e-30, rule="> 0, the host's max_norm")


def _check_kinds(name: str, options: HostOptions) -> None:
    for key in ("share_pass", "restore_teacher"):
        if not isinstance(getattr(options, key), bool):
            remedy = f"write {key}=True"
            raise problem(name, expected=f"{key}: True or False", got=repr(getattr(options, key)), remedy=remedy)
    if options.base is not None and not isinstance(options.base, str):
        remedy = "write base='mmseg.models.uda.dacs_infer.gta2csDACS'"
        raise problem(name, expected="base: 'module.Class' or 'Class'", got=repr(options.base), remedy=remedy)
    entry = options.logits_of
    if entry is not None and (isinstance(entry, bool) or not isinstance(entry, (int, str))):
        remedy = "write logits_of=0, or logits_of='out'"
        raise problem(name, expected="logits_of: an index or a key", got=repr(entry), remedy=remedy)
