"""The hypergradient, d outer_loss / d meta_parameters through one virtual step of the student, and its engines."""

from typing import Any, Callable, NamedTuple, Sequence, Tuple

import torch
from torch import Tensor, nn

from .._check import check_choice, check_tensor, describe, problem

ENGINES = ("higher",)

Student = Callable[..., Any]
"""What a loss closure gets: call it as the student; it has the live or the virtually updated parameters."""
LossClosure = Callable[[Student], Tensor]


class Hypergradient(NamedTuple):
    """What `hypergradient` returns; everything detached."""

    grads: Tuple[Tensor, ...]
    """One tensor per meta parameter, of its shape; zeros where a parameter has no influence."""
    outer_loss_before: Tensor
    """Scalar: the outer loss with the live parameters."""
    outer_loss_after: Tensor
    """Scalar: the outer loss with the parameters after the virtual step."""


def hypergradient(
    student: nn.Module,
    inner_loss: LossClosure,
    outer_loss: LossClosure,
    meta_parameters: Sequence[Tensor],
    *,
    optimizer: torch.optim.Optimizer,
    engine: str = "higher",
) -> Hypergradient:
    """Differentiate the outer loss through one virtual optimizer step on the inner loss.

    With student parameters theta and meta parameters omega: theta'(omega) = U(theta, grad_theta inner_loss), where U is the
    update rule of `optimizer` with its present settings and state; returned is d outer_loss(theta'(omega)) / d omega.

    The live student (parameters, buffers, `.grad`, training flags), the optimizer's state, `.grad` of the meta parameters
    and the global random states of torch, numpy and python are bit for bit as before, also when a closure raises or calls
    the live student. All passes start from the same random state, so that dropout draws the same masks in each, and from
    the live buffers.

    Args:
        student: the network; parameters may be frozen (`requires_grad=False`).
        inner_loss: `inner_loss(f)` returns the scalar that the virtual step descends; the only place where the meta
            parameters may come in. Called once, with gradients enabled.
        outer_loss: `outer_loss(f)` returns the scalar that judges the result. Called twice: without gradient on the live
            parameters, with gradient on the updated ones.
        meta_parameters: the tensors to differentiate for; each requires grad.
        optimizer: the host's own: `torch.optim.SGD`, `Adam` or `AdamW`. Only read.
        engine: "higher" unrolls the step with the `higher` library; exact.

    Raises:
        TypeError: a closure that does not return a tensor, a meta parameter that is none, an optimizer of another kind.
        ValueError: an unknown engine, a loss that is not a scalar, a student or a setting of the optimizer that the engine
            would differentiate wrongly, an `inner_loss` that does not depend on the meta parameters.

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

    Source: one-step unrolled differentiation as in DARTS (Liu et al., ICLR 2019) and `higher` (Grefenstette et al., 2019).
    """
    check_supported(student, optimizer, engine=engine)
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
    from .unroll import unroll  # here and not above: who never takes a meta-step need not import `higher`

    return unroll(student, inner_loss, outer_loss, meta_parameters, optimizer)


def check_supported(student: nn.Module, optimizer: torch.optim.Optimizer, *, engine: str) -> None:
    """Raise what `hypergradient` would, if `engine` cannot differentiate this student or this optimizer rightly."""
    check_choice("hypergradient", "engine", engine, ENGINES)
    from .unroll import refuse_optimizer, refuse_student

    refuse_student(student)
    refuse_optimizer(optimizer, student)


def scalar(name: str, loss: object) -> Tensor:
    """A closure's result, checked to be one number."""
    remedy = "reduce it with .mean() or .sum()"
    value = check_tensor("hypergradient", name, loss, expected="a scalar tensor", remedy=remedy)
    if value.numel() != 1:
        raise problem("hypergradient", expected=f"{name} to return a scalar", got=describe(value), remedy=remedy)
    return value.reshape(())
