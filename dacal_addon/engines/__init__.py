"""The hypergradient, d outer_loss / d meta_parameters through one virtual step of the student, and its engines."""

from typing import Any, Optional, Sequence

import torch
from torch import Tensor, nn

from .._check import check_choice, check_tensor, describe, problem
from ..preserve import preserved
from ..ranks import Ranks
from .finite_difference import refuse_half_precision
from .passes import add_to_grad, value_and_grads
from .setting import Hypergradient, LossClosure, Setting, Student
from .students import process_group_of, refuse_student, unwrapped
from .update_rules import Update, has_zero_step, step_of

ENGINES = ("higher", "forward", "finite_difference", "auto")

__all__ = [
    "ENGINES",
    "Hypergradient",
    "LossClosure",
    "Student",
    "Update",
    "backward",
    "check_supported",
    "has_zero_step",
    "hypergradient",
    "ranks_of",
]


def hypergradient(
    student: nn.Module,
    inner_loss: LossClosure,
    outer_loss: LossClosure,
    meta_parameters: Sequence[Tensor],
    *,
    optimizer: torch.optim.Optimizer,
    engine: str = "higher",
    update_rule: Optional[Update] = None,
    clip_norm: Optional[float] = None,
    backward: bool = False,
    measure_before: bool = True,
    process_group: Any = None,
) -> Hypergradient:
    """Differentiate the outer loss through one virtual optimizer step on the inner loss.

    With student parameters theta and meta parameters omega: theta'(omega) = U(theta, grad_theta inner_loss), where U is the
    update rule of `optimizer` with its present settings and state; returned is d outer_loss(theta'(omega)) / d omega.

    The live student (parameters, buffers, `.grad`, training flags, what its modules note down), the optimizer's state, `.grad`
    of the meta parameters and the global random states of torch, numpy and python are bit for bit as before, also when a
    closure raises. (Not so parameters that a forward pass changes itself, as `nn.Embedding(max_norm=...)` does.) All passes
    start from the same random state, so that dropout draws the same masks in each, and from the live buffers.

    Under `torch.distributed` all ranks call this together, each with its part of the batch: the student's gradients and the
    meta gradient are averaged, so that losses that are means over equal parts give what one process would get for the whole
    batch.

    Args:
        student: the network; parameters may be frozen (`requires_grad=False`). DistributedDataParallel is unwrapped.
        inner_loss: `inner_loss(f)` returns the scalar that the virtual step descends. Called with gradients enabled, once by
            "higher", two to four times by the other engines: it must give the same loss again from the same random state.
        outer_loss: `outer_loss(f)` returns the scalar that judges the result. Called without gradient on the live parameters,
            and with gradient on the updated ones. It may depend on the meta parameters itself (a prior on them, say).
        meta_parameters: the tensors to differentiate for; each requires grad.
        optimizer: the host's own: `torch.optim.SGD`, `Adam` or `AdamW`, or any with an `update_rule`. Only read.
        engine: all are exact to their precision, see `docs/costs.md` for their costs.
            "higher" unrolls the step with the `higher` library. `f` can only be called.
            "forward" needs one forward-mode pass of the inner loss and torch >= 2.0. `f` is the student itself.
            "finite_difference" needs two passes without a graph, and nothing of the student but that it can be trained and
            keeps float32 parameters: fused or custom kernels, compiled modules and checkpointing will do. Its relative error in
            float32 is about 1e-5, in a network of ReLUs 1e-3 to 1e-2. `f` is the student itself. Before torch 1.10 the
            student's input must not depend on the meta parameters.
            "auto" is "forward", or "finite_difference" where that fails; one warning says why. It asks for float32 parameters
            too.
            The inner loss must not stop gradients of the student: "forward" does not see `no_grad`, "finite_difference" not
            even `detach`. Both compare their passes and raise, if only loosely under autocast.
        update_rule: the step of an optimizer that is not known here: `(parameter, grad, group, state) -> updated parameter` for
            each tensor, in torch operations, nothing in place; `group` and `state` are the live optimizer's.
        clip_norm: the `max_norm` of the host's `clip_grad_norm_`, here applied to the inner gradient.
        backward: also do the host's own backward pass of the inner loss: its gradient is added to `.grad` of the student's
            parameters, and buffers and random states are left as the inner pass leaves them. The host then needs no
            mixed-image pass of its own. Not for hosts with a GradScaler: the gradient is not scaled.
        measure_before: False saves one forward pass and leaves `outer_loss_before` NaN.
        process_group: whose ranks to average over; by default that of the student's DDP wrapper, or else the default group.

    Raises:
        TypeError: a closure that does not return a tensor, a meta parameter that is none, an optimizer of another kind.
        ValueError: an unknown engine, a loss that is not a scalar, a student or a setting of the optimizer that the engine
            would differentiate wrongly, an `inner_loss` that does not depend on the meta parameters.
        RuntimeError: passes of the inner loss that turn out not to be one function of the student's parameters.

    Example (minimise w^2 / 2 after one step of size 1/2 on the inner loss (w - omega)^2 / 2, from w = 1 and omega = 3:
    w' = w - (w - omega) / 2 = 2, and the hypergradient is w' * dw'/domega = 2 * 1/2):
        >>> student = nn.Linear(1, 1, bias=False)
        >>> _ = student.weight.data.fill_(1.0)
        >>> omega, one = torch.tensor(3.0, requires_grad=True), torch.ones(1, 1)
        >>> result = hypergradient(
        ...     student,
        ...     lambda f: (f(one) - omega).pow(2).sum() / 2,
        ...     lambda f: f(one).pow(2).sum() / 2,
        ...     [omega],
        ...     optimizer=torch.optim.SGD(student.parameters(), lr=0.5),
        ... )
        >>> result.grads[0].item(), result.outer_loss_before.item(), result.outer_loss_after.item()
        (1.0, 0.5, 2.0)

    Source: one-step unrolled differentiation as in DARTS (Liu et al., ICLR 2019), whose finite differences along the outer
    gradient are "finite_difference" for SGD, and `higher` (Grefenstette et al., 2019).
    """
    check_supported(student, optimizer, engine=engine, update_rule=update_rule, clip_norm=clip_norm)
    meta_parameters = tuple(meta_parameters)
    for i, parameter in enumerate(meta_parameters):
        expected = f"meta_parameters[{i}]: a tensor that requires grad"
        check_tensor("hypergradient", f"meta_parameters[{i}]", parameter, expected=expected, remedy="pass parameters")
        if not parameter.requires_grad:
            remedy = "pass only the parameters that learn"
            raise problem("hypergradient", expected=expected, got=describe(parameter) + " without grad", remedy=remedy)
    if not meta_parameters:
        remedy = "pass list(temperature_net.parameters())"
        raise problem("hypergradient", expected="at least one meta parameter", got="none", remedy=remedy)
    setting = Setting(
        unwrapped(student),
        meta_parameters,
        optimizer,
        update_rule,
        clip_norm,
        backward,
        measure_before,
        ranks_of(student, process_group),
    )
    if engine == "higher":
        from .unroll import unroll  # here and not above: who takes another engine need not import `higher`

        return unroll(setting, inner_loss, outer_loss)
    from .adjoint import adjoint

    return adjoint(setting, inner_loss, outer_loss, engine)


