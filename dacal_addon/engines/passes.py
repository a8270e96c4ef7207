"""One pass of a loss closure over the student, and its gradient."""

from contextlib import contextmanager
from typing import Any, Callable, Iterator, List, NamedTuple, Optional, Sequence, Set

import torch
from torch import Tensor, nn

from .._check import check_tensor, describe, problem
from .._many import add_all_

_CHECKPOINT = "CheckpointFunction"
OUT_OF_MEMORY: Any = getattr(torch.cuda, "OutOfMemoryError", ())  # torch < 1.13 raises a plain RuntimeError


def scalar(name: str, loss: object) -> Tensor:
    """A closure's result, checked to be one number."""
    remedy = "reduce it with .mean() or .sum()"
    value = check_tensor("hypergradient", name, loss, expected="a scalar tensor", remedy=remedy)
    if value.numel() != 1:
        raise problem("hypergradient", expected=f"{name} to return a scalar", got=describe(value), remedy=remedy)
    return value.reshape(())


class Pass(NamedTuple):
    """A pass of a closure and the backward pass after it."""

    loss: Tensor
    """Detached."""
    grads: List[Optional[Tensor]]
    rerun_by: str
    """The custom function whose backward pass ran a part of the student once more, with a backward pass of its own: that of
    re-entrant checkpoints, or another of this kind (reversible blocks); "" if there is none."""


def value_and_grads(name: str, closure: Callable[[Any], Tensor], student: nn.Module, inputs: Sequence[Tensor]) -> Pass:
    """The loss and its gradient with respect to `inputs`; `.grad` of every tensor stays as it is."""
    loss = scalar(name, closure(student))
    if not loss.requires_grad:
        return Pass(loss, [None] * len(inputs), "")
    grads: Sequence[Optional[Tensor]]
    leaves, custom, rerun_by = [*student.parameters(), *inputs], _custom_functions(loss), ""
    if _CHECKPOINT in custom:
        rerun_by = _CHECKPOINT
        grads = _grads_by_backward(loss, leaves, inputs)
    elif custom:
        beside = leaves_beside(loss, inputs)
        with _without_grad([*leaves, *beside]):
            asked = [*inputs, *beside]
            outside = torch.autograd.grad(loss, asked, allow_unused=True, retain_graph=bool(beside))[: len(inputs)]
            inside = [leaf.grad for leaf in inputs]
            if any(leaf.grad is not None for leaf in leaves):
                rerun_by = ", ".join(sorted(custom))
        grads = [b if a is None else a if b is None else a + b for a, b in zip(outside, inside)]
    else:
        grads = torch.autograd.grad(loss, inputs, allow_unused=True)
    return Pass(loss.detach(), _writable(grads), rerun_by)


def _writable(grads: Sequence[Optional[Tensor]]) -> List[Optional[Tensor]]:
    """Dense gradients that own their memory: autograd may give one tensor to several parameters, or an expanded one."""
    seen = set()
    result = []
    for grad in grads:
        if grad is not None:
            grad = grad.to_dense() if grad.is_sparse else grad
            expanded = any(stride == 0 and size > 1 for stride, size in zip(grad.stride(), grad.shape))
            grad = grad.clone() if expanded or grad.data_ptr() in seen else grad
            seen.add(grad.data_ptr())
        result.append(grad)
    return result


@contextmanager
def constant(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Inside, leaves among the tensors do not require grad, so that closures need not keep a graph that leads to them."""
    leaves = [tensor for tensor in tensors if tensor.is_leaf]
    try:
        for leaf in leaves:
            leaf.requires_grad_(False)
        yield
    finally:
        for leaf in leaves:
            leaf.requires_grad_(True)


def has_reentrant_checkpoint(loss: Tensor) -> bool:
    """Whether the loss went through re-entrant checkpointing (the only one before torch 1.11), which needs .backward().

    Asked of the graph, because torch says so only in the middle of a backward pass, and 1.7.1 then refuses .backward() too.
    """
    return _CHECKPOINT in _custom_functions(loss)


def leaves_beside(loss: Tensor, inputs: Sequence[Tensor]) -> List[Tensor]:
    """The leaves, other than `inputs`, that lie behind functions written in Python: an image, or a dummy.

    `torch.autograd.grad` leaves out the backward pass of a function behind which there is nothing that it is asked for, though
    it may train parameters that it runs aside.
    """
    known = {id(leaf) for leaf in inputs}
    behind = {id(node.variable): node.variable for node in _nodes(_custom_nodes(loss)) if hasattr(node, "variable")}
    return [leaf for key, leaf in behind.items() if key not in known and leaf.requires_grad]


def _custom_functions(loss: Tensor) -> Set[str]:
    """The names of the functions written in Python that the loss went through."""
    return {type(node).__name__[: -len("Backward")] for node in _custom_nodes(loss)}


def _custom_nodes(loss: Tensor) -> List[Any]:
    kind: Any = torch.autograd.function.BackwardCFunction
    return [node for node in _nodes([loss.grad_fn]) if isinstance(node, kind)]


def add_to_grad(parameters: Sequence[Tensor], grads: Sequence[Optional[Tensor]]) -> None:
    """Accumulate into `.grad`, as a backward pass does."""
    pairs = [(parameter, grad) for parameter, grad in zip(parameters, grads) if grad is not None]
    held = [(parameter.grad, grad) for parameter, grad in pairs if parameter.grad is not None]
    add_all_([own for own, _ in held], [grad for _, grad in held])
    for parameter, grad in pairs:
        if parameter.grad is None:
            parameter.grad = grad


def _grads_by_backward(loss: Tensor, hidden: Sequence[Tensor], inputs: Sequence[Tensor]) -> List[Optional[Tensor]]:
    """The gradient through `.backward()`, which writes into every leaf: all are put back, those that checkpoints hide too."""
    with _without_grad([*hidden, *(node.variable for node in _nodes([loss.grad_fn]) if hasattr(node, "variable"))]):
        # Labels that were computed outside of the closure are needed once more.
        loss.backward(retain_graph=True)
        return [leaf.grad for leaf in inputs]


@contextmanager
def _without_grad(leaves: Sequence[Tensor]) -> Iterator[None]:
    """Inside, `.grad` of the leaves is empty; afterwards what it was."""
    own = [(leaf, leaf.grad) for leaf in {id(leaf): leaf for leaf in leaves}.values()]
    try:
        for leaf, _ in own:
            leaf.grad = None
        yield
    finally:
        for leaf, grad in own:
            leaf.grad = grad


def _nodes(starts: Sequence[Any]) -> Iterator[Any]:
    """The nodes of a graph from some on; those with a `variable` are its leaves."""
    seen: Set[Any] = set()
    waiting = list(starts)
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting.extend(parent for parent, _ in node.next_functions)
            yield node
