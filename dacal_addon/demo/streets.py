"""`streets`: procedural street scenes in two looks, clean like a game and dull like a camera.

A scene is geometry and albedo; a *look* turns it into a picture. Source and target draw their scenes from the
same distribution, so that everything the source-only student loses on the target is due to the look.
"""

from typing import List, NamedTuple, Sequence, Tuple

import numpy as np
from scipy import ndimage

CLASS_NAMES = (
    "road", "sidewalk", "building", "fence", "pole", "traffic sign", "vegetation", "sky", "person", "car",
)  # fmt: skip
# The colours of these classes in Cityscapes' own label viewer (Cordts et al., CVPR 2016), so that figures read at a glance.
PALETTE = np.array(
    [
        (128, 64, 128), (244, 35, 232), (70, 70, 70), (190, 153, 153), (153, 153, 153),
        (220, 220, 0), (107, 142, 35), (70, 130, 180), (220, 20, 60), (0, 0, 142),
    ],
    dtype=np.uint8,
)  # fmt: skip
ROAD, SIDEWALK, BUILDING, FENCE, POLE, SIGN, VEGETATION, SKY, PERSON, CAR = range(len(CLASS_NAMES))

HEIGHT, WIDTH = 64, 128
# Three samples a side in every pixel: edges are anti-aliased as a lens would, and a pole may be thinner than a pixel.
_SAMPLES = 3

_Colour = Tuple[float, float, float]


class Scene(NamedTuple):
    """What is where, before any look: `label` (h, w) uint8 and `albedo` (h, w, 3) float32 in 0..1, both supersampled."""

    label: np.ndarray
    albedo: np.ndarray


class _Canvas:
    """Paints shapes, far to near, into a label map and an albedo map. Coordinates: x in 0..2, y in 0..1, y down."""

    def __init__(self) -> None:
        height, width = HEIGHT * _SAMPLES, WIDTH * _SAMPLES
        self.y, self.x = np.mgrid[0:height, 0:width].astype(np.float32)
        self.y, self.x = (self.y + 0.5) / height, (self.x + 0.5) / height
        self.label = np.full((height, width), SKY, np.uint8)
        self.albedo = np.zeros((height, width, 3), np.float32)

    def paint(self, where: np.ndarray, label: int, colour: np.ndarray) -> None:
        self.label[where] = label
        self.albedo[where] = colour if colour.ndim == 1 else colour[where]

    def _window(self, left: float, right: float, top: float, bottom: float) -> Tuple[slice, slice]:
        """The samples that a shape with these extents can touch: everything else need not be computed."""
        scale = HEIGHT * _SAMPLES
        rows = slice(max(0, int(top * scale) - 1), max(0, int(bottom * scale) + 2))
        return rows, slice(max(0, int(left * scale) - 1), max(0, int(right * scale) + 2))

    def box(self, left: float, right: float, top: float, bottom: float) -> np.ndarray:
        return self.polygon([(left, top), (right, top), (right, bottom), (left, bottom)])

    def ellipse(self, x: float, y: float, rx: float, ry: float) -> np.ndarray:
        inside = np.zeros(self.label.shape, bool)
        at = self._window(x - rx, x + rx, y - ry, y + ry)
        inside[at] = ((self.x[at] - x) / rx) ** 2 + ((self.y[at] - y) / ry) ** 2 <= 1.0
        return inside

    def polygon(self, corners: Sequence[Tuple[float, float]]) -> np.ndarray:
        """A convex polygon, corners in clockwise order on the screen."""
        inside = np.zeros(self.label.shape, bool)
        xs, ys = zip(*corners)
        at = self._window(min(xs), max(xs), min(ys), max(ys))
        inside[at] = True
        for (x0, y0), (x1, y1) in zip(corners, [*corners[1:], corners[0]]):
            inside[at] &= (x1 - x0) * (self.y[at] - y0) - (y1 - y0) * (self.x[at] - x0) >= 0
        return inside


