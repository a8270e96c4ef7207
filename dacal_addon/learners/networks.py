"""What networks return: logits at the resolution of the labels, wherever they are in the output."""

from typing import Any, Callable, Dict, NamedTuple, Optional, Protocol, Sequence, Union

import torch
from torch import Tensor, nn

from .._check import check_tensor, describe, problem
from .._resize import resized_scores
from ..preserve import preserved


class Network(Protocol):
    """A student or a teacher: called as a module is, with a batch of images (N, K, *S)."""

    def __call__(self, image: Tensor, /) -> Any: ...


class Outputs(NamedTuple):
    """Where logits and features are in what a network returns."""

    logits_of: Optional[Callable[[Any], Tensor]] = None
    """None: the output is the logits. `two_channels` declares one sigmoid channel."""
    features_of: Optional[Callable[[Any], Tensor]] = None
    """None: the temperature net gets no features."""

    def logits(self, function: str, output: Any, size: Sequence[int]) -> Tensor:
        """The logits (N, C, *S) in the output, interpolated to `size` where they are smaller.

        Raises:
            TypeError, ValueError: what is there are no logits; the message says what was returned and how to reach them.
        """
        found = output if self.logits_of is None else self.logits_of(output)
        if not isinstance(found, Tensor):
            raise problem(
                function,
                expected="a network that returns logits (N, C, *spatial)",
                got=described(found),
                remedy=_way_to_logits(found),
                error=TypeError,
            )
        if found.dim() >= 3 and found.shape[1] == 1:
            remedy = "of one sigmoid channel say so: logits_of=two_channels"
            expected = "a network that returns logits (N, C, *spatial), C >= 2"
            raise problem(function, expected=expected, got=describe(found), remedy=remedy)
        return at_size(function, "logits", found, size)

    def features(self, function: str, output: Any) -> Optional[Tensor]:
        """The features (N, F, *s) in the output; None without `features_of`."""
        if self.features_of is None:
            return None
        expected = "features_of to give features (N, F, *spatial)"
        return check_tensor(function, "features", self.features_of(output), expected=expected, remedy="mend features_of")


def at_size(function: str, name: str, logits: Tensor, size: Sequence[int]) -> Tensor:
    """Logits (N, C, *s), interpolated to the spatial `size`, as segmentation networks are trained and scored.

    Example:
        >>> at_size("f", "logits", torch.tensor([0.0, 4.0]).view(1, 1, 1, 2), (1, 4)).flatten().tolist()
        [0.0, 1.0, 3.0, 4.0]
    """
    if logits.dim() != len(size) + 2 or not logits.is_floating_point():
        expected = f"{name}: a floating tensor (N, C, {', '.join(map(str, size))}), or of a lower resolution"
        raise problem(function, expected=expected, got=describe(logits), remedy="say with logits_of where the logits are")
    return resized_scores(function, logits, size)


def ask(network: Network, image: Tensor) -> Any:
    """What a network says of further images, without gradient; a module is left as it was, and so are random states."""
    module = network if isinstance(network, nn.Module) else nn.Module()
    with preserved(module, of=[image]), torch.no_grad():
        return network(image)


def entries(output: Any) -> Dict[Union[int, str], Any]:
    """What is in an output, one level deep: of a dictionary by key, of a list or tuple by index, of an object by attribute.

    >>> entries({"out": 1}), entries((1, 2)), entries(torch.zeros(2))
    ({'out': 1}, {0: 1, 1: 2}, {})
    """
    if isinstance(output, Tensor):
        return {}
    if hasattr(output, "items"):
        return dict(output.items())
    return dict(enumerate(output)) if isinstance(output, (list, tuple)) else dict(getattr(output, "__dict__", {}))


def described(output: Any) -> str:
    """What was returned, in the words of an error message.

    >>> described({"out": torch.zeros(1, 4, 2, 2), "aux": None})
    "dict of 'out': float32 (1, 4, 2, 2), 'aux': NoneType"
    """
    parts = ", ".join(f"{name!r}: {describe(value)}" for name, value in entries(output).items())
    return f"{describe(output)} of {parts}" if parts else describe(output)


def _way_to_logits(output: Any) -> str:
    """How `logits_of` would reach what could be logits.

    >>> _way_to_logits({"features": torch.zeros(1, 8, 2, 2), "out": torch.zeros(1, 4, 2, 2)})
    "say which are the logits: logits_of=lambda out: out['features'], or out['out']"
    """
    names = [name for name, value in entries(output).items() if isinstance(value, Tensor) and value.dim() >= 3]
    if not names:
        return "say with logits_of where the logits are"
    by_name = hasattr(output, "items") or isinstance(output, (list, tuple))
    ways = ", or ".join(f"out[{name!r}]" if by_name else f"out.{name}" for name in names)
    return f"say which are the logits: logits_of=lambda out: {ways}"
