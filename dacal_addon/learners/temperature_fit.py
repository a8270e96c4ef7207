"""Fitting the temperatures directly, without a virtual step: on blends of target images, whose labels are known well enough."""

from typing import Union

import torch
from torch import Tensor

from .._upcast import LOGIT_FLOOR
from ..ignoring import void_label
from ..pseudo_labels import without_classes
from .judged_sets import as_judged, usable
from .learner import Defaults, Iteration, Learned, Learner
from .networks import ask
from .skips import Skip, SkipKind


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


class TemperatureFit(Learner):
    """Gives the temperature net one step towards the calibrated soft label, beside or instead of `BilevelCalibrationStep`.

    Each call blends every target image with another one of the batch, 65 to 35, asks the teacher, and lowers the negative
    log-likelihood of softmax(z / T) under the pseudo-labels of the dominant images, on the pixels whose two pseudo-labels
    differ: PseudoCal's rule. Its premise is that a network errs on such blends as it does on the target, where no label is
    known. It does not hold everywhere: students ended underconfident on one of our data sets (`benchmarks/README.md`).
    Rare classes are among those pixels far more often than among the target's, so that every class is weighted back to the
    share that it has on the target.
    PseudoCal fits one temperature after training; here a net of them follows the teacher while it trains.

    It costs one forward pass of the teacher without gradient, and the temperature net's forward and backward pass.

    Args: those of `Learner`. The temperature net should see what means the same on blended and on clean images, as confidence
        does: with the logits or features as inputs too it learned less that was true of clean ones (at commit 7c5564a,
        `benchmarks/README.md`).
        The call needs `teacher`, the network itself; where a judged set is to be asked in evaluation mode (`ShadowSet`), the
        module, for a function is asked as it is.

    Example:
        >>> from dacal_addon import MetaTemperatureNet, SoftPseudoLabeler
        >>> g = torch.Generator().manual_seed(0)
        >>> net = MetaTemperatureNet(4)
        >>> adam = torch.optim.Adam(net.parameters(), lr=2e-3)
        >>> fit = TemperatureFit(SoftPseudoLabeler(net, weight="none"), meta_optimizer=adam)
        >>> teacher = lambda image: 9 * torch.cat([image, 1 - image], 1)
        >>> image, label = torch.rand(2, 2, 8, 8, generator=g), torch.randint(0, 4, (2, 8, 8), generator=g)
        >>> result = fit(image, label, image, teacher=teacher)
        >>> result.outer_loss_before > 0, result.skipped is None
        (True, True)

    Source: PseudoCal (Hu et al., ICML 2024), its mixup at inference and cross-cluster rule.
    """

    defaults = Defaults(judged_set="differing_blends", learning_rate=2e-3)
    judges_teacher = True

    def gradient(self, iteration: Iteration) -> Union[Learned, Skip]:
        batch, ranks, teacher = iteration.batch, iteration.ranks, iteration.teacher
        assert teacher is not None  # for mypy: `judges_teacher` has asked for it
        judged, void = self.judged_batch(iteration), void_label(self.ignore_index)
        if not ranks.anywhere(bool((judged.label != void).any()), like=judged.weight):
            return Skip(SkipKind.UNJUDGED, "no pixel of the judged set has a label (in blends: both pseudo-labels are one)")
        with as_judged(judged, teacher):
            output = ask(teacher, judged.image)
        logits = self.outputs.logits(self._name, output, judged.label.shape[1:])
        logits = without_classes(self._name, logits, self.ignore_index)  # as the labeler does
        features = self.outputs.features(self._name, output)
        temperature = self.temperature_net(*((logits,) if features is None else (logits, features)))
        labels = (judged.label, usable(batch))
        counts = (torch.bincount(label[label != void], minlength=logits.shape[1]).double() for label in labels)
        of_class = class_share_weights(*(ranks.total(count) for count in counts))
        shares = of_class[judged.label.masked_fill(judged.label == void, 0)]
        judged = judged._replace(weight=shares * judged.weight)
        # A class masked out with -inf would make T's gradient 0 * inf.
        calibrated = logits.clamp(min=LOGIT_FLOOR) / temperature
        weight = self.judged_weight(ranks, judged)
        loss = self.outer_loss(calibrated, judged.label, weight, ignore_index=void)
        grads = ranks.average(torch.autograd.grad(loss, self.meta_parameters), self.meta_parameters)
        return Learned(grads, temperature, outer_loss_before=ranks.average_number(loss))
