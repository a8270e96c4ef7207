"""Which files there are, which belong together, and the error that names a bad one."""

import struct
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Dict, Iterable, List, NamedTuple, Sequence

# Endings of names that say what a file is and not which image it is of: Cityscapes', ACDC's and our own.
SUFFIXES = (
    "_gtFine_labelTrainIds",
    "_gtCoarse_labelTrainIds",
    "_gt_labelTrainIds",
    "_labelTrainIds",
    "_gtFine_labelIds",
    "_gtCoarse_labelIds",
    "_gt_labelIds",
    "_labelIds",
    "_leftImg8bit",
    "_rgb_ref_anon",
    "_rgb_anon",
    "_confidence",
)
# Of either side of an image: one with more pixels than PIL takes without a warning is refused before it is unpacked.
_MOST_PIXELS = 89_478_485


class BadFile(Exception):
    """A file that cannot be used, and why."""

    def __init__(self, path: object, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path, self.reason = str(path), reason


def first_line(error: BaseException) -> str:
    """What an exception says, or else its kind."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class Png(NamedTuple):
    """What the header of a PNG file says."""

    width: int
    height: int
    depth: int
    """Bits of a sample."""
    colour: int
    """0 grey, 3 palette; others are not read here."""


def listed(source: Path, endings: Sequence[str]) -> List[Path]:
    """The files of a folder, also below it, or those that a text file names, one a line, relative to its own folder.

    Args:
        source: folder or list. Links to folders are not followed. Lines that are empty or start with # are skipped.
        endings: of the files of a folder that are wanted, such as ".npy".

    Raises:
        BadFile: there is no such folder or list, it is empty, or a file lies outside of it: an absolute path, a path with
            "..", a link that leads out.
    """
    if source.is_dir():
        folder = source
        paths = sorted(path for path in source.rglob("*") if path.suffix.lower() in endings)
    elif source.is_file():
        folder = source.parent
        try:
            lines = [line.strip() for line in source.read_text(encoding="utf-8-sig").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise BadFile(source, f"expected a folder, or a text file that lists paths: {error}") from error
        paths = []
        for line in lines:
            if line and not line.startswith("#"):
                if PurePosixPath(line).is_absolute() or PureWindowsPath(line).is_absolute() or ".." in Path(line).parts:
                    raise BadFile(line, f"listed in {source.name}, but not a path below its folder")
                if Path(line).suffix.lower() not in endings:
                    raise BadFile(line, f"listed in {source.name}, but does not end in {', '.join(endings)}")
                paths.append(folder / line)
    else:
        raise BadFile(source, "no such folder or list")
    if not paths:
        raise BadFile(source, f"nothing in it that ends in {', '.join(endings)}")
    return paths


def inside(path: Path, folder: Path) -> None:
    """`BadFile` if the file is missing, is no plain file, or is a link that leads out of the folder."""
    try:
        real = path.resolve(strict=True)
        real.relative_to(folder.resolve())
    except ValueError:
        raise BadFile(path, "a link that leads out of the folder") from None
    except (OSError, RuntimeError) as error:  # RuntimeError: a link to itself
        raise BadFile(path, f"cannot be opened: {getattr(error, 'strerror', None) or error}") from error
    if not real.is_file():
        raise BadFile(path, "not a file")


def stem_of(path: Path) -> str:
    """Which image a file is of.

    Example:
        >>> stem_of(Path("frankfurt_000000_000294_gtFine_labelTrainIds.png"))
        'frankfurt_000000_000294'
    """
    name = path.stem
    for suffix in SUFFIXES:
        if name.endswith(suffix) and name != suffix:
            return name[: -len(suffix)]
    return name


def by_stem(paths: Iterable[Path]) -> Dict[str, Path]:
    """Stem -> file, in order; `BadFile` for two files of one image."""
    found: Dict[str, Path] = {}
    for path in paths:
        stem = stem_of(path)
        if stem in found:
            raise BadFile(path, f"the second file of image {stem!r}, after {found[stem]}")
        found[stem] = path
    return found


def png_header(path: Path) -> Png:
    """Size and kind of a PNG, before anything of it is unpacked."""
    try:
        with path.open("rb") as file:
            head = file.read(26)
    except OSError as error:
        raise BadFile(path, f"cannot be opened: {error.strerror}") from error
    if not head:
        raise BadFile(path, "empty")
    if len(head) < 26 or head[:8] != b"\x89PNG\r\n\x1a\n" or head[12:16] != b"IHDR":
        raise BadFile(path, "not a PNG file, or truncated")
    header = Png(*struct.unpack(">IIBB", head[16:26]))
    if header.width * header.height > _MOST_PIXELS:
        raise BadFile(path, f"claims {header.width} x {header.height} pixels, more than {_MOST_PIXELS}: a decompression bomb?")
    return header


def shown(text: object) -> str:
    """A name for a terminal: control characters, which could move the cursor, and broken bytes are spelt out.

    Example:
        >>> print(shown("a" + chr(27) + "[2Jb.npy"))
        a\\x1b[2Jb.npy
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in str(text))
