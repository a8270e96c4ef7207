"""What a trained network gives on many images, and the figures of that."""

from typing import Any, Callable, NamedTuple

import torch
from torch import Tensor, nn

from ..metrics import CalibrationStats
from ..preserve import in_evaluation_mode


def predict(network: nn.Module, image: Tensor, *, device: torch.device) -> Tensor:
    """Logits (N, C, H, W) of many images, on the CPU, in evaluation mode; the modes are put back."""
    return evaluated(network, network, image, device=device)


def evaluated(network: nn.Module, function: Callable[[Tensor], Any], image: Tensor, *, device: torch.device) -> Tensor:
    """A function of many images that runs the network: 25 at a time, in evaluation mode, the results on the CPU."""
    with in_evaluation_mode(network), torch.no_grad():
        return torch.cat([function(part.to(device)).cpu() for part in image.split(25)])


class Scores(NamedTuple):
    """One row of the table: of one network on one domain's test images; fractions, NLL in nats."""

    miou: float
    accuracy: float
    confidence: float
    ece: float
    nll: float


def score(logits: Tensor, label: Tensor) -> Scores:
    """The table's figures."""
    stats = CalibrationStats(logits.shape[1], input="logits")
    stats.update(logits, label)
    return Scores(stats.miou(), stats.accuracy(), stats.mean_confidence(), stats.ece(), stats.nll())
