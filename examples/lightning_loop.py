"""The loop of `plain_loop.py` as a LightningModule, with DA-Cal wrapped around it.

    pip install -e '.[lightning,torchmetrics]'
    python examples/lightning_loop.py                       # twenty seconds on two cores
    python examples/lightning_loop.py --learner bilevel     # with temperatures that learn by the bilevel step

Lightning owns the loop, the backward pass, the optimizer's step, devices and checkpoints; DA-Cal needs three of its hooks: the
optimizer is known in `on_fit_start`, `training_step` calls it, and its state goes with the checkpoint.

With several processes each sees its own images. Two ways to log everybody's figures are shown: `CalibrationStats`, which has
everything and is summed by `sync`, and `CalibrationMetric`, one figure that Lightning sums and resets by itself.
"""

import argparse
import copy
from typing import Any, Dict, Iterator, Optional, Tuple

import lightning
import torch
import torch.nn.functional as F
from plain_loop import CLASSES, network, pictures
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from dacal_addon import DACal, soft_cross_entropy
from dacal_addon.integrations.torchmetrics import CalibrationMetric
from dacal_addon.learners import LEARNERS
from dacal_addon.metrics import CalibrationStats

Batch = Tuple[Tensor, Tensor, Tensor, Tensor]


class Pictures(IterableDataset):  # type: ignore[type-arg]  # not subscriptable before torch 2
    """Source images and labels, target images and (for the validation alone) labels, without end."""

    def __init__(self, batch: int, seed: int) -> None:
        super().__init__()
        self.batch, self.seed = batch, seed

    def __iter__(self) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(self.seed)
        while True:
            yield (*pictures(self.batch, "source", generator), *pictures(self.batch, "target", generator))


class SelfTraining(lightning.LightningModule):
    """A student, its EMA teacher, and labels for the target: hard ones, or soft ones of a learner."""

    def __init__(self, learner: Optional[str], warmup: int) -> None:
        super().__init__()
        self.student = network()
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.stats = CalibrationStats(CLASSES, input="logits")
        self.ece = CalibrationMetric(CLASSES, input="logits", metric="ece")
        # DA-Cal: what to set up once. No submodule: Lightning's optimizers, DDP and summaries shall not see it.
        options: Dict[str, Any] = {"learner": learner, "warmup": warmup} if learner else {}
        self.dacal = DACal(self.student, self.teacher, num_classes=CLASSES, threshold=0.8, **options)
        # DA-Cal: end

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.student.parameters(), lr=1e-3)

    # DA-Cal: the device and the optimizer are known now; the state goes with the checkpoint.
    def on_fit_start(self) -> None:
        optimizer: Any = self.optimizers()
        if self.dacal.learner is not None:
            self.dacal.learner.to(self.device)
            self.dacal.learner.use_optimizer(optimizer.optimizer)

    def on_save_checkpoint(self, checkpoint: Dict[str, Any]) -> None:
        checkpoint["dacal"] = self.dacal.state_dict()

    def on_load_checkpoint(self, checkpoint: Dict[str, Any]) -> None:
        self.dacal.load_state_dict(checkpoint["dacal"])

    # DA-Cal: end

    def training_step(self, batch: Batch, index: int) -> Tensor:
        source_image, source_label, target_image, _ = batch
        # DA-Cal: what to call at every iteration
        mixed = self.dacal(source_image, source_label, target_image)
        mixed_loss: Tensor = soft_cross_entropy(self.student(mixed.image), mixed.soft_label, mixed.weight)
        # DA-Cal: end
        if mixed.learned.skipped is None:
            self.log("temperature", mixed.learned.temperature_mean, prog_bar=True)
        return F.cross_entropy(self.student(source_image), source_label) + mixed_loss

    def on_train_batch_end(self, outputs: Any, batch: Batch, index: int) -> None:
        momentum = min(1 - 1 / (self.global_step + 1), 0.99)
        with torch.no_grad():
            for mine, other in zip(self.teacher.parameters(), self.student.parameters()):
                mine.mul_(momentum).add_(other, alpha=1 - momentum)
            for copied, original in zip(self.teacher.buffers(), self.student.buffers()):
                copied.copy_(original)

    def validation_step(self, batch: Batch, index: int) -> None:
        logits = self.student(batch[2])
        self.ece.update(logits, batch[3])
        self.log("target ECE", self.ece)  # summed over the processes at the end of the epoch, and reset
        self.stats.update(logits, batch[3])

    def on_validation_epoch_end(self) -> None:
        self.stats.sync()  # everybody's from here on; without it, these would be the first process's images
        self.log("target mIoU", self.stats.miou())
        self.stats.reset()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--learner", choices=tuple(LEARNERS), help="of the temperatures; default: none, labels are hard")
    parser.add_argument("--iters", type=int, default=400, help="iterations, of which the first quarter is the warm-up")
    parser.add_argument("--batch", type=int, default=8, help="images of each domain")
    parser.add_argument("--checkpoint", help="where to save the end of the run")
    parser.add_argument("--resume", help="a checkpoint to continue")
    options = parser.parse_args()
    lightning.seed_everything(0)
    trainer = lightning.Trainer(
        max_steps=options.iters, accelerator="auto", devices=1, logger=False, enable_checkpointing=False, limit_val_batches=10
    )
    module = SelfTraining(options.learner, options.iters // 4)
    train, validation = (DataLoader(Pictures(options.batch, seed), batch_size=None) for seed in (0, 10_000))
    trainer.fit(module, train, ckpt_path=options.resume)
    if options.checkpoint:
        trainer.save_checkpoint(options.checkpoint)
    (found,) = trainer.validate(module, validation, verbose=False)
    print(f"target mIoU {100 * found['target mIoU']:.1f} %")
    print(f"target ECE  {100 * found['target ECE']:.2f} %")


if __name__ == "__main__":
    main()
