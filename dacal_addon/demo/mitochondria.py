"""`mitochondria`: sections of nervous tissue as two electron microscopes see them, two classes.

After the transfer between electron-microscopy volumes on which the field compares (VNC III to Lucchi et al.), in miniature and
procedural: cells with dark membranes, vesicles, and mitochondria, which alone are labelled. Source: a transmission microscope's
section, stained and sharp. Target: block-face imaging, pale, blurred, with mitochondria whose staining varies and dark bodies
(lipid, dense granules) that look like them.
"""

from typing import List, NamedTuple, Tuple

import numpy as np
from scipy import ndimage

CLASS_NAMES = ("background", "mitochondrion")
PALETTE = np.array([(60, 60, 60), (230, 159, 0)], dtype=np.uint8)
HEIGHT, WIDTH = 64, 64
# Two samples a side in every pixel, averaged: membranes are thinner than a pixel.
_SAMPLES = 2


class Scene(NamedTuple):
    """What is where, supersampled, all (h, w): shares float32 in 0..1, `label` uint8, `cell` int64."""

    label: np.ndarray
    cell: np.ndarray
    membrane: np.ndarray
    rim: np.ndarray
    """The mitochondria's double membrane."""
    cristae: np.ndarray
    vesicle: np.ndarray
    body: np.ndarray
    """Dark bodies that are no mitochondria."""


def draw_scene(rng: np.random.Generator) -> Scene:
    """Cells as regions of nearest sites in a warped plane, and what lies in them."""
    height, width = HEIGHT * _SAMPLES, WIDTH * _SAMPLES
    y, x = np.mgrid[0:height, 0:width].astype(np.float32) / height
    warped_y, warped_x = y + _noise(5, rng) * 0.06, x + _noise(5, rng) * 0.06
    sites = rng.uniform(-0.1, 1.1, (int(rng.integers(9, 16)), 2))
    distance = np.hypot(warped_y[..., None] - sites[:, 0], warped_x[..., None] - sites[:, 1])
    order = np.argpartition(distance, 1, axis=-1)[..., :2]
    near, second = (np.take_along_axis(distance, order[..., i : i + 1], -1)[..., 0] for i in range(2))
    membrane = np.clip(1.6 - np.abs(second - near) * height / 2.2, 0, 1)
    cell = np.argmin(distance, axis=-1)

    label = np.zeros((height, width), np.uint8)
    rim, cristae, vesicle, body = (np.zeros((height, width), np.float32) for _ in range(4))
    taken: List[Tuple[float, float, float]] = []

    def place(low: float, high: float) -> Tuple[float, float, float]:
        """A spot of that radius which touches nothing placed before; radius 0 if none was found."""
        for _ in range(8):
            radius, cy, cx = rng.uniform(low, high), rng.uniform(0.02, 0.98), rng.uniform(0.02, 0.98)
            if all(np.hypot(cy - a, cx - b) > 0.9 * (radius + r) for a, b, r in taken):
                taken.append((cy, cx, radius))
                return radius, cy, cx
        return 0.0, 0.0, 0.0

    def ellipse(radius: float, cy: float, cx: float, stretch: float, angle: float) -> Tuple[np.ndarray, np.ndarray]:
        """Relative distance from the middle (1 on the outline), and the coordinate along the long axis in radii."""
        dy, dx = warped_y - cy, warped_x - cx
        along, across = np.cos(angle) * dx + np.sin(angle) * dy, np.cos(angle) * dy - np.sin(angle) * dx
        return np.hypot(along / (radius * stretch), across / (radius / stretch)), along / radius

    for _ in range(int(rng.integers(2, 6))):
        radius, cy, cx = place(0.06, 0.13)
        if radius:
            r, along = ellipse(radius, cy, cx, rng.uniform(1.0, 1.6), rng.uniform(0, np.pi))
            inside = r <= 1
            label[inside] = 1
            rim = np.where(inside, np.clip(1 - (1 - r) * radius * height / 1.8, 0, 1), rim).astype(np.float32)
            stripes = np.clip(np.sin(along * rng.uniform(9, 14) + 2 * warped_y / radius) * 1.5 - 0.3, 0, 1)
            cristae = np.where(inside, stripes, cristae).astype(np.float32)
            membrane, vesicle = np.where(inside, 0, membrane), np.where(inside, 0, vesicle)
    for _ in range(int(rng.integers(0, 5))):
        radius, cy, cx = place(0.04, 0.09)
        if radius:
            r, _ = ellipse(radius, cy, cx, rng.uniform(1.0, 1.3), rng.uniform(0, np.pi))
            body = np.maximum(body, np.clip((1 - r) * radius * height / 1.5, 0, 1)).astype(np.float32)
    for _ in range(int(rng.integers(0, 3))):
        radius, cy, cx = place(0.06, 0.14)
        for _ in range(int(60 * radius / 0.1) if radius else 0):
            vy, vx = cy + rng.normal(0, radius / 2), cx + rng.normal(0, radius / 2)
            ring = np.abs(np.hypot(y - vy, x - vx) * height - 1.8)
            vesicle = np.maximum(vesicle, np.clip(1.2 - ring, 0, 1) * (label == 0)).astype(np.float32)
    return Scene(label, cell, membrane.astype(np.float32), rim, cristae, vesicle, body * (label == 0))


