"""What shape a saved prediction may have, and what to do about another."""

from pathlib import Path
from typing import NamedTuple, Optional, Tuple

from .files import BadFile

# Besides the numbers themselves: headers, names, the structure of an archive.
_SLACK = 1 << 20


class Shape(NamedTuple):
    """What a prediction must be, from its label and the options."""

    classes: int
    size: Tuple[int, ...]
    """Of the label: (H, W), or (D, H, W)."""
    one_channel: bool = False
    channels_last: bool = False
    upsample: bool = False
    """Lower resolutions of the same aspect are taken too."""
    one_slice: bool = False
    """The label is a volume (1, *size), and (C, 1, *size) is one too."""
    label: Optional[Path] = None
    """Its file, for messages."""

    @property
    def channels(self) -> int:
        """As saved."""
        return 1 if self.one_channel else self.classes

    @property
    def most_bytes(self) -> int:
        """In float64."""
        pixels = 1
        for size in self.size:
            pixels *= size
        return 8 * self.channels * pixels + _SLACK

    def check(self, path: Path, got: Tuple[int, ...]) -> Tuple[int, ...]:
        """Which (1, C, *S) an array of shape `got` is to be seen as, channels still last if they are; `BadFile` if none."""
        core = self._core(got)
        if core is not None:
            size, channels = (core[:-1], core[-1]) if self.channels_last else (core[1:], core[0])
            if channels == self.channels and (size == self.size or (self.upsample and _lower(size, self.size))):
                return (1, *core)
        whole = (*self.size, self.channels) if self.channels_last else (self.channels, *self.size)
        remedy = self._remedy(tuple(got))
        if core is not None and channels == self.channels and size not in (self.size, self.size[::-1]):
            remedy += self.or_the_label(path, size)
        raise BadFile(path, f"expected an array {whole} as its label has it, got {tuple(got)}; {remedy}")

    def or_the_label(self, path: Path, size: Tuple[int, ...]) -> str:
        """The end of a remedy for a prediction of another size."""
        if self.label is None:
            return ""
        return f"; or {self.label}, of {self.size}, is not the label of {path.name}, of {size}: pair them by name"

    def _core(self, got: Tuple[int, ...]) -> Optional[Tuple[int, ...]]:
        """Without a batch or a slice of one, and with the channel that may be missing where there is one."""
        if not all(type(size) is int and size > 0 for size in got):  # in a header, True is 1 as well
            return None
        dims = len(self.size)
        if self.one_slice and len(got) == dims + 3 and got[0] == 1:
            got = got[1:]
        if len(got) == dims + 2 and got[0] == 1:
            return tuple(got[1:])
        if self.one_slice and len(got) == dims + 2 and got[1] == 1 and not self.channels_last:
            return (got[0], *got[2:])
        if len(got) == dims and self.one_channel:
            return (*got, 1) if self.channels_last else (1, *got)
        return tuple(got) if len(got) == dims + 1 else None

    def _remedy(self, got: Tuple[int, ...]) -> str:
        size, classes = self.size, self.channels
        if len(got) == len(size) + 2 and got[0] > 1:
            return "of a batch save one file an image, or of a network's several outputs the one with the logits"
        core = got[1:] if len(got) == len(size) + 2 else got
        if core == size:
            return (
                "for the one number a pixel of a sigmoid pass --one-channel; confidences go in pairs with classes, "
                "NAME_confidence.png and NAME_prediction.png"
            )
        if len(core) != len(size) + 1:
            return "save one array (C, H, W) of scores an image"
        if core == (*size, classes):
            return "the classes are last: pass --channels-last, or save x.transpose(2, 0, 1)"
        if core == (classes, *size):
            return "the classes are first: leave out --channels-last"
        if core == (classes, *size[::-1]):
            return "height and width are swapped: save x.transpose(0, 2, 1)"
        if core[0] == 1 and core[1:] == size and self.classes == 2:
            return "for one sigmoid channel pass --one-channel"
        if core[0] == classes and _lower(core[1:], size):
            return "pass --upsample bilinear, or save them at the label's resolution"
        if core[0] == classes:
            return (
                "save them at the label's resolution; this is no lower one of the same aspect: cropped, padded, another image?"
            )
        if core[1:] == size:
            return f"pass --num-classes {core[0]}, or the predictions of a network of {classes} classes"
        return "save one array (C, H, W) of scores an image, at the label's resolution"


def _lower(size: Tuple[int, ...], of: Tuple[int, ...]) -> bool:
    """Whether `size` is `of` divided by one number, rounded up or down.

    >>> _lower((128, 256), (512, 1024)), _lower((129, 257), (513, 1025)), _lower((256, 128), (512, 1024))
    (True, True, False)
    """
    if any(low > whole for low, whole in zip(size, of)):
        return False
    least = max(whole / (low + 1) for low, whole in zip(size, of))
    most = min(whole / (low - 1) if low > 1 else float("inf") for low, whole in zip(size, of))
    return least < most
