"""Label images: which one belongs to which image, and its classes."""

import json
from pathlib import Path
from typing import Any, Dict, List, Optional

import numpy as np

from .files import BadFile, by_stem, first_line, inside, listed, png_header

CITYSCAPES = [
    "road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation", "terrain", "sky",
    "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle",
]  # fmt: skip


def find_labels(folder: Path, *, mapped: bool) -> Dict[str, Path]:
    """Image -> label PNG below a folder.

    Where some are called ..._labelTrainIds.png (with a label map: ..._labelIds.png), as in Cityscapes, only those are taken:
    colour and instance images lie beside them.

    Raises:
        BadFile: no such folder, nothing in it, two labels of one image.
    """
    if not folder.is_dir():
        raise BadFile(folder, "no such folder")
    paths = listed(folder, [".png"])
    wanted = "_labelIds" if mapped else "_labelTrainIds"
    return by_stem([path for path in paths if path.stem.endswith(wanted)] or paths)


def read_label(path: Path, *, folder: Path, table: Optional[np.ndarray]) -> np.ndarray:
    """The classes of a label image: (H, W) int64. `table`: what `read_label_map` gave.

    Raises:
        BadFile: no grey or palette PNG of 8 or 16 bits, too large, truncated.
    """
    inside(path, folder)
    values = read_png(path, palette=True)
    return values.astype(np.int64) if table is None else table[values]


def read_png(path: Path, *, palette: bool = False) -> np.ndarray:
    """The samples of a grey PNG (or the indices of a palette), (H, W) uint8 or int32; `BadFile` for any other file."""
    from PIL import Image

    header = png_header(path)
    if not (header.colour == 0 and header.depth in (8, 16)) and not (palette and header.colour == 3):
        kinds = {0: "grey", 2: "colour", 3: "palette", 4: "grey with alpha", 6: "colour with alpha"}
        found = f"{header.depth}-bit {kinds.get(header.colour, 'unknown')}"
        raise BadFile(path, f"expected a grey PNG of 8 or 16 bits with one number a pixel, got {found}")
    modes = ("P",) if header.colour == 3 else ("L",) if header.depth == 8 else ("I;16", "I")  # by PIL's version
    try:
        with Image.open(path, formats=["PNG"]) as image:
            # A second header inside of the file would count for PIL and not for the checks above.
            if image.size != (header.width, header.height) or image.mode not in modes:
                raise BadFile(path, f"contradicts its own header: {image.mode} {image.size}")
            return np.asarray(image).astype(np.int32 if header.depth == 16 else np.uint8)
    except BadFile:
        raise
    except Exception as error:  # of many kinds, for what a damaged file can be
        raise BadFile(path, f"cannot be decoded, truncated? ({first_line(error)})") from error


def read_label_map(path: Path, *, num_classes: int, ignore_index: int) -> np.ndarray:
    """From raw label values to training ids, as a table of all 16-bit values; what is not listed is ignored.

    Args:
        path: JSON, an object such as {"7": 0, "8": 1}.

    Raises:
        BadFile: not such a file.
    """
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BadFile(path, f"not a JSON file that can be read: {first_line(error)}") from error
    table = np.full(1 << 16, ignore_index, dtype=np.int64)
    if not isinstance(content, dict) or not content:
        raise BadFile(path, 'expected an object of raw values and training ids, such as {"7": 0, "8": 1}')
    for raw, train in content.items():
        known = isinstance(train, int) and not isinstance(train, bool) and (0 <= train < num_classes or train == ignore_index)
        if len(raw) > 5 or not raw.isdigit() or str(int(raw)) != raw or int(raw) >= 1 << 16 or not known:
            ids = f"0..{num_classes - 1} or {ignore_index}"
            raise BadFile(path, f"expected values 0..65535 mapped to training ids {ids}, got {raw!r}: {train!r}")
        table[int(raw)] = train
    return table


def read_class_names(path: Path, *, num_classes: int) -> List[str]:
    """One name a line; `BadFile` if they are not as many as the classes."""
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise BadFile(path, f"not a text file that can be read: {error}") from error
    if len(names) != num_classes or len(set(names)) != num_classes:
        raise BadFile(path, f"expected {num_classes} different names, one a line, got {len(names)}")
    return names
