"""Fitting the temperatures directly, without a virtual step: on blends of target images, whose labels are known well enough."""

from typing import Any, Callable, Tuple, Union

import torch
from torch import Tensor, nn

from ._check import check_logits, check_number
from .losses import cross_entropy
from .mixing import mixup_pairs
from .preserve import preserved
from .ranks import Ranks

Teacher = Callable[[Tensor], Union[Tensor, Tuple[Tensor, Tensor]]]
"""Image -> logits, or (logits, features): what the temperature net takes."""


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
    differ. PseudoCal's premise is that a network errs on such blends as it does on the target, where no label is known; it
    errs more often there, but with less confidence too (`benchmarks/README.md`).
    Rare classes are among those pixels far more often than among the target's, so that every class is weighted back to the
    share that it has on the target.
    PseudoCal fits one temperature after training; here a net of them follows the teacher while it trains.

    It costs one forward pass of the teacher without gradient, and the temperature net's forward and backward pass.

    Gradient: reaches the temperature net alone; its `.grad` is left at None. The teacher's buffers (BatchNorm's statistics),
    modes and the global random state are afterwards as before. There is no state beside the net's and the optimizer's.

    Under `torch.distributed` every rank calls it with its part of the batch, and all temperature nets stay the same, to the
    bit: the first call broadcasts the first rank's, and the loss is the mean over the judged pixels of all ranks.

    Args:
        temperature_net: e.g. `MetaTemperatureNet(num_classes)`. What it sees must mean the same on blended and on clean
            images, as confidence does: with the logits or features as inputs too it learned less that was true of clean
            ones (`benchmarks/README.md`).
        optimizer: of its parameters, e.g. `torch.optim.Adam(temperature_net.parameters(), lr=2e-3)`.
        loss: `(logits, label, weight, *, ignore_index) -> scalar`, as `losses.cross_entropy` and `losses.brier` are.
        share: of the dominant image.
        ignore_index: of `pseudo_label`, where a pixel must not be used.
        process_group: the ranks that share a batch; None for all.

    Example:
        >>> from dacal_addon import MetaTemperatureNet
        >>> g = torch.Generator().manual_seed(0)
        >>> net = MetaTemperatureNet(4)
        >>> teacher = lambda image: 9 * torch.cat([image, 1 - image], 1)
        >>> fit = TemperatureFit(net, torch.optim.Adam(net.parameters(), lr=2e-3))
        >>> target_image = torch.rand(2, 2, 8, 8, generator=g)
        >>> loss = fit(teacher, target_image, teacher(target_image).argmax(1), generator=g)
        >>> loss > 0
        True

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
        self.temperature_net = temperature_net
        self.optimizer = optimizer
        self.loss = loss
        self.share = share
        self.ignore_index = ignore_index
        self.process_group = process_group
        self._broadcast = False

    def __call__(self, teacher: Any, target_image: Tensor, pseudo_label: Tensor, *, generator: torch.Generator) -> float:
        """One step.

        Args:
            teacher: see `Teacher`; a module, or a callable that runs one. Only a module's buffers are put back.
            target_image: (N, K, H, W), N >= 2, as the teacher sees it.
            pseudo_label: (N, H, W) int64, the teacher's argmax on these.
            generator: pairs the images.

        Returns:
            The loss before the step; NaN where no pair of labels differed, and no step was taken.
        """
        image, label = mixup_pairs(
            target_image, pseudo_label, generator=generator, share=self.share, differing=True, ignore_index=self.ignore_index
        )
        ranks = Ranks(self.process_group)
        parameters = list(self.temperature_net.parameters())
        if not self._broadcast:
            ranks.broadcast([*parameters, *self.temperature_net.buffers()])
            self._broadcast = True
        judged = (label != self.ignore_index).sum().double()
        on_average = ranks.average_number(judged)
        if not float(on_average):  # on no rank
            return float("nan")
        module = teacher if isinstance(teacher, nn.Module) else nn.Module()
        with preserved(module), torch.no_grad():
            answer = teacher(image)
        inputs = answer if isinstance(answer, tuple) else (answer,)
        logits = inputs[0]
        check_logits("TemperatureFit", "logits", logits)
        counts = (self._class_counts(each, logits.shape[1]) for each in (label, pseudo_label))
        of_class = class_share_weights(*(ranks.total(count) for count in counts))
        weight = of_class[label.masked_fill(label == self.ignore_index, 0)]
        loss = self.loss(logits / self.temperature_net(*inputs), label, weight, ignore_index=self.ignore_index)
        loss = loss * (judged / on_average).to(loss.dtype)
        grads = ranks.average(torch.autograd.grad(loss, parameters), parameters)
        # .grad is None outside these lines: a host whose optimizer owns every parameter of its module must not see it.
        try:
            for parameter, grad in zip(parameters, grads):
                parameter.grad = grad
            self.optimizer.step()
        finally:
            for parameter in parameters:
                parameter.grad = None
        return float(ranks.average_number(loss))

    def _class_counts(self, label: Tensor, num_classes: int) -> Tensor:
        return torch.bincount(label[label != self.ignore_index], minlength=num_classes).double()
