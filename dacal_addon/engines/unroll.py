"""The reference engine: unroll the virtual step with `higher` and differentiate through its graph.

The only file that imports `higher`. Used of it: `monkeypatch` (a stateless copy of the student) and the base class of its
differentiable optimizers. Its own Adam (0.2.1 on PyPI) adds eps before the bias correction, where torch's adds it after, and
it has no AdamW, so both are here, exact; nothing is registered globally, and any version of `higher` gives the same result.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Dict, Optional, Sequence, Tuple, Type

import higher
import torch
from torch import Tensor, nn

from .._check import describe, problem
from ..preserve import preserved
from . import Hypergradient, LossClosure, scalar


class _DifferentiableAdam(higher.optim.DifferentiableOptimizer):  # type: ignore[misc]  # higher is untyped
    """torch.optim.Adam and AdamW (with AMSGrad) as a differentiable function of the gradient."""

    decoupled_decay = False

    def _update(self, grouped_grads: Sequence[Sequence[Optional[Tensor]]], **kwargs: Any) -> None:
        for i, (group, grads) in enumerate(zip(self.param_groups, grouped_grads)):
            decoupled = self.decoupled_decay or group.get("decoupled_weight_decay", False)
            for j, (parameter, grad) in enumerate(zip(group["params"], grads)):
                if grad is not None:
                    group["params"][j] = _adam(parameter, grad, group, self.state[i][j], decoupled)


class _DifferentiableAdamW(_DifferentiableAdam):
    decoupled_decay = True


def _adam(parameter: Tensor, grad: Tensor, group: Dict[str, Any], state: Dict[str, Any], decoupled: bool) -> Tensor:
    """One parameter after one step of Adam (Kingma & Ba 2015) or AdamW (Loshchilov & Hutter 2019), as torch computes it."""
    (beta1, beta2), lr = group["betas"], group["lr"]
    if decoupled:
        parameter = parameter * (1 - lr * group["weight_decay"])
    elif group["weight_decay"] != 0:
        grad = grad + group["weight_decay"] * parameter
    step = state.get("step", 0) + 1
    zero = torch.zeros_like(parameter)
    first = beta1 * state.get("exp_avg", zero) + (1 - beta1) * grad
    second = beta2 * state.get("exp_avg_sq", zero) + (1 - beta2) * grad * grad
    if group["amsgrad"]:
        second = torch.max(state.get("max_exp_avg_sq", zero), second)
    # The square root has an infinite slope at 0, where the update as a whole has the slope lr * (1 - beta1) / eps: a
    # parameter that never had a gradient must not give NaN.
    never = second == 0
    root = torch.sqrt(torch.where(never, torch.ones_like(second), second)).masked_fill(never, 0.0)
    denominator = root / (1 - beta2**step) ** 0.5 + group["eps"]
    updated: Tensor = parameter - lr / (1 - beta1**step) * first / denominator
    return updated


_OPTIMIZERS: Dict[Type[torch.optim.Optimizer], Any] = {
    torch.optim.SGD: higher.optim.DifferentiableSGD,
    torch.optim.Adam: _DifferentiableAdam,
    torch.optim.AdamW: _DifferentiableAdamW,
}


def unroll(
    student: nn.Module,
    inner_loss: LossClosure,
    outer_loss: LossClosure,
    meta_parameters: Tuple[Tensor, ...],
    optimizer: torch.optim.Optimizer,
) -> Hypergradient:
    """`hypergradient` by unrolling; see there."""
    with preserved(student) as states, torch.enable_grad(), _twice_differentiable_attention():
        copy = _stateless_copy(student)
        live = list(copy.parameters())
        virtual_optimizer = _differentiable(optimizer, student, copy)

        def f(*args: Any, **kwargs: Any) -> Any:
            return copy(*args, **kwargs)

        with torch.no_grad():
            before = scalar("outer_loss", outer_loss(f)).detach()
        _rewind(student, copy, states)
        inner = scalar("inner_loss", inner_loss(f))
        if not any(parameter.requires_grad for parameter in live) or not inner.requires_grad:
            remedy = "call f in the closure, and leave some parameters of the student trainable"
            raise problem("hypergradient", expected="an inner_loss with gradient", got=describe(inner), remedy=remedy)
        virtual_optimizer.step(inner)
        _rewind(student, copy, states)
        after = scalar("outer_loss", outer_loss(f))
        grads: Sequence[Optional[Tensor]] = (
            torch.autograd.grad(after, meta_parameters, allow_unused=True)
            if after.requires_grad
            else [None] * len(meta_parameters)
        )
    if all(grad is None for grad in grads):
        raise problem(
            "hypergradient",
            expected="an outer loss that depends, through inner_loss and the virtual step, on the meta parameters",
            got="no dependence",
            remedy="compute the soft labels inside inner_loss with gradients enabled, and the outer loss with f",
        )
    filled = (torch.zeros_like(p) if g is None else g.detach() for p, g in zip(meta_parameters, grads))
    return Hypergradient(tuple(filled), before, after.detach())


def _stateless_copy(student: nn.Module) -> Any:
    """`higher`'s functional copy of the student."""
    copy = higher.patch.monkeypatch(student)
    for module in copy.modules():
        for name, value in vars(module).items():
            # `higher` shares these with the live modules: one that logs into a list would keep the unrolled graph alive.
            if type(value) in (list, dict, set) and not name.startswith("_"):
                vars(module)[name] = value.copy()
    return copy


