"""Students: an encoder, and a decode head that computes its own losses from hard labels."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

pictures = []
"""Every debug image that a head has made."""


def cross_entropy(pred, label, weight=None, class_weight=None, reduction="mean", avg_factor=None, ignore_index=-100):
    loss = F.cross_entropy(pred, label, weight=class_weight, reduction="none", ignore_index=ignore_index)
    if weight is not None:
        loss = loss * weight.float()
    if avg_factor is not None and reduction == "mean":
        return loss.sum() / avg_factor
    return {"mean": torch.mean, "sum": torch.sum, "none": lambda x: x}[reduction](loss)


class CrossEntropyLoss(nn.Module):
    def __init__(self, *, loss_weight=1.0, class_weight=None, use_sigmoid=False):
        super().__init__()
        self.loss_weight, self.class_weight, self.use_sigmoid = loss_weight, class_weight, use_sigmoid
        self.cls_criterion = cross_entropy

    def forward(self, pred, label, weight=None, **options):
        class_weight = None if self.class_weight is None else pred.new_tensor(self.class_weight)
        return self.loss_weight * self.cls_criterion(pred, label, weight, class_weight=class_weight, **options)


class DecodeHead(nn.Module):
    def __init__(self, channels, num_classes, **loss):
        super().__init__()
        self.dropout = nn.Dropout2d(0.3)
        self.conv_seg = nn.Conv2d(channels, num_classes, 1)
        self.loss_decode = CrossEntropyLoss(**loss)
        self.debug, self.debug_output = False, {}

    def forward(self, x):
        return self.conv_seg(self.dropout(x))

    def forward_train(self, x, label, weight):
        return self.losses(self(x), label, weight)

    def losses(self, logits, label, weight):
        logits = F.interpolate(logits, size=label.shape[2:], mode="bilinear", align_corners=False)
        loss = self.loss_decode(logits, label.squeeze(1), weight=weight, ignore_index=255)
        accuracy = (logits.argmax(1) == label.squeeze(1)).float().mean() * 100
        if self.debug:
            self.debug_output = {"Pred": logits.detach().numpy()}
            pictures.append("Pred")
        return {"loss_seg": loss, "acc_seg": accuracy}


class EncoderDecoder(nn.Module):
    def __init__(self, num_classes, **loss):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6), nn.ReLU())
        self.decode_head = DecodeHead(6, num_classes, **loss)
        self.local_iter = 0

    def forward(self, img, img_metas, return_loss=True, **labels):
        assert return_loss
        return self.forward_train(img, img_metas, **labels)

    def encode_decode(self, img, img_metas):
        logits = self.decode_head(self.backbone(img))
        return F.interpolate(logits, size=img.shape[2:], mode="bilinear", align_corners=False)

    def generate_pseudo_label(self, img, img_metas):
        return self.encode_decode(img, img_metas)

    def forward_train(self, img, img_metas, gt_semantic_seg, seg_weight=None, return_feat=False):
        self.local_iter += 1
        x = self.backbone(img)
        losses = {"features": [x]} if return_feat else {}
        losses.update({f"decode.{k}": v for k, v in self.decode_head.forward_train(x, gt_semantic_seg, seg_weight).items()})
        return losses


class HRDAEncoderDecoder(EncoderDecoder):
    """Also learns a detail crop, which numpy's global random state chooses and the head forgets after its losses."""

    share = 0.1

    def forward_train(self, img, img_metas, gt_semantic_seg, seg_weight=None, return_feat=False):
        size = img.shape[-1] // 2
        y, x = (int(np.random.randint(0, img.shape[-1] - size + 1)) for _ in range(2))
        self.decode_head.hr_crop_box = (y, y + size, x, x + size)
        losses = super().forward_train(img, img_metas, gt_semantic_seg, seg_weight, return_feat)
        losses["decode.loss_seg"] = losses["decode.loss_seg"] * (1 - self.share)
        window = (Ellipsis, slice(y, y + size), slice(x, x + size))
        weight = None if seg_weight is None else seg_weight[window]
        detail = self.decode_head.losses(self.decode_head(self.backbone(img[window])), gt_semantic_seg[window], weight)
        losses["decode.hr.loss_seg"] = detail["loss_seg"] * self.share
        del self.decode_head.hr_crop_box
        return losses


class LevelsEncoderDecoder(EncoderDecoder):
    """CoDA's: all passes but the source's take levels."""

    def extract(self, img, levels):
        x = self.backbone(img)
        return x if levels is None else x * (1 + 0.1 * levels)

    def encode_decode(self, img, img_metas, upscale_pred=True, levels=None):
        assert levels is not None
        logits = self.decode_head(self.extract(img, levels))
        return F.interpolate(logits, size=img.shape[2:], mode="bilinear", align_corners=False)

    def forward_train(self, img, img_metas, gt_semantic_seg, seg_weight=None, return_feat=False, levels=None):
        assert levels is not None or seg_weight is None
        x = self.extract(img, levels)
        losses = {"features": [x]} if return_feat else {}
        losses.update({f"decode.{k}": v for k, v in self.decode_head.forward_train(x, gt_semantic_seg, seg_weight).items()})
        return losses


class StagedEncoderDecoder(EncoderDecoder):
    """PiPa's: a stage first, and features beside the logits."""

    def encode_decode(self, img, img_metas):
        x = self.backbone(img)
        logits = F.interpolate(self.decode_head(x), size=img.shape[2:], mode="bilinear", align_corners=False)
        return logits, x

    def forward_train(self, stage, img, img_metas, gt_semantic_seg, seg_weight=None, return_feat=False):
        assert stage == (1 if seg_weight is None else 2)
        return super().forward_train(img, img_metas, gt_semantic_seg, seg_weight, return_feat)
