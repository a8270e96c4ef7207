"""Self-training as in the hosts: the order of calls, the names, and who draws from which global random state."""

import random
from copy import deepcopy

import torch
from torch import nn

from mmseg.models import UDA
from mmseg.models.masks import get_class_masks, mixed, pseudo_labels
from mmseg.models.segmentors import EncoderDecoder, HRDAEncoderDecoder
from mmseg.models.uda.teacher import Teacher, update_ema


class MaskingConsistencyModule(nn.Module):
    def __init__(self, model, own_teacher):
        super().__init__()
        self.teacher = Teacher(model) if own_teacher else None


@UDA.register_module()
class DACS(nn.Module):
    def __init__(
        self, *, num_classes=4, kind="daformer", mask_mode=None, own_teacher=False, source_only=False, loss=None, **cfg
    ):
        super().__init__()
        student = (HRDAEncoderDecoder if kind == "hrda" else EncoderDecoder)(num_classes, **(loss or {}))
        self.model, self.ema_model = student, deepcopy(student)
        self.num_classes, self.mask_mode, self.source_only = num_classes, mask_mode, source_only
        self.mic = MaskingConsistencyModule(student, own_teacher) if mask_mode else None
        self.pseudo_threshold, self.psweight_ignore_top, self.psweight_ignore_bottom = 0.3, 1, 0
        self.local_iter, self.debug_img_interval, self.alpha = 0, float("nan"), 0.9
        self.train_cfg = {"work_dir": cfg.get("work_dir", "")}

    def get_model(self):
        return self.model

    def get_ema_model(self):
        return self.ema_model

    def train_step(self, data_batch, optimizer):
        optimizer.zero_grad()
        log_vars = self.forward_train(**data_batch)
        optimizer.step()
        return {"log_vars": log_vars}

    def _descend(self, losses, prefix, log_vars):
        losses.pop("features", None)
        values = {name: value.mean() for name, value in losses.items()}
        sum(value for name, value in values.items() if "loss" in name).backward()
        log_vars.update({prefix + name: value.item() for name, value in values.items()})

    def forward_train(self, img, img_metas, gt_semantic_seg, target_img, target_img_metas, valid_pseudo_mask=None):
        log_vars = {}
        update_ema(self.ema_model, self.model, self.local_iter, self.alpha)
        if self.mic is not None and self.mic.teacher is not None:
            self.mic.teacher.update_weights(self.model, self.local_iter)
        gain = random.uniform(0.9, 1.1)  # stands for colour jitter
        self._descend(self.get_model().forward_train(img, img_metas, gt_semantic_seg, return_feat=True), "", log_vars)
        for module in self.get_ema_model().modules():
            if isinstance(module, nn.Dropout2d):
                module.training = False
        logits = self.get_ema_model().generate_pseudo_label(target_img, target_img_metas)
        label, weight = pseudo_labels(logits, self.pseudo_threshold)
        weight[:, : self.psweight_ignore_top] = 0
        if valid_pseudo_mask is not None:
            weight = weight * valid_pseudo_mask.squeeze(1)
        masks = get_class_masks(gt_semantic_seg)
        m = torch.cat(masks)
        mixed_img = gain * mixed(m, img, target_img)
        mixed_label = mixed(m, gt_semantic_seg, label.unsqueeze(1))
        mixed_weight = mixed(m[:, 0], torch.ones(()), weight)
        losses = self.get_model().forward_train(mixed_img, img_metas, mixed_label, mixed_weight, return_feat=True)
        self._descend(losses, "mix.", log_vars)
        if self.mic is not None:
            self._descend(self._masked(img, gt_semantic_seg, target_img, label, weight), "masked.", log_vars)
        self.local_iter += 1
        return log_vars

    def _masked(self, img, gt, target_img, label, weight):
        if self.mic.teacher is not None:
            logits = self.mic.teacher.get_ema_model().generate_pseudo_label(target_img, None)
            label, weight = pseudo_labels(logits, self.pseudo_threshold)
        if self.mask_mode == "separate":
            images, weights = torch.stack([img[0], target_img[0]]), torch.stack([torch.ones_like(weight[0]), weight[0]])
            labels = torch.stack([gt[0], label[0].unsqueeze(0)])
        elif self.mask_mode.startswith("separatesrc"):
            images, labels, weights = img, gt, None
        else:
            images, labels, weights = target_img, label.unsqueeze(1), weight
        hidden = torch.rand(len(images), 1, *images.shape[-2:]) < 0.3
        return self.get_model().forward_train(images.masked_fill(hidden, 0.0), None, labels, seg_weight=weights)
