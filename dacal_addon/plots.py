"""Pictures in one style: reliability diagrams, class by class, temperature maps. Needs the extra `plot` (matplotlib).

Every function returns a matplotlib `Figure` with a canvas of its own: no window, no global state of pyplot, and nothing of
what the user's matplotlib is set to. `save` writes it; a notebook shows it.
"""

import math
from pathlib import Path
from typing import Any, Mapping, Tuple

import numpy as np
import torch
from torch import Tensor

from .metrics.binned import ReliabilityTable

# Okabe & Ito's colours, which people with any colour vision tell apart; the gaps have hatches of their own too.
BLUE, SKY, ORANGE, GREY = "#0072B2", "#56B4E9", "#D55E00", "#666666"
_STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "hatch.linewidth": 0.6,
    "savefig.dpi": 200,
    "savefig.bbox": "tight",
}
_MOST_CLASSES = 20


def styled() -> Any:
    """A context in which matplotlib has this package's style, and its own defaults for the rest."""
    import matplotlib

    defaults: Any = {key: value for key, value in matplotlib.rcParamsDefault.items() if key != "backend"}
    return matplotlib.rc_context({**defaults, **_STYLE})


def new_figure(rows: int, columns: int, size: Tuple[float, float], **options: Any) -> Tuple[Any, Any]:
    """A figure and its axes, (rows, columns); the size is in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, constrained_layout=True)
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def save(figure: Any, path: Path) -> None:
    """Write a figure in this package's style; the ending of the path says how."""
    with styled():
        figure.savefig(str(path))


def bare(axes: Any) -> None:
    """Nothing around pictures."""
    for axis in np.ravel(axes):
        axis.set(xticks=[], yticks=[])
        for spine in axis.spines.values():
            spine.set_visible(False)


def reliability_diagram(tables: Mapping[str, ReliabilityTable]) -> Any:
    """One panel a title: accuracy by confidence with its gap to the diagonal, and below it how many pixels a bin holds.

    Two titles make a pair of before and after. The vertical lines below are mean confidence and accuracy over all pixels:
    where the first one is on the right, the network is overconfident.

    Args:
        tables: title -> `CalibrationStats.reliability()`, of bins of equal width or mass.
    """
    with styled():
        width = max(2.35 * len(tables), 3.2)
        figure, axes = new_figure(2, len(tables), (width, 3.4), sharex="col", sharey="row", height_ratios=(3, 1.2))
        for column, (title, table) in enumerate(tables.items()):
            upper, lower = axes[0, column], axes[1, column]
            pixels, confidence, accuracy = _arrays(table)
            left, bar = table.lower.numpy(), (table.upper - table.lower).numpy()
            style: Any = {"align": "edge", "edgecolor": "white", "linewidth": 0.4}
            upper.bar(left, accuracy, bar, color=BLUE, label="accuracy", **style)
            gap = np.where(pixels > 0, confidence - accuracy, 0.0)
            for name, part, colour, hatch in (
                ("overconfidence", np.clip(gap, 0, None), ORANGE, "////"),
                ("underconfidence", np.clip(gap, None, 0), SKY, "...."),
            ):
                upper.bar(left, part, bar, bottom=accuracy, color=colour, alpha=0.75, hatch=hatch, label=name, **style)
            upper.plot([0, 1], [0, 1], color=GREY, linewidth=0.9, linestyle="--", label="perfectly calibrated")
            upper.set_title(title)
            upper.text(0.04, 0.96, _percent("ECE", table_ece(table)), transform=upper.transAxes, va="top")
            upper.set(xlim=(0, 1), ylim=(0, 1))
            total = pixels.sum()
            lower.bar(left, pixels / max(total, 1), bar, color=GREY, **style)
            if total:
                for value, line, name in ((confidence, "-", "mean confidence"), (accuracy, ":", "mean accuracy")):
                    lower.axvline(float((value * pixels).sum() / total), color="black", linewidth=1, linestyle=line, label=name)
            lower.set(xlabel="confidence", ylim=(0, 1), xticks=[0, 0.5, 1], xticklabels=["0", "0.5", "1"])
        axes[0, 0].set_ylabel("accuracy")
        axes[1, 0].set_ylabel("share of\npixels")
        entries: Any = [axis.get_legend_handles_labels() for axis in axes[:, 0]]
        handles, names = ([*entries[0][part], *entries[1][part]] for part in (0, 1))
        columns = 2 if len(tables) == 1 else 3
        figure.legend(handles, names, loc="upper center", bbox_to_anchor=(0.5, 0.0), ncol=columns)
        return figure


