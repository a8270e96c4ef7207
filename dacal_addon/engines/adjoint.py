"""The hypergradient without a second-order graph: one directional derivative of the inner loss.

With g = grad_theta inner_loss, theta' = U(theta, g), v = grad_theta' outer_loss, D = d theta' / d g and d = D^T v, by the
chain rule

    d outer_loss / d omega  =  d/d omega <g(omega), d>  =  d/d omega  d/d eps inner_loss(theta + eps d, omega)  at eps = 0

exactly, with d held constant. Needed are g (which may be the host's own), v, D in closed form (`update_rules`) and the
directional derivative along d, which `forward` or `finite_difference` supplies. Every pass runs the live student, so that
hooks, wrappers and methods other than `forward` are what they are in training.
"""

import math
import warnings
from typing import NamedTuple, Optional, Sequence, Tuple
from weakref import WeakSet

import torch
from torch import Tensor, nn

from .._check import describe, problem
from .._many import as_numbers, inner_product, total_norm
from ..preserve import moved, preserved
from .finite_difference import central_difference
from .passes import add_to_grad, constant, value_and_grads
from .precision import reduced_precision
from .setting import (
    DirectionalPass,
    Hypergradient,
    LossClosure,
    NoForwardDerivative,
    Setting,
    Slope,
    no_forward_derivative,
    no_inner_gradient,
)


class _Tolerance(NamedTuple):
    """By how much the directional pass may differ from the inner pass before it counts as another function."""

    loss: float
    """Relative to the loss."""
    slope: float
    """Relative to |g| |d|."""


# Far above what rounding does to the networks of the tests and the benchmark, and below the 1e-2 of another dropout mask. TF32
# and autocast round more.
_TOLERANCES = {
    ("forward", torch.float64): _Tolerance(1e-10, 1e-8),
    ("forward", torch.float32): _Tolerance(1e-4, 2e-3),
    ("finite_difference", torch.float64): _Tolerance(1e-6, 1e-4),
    ("finite_difference", torch.float32): _Tolerance(1e-2, 5e-2),
}
_REDUCED = _Tolerance(5e-2, 0.25)

# Students with an op that has no forward derivative: engine "auto" does not try again.
_without_forward: "WeakSet[nn.Module]" = WeakSet()


def adjoint(setting: Setting, inner_loss: LossClosure, outer_loss: LossClosure, engine: str) -> Hypergradient:
    """`hypergradient` by engine "forward", "finite_difference" or "auto"; see there."""
    student, meta, ranks = setting.student, setting.meta_parameters, setting.ranks
    parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
    step = setting.step(parameters)
    with preserved(student) as state, torch.enable_grad():
        with constant(meta):  # the inner gradient's own pass does not need their graph, which would take memory
            inner, grads, rerun_by = value_and_grads("inner_loss", inner_loss, student, parameters)
        if setting.backward:
            state.keep()
        grads = ranks.average(grads, parameters)
        if all(grad is None for grad in grads):  # on every rank
            raise no_inner_gradient(describe(inner))
        inner = ranks.average_number(inner)
        norm = total_norm(grads) if setting.clip_norm is not None else 0.0

        state.rewind()
        before = setting.outer_loss_before(outer_loss, student)
        live = [parameter.detach() for parameter in parameters]
        with moved(parameters, step.updates(live, grads, step.scale(norm))):
            state.rewind()
            after, v, _ = value_and_grads("outer_loss", outer_loss, student, [*parameters, *meta])
        after = ranks.average_number(after)
        direct, direction = v[len(parameters) :], ranks.average(v[: len(parameters)], parameters)
        del v
        step.pull_back(live, grads, direction, norm)

        known = _Known(inner, *(inner_product(a, b) for a, b in ((grads, direction), (grads, grads), (direction, direction))))
        auto = engine == "auto"
        asked = DirectionalPass(student, inner_loss, parameters, direction, meta, state, rerun_by, may_repeat=auto)
        name, through = _derivative(engine, setting, asked, known)
        meta_grads = setting.total(through, direct)
    if setting.backward:
        add_to_grad(parameters, grads)
    return Hypergradient(meta_grads, before, after, inner, name)


