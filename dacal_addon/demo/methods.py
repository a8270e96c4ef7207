"""What the student is taught: the source alone, or on the target hard labels or soft ones with learned temperatures besides.

DACS (Tranheden et al., WACV 2021) with DAFormer's pixel weights. `benchmarks/cells.py` trains its other methods in the same
loop, as further `Teaching`s.
"""

from typing import Dict, Type

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import BilevelCalibrationStep, MetaTemperatureNet, SoftPseudoLabeler, soft_cross_entropy
from ..mixing import mix
from ..pseudo_labels import one_hot
from .batches import Batch
from .network import SmallUNet
from .recipes import Recipe


class Teaching:
    """What the student learns in one iteration. This one: the source alone."""

    title = "source only"
    sees_target = False
    """Whether it trains on target images."""

    def __init__(self, student: SmallUNet, optimizer: torch.optim.Optimizer, recipe: Recipe) -> None:
        self.student, self.optimizer, self.recipe = student, optimizer, recipe

    def source_loss(self, batch: Batch) -> Tensor:
        return F.cross_entropy(self.student(batch.source_strong), batch.source_label, ignore_index=255)

    def teach(self, teacher: SmallUNet, batch: Batch) -> str:
        """Add the gradient of everything else to the student's; returns a note for the progress bar."""
        return ""

    def mixed_loss(self, batch: Batch, label: Tensor, weight: Tensor) -> Tensor:
        """Of the student on the mixed image, for labels (N, C, H, W) and weights (N, H, W) of the target's pixels."""
        logits = self.student(mix(batch.mask, batch.source_strong, batch.target_strong))
        label, weight = mix(batch.mask, batch.source_label, label), mix(batch.mask, torch.ones_like(weight), weight)
        return self.loss_on_mixed(logits, label, weight)

    def loss_on_mixed(self, logits: Tensor, label: Tensor, weight: Tensor) -> Tensor:
        return soft_cross_entropy(logits, label, weight)


class HardLabels(Teaching):
    """The teacher's argmax on the target's pixels of the mixed image."""

    title = "hard pseudo-labels"
    sees_target = True
    weight = "ratio"
    """A mode of `confidence_weight`; this one is DAFormer's."""

    def teach(self, teacher: SmallUNet, batch: Batch) -> str:
        with torch.no_grad():
            labels = SoftPseudoLabeler(None, threshold=self.recipe.threshold, weight=self.weight)(teacher(batch.target_image))
            label = one_hot(labels.pseudo_label, labels.soft_label.shape[1])
        self.mixed_loss(batch, label, labels.weight).backward()
        return ""


class BilevelTemperatures(Teaching):
    """Soft labels whose temperatures the paper's bilevel step learns; the temperature net sees logits and features."""

    title = "DA-Cal, bilevel"
    sees_target = True

    def __init__(self, student: SmallUNet, optimizer: torch.optim.Optimizer, recipe: Recipe) -> None:
        super().__init__(student, optimizer, recipe)
        classes, features = student.head.out_channels, student.feature_channels
        defaults = BilevelCalibrationStep.defaults
        net = MetaTemperatureNet(classes, feature_channels=features, **defaults.net_options)
        self.temperature_net = net.to(next(student.parameters()).device)
        self.calibrate = BilevelCalibrationStep(
            student,
            SoftPseudoLabeler(self.temperature_net, threshold=recipe.threshold, weight="ratio"),
            optimizer=optimizer,
            meta_optimizer=torch.optim.Adam(self.temperature_net.parameters(), lr=defaults.learning_rate),
            engine="auto",
            warmup=recipe.meta_warmup,
            every=2,
            measure_before=False,
        )

    def teach(self, teacher: SmallUNet, batch: Batch) -> str:
        with torch.no_grad():
            features = teacher.features(batch.target_image)
            logits = teacher.logits(features)
        result = self.calibrate(
            batch.source_strong,
            batch.source_label,
            batch.target_strong,
            logits,
            mask=batch.mask,
            teacher_features=features,
            backward=True,
            generator=batch.generator,
        )
        return f"T {result.temperature_min:.2f}..{result.temperature_max:.2f}" if not result.skipped else ""


METHODS: Dict[str, Type[Teaching]] = {
    "source-only": Teaching,
    "hard": HardLabels,
    "bilevel": BilevelTemperatures,
}
