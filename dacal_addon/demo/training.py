"""The training loop: one start on the source alone, from which every method goes on alike, with an EMA teacher."""

import copy
import time
from contextlib import contextmanager
from typing import Any, Callable, Dict, Iterator, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..preserve import modes_kept
from ..progress import Progress
from .batches import batches
from .datasets import Dataset
from .methods import Teaching
from .network import SmallUNet
from .recipes import Recipe


class Start(NamedTuple):
    """The common starting point: a network trained on the source, and its optimizer's state."""

    student: SmallUNet
    optimizer_state: Dict[str, Any]


def train_start(
    dataset: Dataset,
    recipe: Recipe,
    *,
    seed: int,
    device: torch.device,
    make_network: Callable[..., SmallUNet] = SmallUNet,
) -> Start:
    """Train on the source alone, as far as all methods do.

    Args:
        make_network: `(num_classes, *, width, seed)` -> a network with the parts that `SmallUNet` has.
    """
    student = make_network(len(dataset.class_names), width=recipe.width, seed=seed).to(device)
    optimizer = _optimizer(student, recipe)
    with _seeded(seed), Progress("source, common start", recipe.source_iterations) as progress:
        for _, batch in zip(range(recipe.source_iterations), batches(dataset, recipe, seed=2 * seed, device=device)):
            optimizer.zero_grad()
            loss = F.cross_entropy(student(batch.source_strong), batch.source_label, ignore_index=255)
            loss.backward()
            optimizer.step()
            progress.advance(f"loss {loss.item():.3f}")
    return Start(student, optimizer.state_dict())


class Trained(NamedTuple):
    """One method's outcome."""

    student: SmallUNet
    teacher: SmallUNet
    teaching: Teaching
    seconds: float


def train(
    make_teaching: Callable[[SmallUNet, torch.optim.Optimizer, Recipe], Teaching],
    start: Start,
    dataset: Dataset,
    recipe: Recipe,
    *,
    seed: int,
    device: torch.device,
) -> Trained:
    """Go on from the common start for `recipe.iterations`.

    Args:
        make_teaching: one of `methods.METHODS`, or any other `(student, optimizer, recipe) -> Teaching`.
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
    if recipe.target_statistics and teaching.sees_target:
        for network in (student, teacher):
            take_statistics(network, dataset.target_train.image, device=device)
    return Trained(student, teacher, teaching, time.perf_counter() - begun)


def take_statistics(network: SmallUNet, image: Tensor, *, device: torch.device, batch: int = 10) -> None:
    """BatchNorm's running statistics anew, as the mean over batches of these images; modes stay.

    While self-training they mix those of source and mixed images (and, in the teacher, of the target's).

    Source: AdaBN (Li et al., 2016).
    """
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    try:
        with modes_kept(network), torch.no_grad():
            without_dropout(network)
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # the plain mean over the batches that follow
            for part in image.split(batch):
                network(part.to(device))
    finally:
        for norm, momentum in zip(norms, momenta):
            norm.momentum = momentum


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


def _optimizer(student: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    return torch.optim.AdamW(student.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Dropout draws from the global random state: seed it for a run, put it back afterwards."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