def pixel_label(scene: Scene) -> np.ndarray:
    """(HEIGHT, WIDTH) int64: what most samples of a pixel are."""
    share = scene.label.reshape(HEIGHT, _SAMPLES, WIDTH, _SAMPLES).mean((1, 3))
    return np.asarray((share > 0.5).astype(np.int64))


def source_look(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """A stained thin section: high contrast, sharp. Returns (3, HEIGHT, WIDTH) float32 in 0..1, grey."""
    return _look(
        scene, rng, inside=(0.42, 0.52), contrast=(0.9, 1.1), body=(0.15, 0.3), blur=(0.0, 0.4), noise=(0.02, 0.04), fade=0.1
    )


def target_look(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """Block-face imaging: pale, soft, unevenly lit and stained. Returns (3, HEIGHT, WIDTH) float32 in 0..1, grey."""
    return _look(
        scene, rng, inside=(0.44, 0.64), contrast=(0.65, 0.95), body=(0.40, 0.56), blur=(0.4, 0.8), noise=(0.02, 0.04), fade=0.8
    )


_Range = Tuple[float, float]


def _look(
    scene: Scene, rng: np.random.Generator, *, inside: _Range, contrast: _Range, body: _Range, blur: _Range, noise: _Range,
    fade: float,
) -> np.ndarray:  # fmt: skip
    """Draw a scene: `inside` the brightness of mitochondria, `fade` how much of their rim and cristae may be lost."""
    sites = int(scene.cell.max()) + 1
    cytoplasm = rng.normal(0.72, 0.05, sites).astype(np.float32)[scene.cell]
    image = cytoplasm * (1 + 0.06 * _noise(24, rng) + 0.05 * _noise(9, rng))
    organelles, count = ndimage.label(scene.label)
    brightness, shown = rng.uniform(*inside, count + 1), rng.uniform(1 - fade, 1.0, count + 1)
    image = np.where(scene.label == 1, brightness[organelles] * (1 + 0.08 * _noise(24, rng)), image)
    image = image - (0.30 * scene.rim + 0.16 * scene.cristae) * shown[organelles]
    image = image * (1 - 0.62 * scene.membrane) * (1 - 0.45 * scene.vesicle)
    image = image * (1 - scene.body) + scene.body * rng.uniform(*body)
    image = 0.55 + rng.uniform(*contrast) * (image - 0.55) * (1 + 0.12 * fade * _noise(2, rng)) + rng.normal(0, 0.03)
    image = ndimage.gaussian_filter(image, _SAMPLES * rng.uniform(*blur))
    image = image.reshape(HEIGHT, _SAMPLES, WIDTH, _SAMPLES).mean((1, 3))
    image = np.clip(image + rng.normal(0, rng.uniform(*noise), image.shape), 0, 1).astype(np.float32)
    return np.ascontiguousarray(np.broadcast_to(image, (3, HEIGHT, WIDTH)))


def _noise(cells: int, rng: np.random.Generator) -> np.ndarray:
    """Smooth noise in about -1..1, (h, w) supersampled: a random grid, interpolated."""
    grid = rng.uniform(-1.0, 1.0, (cells + 2, cells + 2)).astype(np.float32)
    size = HEIGHT * _SAMPLES
    at = np.linspace(0, cells, size, dtype=np.float32)
    hat = np.clip(1 - np.abs(at[:, None] - np.arange(cells + 2, dtype=np.float32)), 0, None)
    return np.asarray(hat @ grid @ hat.T)
