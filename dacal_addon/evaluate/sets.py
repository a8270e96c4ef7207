"""Public data sets: the names of their classes, what their raw labels mean, and the colours of their colour maps."""

from typing import Dict, List, NamedTuple, Optional

from .files import BadFile

IGNORED = -1
"""In `KnownSet.raw` and `.colours`: of no class."""


class KnownSet(NamedTuple):
    """One set."""

    names: List[str]
    raw: Optional[Dict[int, int]] = None
    """Raw label -> class, or `IGNORED`. Another value is an error and no guess: it tells of another kind of file."""
    colours: Optional[Dict[int, int]] = None
    """0xRRGGBB -> class, or `IGNORED`."""


def known_set(name: str, *, num_classes: int, option: str) -> Optional[KnownSet]:
    """The set of a name, if there is one; `ValueError` for another number of classes than its own.

    Example:
        >>> known_set("cityscapes", num_classes=19, option="--label-map").raw[26]
        13
    """
    found = SETS.get(name)
    if found is not None and len(found.names) != num_classes:
        raise ValueError(f"expected --num-classes {len(found.names)} with {option} {name}, got {num_classes}")
    return found


def no_such_set(name: str, known: List[str], expected: str) -> BadFile:
    """The error for what is neither a name nor a file."""
    return BadFile(name, f"expected {expected}, or one of {', '.join(known)}, got neither")


# Cordts et al., The Cityscapes Dataset (CVPR 2016), cityscapesscripts/helpers/labels.py; ACDC has the same numbers (Sakaridis
# et al., ICCV 2021).
CITYSCAPES = [
    "road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation", "terrain", "sky",
    "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle",
]  # fmt: skip
_CITYSCAPES_IDS = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]
# Licence plates have the colour of cars, and groups of poles that of poles: a colour map does not tell them apart.
_CITYSCAPES_COLOURS = [
    0x804080, 0xF423E8, 0x464646, 0x66669C, 0xBE9999, 0x999999, 0xFAAA1E, 0xDCDC00, 0x6B8E23, 0x98FB98, 0x4682B4,
    0xDC143C, 0xFF0000, 0x00008E, 0x000046, 0x003C64, 0x005064, 0x0000E6, 0x770B20,
]  # fmt: skip
# Unlabelled, dynamic, ground, parking, rail track, guard rail, bridge, tunnel, caravan, trailer.
_CITYSCAPES_VOID = [0x000000, 0x6F4A00, 0x510051, 0xFAAAA0, 0xE6968C, 0xB4A5B4, 0x966464, 0x96785A, 0x00005A, 0x00006E]

# Neuhold et al., The Mapillary Vistas Dataset (ICCV 2017), the 66 numbers of its version 1.2. Which are which of Cityscapes'
# classes is as Choi et al., RobustNet (CVPR 2021), have it: road with lane markings and manholes, sidewalk with curbs, pole
# with utility poles, the fronts of traffic signs, three kinds of riders.
_MAPILLARY_IDS = [
    [13, 24, 41], [2, 15], [17], [6], [3], [45, 47], [48], [50], [30], [29], [27], [19], [20, 21, 22], [55], [61], [54], [58],
    [57], [52],
]  # fmt: skip

# Everingham et al., The PASCAL Visual Object Classes Challenge (IJCV 2010): numbers are classes, 255 their border.
_VOC = [
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
]  # fmt: skip

# Zhou et al., Scene Parsing through ADE20K (CVPR 2017), the benchmark's 150 classes; 0 is everything else. Its colour map gives
# roads and skyscrapers one colour, so that no classes can be read off it.
_ADE20K = [
    "wall", "building", "sky", "floor", "tree", "ceiling", "road", "bed", "windowpane", "grass", "cabinet", "sidewalk",
    "person", "earth", "door", "table", "mountain", "plant", "curtain", "chair", "car", "water", "painting", "sofa", "shelf",
    "house", "sea", "mirror", "rug", "field", "armchair", "seat", "fence", "desk", "rock", "wardrobe", "lamp", "bathtub",
    "railing", "cushion", "base", "box", "column", "signboard", "chest of drawers", "counter", "sand", "sink", "skyscraper",
    "fireplace", "refrigerator", "grandstand", "path", "stairs", "runway", "case", "pool table", "pillow", "screen door",
    "stairway", "river", "bridge", "bookcase", "blind", "coffee table", "toilet", "flower", "book", "hill", "bench",
    "countertop", "stove", "palm", "kitchen island", "computer", "swivel chair", "boat", "bar", "arcade machine", "hovel",
    "bus", "towel", "light", "truck", "tower", "chandelier", "awning", "streetlight", "booth", "television receiver",
    "airplane", "dirt track", "apparel", "pole", "land", "bannister", "escalator", "ottoman", "bottle", "buffet", "poster",
    "stage", "van", "ship", "fountain", "conveyer belt", "canopy", "washer", "plaything", "swimming pool", "stool", "barrel",
    "basket", "waterfall", "tent", "bag", "minibike", "cradle", "oven", "ball", "food", "step", "tank", "trade name",
    "microwave", "pot", "animal", "bicycle", "lake", "dishwasher", "screen", "blanket", "sculpture", "hood", "sconce", "vase",
    "traffic light", "tray", "ashcan", "fan", "pier", "crt screen", "plate", "monitor", "bulletin board", "shower",
    "radiator", "glass", "clock", "flag",
]  # fmt: skip


def _voc_colour(number: int) -> int:
    """The k-th three bits of a number are bit 7 - k of red, green and blue; see VOCdevkit's VOClabelcolormap.m."""
    channels = (sum((number >> (3 * k + channel) & 1) << (7 - k) for k in range(8)) for channel in range(3))
    red, green, blue = channels
    return red << 16 | green << 8 | blue


def _numbered(values: List[int], void: List[int]) -> Dict[int, int]:
    return {**dict.fromkeys(void, IGNORED), **{value: place for place, value in enumerate(values)}}


_STREETS = KnownSet(
    CITYSCAPES,
    # 255 is what 8 bits make of -1, the number of licence plates.
    _numbered(_CITYSCAPES_IDS, [*range(34), 255]),
    _numbered(_CITYSCAPES_COLOURS, _CITYSCAPES_VOID),
)
SETS: Dict[str, KnownSet] = {
    "cityscapes": _STREETS,
    "acdc": _STREETS,
    "mapillary": KnownSet(
        CITYSCAPES,
        {**dict.fromkeys(range(66), IGNORED), **{raw: place for place, ids in enumerate(_MAPILLARY_IDS) for raw in ids}},
    ),
    "ade20k": KnownSet(_ADE20K, _numbered(list(range(1, 151)), [0])),
    "voc": KnownSet(
        _VOC,
        _numbered(list(range(21)), [255]),
        _numbered([_voc_colour(number) for number in range(21)], [_voc_colour(255)]),
    ),
    "binary": KnownSet(["background", "foreground"], {0: 0, 255: 1}, {0x000000: 0, 0xFFFFFF: 1}),
}
