"""What `uda.py` compares beside the demo's methods: calibration losses from other papers, and bounds that see target labels."""

from functools import partial
from typing import Any, Callable, Dict, NamedTuple, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dacal_addon import MetaTemperatureNet, SoftPseudoLabeler
from dacal_addon.demo.batches import Batch
from dacal_addon.demo.methods import METHODS as OF_THE_DEMO
from dacal_addon.demo.methods import HardLabels, SoftLabels, Teaching
from dacal_addon.demo.network import SmallUNet
from dacal_addon.demo.recipes import Recipe
from dacal_addon.losses import cross_entropy
from dacal_addon.pseudo_labels import one_hot, soft_label


class Method(NamedTuple):
    """A row of the table."""

    title: str
    make: Callable[..., Teaching]
    """(student, optimizer, recipe) -> Teaching."""
    seeds: int = 3
    """How many; five for the rows that are compared."""
    post_hoc: bool = False
    """Whether the post-hoc calibrations are applied to its student too."""
    bound: bool = False
    """Whether it sees target labels: what could be reached, no method."""


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


class AugCal(HardLabels):
    """Source images under PASTA instead of the recipe's augmentation, also in the mixed ones, and on them the gap of accuracy
    and confidence (DCA).

    Source: AugCal (Chattopadhyay et al., ICLR 2024); DCA (Liang et al., 2020), the gap over the pixels of a batch, weight 1.
    """

    title = "AugCal"

    def source_loss(self, batch: Batch) -> Tensor:
        self.augmented = pasta(batch.source_image, batch.generator)
        logits = self.student(self.augmented)
        confidence, prediction = F.softmax(logits, dim=1).max(1)
        gap = ((prediction == batch.source_label).float().mean() - confidence.mean()).abs()
        return F.cross_entropy(logits, batch.source_label) + gap

    def teach(self, teacher: Any, batch: Batch) -> str:
        return super().teach(teacher, batch._replace(source_strong=self.augmented))


class WeightedHardLabels(HardLabels):
    """Weights that follow each pixel's confidence: a first configuration of `dacal` had them."""

    title = "hard pseudo-labels, weights by confidence"
    weight = "confidence"


class WeightedSoftLabels(SoftLabels):
    """The same with soft labels."""

    title = "soft pseudo-labels, T = 1, weights by confidence"
    weight = "confidence"


class MarginSmoothing(HardLabels):
    """Penalises logits that fall more than a margin below the largest one, on source and mixed images.

    Source: MbLS (Liu et al., CVPR 2022), with its margin 10 and weight 0.1.
    """

    title = "margin-based smoothing"

    def source_loss(self, batch: Batch) -> Tensor:
        logits = self.student(batch.source_strong)
        return F.cross_entropy(logits, batch.source_label) + margin_penalty(logits)

    def loss_on_mixed(self, logits: Tensor, label: Tensor, weight: Tensor) -> Tensor:
        return super().loss_on_mixed(logits, label, weight) + margin_penalty(logits)


def margin_penalty(logits: Tensor, *, margin: float = 10.0, weight: float = 0.1) -> Tensor:
    """Mean over pixels and classes of what the distance to the largest logit exceeds the margin by, times `weight`.

    Example:
        >>> float(margin_penalty(torch.tensor([14.0, 0.0]).view(1, 2, 1, 1), weight=1.0))  # (0 + 4) / 2
        2.0
    """
    return weight * F.relu(logits.amax(1, keepdim=True) - logits - margin).mean()


class TruthTemperature(Teaching):
    """Bound: T = 1/3 where the teacher is right and 3 where it is wrong."""

    title = "bound: T by the truth"

    def teach(self, teacher: Any, batch: Batch) -> str:
        with torch.no_grad():
            logits = teacher(batch.target_image)
            labels = SoftPseudoLabeler(None, threshold=self.recipe.threshold, weight="ratio")(logits)
            temperature = torch.where((labels.pseudo_label == batch.target_label).unsqueeze(1), 1 / 3, 3.0)
            label = soft_label(logits, temperature)
        self.mixed_loss(batch, label, labels.weight).backward()
        return ""


class TrueLabels(Teaching):
    """Bound: the target's labels on the target's pixels."""

    title = "bound: true labels"

    def teach(self, teacher: Any, batch: Batch) -> str:
        classes = self.student.head.out_channels
        weight = torch.ones_like(batch.target_image[:, 0])
        self.mixed_loss(batch, one_hot(batch.target_label, classes), weight).backward()
        return ""


class FittedToTruth(Teaching):
    """Bound: as `dacal`, but its temperatures are fitted on the target's true labels instead of on blends.

    What the blends cost; and with a net that sees the teacher's logits and features too, how far these know its errors.
    """

    title = "bound: temperatures fitted to the truth"

    def __init__(
        self, student: SmallUNet, optimizer: torch.optim.Optimizer, recipe: Recipe, *, sees_features: bool = False
    ) -> None:
        super().__init__(student, optimizer, recipe)
        self.sees_features = sees_features
        net = MetaTemperatureNet(
            student.head.out_channels,
            feature_channels=student.feature_channels if sees_features else 0,
            sees="logits" if sees_features else "confidence",
            kernel_size=3 if sees_features else 1,
        )
        self.temperature_net = net.to(next(student.parameters()).device)
        self.temperature_optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
        self.label = SoftPseudoLabeler(net, threshold=recipe.threshold)

    def teach(self, teacher: SmallUNet, batch: Batch) -> str:
        with torch.no_grad():
            logits, features = self.see(teacher, batch.target_image)
        self.temperature_optimizer.zero_grad()
        cross_entropy(logits / self.temperature_net(logits, features), batch.target_label).backward()
        self.temperature_optimizer.step()
        with torch.no_grad():
            labels = self.label(logits, features=features)
        self.mixed_loss(batch, labels.soft_label, labels.weight).backward()
        return ""

    def see(self, teacher: SmallUNet, image: Tensor) -> Tuple[Tensor, Optional[Tensor]]:
        features = teacher.features(image)
        return teacher.logits(features), features if self.sees_features else None

    def temperature(self, teacher: SmallUNet, image: Tensor) -> Tensor:
        temperature: Tensor = self.temperature_net(*self.see(teacher, image))
        return temperature


def _of_the_demo(name: str, **options: Any) -> Method:
    return Method(OF_THE_DEMO[name].title, OF_THE_DEMO[name], **options)


METHODS: Dict[str, Method] = {
    "source-only": _of_the_demo("source-only"),
    "hard": _of_the_demo("hard", seeds=5, post_hoc=True),
    "soft": _of_the_demo("soft", seeds=5),
    "hard-weighted": Method(WeightedHardLabels.title, WeightedHardLabels),
    "soft-weighted": Method(WeightedSoftLabels.title, WeightedSoftLabels),
    "mbls": Method(MarginSmoothing.title, MarginSmoothing),
    "augcal": Method(AugCal.title, AugCal),
    "dacal-bilevel": _of_the_demo("dacal-bilevel", seeds=5),
    "dacal": _of_the_demo("dacal", seeds=5, post_hoc=True),
    "bound-fitted": Method(FittedToTruth.title, FittedToTruth, bound=True),
    "bound-features": Method(
        f"{FittedToTruth.title}, from logits and features", partial(FittedToTruth, sees_features=True), bound=True
    ),
    "bound-temperature": Method(TruthTemperature.title, TruthTemperature, bound=True),
    "bound-labels": Method(TrueLabels.title, TrueLabels, bound=True),
}