def backward(student: nn.Module, loss: LossClosure, *, process_group: Any = None) -> Tensor:
    """What `hypergradient(..., backward=True)` does for the host, alone: `loss(f)`, detached, its gradient added to `.grad`."""
    ranks, student = ranks_of(student, process_group), unwrapped(student)
    parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
    with preserved(student) as state, torch.enable_grad():
        value, grads, _ = value_and_grads("loss", loss, student, parameters)
        state.keep()
    add_to_grad(parameters, ranks.average(grads, parameters))
    return ranks.average_number(value)


def ranks_of(student: nn.Module, process_group: Any = None) -> Ranks:
    """The processes over which a student's gradients are averaged."""
    return Ranks(process_group if process_group is not None else process_group_of(student))


def check_supported(
    student: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    engine: str,
    update_rule: Optional[Update] = None,
    clip_norm: Optional[float] = None,
) -> None:
    """Raise what `hypergradient` would, if `engine` cannot differentiate this student or this optimizer rightly."""
    check_choice("hypergradient", "engine", engine, ENGINES)
    if engine == "forward" and not hasattr(torch, "func"):
        expected = "torch >= 2.0 (engine 'forward' needs its forward-mode derivatives)"
        remedy = "choose engine='finite_difference', or 'auto'"
        raise problem("hypergradient", expected=expected, got=f"torch {torch.__version__}", remedy=remedy)
    refuse_student(student, engine=engine)
    parameters = list(unwrapped(student).parameters())
    step = step_of(optimizer, parameters, update_rule=update_rule, clip_norm=clip_norm)
    if engine in ("finite_difference", "auto"):
        trained = [p for p, place in zip(parameters, step.places) if place is not None and p.requires_grad]
        refuse_half_precision(trained, engine=engine)
