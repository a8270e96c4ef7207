"""Leave the host as it was: the random states, buffers and training flags that a meta-step must put back."""

import random
from contextlib import contextmanager
from typing import Dict, Iterator, List

import numpy as np
import torch
from torch import Tensor, nn


class RandomStates:
    """A snapshot of every global random state that a student's forward pass can draw from.

    torch on the CPU and on the given CUDA devices, numpy's legacy state (HRDA draws its crops from it) and python's.
    """

    def __init__(self, devices: List[torch.device]) -> None:
        self._cpu: Tensor = torch.get_rng_state()
        self._cuda: Dict[torch.device, Tensor] = {device: torch.cuda.get_rng_state(device) for device in devices}
        self._numpy = np.random.get_state()  # noqa: NPY002  # the legacy state is what is to be preserved
        self._python = random.getstate()

    def restore(self) -> None:
        """Set all of them back to the snapshot."""
        torch.set_rng_state(self._cpu)
        for device, state in self._cuda.items():
            torch.cuda.set_rng_state(state, device)
        np.random.set_state(self._numpy)  # noqa: NPY002  # likewise
        random.setstate(self._python)


@contextmanager
def preserved(student: nn.Module) -> Iterator[RandomStates]:
    """Inside, draw random numbers, flip training flags and run the student; afterwards all is as before, also after an error.

    Restored: the global random states, the student's training flags and its buffers (BatchNorm's statistics).

    Yields the random states at the start, so that several passes can `restore()` them and draw the same dropout masks.

    Example:
        >>> student = nn.Dropout()
        >>> with preserved(student) as states:
        ...     first = torch.rand(3)
        ...     states.restore()
        ...     again = torch.rand(3)
        ...     _ = student.eval()
        >>> bool((first == again).all()), student.training
        (True, True)
    """
    devices = {parameter.device for parameter in student.parameters() if parameter.is_cuda}
    states = RandomStates(sorted(devices, key=str))
    flags = [(module, module.training) for module in student.modules()]
    buffers = [
        (module, name, buffer, buffer.detach().clone())
        for module in student.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    try:
        yield states
    finally:
        states.restore()
        for module, training in flags:
            module.training = training
        for module, name, buffer, value in buffers:
            if getattr(module, name) is not buffer:  # torch 1.7's BatchNorm counts its batches by a new tensor each time
                setattr(module, name, buffer)
            # Through .data, which does not count as a change: a graph of the host that saved the buffer would refuse to run
            # backward, though every bit is as it was.
            buffer.data.copy_(value)
