"""A training loop in the shape of UniMatch V2 and its kin, with DA-Cal's labels and its temperature at the end.

    python examples/unimatch/loop.py                        # hard labels, and one temperature at the end: under a minute
    python examples/unimatch/loop.py --learner fit          # soft labels, temperatures fitted on blends of target images
    python examples/unimatch/loop.py --learner bilevel      # the same by the paper's meta-step, on this loop's own loss
    python examples/unimatch/loop.py --ranks 2 --bf16       # two processes under DDP (gloo), the networks in bfloat16

Two strong views of each target image, into each of which a box of another target image is cut; an EMA teacher that sees the
weak view; targets of several sizes, padded, so that every view has a padding mask of its own; complementary dropout: of every
feature channel one view loses what the other one keeps. Everything between the marks is what this package adds. The data are
one of the demo's, made on the spot.
"""

import argparse
import copy
import socket
from contextlib import nullcontext
from functools import partial
from typing import Any, Dict, List, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from dacal_addon import DACal, mixed_views_loss
from dacal_addon.demo.batches import augment
from dacal_addon.demo.datasets import NAMES, Dataset, Split, hold_out_source, load_dataset
from dacal_addon.demo.network import SmallUNet
from dacal_addon.learners import LEARNERS
from dacal_addon.learners.learner import Labelling
from dacal_addon.metrics import CalibrationStats
from dacal_addon.mixing import cut_mask, mix


