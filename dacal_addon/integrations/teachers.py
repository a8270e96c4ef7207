"""The teacher of a host: the network inside of it, and the logits in what that returns."""

import logging
from typing import Any, Optional, Tuple, Union

from torch import Tensor

from .._check import describe, problem
from ..learners.networks import at_size, described, entries

Entry = Union[int, str]


def teacher_of(host: Any) -> Any:
    """The host's teacher, or what is around it.

    Raises:
        TypeError: it has none.
    """
    if not hasattr(host, "get_ema_model"):
        expected = "a host with a method get_ema_model that returns its teacher"
        got, remedy = f"{type(host).__name__} without", "name another class in uda.dacal.base"
        raise problem("uda.dacal", expected=expected, got=got, remedy=remedy, error=TypeError)
    return host.get_ema_model()


def network_of(teacher: Any) -> Any:
    """The network whose `encode_decode` makes the teacher's logits: `teacher`, or what it wraps (`get_ema_model`).

    Raises:
        TypeError: there is none.
    """
    network = teacher
    # SiamSeg's teacher, as MIC's own one, is a module around the network, with the network's weights and thresholds.
    while not hasattr(network, "encode_decode") and hasattr(network, "get_ema_model"):
        network = network.get_ema_model()
    if not hasattr(network, "encode_decode"):
        raise problem(
            "uda.dacal",
            expected="a teacher (get_ema_model()) with a method encode_decode that returns its logits",
            got=f"{type(network).__name__} without",
            remedy="give get_ema_model the network itself, or set labels='hard', every=0",
            error=TypeError,
        )
    return network


def setting_of(host: Any, name: str) -> Any:
    """A setting of the pseudo-labels, of the host or of the teacher that draws them for it.

    Raises:
        TypeError: neither has it.
    """
    for owner in (host, teacher_of(host)):
        if hasattr(owner, name):
            return getattr(owner, name)
    expected = f"a host or a teacher with the attribute {name}"
    remedy = "set it in the host's __init__, as DAFormer's DACS does"
    raise problem("uda.dacal", expected=expected, got=f"{type(host).__name__} without", remedy=remedy, error=TypeError)


class TeacherLogits:
    """Takes the logits out of what a teacher returns: these alone, or one entry of a tuple, list or dictionary.

    Args:
        num_classes: the channels of logits.
        entry: which one, an index or a key. None: the only one that has that many channels.
        logger: is told which one was taken.

    Example:
        >>> import torch
        >>> logits = TeacherLogits(4)
        >>> found = logits((torch.zeros(1, 4, 2, 2), torch.zeros(1, 64, 2, 2)), (8, 8))
        >>> found.shape, logits.entry
        (torch.Size([1, 4, 8, 8]), 0)
    """

    def __init__(self, num_classes: int, entry: Optional[Entry] = None, *, logger: Optional[logging.Logger] = None) -> None:
        self.num_classes = num_classes
        self.entry = entry
        self._logger = logger if logger is not None else logging.getLogger(__name__)

    def __call__(self, answer: Any, size: Tuple[int, int]) -> Tensor:
        """The logits, detached, interpolated to `size` where they are smaller.

        Raises:
            TypeError: there are none, or several candidates.
        """
        found = answer if isinstance(answer, Tensor) else self._taken(answer)
        if not self._is_logits(found):
            raise self._problem(answer, found)
        return at_size("uda.dacal", "the teacher's logits", found.detach(), size)

    def _taken(self, answer: Any) -> Any:
        inside = entries(answer)
        if self.entry is None:
            candidates = [name for name, value in inside.items() if self._is_logits(value)]
            if len(candidates) != 1:
                raise self._problem(answer, answer)
            (self.entry,) = candidates
            self._logger.info("dacal: the teacher's logits are entry %r of the %s", self.entry, described(answer))
        if self.entry not in inside:
            raise self._problem(answer, answer)
        return inside[self.entry]

    def _is_logits(self, value: Any) -> bool:
        return (
            isinstance(value, Tensor) and value.dim() == 4 and value.is_floating_point() and value.shape[1] == self.num_classes
        )

    def _problem(self, answer: Any, found: Any) -> Exception:
        inside = entries(answer)
        like = [name for name, value in inside.items() if self._is_logits(value)]
        remedy = "mend the teacher's encode_decode, or set labels='hard', every=0"
        if like:
            remedy = f"say which entry is meant, for example uda.dacal.logits_of={like[0]!r}"
        got = described(answer)
        if found is not answer:
            got = f"{describe(found)} as entry {self.entry!r} of the {got}"
        elif inside and self.entry is not None:
            got = f"no entry {self.entry!r} in the {got}"
        expected = f"the teacher's encode_decode to return logits (N, {self.num_classes}, h, w), alone or as one entry"
        return problem("uda.dacal", expected=expected, got=got, remedy=remedy, error=TypeError)
