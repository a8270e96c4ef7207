"""Per-pixel temperatures from the teacher's logits: the only thing that this package learns.

`*S` stands for the spatial dimensions: H, W of pictures, D, H, W of volumes, whose voxels are pixels too.
"""

import math
from typing import Any, Optional, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._check import as_whole, check_choice, check_logits, check_number, check_tensor, describe, problem
from ._resize import resized
from ._upcast import at_least_float32

SEES = ("logits", "confidence")
_CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
# exp(-9) is about 1e-4: below that a class is out of the question and how far out says nothing more. Without a floor one
# confident pixel (log-probability -80) drowns the inputs of all others.
_LOG_PROBABILITY_FLOOR = -9.0


def temperature_features(logits: Tensor) -> Tensor:
    """What a pixel's logits say about how sure the teacher is, scaled to about -2..2.

    Args:
        logits: (N, C, *S), floating. No gradient flows back to them.

    Returns:
        (N, C + 2, *S), the dtype of `logits` (half precision is upcast to float32): the log-softmax (floored at -9,
        shifted and scaled), the margin between the two largest probabilities, and the entropy as a share of log C.
        Unchanged when a constant is added to a pixel's logits, as the softmax is.

    Raises:
        ValueError, TypeError: not a floating tensor of three dimensions or more, with at least two classes.

    Example:
        >>> undecided = temperature_features(torch.zeros(1, 4, 1, 1)).flatten()
        >>> margin, entropy = undecided[-2:].tolist()
        >>> print(f"margin {margin:.1f}, entropy {entropy:.1f}")
        margin -1.0, entropy 1.0
    """
    check_logits("temperature_features", "logits", logits)
    log_p = _log_probabilities(logits)
    sure = _confidence_features(log_p)
    features = torch.cat([log_p, sure], dim=1)
    features[:, : logits.shape[1]].clamp_(min=_LOG_PROBABILITY_FLOOR).div_(4.5).add_(1.0)
    return features


def _log_probabilities(logits: Tensor) -> Tensor:
    """(N, C, *S), detached."""
    log_p = F.log_softmax(at_least_float32(logits.detach()), dim=1)
    return log_p.clamp_(min=torch.finfo(log_p.dtype).min)  # a class masked out with -inf: 0 * log 0 is 0 below, not NaN


def _confidence_features(log_p: Tensor) -> Tensor:
    """The last two of `temperature_features`, margin and entropy: (N, 2, *S)."""
    p = log_p.exp()
    # The two largest in one sweep over the classes: topk takes 18 times as long for 19 classes (measured, CPU).
    first, second = torch.max(p[:, 0], p[:, 1]), torch.min(p[:, 0], p[:, 1])
    for i in range(2, p.shape[1]):
        second = torch.max(second, torch.min(first, p[:, i]))
        first = torch.max(first, p[:, i])
    # In place: of all that labels are made from, tensors of C channels at the images' resolution take the most memory.
    entropy = p.mul_(log_p).sum(1).neg_().div_(math.log(log_p.shape[1]))
    return torch.stack([2 * (first - second) - 1, 2 * entropy - 1], dim=1)


class _ClampWithWayBack(torch.autograd.Function):
    """clamp(h, low, high) whose gradient, outside the bounds, is kept where a descent step leads back inside.

    The plain clamp has no gradient there, so that a pixel once driven out stays out for good: the saturation of which
    the first attempts at the method died (T at its lower bound, whatever the outer loss).
    """

    @staticmethod
    def forward(ctx: Any, h: Tensor, low: float, high: float) -> Tensor:
        ctx.save_for_backward(h)
        ctx.low, ctx.high = low, high
        return h.clamp(low, high)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (h,) = ctx.saved_tensors
        outward = ((h > ctx.high) & (grad < 0)) | ((h < ctx.low) & (grad > 0))
        return grad.masked_fill(outward, 0.0), None, None


