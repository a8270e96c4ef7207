"""Counting batches, adding counts, keeping and moving them: what `CalibrationStats` is before the metrics."""

import functools
import hashlib
from typing import Any, Callable, Dict, List, Optional, Tuple, TypeVar, Union, cast

import torch
from torch import Tensor

from .._check import problem
from ..ignoring import IgnoreIndex
from ..ranks import Ranks
from . import totals as _totals
from .arrays import Array, Predictions
from .backends import backend_for, check_backend, functions_of
from .batches import as_batch, at_label_size
from .faults import fault
from .grid import cell_count
from .images import Images, pack, unpack
from .pixels import count_
from .saved import loaded_images, loaded_totals
from .settings import check_settings
from .totals import Totals

_Method = TypeVar("_Method", bound=Callable[..., Any])
_Self = TypeVar("_Self", bound="Counting")


def _counting(method: _Method) -> _Method:
    """Without graphs, and with tensors that can be written to later: evaluation loops run in `torch.inference_mode`."""

    @functools.wraps(method)
    def inner(*arguments: Any, **options: Any) -> Any:
        with torch.no_grad():
            if not hasattr(torch, "inference_mode"):
                return method(*arguments, **options)
            with torch.inference_mode(False):
                return method(*arguments, **options)

    return cast(_Method, inner)


