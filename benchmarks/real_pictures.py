"""Real pictures for `cells.py`: arrays in a folder of yours, and the network and the recipe for them.

They are not part of this repository; `prepare_real_pictures.py` says where they come from and makes the arrays.
"""

from pathlib import Path
from typing import List

import numpy as np
import torch

from dacal_addon.demo.datasets import Dataset, Split
from dacal_addon.demo.recipes import Recipe

RECIPE = Recipe(source_iterations=500, iterations=1000, crop=96, learning_rate=6e-4)
"""For a network that starts from ImageNet, at a smaller learning rate."""
SPLITS = ("source_train", "target_train", "source_test", "target_test")


def names(folder: Path) -> List[str]:
    """Of the data sets in a folder: its files `NAME.npz`."""
    return sorted(path.stem for path in folder.glob("*.npz"))


def load(path: Path) -> Dataset:
    """A file with, for each split, `SPLIT_image` (N, H, W, 1 or 3) and `SPLIT_label` (N, H, W), uint8, 255 = ignored; and
    `class_names`, `palette`."""
    arrays = np.load(path)

    def split(name: str) -> Split:
        image = torch.from_numpy(arrays[f"{name}_image"]).permute(0, 3, 1, 2).float() / 255
        label = torch.from_numpy(arrays[f"{name}_label"].astype(np.int64))
        return Split(image.expand(-1, 3, -1, -1).contiguous(), label)

    splits = {name: split(name) for name in SPLITS}
    return Dataset(path.stem, tuple(map(str, arrays["class_names"])), arrays["palette"], **splits)
