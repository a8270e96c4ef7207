"""The loop of `plain_loop.py` as a LightningModule, with DA-Cal wrapped around it.

    pip install '.[lightning,torchmetrics]'
    python examples/lightning_loop.py                        # hard labels, and one temperature at the end
    python examples/lightning_loop.py --learner bilevel      # soft labels, temperatures by the paper's meta-step; or fit
    python examples/lightning_loop.py --devices 2            # two processes, whose metrics are summed

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
from plain_loop import (
    CLASSES,
    THRESHOLD,
    learner_options,
    material_to_fold,
    network,
    parse,
    pictures,
    report,
    unseen_pictures,
    update_teacher,
)
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from dacal_addon import DACal, soft_cross_entropy
from dacal_addon.integrations.torchmetrics import CalibrationMetric
from dacal_addon.metrics import CalibrationStats

Batch = Tuple[Tensor, Tensor, Tensor]


class Pictures(IterableDataset):  # type: ignore[type-arg]  # not subscriptable before torch 2
    """Source images and labels, and target images, without end."""

    def __init__(self, batch: int, seed: int) -> None:
        super().__init__()
        self.batch, self.seed = batch, seed

    def __iter__(self) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(self.seed)
        while True:
            yield (*pictures(self.batch, "source", generator), pictures(self.batch, "target", generator)[0])


class SelfTraining(lightning.LightningModule):
    """A student, its EMA teacher, and labels for the target: hard ones, or soft ones of a learner."""

    def __init__(self, learner: Optional[str], *, iters: int, batch: int, seed: int) -> None:
        super().__init__()
        self.student = network()
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.batch, self.seed = batch, seed
        self.stats = CalibrationStats(CLASSES, input="logits")
        self.ece = CalibrationMetric(CLASSES, input="logits", metric="ece")
        # DA-Cal: what to set up once. No submodule: Lightning's optimizers, DDP and summaries shall not see it.
        masks = torch.Generator().manual_seed(seed)
        options = {"generator": masks, **learner_options(learner, iters=iters)}
        self.dacal = DACal(self.student, self.teacher, num_classes=CLASSES, threshold=THRESHOLD, **options)
        # DA-Cal: end

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.student.parameters(), lr=1e-3)

    def train_dataloader(self) -> Any:
        # Every process draws its own pictures: Lightning cannot split a data set without end by itself.
        return DataLoader(Pictures(self.batch, 1000 * self.global_rank + self.seed), batch_size=None)

    # DA-Cal: the device and the optimizer are known now; the state goes with the checkpoint.
    def on_fit_start(self) -> None:
        optimizer: Any = self.optimizers()
        if self.dacal.learner is not None:
            self.dacal.learner.to(self.device)
            self.dacal.learner.use_optimizer(optimizer.optimizer)

    def on_save_checkpoint(self, checkpoint: Dict[str, Any]) -> None:
        checkpoint["dacal"] = self.dacal.state_dict()

    def on_load_checkpoint(self, checkpoint: Dict[str, Any]) -> None:
        if "dacal" in checkpoint:  # one of a training without DA-Cal has none
            self.dacal.load_state_dict(checkpoint["dacal"])

    # DA-Cal: end

    def training_step(self, batch: Batch, index: int) -> Tensor:
        source_image, source_label, target_image = batch
        # DA-Cal: what to call at every iteration
        mixed = self.dacal(source_image, source_label, target_image)
        mixed_loss: Tensor = soft_cross_entropy(self.student(mixed.image), mixed.soft_label, mixed.weight)
        # DA-Cal: end
        if mixed.learned.skipped is None:
            self.log("temperature", mixed.learned.temperature_mean, prog_bar=True)
        return F.cross_entropy(self.student(source_image), source_label) + mixed_loss

    def on_train_batch_end(self, outputs: Any, batch: Batch, index: int) -> None:
        update_teacher(self.teacher, self.student, self.global_step)

    def on_train_end(self) -> None:
        # BatchNorm's statistics are each process's own: from here on all have the first one's, and find the same temperature.
        self.student.load_state_dict(self.trainer.strategy.broadcast(self.student.state_dict()))

    def validation_step(self, batch: Tuple[Tensor, Tensor], index: int) -> None:
        logits = self.student(batch[0])
        self.ece.update(logits, batch[1])
        self.log("target ECE", self.ece)  # summed over the processes at the end of the epoch, and reset
        self.stats.update(logits, batch[1])

    def on_validation_epoch_end(self) -> None:
        self.stats.sync()  # everybody's from here on; without it, these would be this process's images
        # Of all images and equal in all processes, so that Lightning's advice, sync_dist=True (the mean), is not needed.
        self.log("target mIoU", self.stats.miou())
        self.stats.reset()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--devices", type=int, default=1, help="processes, each on a device of its own or all on the CPU")
    parser.add_argument("--checkpoint", help="where to save the end of the training")
    parser.add_argument("--resume", help="a checkpoint to continue")
    options = parse(parser)
    lightning.seed_everything(options.seed)
    trainer = lightning.Trainer(
        max_steps=options.iters,
        accelerator="auto",
        devices=options.devices,
        strategy="ddp" if options.devices > 1 else "auto",
        logger=False,
        enable_checkpointing=False,
    )
    module = SelfTraining(options.learner, iters=options.iters, batch=options.batch, seed=options.seed)
    trainer.fit(module, ckpt_path=options.resume)
    if options.checkpoint:
        trainer.save_checkpoint(options.checkpoint)
    before = judge(trainer, module)
    # DA-Cal: what to do once, at the end, and after the checkpoint, since training goes on from a student without it
    found = module.dacal.calibrate(**material_to_fold(options.labelled, options.seed))
    # DA-Cal: end
    after = judge(trainer, module)
    if trainer.is_global_zero:
        report("as trained", *before)
        print(f"folded T = {found.temperature:.2f} into the last layer: {found.reason}")
        report("after fold", *after)


def judge(trainer: lightning.Trainer, module: SelfTraining) -> Tuple[float, float]:
    """mIoU and ECE on the test pictures of all processes, fractions."""
    # With several processes Lightning gives each its share, and some images twice where their number cannot be divided.
    images = DataLoader(TensorDataset(*unseen_pictures(module.seed)), batch_size=10)
    (found,) = trainer.validate(module, images, verbose=False)
    return found["target mIoU"], found["target ECE"]


if __name__ == "__main__":
    main()
