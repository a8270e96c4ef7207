"""A whole self-training loop in plain PyTorch, with DA-Cal wrapped around it.

    python examples/plain_loop.py                      # hard labels, and one temperature at the end: half a minute on two cores
    python examples/plain_loop.py --learner bilevel    # soft labels, temperatures by the paper's meta-step; about a minute
    python examples/plain_loop.py --learner fit        # the same, temperatures fitted on blends of target images

It shows how to wrap a loop; how much that helps is what `dacal demo` and `benchmarks/` are for. Everything between the marks
is what this package adds. The data are small procedural pictures: discs on a background, bright on the source and dim on the
target.
"""

import argparse
import copy
from typing import Any, Dict, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dacal_addon import DACal, soft_cross_entropy
from dacal_addon.engines import ENGINES
from dacal_addon.learners import LEARNERS
from dacal_addon.metrics import CalibrationStats

CLASSES = 4


def pictures(n: int, domain: str, generator: torch.Generator, size: int = 32) -> Tuple[Tensor, Tensor]:
    """(n, 3, size, size) images and (n, size, size) labels: three discs, whose colour is their class, on grey."""
    rows, columns = torch.arange(size).view(1, size, 1).float(), torch.arange(size).view(1, 1, size).float()
    label = torch.zeros(n, size, size, dtype=torch.int64)
    for kind in range(1, CLASSES):
        y, x, r = (torch.rand(3, n, 1, 1, generator=generator) * torch.tensor([size, size, 6]).view(3, 1, 1, 1)).unbind()
        label[(rows - y) ** 2 + (columns - x) ** 2 < (r + 4) ** 2] = kind
    colour = torch.tensor([[0.5, 0.5, 0.5], [0.9, 0.3, 0.3], [0.3, 0.9, 0.3], [0.3, 0.3, 0.9]])
    image = colour[label].permute(0, 3, 1, 2)
    if domain == "target":
        image = 0.6 * (image + 0.7 * (image.mean(1, keepdim=True) - image)) + 0.1 * torch.tensor([1.0, 0.5, 0.0]).view(3, 1, 1)
    return image + 0.08 * torch.randn(image.shape, generator=generator), label


def network() -> nn.Sequential:
    def layer(inputs: int, outputs: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU())

    return nn.Sequential(layer(3, 16), layer(16, 16), layer(16, 16), nn.Conv2d(16, CLASSES, 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--learner", choices=tuple(LEARNERS), help="of the temperatures; default: none, labels are hard")
    parser.add_argument("--engine", choices=ENGINES, default="auto", help="of the meta-step")
    parser.add_argument("--iters", type=int, default=400, help="the meta-step waits for a quarter of them")
    parser.add_argument("--batch", type=int, default=8, help="images of each domain")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    student = network()
    teacher = copy.deepcopy(student)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)

    # DA-Cal: what to set up once. The default threshold, 0.968, is for students that train for 40,000 iterations.
    learner: Dict[str, Any] = {"learner": options.learner} if options.learner else {}
    if options.learner == "bilevel":
        learner.update(engine=options.engine, warmup=options.iters // 4)
    dacal = DACal(student, teacher, optimizer, num_classes=CLASSES, threshold=0.8, generator=generator, **learner)
    # DA-Cal: end

    print_every = max(1, options.iters // 8)
    for iteration in range(options.iters):
        source_image, source_label = pictures(options.batch, "source", generator)
        target_image, _ = pictures(options.batch, "target", generator)
        # DA-Cal: what to call at every iteration
        mixed = dacal(source_image, source_label, target_image)
        mixed_loss = soft_cross_entropy(student(mixed.image), mixed.soft_label, mixed.weight)
        # DA-Cal: end
        if options.learner and iteration % print_every == 0:
            loss, temperature = mixed.learned.outer_loss_before, mixed.labels.temperature
            done = f"loss on the judged set {loss:.4f}, T {temperature.min():.2f}..{temperature.max():.2f}"
            print(f"iteration {iteration}: {mixed.learned.skipped or done}")
        optimizer.zero_grad()
        (F.cross_entropy(student(source_image), source_label) + mixed_loss).backward()
        optimizer.step()

        with torch.no_grad():
            momentum = min(1 - 1 / (iteration + 1), 0.99)
            for mine, other in zip(teacher.parameters(), student.parameters()):
                mine.mul_(momentum).add_(other, alpha=1 - momentum)
            for copied, original in zip(teacher.buffers(), student.buffers()):
                copied.copy_(original)

    student.eval()
    report(student, options.seed)
    # DA-Cal: what to do once, at the end: held-out source images, and target images without labels
    found = dacal.calibrate(source=pictures(64, "source", generator), target=pictures(64, "target", generator)[0])
    # DA-Cal: end
    print(f"folded T = {found.temperature:.2f} into the last layer: {found.reason}")
    report(student, options.seed)


def report(student: nn.Module, seed: int) -> None:
    """Print the student's figures on target images that nothing has seen."""
    image, label = pictures(100, "target", torch.Generator().manual_seed(10_000 + seed))
    with torch.no_grad():
        logits = student(image)
    stats = CalibrationStats(logits.shape[1], input="logits")
    stats.update(logits, label)
    print(f"target mIoU {100 * stats.miou():.1f} %, ECE {100 * stats.ece():.2f} %")


if __name__ == "__main__":
    main()
