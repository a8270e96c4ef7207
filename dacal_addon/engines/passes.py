"""One pass of a loss closure over the student, and its gradient."""

from contextlib import contextmanager
from typing import Any, Callable, Iterator, List, Optional, Sequence, Set, Tuple

import torch
from torch import Tensor, nn

from .._check import check_tensor, describe, problem


def scalar(name: str, loss: object) -> Tensor:
    """A closure's result, checked to be one number."""
    remedy = "reduce it with .mean() or .sum()"
    value = check_tensor("hypergradient", name, loss, expected="a scalar tensor", remedy=remedy)
    if value.numel() != 1:
        raise problem("hypergradient", expected=f"{name} to return a scalar", got=describe(value), remedy=remedy)
    return value.reshape(())


def value_and_grads(
    name: str, closure: Callable[[Any], Tensor], student: nn.Module, inputs: Sequence[Tensor]
) -> Tuple[Tensor, List[Optional[Tensor]]]:
    """The loss, detached, and its gradient with respect to `inputs`; `.grad` of every tensor stays as it is."""
    loss = scalar(name, closure(student))
    if not loss.requires_grad:
        return loss, [None] * len(inputs)
    grads: Sequence[Optional[Tensor]]
    if has_reentrant_checkpoint(loss):
        grads = _grads_by_backward(loss, [*student.parameters(), *inputs], inputs)
    else:
        grads = torch.autograd.grad(loss, inputs, allow_unused=True)
    return loss.detach(), _writable(grads)


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
    return any(type(node).__name__ == "CheckpointFunctionBackward" for node in _nodes(loss))


def add_to_grad(parameters: Sequence[Tensor], grads: Sequence[Optional[Tensor]]) -> None:
    """Accumulate into `.grad`, as a backward pass does."""
    for parameter, grad in zip(parameters, grads):
        if grad is None:
            continue
        if parameter.grad is None:
            parameter.grad = grad
        else:
            parameter.grad.add_(grad)


def _grads_by_backward(loss: Tensor, hidden: Sequence[Tensor], inputs: Sequence[Tensor]) -> List[Optional[Tensor]]:
    """The gradient through `.backward()`, which writes into every leaf: all are put back, those that checkpoints hide too."""
    leaves = {
        id(leaf): leaf for leaf in [*hidden, *(node.variable for node in _nodes(loss) if hasattr(node, "variable"))]
    }.values()
    own = [(leaf, leaf.grad) for leaf in leaves]
    try:
        for leaf in leaves:
            leaf.grad = None
        # Labels that were computed outside of the closure are needed once more.
        loss.backward(retain_graph=True)
        return [leaf.grad for leaf in inputs]
    finally:
        for leaf, grad in own:
            leaf.grad = grad


def _nodes(loss: Tensor) -> Iterator[Any]:
    """The nodes of the loss's graph; those with a `variable` are its leaves."""
    seen: Set[Any] = set()
    waiting: List[Any] = [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting.extend(parent for parent, _ in node.next_functions)
            yield node
