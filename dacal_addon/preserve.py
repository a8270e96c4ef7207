"""Leave the host as it was: what a meta-step must put back, and the passes that it makes in between."""

import random
from collections import OrderedDict, defaultdict
from contextlib import contextmanager
from typing import Any, Dict, Iterable, Iterator, List, NamedTuple, Sequence, Tuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from ._many import copies, copy_all_

CONTAINERS = {list, dict, set, OrderedDict, defaultdict}  # whose entries are put back, if of just that type


@contextmanager
def in_evaluation_mode(network: Any) -> Iterator[None]:
    """Inside, a module evaluates; afterwards each of its modules is in the mode that it was in.

    Args:
        network: a module, or what else has `modules()`; of another function nothing is known, and nothing is changed.

    Example:
        >>> network = nn.Dropout()
        >>> with in_evaluation_mode(network):
        ...     print(network.training)
        False
        >>> network.training
        True
    """
    with modes_kept(network):
        for module in network.modules() if hasattr(network, "modules") else ():
            module.training = False
        yield


@contextmanager
def modes_kept(network: Any) -> Iterator[None]:
    """Afterwards each of a network's modules is in the mode that it was in; `network` as for `in_evaluation_mode`."""
    modes = [(module, module.training) for module in network.modules()] if hasattr(network, "modules") else []
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


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


class StudentState:
    """A snapshot of what a forward pass may change in a student: buffers, and whatever its modules hold or note down.

    That is every attribute of every module: the identity of each, the values of tensors, and the entries of lists, dicts and
    sets. torch keeps training flags, hooks of every kind, submodules, parameters and buffers in these too, so that what a first
    pass registers is registered anew by the host's own first pass. A parameter that a pass registers takes no part in the
    meta-step, as in an optimizer that was made before it. Not the values of parameters: see `moved`.

    What a lazy module of torch (`nn.LazyConv2d`) turns into at its first call, it stays: the sizes of parameters cannot be
    taken back.
    """

    def __init__(self, student: nn.Module) -> None:
        self._modules = [_Module.of(module) for module in student.modules()]
        noted = [value for each in self._modules for value in each.attributes.values() if type(value) is Tensor]
        self._tensors = [*student.buffers(), *noted]
        self._values = copies([tensor.detach() for tensor in self._tensors])

    def restore(self) -> None:
        """Set all of it back to the snapshot."""
        # .data, whose changes do not count: a graph of the host that saved the buffer would refuse to run backward, though
        # every bit is as it was. Asked for now, because a pass may have given a tensor other memory.
        copy_all_([tensor.data for tensor in self._tensors], self._values)
        for each in self._modules:
            each.restore()


class _Module(NamedTuple):
    """One module of a `StudentState`. A student may have a thousand, and a pass is preceded by a `restore`: both are quick."""

    module: nn.Module
    kind: type
    attributes: Dict[str, Any]
    filled: List[Tuple[Any, Any]]
    """The lists, dicts and sets among the attributes, each with a copy."""
    empty: List[Any]
    """Those with nothing in them: most are, and tuples for each would keep the garbage collector busy."""

    @classmethod
    def of(cls, module: nn.Module) -> "_Module":
        attributes = dict(vars(module))
        containers = [value for value in attributes.values() if type(value) in CONTAINERS]
        filled = [(value, value.copy()) for value in containers if value]
        return cls(module, type(module), attributes, filled, [value for value in containers if not value])

    def restore(self) -> None:
        if type(self.module) is not self.kind:  # a lazy module, with its hooks gone for good
            return
        own = vars(self.module)
        for name in own.keys() - self.attributes.keys():
            del own[name]
        own.update(self.attributes)
        # In place, because handles of hooks refer to the dict.
        for value in self.empty:
            value.clear()
        for value, entries in self.filled:
            value.clear()
            (value.extend if isinstance(value, list) else value.update)(entries)


