"""The embedded benchmarks behind one interface: two domains with the same classes, made on the spot from a seed."""

from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

import numpy as np
import torch
from torch import Tensor

from .._check import check_choice
from ..held_out import hold_out
from ..progress import Progress
from . import digits, mitochondria, streets

NAMES = ("streets", "digits", "mitochondria")
TRAIN_IMAGES = {"streets": 256, "digits": 1024, "mitochondria": 512}
_Picture = Tuple[np.ndarray, np.ndarray]


class Split(NamedTuple):
    """Labelled images of one domain."""

    image: Tensor
    """(N, 3, H, W) float32 in 0..1."""
    label: Tensor
    """(N, H, W) int64."""


class Dataset(NamedTuple):
    """A benchmark. `target_train.label` is there for diagnostics and upper bounds; no method may train on it."""

    name: str
    class_names: Tuple[str, ...]
    palette: np.ndarray
    """(C, 3) uint8, one colour a class."""
    source_train: Split
    target_train: Split
    source_test: Split
    target_test: Split


def load_dataset(name: str, *, seed: int, train_images: Optional[int] = None, test_images: int = 100) -> Dataset:
    """Make a benchmark: `train_images` and `test_images` of each domain. The same arguments give the same pixels.

    About 16 s for `streets`, 3 s for `digits` and 6 s for `mitochondria` on one core.

    Args:
        name: "streets" (procedural street scenes, 10 classes), "digits" (handwriting, 11 classes) or "mitochondria"
            (electron microscopy, procedural, 2 classes).
        seed: of everything random.

    Raises:
        ValueError: an unknown name.
    """
    check_choice("load_dataset", "name", name, NAMES)
    train_images = train_images if train_images is not None else TRAIN_IMAGES[name]
    module = {"streets": streets, "digits": digits, "mitochondria": mitochondria}[name]
    makers = _digits() if name == "digits" else _drawn(module)
    splits: Dict[str, Split] = {}
    jobs = [(part, train_images if part.endswith("train") else test_images) for part in makers]
    with Progress(f"making {name}", sum(count for _, count in jobs)) as progress:
        for i, (part, count) in enumerate(jobs):
            rng = np.random.default_rng([seed, i])  # a stream for each split: one can grow without changing the others
            pictures: List[_Picture] = []
            for _ in range(count):
                pictures.append(makers[part](rng))
                progress.advance()
            images, labels = zip(*pictures)
            splits[part] = Split(torch.from_numpy(np.stack(images)), torch.from_numpy(np.stack(labels)))
    return Dataset(name, tuple(module.CLASS_NAMES), module.PALETTE, **splits)


def hold_out_source(dataset: Dataset) -> Tuple[Dataset, Split]:
    """The data set with seven eighths of its source images to train on, and an eighth, drawn at random, to judge on."""
    train, kept = hold_out(range(len(dataset.source_train.image)))
    source = Split(*(part[train.indices] for part in dataset.source_train))
    return dataset._replace(source_train=source), Split(*(part[kept.indices] for part in dataset.source_train))


def _drawn(module: Any) -> Dict[str, Callable[[np.random.Generator], _Picture]]:
    """Of a benchmark whose scenes are drawn: train and test from one distribution."""

    def make(look: Callable[[Any, np.random.Generator], np.ndarray], rng: np.random.Generator) -> _Picture:
        scene = module.draw_scene(rng)
        return look(scene, rng), module.pixel_label(scene)

    return {
        "source_train": lambda rng: make(module.source_look, rng),
        "target_train": lambda rng: make(module.target_look, rng),
        "source_test": lambda rng: make(module.source_look, rng),
        "target_test": lambda rng: make(module.target_look, rng),
    }


def _digits() -> Dict[str, Callable[[np.random.Generator], _Picture]]:
    train, test = digits.load_material("train"), digits.load_material("test")

    def source(material: digits.Material, rng: np.random.Generator) -> _Picture:
        scene = digits.draw_scene(material, rng)
        return digits.source_look(scene, rng), scene.label

    def target(material: digits.Material, rng: np.random.Generator) -> _Picture:
        scene = digits.draw_scene(material, rng)
        return digits.target_look(scene, material, rng), scene.label

    return {
        "source_train": lambda rng: source(train, rng),
        "target_train": lambda rng: target(train, rng),
        "source_test": lambda rng: source(test, rng),
        "target_test": lambda rng: target(test, rng),
    }
