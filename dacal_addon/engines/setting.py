"""What one call of `hypergradient` asks for, and what it answers; the engines' common ground."""

from typing import Any, NamedTuple, Optional, Protocol, Sequence, Tuple, Union

import torch
from torch import Tensor, nn

from .._check import problem
from ..preserve import Preserved
from ..ranks import Ranks
from .passes import scalar
from .update_rules import Step, Update, step_of


class Student(Protocol):
    """What a loss closure gets: call it as the student; it has the live or the virtually updated parameters."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the student returns."""


class LossClosure(Protocol):
    """A loss as a function of the student, by which the host says what it trains and judges with."""

    def __call__(self, f: Student, /) -> Tensor:
        """A scalar."""


class Hypergradient(NamedTuple):
    """What `hypergradient` returns; everything detached, and the same on every rank."""

    grads: Tuple[Tensor, ...]
    """One tensor per meta parameter, of its shape; zeros where a parameter has no influence."""
    outer_loss_before: Tensor
    """Scalar: the outer loss with the live parameters; NaN with `measure_before=False`."""
    outer_loss_after: Tensor
    """Scalar: the outer loss with the parameters after the virtual step."""
    inner_loss: Tensor
    """Scalar: the inner loss with the live parameters."""
    engine: str
    """The engine that computed it; of interest with "auto"."""


class Setting(NamedTuple):
    """The arguments of `hypergradient` but for the closures, checked; the student without its DDP wrapper."""

    student: nn.Module
    meta_parameters: Tuple[Tensor, ...]
    optimizer: torch.optim.Optimizer
    update_rule: Optional[Update]
    clip_norm: Optional[float]
    backward: bool
    measure_before: bool
    ranks: Ranks

    def step(self, parameters: Sequence[Tensor]) -> Step:
        """The virtual step on these parameters."""
        return step_of(self.optimizer, parameters, update_rule=self.update_rule, clip_norm=self.clip_norm)

    def outer_loss_before(self, outer_loss: LossClosure, f: Student) -> Tensor:
        """The outer loss with what `f` has for parameters now, without gradient."""
        if not self.measure_before:
            return torch.full((), float("nan"))
        with torch.no_grad():
            return self.ranks.average_number(scalar("outer_loss", outer_loss(f)))

    def total(self, through: Sequence[Optional[Tensor]], direct: Sequence[Optional[Tensor]]) -> Tuple[Tensor, ...]:
        """The hypergradient over all ranks, from its part through the virtual step and that of the outer loss itself."""
        parts = [b if a is None else a if b is None else a + b for a, b in zip(through, direct)]
        grads = self.ranks.average(parts, self.meta_parameters)
        if all(grad is None for grad in grads):
            raise problem(
                "hypergradient",
                expected="an outer loss that depends, through inner_loss and the virtual step, on the meta parameters",
                got="no dependence",
                remedy="compute the soft labels inside inner_loss with gradients enabled, and the outer loss with f",
            )
        return tuple(torch.zeros_like(p) if g is None else g.detach() for p, g in zip(self.meta_parameters, grads))


class DirectionalPass(NamedTuple):
    """What an engine is asked for: the inner loss's slope at the live parameters, and its gradient."""

    student: nn.Module
    inner_loss: LossClosure
    parameters: Sequence[Tensor]
    """The student's trainable ones."""
    direction: Sequence[Optional[Tensor]]
    """One tangent a parameter; None for zero."""
    meta_parameters: Sequence[Tensor]
    state: Preserved
    rerun_by: str
    """Of the inner pass; see `passes.Pass`."""
    may_repeat: bool
    """Whether another pass may follow, which needs the graph of labels that were computed outside of the closure once more."""


class Slope(NamedTuple):
    """What it answers."""

    loss: Tensor
    """The inner loss, detached."""
    value: Tensor
    """The loss's derivative along the direction, detached."""
    grads: Sequence[Optional[Tensor]]
    """The slope's derivative with respect to the meta parameters."""
    noise: Union[float, Tensor] = 0.0
    """By how much rounding may have changed the slope."""


def no_inner_gradient(got: str) -> Exception:
    """For an inner loss that does not reach the student's parameters."""
    remedy = "call f in the closure, and leave some parameters of the student trainable"
    return problem("hypergradient", expected="an inner_loss with gradient", got=got, remedy=remedy)


class NoForwardDerivative(ValueError):
    """An operation of the student has no forward derivative."""


def no_forward_derivative(operation: str) -> Exception:
    """`NoForwardDerivative`, which names it."""
    return problem(
        "hypergradient",
        expected="a student whose every operation has a forward derivative (engine 'forward')",
        got=operation,
        remedy="choose engine='finite_difference', or 'auto'",
        error=NoForwardDerivative,
    )
