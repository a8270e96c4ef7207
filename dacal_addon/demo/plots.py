"""The demo's own picture: predictions side by side. The others are in `dacal_addon.plots`."""

from typing import Any, Dict, List, Sequence, Tuple

import numpy as np
from torch import Tensor

from ..plots import bare, new_figure, styled
from .datasets import Dataset


def predictions_figure(dataset: Dataset, image: Tensor, label: Tensor, predictions: Dict[str, Tensor]) -> Any:
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
    with styled():
        figure, axes = new_figure(len(image), len(columns), (2.2 * len(columns), 0.8 + 2.2 * len(image) * height / width))
        for column, (title, pictures) in enumerate(columns):
            axes[0, column].set_title(title)
            for row in range(len(image)):
                axes[row, column].imshow(pictures[row], interpolation="nearest")
        bare(axes)
        patches = [
            Patch(color=tuple((np.asarray(c) / 255).tolist()), label=name)
            for name, c in zip(dataset.class_names, dataset.palette)
        ]
        figure.legend(handles=patches, loc="outside lower center", ncol=-(-len(patches) // 2))
        return figure


def pick_images(label: Tensor, count: int) -> Sequence[int]:
    """The `count` images with the most classes in them, in order: the same for every method and run."""
    classes = [len(one.unique()) for one in label]
    return sorted(sorted(range(len(label)), key=lambda i: -classes[i])[:count])
