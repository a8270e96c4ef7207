"""Which files there are, and the error that names a bad one."""

import os
import unicodedata
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Dict, List, NamedTuple, Sequence, Set


class BadFile(Exception):
    """A file that cannot be used, and why."""

    def __init__(self, path: object, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path, self.reason = str(path), reason


def first_line(error: BaseException) -> str:
    """What an exception says, or else its kind."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class Listed(NamedTuple):
    """What there is below a folder, or in a list."""

    paths: List[Path]
    folder: Path
    """Which no file may leave."""
    links: List[Path]
    """Linked folders that were not followed."""


def listed(source: Path, endings: Sequence[str], *, follow_links: bool = False) -> Listed:
    """The files of a folder, also below it, or those that a text file names, one a line, relative to its own folder.

    Args:
        source: folder or list. Lines that are empty or start with # are skipped, and so is what is hidden in a folder: names
            that start with a dot, such as .ipynb_checkpoints and the ._NAME of macOS.
        endings: of the files of a folder that are wanted, such as ".npy".
        follow_links: look into linked folders too, as long as they lie inside of this one.

    Raises:
        BadFile: there is no such folder or list, it is empty, or a file lies outside of it: an absolute path, a path with
            "..", a link that leads out.
    """
    links: List[Path] = []
    if source.is_dir():
        folder = source
        paths = sorted(_each_once(_below(folder, endings, follow_links, links), folder))
    elif source.is_file():
        folder = source.parent
        paths = []
        for line in (line.strip() for line in read_text(source, "a folder, or a text file that lists paths").splitlines()):
            if line and not line.startswith("#"):
                if PurePosixPath(line).is_absolute() or PureWindowsPath(line).is_absolute() or ".." in Path(line).parts:
                    raise BadFile(line, f"listed in {source.name}, but not a path below its folder")
                if Path(line).suffix.lower() not in endings:
                    raise BadFile(line, f"listed in {source.name}, but does not end in {', '.join(endings)}")
                paths.append(folder / line)
    else:
        raise BadFile(source, "no such folder or list")
    if not paths:
        linked = f"; pass --follow-links to look into linked folders such as {links[0].name}" if links else ""
        other = next((path.name for path in sorted(source.glob("[!.]*")) if path.is_file()), None) if source.is_dir() else None
        example = f"; there is, for example, {other}" if other else ""
        raise BadFile(source, f"nothing in it that ends in {', '.join(endings)}{linked or example}")
    return Listed(paths, folder, links)


def _below(folder: Path, endings: Sequence[str], follow_links: bool, links: List[Path]) -> List[Path]:
    found: List[Path] = []
    seen: Set[str] = {os.path.realpath(folder)}
    for place, folders, names in os.walk(folder, followlinks=follow_links):
        # What stays in `folders` is walked into.
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in list(folders):
            path = Path(place, name)
            if path.suffix.lower() in endings:  # a folder of a file's name, which is said to be none when it is read
                found.append(path)
            if not path.is_symlink():
                continue
            if not follow_links:
                links.append(path)
                continue
            real = path.resolve()
            if folder.resolve() not in [real, *real.parents]:
                raise BadFile(path, "a link that leads out of the folder; copy the files, or name the folder above both")
            if str(real) in seen or real in Path(place).resolve().parents:
                folders.remove(name)  # a circle
            seen.add(str(real))
        found += [Path(place, name) for name in names if not name.startswith(".") and Path(name).suffix.lower() in endings]
    return found


def _each_once(paths: Sequence[Path], folder: Path) -> List[Path]:
    """Of the files of a folder that is also linked to, those by the link's name, which somebody gave it."""
    root = os.path.realpath(folder)
    found: Dict[Path, Path] = {}
    for path in paths:
        real = Path(os.path.realpath(path.parent), path.name)
        if real not in found or Path(root, path.relative_to(folder)) != real:
            found[real] = path
    return list(found.values())


def inside(path: Path, folder: Path) -> None:
    """`BadFile` if the file is missing, is no plain file, or is a link that leads out of the folder."""
    try:
        real = path.resolve(strict=True)
        real.relative_to(folder.resolve())
    except ValueError:
        raise BadFile(path, "a link that leads out of the folder; copy the file, or name the folder above both") from None
    except (OSError, RuntimeError) as error:  # RuntimeError: a link to itself
        raise BadFile(path, f"cannot be opened: {getattr(error, 'strerror', None) or error}") from error
    if not real.is_file():
        raise BadFile(path, "not a file")


def read_text(path: Path, expected: str) -> str:
    """A text in UTF-8, with or without a byte order mark; `BadFile` for another."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise BadFile(path, f"expected {expected}, got none: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise BadFile(path, f"expected {expected} in UTF-8, got other bytes; save it in UTF-8") from error


def shown(text: object) -> str:
    """A text for a terminal: control characters, which could move the cursor, and broken bytes are spelt out; spaces, also
    narrow ones, are not.

    Example:
        >>> print(shown("a" + chr(27) + "[2Jb.npy"))
        a\\x1b[2Jb.npy
    """
    return "".join(c if _harmless(c) else c.encode("unicode_escape", "backslashreplace").decode() for c in str(text))


def _harmless(c: str) -> bool:
    return c.isprintable() or unicodedata.category(c) == "Zs"  # of spaces, Python calls the plain one alone printable