class Counting:
    """The counts of all batches so far, and of every image where `per_image` says so; see `CalibrationStats`."""

    def __init__(
        self,
        num_classes: int,
        *,
        input: str,
        ignore_index: Optional[IgnoreIndex] = None,
        n_bins: int = 15,
        fine_bins: int = 4096,
        classwise: bool = False,
        per_image: bool = False,
        device: Union[str, torch.device, None] = None,
        backend: Optional[str] = None,
        one_channel: bool = False,
        channels_last: bool = False,
        reduce_zero_label: bool = False,
    ) -> None:
        name = "CalibrationStats"
        self._settings = check_settings(
            name,
            num_classes=num_classes,
            input=input,
            ignore_index=ignore_index,
            n_bins=n_bins,
            fine_bins=fine_bins,
            classwise=classwise,
            one_channel=one_channel,
            channels_last=channels_last,
            reduce_zero_label=reduce_zero_label,
        )
        self.per_image = bool(per_image)
        self.device = torch.device("cpu" if device is None else device)
        check_backend(name, backend)
        self.backend = backend
        self._judged_by: Optional[str] = None
        self._synced = False
        self._totals = self._zeros(self.device)
        self._images: List[Images] = []

    # What it is

    @property
    def num_classes(self) -> int:
        """C."""
        return self._settings.num_classes

    @property
    def input(self) -> str:
        """What `update` gets."""
        return self._settings.input

    @property
    def ignore_index(self) -> Tuple[int, ...]:
        """The labels that do not count, as the arrays have them; none where every label is a class."""
        return self._settings.ignore_index

    @property
    def ignored_classes(self) -> Tuple[int, ...]:
        """The classes among them, which no mean over the classes contains."""
        return self._settings.ignored_classes

    @property
    def judged_by(self) -> Optional[str]:
        """What judged the last batch: "numba", "triton", "torch" or "compile"; None if there was none."""
        return self._judged_by

    @property
    def pixels(self) -> int:
        """Valid pixels so far."""
        return int(self._totals.pixels.sum())

    @property
    def ignored_pixels(self) -> int:
        """Pixels so far whose label does not count; of those of the region, where `update` was given one."""
        return int(self._totals.ignored)

    @property
    def images(self) -> int:
        """Images so far, with or without valid pixels."""
        return int(self._totals.images)

    def __repr__(self) -> str:
        listed = ", ".join(f"{key}={value!r}" for key, value in self._description().items())
        return f"CalibrationStats({listed}): {self.images} images, {self.pixels} pixels"

    # Counting

    @_counting
    def update(
        self,
        x: Predictions,
        target: Array,
        region: Optional[Array] = None,
        *,
        interpolate: bool = False,
        normalize: bool = False,
    ) -> None:
        """Count a batch; torch or numpy, on any device, contiguous or not. Nothing is kept of it but counts.

        Args:
            x: (N, C, *S) floating, what `input` says, S any number >= 1 of spatial dimensions; (N, 1, *S) with `one_channel`,
                (N, *S, C) with `channels_last`; for "top1" a pair of (N, *S), floating in 0..1 and integer. Logits of classes
                that are masked out may be -infinity.
            target: (N, *S) integers: classes, or labels of `ignore_index`.
            region: (N, *S) bool, the pixels to count, for example `boundary_mask(target, 3)`; all if None.
            interpolate: logits or probabilities of another resolution are brought to the label's, linearly in one to three
                dimensions, as `F.interpolate` does with align_corners=False; in float32, unless they are float64.
            normalize: divide probabilities by their sum, which rounding to 8 bits of mantissa (bfloat16) moves by 1e-2.

        Raises:
            ValueError: another shape; NaN or infinity, probabilities that do not sum to 1, stray labels, at a pixel that
                counts. Nothing of the batch has been counted then.
            TypeError: another kind of array.
            RuntimeError: the counts were already summed over the processes by `sync`.
        """
        if self._synced:
            remedy = "call reset() first; the other processes would not learn of this batch"
            raise problem(
                "update", expected="counts of this process alone", got="counts after sync()", remedy=remedy, error=RuntimeError
            )
        batch = as_batch("update", x, target, region, self._settings, interpolate=interpolate, normalize=normalize)
        judged_by = backend_for(batch, self.backend)
        counts = self._zeros(batch.label.device if judged_by != "triton" else torch.device("cpu"))
        images: List[Images] = []
        # Scores are interpolated an image at a time, so that one of them is in memory.
        for part in [batch.image(i) for i in range(len(batch.label))] if interpolate else [batch]:
            part = at_label_size("update", part) if interpolate else part
            found = count_(counts, part, self._settings, each=self.per_image, **functions_of(judged_by))
            if found is None:
                raise fault(part, self._settings, function="update")
            images += [Images(*(field.to(self.device) for field in one)) for one in found]
        _totals.add_(self._totals, counts)
        self._images += images
        self._judged_by = judged_by

    @_counting
    def merge(self, other: "Counting") -> None:
        """Add what another one has counted, with the same settings; its images follow after this one's.

        Raises:
            ValueError: other settings. TypeError: something else. RuntimeError: only one of them has been summed by `sync`.
        """
        if not isinstance(other, Counting):
            remedy = "pass a CalibrationStats"
            raise problem("merge", expected="a CalibrationStats", got=type(other).__name__, remedy=remedy, error=TypeError)
        if (self._settings, self.per_image) != (other._settings, other.per_image):
            raise problem("merge", expected=repr(self), got=repr(other), remedy="construct both with the same settings")
        if self._synced != other._synced:
            remedy = "merge before sync(), or after it on both"
            got = "counts of one process and of all"
            raise problem("merge", expected="both before sync() or both after it", got=got, remedy=remedy, error=RuntimeError)
        images = [Images(*(field.to(self.device) for field in one)) for one in other._images]
        _totals.add_(self._totals, other._totals)
        self._images += images

    @_counting
    def sync(self, group: Any = None) -> None:
        """Sum over all processes of a group of `torch.distributed`, in place, so that each has the counts of all.

        By all-reduces (SUM) alone. Every process of the group has to call it, also one that has counted nothing. Images
        follow in the order of the ranks. Without `torch.distributed` initialised, nothing happens.

        Raises:
            RuntimeError: called twice, which would count everything several times; `reset` first.
        """
        ranks = Ranks(group)
        if ranks.size == 1:
            return
        if self._synced:
            remedy = "call reset() before the next epoch's updates"
            raise problem(
                "sync", expected="counts that were not summed yet", got="a second call", remedy=remedy, error=RuntimeError
            )
        self._check_same_settings(ranks)
        counts = Totals(*(ranks.total(field) for field in self._totals))
        images = []
        if self.per_image:
            images = unpack(Images(*(_everyones(field, ranks) for field in pack(self._images, like=self._totals))))
        self._totals, self._images, self._synced = counts, images, True

    def reset(self) -> None:
        """Forget everything that was counted."""
        self._totals, self._images, self._synced = self._zeros(self.device), [], False

    @_counting
    def to(self: _Self, device: Union[str, torch.device]) -> _Self:
        """Move the counts to a device, in place, and return itself; pixels are judged on the device they are on."""
        device = torch.device(device)
        totals = Totals(*(field.to(device) for field in self._totals))
        self._images = [Images(*(field.to(device) for field in one)) for one in self._images]
        self._totals, self.device = totals, device
        return self

    def state_dict(self) -> Dict[str, Any]:
        """Settings and counts, as plain values and tensors; for `torch.save`."""
        return {
            "settings": self._description(),
            "totals": {name: field.clone() for name, field in self._totals._asdict().items()},
            "images": pack(self._images, like=self._totals)._asdict(),
            "synced": self._synced,
        }

    @_counting
    def load_state_dict(self, state: Dict[str, Any]) -> None:
        """Put back what `state_dict` gave; the counts so far are dropped.

        Raises:
            ValueError: counts of other settings, or of other shapes and kinds. KeyError: not such a state.
        """
        mine = self._description()
        if state["settings"] != mine:
            remedy = "construct it with the settings of the saved one"
            raise problem("load_state_dict", expected=f"counts for {mine}", got=f"for {state['settings']}", remedy=remedy)
        like = self._zeros(torch.device("cpu"))
        totals = loaded_totals(state["totals"], like)
        images = loaded_images(state["images"], int(totals.images) if self.per_image else 0, like)
        self._totals = Totals(*(field.to(self.device) for field in totals))
        self._images = unpack(Images(*(field.to(self.device) for field in images)))
        self._synced = bool(state["synced"])

    # Inner parts

    @_counting
    def _zeros(self, device: torch.device) -> Totals:
        settings = self._settings
        cells = cell_count(settings.n_bins, settings.fine_bins)
        return _totals.zeros(settings.num_classes, cells, cells if settings.classwise else 0, device)

    def _description(self) -> Dict[str, Any]:
        return {**self._settings._asdict(), "per_image": self.per_image}

    def _check_same_settings(self, ranks: Ranks) -> None:
        # As many numbers everywhere, whatever the settings are.
        digest = hashlib.sha256(repr(self._description()).encode()).digest()
        mine = torch.tensor(list(digest), dtype=torch.float64)
        # A sum tells the mean, which may be one's own although others differ; the squares then sum to more.
        both = torch.stack([mine, mine**2])
        if not torch.equal(ranks.total(both), ranks.size * both):
            remedy = "construct it with the same arguments everywhere"
            raise problem("sync", expected="the same settings in every process", got=repr(self), remedy=remedy)


def _everyones(field: Tensor, ranks: Ranks) -> Tensor:
    """The entries of all processes, in the order of the ranks: each has a place for its own, and the sum puts them together."""
    lengths = torch.zeros(ranks.size, dtype=torch.int64)
    lengths[ranks.rank] = len(field)
    lengths = ranks.total(lengths)
    begin = int(lengths[: ranks.rank].sum())
    everyones = field.new_zeros((int(lengths.sum()), *field.shape[1:]))
    everyones[begin : begin + len(field)] = field
    return ranks.total(everyones)
