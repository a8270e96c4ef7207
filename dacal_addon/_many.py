"""Operations over many tensors at once: on a GPU, a small tensor costs its launches and not its arithmetic.

A network has hundreds of parameters, most of them small. Elementwise rules and sums are the same on tensors that are laid end
to end, so that small ones are joined; large ones stay alone, since copies of them would be felt.
"""

import math
from typing import Any, Dict, Hashable, Iterator, List, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor

_ALONE = 1 << 18  # elements from which a tensor is not joined: a copy of it takes as long as a launch
_JOINED = 1 << 19  # elements that are joined at most, so that copies and temporaries of them take some 20 MB
_FOREACH = hasattr(torch, "_foreach_copy_")  # torch >= 2.1; what `torch.optim` itself uses


def together(tensors: Sequence[Tensor], kinds: Sequence[Optional[Hashable]]) -> Iterator[List[int]]:
    """Places of tensors of one kind that an operation may take together, or of one alone; None: of no tensor at all.

    Example:
        >>> tensors = [torch.zeros(n) for n in (2, 3, 1 << 18, 4, 5)]
        >>> list(together(tensors, ["a", "b", "a", "a", None]))
        [[2], [0, 3], [1]]
    """
    waiting: Dict[Hashable, List[int]] = {}
    held: Dict[Hashable, int] = {}
    for i, (tensor, kind) in enumerate(zip(tensors, kinds)):
        count = tensor.numel()
        if kind is None:
            continue
        if count >= _ALONE:
            yield [i]
            continue
        if held.get(kind, 0) + count > _JOINED:
            yield waiting.pop(kind)
            held[kind] = 0
        waiting.setdefault(kind, []).append(i)
        held[kind] = held.get(kind, 0) + count
    yield from waiting.values()


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """Their elements end to end; one alone as it is, in its own shape."""
    return tensors[0] if len(tensors) == 1 else torch.cat([tensor.reshape(-1) for tensor in tensors])


def parts(whole: Tensor, like: Sequence[Tensor]) -> List[Tensor]:
    """`whole` taken apart again, into tensors of the shapes of `like`.

    Example:
        >>> a, b = torch.tensor([[1, 2]]), torch.tensor([3])
        >>> parts(10 * joined([a, b]), [a, b])
        [tensor([[10, 20]]), tensor([30])]
    """
    if len(like) == 1:
        return [whole]
    return [part.view(tensor.shape) for part, tensor in zip(whole.split([tensor.numel() for tensor in like]), like)]


def copies(tensors: Sequence[Tensor]) -> List[Tensor]:
    """tensor.clone() of each."""
    if not all(tensor.layout == torch.strided for tensor in tensors):  # of the others few can be copied into
        return [tensor.clone() for tensor in tensors]
    result = [torch.empty_like(tensor) for tensor in tensors]
    copy_all_(result, tensors)
    return result


def copy_all_(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """target.copy_(source) for each pair."""
    for some, others in _alike(targets, sources):
        if _FOREACH and some[0].layout == torch.strided:
            torch._foreach_copy_(some, others)
        else:
            for target, source in zip(some, others):
                target.copy_(source)


def add_all_(targets: Sequence[Tensor], sources: Sequence[Tensor], *, alpha: float = 1.0) -> None:
    """target.add_(source, alpha=alpha) for each pair."""
    for some, others in _alike(targets, sources):
        if _FOREACH:
            torch._foreach_add_(some, others, alpha=alpha)
        else:
            for target, source in zip(some, others):
                target.add_(source, alpha=alpha)


def multiply_all_(targets: Sequence[Tensor], by: Union[float, Sequence[Tensor]]) -> None:
    """target.mul_(factor) for each, by one number or each by its own tensor."""
    for some, others in _alike(targets, targets if isinstance(by, float) else by):
        if _FOREACH:
            torch._foreach_mul_(some, by if isinstance(by, float) else others)
        else:
            for target, factor in zip(some, others):
                target.mul_(by if isinstance(by, float) else factor)


def _alike(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> Iterator[Tuple[List[Tensor], List[Tensor]]]:
    """The pairs, those of one kind and device together: torch takes lists of several one by one."""
    groups: Dict[Hashable, Tuple[List[Tensor], List[Tensor]]] = {}
    for target, source in zip(targets, sources):
        some, others = groups.setdefault((target.dtype, target.device, target.layout, source.dtype, source.device), ([], []))
        some.append(target)
        others.append(source)
    yield from groups.values()


def inner_product(a: Sequence[Optional[Tensor]], b: Sequence[Optional[Tensor]]) -> Tensor:
    """<a, b> over all tensors that both have: a scalar in float32, or float64, on the device of the first.

    Example:
        >>> inner_product([torch.tensor([1.0, 2.0]), None], [torch.tensor([3.0, 4.0]), torch.ones(1)])
        tensor(11.)
    """
    pairs = [(x, y) for x, y in zip(a, b) if x is not None and y is not None]
    if not pairs:
        return torch.zeros(())
    first, second = [x for x, _ in pairs], [y for _, y in pairs]
    sums = []
    for places in together(first, [(x.dtype, y.dtype, x.device) for x, y in pairs]):
        x, y = (_wide(joined([tensors[i] for i in places])) for tensors in (first, second))
        sums.append((x * y).sum().to(first[0].device))
    return torch.stack([each.to(sums[0]) for each in sums]).sum()


def total_norm(tensors: Sequence[Optional[Tensor]]) -> float:
    """The Euclidean norm of all together."""
    return math.sqrt(float(inner_product(tensors, tensors)))


def as_numbers(values: Sequence[Any]) -> List[float]:
    """Numbers and scalar tensors as numbers, in one transfer from the device, and not one for each.

    Example:
        >>> as_numbers([1, torch.tensor(2.5), torch.tensor(True)])
        [1.0, 2.5, 1.0]
    """
    tensors = [value.detach() for value in values if isinstance(value, Tensor)]
    if not tensors:
        return [float(value) for value in values]
    kind = torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
    found = iter(torch.stack([tensor.to(tensors[0].device, kind) for tensor in tensors]).tolist())
    return [next(found) if isinstance(value, Tensor) else float(value) for value in values]


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()
