"""Label files: which ones are taken, and their classes."""

from pathlib import Path
from typing import List, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from .arrays import read_npy
from .files import BadFile, Listed, inside, listed, read_text
from .images import JPEG, MOST_PIXELS, read_colours, read_numbers
from .label_maps import LabelMap
from .matching import ends_in, of_names
from .sets import SETS, known_set, no_such_set

ENDINGS = (".png", ".tif", ".tiff", ".npy", *JPEG)
_TRAIN_IDS = ("_labelTrainIds", "_labelcsTrainIds", "_train_id")
_IDS, _COLOURS = ("_labelIds",), ("_color", "_labelColor", "_train_color")
# Of Cityscapes; with more, labels are its numbers.
_TRAINED = 19


class LabelKind(NamedTuple):
    """How label files are read."""

    num_classes: int
    ignored: Tuple[int, ...]
    """Labels as `read_label` gives them."""
    map: Optional[LabelMap] = None
    reduce_zero: bool = False
    """0 is no class, and class 0 has the label 1."""
    max_pixels: int = MOST_PIXELS

    @property
    def first(self) -> int:
        """The label of class 0."""
        return 1 if self.reduce_zero else 0

    @property
    def uncounted(self) -> Tuple[int, ...]:
        """All labels that do not count."""
        return (0, *self.ignored) if self.reduce_zero and 0 not in self.ignored else self.ignored


def find_labels(
    folder: Path, kind: LabelKind, *, suffixes: Sequence[str] = (), follow_links: bool = False
) -> Tuple[Listed, List[str]]:
    """The label files below a folder, and what to remark on them.

    With `suffixes`, those alone whose names end so. Without, or with endings of files such as .png alone, where some are called
    ..._labelTrainIds.png as in Cityscapes (with a label map or more than 19 classes ..._labelIds.png, with a palette
    ..._color.png), those alone: other kinds of images lie beside them. Where there are labels that are not JPEG, JPEG files are
    left aside: pictures.

    Raises:
        BadFile: no such folder, nothing in it.
    """
    if not folder.is_dir():
        raise BadFile(folder, "no such folder")
    found = listed(folder, ENDINGS, follow_links=follow_links)
    paths = found.paths
    if suffixes:
        paths = [path for path in paths if ends_in(path, suffixes)]
        if not paths:
            example = found.paths[0].name
            raise BadFile(folder, f"no label's name ends in {' or '.join(suffixes)}; there is, for example, {example}")
    if not of_names(suffixes):
        colours = kind.map is not None and kind.map.colours
        raw = kind.map is not None or kind.num_classes > _TRAINED
        for wanted in [_COLOURS] if colours else [_IDS, _TRAIN_IDS] if raw else [_TRAIN_IDS, _IDS]:
            some = [path for path in paths if ends_in(path, wanted)]
            if some:
                paths = some
                break
    paths = [path for path in paths if path.suffix.lower() not in JPEG] or paths
    remarks = []
    if paths[0].suffix.lower() in JPEG:
        remarks.append(f"{paths[0].name}: labels in JPEG, which changes numbers near edges; save labels as PNG")
    return found._replace(paths=paths), remarks


def read_label(path: Path, *, folder: Path, kind: LabelKind) -> np.ndarray:
    """The labels of a file, as they are or, with a map or palette, the classes: (H, W) int64, or (*S) of an .npy.

    Raises:
        BadFile: not one whole number, or with a palette one of its colours, a pixel; too large, truncated; a value that the
            map lacks.
    """
    inside(path, folder)
    if kind.map is not None and kind.map.colours:
        raw = read_colours(path, max_pixels=kind.max_pixels)
    elif path.suffix.lower() == ".npy":
        raw = _read_array(path, kind.max_pixels)
    else:
        raw = read_numbers(path, palette=True, max_pixels=kind.max_pixels)
    if kind.map is not None:
        try:
            return kind.map(raw)
        except ValueError as error:
            lossy = "; JPEG changes numbers and colours: save labels as PNG" if path.suffix.lower() in JPEG else ""
            raise BadFile(path, f"{error}{lossy}") from error
    label: np.ndarray = raw.astype(np.int64)
    return label


def _read_array(path: Path, max_pixels: int) -> np.ndarray:
    def accept(shape: Tuple[int, ...], dtype: np.dtype) -> None:
        if dtype.kind not in "iub":
            raise BadFile(path, f"expected labels of whole numbers, got {dtype}; save x.astype('uint8')")
        if len(shape) < 2 or not all(type(size) is int and size > 0 for size in shape):
            raise BadFile(path, f"expected a label (H, W), got {shape}; save one label a file")
        if np.prod(shape, dtype=np.float64) > max_pixels:
            raise BadFile(path, f"claims {shape} pixels, more than {max_pixels}; pass --max-pixels for labels this large")

    array = read_npy(path, accept)
    most = np.iinfo(np.int64).max
    if array.dtype == np.uint64 and int(array.max()) > most:  # which would become negative
        raise BadFile(path, f"expected labels up to {most}, got {array.max()}; save x.astype('uint8')")
    return array


def read_class_names(name: str, *, num_classes: int) -> List[str]:
    """Those of a known set, or of a text file, one a line; `BadFile` if they are not as many as the classes.

    Example:
        >>> read_class_names("voc", num_classes=21)[15]
        'person'
    """
    known = known_set(name, num_classes=num_classes, option="--class-names")
    if known is not None:
        return list(known.names)
    path = Path(name)
    if not path.is_file():
        raise no_such_set(name, list(SETS), "a text file of names")
    names = [line.strip() for line in read_text(path, "a text file").splitlines() if line.strip()]
    if len(names) != num_classes or len(set(names)) != num_classes:
        twice = sorted({one for one in names if names.count(one) > 1})
        got = f"{len(names)}" + (f", {twice[0]!r} more than once" if twice else "")
        raise BadFile(path, f"expected {num_classes} different names, one a line, got {got}")
    return names
