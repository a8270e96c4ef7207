"""Networks of a realistic size, against which the benchmarks measure."""

import torch.nn.functional as F
from torch import Tensor, nn


class _Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, *, stride: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs))
        self.skip = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.second(self.first(x)) + self.skip(x))


class ResidualSegmenter(nn.Module):
    """An encoder shaped like ResNet-18 (He et al., CVPR 2016) with a pyramid head: logits at a quarter of the resolution."""

    feature_channels = 256

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
        widths = (64, 64, 128, 256, 512)
        self.stages = nn.ModuleList(
            nn.Sequential(_Residual(a, b, stride=1 if a == b else 2), _Residual(b, b, stride=1))
            for a, b in zip(widths, widths[1:])
        )
        self.lateral = nn.ModuleList(nn.Conv2d(width, self.feature_channels, 1) for width in widths[1:])
        self.head = nn.Conv2d(self.feature_channels, num_classes, 1)

    def features(self, image: Tensor) -> Tensor:
        x, levels = self.stem(image), []
        for stage in self.stages:
            x = stage(x)
            levels.append(x)
        size = levels[0].shape[-2:]
        resized = [
            F.interpolate(lateral(level), size=size, mode="bilinear", align_corners=False)
            for lateral, level in zip(self.lateral, levels)
        ]
        total: Tensor = sum(resized[1:], resized[0])
        return total

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.head(F.relu(self.features(image)))
        return logits
