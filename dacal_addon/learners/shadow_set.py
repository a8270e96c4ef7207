"""Shadows of the target as a judged set: source images that the student never trains on, in the target's look."""

import math
from typing import Any, Mapping, Optional, Tuple

import torch
from torch import Tensor

from .._check import as_whole, check_image, check_label, problem
from .._upcast import at_least_float32
from ..held_out import Fingerprints, check_apart
from ..shadows import Look, shadows
from .judged_sets import DomainBatch, JudgedBatch


class ShadowSet:
    """Judges on a few held-out source images in the look of the batch's target images; their labels are true.

    No label of these images reaches a training loss. The network is asked in evaluation mode, as it will be used; a student
    that checkpoints activations computes them again later, in the mode that it is in, and cannot be judged so.

    Args:
        image: (M, K, *S) floating, held out from training (`dacal_addon.held_out.hold_out`), scaled as in training. Of any
            size and on any device.
        label: (M, *S) int64; of the learner's `ignore_index` where a pixel is not judged.
        count: images a call; fewer where M is smaller.
        strength: of the look, drawn uniformly between the two for each call. See `shadows`.
        looks, blur, value_range: see `shadows`.

    Raises:
        ValueError, TypeError: images and labels that do not fit. In a call: a training batch that has an image which is held
            out, where its label map shows that.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> held_out = torch.rand(4, 3, 16, 16, generator=g), torch.randint(0, 5, (4, 16, 16), generator=g)
        >>> judged = ShadowSet(*held_out, count=2)
        >>> image, label = torch.rand(2, 3, 8, 8, generator=g), torch.randint(0, 5, (2, 8, 8), generator=g)
        >>> mask, weight = label[:, None] > 2, torch.ones(2, 8, 8)
        >>> batch = judged(DomainBatch(image, label, image, label, weight, mask, 255), generator=g)
        >>> batch.image.shape, batch.evaluation
        (torch.Size([2, 3, 16, 16]), True)

    Source: the looks are FDA's (Yang and Soatto, CVPR 2020) and Reinhard's (Reinhard et al., IEEE CG&A 2001).
    """

    def __init__(
        self,
        image: Tensor,
        label: Tensor,
        *,
        count: int = 8,
        strength: Tuple[float, float] = (0.5, 1.5),
        looks: Optional[Mapping[str, Look]] = None,
        blur: float = 0.5,
        value_range: Optional[Tuple[float, float]] = None,
    ) -> None:
        x = check_image("ShadowSet", "image", image)
        check_label("ShadowSet", "label", label, shape=(len(x), *x.shape[2:]))
        if not len(x):
            raise problem("ShadowSet", expected="at least one held-out image", got="none", remedy="keep some back")
        if not (isinstance(strength, (tuple, list)) and len(strength) == 2 and 0 <= strength[0] <= strength[1] < math.inf):
            remedy = "pass the weakest and the strongest look, for example (0.5, 1.5)"
            raise problem("ShadowSet", expected="strength: (low, high), 0 <= low <= high", got=repr(strength), remedy=remedy)
        self.image, self.label, self.strength = x, label, strength
        self.count = as_whole("ShadowSet", "count", count, low=1)
        self._options: Mapping[str, Any] = {"looks": looks, "blur": blur, "value_range": value_range}
        one = at_least_float32(x[:1])
        draw = torch.Generator().manual_seed(0)
        shadows(one, one, generator=draw, strength=strength[1], **self._options)  # raises what it would raise later
        self._known = Fingerprints(list(label))

    def __call__(self, batch: DomainBatch, *, generator: torch.Generator) -> JudgedBatch:
        check_apart("ShadowSet", self._known, batch.source_label, ignore_index=batch.ignore_index)
        return self.draw(batch.target_image, generator=generator)

    def draw(self, target_image: Tensor, *, generator: torch.Generator) -> JudgedBatch:
        """Some of the held-out images in the look of target images (N, K, *S), of the kind and on the device of these."""
        chosen = torch.randperm(len(self.image), generator=generator, device=generator.device)[: self.count].cpu()
        u = float(torch.rand(1, generator=generator, device=generator.device))
        target = at_least_float32(target_image)
        image = shadows(
            self.image[chosen].to(target),
            target,
            generator=generator,
            strength=self.strength[0] + u * (self.strength[1] - self.strength[0]),
            **self._options,
        )
        label = self.label[chosen].to(target.device)
        return JudgedBatch(image.to(target_image.dtype), label, torch.ones_like(label, dtype=target.dtype), evaluation=True)
