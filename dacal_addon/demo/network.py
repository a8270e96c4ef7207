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

    `features(image)` gives (N, `feature_channels`, H/2, W/2), which `logits(features)` classifies and interpolates. `width`
    multiplies the channels of all layers; 1 makes 0.4 M parameters.
    """

    def __init__(self, num_classes: int, *, width: int = 1, seed: int = 0) -> None:
        super().__init__()
        self.feature_channels = 32 * width
        a, b, c, d = 16 * width, 32 * width, 64 * width, 96 * width
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.stem = nn.Sequential(_block(3, a), _block(a, b, stride=2))
            self.scale2 = _block(b, b)
            self.scale4 = nn.Sequential(_block(b, c, stride=2), _block(c, c))
            self.scale8 = nn.Sequential(_block(c, d, stride=2), _block(d, d, dilation=2), _block(d, d, dilation=4))
            self.up4 = _block(d + c, c)
            self.up2 = _block(c + b, self.feature_channels)
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
