"""The demo's pictures: reliability diagrams, a temperature map over its image, predictions side by side."""

from pathlib import Path
from typing import Any, Dict, List, Sequence, Tuple

import numpy as np
from torch import Tensor

from .. import metrics
from .datasets import Dataset

# Okabe & Ito's colours, which people with any colour vision tell apart.
_BLUE, _SKY, _ORANGE, _GREY = "#0072B2", "#56B4E9", "#D55E00", "#666666"
_STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "savefig.dpi": 200,
    "savefig.bbox": "tight",
}


def _figure(rows: int, columns: int, size: Tuple[float, float], **options: Any) -> Tuple[Any, Any]:
    """A figure of its own canvas: no window, no global state of pyplot, whatever the user's matplotlib is set to."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, constrained_layout=True)
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def _save(figure: Any, path: Path) -> None:
    figure.savefig(str(path))


def _styled() -> Any:
    import matplotlib

    return matplotlib.rc_context(_STYLE)


def plot_reliability(logits: Dict[str, Tensor], label: Tensor, path: Path) -> None:
    """One panel a method: accuracy by confidence with the gap to the diagonal, and below it how many pixels a bin holds.

    Args:
        logits: title of the panel -> (N, C, H, W).
        label: (N, H, W).
    """
    with _styled():
        figure, axes = _figure(
            2, len(logits), (2.35 * len(logits), 3.1), sharex="col", sharey="row", gridspec_kw={"height_ratios": [3, 1]}
        )
        for column, (title, z) in enumerate(logits.items()):
            table = metrics.reliability(z, label, input="logits")
            lower, upper = table.lower.numpy(), table.upper.numpy()
            accuracy, confidence = np.nan_to_num(table.accuracy.numpy()), table.confidence.numpy()
            width, filled = upper - lower, table.pixels.numpy() > 0
            top, bottom = axes[0, column], axes[1, column]
            top.bar(
                lower, accuracy, width, align="edge", color=_BLUE, edgecolor="white", linewidth=0.4, label="accuracy in the bin"
            )
            gap = np.where(filled, np.nan_to_num(confidence) - accuracy, 0.0)
            for name, part, colour in (
                ("overconfidence", np.clip(gap, 0, None), _ORANGE),
                ("underconfidence", np.clip(gap, None, 0), _SKY),
            ):
                top.bar(
                    lower, part, width, bottom=accuracy, align="edge", color=colour, edgecolor="white", linewidth=0.4,
                    alpha=0.75, hatch="////", label=name,
                )  # fmt: skip
            top.plot([0, 1], [0, 1], color=_GREY, linewidth=0.9, linestyle="--", label="perfectly calibrated")
            ece = metrics.ece(z, label, input="logits")
            top.set_title(title)
            top.text(0.04, 0.95, f"ECE {100 * ece:.1f} %", transform=top.transAxes, va="top")
            top.set(xlim=(0, 1), ylim=(0, 1))
            bottom.bar(
                lower,
                table.pixels.numpy() / max(1, int(table.pixels.sum())),
                width,
                align="edge",
                color=_GREY,
                edgecolor="white",
                linewidth=0.4,
            )
            bottom.set(xlabel="confidence", ylim=(0, 1), xticks=[0, 0.5, 1], xticklabels=["0", "0.5", "1"])
        axes[0, 0].set_ylabel("accuracy")
        axes[1, 0].set_ylabel("share of\npixels")
        handles, names = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, names, loc="upper center", bbox_to_anchor=(0.5, 0.0), ncol=len(names))
        _save(figure, path)


def plot_temperature(image: Tensor, label: Tensor, logits: Tensor, temperature: Tensor, path: Path) -> None:
    """Rows of images: the image, where the prediction errs, the temperature over the image.

    Args:
        image: (N, 3, H, W) in 0..1.
        label: (N, H, W).
        logits: (N, C, H, W), whose temperatures are shown.
        temperature: (N, 1, H, W).
    """
    from matplotlib.colors import ListedColormap, TwoSlopeNorm

    log_t = temperature.double().log2().numpy()[:, 0]
    # The middle of the scale is T = 1, neither sharpened nor softened; its ends are the 1st and the 99th percentile,
    # neither side shorter than a quarter of the other, so that nearly nothing does not look like much.
    low, high = (float(np.quantile(log_t, q)) for q in (0.01, 0.99))
    low, high = min(low, -high / 4, -0.05), max(high, -low / 4, 0.05)
    height, width = image.shape[-2:]
    with _styled():
        figure, axes = _figure(len(image), 3, (9.0, 0.3 + 3.0 * len(image) * height / width))
        for row in range(len(image)):
            picture = image[row].permute(1, 2, 0).numpy()
            wrong = (logits[row].argmax(0) != label[row]).numpy()
            grey = np.repeat(picture.mean(2, keepdims=True), 3, 2)
            axes[row, 0].imshow(picture)
            for column in (1, 2):
                axes[row, column].imshow(0.5 + 0.5 * grey)
            axes[row, 1].imshow(np.ma.masked_where(~wrong, wrong), cmap=ListedColormap([_ORANGE]), interpolation="nearest")
            shown = axes[row, 2].imshow(log_t[row], cmap="PuOr_r", norm=TwoSlopeNorm(0.0, low, high), alpha=0.65)
        for column, title in enumerate(("target image", "where the prediction is wrong", "temperature of its label")):
            axes[0, column].set_title(title)
        _bare(axes)
        bar = figure.colorbar(shown, ax=list(axes[:, 2]), fraction=0.05, pad=0.02)
        ticks = np.linspace(low, 0, 3).tolist() + np.linspace(0, high, 3).tolist()[1:]
        bar.set_ticks(ticks)
        bar.set_ticklabels([f"{2**tick:.2f}" for tick in ticks])
        bar.set_label("T  (< 1 sharpens, > 1 softens)")
        _save(figure, path)


def plot_predictions(dataset: Dataset, image: Tensor, label: Tensor, predictions: Dict[str, Tensor], path: Path) -> None:
    """Rows of images: the image, the truth, then each method's prediction, all in the data set's colours.

    Args:
        image: (N, 3, H, W) in 0..1.
        label: (N, H, W).
        predictions: title of the column -> (N, H, W) class indices.
    """
    from matplotlib.patches import Patch

    height, width = image.shape[-2:]
    columns: List[Tuple[str, Any]] = [("target image", image.permute(0, 2, 3, 1).numpy())]
    columns += [(title, dataset.palette[part.numpy()]) for title, part in [("ground truth", label), *predictions.items()]]
    with _styled():
        figure, axes = _figure(len(image), len(columns), (2.2 * len(columns), 0.3 + 2.2 * len(image) * height / width))
        for column, (title, pictures) in enumerate(columns):
            axes[0, column].set_title(title)
            for row in range(len(image)):
                axes[row, column].imshow(pictures[row], interpolation="nearest")
        _bare(axes)
        patches = [
            Patch(color=tuple((np.asarray(c) / 255).tolist()), label=name)
            for name, c in zip(dataset.class_names, dataset.palette)
        ]
        figure.legend(handles=patches, loc="upper center", bbox_to_anchor=(0.5, 0.0), ncol=len(patches))
        _save(figure, path)


def pick_images(label: Tensor, count: int) -> Sequence[int]:
    """The `count` images with the most classes in them, in order: the same for every method and run."""
    classes = [len(one.unique()) for one in label]
    return sorted(sorted(range(len(label)), key=lambda i: -classes[i])[:count])


def _bare(axes: Any) -> None:
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        for spine in axis.spines.values():
            spine.set_visible(False)
