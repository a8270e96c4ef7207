"""What a network says at some pixels of each image: a sample that stays small, whatever the size of the images."""

from typing import List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor

from .._check import check_classes, check_label, problem
from .._upcast import LOGIT_FLOOR
from ..ignoring import IgnoreIndex, is_ignored

FEATURE_POSITIONS = 512  # of an image: enough for a mean and a covariance


class Pixels(NamedTuple):
    """What a network says at P pixels drawn from n images; float32 on the CPU."""

    logits: Tensor
    """(P, C)."""
    label: Tensor
    """(P,) int64; of an unlabelled domain the network's own argmax."""
    weight: Tensor
    """(P,) float64: how many pixels each stands for, so that images count as they do in a pooled figure."""
    image: Tensor
    """(P,) int64, 0..n-1: which image a pixel is of."""
    images: int
    """n."""
    features: Tensor
    """(Q, F): the input of the last layer, at other positions; logits less their mean where that is not to be had."""
    feature_image: Tensor
    """(Q,) int64."""


class Sample:
    """Collects random pixels of images, batch by batch."""

    def __init__(self, pixels: int, ignore_index: IgnoreIndex, generator: torch.Generator) -> None:
        self._pixels, self._ignore_index, self._generator = pixels, ignore_index, generator
        self._parts: List[Tuple[Tensor, Tensor, Tensor, Tensor]] = []
        self._features: List[Tuple[Tensor, Tensor]] = []
        self._count = 0

    def add(self, logits: Tensor, label: Optional[Tensor], *, features: Optional[Sequence[Tensor]] = None) -> None:
        """Pixels of a batch: logits (N, C, *S), labels (N, *S) or none, features (F, ...) of each image or none.

        Raises:
            ValueError: labels that do not fit, or are no classes.
        """
        if label is None:
            label = logits.argmax(1)
        else:
            check_label("estimate_temperature", "label", label, shape=(len(logits), *logits.shape[2:]))
            check_classes("estimate_temperature", "label", label, logits.shape[1], self._ignore_index)
        # Centred, because a number added to all logits of a pixel says nothing; and finite where a class is masked out.
        finite = logits.clamp(min=LOGIT_FLOOR)
        maps = list(finite - finite.mean(1, keepdim=True)) if features is None else features
        for z, y, x in zip(logits, label.to(logits.device), maps):
            judged = (~is_ignored(y.flatten(), self._ignore_index)).nonzero(as_tuple=True)[0].cpu()
            chosen = judged[self._order(len(judged))[: self._pixels]].to(z.device)
            weight = torch.full((len(chosen),), len(judged) / max(1, len(chosen)), dtype=torch.float64)
            columns, labels = z.flatten(1)[:, chosen].t().float().cpu(), y.flatten()[chosen].cpu()
            self._parts.append((columns, labels, weight, torch.full_like(labels, self._count)))
            positions = self._order(x[0].numel())[:FEATURE_POSITIONS].to(x.device)
            found = x.detach().flatten(1)[:, positions].t().float().cpu()
            self._features.append((found, torch.full((len(found),), self._count, dtype=torch.int64)))
            self._count += 1

    def pixels(self) -> Pixels:
        """All that was collected.

        Raises:
            ValueError: nothing was.
        """
        if not self._parts:
            raise problem("estimate_temperature", expected="at least one image", got="none", remedy="pass images")
        logits, label, weight, image = (torch.cat(part) for part in zip(*self._parts))
        features, feature_image = (torch.cat(part) for part in zip(*self._features))
        return Pixels(logits, label, weight, image, self._count, features, feature_image)

    def _order(self, count: int) -> Tensor:
        return torch.randperm(count, generator=self._generator, device=self._generator.device).cpu()
