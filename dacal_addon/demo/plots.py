"""The demo's own picture: confidence beside correctness, before and after the fold. The others are in `dacal_addon.plots`."""

from typing import Any, List, Sequence, Tuple

import numpy as np
from torch import Tensor

from ..plots import ORANGE, bare, new_figure, styled
from .datasets import Dataset


def confidence_figure(dataset: Dataset, image: Tensor, label: Tensor, before: Tensor, after: Tensor) -> Any:
    """Rows of images: the image, the truth, the prediction, where it is wrong, how sure it was before and after.

    Args:
        image: (N, 3, H, W) in 0..1.
        label: (N, H, W).
        before, after: logits (N, C, H, W), of the same predictions.
    """
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    height, width = image.shape[-2:]
    prediction = before.argmax(1)
    wrong = prediction != label
    confidences = [logits.softmax(1).max(1)[0] for logits in (before, after)]
    titles = ["target image", "ground truth", "prediction", "where it is wrong"]
    titles += [
        f"confidence {when}:\n{100 * float(c[wrong].mean()):.0f} % where wrong"
        for when, c in zip(("before", "after"), confidences)
    ]
    columns: List[Tuple[Any, Any]] = [(image.permute(0, 2, 3, 1).numpy(), {})]
    columns += [(dataset.palette[part.numpy()], {}) for part in (label, prediction)]
    columns += [(wrong.numpy(), {"cmap": ListedColormap(["white", ORANGE]), "vmin": 0, "vmax": 1})]
    columns += [(c.numpy(), {"cmap": "cividis", "vmin": 1 / before.shape[1], "vmax": 1}) for c in confidences]
    with styled():
        figure, axes = new_figure(len(image), len(columns), (2.2 * len(columns), 1.2 + 2.2 * len(image) * height / width))
        for column, (title, (pictures, options)) in enumerate(zip(titles, columns)):
            axes[0, column].set_title(title)
            for row in range(len(image)):
                shown = axes[row, column].imshow(pictures[row], interpolation="nearest", **options)
        bare(axes)
        figure.colorbar(shown, ax=list(axes[:, -1]), fraction=0.05, pad=0.02)
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
