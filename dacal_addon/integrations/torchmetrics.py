"""`CalibrationStats` as a metric of torchmetrics: in a `MetricCollection`, in Lightning's `self.log`, summed over processes.

The only file that imports torchmetrics; it comes with the extra `torchmetrics`.
"""

import copy
import hashlib
import inspect
from typing import Any, Dict, Optional, Sequence, Union

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from .._check import check_choice, problem
from ..metrics import CalibrationStats
from ..metrics.arrays import Array, Predictions

_SETTINGS = set(inspect.signature(CalibrationStats).parameters)


class CalibrationMetric(Metric):
    """Counts as `CalibrationStats` does, and keeps the counts where torchmetrics looks for them: states that are summed.

    Args:
        num_classes, input: of `CalibrationStats`.
        metric: what `compute` returns: a name of the catalogue for one figure, several names for a dictionary of them, None for
            a dictionary of all.
        options: more of `CalibrationStats`, without `per_image`, since images are no sum, and `device`, which is torchmetrics'
            `to`; or of `torchmetrics.Metric`, such as `sync_on_compute`.

    Metrics of one collection with the same settings count once (its compute groups).

    Raises:
        ValueError, TypeError, RuntimeError: as `CalibrationStats`; another name; a metric that these settings do not have.

    Example:
        >>> metric = CalibrationMetric(2, input="probs", metric=("ece", "accuracy"))
        >>> x = torch.tensor([[0.75, 0.25], [0.625, 0.375]]).T.reshape(1, 2, 1, 2)
        >>> metric.update(x, torch.tensor([[[0, 1]]]))
        >>> {name: float(value) for name, value in metric.compute().items()}
        {'ece': 0.4375, 'accuracy': 0.5}
    """

    is_differentiable = False
    # `forward` counts a batch once, by itself, and adds it.
    full_state_update = False

    def __init__(
        self, num_classes: int, *, input: str, metric: Union[str, Sequence[str], None] = "ece", **options: Any
    ) -> None:
        settings = {name: options.pop(name) for name in list(options) if name in _SETTINGS}
        super().__init__(**options)
        for name, instead in (("per_image", "CalibrationStats and its sync()"), ("device", "to(device)")):
            if settings.get(name):
                got = f"{name}={settings[name]!r}"
                raise problem("CalibrationMetric", expected=f"no {name}", got=got, remedy=f"use {instead}")
        # A place to count in, and no state: it is overwritten by every call.
        self._stats = CalibrationStats(num_classes, input=input, **settings)
        possible = list(self._stats.compute())
        self._one = isinstance(metric, str)
        self._names = possible if metric is None else [metric] if isinstance(metric, str) else list(metric)
        for name in self._names:
            check_choice("CalibrationMetric", "metric", name, possible)
        for name, field in self._counts().items():
            self.add_state(name, default=field, dist_reduce_fx="sum")
        # Of metrics whose states are equal after the first batch, a collection lets one count: settings must show in them.
        self.add_state("settings_digest", default=_digest(self._stats), dist_reduce_fx="max")

    def update(self, preds: Predictions, target: Array, region: Optional[Array] = None, **options: Any) -> None:
        """As `CalibrationStats.update`."""
        self._stats.reset()
        self._stats.update(preds, target, region, **options)
        for name, field in self._counts().items():
            state = getattr(self, name)
            setattr(self, name, state + field.to(state.device))

    def compute(self) -> Union[Tensor, Dict[str, Tensor]]:
        """The figure, () float64, or a dictionary of them; NaN where no pixel counts."""
        found = self.statistics()
        values = {
            name: torch.tensor(float(getattr(found, name)()), dtype=torch.float64, device=self.device) for name in self._names
        }
        return values[self._names[0]] if self._one else values

    def statistics(self) -> CalibrationStats:
        """A copy of the counts as a `CalibrationStats`, for all else that it has: reliability diagrams, figures by class. This
        process's own, outside of `compute`."""
        found = copy.copy(self._stats)
        state = found.state_dict()
        state["totals"] = {name: getattr(self, name).cpu() for name in state["totals"]}
        found.load_state_dict(state)
        return found

    def _counts(self) -> Dict[str, Tensor]:
        counts: Dict[str, Tensor] = self._stats.state_dict()["totals"]
        return counts


def _digest(stats: CalibrationStats) -> Tensor:
    """Of its settings, (16,) int64: 256 bits in parts of 16, since torchmetrics takes for equal what differs by 1e-5 of it."""
    digest = hashlib.sha256(repr(stats.state_dict()["settings"]).encode()).digest()
    return torch.from_numpy(np.frombuffer(digest, dtype="<u2").astype(np.int64))
