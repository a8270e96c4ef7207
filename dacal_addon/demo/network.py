"""The demo's segmentation network: a small U-Net with an output at half resolution, as real ones have lower ones."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _block(inputs: int, outputs: int, *, stride: int = 1, dilation: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride=stride, padding=dilation, dilation=dilation, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


class SmallUNet(nn.Module):
    """(N, 3, H, W) images in 0..1 -> logits (N, C, H, W); H and W divisible by 8.

    `features(image)` gives (N, `feature_channels`, H/2, W/2), which `logits(features)` classifies and interpolates.
    """

    feature_channels = 32

    def __init__(self, num_classes: int, *, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.stem = nn.Sequential(_block(3, 16), _block(16, 32, stride=2))
            self.scale2 = _block(32, 32)
            self.scale4 = nn.Sequential(_block(32, 64, stride=2), _block(64, 64))
            self.scale8 = nn.Sequential(_block(64, 96, stride=2), _block(96, 96, dilation=2), _block(96, 96, dilation=4))
            self.up4 = _block(96 + 64, 64)
            self.up2 = _block(64 + 32, self.feature_channels)
            self.dropout = nn.Dropout2d(0.1)
            self.head = nn.Conv2d(self.feature_channels, num_classes, 1)

    def features(self, image: Tensor) -> Tensor:
        half = self.scale2(self.stem(image - 0.5))
        quarter = self.scale4(half)
        eighth = self.scale8(quarter)
        x = self.up4(torch.cat([_up(eighth), quarter], 1))
        features: Tensor = self.up2(torch.cat([_up(x), half], 1))
        return features

    def logits(self, features: Tensor) -> Tensor:
        return _up(self.head(self.dropout(features)))

    def forward(self, image: Tensor) -> Tensor:
        return self.logits(self.features(image))


def _up(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
