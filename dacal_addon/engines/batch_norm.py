"""BatchNorm in forward mode, in two fused kernels.

torch's own forward derivative takes about a dozen passes over memory: a quarter of the benchmark's forward-mode pass. But the
Jacobian of x -> (x - mean(x)) / std(x) is symmetric, so that the fused kernel of the *backward* pass gives the tangent as well;
and what the tangents of weight and bias add is a BatchNorm with given statistics.
"""

from typing import Any, Dict, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    from torch.overrides import TorchFunctionMode
except ImportError:  # torch < 2.0: engine "forward" is refused before it comes here, and the doctests want to import this file
    TorchFunctionMode = object  # type: ignore[assignment, misc]


class FusedBatchNorm(TorchFunctionMode):
    """Inside, `F.batch_norm` (which nn.BatchNorm calls) of dual tensors has the same value and tangent, sooner."""

    def __init__(self, forward_ad: Any) -> None:
        super().__init__()
        self._forward_ad = forward_ad

    def __torch_function__(
        self, func: Any, types: Any, args: Tuple[Any, ...] = (), kwargs: Optional[Dict[str, Any]] = None
    ) -> Any:
        kwargs = kwargs or {}
        fused = self._batch_norm(*args, **kwargs) if func is F.batch_norm else None
        return func(*args, **kwargs) if fused is None else fused

    def _batch_norm(
        self,
        input: Tensor,
        running_mean: Optional[Tensor],
        running_var: Optional[Tensor],
        weight: Optional[Tensor] = None,
        bias: Optional[Tensor] = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Optional[Tensor]:
        x, x_tangent = self._forward_ad.unpack_dual(input)
        same_kind = all(part is None or part.dtype == x.dtype for part in (weight, bias, running_mean))
        if x_tangent is None or not same_kind or x.device.type not in ("cpu", "cuda"):
            return None
        if input.requires_grad and training:
            # Only where the student's input depends on the meta parameters. Neither the fused tangent nor torch's (94 % off,
            # measured) passes on how the batch's statistics depend on it.
            return _by_parts(input, weight, bias, eps)
        tangents = [None if part is None else self._forward_ad.unpack_dual(part).tangent for part in (weight, bias)]
        weight, bias = (None if part is None else self._forward_ad.unpack_dual(part).primal for part in (weight, bias))
        y, tangent = batch_norm(
            x, x_tangent, weight, tangents[0], bias, tangents[1], running_mean, running_var, training, momentum, eps
        )
        dual: Tensor = self._forward_ad.make_dual(y, tangent)
        return dual


def _by_parts(x: Tensor, weight: Optional[Tensor], bias: Optional[Tensor], eps: float) -> Tensor:
    """BatchNorm of a batch in plain operations; running statistics, which the pass throws away, are left alone."""
    over = [0, *range(2, x.dim())]
    shape = [1, -1] + [1] * (x.dim() - 2)
    centred = x - x.mean(over, keepdim=True)
    y = centred / (centred.pow(2).mean(over, keepdim=True) + eps).sqrt()
    y = y if weight is None else y * weight.view(shape)
    return y if bias is None else y + bias.view(shape)


def batch_norm(
    x: Tensor,
    x_tangent: Tensor,
    weight: Optional[Tensor],
    weight_tangent: Optional[Tensor],
    bias: Optional[Tensor],
    bias_tangent: Optional[Tensor],
    running_mean: Optional[Tensor],
    running_var: Optional[Tensor],
    training: bool,
    momentum: float,
    eps: float,
) -> Tuple[Tensor, Tensor]:
    """`F.batch_norm` and its tangent; the running statistics are updated as by one call.

    Example:
        >>> x, one = torch.tensor([[1.0], [3.0]]), torch.ones(1)
        >>> y, tangent = batch_norm(x, torch.tensor([[1.0], [0.0]]), one, one, None, one, None, None, True, 0.1, 0.0)
        >>> y.flatten().tolist(), tangent.flatten().tolist()  # the first term is 0: two points are always at -1 and 1
        ([-1.0, 1.0], [0.0, 2.0])
    """
    y, mean, inverse_std = torch.native_batch_norm(x, weight, bias, running_mean, running_var, training, momentum, eps)
    if running_mean is not None and running_var is not None and not training:
        mean, inverse_std = running_mean, (running_var + eps).rsqrt()
    arguments = (x_tangent, x, weight, running_mean, running_var, mean, inverse_std, training, eps, [True, False, False])
    tangent: Tensor = torch.ops.aten.native_batch_norm_backward(*arguments)[0]
    if weight_tangent is not None or bias_tangent is not None:
        gain = torch.zeros_like(mean) if weight_tangent is None else weight_tangent
        shift = torch.zeros_like(mean) if bias_tangent is None else bias_tangent
        tangent = tangent + torch.native_batch_norm(x, gain, shift, mean, inverse_std.pow(-2), False, 0.0, 0.0)[0]
    return y, tangent
