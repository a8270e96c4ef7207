"""A whole self-training loop in plain PyTorch, with DA-Cal wrapped around it.

    python examples/plain_loop.py                      # hard labels, and one temperature at the end: 20 seconds on one core
    python examples/plain_loop.py --learner fit        # soft labels, temperatures fitted on blends of target images: 30 seconds
    python examples/plain_loop.py --learner bilevel    # soft labels, temperatures by the paper's meta-step: a minute

It prints mIoU and calibration error (ECE) of the trained student on target images that nothing has seen, before and after one
temperature is folded into its last layer. `examples/README.md` has these figures for several seeds.

Everything between the marks is what this package adds. The data are small procedural pictures: discs on a background, bright on
the source and dim on the target.
"""

import argparse
import copy
from typing import Any, Dict, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dacal_addon import DACal, soft_cross_entropy
from dacal_addon.engines import ENGINES
from dacal_addon.learners import LEARNERS
from dacal_addon.metrics import CalibrationStats

CLASSES = 4
THRESHOLD = 0.8
"""Below which the teacher's confidence counts for nothing. The default, 0.968, is for students that train for 40,000
iterations."""
TEST_IMAGES = 100
Pictures = Tuple[Tensor, Tensor]


def pictures(n: int, domain: str, generator: torch.Generator, size: int = 32) -> Pictures:
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


def unseen_pictures(seed: int) -> Pictures:
    """Target images that neither training nor the fold sees."""
    return pictures(TEST_IMAGES, "target", torch.Generator().manual_seed(10_000 + seed))


def network() -> nn.Sequential:
    def layer(inputs: int, outputs: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU())

    return nn.Sequential(layer(3, 16), layer(16, 16), layer(16, 16), nn.Conv2d(16, CLASSES, 1))


def update_teacher(teacher: nn.Module, student: nn.Module, iteration: int) -> None:
    """The teacher's parameters to the moving average of the student's; BatchNorm's statistics are copied."""
    momentum = min(1 - 1 / (iteration + 1), 0.99)
    with torch.no_grad():
        for mine, other in zip(teacher.parameters(), student.parameters()):
            mine.mul_(momentum).add_(other, alpha=1 - momentum)
        for copied, original in zip(teacher.buffers(), student.buffers()):
            copied.copy_(original)


def learner_options(learner: Optional[str], *, iters: int, engine: str = "auto") -> Dict[str, Any]:
    """What `DACal` is told of the learner; nothing where labels are hard."""
    if learner == "bilevel":  # its step would only sharpen the labels of an untrained student
        return {"learner": learner, "engine": engine, "warmup": iters // 4}
    return {"learner": learner} if learner else {}


def material_to_fold(labelled: int, seed: int) -> Dict[str, Any]:
    """What `DACal.calibrate` asks for: held-out source images with labels, target images without, and a few with labels."""
    generator = torch.Generator().manual_seed(20_000 + seed)
    found: Dict[str, Any] = {
        "source": pictures(64, "source", generator),
        "target": pictures(64, "target", generator)[0],
    }
    if labelled:
        found["labelled_target"] = pictures(labelled, "target", generator)
    return found


def report(when: str, miou: float, ece: float) -> None:
    print(f"{when:<10}  target mIoU {100 * miou:.1f} %, ECE {100 * ece:.2f} %")


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options that both loops have, in the words of `DACal`."""
    parser.add_argument("--learner", choices=tuple(LEARNERS), help="of the temperatures; default: none, labels are hard")
    parser.add_argument("--labelled", type=int, default=0, metavar="K", help="find the folded temperature with K target labels")
    parser.add_argument("--iters", type=int, default=400, help="the bilevel step waits for a quarter of them")
    parser.add_argument("--batch", type=int, default=8, help="images of each domain")
    parser.add_argument("--seed", type=int, default=0, help="of everything random")
    return parser.parse_args()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--engine", choices=ENGINES, default="auto", help="of the bilevel step")
    options = parse(parser)

    torch.manual_seed(options.seed)
    # One stream for the pictures and one for the masks: all learners see the same, so that they can be compared.
    drawn, masks = (torch.Generator().manual_seed(2 * options.seed + i) for i in range(2))
    student = network()
    teacher = copy.deepcopy(student)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)

    # DA-Cal: what to set up once
    learner = learner_options(options.learner, iters=options.iters, engine=options.engine)
    dacal = DACal(student, teacher, optimizer, num_classes=CLASSES, threshold=THRESHOLD, generator=masks, **learner)
    # DA-Cal: end

    print_every = max(1, options.iters // 8)
    for iteration in range(options.iters):
        source_image, source_label = pictures(options.batch, "source", drawn)
        target_image, _ = pictures(options.batch, "target", drawn)
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
        update_teacher(teacher, student, iteration)

    student.eval()
    report("as trained", *judge(student, options.seed))
    # DA-Cal: what to do once, at the end
    found = dacal.calibrate(**material_to_fold(options.labelled, options.seed))
    # DA-Cal: end
    print(f"folded T = {found.temperature:.2f} into the last layer: {found.reason}")
    report("after fold", *judge(student, options.seed))


def judge(student: nn.Module, seed: int) -> Tuple[float, float]:
    """mIoU and ECE on the test pictures, fractions."""
    image, label = unseen_pictures(seed)
    stats = CalibrationStats(CLASSES, input="logits")
    with torch.no_grad():
        stats.update(student(image), label)
    return stats.miou(), stats.ece()


if __name__ == "__main__":
    main()
