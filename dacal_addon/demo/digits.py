"""`digits`: real handwriting as a segmentation task, on plain paper (source) and blended over photographs (target).

After MNIST-M (Ganin & Lempitsky, ICML 2015), which took |photograph - digit| from MNIST and BSDS500. Here the digits and the
two photographs are those that scikit-learn ships, so that nothing is downloaded.
"""

from typing import List, NamedTuple, Tuple

import numpy as np
from scipy import ndimage

CLASS_NAMES = ("background", *"0123456789")
PALETTE = np.array(
    [
        (40, 40, 40), (31, 119, 180), (255, 127, 14), (44, 160, 44), (214, 39, 40), (148, 103, 189),
        (140, 86, 75), (227, 119, 194), (188, 189, 34), (23, 190, 207), (240, 240, 240),
    ],
    dtype=np.uint8,
)  # fmt: skip
HEIGHT, WIDTH = 48, 64


class Material(NamedTuple):
    """What scikit-learn ships: `ink` (D, 8, 8) float32 in 0..1, `digit` (D,) int64, `photographs`, each (h, w, 3) in 0..1."""

    ink: np.ndarray
    digit: np.ndarray
    photographs: List[np.ndarray]


def load_material(split: str) -> Material:
    """Digits and photographs of one split: no digit and no part of a photograph is in both 'train' and 'test'."""
    from sklearn.datasets import load_digits, load_sample_images

    data = load_digits()
    # The file is ordered by writer (UCI "optdigits"): a cut keeps the writers of the test split unseen, but for the one whom
    # it cuts through.
    cut = 1300
    chosen = slice(None, cut) if split == "train" else slice(cut, None)
    photographs = []
    for photograph in load_sample_images().images:
        half = photograph.shape[1] * 2 // 3
        part = photograph[:, :half] if split == "train" else photograph[:, half:]
        photographs.append(part.astype(np.float32) / 255)
    return Material((data.images[chosen] / 16).astype(np.float32), data.target[chosen].astype(np.int64), photographs)


class Scene(NamedTuple):
    """Where the digits are: `ink` (HEIGHT, WIDTH) float32 in 0..1 and `label` (HEIGHT, WIDTH) int64."""

    ink: np.ndarray
    label: np.ndarray


def draw_scene(material: Material, rng: np.random.Generator) -> Scene:
    """Two to four digits of different size and slant on a sheet, without overlap."""
    ink = np.zeros((HEIGHT, WIDTH), np.float32)
    label = np.zeros((HEIGHT, WIDTH), np.int64)
    taken: List[Tuple[int, int, int, int]] = []
    for _ in range(int(rng.integers(6, 12))):
        i = int(rng.integers(len(material.digit)))
        size = int(rng.integers(28, 41))
        glyph = ndimage.zoom(material.ink[i], size / 8, order=1)
        glyph = ndimage.rotate(glyph, rng.uniform(-8, 8), reshape=False, order=1)
        columns = np.flatnonzero(glyph.max(0) > 0.3)
        glyph = np.clip(glyph[:, columns[0] : columns[-1] + 1], 0, 1)
        h, w = glyph.shape
        top, left = int(rng.integers(0, HEIGHT - h + 1)), int(rng.integers(0, WIDTH - w + 1))
        if any(top < b and t < top + h and left < r and x < left + w for t, b, x, r in taken):
            continue
        taken.append((top, top + h, left, left + w))
        at = (slice(top, top + h), slice(left, left + w))
        ink[at] = glyph
        label[at][glyph > 0.35] = 1 + material.digit[i]
    return Scene(ink, label)


def source_look(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """Pale ink on dark paper of one colour, or dark ink on pale paper. Returns (3, HEIGHT, WIDTH) float32 in 0..1."""
    paper, ink = rng.uniform(0.0, 0.35, 3), rng.uniform(0.65, 1.0, 3)
    if rng.random() < 0.5:
        paper, ink = ink, paper
    image = paper[:, None, None] * (1 - scene.ink) + ink[:, None, None] * scene.ink
    return np.asarray(np.clip(image + rng.normal(0, 0.02, image.shape), 0, 1).astype(np.float32))


def target_look(scene: Scene, material: Material, rng: np.random.Generator) -> np.ndarray:
    """|photograph - ink|, channel by channel, with the digits' strength varying. Returns (3, HEIGHT, WIDTH) float32 in 0..1."""
    photograph = material.photographs[int(rng.integers(len(material.photographs)))]
    zoom = int(rng.integers(1, 4))
    height, width = HEIGHT * zoom, WIDTH * zoom
    zoom = zoom if height <= photograph.shape[0] and width <= photograph.shape[1] else 1
    height, width = HEIGHT * zoom, WIDTH * zoom
    top = int(rng.integers(0, photograph.shape[0] - height + 1))
    left = int(rng.integers(0, photograph.shape[1] - width + 1))
    crop = photograph[top : top + height, left : left + width]
    crop = crop.reshape(HEIGHT, zoom, WIDTH, zoom, 3).mean((1, 3)).transpose(2, 0, 1)
    strength = rng.uniform(0.75, 1.0, 3)[:, None, None]
    return np.asarray(np.abs(crop - strength * scene.ink).astype(np.float32))