def bounded_temperature(
    log_ratio: Tensor, *, initial: float = 1.0, max_ratio: float = 5.0, min_temperature: float = 0.0
) -> Tensor:
    """T = initial * exp(log_ratio), with the exponent clamped so that T stays within its bounds.

    Log-linear, so that sharpening and softening by the same factor cost the same. Inside the bounds the gradient is the
    exact one; outside it is zero where descent would lead further out and that of the unclamped function where it leads
    back, so T can always return from its bounds.

    Args:
        log_ratio: any shape, floating.
        initial: T at log_ratio = 0, exactly. > 0.
        max_ratio: T stays in [initial / max_ratio, initial * max_ratio]. > 1.
        min_temperature: T does not fall below this either. <= initial.

    Example:
        >>> bounded_temperature(torch.tensor([-99.0, 0.0, 99.0]), initial=2.0, max_ratio=4.0)
        tensor([0.5000, 2.0000, 8.0000])
    """
    high = math.log(max_ratio)
    low = max(-high, math.log(min_temperature / initial)) if min_temperature > 0 else -high
    clamped: Tensor = _ClampWithWayBack.apply(log_ratio, low, high)  # type: ignore[no-untyped-call]  # torch's gap
    return initial * torch.exp(clamped)


class MetaTemperatureNet(nn.Module):
    """Per-pixel temperatures T for the teacher's logits, learned by `TemperatureFit` or `BilevelCalibrationStep`.

    Three small convolutions over `temperature_features(logits)` and, where given, the teacher's own features. The last layer
    starts at zero: T is `initial_temperature` everywhere, bit for bit, until the first update.

    Shape: `logits` (N, C, *S), `features` (N, F, *s) at any resolution -> temperature (N, 1, *S), T > 0. Floating dtypes; the
    result has the dtype of the net's parameters (float32).

    Gradient: reaches this net's parameters only; `logits` and `features` are detached. Building the net leaves the global
    random state alone.

    Args:
        num_classes: C, at least 2; 2 of a network with one sigmoid channel, whose logits come through `two_channels`.
        feature_channels: F, or 0 when no features will be passed.
        sees: "confidence", the margin and the entropy of `temperature_features`, or "logits", the class log-probabilities
            too. Which classes compete tells more, but only confidence means the same on a clean image and on one mixed of
            two, where temperatures are fitted: with "logits" both mIoU and calibration error were worse
            (on `streets`; `benchmarks/README.md` at commit 7c5564a). For the bilevel step use "logits", with kernel_size=3.
        kernel_size: of two of the convolutions, odd. 1: a pixel's temperature depends on that pixel alone (and on the
            interpolated features); 3: on 7 x 7 pixels, or 7 x 7 x 7 of a volume.
        hidden_channels: width of the net. The default gives 337 parameters, and 5,377 with "logits", kernel_size=3 and C = 19.
        initial_temperature: T before the first update. > 0.
        max_ratio: T stays within a factor of this of `initial_temperature`. > 1.
        spatial_dims: how many spatial dimensions the logits have: 2 for pictures, 3 for volumes, 1 for signals.
        generator: source of the initial weights; by default one with seed 0.

    Raises:
        ValueError: `logits` or `features` of another shape than announced here.

    Example:
        >>> net = MetaTemperatureNet(num_classes=19)
        >>> temperature = net(torch.randn(2, 19, 8, 16, generator=torch.Generator().manual_seed(0)))
        >>> temperature.shape, temperature.detach().unique().tolist()
        (torch.Size([2, 1, 8, 16]), [1.0])

    Source: DA-Cal (Li et al., arXiv 2602.20860), whose meta temperature network this stands for; the inputs, the
    log-linear bound and the zero start are this package's (see `bounded_temperature`).
    """

    def __init__(
        self,
        num_classes: int,
        *,
        feature_channels: int = 0,
        sees: str = "confidence",
        kernel_size: int = 1,
        hidden_channels: int = 16,
        initial_temperature: float = 1.0,
        max_ratio: float = 5.0,
        spatial_dims: int = 2,
        generator: Optional[torch.Generator] = None,
    ) -> None:
        super().__init__()
        name = "MetaTemperatureNet"
        num_classes = two_classes_at_least(name, num_classes)
        feature_channels = as_whole(name, "feature_channels", feature_channels, low=0)
        check_choice(name, "sees", sees, SEES)
        kernel_size = as_whole(name, "kernel_size", kernel_size, low=1)
        if kernel_size % 2 == 0:
            raise problem(name, expected="an odd kernel_size", got=f"{kernel_size}", remedy="use 1 or 3")
        hidden_channels = as_whole(name, "hidden_channels", hidden_channels, low=1)
        check_number(name, "initial_temperature", initial_temperature, low=1e-6, high=1e6, rule="in [1e-6, 1e6]")
        check_number(name, "max_ratio", max_ratio, low=1 + 1e-6, high=1e6, rule="> 1 (and at most 1e6)")
        self.spatial_dims = as_whole(name, "spatial_dims", spatial_dims, low=1, high=3)
        convolution = _CONVOLUTIONS[self.spatial_dims]
        self.num_classes = num_classes
        self.feature_channels = feature_channels
        self.sees = sees
        self.initial_temperature = float(initial_temperature)
        self.max_ratio = float(max_ratio)
        # The layers draw their default weights from the global random state; the fork hides that from the host.
        with torch.random.fork_rng(devices=[]):
            reduced = max(1, hidden_channels // 2) if feature_channels else 0
            self.reduce = convolution(feature_channels, reduced, 1) if feature_channels else None
            self.layers = nn.ModuleList(
                [
                    convolution(a, hidden_channels, kernel_size, padding=d * (kernel_size // 2), dilation=d)
                    for a, d in (
                        ((num_classes + 2 if sees == "logits" else 2) + reduced, 1),
                        (hidden_channels, min(2, kernel_size)),
                    )
                ]
            )
            self.last = convolution(hidden_channels, 1, 1)
        draw_weights(self, self.last, generator if generator is not None else torch.Generator().manual_seed(0))

    def forward(self, logits: Tensor, features: Optional[Tensor] = None) -> Tensor:
        check_logits("MetaTemperatureNet", "logits", logits, num_classes=self.num_classes)
        if logits.dim() != self.spatial_dims + 2:
            expected = f"logits: {self.spatial_dims} spatial dimensions, as spatial_dims says"
            remedy = f"build the net with spatial_dims={logits.dim() - 2}" if logits.dim() < 6 else "flatten some of them"
            raise problem("MetaTemperatureNet", expected=expected, got=describe(logits), remedy=remedy)
        dtype = self.last.weight.dtype
        see = temperature_features(logits) if self.sees == "logits" else _confidence_features(_log_probabilities(logits))
        x = see.to(dtype)
        if self.reduce is not None:
            h = self.reduce(_normalised(self._checked_features(features, logits.shape[0]).to(dtype)))
            x = torch.cat([x, resized("MetaTemperatureNet", h, logits.shape[2:])], dim=1)
        elif features is not None:
            remedy = f"build the net with feature_channels={features.shape[1] if features.dim() > 1 else 'F'}"
            raise problem("MetaTemperatureNet", expected="features=None", got=describe(features), remedy=remedy)
        for layer in self.layers:
            x = F.relu(layer(x))
        return bounded_temperature(self.last(x).to(dtype), initial=self.initial_temperature, max_ratio=self.max_ratio)

    def _checked_features(self, features: Optional[Tensor], batch: int) -> Tensor:
        small = ", ".join("dhw"[3 - self.spatial_dims :])
        expected = f"features: a floating tensor (N={batch}, F={self.feature_channels}, {small})"
        remedy = "pass the teacher's features, or build the net with feature_channels=0"
        x = check_tensor("MetaTemperatureNet", "features", features, expected=expected, remedy=remedy)
        if x.dim() != self.spatial_dims + 2 or x.shape[:2] != (batch, self.feature_channels) or not x.is_floating_point():
            raise problem("MetaTemperatureNet", expected=expected, got=describe(x), remedy=remedy)
        return x.detach()


def two_classes_at_least(function: str, num_classes: int) -> int:
    """C as an `int`; the package thinks in two channels where a network has one.

    >>> two_classes_at_least("f", 19)
    19
    """
    if isinstance(num_classes, int) and num_classes == 1:
        remedy = "a network with one sigmoid channel has 2: its logits are two_channels(x), logits_of=two_channels says so"
        raise problem(function, expected="num_classes >= 2", got="1", remedy=remedy)
    return as_whole(function, "num_classes", num_classes, low=2)


def draw_weights(net: nn.Module, last: nn.Module, generator: torch.Generator) -> None:
    """Initial weights of a net of convolutions (He et al., ICCV 2015) whose last layer starts at zero; biases 0."""
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, math.sqrt(2.0 / parameter[0].numel()), generator=generator)
            else:
                parameter.zero_()
        cast(Tensor, last.weight).zero_()


def _normalised(features: Tensor) -> Tensor:
    """Each pixel's features to mean 0 and variance 1 over the channels: hosts' features have any scale."""
    centred = features - features.mean(1, keepdim=True)
    return centred / (centred.pow(2).mean(1, keepdim=True) + 1e-5).sqrt()
