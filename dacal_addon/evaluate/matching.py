"""Which label belongs to which prediction, by their names."""

import unicodedata
from pathlib import Path
from typing import Callable, Dict, List, NamedTuple, Sequence, Tuple

from .arrays import ARRAYS
from .files import BadFile
from .images import FORMATS

CONFIDENCE, CLASS = "_confidence", "_prediction"
# Endings of names that say what a file is and not which image it is of.
_OF_IMAGES = ("_leftImg8bit", "_rgb_ref_anon", "_rgb_anon")
_KINDS = ("labelTrainIds", "labelcsTrainIds", "labelIds", "labelColor", "color")
_OF_LABELS = (
    *(f"_{of}_{kind}" for of in ("gtFine", "gtCoarse", "gt") for kind in _KINDS),  # Cityscapes, ACDC, India Driving
    *(f"_{kind}" for kind in _KINDS),
    "_train_id",  # BDD100K
    "_train_color",
    "_L",  # CamVid
)


class Matched(NamedTuple):
    """Image -> file, on either side."""

    predictions: Dict[str, Path]
    labels: Dict[str, Path]


def matched(
    predictions: Sequence[Path],
    labels: Sequence[Path],
    *,
    folders: Tuple[Path, Path],
    prediction_suffixes: Sequence[str] = (),
    label_suffixes: Sequence[str] = (),
) -> Matched:
    """Match files by their names without endings, and in whatever form of Unicode.

    Where several files of a side have one name, as frames of several sequences do, the folders that they lie in count too: as
    few of the last ones as tell all files apart.

    Args:
        folders: of the predictions and of the labels.
        prediction_suffixes, label_suffixes: endings that a name must have, one of them, and that do not count. Without any,
            or of files alone such as .npy, those of Cityscapes, ACDC, India Driving, BDD100K and CamVid do not count.

    Raises:
        BadFile: two files of one image.

    Example:
        >>> files = [Path("p/ulm_1_leftImg8bit.npy")], [Path("l/ulm/ulm_1_gtFine_labelTrainIds.png")]
        >>> matched(*files, folders=(Path("p"), Path("l"))).labels
        {'ulm_1': PosixPath('l/ulm/ulm_1_gtFine_labelTrainIds.png')}
    """
    prediction_suffixes, label_suffixes = of_names(prediction_suffixes), of_names(label_suffixes)
    ours = {_name(path): _without(_name(path), prediction_suffixes or _OF_IMAGES) for path in predictions}
    images = set(ours.values())

    def of_label(path: Path) -> str:
        name = _name(path)
        if not label_suffixes and (name in ours or name in images):
            return ours.get(name, name)  # such as scan_L beside scan_R, of which _L is no ending
        return _without(name, label_suffixes or (*_OF_LABELS, *_OF_IMAGES))

    sides: List[Tuple[Sequence[Path], Path, Callable[[Path], str]]] = [
        (predictions, folders[0], lambda path: ours[_name(path)]),
        (labels, folders[1], of_label),
    ]
    depth = 1
    while True:
        named = [[(_last(path, folder, stem(path), depth), path) for path in paths] for paths, folder, stem in sides]
        if all(len(dict(side)) == len(side) for side in named):
            return Matched(dict(named[0]), dict(named[1]))
        if depth > max(len(path.parts) for paths, _, _ in sides for path in paths):
            option = "--prediction-suffix" if _seconds(named[0]) else "--label-suffix"
            name, path, first = [*_seconds(named[0]), *_seconds(named[1])][0]
            remedy = f"say with {option} how the names end that are meant"
            if first.suffix != path.suffix:
                remedy = f"pass {option} {first.suffix} or {option} {path.suffix}"
            remedy += ", or move one of them elsewhere"
            raise BadFile(path, f"the second file of image {name!r}, after {first}; {remedy}")
        depth += 1


def ends_in(path: Path, suffixes: Sequence[str]) -> bool:
    """Whether a name has one of the endings, for pairs before `CONFIDENCE`. Those with .png or the like want such a file.

    Example:
        >>> [ends_in(Path("a_out.npy"), [suffix]) for suffix in ("_out", "_out.npy", ".npy", "_out.npz", ".npz")]
        [True, True, True, False, False]
    """
    return any(
        path.name.endswith(suffix)
        or (_name(path).endswith(_bare(suffix)) and _ending(suffix).lower() in ("", path.suffix.lower()))
        for suffix in suffixes
    )


def of_names(suffixes: Sequence[str]) -> List[str]:
    """Of the endings, those that are more than .npy or the like."""
    return [suffix for suffix in suffixes if _bare(suffix)]


def _name(path: Path) -> str:
    name = unicodedata.normalize("NFC", path.stem)
    return name[: -len(CONFIDENCE)] if name.endswith(CONFIDENCE) and name != CONFIDENCE else name


def _bare(suffix: str) -> str:
    """Without .png, which people write as well."""
    return unicodedata.normalize("NFC", suffix[: len(suffix) - len(_ending(suffix))])


def _ending(suffix: str) -> str:
    """.png or the like, if it has one."""
    ending = Path(f"x{suffix}").suffix
    return ending if ending.lower() in (*FORMATS, *ARRAYS) else ""


def _without(name: str, suffixes: Sequence[str]) -> str:
    for suffix in sorted((_bare(suffix) for suffix in suffixes), key=len, reverse=True):
        if suffix and name.endswith(suffix) and name != suffix:
            return name[: -len(suffix)]
    return name


def _last(path: Path, folder: Path, stem: str, depth: int) -> str:
    """The image's name after the last `depth` - 1 of the folders below `folder` that the file lies in."""
    above = path.parent.relative_to(folder).parts
    return "/".join([*(unicodedata.normalize("NFC", part) for part in above[max(len(above) - depth + 1, 0) :]), stem])


def _seconds(side: Sequence[Tuple[str, Path]]) -> List[Tuple[str, Path, Path]]:
    """Names that an earlier file has too: the name, the file and that earlier one."""
    first: Dict[str, Path] = {}
    return [(name, path, first[name]) for name, path in side if first.setdefault(name, path) is not path]
