"""What `cells.py` compares: ways to teach the student on the target. The demo's, variants, another paper's, and a bound."""

import math
from typing import Any, Callable, Dict, NamedTuple, Type

import torch
import torch.nn.functional as F
from torch import Tensor

from dacal_addon import BilevelCalibrationStep, MetaTemperatureNet, SoftPseudoLabeler, TemperatureFit
from dacal_addon.calibrate.estimators import TYPICAL
from dacal_addon.demo.batches import Batch
from dacal_addon.demo.datasets import Split
from dacal_addon.demo.methods import METHODS as OF_THE_DEMO
from dacal_addon.demo.methods import HardLabels, Teaching
from dacal_addon.demo.network import SmallUNet
from dacal_addon.demo.recipes import Recipe
from dacal_addon.learners import ShadowSet
from dacal_addon.losses import cross_entropy
from dacal_addon.preserve import in_evaluation_mode
from dacal_addon.pseudo_labels import one_hot, soft_label

GAIN = 0.4
"""Of `ShadowFeedback`: log T moves by this times the student's gap."""
CAP = 1.0
"""Of the temperatures that shadows decide: labels that are softer than the teacher cost mIoU."""
LOWEST = 0.25


class Method(NamedTuple):
    """A row of the table."""

    title: str
    make: Callable[..., Teaching]
    """(student, optimizer, recipe, *, held_out) -> Teaching."""
    typical: float = 1.0
    """What `estimate_temperature` is told of its students; 1: nothing is known of those that soft labels have taught."""
    closely: bool = False
    """Whether every estimator and a few labelled target images are tried on its students."""
    bound: bool = False
    """Whether it sees target labels: what could be reached, no method."""

    def __call__(self, *arguments: Any, held_out: Split) -> Teaching:
        return self.make(*arguments, held_out=held_out)


class Mixture(HardLabels):
    """Half the teacher's argmax, half its softmax at T = 1."""

    title = "half hard, half soft"
    share = 0.5
    """Of the argmax."""

    def teach(self, teacher: SmallUNet, batch: Batch) -> str:
        with torch.no_grad():
            labels = SoftPseudoLabeler(None, threshold=self.recipe.threshold, weight=self.weight)(teacher(batch.target_image))
            hard = one_hot(labels.pseudo_label, labels.soft_label.shape[1])
            label = self.share * hard + (1 - self.share) * labels.soft_label
        self.mixed_loss(batch, label, labels.weight).backward()
        return ""


class SoftLabels(Mixture):
    """The teacher's softmax."""

    title = "soft pseudo-labels, T = 1"
    share = 0.0


class FittedTemperatures(Teaching):
    """Soft labels whose temperatures are fitted on blends of target images."""

    title = "fitted temperatures"
    sees_target = True

    def __init__(self, student: SmallUNet, optimizer: torch.optim.Optimizer, recipe: Recipe) -> None:
        super().__init__(student, optimizer, recipe)
        net = MetaTemperatureNet(student.head.out_channels)
        self.net = net.to(next(student.parameters()).device)
        self.label = SoftPseudoLabeler(net, threshold=recipe.threshold)
        self.adam = torch.optim.Adam(net.parameters(), lr=TemperatureFit.defaults.learning_rate)
        self.fit = TemperatureFit(self.label, meta_optimizer=self.adam)

    def teach(self, teacher: SmallUNet, batch: Batch) -> str:
        with torch.no_grad():
            logits = teacher(batch.target_image)
        self.learn(teacher, batch, logits)
        with torch.no_grad():
            labels = self.label(logits)
        self.mixed_loss(batch, labels.soft_label, labels.weight).backward()
        return f"T {float(labels.temperature.min()):.2f}..{float(labels.temperature.max()):.2f}"

    def learn(self, teacher: SmallUNet, batch: Batch, logits: Tensor) -> None:
        images = (batch.source_image, batch.source_label, batch.target_image)
        self.fit(*images, logits, teacher=teacher, mask=batch.mask, generator=batch.generator)


