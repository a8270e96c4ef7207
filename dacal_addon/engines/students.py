"""Which students an engine takes, and which it refuses, with the reason: a wrong gradient must not pass for a right one."""

from typing import Any, List

from torch import nn

from .._check import describe, problem

_DDP = nn.parallel.DistributedDataParallel


def unwrapped(student: nn.Module) -> nn.Module:
    """The student inside of DistributedDataParallel, whose own averaging of gradients the engines do themselves.

    A compiled DDP module is unwrapped to what DDP wraps; any other compiled module stays compiled.
    """
    inner: Any = getattr(student, "_orig_mod", student)
    if not isinstance(inner, _DDP):
        return student
    unwrapped_: nn.Module = inner.module
    return unwrapped_


def process_group_of(student: nn.Module) -> Any:
    """The group over which the student's DistributedDataParallel averages; None without one."""
    inner: Any = getattr(student, "_orig_mod", student)
    return inner.process_group if isinstance(inner, _DDP) else None


def refuse_student(student: nn.Module, *, engine: str) -> None:
    """Raise for a student that `engine` would differentiate wrongly, or late and obscurely fail on."""
    if not isinstance(student, nn.Module):
        remedy = "pass the network itself"
        raise problem(
            "hypergradient", expected="student: a torch.nn.Module", got=describe(student), remedy=remedy, error=TypeError
        )
    student = unwrapped(student)
    if isinstance(student, nn.DataParallel):
        raise problem("hypergradient", expected="an unwrapped student", got="DataParallel", remedy="pass student.module")
    for name, module in student.named_modules():
        where = f"module {name or '(root)'!r} ({type(module).__name__})"
        if isinstance(module, _DDP):
            remedy = "pass the wrapped part alone, or wrap the whole"
            raise problem("hypergradient", expected="a student wrapped as a whole", got=f"DDP around {where}", remedy=remedy)
        sharded = {kind.__name__ for kind in type(module).__mro__} & {"FullyShardedDataParallel", "FSDPModule"}
        if sharded:
            expected = "a student whose parameters are whole on every rank (DistributedDataParallel is)"
            remedy = "train with DDP, or learn the temperatures on a smaller student"
            raise problem("hypergradient", expected=expected, got=f"FSDP: {where}", remedy=remedy)
        _refuse_gradient_hooks(module, where)
        if engine == "higher":
            _refuse_what_higher_drops(module, where)


def _refuse_gradient_hooks(module: nn.Module, where: str) -> None:
    """Hooks that may change gradients: the update is then another function of the gradient than its rule says."""
    hooks: List[Any] = [module._backward_hooks, getattr(module, "_backward_pre_hooks", None)]
    for parameter in module.parameters(recurse=False):
        hooks += [parameter._backward_hooks, getattr(parameter, "_post_accumulate_grad_hooks", None)]
    if any(hooks):
        raise problem(
            "hypergradient",
            expected="a student without hooks on gradients (they may change them, unseen by the update rule)",
            got=f"a hook on {where}",
            remedy="remove the hook during the meta-step",
        )


def _refuse_what_higher_drops(module: nn.Module, where: str) -> None:
    remedy = "choose engine='forward' or 'finite_difference', or remove it during the meta-step"
    if hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None:
        expected = "an uncompiled student (engine 'higher' cannot copy a compiled one)"
        raise problem("hypergradient", expected=expected, got=f"a compiled {where}", remedy=remedy)
    if module._forward_hooks or module._forward_pre_hooks:
        expected = "a student without hooks (engine 'higher' drops them, and would differentiate another network)"
        raise problem("hypergradient", expected=expected, got=f"a hook on {where}", remedy=remedy)
    if "forward" in vars(module):
        expected = "forward methods of classes (engine 'higher' ignores one set on an instance)"
        raise problem("hypergradient", expected=expected, got=f"a forward set on {where}", remedy=remedy)
