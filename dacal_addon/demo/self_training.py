"""The demo's training recipe: source-only, and self-training with hard, soft or DA-Cal's labels.

DACS (Tranheden et al., WACV 2021) with DAFormer's pixel weights, at the size of a two-core machine. All methods start from one
network trained on the source alone, and see the same images, augmentations and masks: each purpose has a random stream of
its own, so that results can be compared in pairs. (In a prototype a changed stream alone moved mIoU by 7 points.)
`benchmarks/uda.py` trains its other methods in the same loop, as further `Teaching`s.
"""

import copy
import time
from contextlib import contextmanager
from typing import Any, Callable, Dict, Iterator, NamedTuple, Optional, Type

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import BilevelCalibrationStep, MetaTemperatureNet, SoftPseudoLabeler, TemperatureFit, soft_cross_entropy
from ..metrics import CalibrationStats
from ..mixing import class_mask, mix
from ..progress import Progress
from ..pseudo_labels import one_hot
from .datasets import Dataset, Split
from .network import SmallUNet


class Recipe(NamedTuple):
    """The budget and the settings that all methods share."""

    source_iterations: int = 300
    iterations: int = 600
    batch: int = 4
    crop: int = 64
    """Width of the crops to train on, of the images' full height."""
    learning_rate: float = 2e-3
    """At the start; while self-training it falls to 0 linearly, as DAFormer's does."""
    weight_decay: float = 1e-2
    teacher_momentum: float = 0.99
    threshold: float = 0.9
    meta_warmup: int = 50
    width: int = 1
    """Of the network, see `SmallUNet`."""

    def scaled(self, iterations: int) -> "Recipe":
        """With another number of iterations; the phases keep their proportions, so that a short run still warms up."""
        share = iterations / self.iterations
        return self._replace(
            iterations=iterations,
            source_iterations=max(1, round(share * self.source_iterations)),
            meta_warmup=round(share * self.meta_warmup),
        )


RECIPES = {
    "streets": Recipe(),
    # Handwriting takes a network longer to learn: at 300 iterations it still sees background everywhere.
    "digits": Recipe(source_iterations=2500),
    "mitochondria": Recipe(),
}


class Batch(NamedTuple):
    """What one iteration knows, for N images of each domain."""

    source_label: Tensor
    """(N, H, W) int64."""
    source_image: Tensor
    """(N, 3, H, W) in 0..1, as all images."""
    target_image: Tensor
    source_strong: Tensor
    """The images after `augment`: what the student sees."""
    target_strong: Tensor
    mask: Tensor
    """(N, 1, H, W) bool, True = source pixel of the mixed image."""
    target_label: Tensor
    """(N, H, W) int64. For diagnostics and upper bounds alone; no method may train on it."""
    generator: torch.Generator
    """For what a method draws besides."""


class Teaching:
    """What the student learns in one iteration. This one: the source alone."""

    title = "source only"

    def __init__(self, student: SmallUNet, optimizer: torch.optim.Optimizer, recipe: Recipe) -> None:
        self.student, self.optimizer, self.recipe = student, optimizer, recipe

    def source_loss(self, batch: Batch) -> Tensor:
        return F.cross_entropy(self.student(batch.source_strong), batch.source_label)

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

    def temperature(self, teacher: SmallUNet, image: Tensor) -> Optional[Tensor]:
        """(N, 1, H, W): what the method would divide the teacher's logits by; None where it has no such thing."""
        return None


class HardLabels(Teaching):
    """The teacher's argmax on the target's pixels of the mixed image."""

    title = "hard pseudo-labels"
    weight = "ratio"
    """A mode of `confidence_weight`; this one is DAFormer's."""

    def teach(self, teacher: SmallUNet, batch: Batch) -> str:
        with torch.no_grad():
            labels = SoftPseudoLabeler(None, threshold=self.recipe.threshold, weight=self.weight)(teacher(batch.target_image))
            label = one_hot(labels.pseudo_label, labels.soft_label.shape[1])
        self.mixed_loss(batch, label, labels.weight).backward()
        return ""


class SoftLabels(Teaching):
    """The teacher's softmax, T = 1."""

    title = "soft pseudo-labels, T = 1"
    weight = "ratio"

    def teach(self, teacher: SmallUNet, batch: Batch) -> str:
        with torch.no_grad():
            labels = SoftPseudoLabeler(None, threshold=self.recipe.threshold, weight=self.weight)(teacher(batch.target_image))
        self.mixed_loss(batch, labels.soft_label, labels.weight).backward()
        return ""