class ShadowStep(Teaching):
    """The bilevel step, judged by the student's calibration gap on shadows; temperatures up to a cap."""

    title = "bilevel step on shadows, calibration gap"
    sees_target = True
    cap = CAP

    def __init__(self, student: SmallUNet, optimizer: torch.optim.Optimizer, recipe: Recipe, *, held_out: Split) -> None:
        super().__init__(student, optimizer, recipe)
        initial = (LOWEST * self.cap) ** 0.5
        net = MetaTemperatureNet(
            student.head.out_channels,
            sees="logits",
            kernel_size=3,
            initial_temperature=initial,
            max_ratio=self.cap / initial,
        )
        self.net = net.to(next(student.parameters()).device)
        self.label = SoftPseudoLabeler(self.net, threshold=recipe.threshold)
        self.calibrate = BilevelCalibrationStep(
            student,
            self.label,
            optimizer=optimizer,
            meta_optimizer=torch.optim.Adam(self.net.parameters(), lr=1e-3),
            judged_set=ShadowSet(held_out.image, held_out.label, value_range=(0.0, 1.0)),
            outer_loss="calibration_gap",
            warmup=recipe.meta_warmup,
            every=2,
            measure_before=False,
        )

    def teach(self, teacher: SmallUNet, batch: Batch) -> str:
        with torch.no_grad():
            logits = teacher(batch.target_image)
        result = self.calibrate(
            batch.source_strong,
            batch.source_label,
            batch.target_strong,
            logits,
            mask=batch.mask,
            backward=True,
            generator=batch.generator,
        )
        return "" if result.skipped else f"T {result.temperature_mean:.2f}"


class ShadowFeedback(HardLabels):
    """One temperature, whose logarithm moves by `GAIN` times the student's gap of confidence and accuracy on shadows."""

    title = "one T by the gap on shadows"
    gain, cap = GAIN, CAP

    def __init__(self, student: SmallUNet, optimizer: torch.optim.Optimizer, recipe: Recipe, *, held_out: Split) -> None:
        super().__init__(student, optimizer, recipe)
        self.shadows = ShadowSet(held_out.image, held_out.label, value_range=(0.0, 1.0))
        self.log_t = math.log(LOWEST * self.cap) / 2
        self.seen = 0

    def teach(self, teacher: SmallUNet, batch: Batch) -> str:
        self.seen += 1
        if self.seen > self.recipe.meta_warmup:
            with torch.no_grad(), in_evaluation_mode(self.student):
                gap = float(gap_on(self.shadows, self.student, batch))
            self.log_t = min(max(self.log_t + self.gain * gap, math.log(LOWEST)), math.log(self.cap))
        temperature = math.exp(self.log_t)
        with torch.no_grad():
            logits = teacher(batch.target_image)
            labels = SoftPseudoLabeler(None, threshold=self.recipe.threshold)(logits)
            label = soft_label(logits, torch.full_like(logits[:, :1], temperature))
        self.mixed_loss(batch, label, labels.weight).backward()
        return f"T {temperature:.2f}"


class GapPenalty(HardLabels):
    """Hard labels, and the student's own gap on shadows as a penalty."""

    title = "hard pseudo-labels, gap on shadows as a penalty"
    strength = 1.0

    def __init__(self, student: SmallUNet, optimizer: torch.optim.Optimizer, recipe: Recipe, *, held_out: Split) -> None:
        super().__init__(student, optimizer, recipe)
        self.shadows = ShadowSet(held_out.image, held_out.label, count=4, value_range=(0.0, 1.0))
        self.seen = 0

    def teach(self, teacher: SmallUNet, batch: Batch) -> str:
        note = super().teach(teacher, batch)
        self.seen += 1
        if self.seen > self.recipe.meta_warmup:
            with in_evaluation_mode(self.student):
                (self.strength * gap_on(self.shadows, self.student, batch).abs()).backward()
        return note


