"""The meta-step's inner pass as the host's own pass over the mixed images, which it would otherwise make twice."""

from typing import Any, Dict, List, Tuple

import torch
from torch import Tensor

from .._check import problem


class InnerPass:
    """What the student returned to the first pass of a meta-step, for the host.

    Example:
        >>> inner = InnerPass()
        >>> inner.heard({"decode.loss_seg": torch.tensor(2.0, requires_grad=True) * 3})
        >>> losses = inner.for_host()
        >>> losses["decode.loss_seg"].item(), losses["decode.loss_seg"].requires_grad
        (6.0, True)
    """

    def __init__(self) -> None:
        self._returned: Dict[str, Any] = {}

    def heard(self, returned: Dict[str, Any]) -> None:
        """Keep the values of the first pass, without its graph."""
        self._returned = self._returned or _mapped(returned, lambda name, value: value.detach())

    def for_host(self) -> Dict[str, Any]:
        """The same, to descend: the sum of the losses has been descended already, and going backward from it adds nothing.

        The host must do just that, as DAFormer, HRDA and MIC do: going backward from anything else, a scaled loss or
        the features, is a `RuntimeError`.
        """
        names: List[str] = []
        values: List[Tensor] = []

        def note(name: str, value: Tensor) -> Tensor:
            names.append(name)
            values.append(value)
            return value

        _mapped(self._returned, note)
        anchor = torch.zeros((), requires_grad=True)
        given = iter(_Descended.apply(anchor, tuple(names), *values))  # type: ignore[no-untyped-call]  # torch's gap
        return _mapped(self._returned, lambda name, value: next(given))


def _mapped(returned: Dict[str, Any], change: Any) -> Dict[str, Any]:
    """A dictionary in which `change(name, tensor)` stands for each floating tensor, also in lists and tuples."""

    def one(name: str, value: Any) -> Any:
        if isinstance(value, Tensor):
            return change(name, value) if value.is_floating_point() else value
        return type(value)(one(name, part) for part in value) if type(value) in (list, tuple) else value

    return {name: one(name, value) for name, value in returned.items()}


class _Descended(torch.autograd.Function):
    """Values as they are; their way back ends here, and checks that the host has taken it from the sum of the losses."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, names: Tuple[str, ...], *values: Tensor) -> Tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.names = names
        return tuple(value.clone() if "loss" in name else value.view_as(value) for name, value in zip(names, values))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        for name, grad in zip(ctx.names, grads):
            # `_parse_losses` of mmseg sums the means of all that is called a loss, and of nothing else.
            as_summed = grad is not None and bool((grad * grad.numel() - 1.0).abs().max() < 1e-5)
            if as_summed if "loss" in name else grad is None:
                continue
            raise problem(
                "uda.dacal",
                expected="the host to descend the plain sum of the losses of its pass over mixed images, nothing else",
                got=f"another gradient of {name}",
                remedy="set share_pass=False: the meta-step then makes a pass of its own",
                error=RuntimeError,
            )
        return (None,) * (2 + len(grads))