def _rewind(student: nn.Module, copy: Any, states: Any) -> None:
    """Before the next pass: the random numbers and buffers with which the first one began."""
    states.restore()
    higher.patch.buffer_sync(student, copy)


def _differentiable(optimizer: torch.optim.Optimizer, student: nn.Module, copy: Any) -> Any:
    """The differentiable twin of the live optimizer, on the student's parameters only."""
    ours = {id(parameter) for parameter in student.parameters()}
    # A host's optimizer may own more than the student (a discriminator, the temperature net as a child module of the
    # trainer); `higher` knows only the student's parameters. An object of the same class with a view on the rest of its
    # state: copying the optimizer would copy that state once more.
    view = type(optimizer).__new__(type(optimizer))
    view.state = optimizer.state
    view.param_groups = [
        {**group, "params": [parameter for parameter in group["params"] if id(parameter) in ours]}
        for group in optimizer.param_groups
    ]
    twin = _OPTIMIZERS[type(optimizer)](view, student.parameters(), fmodel=copy)
    for group_state in twin.state:
        for state in group_state.values():
            if state.get("momentum_buffer", state) is None:  # torch 1.12 to 2.2, without momentum
                del state["momentum_buffer"]
            if isinstance(state.get("step"), Tensor):
                # torch 2 counts in a float32 tensor but corrects the bias in double precision; beta ** tensor would be
                # float32 and wrong in the eighth digit.
                state["step"] = float(state["step"])
    return twin


def refuse_student(student: nn.Module) -> None:
    """Students for which `higher` fails late or, worse, gives another network's gradient."""
    if not isinstance(student, nn.Module):
        remedy = "pass the network itself"
        raise problem(
            "hypergradient", expected="student: a torch.nn.Module", got=describe(student), remedy=remedy, error=TypeError
        )
    if isinstance(student, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        got = type(student).__name__
        raise problem("hypergradient", expected="an unwrapped student", got=got, remedy="pass student.module")
    for name, module in student.named_modules():
        where = f"module {name or '(root)'!r} ({type(module).__name__})"
        if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
            remedy = "compile after the meta-step, or pass the module that was compiled (its _orig_mod)"
            raise problem("hypergradient", expected="an uncompiled student", got=f"a compiled {where}", remedy=remedy)
        hooks = [module._forward_hooks, module._forward_pre_hooks, module._backward_hooks]
        hooks += [parameter._backward_hooks for parameter in module.parameters(recurse=False)]
        if any(hooks):
            raise problem(
                "hypergradient",
                expected="a student without hooks (engine 'higher' drops them, and would differentiate another network)",
                got=f"a hook on {where}",
                remedy="remove the hook during the meta-step, or move its work into forward",
            )
        if "forward" in vars(module):
            raise problem(
                "hypergradient",
                expected="forward methods of classes (engine 'higher' ignores one set on an instance)",
                got=f"a forward set on {where}",
                remedy="subclass the module instead",
            )


def refuse_optimizer(optimizer: torch.optim.Optimizer, student: nn.Module) -> None:
    """Optimizers whose update rule is not known here, to the letter."""
    if type(optimizer) not in _OPTIMIZERS:
        raise problem(
            "hypergradient",
            expected="optimizer: " + ", ".join(f"torch.optim.{kind.__name__}" for kind in _OPTIMIZERS),
            got=f"{type(optimizer).__module__}.{type(optimizer).__name__}",
            remedy="train the student with one of these",
            error=TypeError,
        )
    ours = {id(parameter) for parameter in student.parameters()}
    if not any(id(parameter) in ours for group in optimizer.param_groups for parameter in group["params"]):
        remedy = "pass the optimizer that trains the student"
        raise problem("hypergradient", expected="an optimizer of the student's parameters", got="none of them", remedy=remedy)
    for i, group in enumerate(optimizer.param_groups):
        if group.get("maximize", False):
            raise problem(
                "hypergradient",
                expected="maximize=False (engine 'higher' would descend all the same)",
                got=f"maximize=True in param group {i}",
                remedy="negate the loss instead",
            )


def _twice_differentiable_attention() -> "AbstractContextManager[Any]":
    """The fused attention kernels have no second derivative; the plain one has."""
    if not hasattr(nn.functional, "scaled_dot_product_attention"):  # torch < 2 has no fused kernel
        return nullcontext()
    try:
        from torch.nn.attention import SDPBackend, sdpa_kernel
    except ImportError:  # torch 2.0 to 2.2
        return torch.backends.cuda.sdp_kernel(enable_flash=False, enable_math=True, enable_mem_efficient=False)
    return sdpa_kernel(SDPBackend.MATH)