def gap_on(shadows: ShadowSet, student: SmallUNet, batch: Batch) -> Tensor:
    """Mean confidence less accuracy on shadows of a batch's target images; of the accuracy no gradient."""
    judged = shadows.draw(batch.target_image, generator=batch.generator)
    confidence, prediction = F.softmax(student(judged.image), 1).max(1)
    counted = judged.label != 255
    excess = confidence - (prediction == judged.label).to(confidence.dtype)
    return excess[counted].mean()


def pasta(image: Tensor, generator: torch.Generator, *, alpha: float = 3.0, beta: float = 0.25, power: float = 2.0) -> Tensor:
    """Multiply the amplitudes of an image's spectrum by noise that grows with the frequency; phases stay.

    Source: PASTA (Chattopadhyay et al., ICCV 2023), with its settings for segmentation as defaults.
    """
    height, width = image.shape[-2:]
    rows = torch.fft.fftfreq(height)[:, None] * height
    columns = torch.fft.fftfreq(width)[None] * width
    sigma = (2 * alpha * ((rows**2 + columns**2) / (height**2 + width**2)).sqrt()) ** power + beta
    noise = 1 + sigma * torch.randn(image.shape, generator=generator)
    spectrum = torch.fft.fft2(image)
    image = torch.fft.ifft2(spectrum * noise.to(image.device)).real
    return image.clamp(0.0, 1.0)


class Pasta(HardLabels):
    """Source images under PASTA instead of the recipe's augmentation, also in the mixed ones.

    Source: PASTA (Chattopadhyay et al., ICCV 2023).
    """

    title = "hard pseudo-labels, source under PASTA"

    def source_loss(self, batch: Batch) -> Tensor:
        self.augmented = pasta(batch.source_image, batch.generator)
        return self.loss_on(self.student(self.augmented), batch.source_label)

    def loss_on(self, logits: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(logits, label, ignore_index=255)

    def teach(self, teacher: Any, batch: Batch) -> str:
        return super().teach(teacher, batch._replace(source_strong=self.augmented))


class AugCal(Pasta):
    """The same with the gap of accuracy and confidence (DCA) on these source images.

    Source: AugCal (Chattopadhyay et al., ICLR 2024); DCA (Liang et al., 2020), the gap over the pixels of a batch, weight 1.
    """

    title = "AugCal"

    def loss_on(self, logits: Tensor, label: Tensor) -> Tensor:
        confidence, prediction = F.softmax(logits, dim=1).max(1)
        counted = label != 255
        gap = ((prediction == label)[counted].float().mean() - confidence[counted].mean()).abs()
        return super().loss_on(logits, label) + gap


class FittedToTruth(FittedTemperatures):
    """Bound: the temperatures are fitted on the target's true labels instead of on blends."""

    title = "bound: temperatures fitted to the truth"

    def learn(self, teacher: SmallUNet, batch: Batch, logits: Tensor) -> None:
        self.adam.zero_grad()
        cross_entropy(logits / self.net(logits), batch.target_label).backward()
        self.adam.step()


def _plain(kind: Type[Teaching]) -> Callable[..., Teaching]:
    def make(*arguments: Any, held_out: Split) -> Teaching:
        return kind(*arguments)

    return make


def _method(kind: Type[Teaching], *, sees_held_out: bool = False, **options: Any) -> Method:
    return Method(kind.title, kind if sees_held_out else _plain(kind), **options)


METHODS: Dict[str, Method] = {
    "hard": _method(HardLabels, typical=TYPICAL, closely=True),
    "source-only": _method(OF_THE_DEMO["source-only"], typical=TYPICAL),
    "soft": _method(SoftLabels),
    "half": _method(Mixture),
    "fit": _method(FittedTemperatures),
    "bilevel": _method(OF_THE_DEMO["bilevel"]),
    "shadow-step": _method(ShadowStep, sees_held_out=True),
    "shadow-feedback": _method(ShadowFeedback, sees_held_out=True),
    "gap-penalty": _method(GapPenalty, sees_held_out=True, typical=TYPICAL),
    "pasta": _method(Pasta, typical=TYPICAL),
    "augcal": _method(AugCal, typical=TYPICAL),
    "bound-fitted": _method(FittedToTruth, bound=True),
}
