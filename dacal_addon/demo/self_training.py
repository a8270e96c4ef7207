"""The demo's training recipe: source-only, and self-training with hard, soft or DA-Cal's labels.

DACS (Tranheden et al., WACV 2021) with DAFormer's pixel weights, at the size of a two-core machine. All methods start from one
network trained on the source alone, and see the same images, augmentations and masks: each purpose has a random stream of
its own, so that results can be compared in pairs. (In a prototype a changed stream alone moved mIoU by 7 points.)
The teacher keeps its dropout, which DAFormer switches off.
"""

import copy
import time
from contextlib import contextmanager
from typing import Any, Dict, Iterator, NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import BilevelCalibrationStep, MetaTemperatureNet, SoftPseudoLabeler, soft_cross_entropy
from ..metrics import CalibrationStats
from ..mixing import class_mask, mix
from ..progress import Progress
from .datasets import Dataset, Split
from .network import SmallUNet

METHODS = ("source-only", "hard", "soft", "dacal")
TITLES = {
    "source-only": "source only",
    "hard": "hard pseudo-labels",
    "soft": "soft pseudo-labels, T = 1",
    "dacal": "DA-Cal",
}


class Recipe(NamedTuple):
    """The budget and the settings that all methods share, then those of DA-Cal."""

    source_iterations: int = 300
    iterations: int = 600
    batch: int = 4
    learning_rate: float = 2e-3
    weight_decay: float = 1e-2
    teacher_momentum: float = 0.99
    threshold: float = 0.9
    meta_learning_rate: float = 3e-4
    meta_warmup: int = 50
    meta_every: int = 2
    outer_set: str = "source_and_target_pixels"
    outer_loss: Any = "cross_entropy"
    use_features: bool = True


RECIPES = {
    "streets": Recipe(),
    # Handwriting takes a network longer to learn: at 300 iterations it still sees background everywhere.
    "digits": Recipe(source_iterations=1500, batch=8, learning_rate=1e-3),
}


class Trained(NamedTuple):
    """One method's outcome."""

    student: SmallUNet
    temperature_net: Optional[MetaTemperatureNet]
    seconds: float


class Scores(NamedTuple):
    """One row of the table, all on the target's test images; fractions, NLL in nats."""

    miou: float
    accuracy: float
    confidence: float
    ece: float
    nll: float


class _Batch(NamedTuple):
    source_label: Tensor
    target_image: Tensor
    source_strong: Tensor
    target_strong: Tensor
    generator: torch.Generator


def _augment(image: Tensor, generator: torch.Generator) -> Tensor:
    """Colour jitter and blur, each image by its own draw: DACS's strong augmentation."""
    n = image.shape[0]
    u = torch.rand(n, 8, generator=generator)
    brightness, contrast, saturation = ((0.75 + 0.5 * u[:, i]).view(n, 1, 1, 1) for i in range(3))
    tint = (0.94 + 0.12 * u[:, 3:6]).view(n, 3, 1, 1)
    image = image * brightness * tint
    mean = image.mean((1, 2, 3), keepdim=True)
    image = mean + contrast * (image - mean)
    grey = image.mean(1, keepdim=True)
    image = grey + saturation * (image - grey)
    sigma = 0.15 + u[:, 6]
    taps = torch.arange(-2.0, 3.0)
    kernel = torch.exp(-taps.pow(2) / (2 * sigma[:, None] ** 2))
    kernel = kernel / kernel.sum(1, keepdim=True)
    blur = kernel[:, :, None] * kernel[:, None, :]
    padded = F.pad(image.transpose(0, 1), (2, 2, 2, 2), mode="replicate")
    blurred = F.conv2d(padded, blur.unsqueeze(1), groups=n).transpose(0, 1)
    image = torch.where((u[:, 7] < 0.5).view(n, 1, 1, 1), blurred, image)
    return image.clamp(0.0, 1.0)


def _batches(dataset: Dataset, recipe: Recipe, *, seed: int, device: torch.device) -> Iterator[_Batch]:
    """Endless batches. The three streams (which images, how augmented, what else) do not see each other's draws."""
    order, looks, masks = (torch.Generator().manual_seed(1000 * seed + i) for i in range(3))

    def draw(split: Split) -> Any:
        index = torch.randint(len(split.image), (recipe.batch,), generator=order)
        image, label = split.image[index], split.label[index]
        flip = torch.rand(recipe.batch, generator=order) < 0.5
        return (
            torch.where(flip.view(-1, 1, 1, 1), image.flip(-1), image),
            torch.where(flip.view(-1, 1, 1), label.flip(-1), label),
        )

    while True:
        source_image, source_label = draw(dataset.source_train)
        target_image, _ = draw(dataset.target_train)
        yield _Batch(
            source_label.to(device),
            target_image.to(device),
            _augment(source_image, looks).to(device),
            _augment(target_image, looks).to(device),
            masks,
        )


