"""Autocast and TF32: whether a pass computes in less than float32, and passes that must not."""

from contextlib import ExitStack, contextmanager
from typing import Any, Iterator, List, Sequence, Tuple

import torch
from torch import Tensor, nn


def reduced_precision(student: nn.Module) -> bool:
    """Whether the student computes in less than float32, as far as can be seen from outside."""
    if any(p.is_floating_point() and p.dtype not in (torch.float32, torch.float64) for p in student.parameters()):
        return True
    if torch.is_autocast_enabled():
        return True
    on_the_cpu: Any = torch.is_autocast_enabled
    try:
        return bool(on_the_cpu("cpu"))
    except TypeError:  # torch < 2.4 does not ask for the device
        return bool(getattr(torch, "is_autocast_cpu_enabled", bool)())


@contextmanager
def without_autocast(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Inside, autocast is off on the devices of the parameters."""
    devices = {parameter.device.type for parameter in parameters}
    with ExitStack() as stack:
        if hasattr(torch, "autocast"):
            for device in sorted(devices & {"cpu", "cuda"}):
                stack.enter_context(torch.autocast(device, enabled=False))
        elif "cuda" in devices:  # torch < 1.10
            stack.enter_context(torch.cuda.amp.autocast(enabled=False))
        yield


@contextmanager
def without_tf32(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Inside, float32 on a GPU is float32."""
    if not any(parameter.is_cuda for parameter in parameters):
        yield
        return
    switches: List[Tuple[Any, str, Any]] = []
    cudnn: Any = torch.backends.cudnn
    matmul: Any = torch.backends.cuda.matmul
    if hasattr(cudnn, "conv"):  # torch >= 2.9; old versions answer for matmul with an AssertionError
        switches = [(part, "fp32_precision", "ieee") for part in (matmul, cudnn.conv, cudnn.rnn)]
    else:
        switches = [(part, "allow_tf32", False) for part in (matmul, cudnn)]
    before = [(part, name, getattr(part, name)) for part, name, _ in switches]
    try:
        for part, name, value in switches:
            setattr(part, name, value)
        yield
    finally:
        for part, name, value in before:
            setattr(part, name, value)
