"""One shape for every error message of the package, and the checks that several files share."""

from numbers import Integral
from typing import List, Mapping, Optional, Sequence, Type, Union

import torch
from torch import Tensor, nn


def problem(function: str, *, expected: str, got: object, remedy: str, error: Type[Exception] = ValueError) -> Exception:
    """The exception to raise: `function: expected <rule with shape>, got <actual>; <remedy>`.

    >>> problem("mix", expected="a bool mask", got="float32 (1, 1, 2, 2)", remedy="compare it: mask > 0.5")
    ValueError('mix: expected a bool mask, got float32 (1, 1, 2, 2); compare it: mask > 0.5')
    """
    return error(f"{function}: expected {expected}, got {got}; {remedy}")


def describe(value: object) -> str:
    """What a value is, in the words of an error message.

    >>> describe(torch.zeros(2, 19, 4, 4)), describe([1])
    ('float32 (2, 19, 4, 4)', 'list')
    """
    if isinstance(value, Tensor):
        return f"{str(value.dtype).replace('torch.', '')} {tuple(value.shape)}"
    return type(value).__name__


def check_tensor(function: str, name: str, value: object, *, expected: str, remedy: str) -> Tensor:
    """`TypeError` unless `value` is a tensor."""
    if not isinstance(value, Tensor):
        raise problem(function, expected=f"{name}: {expected}", got=describe(value), remedy=remedy, error=TypeError)
    return value


def check_logits(function: str, name: str, value: object, *, num_classes: Optional[int] = None) -> None:
    """`value` must be a floating tensor N x C x *S, S any number of spatial dimensions, with C = `num_classes` where given."""
    channels = "C >= 2" if num_classes is None else f"C = {num_classes}"
    expected = f"a floating tensor (N, C, *spatial) with {channels}"
    remedy = f"pass the logits out of the network's output{_entries(value)}"
    x = check_tensor(function, name, value, expected=expected, remedy=remedy)
    if x.dim() >= 3 and x.is_floating_point() and x.shape[1] >= 2 and num_classes in (None, x.shape[1]):
        return
    remedy = "pass the network's output before softmax, one channel per class"
    if x.dim() >= 3 and x.is_floating_point() and x.shape[1] == 1:
        remedy = "of one sigmoid channel make two: two_channels(x), that is torch.cat([zeros_like(x), x], 1) of logits"
    elif num_classes is not None and x.dim() >= 3 and x.shape[-1] == num_classes:
        order = (0, x.dim() - 1, *range(1, x.dim() - 1))
        remedy = f"the classes are last: x.permute{order}"
    elif num_classes is not None and x.dim() >= 3 and x.is_floating_point():
        remedy = f"say num_classes={x.shape[1]}, or pass logits of {num_classes} classes"
    raise problem(function, expected=f"{name}: {expected}", got=describe(x), remedy=remedy)


def _entries(value: object) -> str:
    """Where logits may be in what is no tensor, for a remedy.

    >>> _entries({"out": 1, "aux": 2}), _entries((1, 2)), _entries(None)
    (", for example x['out']", ', for example x[0]', '')
    """
    if isinstance(value, Mapping) and value:
        return f", for example x[{next(iter(value))!r}]"
    return ", for example x[0]" if isinstance(value, (tuple, list)) and value else ""


def check_label(function: str, name: str, value: object, *, shape: Optional[Sequence[int]] = None) -> Tensor:
    """`value` must be an int64 tensor N x *S, of the given shape where there is one."""
    expected = f"an int64 tensor {tuple(shape) if shape is not None else '(N, *spatial)'} of class indices"
    label = check_tensor(function, name, value, expected=expected, remedy="pass class indices as a tensor")
    if label.dtype != torch.int64:
        raise problem(function, expected=f"{name}: {expected}", got=describe(label), remedy="convert it with .long()")
    if label.dim() < 2 or (shape is not None and tuple(label.shape) != tuple(shape)):
        remedy = "drop a channel dimension with .squeeze(1), or resize the label with nearest-neighbour sampling"
        raise problem(function, expected=f"{name}: {expected}", got=describe(label), remedy=remedy)
    return label


def check_classes(function: str, name: str, label: Tensor, num_classes: int, ignore_index: Union[int, Sequence[int]]) -> None:
    """Every value of `label` must be a class or of `ignore_index`: a stray label must not pass for a class."""
    stray = (label < 0) | (label >= num_classes)
    for ignored in ignore_index if isinstance(ignore_index, (tuple, list)) else (ignore_index,):
        stray &= label != ignored
    if stray.any():
        expected = f"{name}: classes 0..{num_classes - 1} or ignore_index={ignore_index}"
        remedy = "map the labels to training ids, or set ignore_index"
        raise problem(function, expected=expected, got=f"the value {int(label[stray][0])}", remedy=remedy)


def check_owner(function: str, name: str, optimizer: torch.optim.Optimizer, net: nn.Module, *, of: str) -> List[nn.Parameter]:
    """`optimizer` must own the trainable parameters of the temperature net `of`, and none of another module; returns these."""
    parameters = [parameter for parameter in net.parameters() if parameter.requires_grad]
    owned = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if not {id(p) for p in parameters} <= owned <= {id(p) for p in net.parameters()}:
        raise problem(
            function,
            expected=f"{name} to own the trainable parameters of {of} and no others",
            got=f"{len(owned)} parameters that are not these {len(parameters)}",
            remedy="torch.optim.Adam(temperature_net.parameters(), lr=...)",
        )
    return parameters


def check_image(function: str, name: str, value: object) -> Tensor:
    """`value` must be a floating tensor N x K x *S, S any number of spatial dimensions."""
    expected = f"{name}: a floating tensor (N, K, *spatial)"
    x = check_tensor(function, name, value, expected=expected, remedy="pass a batch of images")
    if x.dim() < 3 or not x.is_floating_point():
        raise problem(function, expected=expected, got=describe(x), remedy="pass a normalised batch of images")
    return x


def check_choice(function: str, name: str, value: object, choices: Sequence[str]) -> None:
    """`value` must be one of `choices`."""
    if value not in choices:
        expected = f"{name} to be one of {', '.join(map(repr, choices))}"
        raise problem(function, expected=expected, got=repr(value), remedy=f"choose one, for example {choices[0]!r}")


def check_config(function: str, config: object, keys: Sequence[str], *, example: str) -> None:
    """`config` must be a dict with no other keys than these; `example` is one that may be."""
    if not isinstance(config, Mapping):
        raise problem(function, expected="a dict", got=describe(config), remedy=f"write {example}", error=TypeError)
    for key in config:
        if key not in keys:
            raise problem(function, expected=f"keys among {', '.join(keys)}", got=repr(key), remedy="mend or remove it")


def check_number(
    function: str, name: str, value: Union[int, float], *, low: float, high: float = float("inf"), rule: str
) -> None:
    """`value` must lie in [low, high]; `rule` says so in words."""
    if not low <= value <= high:  # also refuses NaN
        raise problem(function, expected=f"{name} {rule}", got=repr(value), remedy="choose a value in that range")


def as_whole(function: str, name: str, value: object, *, low: int, high: Optional[int] = None) -> int:
    """`value`, a whole number in [low, high] of Python's or numpy's, as an `int`."""
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    number = int(value) if whole else 0  # type: ignore[call-overload]  # mypy does not narrow by a variable
    if not whole or not low <= number <= (number if high is None else high):
        limits = f">= {low}" if high is None else f"in {low}..{high}"
        remedy = "choose a whole number in that range"
        raise problem(function, expected=f"a whole number {name} {limits}", got=repr(value), remedy=remedy)
    return number