class Bilevel(Teaching):
    """Soft labels whose temperatures the paper's bilevel step learns; the temperature net sees logits and features."""

    title = "DA-Cal, bilevel"

    def __init__(self, student: SmallUNet, optimizer: torch.optim.Optimizer, recipe: Recipe) -> None:
        super().__init__(student, optimizer, recipe)
        classes, features = student.head.out_channels, student.feature_channels
        net = MetaTemperatureNet(classes, feature_channels=features, sees="logits", kernel_size=3)
        self.temperature_net = net.to(next(student.parameters()).device)
        self.calibrate = BilevelCalibrationStep(
            student,
            SoftPseudoLabeler(self.temperature_net, threshold=recipe.threshold, weight="ratio"),
            optimizer=optimizer,
            meta_optimizer=torch.optim.Adam(self.temperature_net.parameters(), lr=3e-4),
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

    def temperature(self, teacher: SmallUNet, image: Tensor) -> Tensor:
        features = teacher.features(image)
        temperature: Tensor = self.temperature_net(teacher.logits(features), features)
        return temperature


class DACal(Teaching):
    """Soft labels whose temperatures are fitted on blends of target images: the package's default."""

    title = "fitted temperatures"

    def __init__(self, student: SmallUNet, optimizer: torch.optim.Optimizer, recipe: Recipe) -> None:
        super().__init__(student, optimizer, recipe)
        net = MetaTemperatureNet(student.head.out_channels)
        self.temperature_net = net.to(next(student.parameters()).device)
        self.fit = TemperatureFit(net, torch.optim.Adam(net.parameters(), lr=2e-3))
        self.label = SoftPseudoLabeler(net, threshold=recipe.threshold)

    def teach(self, teacher: SmallUNet, batch: Batch) -> str:
        with torch.no_grad():
            logits = teacher(batch.target_image)
        self.fit_temperatures(teacher, batch, logits)
        with torch.no_grad():
            labels = self.label(logits)
        self.mixed_loss(batch, labels.soft_label, labels.weight).backward()
        return f"T {float(labels.temperature.min()):.2f}..{float(labels.temperature.max()):.2f}"

    def fit_temperatures(self, teacher: SmallUNet, batch: Batch, logits: Tensor) -> None:
        self.fit(teacher, batch.target_image, logits.argmax(1), generator=batch.generator)

    def temperature(self, teacher: SmallUNet, image: Tensor) -> Tensor:
        temperature: Tensor = self.temperature_net(teacher(image))
        return temperature


METHODS: Dict[str, Type[Teaching]] = {
    "source-only": Teaching,
    "hard": HardLabels,
    "soft": SoftLabels,
    "dacal-bilevel": Bilevel,
    "dacal": DACal,
}


class Trained(NamedTuple):
    """One method's outcome."""

    student: SmallUNet
    teacher: SmallUNet
    teaching: Teaching
    seconds: float


class Scores(NamedTuple):
    """One row of the table, all on the target's test images; fractions, NLL in nats."""

    miou: float
    accuracy: float
    confidence: float
    ece: float
    nll: float


def augment(image: Tensor, generator: torch.Generator) -> Tensor:
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


def batches(dataset: Dataset, recipe: Recipe, *, seed: int, device: torch.device) -> Iterator[Batch]:
    """Endless batches. The streams (which images, how augmented, which masks, what else) do not see each other's draws."""
    order, looks, masks, other = (torch.Generator().manual_seed(1000 * seed + i) for i in range(4))

    def draw(split: Split) -> Any:
        index = torch.randint(len(split.image), (recipe.batch,), generator=order)
        image, label = split.image[index], split.label[index]
        flip = torch.rand(recipe.batch, generator=order) < 0.5
        image = torch.where(flip.view(-1, 1, 1, 1), image.flip(-1), image)
        label = torch.where(flip.view(-1, 1, 1), label.flip(-1), label)
        spare = image.shape[-1] - recipe.crop
        if spare <= 0:
            return image, label
        lefts = torch.randint(spare + 1, (recipe.batch,), generator=order).tolist()
        crops = [slice(left, left + recipe.crop) for left in lefts]
        return tuple(torch.stack([one[..., crop] for one, crop in zip(x, crops)]) for x in (image, label))

    while True:
        source_image, source_label = draw(dataset.source_train)
        target_image, target_label = draw(dataset.target_train)
        source_label = source_label.to(device)
        yield Batch(
            source_label,
            source_image.to(device),
            target_image.to(device),
            augment(source_image, looks).to(device),
            augment(target_image, looks).to(device),
            class_mask(source_label, generator=masks),
            target_label.to(device),
            other,
        )


def _optimizer(student: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    return torch.optim.AdamW(student.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)


class Start(NamedTuple):
    """The common starting point: a network trained on the source, and its optimizer's state."""

    student: SmallUNet
    optimizer_state: Dict[str, Any]


def train_start(dataset: Dataset, recipe: Recipe, *, seed: int, device: torch.device) -> Start:
    """Train on the source alone, as far as all methods do."""
    student = SmallUNet(len(dataset.class_names), width=recipe.width, seed=seed).to(device)
    optimizer = _optimizer(student, recipe)
    with _seeded(seed), Progress("source, common start", recipe.source_iterations) as progress:
        for _, batch in zip(range(recipe.source_iterations), batches(dataset, recipe, seed=2 * seed, device=device)):
            optimizer.zero_grad()
            loss = F.cross_entropy(student(batch.source_strong), batch.source_label)
            loss.backward()
            optimizer.step()
            progress.advance(f"loss {loss.item():.3f}")
    return Start(student, optimizer.state_dict())


def train(
    make_teaching: Callable[..., Teaching], start: Start, dataset: Dataset, recipe: Recipe, *, seed: int, device: torch.device
) -> Trained:
    """Go on from the common start for `recipe.iterations`.

    Args:
        make_teaching: one of `METHODS`, or any other `(student, optimizer, recipe) -> Teaching`.
    """
    student = copy.deepcopy(start.student).train()
    teacher = without_dropout(copy.deepcopy(start.student))
    optimizer = _optimizer(student, recipe)
    optimizer.load_state_dict(copy.deepcopy(start.optimizer_state))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: 1 - done / recipe.iterations)
    teaching = make_teaching(student, optimizer, recipe)
    begun = time.perf_counter()
    with _seeded(seed), Progress(teaching.title, recipe.iterations) as progress:
        for _, batch in zip(range(recipe.iterations), batches(dataset, recipe, seed=2 * seed + 1, device=device)):
            optimizer.zero_grad()
            loss = teaching.source_loss(batch)
            loss.backward()
            note = teaching.teach(teacher, batch)
            optimizer.step()
            schedule.step()
            update_teacher(teacher, student, recipe.teacher_momentum)
            progress.advance(f"loss {loss.item():.3f} {note}")
    return Trained(student, teacher, teaching, time.perf_counter() - begun)


def without_dropout(teacher: SmallUNet) -> SmallUNet:
    """In training mode, but for dropout: as DAFormer's teacher labels its images."""
    teacher.train()
    teacher.dropout.eval()
    return teacher


def update_teacher(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """Teacher parameters to their exponential moving average; buffers (BatchNorm's statistics) are copied."""
    with torch.no_grad():
        for mine, other in zip(teacher.parameters(), student.parameters()):
            mine.mul_(momentum).add_(other, alpha=1 - momentum)
        for copied, original in zip(teacher.buffers(), student.buffers()):
            copied.copy_(original)


def predict(network: nn.Module, image: Tensor, *, device: torch.device) -> Tensor:
    """Logits (N, C, H, W) of many images, on the CPU, in evaluation mode; the modes are put back."""
    return evaluated(network, network, image, device=device)


def temperature_of(teaching: Teaching, network: SmallUNet, image: Tensor, *, device: torch.device) -> Optional[Tensor]:
    """The temperatures (N, 1, H, W) that a network's logits would get, were it the teacher; None where there are none."""
    if type(teaching).temperature is Teaching.temperature:
        return None
    return evaluated(network, lambda part: teaching.temperature(network, part), image, device=device)


def evaluated(network: nn.Module, function: Callable[[Tensor], Any], image: Tensor, *, device: torch.device) -> Tensor:
    """A function of many images that runs the network: 25 at a time, in evaluation mode, the results on the CPU."""
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        with torch.no_grad():
            return torch.cat([function(part.to(device)).cpu() for part in image.split(25)])
    finally:
        for module, training in modes.items():
            module.training = training


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
