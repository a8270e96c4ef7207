"""Fitting the temperatures directly, without a virtual step: on blends of target images, whose labels are known well enough."""

import math
from typing import Any, Callable, NamedTuple, Optional, Tuple, Union

import torch
from torch import Tensor, nn

from ._check import check_classes, check_image, check_label, check_logits, check_number, check_owner, problem
from .losses import cross_entropy
from .mixing import mixup_pairs
from .preserve import preserved
from .ranks import Ranks

Teacher = Callable[[Tensor], Union[Tensor, Tuple[Tensor, Tensor]]]
"""Image -> logits, or (logits, features): what the temperature net takes."""


# exp(-10000) is 0 in any precision. A class masked out with -inf would make T's gradient 0 * inf.
_LOGIT_FLOOR = -1e4


class TemperatureFitResult(NamedTuple):
    """What a step was."""

    loss: float
    """Before the step; over all ranks. NaN where no pixel was judged."""
    skipped: Optional[str]
    """Why no step was taken; None if one was."""


def class_share_weights(judged: Tensor, target: Tensor) -> Tensor:
    """One weight a class, with which the judged pixels have the class shares of the target; 1 on average over these pixels.

    Args:
        judged, target: (C,) floating, numbers of pixels of each class. A class of which none is judged gets no weight.

    Example:
        >>> class_share_weights(torch.tensor([50.0, 50.0, 0.0]), torch.tensor([750.0, 150.0, 100.0]))
        tensor([1.6667, 0.3333, 0.0000])

    Source: importance weights under label shift (Saerens et al., Neural Computation 2002), here from pseudo-labels.
    """
    weight = torch.where(judged > 0, target / judged.clamp(min=1), torch.zeros_like(judged))
    return weight * judged.sum() / (weight * judged).sum().clamp(min=1e-12)