def _noise(shape: Tuple[int, int], cells: Tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Smooth value noise in -1..1: a random grid of `cells`, interpolated (bilinearly, one axis at a time) up to `shape`."""
    grid = rng.uniform(-1.0, 1.0, (cells[0] + 1, cells[1] + 1)).astype(np.float32)
    for size, count in zip(shape, cells):
        position = np.linspace(0, count, size, dtype=np.float32)
        hat = np.clip(1 - np.abs(position[:, None] - np.arange(count + 1, dtype=np.float32)), 0, None)
        grid = (hat @ grid).T
    return grid


def _vary(colour: _Colour, amount: float, rng: np.random.Generator) -> np.ndarray:
    """A colour near the given one: brightness moves more than hue."""
    base = np.asarray(colour, np.float32)
    return np.asarray(
        np.clip(base * rng.uniform(1 - amount, 1 + amount) + rng.normal(0, amount / 5, 3), 0, 1).astype(np.float32)
    )


def _pick(colours: Sequence[_Colour], rng: np.random.Generator) -> _Colour:
    return colours[int(rng.integers(len(colours)))]


_BUILDING = ((0.72, 0.38, 0.30), (0.80, 0.68, 0.45), (0.55, 0.55, 0.62), (0.62, 0.45, 0.50), (0.85, 0.80, 0.72))
_CAR = ((0.85, 0.08, 0.08), (0.08, 0.15, 0.75), (0.90, 0.90, 0.92), (0.10, 0.10, 0.12), (0.95, 0.75, 0.05), (0.1, 0.5, 0.3))
_SIGN = ((0.90, 0.05, 0.05), (0.95, 0.85, 0.05), (0.05, 0.25, 0.85))
_COAT = ((0.75, 0.10, 0.15), (0.10, 0.12, 0.35), (0.15, 0.45, 0.35), (0.90, 0.55, 0.10), (0.25, 0.20, 0.20))
_SKIN = ((0.90, 0.70, 0.58), (0.55, 0.38, 0.28), (0.78, 0.55, 0.42))


def _building(canvas: _Canvas, left: float, right: float, top: float, bottom: float, rng: np.random.Generator) -> None:
    wall = _vary(_pick(_BUILDING, rng), 0.15, rng)
    canvas.paint(canvas.box(left, right, top, bottom), BUILDING, wall)
    pitch_x, pitch_y = rng.uniform(0.05, 0.10), rng.uniform(0.07, 0.12)
    glass = np.clip(wall * rng.choice([0.45, 1.35]) + np.array([0, 0.02, 0.08]), 0, 1).astype(np.float32)
    windows = canvas.box(left + 0.02, right - 0.02, top + 0.03, bottom - 0.05)
    windows &= (np.mod(canvas.x - left, pitch_x) > 0.45 * pitch_x) & (np.mod(canvas.y - top, pitch_y) > 0.5 * pitch_y)
    canvas.paint(windows, BUILDING, glass)


def _tree(canvas: _Canvas, x: float, base: float, size: float, rng: np.random.Generator) -> None:
    green = _vary((0.18, 0.50, 0.12), 0.25, rng)
    canvas.paint(
        canvas.box(x - 0.03 * size, x + 0.03 * size, base - 0.6 * size, base),
        VEGETATION,
        np.array([0.35, 0.25, 0.15], np.float32),
    )
    for _ in range(int(rng.integers(4, 7))):
        dx, dy = rng.normal(0, 0.16 * size), rng.normal(0, 0.13 * size)
        radius = size * rng.uniform(0.16, 0.30)
        leaf = np.clip(green * rng.uniform(0.8, 1.2), 0, 1).astype(np.float32)
        canvas.paint(canvas.ellipse(x + dx, base - 0.75 * size + dy, radius, 0.85 * radius), VEGETATION, leaf)


def _pole(canvas: _Canvas, x: float, base: float, size: float, rng: np.random.Generator) -> None:
    half = 0.012 * size + 0.006
    top = base - size * rng.uniform(0.9, 1.3)
    canvas.paint(canvas.box(x - half, x + half, top, base), POLE, _vary((0.55, 0.55, 0.58), 0.2, rng))
    if rng.random() < 0.65:
        radius = 0.075 * size + 0.012
        y = top + radius
        plate = canvas.ellipse(x, y, radius, radius)
        if rng.random() < 0.4:
            plate = canvas.polygon(
                [(x - radius, y - radius), (x + radius, y - radius), (x + radius, y + radius), (x - radius, y + radius)]
            )
        elif rng.random() < 0.5:
            plate = canvas.polygon([(x, y - 1.2 * radius), (x + 1.2 * radius, y + radius), (x - 1.2 * radius, y + radius)])
        colour = np.asarray(_pick(_SIGN, rng), np.float32)
        canvas.paint(plate, SIGN, colour)
        canvas.paint(plate & canvas.ellipse(x, y, 0.5 * radius, 0.5 * radius), SIGN, np.array([0.95, 0.95, 0.95], np.float32))


def _person(canvas: _Canvas, x: float, base: float, size: float, rng: np.random.Generator) -> None:
    coat, trousers = _vary(_pick(_COAT, rng), 0.2, rng), _vary((0.2, 0.2, 0.3), 0.4, rng)
    stride = rng.uniform(0.02, 0.10) * size
    for side in (-1, 1):
        foot, hip = x + side * stride, x + side * 0.03 * size
        thigh = 0.06 * size
        canvas.paint(
            canvas.polygon(
                [
                    (hip - thigh, base - 0.5 * size),
                    (hip + thigh, base - 0.5 * size),
                    (foot + 0.05 * size, base),
                    (foot - 0.05 * size, base),
                ]
            ),
            PERSON,
            trousers,
        )
    canvas.paint(canvas.ellipse(x, base - 0.62 * size, 0.14 * size, 0.24 * size), PERSON, coat)
    canvas.paint(
        canvas.ellipse(x, base - 0.92 * size, 0.075 * size, 0.09 * size), PERSON, np.asarray(_pick(_SKIN, rng), np.float32)
    )


def _car(canvas: _Canvas, x: float, base: float, size: float, rng: np.random.Generator) -> None:
    body = _vary(_pick(_CAR, rng), 0.15, rng)
    half, height = (0.62 * size, 0.62 * size) if rng.random() < 0.5 else (1.05 * size, 0.58 * size)
    roof, belt, sill = base - height, base - 0.58 * height, base - 0.12 * height
    dark = np.array([0.06, 0.06, 0.07], np.float32)
    for side in (-0.62, 0.62):
        canvas.paint(canvas.ellipse(x + side * half, base - 0.14 * height, 0.19 * height, 0.19 * height), CAR, dark)
    canvas.paint(
        canvas.polygon([(x - 0.62 * half, roof), (x + 0.55 * half, roof), (x + 0.85 * half, belt), (x - 0.85 * half, belt)]),
        CAR,
        body,
    )
    canvas.paint(
        canvas.polygon(
            [
                (x - 0.52 * half, roof + 0.08 * height),
                (x + 0.46 * half, roof + 0.08 * height),
                (x + 0.68 * half, belt),
                (x - 0.70 * half, belt),
            ]
        ),
        CAR,
        np.array([0.30, 0.38, 0.45], np.float32),
    )
    canvas.paint(canvas.box(x - half, x + half, belt, sill), CAR, body)
    for side, lamp in ((-0.9, (0.95, 0.9, 0.7)), (0.9, (0.85, 0.1, 0.1))):
        canvas.paint(
            canvas.ellipse(x + side * half, base - 0.42 * height, 0.07 * height, 0.05 * height),
            CAR,
            np.asarray(lamp, np.float32),
        )


def draw_scene(rng: np.random.Generator) -> Scene:
    """One street, seen from a car: sky, houses, trees, fences, pavements, road, and what stands and drives on them."""
    canvas = _Canvas()
    horizon, vanish = rng.uniform(0.40, 0.52), rng.uniform(0.75, 1.25)
    depth = np.clip(canvas.y / horizon, 0, 1)[..., None]
    zenith, haze = _vary((0.25, 0.50, 0.92), 0.12, rng), _vary((0.70, 0.85, 0.98), 0.05, rng)
    canvas.albedo[:] = zenith * (1 - depth) + haze * depth
    cloud = _noise(canvas.label.shape, (5, 7), rng)
    canvas.albedo[cloud > 0.45] = np.array([0.95, 0.95, 0.97], np.float32)

    # Ground: pavement everywhere below the kerb line, then the road as a wedge to the vanishing point.
    ground = canvas.y >= horizon
    canvas.paint(ground, SIDEWALK, _vary((0.72, 0.66, 0.62), 0.12, rng))
    foot_left, foot_right = rng.uniform(-0.9, 0.1), rng.uniform(1.9, 2.9)
    spread = 0.04
    far = horizon - 0.01
    canvas.paint(
        canvas.polygon([(vanish - spread, far), (vanish + spread, far), (foot_right, 1.01), (foot_left, 1.01)]) & ground,
        ROAD,
        _vary((0.36, 0.35, 0.40), 0.15, rng),
    )
    along = np.clip((canvas.y - horizon) / (1 - horizon), 1e-3, None)
    lane = vanish + along * ((foot_left + foot_right) / 2 - vanish)
    dashes = (np.abs(canvas.x - lane) < 0.025 * along) & (np.mod(1 / along + rng.random(), 1.0) < 0.5) & (canvas.label == ROAD)
    canvas.paint(dashes, ROAD, np.array([0.92, 0.92, 0.88], np.float32))

    # Both sides, far to near, each thing's foot on the line where the pavement ends.
    def side_x(side: int, y: float, beyond: float) -> float:
        reach = (y - horizon) / (1 - horizon)
        kerb = vanish + side * spread + reach * ((foot_left if side < 0 else foot_right) - vanish)
        return float(kerb + side * beyond * (0.08 + reach))

    for side in (-1, 1):
        x = vanish + side * rng.uniform(0.04, 0.25)
        while -0.1 < x < 2.1:
            width = rng.uniform(0.20, 0.46)
            left, right = (x - width, x) if side < 0 else (x, x + width)
            foot = horizon + rng.uniform(0.02, 0.05) + 0.06 * abs(x - vanish)
            kind = rng.random()
            if kind < 0.75:
                _building(canvas, left, right, horizon - rng.uniform(0.08, 0.24) - 0.35 * abs(x - vanish), foot, rng)
            elif kind < 0.90:
                green = _vary((0.20, 0.48, 0.14), 0.25, rng)
                bump = 0.03 * _noise(canvas.label.shape, (1, 24), rng)
                hedge = canvas.box(left, right, horizon - 0.16, foot)
                canvas.paint(hedge & (canvas.y + bump > horizon - 0.10), VEGETATION, green)
            x += side * width * rng.uniform(0.9, 1.05)
        if rng.random() < 0.6:
            # A fence: pickets and two rails, seen through as real ones are but labelled as a whole.
            start, stop = sorted(rng.uniform(0.0, 2.0, 2))
            if side < 0:
                start, stop = start / 2, stop / 2
            else:
                start, stop = 1 + start / 2, 1 + stop / 2
            base = horizon + rng.uniform(0.05, 0.10)
            panel = canvas.box(start, stop, base - 0.10, base) & (np.abs(canvas.x - vanish) > 0.12)
            paint = _vary((0.62, 0.42, 0.22), 0.2, rng)
            gaps = np.mod(canvas.x, 0.036) > 0.020
            shade = np.where(gaps[..., None], canvas.albedo * 0.5 + 0.5 * paint * 0.6, paint).astype(np.float32)
            canvas.paint(panel, FENCE, shade)

    things: List[Tuple[float, str, int]] = []
    for name, low, high in (("tree", 1, 4), ("pole", 2, 6), ("person", 2, 6), ("car", 1, 4)):
        for _ in range(int(rng.integers(low, high + 1))):
            things.append((horizon + (1 - horizon) * rng.uniform(0.03, 0.75) ** 1.3, name, int(rng.choice([-1, 1]))))
    for foot, name, side in sorted(things):
        size = 0.10 + 0.95 * (foot - horizon)
        if name == "tree":
            _tree(canvas, side_x(side, foot, rng.uniform(0.35, 1.0)), foot, 1.1 * size + 0.12, rng)
        elif name == "pole":
            _pole(canvas, side_x(side, foot, rng.uniform(0.05, 0.4)), foot, 1.2 * size + 0.12, rng)
        elif name == "person":
            _person(canvas, side_x(side, foot, rng.uniform(-0.1, 0.7)), foot, 0.7 * size + 0.05, rng)
        else:
            _car(canvas, side_x(side, foot, -rng.uniform(0.25, 0.7)), foot, 0.55 * size + 0.02, rng)
    return Scene(canvas.label, canvas.albedo)


def _develop(picture: np.ndarray) -> np.ndarray:
    """Average the samples of each pixel: (h * s, w * s, 3) -> (3, h, w) float32."""
    small = picture.reshape(HEIGHT, _SAMPLES, WIDTH, _SAMPLES, 3).mean((1, 3))
    return np.ascontiguousarray(small.transpose(2, 0, 1), dtype=np.float32)


def source_look(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """A game's look: saturated, evenly lit, sharp, without noise. Returns (3, HEIGHT, WIDTH) float32 in 0..1."""
    grey = scene.albedo.mean(2, keepdims=True)
    vivid = grey + 1.25 * (scene.albedo - grey)
    image: np.ndarray = np.clip(_develop(vivid * rng.uniform(0.92, 1.08)), 0, 1)
    return image


# The colour towards which each class drifts on the target: the pavement towards asphalt and asphalt towards pavement, houses
# towards the haze and the sky towards their grey, autumn leaves towards fences and mossy fences towards leaves.
_TARGET_COLOUR = np.array(
    [
        (0.74, 0.68, 0.64), (0.36, 0.35, 0.40), (0.70, 0.78, 0.84), (0.28, 0.40, 0.16), (0.30, 0.28, 0.26),
        (0.55, 0.60, 0.55), (0.58, 0.40, 0.24), (0.66, 0.62, 0.60), (0.45, 0.42, 0.42), (0.40, 0.40, 0.44),
    ],
    dtype=np.float32,
)  # fmt: skip
_TARGET_TEXTURE = np.array([0.16, 0.22, 0.24, 0.16, 0.10, 0.10, 0.40, 0.08, 0.20, 0.16], np.float32)


def target_look(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """A dashboard camera's look: dull, textured, unevenly lit, soft, noisy. Returns (3, HEIGHT, WIDTH) float32 in 0..1."""
    shape = scene.label.shape
    # How far a class drifts differs from picture to picture, as weather and materials do. In a fifth of them it drifts the
    # whole way, so that a network which goes by colour is surely wrong there; only the surroundings tell otherwise.
    classes = (len(CLASS_NAMES), 1)
    drift = np.where(rng.random(classes) < 1 / 5, rng.uniform(0.9, 1.1, classes), rng.uniform(0.0, 0.4, classes))
    drift = drift.astype(np.float32)[scene.label]
    picture = scene.albedo + drift * (_TARGET_COLOUR[scene.label] - scene.albedo)
    grain = 0.6 * _noise(shape, (48, 96), rng) + 0.4 * _noise(shape, (14, 28), rng)
    picture = picture * (1 + _TARGET_TEXTURE[scene.label] * grain)[..., None]
    grey = picture.mean(2, keepdims=True)
    picture = grey + rng.uniform(0.55, 0.85) * (picture - grey)
    # Low sun from one side and clouds over the street: illumination falls off across the picture.
    angle, fall = rng.uniform(0, 2 * np.pi), rng.uniform(0.12, 0.28)
    rows, columns = np.linspace(-1, 1, shape[0])[:, None], np.linspace(-1, 1, shape[1])[None, :]
    light = 1 + fall * (np.cos(angle) * columns + np.sin(angle) * rows) / 1.4 + 0.05 * _noise(shape, (2, 4), rng)
    picture = picture * light[..., None].astype(np.float32)
    image = _develop(0.06 + 0.82 * picture * rng.uniform(0.9, 1.1))
    image = ndimage.gaussian_filter(image, (0, *[rng.uniform(0.3, 0.7)] * 2))
    image = image + rng.normal(0, rng.uniform(0.004, 0.012), image.shape)
    return np.asarray(np.clip(image, 0, 1).astype(np.float32))


def pixel_label(scene: Scene) -> np.ndarray:
    """The class under each pixel's centre: (HEIGHT, WIDTH) int64."""
    centre = _SAMPLES // 2
    return scene.label[centre::_SAMPLES, centre::_SAMPLES].astype(np.int64)