def _optimizer(student: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    return torch.optim.AdamW(student.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)


class Start(NamedTuple):
    """The common starting point: a network trained on the source, and its optimizer's state."""

    student: SmallUNet
    optimizer_state: Dict[str, Any]
    seconds: float


def train_start(dataset: Dataset, recipe: Recipe, *, seed: int, device: torch.device) -> Start:
    """Train on the source alone, as far as all methods do."""
    student = SmallUNet(len(dataset.class_names), seed=seed).to(device)
    optimizer = _optimizer(student, recipe)
    begun = time.perf_counter()
    batches = _batches(dataset, recipe, seed=2 * seed, device=device)
    with _seeded(seed), Progress("source, common start", recipe.source_iterations) as progress:
        for _, batch in zip(range(recipe.source_iterations), batches):
            optimizer.zero_grad()
            loss = F.cross_entropy(student(batch.source_strong), batch.source_label)
            loss.backward()
            optimizer.step()
            progress.advance(f"loss {loss.item():.3f}")
    return Start(student, optimizer.state_dict(), time.perf_counter() - begun)


def train(method: str, start: Start, dataset: Dataset, recipe: Recipe, *, seed: int, device: torch.device) -> Trained:
    """Go on from the common start with one of `METHODS` for `recipe.iterations`."""
    student = copy.deepcopy(start.student).train()
    teacher = copy.deepcopy(start.student)
    optimizer = _optimizer(student, recipe)
    optimizer.load_state_dict(copy.deepcopy(start.optimizer_state))
    net: Optional[MetaTemperatureNet] = None
    calibrate: Optional[BilevelCalibrationStep] = None
    if method == "dacal":
        features = student.feature_channels if recipe.use_features else 0
        net = MetaTemperatureNet(len(dataset.class_names), feature_channels=features).to(device)
    labeler = SoftPseudoLabeler(net, threshold=recipe.threshold)
    if net is not None:
        calibrate = BilevelCalibrationStep(
            student,
            labeler,
            optimizer=optimizer,
            meta_optimizer=torch.optim.Adam(net.parameters(), lr=recipe.meta_learning_rate),
            outer_set=recipe.outer_set,
            outer_loss=recipe.outer_loss,
            warmup=recipe.meta_warmup,
            every=recipe.meta_every,
        )
    begun = time.perf_counter()
    batches = _batches(dataset, recipe, seed=2 * seed + 1, device=device)
    with _seeded(seed), Progress(TITLES[method], recipe.iterations) as progress:
        for _, batch in zip(range(recipe.iterations), batches):
            mask = class_mask(batch.source_label, generator=batch.generator)
            optimizer.zero_grad()
            loss = F.cross_entropy(student(batch.source_strong), batch.source_label)
            loss.backward()
            note = f"loss {loss.item():.3f}"
            if method != "source-only":
                with torch.no_grad():
                    teacher_features = teacher.features(batch.target_image)
                    logits = teacher.logits(teacher_features)
                shown = teacher_features if net is not None and recipe.use_features else None
                if calibrate is not None:
                    result = calibrate(
                        batch.source_strong, batch.source_label, batch.target_strong, logits, mask=mask, teacher_features=shown
                    )
                    note += f", T {result.temperature_min:.2f}..{result.temperature_max:.2f}" if not result.skipped else ""
                with torch.no_grad():
                    labels = labeler(logits, features=shown)
                target_label = labels.pseudo_label if method == "hard" else labels.soft_label
                mixed_image = mix(mask, batch.source_strong, batch.target_strong)
                mixed_label = mix(mask, batch.source_label, target_label)
                weight = mix(mask, torch.ones_like(labels.weight), labels.weight)
                mixed_logits = student(mixed_image)
                if method == "hard":
                    mixed_loss = (F.cross_entropy(mixed_logits, mixed_label, reduction="none") * weight).mean()
                else:
                    mixed_loss = soft_cross_entropy(mixed_logits, mixed_label, weight)
                mixed_loss.backward()
            optimizer.step()
            if method != "source-only":
                update_teacher(teacher, student, recipe.teacher_momentum)
            progress.advance(note)
    return Trained(student, net, time.perf_counter() - begun)


def update_teacher(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """Teacher parameters to their exponential moving average; buffers (BatchNorm's statistics) are copied."""
    with torch.no_grad():
        for mine, other in zip(teacher.parameters(), student.parameters()):
            mine.mul_(momentum).add_(other, alpha=1 - momentum)
        for copied, original in zip(teacher.buffers(), student.buffers()):
            copied.copy_(original)


def predict(student: nn.Module, image: Tensor, *, device: torch.device) -> Tensor:
    """Logits (N, C, H, W) of many images, on the CPU, in evaluation mode; the mode is put back."""
    training = student.training
    student.eval()
    with torch.no_grad():
        logits = torch.cat([student(part.to(device)).cpu() for part in image.split(25)])
    student.train(training)
    return logits


def score(logits: Tensor, label: Tensor) -> Scores:
    """The table's figures."""
    stats = CalibrationStats(logits.shape[1], input="logits")
    stats.update(logits, label)
    return Scores(stats.miou(), stats.accuracy(), stats.mean_confidence(), stats.ece(), stats.nll())


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Dropout draws from the global random state: seed it for a run, put it back afterwards."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
