"""Ask a network in evaluation mode, and leave it as it was."""

from contextlib import contextmanager
from typing import Iterator, Sequence

import torch
from torch import Tensor, nn

from ..learners.networks import Network
from ..preserve import preserved


@contextmanager
def evaluating(network: Network, *, of: Sequence[Tensor] = ()) -> Iterator[None]:
    """Inside, a module is in evaluation mode and nothing carries gradient; afterwards all is as before, modes and hooks too.

    Args:
        network: a module; of another callable nothing is known, and it is called as it is.
        of: images, on whose devices random states are put back as well.

    Example:
        >>> network = nn.Dropout()
        >>> with evaluating(network):
        ...     print(network.training)
        False
        >>> network.training
        True
    """
    module = network if isinstance(network, nn.Module) else nn.Module()
    with preserved(module, of=of), torch.no_grad():
        module.eval()
        yield
