"""The directional derivative of the inner loss by one forward-mode pass (torch >= 2.0); exact.

`torch.autograd.forward_ad`'s dual tensors and not `torch.func.jvp`, which draws other dropout masks for channels_last inputs
(hypergradient 40 % off, measured).
"""

import re
import warnings
from contextlib import ExitStack
from functools import lru_cache
from typing import Any, Optional, Sequence

import torch
from torch import Tensor

from ..preserve import replaced
from .attention import no_inference_kernels, plain_attention
from .batch_norm import FusedBatchNorm
from .passes import OUT_OF_MEMORY, scalar
from .precision import without_autocast
from .setting import DirectionalPass, Slope, no_forward_derivative


def forward_derivative(asked: DirectionalPass) -> Slope:
    """The slope as the tangent of the inner loss.

    No parameter requires grad inside, so the student records no graph; only what depends on the meta parameters does.

    Raises:
        NoForwardDerivative: the student cannot be differentiated forward.
    """
    if asked.rerun_by:
        # Refused by torch where an input has a tangent; else, as in a first block whose input is an image, the tangents of the
        # parameters inside are lost without a word.
        raise no_forward_derivative(f"autograd.Function {asked.rerun_by}, which runs a part once more to go backward")
    student = asked.student
    forward_ad = _forward_ad()
    asked.state.rewind()  # before the parameters are replaced, which it would take back
    with ExitStack() as stack:
        stack.enter_context(forward_ad.dual_level())
        values = {id(parameter): parameter.detach() for parameter in student.parameters()}
        for parameter, tangent in zip(asked.parameters, asked.direction):
            if tangent is not None:
                values[id(parameter)] = forward_ad.make_dual(parameter.detach(), tangent)
        stack.enter_context(replaced(student, values))
        stack.enter_context(plain_attention())
        # Under autocast torch makes float32 tangents of bfloat16 tensors (BatchNorm in eval mode), and then refuses them.
        stack.enter_context(without_autocast(asked.parameters))
        stack.enter_context(no_inference_kernels())
        stack.enter_context(FusedBatchNorm(forward_ad))
        try:
            loss = scalar("inner_loss", asked.inner_loss(student))
        except RuntimeError as error:
            operation = _operation_without_derivative(error)
            if operation is None:
                raise
            raise no_forward_derivative(operation) from error
        primal, slope = forward_ad.unpack_dual(loss)
        if slope is None:
            raise no_forward_derivative("a student that loses the tangents of its parameters")
    grads: Sequence[Optional[Tensor]] = [None] * len(asked.meta_parameters)
    if slope.requires_grad:
        # Outside of the dual level: inside, torch takes its derivative formulas apart, which doubles the time (measured).
        try:
            inputs = tuple(asked.meta_parameters)
            grads = torch.autograd.grad(slope, inputs, allow_unused=True, retain_graph=asked.may_repeat)
        except RuntimeError as error:
            if isinstance(error, OUT_OF_MEMORY):
                raise
            # torch's own forward formulas change tensors in place that a meta parameter in the logits needs (log_softmax).
            raise no_forward_derivative(f"the backward pass of a tangent: {str(error).splitlines()[0]}") from error
    return Slope(primal.detach(), slope.detach(), grads)


@lru_cache(maxsize=None)
def _forward_ad() -> Any:
    """torch.autograd.forward_ad, once it has compiled its derivative formulas, which warns of torch's own use of torch.jit."""
    import torch.autograd.forward_ad as forward_ad  # torch >= 2.0; the doctests import this file in older ones too

    with warnings.catch_warnings(), forward_ad.dual_level():
        warnings.simplefilter("ignore")
        forward_ad.make_dual(torch.zeros(()), torch.zeros(()))
    return forward_ad


def _operation_without_derivative(error: RuntimeError) -> Optional[str]:
    """The name of the operation that has no forward derivative; None if the error is about something else."""
    message = str(error)
    found = re.search(r"forward AD with (\S+)", message)
    if found:
        return found.group(1)
    if re.search(r"forward AD|forward mode|tangent|\bdual\b|\bjvp\b", message) is None:
        return None
    traceback, name = error.__traceback__, message.splitlines()[0]
    while traceback is not None:
        frame = traceback.tb_frame
        if frame.f_code.co_name == "apply" and isinstance(frame.f_locals.get("cls"), type):
            name = f"autograd.Function {frame.f_locals['cls'].__name__}"
        traceback = traceback.tb_next
    return name