def classwise_panel(tables: Mapping[str, ReliabilityTable]) -> Any:
    """A small diagram a class: how often a pixel is of the class, by the probability that the network gave it.

    The area of a dot is the share of the pixels, which crowd near 0; the line to the diagonal is the gap.

    Args:
        tables: class name -> `CalibrationStats.reliability(of_class=...)`. Of more than 20 classes, those with the largest
            class-wise ECE are shown, in their order.
    """
    errors = {name: table_ece(table) for name, table in tables.items()}
    worst = sorted(errors, key=lambda name: -1.0 if math.isnan(errors[name]) else errors[name], reverse=True)[:_MOST_CLASSES]
    shown = [name for name in tables if name in worst]
    columns = min(5, len(shown))
    rows = -(-len(shown) // columns)
    with styled():
        figure, axes = new_figure(rows, columns, (1.75 * columns + 0.4, 1.85 * rows + 0.3), sharex=True, sharey=True)
        for axis, name in zip(axes.flat, shown):
            pixels, probability, share = _arrays(tables[name])
            filled = pixels > 0
            probability, share, pixels = probability[filled], share[filled], pixels[filled]
            axis.plot([0, 1], [0, 1], color=GREY, linewidth=0.8, linestyle="--")
            for above, colour in ((True, ORANGE), (False, SKY)):
                chosen = (probability > share) == above
                axis.vlines(probability[chosen], share[chosen], probability[chosen], color=colour, linewidth=2.5)
            axis.scatter(
                probability, share, 6 + 120 * pixels / max(pixels.sum(), 1), color=BLUE, alpha=0.8, linewidths=0, zorder=3
            )
            axis.set_title(f"{name}\n{_percent('ECE', errors[name])}", fontsize=8)
            axis.set(xlim=(-0.04, 1.04), ylim=(-0.04, 1.04), xticks=[0, 0.5, 1], yticks=[0, 0.5, 1])
        for axis in axes.flat[len(shown) :]:
            axis.set_visible(False)
            # The panel above is the last one of its column, and shows the axis that this one would have shown.
            above = axes.flat[list(axes.flat).index(axis) - columns]
            above.tick_params(labelbottom=True)
        if len(shown) < len(tables):
            figure.suptitle(f"{len(shown)} of {len(tables)} classes: those with the largest error", fontsize=9)
        figure.supxlabel(
            "probability of the class (orange: too high, blue: too low; area of a dot: share of pixels)", fontsize=9
        )
        figure.supylabel("share of pixels of the class", fontsize=9)
        return figure


def temperature_map(image: Tensor, label: Tensor, logits: Tensor, temperature: Tensor) -> Any:
    """Rows of images: the image, where the prediction errs, the temperature over the image.

    Args:
        image: (N, 3, H, W) in 0..1.
        label: (N, H, W).
        logits: (N, C, H, W), whose temperatures are shown.
        temperature: (N, 1, H, W), without unit.
    """
    from matplotlib.colors import ListedColormap, TwoSlopeNorm

    log_t = temperature.double().log2().numpy()[:, 0]
    # The middle of the scale is T = 1, neither sharpened nor softened; its ends are the 1st and the 99th percentile,
    # neither side shorter than a quarter of the other, so that nearly nothing does not look like much.
    low, high = (float(np.quantile(log_t, q)) for q in (0.01, 0.99))
    low, high = min(low, -high / 4, -0.05), max(high, -low / 4, 0.05)
    height, width = image.shape[-2:]
    with styled():
        figure, axes = new_figure(len(image), 3, (9.0, 0.3 + 3.0 * len(image) * height / width))
        for row in range(len(image)):
            picture = image[row].permute(1, 2, 0).numpy()
            wrong = (logits[row].argmax(0) != label[row]).numpy()
            grey = np.repeat(picture.mean(2, keepdims=True), 3, 2)
            axes[row, 0].imshow(picture)
            for column in (1, 2):
                axes[row, column].imshow(0.5 + 0.5 * grey)
            axes[row, 1].imshow(np.ma.masked_where(~wrong, wrong), cmap=ListedColormap([ORANGE]), interpolation="nearest")
            shown = axes[row, 2].imshow(log_t[row], cmap="PuOr_r", norm=TwoSlopeNorm(0.0, low, high), alpha=0.65)
        for column, title in enumerate(("target image", "where the prediction is wrong", "temperature of its label")):
            axes[0, column].set_title(title)
        bare(axes)
        colours = figure.colorbar(shown, ax=list(axes[:, 2]), fraction=0.05, pad=0.02)
        ticks = np.linspace(low, 0, 3).tolist() + np.linspace(0, high, 3).tolist()[1:]
        colours.set_ticks(ticks)
        colours.set_ticklabels([f"{2**tick:.2f}" for tick in ticks])
        colours.set_label("T  (< 1 sharpens, > 1 softens)")
        return figure


def table_ece(table: ReliabilityTable) -> float:
    """The l1 calibration error of a table's bins, NaN if they are empty.

    Example:
        >>> edges = torch.tensor([0.0, 0.5, 1.0]).double()
        >>> pixels, confidence, accuracy = torch.tensor([[1.0, 3.0], [0.5, 0.75], [0.5, 0.25]]).double()
        >>> table_ece(ReliabilityTable(edges[:-1], edges[1:], pixels.long(), confidence, accuracy))  # 3/4 x 0.5
        0.375
    """
    pixels, confidence, accuracy = _arrays(table)
    return float((pixels * np.abs(accuracy - confidence)).sum() / pixels.sum()) if pixels.sum() else math.nan


def _arrays(table: ReliabilityTable) -> Tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pixels, mean confidence and accuracy, 0 where a bin is empty."""
    pixels = table.pixels.double()
    means = (torch.where(pixels > 0, column, torch.zeros_like(column)) for column in (table.confidence, table.accuracy))
    return (pixels.numpy(), *(column.numpy() for column in means))  # type: ignore[return-value]


def _percent(name: str, value: float) -> str:
    return f"{name}: no pixel" if math.isnan(value) else f"{name} {100 * value:.2f} %"