class TemperatureFit:
    """Gives the temperature net one step towards the calibrated soft label, beside or instead of `BilevelCalibrationStep`.

    Each call blends every target image with another one of the batch, 65 to 35, asks the teacher, and lowers the negative
    log-likelihood of softmax(z / T) under the pseudo-labels of the dominant images, on the pixels whose two pseudo-labels
    differ: PseudoCal's rule. Its premise is that a network errs on such blends as it does on the target, where no label is
    known; how far that holds on our benchmarks: `benchmarks/README.md`.
    Rare classes are among those pixels far more often than among the target's, so that every class is weighted back to the
    share that it has on the target.
    PseudoCal fits one temperature after training; here a net of them follows the teacher while it trains.

    It costs one forward pass of the teacher without gradient, and the temperature net's forward and backward pass.

    Gradient: reaches the temperature net alone; its `.grad` is left at None. The teacher's buffers (BatchNorm's statistics),
    modes and the global random state are afterwards as before. There is no state beside the net's and the optimizer's.

    Under `torch.distributed` every rank calls it with its part of the batch, and all temperature nets stay the same, to the
    bit: the first call broadcasts the first rank's, and the built-in losses are means over the judged pixels of all ranks.

    Args:
        temperature_net: e.g. `MetaTemperatureNet(num_classes)`. What it sees must mean the same on blended and on clean
            images, as confidence does: with the logits or features as inputs too it learned less that was true of clean
            ones (`benchmarks/README.md`).
        optimizer: of its parameters, e.g. `torch.optim.Adam(temperature_net.parameters(), lr=2e-3)`.
        loss: `(logits, label, weight, *, ignore_index) -> scalar`, as `losses.cross_entropy` and `losses.brier` are.
        share: of the dominant image.
        ignore_index: of `pseudo_label`, where a pixel must not be used.
        process_group: the ranks that share a batch; None for all.

    Raises:
        ValueError: a share below a half; an optimizer that owns other parameters than the temperature net's.

    Example:
        >>> from dacal_addon import MetaTemperatureNet
        >>> g = torch.Generator().manual_seed(0)
        >>> net = MetaTemperatureNet(4)
        >>> teacher = lambda image: 9 * torch.cat([image, 1 - image], 1)
        >>> fit = TemperatureFit(net, torch.optim.Adam(net.parameters(), lr=2e-3))
        >>> target_image = torch.rand(2, 2, 8, 8, generator=g)
        >>> result = fit(teacher, target_image, teacher(target_image).argmax(1), generator=g)
        >>> result.loss > 0, result.skipped is None
        (True, True)

    Source: PseudoCal (Hu et al., ICML 2024), its inference-stage mixup and cross-cluster rule.
    """

    def __init__(
        self,
        temperature_net: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        loss: Callable[..., Tensor] = cross_entropy,
        share: float = 0.65,
        ignore_index: int = 255,
        process_group: Any = None,
    ) -> None:
        check_number("TemperatureFit", "share", share, low=0.5, high=1.0, rule="in [0.5, 1]")
        self._parameters = check_owner("TemperatureFit", "optimizer", optimizer, temperature_net, of="temperature_net")
        self.temperature_net = temperature_net
        self.optimizer = optimizer
        self.loss = loss
        self.share = share
        self.ignore_index = ignore_index
        self.process_group = process_group
        self._broadcast = False

    def __call__(
        self, teacher: Any, target_image: Tensor, pseudo_label: Tensor, *, generator: torch.Generator
    ) -> TemperatureFitResult:
        """One step.

        Args:
            teacher: see `Teacher`; a module, or a callable that runs one. Only a module's buffers are put back.
            target_image: (N, K, H, W), N >= 2, as the teacher sees it.
            pseudo_label: (N, H, W) int64, the teacher's argmax on these.
            generator: pairs the images.

        Raises:
            ValueError, TypeError: tensors that do not fit each other, fewer than two images, labels that are no classes of
                the teacher. The temperature net has not changed then.
        """
        self._check_batch(target_image, pseudo_label)
        ranks = Ranks(self.process_group)
        if not self._broadcast:
            ranks.broadcast([*self.temperature_net.parameters(), *self.temperature_net.buffers()])
            self._broadcast = True
        image, label = mixup_pairs(
            target_image, pseudo_label, generator=generator, share=self.share, differing=True, ignore_index=self.ignore_index
        )
        judged = (label != self.ignore_index).sum().double()
        on_average = ranks.average_number(judged)
        if not float(on_average):  # on no rank
            return TemperatureFitResult(math.nan, "no pixel is judged: the pseudo-labels of blended images are all the same")
        module = teacher if isinstance(teacher, nn.Module) else nn.Module()
        with preserved(module, of=[target_image]), torch.no_grad():
            answer = teacher(image)
        inputs = answer if isinstance(answer, tuple) else (answer,)
        logits = inputs[0]
        check_logits("TemperatureFit", "logits", logits)
        check_classes("TemperatureFit", "pseudo_label", pseudo_label, logits.shape[1], self.ignore_index)
        counts = (self._class_counts(each, logits.shape[1]) for each in (label, pseudo_label))
        of_class = class_share_weights(*(ranks.total(count) for count in counts))
        weight = of_class[label.masked_fill(label == self.ignore_index, 0)]
        calibrated = logits.clamp(min=_LOGIT_FLOOR) / self.temperature_net(*inputs)
        loss = self.loss(calibrated, label, weight, ignore_index=self.ignore_index)
        loss = loss * (judged / on_average).to(loss.dtype)
        grads = ranks.average(torch.autograd.grad(loss, self._parameters), self._parameters)
        of_all = float(ranks.average_number(loss))
        if not math.isfinite(of_all + sum(float(grad.abs().sum()) for grad in grads if grad is not None)):
            return TemperatureFitResult(of_all, "loss or its gradient is not finite: a step would spoil the temperature net")
        # .grad is None outside these lines: a host whose optimizer owns every parameter of its module must not see it.
        try:
            for parameter, grad in zip(self._parameters, grads):
                parameter.grad = grad
            self.optimizer.step()
        finally:
            for parameter in self._parameters:
                parameter.grad = None
        return TemperatureFitResult(of_all, None)

    def _check_batch(self, target_image: Any, pseudo_label: Any) -> None:
        image = check_image("TemperatureFit", "target_image", target_image)
        if len(image) < 2:
            remedy = "use a larger batch: images are blended with each other"
            raise problem("TemperatureFit", expected="at least 2 target images", got=f"{len(image)}", remedy=remedy)
        check_label("TemperatureFit", "pseudo_label", pseudo_label, shape=(len(image), *image.shape[-2:]))

    def _class_counts(self, label: Tensor, num_classes: int) -> Tensor:
        return torch.bincount(label[label != self.ignore_index], minlength=num_classes).double()