class Network(SmallUNet):
    """With complementary dropout of the features, on demand."""

    def forward(self, image: Tensor, comp_drop: bool = False) -> Tensor:
        features = self.features(image)
        if comp_drop:  # the first half of the batch is one view, the second the other
            kept = 2.0 * (torch.rand(len(image) // 2, features.shape[1], 1, 1) < 0.5).to(features)
            features = features * torch.cat((kept, 2.0 - kept))
        return self.logits(features)


def draw(split: Split, n: int, width: int, generator: torch.Generator) -> Tuple[Tensor, Tensor]:
    """Crops of `n` images and labels."""
    index = torch.randint(len(split.image), (n,), generator=generator)
    left = int(torch.randint(split.image.shape[-1] - width + 1, (1,), generator=generator))
    return split.image[index][..., left : left + width], split.label[index][..., left : left + width]


def padded(image: Tensor, generator: torch.Generator) -> Tuple[Tensor, Tensor]:
    """Each image at a scale of its own, padded at the right and below; and where it is no padding, (N, H, W) bool."""
    result, valid = torch.zeros_like(image), torch.zeros(len(image), *image.shape[2:], dtype=torch.bool)
    for i, scale in enumerate((0.75 + 0.25 * torch.rand(len(image), generator=generator)).tolist()):
        size = [round(scale * side) for side in image.shape[2:]]
        small = F.interpolate(image[i : i + 1], size=size, mode="bilinear", align_corners=False)
        result[i, :, : size[0], : size[1]], valid[i, : size[0], : size[1]] = small[0], True
    return result, valid


def loss_on_views(f: Any, label: Labelling, *, views: Tensor, boxes: List[Tensor], logits: Tensor, valid: Tensor) -> Tensor:
    """The loop's own loss: what `f`, the student, says of all views, against the labels of the images in them."""
    return mixed_views_loss(f(views, comp_drop=True), label(logits, valid=valid), boxes)


def train(rank: int, port: int, options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    if options.ranks > 1:
        address = f"tcp://127.0.0.1:{port}"
        torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=options.ranks)
    images = load_dataset(options.dataset, seed=options.seed, train_images=options.images, test_images=40)
    dataset, held_out = hold_out_source(images)
    classes, width = len(dataset.class_names), min(64, dataset.source_train.image.shape[-1])

    torch.manual_seed(options.seed)  # of dropout
    network: nn.Module = Network(classes, seed=options.seed)
    teacher = copy.deepcopy(network).eval()
    student = DistributedDataParallel(network) if options.ranks > 1 else network
    optimizer = torch.optim.AdamW(student.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(1000 * options.seed + rank)  # each rank has its own images

    # DA-Cal: what to set up once
    learner: Dict[str, Any] = {"learner": options.learner} if options.learner else {}
    if options.learner == "bilevel":
        learner.update(warmup=options.iters // 2, every=4)
    dacal = DACal(network, teacher, optimizer, num_classes=classes, weight="threshold", threshold=options.threshold, **learner)
    # DA-Cal: end

    for iteration in range(options.iters):
        source_image, source_label = draw(dataset.source_train, options.batch // options.ranks, width, generator)
        target_image, valid = padded(draw(dataset.target_train, options.batch // options.ranks, width, generator)[0], generator)
        strong = [augment(target_image, generator) for _ in range(2)]
        boxes = [cut_mask(valid.shape, generator=generator, share=(0.02, 0.4)) for _ in strong]
        views = torch.cat([mix(box, view.flip(0), view) for box, view in zip(boxes, strong)])
        with torch.autocast("cpu", torch.bfloat16) if options.bf16 else nullcontext():
            with torch.no_grad():
                logits = teacher(target_image)

            # DA-Cal: what to call at every iteration
            own_loss = partial(loss_on_views, views=views, boxes=boxes, logits=logits, valid=valid)
            learned = dacal.learn(source_image, source_label, target_image, logits, valid=valid, own_loss=own_loss)
            loss = F.cross_entropy(student(augment(source_image, generator)), source_label, ignore_index=255)
            share = min(1.0, 2 * iteration / options.iters)  # an untrained teacher's labels are no good
            loss = loss + share * own_loss(student, dacal.label)
            # DA-Cal: end
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            momentum = min(1 - 1 / (iteration + 1), 0.97)
            for mine, other in zip(teacher.parameters(), network.parameters()):
                mine.mul_(momentum).add_(other, alpha=1 - momentum)
            for copied, original in zip(teacher.buffers(), network.buffers()):
                copied.copy_(original)
        if rank == 0 and iteration % max(1, options.iters // 5) == 0:
            note = learned.skipped or f"temperatures {learned.temperature_mean:.2f} on average"
            print(f"iteration {iteration}: loss {loss:.3f}; {note}", flush=True)

    if rank == 0:
        report("as trained", network, dataset)
    # DA-Cal: what to do once, at the end: held-out source images, and target images without labels
    found = dacal.calibrate(source=tuple(held_out), target=dataset.target_train.image[:32], layer="head")
    # DA-Cal: end
    if rank == 0:
        print(f"folded T = {found.temperature:.2f} into the last layer: {found.reason}")
        report("after fold", network, dataset)
    if options.ranks > 1:
        torch.distributed.destroy_process_group()


def report(when: str, network: nn.Module, dataset: Dataset) -> None:
    """Print a network's figures on target images that nothing has seen."""
    network.eval()
    stats = CalibrationStats(len(dataset.class_names), input="logits")
    with torch.no_grad():
        for image, label in zip(dataset.target_test.image.split(10), dataset.target_test.label.split(10)):
            stats.update(network(image), label)
    print(f"{when}  target mIoU {100 * stats.miou():.1f} %, ECE {100 * stats.ece():.2f} %", flush=True)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def main(arguments: List[str]) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--learner", choices=tuple(LEARNERS), help="of the temperatures; default: none, labels are hard")
    parser.add_argument("--dataset", choices=NAMES, default="streets")
    parser.add_argument("--images", type=int, default=64, help="to train on, of each domain")
    parser.add_argument("--iters", type=int, default=300)
    parser.add_argument("--batch", type=int, default=2, help="images of each domain, of all processes together")
    parser.add_argument("--threshold", type=float, default=0.9, help="the teacher's confidence from which on a label counts")
    parser.add_argument("--ranks", type=int, default=1, help="processes")
    parser.add_argument("--bf16", action="store_true", help="the networks in bfloat16 autocast")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if options.ranks == 1:
        train(0, 0, options)
    else:
        spawn(train, (free_port(), options), nprocs=options.ranks)


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
