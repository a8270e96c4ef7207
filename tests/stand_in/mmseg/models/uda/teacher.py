"""The EMA copy of a student, which upstream detaches at the first iteration alone."""

from copy import deepcopy

import torch
from torch import nn

from mmseg.models.masks import pseudo_labels


def update_ema(teacher, student, iteration, decay):
    if iteration == 0:
        for average in teacher.parameters():
            average.detach_()
    alpha = min(1 - 1 / (iteration + 1), decay)  # 0 at first: equal to the student
    with torch.no_grad():
        for average, parameter in zip(teacher.parameters(), student.parameters()):
            average.mul_(alpha).add_(parameter, alpha=1 - alpha)


class Teacher(nn.Module):
    """MIC's own teacher for masked images; SiamSeg's only one: not a network, but around one."""

    def __init__(self, model, threshold=0.3):
        super().__init__()
        self.ema_model = deepcopy(model)
        self.pseudo_threshold, self.psweight_ignore_top, self.psweight_ignore_bottom = threshold, 1, 0

    def get_ema_model(self):
        return self.ema_model

    def update_weights(self, model, iteration):
        update_ema(self.ema_model, model, iteration, 0.8)

    def labels(self, img, metas):
        label, weight = pseudo_labels(self.ema_model.encode_decode(img, metas), self.pseudo_threshold)
        weight[:, : self.psweight_ignore_top] = 0
        return label, weight
