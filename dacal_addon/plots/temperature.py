"""Temperature maps: which pixels are softened, and which sharpened."""

import math
from typing import Any, Optional

import numpy as np
import torch
from matplotlib.colors import BoundaryNorm, LinearSegmentedColormap, ListedColormap
from torch import Tensor

from .._check import check_tensor, describe, problem
from .style import COLUMN, LINE, ORANGE, SMALL, bare, blank_figure, fitted, place, styled

_STEPS = (0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0)
_MOST_STEPS = 10


def temperature_map(
    image: Tensor, temperature: Tensor, *, wrong: Optional[Tensor] = None, title: str = "", dark: bool = False
) -> Any:
    """Rows of images: the image, where the prediction errs if that is known, the temperature of every pixel.

    Temperatures have steps of colour, and the scale names the edge of every step: a colour says between which two numbers
    a pixel is. Below each map stand its median and the range from its 5th to its 95th percentile.

    Args:
        image: (N, 3, H, W) floating in 0..1.
        temperature: (N, 1, H, W) > 0, without unit.
        wrong: (N, H, W) bool, True where the prediction whose temperatures these are is wrong.
        title: for example the network's name and the iteration.
        dark: for a dark page.

    Raises:
        TypeError, ValueError: another kind, shape or temperature.
    """
    _check_map(image, temperature, wrong)
    count, _, height, width = image.shape
    pictures = image.detach().cpu().float().permute(0, 2, 3, 1).numpy()
    log_t = temperature.detach().cpu().double().log2().numpy()[:, 0]
    edges = _steps(*(float(np.quantile(log_t, q)) for q in (0.01, 0.99)))
    columns = 2 if wrong is None else 3
    left, right, apart = 0.03, 0.56, 0.06
    wide = (COLUMN - left - right - (columns - 1) * apart) / columns
    high = wide * height / width
    pitch, above = high + 2.4 * LINE, LINE * 2 + 0.1 + 1.4 * LINE * bool(title)
    total = max(count * pitch, 1.4) + above  # the scale needs as much
    with styled(dark=dark):
        figure = blank_figure((COLUMN, total))
        middle = (edges[1:] + edges[:-1]) / 2
        colours = ListedColormap(_diverging(middle / np.abs(edges).max()))
        norm = BoundaryNorm(edges, len(middle), clip=True)
        for row in range(count):
            bottom = total - above - high - row * pitch
            axes = [place(figure, left + c * (wide + apart), bottom, wide, high) for c in range(columns)]
            axes[0].imshow(pictures[row], aspect="auto")
            if wrong is not None:
                grey = np.repeat(pictures[row].mean(2, keepdims=True), 3, 2)
                errs = wrong[row].cpu().numpy()
                axes[1].imshow(0.5 + 0.5 * grey, aspect="auto")
                marked = np.ma.masked_where(~errs, errs)
                axes[1].imshow(marked, cmap=ListedColormap([ORANGE]), interpolation="nearest", aspect="auto")
            shown = axes[-1].imshow(log_t[row], cmap=colours, norm=norm, interpolation="nearest", aspect="auto")
            bare(axes)
            at = [2**q for q in np.quantile(log_t[row], (0.05, 0.5, 0.95))]
            values = f"median T {at[1]:.2f}\n5 to 95 %: {at[0]:.2f} to {at[2]:.2f}"
            axes[-1].text(1, -0.03 / high, values, transform=axes[-1].transAxes, ha="right", va="top", fontsize=SMALL)
            if row == 0:
                heads = ["image", "where the\nprediction is wrong", "temperature\nof its label"]
                for axis, head in zip(axes, heads if wrong is not None else heads[::2]):
                    axis.set_title(head, fontsize=7)
        bar = min(total - above - 0.1, 2.4)
        scale = figure.colorbar(shown, cax=place(figure, COLUMN - right + 0.06, total - above - bar, 0.1, bar))
        scale.set_ticks(edges.tolist())
        scale.set_ticklabels([f"{2**edge:.2f}" for edge in edges])
        scale.ax.tick_params(labelsize=SMALL, pad=2)
        scale.ax.set_title("T", fontsize=7)
        if title:
            figure.text(0.5, 1 - 0.02 / total, fitted(title, 60), ha="center", va="top")
        return figure


def _check_map(image: Tensor, temperature: Tensor, wrong: Optional[Tensor]) -> None:
    expected, remedy = "image: a floating tensor (N, 3, H, W)", "pass a batch of images in 0..1"
    check_tensor("temperature_map", "image", image, expected=expected, remedy=remedy)
    if image.dim() != 4 or image.shape[1] != 3 or not image.is_floating_point():
        raise problem("temperature_map", expected=expected, got=describe(image), remedy=remedy)
    count, _, height, width = image.shape
    shape, remedy = (count, 1, height, width), "pass temperatures of the size of the image"
    check_tensor("temperature_map", "temperature", temperature, expected=f"a floating tensor {shape}", remedy=remedy)
    if tuple(temperature.shape) != shape or not temperature.is_floating_point():
        expected = f"temperature: a floating tensor {shape}"
        raise problem("temperature_map", expected=expected, got=describe(temperature), remedy=remedy)
    if not bool((temperature > 0).all()):  # also refuses NaN
        got, remedy = f"a minimum of {float(temperature.min()):g}", "pass temperatures, not their logarithms"
        raise problem("temperature_map", expected="temperature > 0", got=got, remedy=remedy)
    if wrong is not None and (wrong.dtype != torch.bool or tuple(wrong.shape) != (count, height, width)):
        expected, remedy = f"wrong: a bool tensor {(count, height, width)}", "compare prediction and label"
        raise problem("temperature_map", expected=expected, got=describe(wrong), remedy=remedy)


def _steps(low: float, high: float) -> np.ndarray:
    """Edges of steps in log2(T) from below `low` to above `high`, T = 1 among them: neither sharpened nor softened.

    The finest steps of which there are at most ten. Neither side is shorter than one step, so that nearly nothing does not
    look like much.

    >>> [f"{2**edge:.2f}" for edge in _steps(-0.4, 0.9)]
    ['0.71', '0.84', '1.00', '1.19', '1.41', '1.68', '2.00']
    """
    for step in _STEPS:
        first, last = min(math.floor(low / step), -1), max(math.ceil(high / step), 1)
        if last - first <= _MOST_STEPS:
            break
    return step * np.arange(first, last + 1)


def _diverging(at: np.ndarray) -> Any:
    """The colours of numbers in -1..1: violet (sharpened) over white (0) to orange (softened)."""
    ends = ["#3f007d", "#8073ac", "#f7f7f7", "#e08214", "#7f3b08"]
    return LinearSegmentedColormap.from_list("temperature", ends)((at + 1) / 2)