def _derivative(
    engine: str, setting: Setting, asked: DirectionalPass, known: "_Known"
) -> Tuple[str, Sequence[Optional[Tensor]]]:
    """The engine used, and the derivative of the inner loss's slope with respect to the meta parameters."""
    student = asked.student
    if engine == "forward":
        return "forward", _forward(setting, asked, known)
    if engine == "auto" and hasattr(torch, "func") and student not in _without_forward:
        try:
            return "forward", _forward(setting, asked, known)
        except (NoForwardDerivative, NotOneFunction) as error:
            _without_forward.add(student)
            message = f"hypergradient: engine 'auto' goes on with 'finite_difference' for this student, because: {error}"
            warnings.warn(message, stacklevel=4)
    slope = central_difference(asked)
    known.check(slope, setting, "finite_difference")
    return "finite_difference", slope.grads


def _forward(setting: Setting, asked: DirectionalPass, known: "_Known") -> Sequence[Optional[Tensor]]:
    from .forward import forward_derivative  # torch >= 2.0

    slope: Optional[Slope] = None
    failure = ""  # and not the error, which would hold the failed pass in a cycle of references
    try:
        slope = forward_derivative(asked)
    except NoForwardDerivative as error:
        failure = str(error)
    # Either all ranks go on or none: one that stops would leave the others waiting.
    if setting.ranks.anywhere(bool(failure), like=known.loss) or slope is None:
        raise NoForwardDerivative(failure) if failure else no_forward_derivative("what another rank met")
    known.check(slope, setting, "forward")
    return slope.grads


class NotOneFunction(RuntimeError):
    """Passes of the inner loss that differ in more than the student's parameters."""


class _Known(NamedTuple):
    """What the directional pass must find, if it is the same function as the inner pass.

    The slope along d must be <g, d>: what makes the passes differ (other dropout masks, a parameter that the student reads from
    somewhere else, a stop-gradient that differences cannot see, lost precision) shows in it, or in the loss.
    """

    loss: Tensor
    slope: Tensor
    grad: Tensor
    """|g| squared."""
    direction: Tensor
    """|d| squared. |g| |d| is the slope's size if d pointed along g."""

    def check(self, slope: Slope, setting: Setting, engine: str) -> None:
        """Raise `NotOneFunction`, on all ranks or on none. NaN does not count: it is the caller's to judge."""
        averages = [setting.ranks.average_number(number) for number in (slope.loss, slope.value)]
        found, found_slope, noise, known, known_slope, *squares = as_numbers([*averages, slope.noise, *self])
        scale, tolerance = math.sqrt(math.prod(squares)), _tolerance(engine, setting.student)
        got = None
        if abs(found - known) > tolerance.loss * max(abs(known), 1e-6):
            got = f"loss {found:.6g} where the inner pass had {known:.6g}"
        # Near convergence the noise is larger.
        elif abs(found_slope - known_slope) > tolerance.slope * scale + 10 * noise:
            got = f"slope {found_slope:.6g} where the inner gradient gives {known_slope:.6g}"
        if got is not None:
            raise problem(
                "hypergradient",
                expected=f"all passes of inner_loss to be one function of the student's parameters (engine {engine!r})",
                got=got,
                remedy="reach the student only through f, without detach or no_grad; draw random numbers from global states "
                "only; enter autocast outside of the meta-step; or choose another engine",
                error=NotOneFunction,
            )


def _tolerance(engine: str, student: nn.Module) -> _Tolerance:
    if reduced_precision(student):
        return _REDUCED
    exact = all(parameter.dtype == torch.float64 for parameter in student.parameters())
    return _TOLERANCES[engine, torch.float64 if exact else torch.float32]
