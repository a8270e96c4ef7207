"""Temperature nets to compare `MetaTemperatureNet` with: other inputs, more or less context, none at all."""

from typing import Optional, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dacal_addon.temperature import bounded_temperature, draw_weights, temperature_features


class ContextNet(nn.Module):
    """Temperatures from what the logits say and any further maps of full resolution.

    Args:
        num_classes: C.
        extra: channels of the further maps, (N, extra, H, W), passed as the second argument.
        sees_classes: class log-probabilities besides margin and entropy.
        kernel, dilations: of the convolutions, one a dilation. A kernel of 1 sees one pixel.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        extra: int = 0,
        sees_classes: bool = True,
        kernel: int = 3,
        dilations: Sequence[int] = (1, 2),
        hidden: int = 16,
        min_temperature: float = 0.0,
    ) -> None:
        super().__init__()
        self.min_temperature = min_temperature
        self.num_classes, self.sees_classes = num_classes, sees_classes
        channels = [extra + 2 + (num_classes if sees_classes else 0)] + [hidden] * len(dilations)
        with torch.random.fork_rng(devices=[]):
            self.layers = nn.ModuleList(
                nn.Conv2d(a, b, kernel, padding=d * (kernel // 2), dilation=d)
                for a, b, d in zip(channels, channels[1:], dilations)
            )
            self.last = nn.Conv2d(hidden, 1, 1)
        draw_weights(self, self.last, torch.Generator().manual_seed(0))

    def forward(self, logits: Tensor, maps: Optional[Tensor] = None) -> Tensor:
        x = temperature_features(logits)
        x = x if self.sees_classes else x[:, self.num_classes :]
        x = x if maps is None else torch.cat([x, maps.detach()], dim=1)
        for layer in self.layers:
            x = F.relu(layer(x))
        return bounded_temperature(self.last(x), min_temperature=self.min_temperature)


class OneTemperature(nn.Module):
    """The same temperature for every pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.raw = nn.Parameter(torch.zeros(1, 1, 1, 1))

    def forward(self, logits: Tensor, maps: Optional[Tensor] = None) -> Tensor:
        return bounded_temperature(self.raw, initial=1.0, max_ratio=5.0).expand_as(logits[:, :1])
