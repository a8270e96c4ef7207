"""The directional derivative of the inner loss by central differences: two passes without a graph, from torch 1.7.1.

The passes ask no more of the student than inference does, so flash attention, custom kernels, checkpointing and compiled
modules will do.
"""

import math
from contextlib import ExitStack, contextmanager
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

import torch
from torch import Tensor

from .._check import problem
from .._many import add_all_, as_numbers, copies, inner_product, together
from ..preserve import moved
from .attention import no_inference_kernels
from .passes import scalar
from .precision import without_autocast, without_tf32
from .setting import DirectionalPass, Slope

# |eps d| / |theta|; see `relative_step`.
_RELATIVE_STEP: Dict[torch.dtype, float] = {torch.float64: 1e-7, torch.float32: 1e-4}


def central_difference(asked: DirectionalPass) -> Slope:
    """The slope from the inner losses a small step to both sides, whose mean is its `loss`."""
    parameters, direction = asked.parameters, asked.direction
    along = [parameter for parameter, tangent in zip(parameters, direction) if tangent is not None]
    squares = as_numbers([inner_product(x, x) for x in (direction, [parameter.detach() for parameter in along])])
    length, size = map(math.sqrt, squares)
    # An untrained student may have nothing but zeros in the direction's parameters.
    eps = relative_step(along) * (size or 1.0) / length if length > 0 else 1.0

    losses = []
    for sign in (1.0, -1.0):
        # A step of 1e-4 is less than what bfloat16 (4e-3) and TF32 (5e-4) resolve.
        with ExitStack() as stack:
            stack.enter_context(moved(parameters, _shifted(parameters, direction, sign * eps), trainable=False))
            stack.enter_context(without_autocast(parameters))
            stack.enter_context(without_tf32(parameters))
            stack.enter_context(no_inference_kernels())
            stack.enter_context(_shifted_weights_kept(parameters))
            asked.state.rewind()
            losses.append(scalar("inner_loss", asked.inner_loss(asked.student)))
    slope = (losses[0] - losses[1]) / (2 * eps)
    grads: Sequence[Optional[Tensor]] = [None] * len(asked.meta_parameters)
    if slope.requires_grad:
        # One backward pass for both, so that labels computed outside of the closure are passed only once.
        grads = torch.autograd.grad(slope, tuple(asked.meta_parameters), allow_unused=True)
    loss = (losses[0].detach() + losses[1].detach()) / 2
    return Slope(loss, slope.detach(), grads, loss.abs() * (torch.finfo(loss.dtype).eps / eps))


def _shifted(
    parameters: Sequence[Tensor], direction: Sequence[Optional[Tensor]], by: float
) -> Iterator[Tuple[List[int], List[Tensor]]]:
    """The places of parameters, and these shifted along the direction; a few at a time."""
    kinds = [None if tangent is None else parameter.dtype for parameter, tangent in zip(parameters, direction)]
    for places in together(parameters, kinds):
        values = copies([parameters[i].detach() for i in places])
        add_all_(values, [tangent for tangent in (direction[i] for i in places) if tangent is not None], alpha=by)
        yield places, values


@contextmanager
def _shifted_weights_kept(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Inside, what autograd saves of a parameter is a copy: the live one gets its own value back before the backward pass.

    Needed only where the student's *input* depends on the meta parameters; else nothing of the student is saved. Not to be had
    before torch 1.10.
    """
    hooks: Any = getattr(getattr(torch.autograd, "graph", None), "saved_tensors_hooks", None)
    if hooks is None:
        yield
        return
    live = {_storage(parameter) for parameter in parameters}
    with hooks(lambda saved: saved.clone() if _storage(saved) in live else saved, lambda saved: saved):
        yield


def _storage(tensor: Tensor) -> int:
    storage: Any = tensor.untyped_storage() if hasattr(tensor, "untyped_storage") else tensor.storage()
    return int(storage.data_ptr())


def refuse_half_precision(parameters: Sequence[Tensor], *, engine: str) -> None:
    """Raise for trained parameters that a small step does not change. "auto" may come to differences at any student's first
    pass, and should not fail only then."""
    half = sorted({str(parameter.dtype) for parameter in parameters if parameter.dtype not in _RELATIVE_STEP})
    if half:
        reason = "engine 'auto' may have to go on with 'finite_difference'" if engine == "auto" else f"engine {engine!r}"
        raise problem(
            "hypergradient",
            expected=f"parameters in float32 or float64 ({reason})",
            got=half[0],
            remedy="keep float32 parameters and use autocast, or choose engine='forward' (torch >= 2.0)",
        )


def relative_step(parameters: Sequence[Tensor]) -> float:
    """|eps d| / |theta|: as small as rounding allows, because the error of a smooth network grows with its square, and that of
    a network of ReLUs, whose kinks it crosses, with the step itself.

    Measured in float32 by setting `_RELATIVE_STEP` and running benchmarks/hypergradient.py: with 4.3 M parameters an error of
    1e-5 (GELU) and 1e-3 (ReLU) at 1e-4, of 4e-3 and 2e-2 at 3e-3. In the tests' `test_float32_agrees_with_float64`, with 600
    parameters, over which rounding averages less, 1e-2 at 1e-4 and 3e-4 at 3e-3.
    """
    kinds = {parameter.dtype for parameter in parameters}
    count = sum(parameter.numel() for parameter in parameters)
    averaging = min(30.0, max(1.0, (1e6 / max(count, 1)) ** 0.5)) if torch.float32 in kinds else 1.0
    return averaging * max((_RELATIVE_STEP[kind] for kind in kinds), default=1.0)