class Preserved:
    """The student's and the random states at the beginning, and those to leave behind; see `preserved`."""

    def __init__(self, student: nn.Module, *, of: Sequence[Tensor] = ()) -> None:
        self._student = student
        devices = {tensor.device for tensor in (*student.parameters(), *of) if tensor.is_cuda}
        self._devices = sorted(devices, key=str)
        self._start = self._snapshot()
        self._left = self._start

    def rewind(self) -> None:
        """Before a pass: as at the beginning, so that it draws the same dropout masks and sees the same buffers."""
        self._restore(self._start)

    def keep(self) -> None:
        """Leave behind what there is now, and not what there was at the beginning."""
        self._left = self._snapshot()

    def leave(self) -> None:
        """Set the states to what is to be left behind."""
        self._restore(self._left)

    def discard(self) -> None:
        """Take `keep` back."""
        self._left = self._start

    def _snapshot(self) -> Tuple[RandomStates, StudentState]:
        return RandomStates(self._devices), StudentState(self._student)

    @staticmethod
    def _restore(snapshot: Tuple[RandomStates, StudentState]) -> None:
        for part in snapshot:
            part.restore()


@contextmanager
def preserved(student: nn.Module, *, of: Sequence[Tensor] = ()) -> Iterator[Preserved]:
    """Inside, draw random numbers, flip training flags and run the student; afterwards all is as before, also after an error.

    The random states are the CPU's and those of the GPUs on which the student's parameters are, and the tensors `of`.

    Restored: the global random states, the student's buffers (BatchNorm's statistics), its training flags, hooks, and what else
    its modules note down. Without an error, what `keep` was called on is left behind instead.

    Example:
        >>> student = nn.Dropout()
        >>> with preserved(student) as state:
        ...     first = torch.rand(3)
        ...     state.rewind()
        ...     again = torch.rand(3)
        ...     _ = student.eval()
        >>> bool((first == again).all()), student.training
        (True, True)
    """
    state = Preserved(student, of=of)
    try:
        yield state
    except BaseException:
        state.discard()
        raise
    finally:
        state.leave()


@contextmanager
def moved(
    parameters: Sequence[Tensor], updates: Iterable[Tuple[Sequence[int], Sequence[Tensor]]], *, trainable: bool = True
) -> Iterator[None]:
    """Inside, parameters have other values; afterwards their own again, to the bit.

    The values are written into the live tensors, so that whatever refers to them sees them: hooks, tied parameters, compiled
    graphs, fused kernels. Through .data, which does not count as a change (see `StudentState`).

    Args:
        updates: places in `parameters`, and the values there. Asked for one after the other, without gradient.
        trainable: False, and inside no parameter requires grad.

    Example:
        >>> p, q = torch.zeros(2, requires_grad=True), torch.ones(1)
        >>> with moved([p, q], [([0], [torch.ones(2)])]):
        ...     print(p.tolist(), q.tolist())
        [1.0, 1.0] [1.0]
        >>> p.tolist()
        [0.0, 0.0]
    """
    own: List[Tuple[List[Tensor], List[Tensor]]] = []
    flags = [parameter.requires_grad for parameter in parameters]
    try:
        with torch.no_grad():
            for places, values in updates:
                live = [parameters[i] for i in places]
                own.append((live, copies([parameter.detach() for parameter in live])))
                copy_all_([parameter.data for parameter in live], values)
        if not trainable:
            for parameter in parameters:
                parameter.requires_grad_(False)
        _forget_casts()
        yield
    finally:
        for live, before in reversed(own):  # the last first, for parameters that share memory
            copy_all_([parameter.data for parameter in live[::-1]], before[::-1])
        for parameter, flag in zip(parameters, flags):
            parameter.requires_grad_(flag)
        _forget_casts()


def _forget_casts() -> None:
    """Autocast keeps half-precision copies of parameters until its outermost context ends; they do not follow .data."""
    forget: Any = torch.clear_autocast_cache
    forget()


@contextmanager
def replaced(student: nn.Module, values: Dict[int, Tensor]) -> Iterator[None]:
    """Inside, the modules of the student hold `values[id(parameter)]` where they held a parameter.

    For tensors that cannot be written into a parameter, such as dual ones. Tied parameters stay tied.
    """
    slots = [
        (module._parameters, name, parameter)
        for module in student.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None
    ]
    try:
        for slot, name, parameter in slots:
            slot[name] = cast(nn.Parameter, values[id(parameter)])
        yield
    finally:
        for slot, name, parameter in slots:
            slot[name] = parameter
