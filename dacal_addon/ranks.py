"""Several processes: averages over the ranks of a `torch.distributed` group, and what each needs of the others."""

from typing import Any, List, Optional, Sequence

import torch
from torch import Tensor

from ._check import problem

_BUCKET = 1 << 22  # elements sent at once, so that the copy that is sent stays small
_MOST_DIMENSIONS = 8  # of a tensor that is gathered: images have 3 to 5


class Ranks:
    """The processes that share one batch; of size 1 where nothing is distributed.

    Args:
        group: a process group; None for the default one, if `torch.distributed` is initialised.
    """

    def __init__(self, group: Any = None) -> None:
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        self._group = {} if group is None else {"group": group}  # torch 1.7 does not know None
        self.size: int = torch.distributed.get_world_size(**self._group) if distributed else 1
        self.rank: int = torch.distributed.get_rank(**self._group) if distributed else 0
        if self.size < 1:
            remedy = "pass a group with this rank in it"
            raise problem("Ranks", expected="the process group to contain this rank", got="another group", remedy=remedy)

    def average(self, tensors: Sequence[Optional[Tensor]], like: Sequence[Tensor]) -> List[Optional[Tensor]]:
        """The mean of each tensor over the ranks, the same to the bit on each; in place where there is a tensor.

        None counts as zeros (of the shape of its entry in `like`), and stays None where it is None on every rank: to an
        optimizer, a parameter without gradient is not one with a gradient of zero.
        """
        if self.size == 1 or not like:
            return list(tensors)
        present = torch.tensor([0.0 if tensor is None else 1.0 for tensor in tensors], device=like[0].device)
        self._sum(present)
        anywhere = (present > 0).tolist()
        result = [
            torch.zeros_like(other) if tensor is None and there else tensor
            for tensor, other, there in zip(tensors, like, anywhere)
        ]
        for bucket in _buckets([tensor for tensor in result if tensor is not None]):
            flat = torch.cat([tensor.flatten() for tensor in bucket])
            self._sum(flat)
            flat /= self.size
            for tensor, part in zip(bucket, flat.split([tensor.numel() for tensor in bucket])):
                tensor.copy_(part.view(tensor.shape))
        return result

    def average_number(self, number: Tensor) -> Tensor:
        """The mean of a scalar over the ranks; detached."""
        if self.size == 1:
            return number.detach()
        value = number.detach().clone()
        self._sum(value)
        return value / self.size

    def anywhere(self, flag: bool, *, like: Tensor) -> bool:
        """Whether the flag is set on any rank."""
        if self.size == 1:
            return flag
        return float(self.average_number(like.new_full((), float(flag)))) > 0

    def total(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks; on the tensor's own device, also where the group can only send from a GPU."""
        if self.size == 1 or not tensor.numel():  # gloo refuses to send nothing
            return tensor.clone()
        through = torch.distributed.get_backend(**self._group) == "nccl" and tensor.device.type != "cuda"
        # Flat, and a copy: the sum is taken in place.
        value = tensor.reshape(-1).to("cuda" if through else tensor.device, copy=True)
        self._sum(value)
        return value.to(tensor.device).view(tensor.shape)

    def broadcast(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite them with those of the group's first rank."""
        if self.size == 1:
            return
        for tensor in tensors:
            # A sum with zeros, because a broadcast wants the first rank's number in the world, which old versions cannot tell.
            value = tensor.detach().clone() if self.rank == 0 else torch.zeros_like(tensor)
            self._sum(value)
            tensor.data.copy_(value)

    def first(self, tensor: Tensor) -> Tensor:
        """The first rank's tensor, on every rank; all have one shape."""
        return self.total(tensor if self.rank == 0 else torch.zeros_like(tensor))

    def gather(self, function: str, name: str, tensor: Tensor) -> Tensor:
        """The tensors of all ranks, (N, ...) each, as one batch (size * N, ...) in the order of the ranks; without gradient.

        Raises:
            ValueError: on every rank, where their shapes differ.
        """
        if self.size == 1:
            return tensor.detach()
        shapes = torch.zeros(self.size, _MOST_DIMENSIONS, dtype=torch.int64, device=tensor.device)
        shapes[self.rank, : tensor.dim()] = torch.tensor(tensor.shape)
        every = [tuple(size for size in shape if size) for shape in self.total(shapes).tolist()]
        if len(set(every)) > 1:
            other = next(rank for rank, shape in enumerate(every) if shape != every[0])
            expected = f"{name} of one shape on every rank, for images are blended across ranks"
            remedy = "give every rank as many images of one size (also in the last batch: drop_last=True)"
            got = f"{every[0]} on rank 0 and {every[other]} on rank {other}"
            raise problem(function, expected=expected, got=got, remedy=remedy)
        # Each rank adds its own to zeros: gloo cannot gather what is on a GPU, but it can sum it.
        parts = tensor.new_zeros(self.size, *tensor.shape)
        parts[self.rank] = tensor.detach()
        return self.total(parts).flatten(0, 1)

    def _sum(self, tensor: Tensor) -> None:
        torch.distributed.all_reduce(tensor, **self._group)


def _buckets(tensors: Sequence[Tensor]) -> List[List[Tensor]]:
    """In order, in runs of one kind and device and of limited size."""
    buckets: List[List[Tensor]] = []
    size = 0
    for tensor in tensors:
        fits = buckets and size + tensor.numel() <= _BUCKET
        if not fits or buckets[-1][0].dtype != tensor.dtype or buckets[-1][0].device != tensor.device:
            buckets.append([])
            size = 0
        buckets[-1].append(tensor)
        size += tensor.numel()
    return buckets
