"""Forks of the hosts in small: none needs the hosts' `DACS`, and each calls its student or its teacher in another way."""

from copy import deepcopy

import torch
from torch import nn

from mmseg.models import UDA
from mmseg.models.masks import get_class_masks, mixed, pseudo_labels
from mmseg.models.segmentors import EncoderDecoder, LevelsEncoderDecoder, StagedEncoderDecoder
from mmseg.models.uda.teacher import Teacher, update_ema


@UDA.register_module()
class Fork(nn.Module):
    """What they have in common."""

    def __init__(self, *, num_classes=4, student=EncoderDecoder, loss=None, max_norm=None, **cfg):
        super().__init__()
        self.model = student(num_classes, **(loss or {}))
        self.num_classes, self.local_iter, self.debug_img_interval = num_classes, 0, float("nan")
        self.max_norm = max_norm
        self.make_teacher()

    def make_teacher(self):
        self.ema_model = deepcopy(self.model)
        self.pseudo_threshold, self.psweight_ignore_top, self.psweight_ignore_bottom = 0.3, 1, 0

    def get_model(self):
        return self.model

    def get_ema_model(self):
        return self.ema_model

    def train_step(self, data_batch, optimizer):
        optimizer.zero_grad()
        log_vars = self.forward_train(**data_batch)
        if self.max_norm is not None:  # as DIFF
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.max_norm)
        optimizer.step()
        return {"log_vars": log_vars}

    def forward_train(self, img, img_metas, gt_semantic_seg, target_img, target_img_metas, **extra):
        log_vars = {}
        self.update_teacher()
        self._descend(self.source_losses(img, img_metas, gt_semantic_seg), "", log_vars)
        label, weight = self.teacher_labels(target_img, target_img_metas)
        m = torch.cat(get_class_masks(gt_semantic_seg))
        arguments = mixed(m, img, target_img), img_metas, mixed(m, gt_semantic_seg, label.unsqueeze(1))
        self._descend(self.mixed_losses(*arguments, mixed(m[:, 0], torch.ones(()), weight)), "mix.", log_vars)
        self.local_iter += 1
        return log_vars

    def _descend(self, losses, prefix, log_vars):
        losses.pop("features", None)
        sum(value.mean() for name, value in losses.items() if "loss" in name).backward()
        log_vars.update({prefix + name: value.mean().item() for name, value in losses.items()})

    def update_teacher(self):
        update_ema(self.ema_model, self.model, self.local_iter, 0.9)

    def teacher_labels(self, img, metas):
        return self._labels(self.ema_model.encode_decode(img, metas), img)

    def _labels(self, logits, img):
        logits = nn.functional.interpolate(logits, size=img.shape[2:], mode="bilinear", align_corners=False)
        label, weight = pseudo_labels(logits, self.pseudo_threshold)
        weight[:, : self.psweight_ignore_top] = 0
        return label, weight

    def source_losses(self, img, metas, label):
        return self.model.forward_train(img, metas, label, return_feat=True)

    def mixed_losses(self, img, metas, label, weight):
        return self.model.forward_train(img, metas, label, weight, return_feat=True)


@UDA.register_module()
class gta2csDACS(Fork):
    """CoDA's: another name and module, more images, an argument of its own for the student and the teacher."""

    def __init__(self, **cfg):
        super().__init__(student=LevelsEncoderDecoder, **cfg)

    def forward_train(self, img, img_metas, gt_semantic_seg, target_img, target_img_metas, night_img=None, **extra):
        assert night_img is not None
        return super().forward_train(img, img_metas, gt_semantic_seg, target_img, target_img_metas)

    def teacher_labels(self, img, metas):
        return self._labels(self.ema_model.encode_decode(img, metas, levels=1), img)

    def mixed_losses(self, img, metas, label, weight):
        return self.model.forward_train(img, metas, label, seg_weight=weight, levels=1)


@UDA.register_module()
class PiPa(Fork):
    """A stage comes before the student's image; the teacher also returns features."""

    def __init__(self, **cfg):
        super().__init__(student=StagedEncoderDecoder, **cfg)

    def teacher_labels(self, img, metas):
        logits, _ = self.ema_model.encode_decode(img, metas)
        return self._labels(logits, img)

    def source_losses(self, img, metas, label):
        return self.model.forward_train(1, img, metas, label, return_feat=True)

    def mixed_losses(self, img, metas, label, weight):
        return self.model.forward_train(2, img, metas, label, weight)


@UDA.register_module()
class SiamSeg(Fork):
    """The teacher is a module around the network, and has the thresholds; the student is entered through `forward`."""

    def make_teacher(self):
        self.ema_model = Teacher(self.model)

    def update_teacher(self):
        self.ema_model.update_weights(self.model, self.local_iter)

    def teacher_labels(self, img, metas):
        return self.ema_model.labels(img, metas)

    def source_losses(self, img, metas, label):
        return self.model.forward(img, metas, gt_semantic_seg=label, return_feat=True)

    def mixed_losses(self, img, metas, label, weight):
        return self.model.forward(img, metas, gt_semantic_seg=label, seg_weight=weight, return_feat=True)
