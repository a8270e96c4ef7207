"""When a learner acts, and why it did not."""

from enum import Enum
from typing import NamedTuple, Optional


class SkipKind(str, Enum):
    """Why the temperatures were left as they were, for code to tell apart."""

    WARMUP = "warmup"
    """The learner waits for its first iteration."""
    EVERY = "every"
    """It acts at every k-th iteration, and this is not one of them."""
    NOT_FINITE = "not_finite"
    """The teacher's logits, a loss or its gradient."""
    UNWEIGHTED = "unweighted"
    """Every target pixel has the weight 0."""
    UNJUDGED = "unjudged"
    """No pixel of the judged set has a label."""
    NO_STEP = "no_step"
    """The student's learning rate is 0, so that its virtual step leads nowhere."""
    HARD_LABELS = "hard_labels"
    """There are no temperatures: labels are hard."""
    ZERO = "zero"
    """The gradient of the temperature net is zero."""


class Skip(NamedTuple):
    """Why the temperatures were left as they were.

    Example:
        >>> skip = Skip(SkipKind.WARMUP, "warm-up: iteration 1 of 1000")
        >>> skip.kind == "warmup", f"{skip}"
        (True, 'warm-up: iteration 1 of 1000')
    """

    kind: SkipKind
    message: str
    """The same for people, with the figures."""

    def __str__(self) -> str:
        return self.message

    def __format__(self, spec: str) -> str:
        return format(self.message, spec)


def waiting(iteration: int, *, warmup: int, every: int) -> Optional[Skip]:
    """Why the learner waits at iteration `iteration`, counted from 0; None if it learns.

    Example:
        >>> [str(waiting(i, warmup=1, every=2)) for i in range(3)]
        ['warm-up: iteration 1 of 1', 'None', 'every=2: 1 more until the next step']
    """
    if iteration < warmup:
        return Skip(SkipKind.WARMUP, f"warm-up: iteration {iteration + 1} of {warmup}")
    turn = (iteration - warmup) % every
    return Skip(SkipKind.EVERY, f"every={every}: {every - turn} more until the next step") if turn else None
