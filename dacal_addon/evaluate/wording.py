"""What the package says to its callers, in the words of the command."""

import re
from typing import Match

_OPTIONS = {"interpolate": "upsample"}
"""Of arguments with another name than their option."""
_ARGUMENTS = "num_classes|input|ignore_index|n_bins|one_channel|channels_last|reduce_zero_label|normalize|classwise|interpolate"
_VALUE = r"'[^']*'|\([^)]*\)|True|False|-?\d+"
_GIVEN = re.compile(rf"\b({_ARGUMENTS})=({_VALUE})")
# Without a value, those that are no words of English.
_NAMED = re.compile(rf"\b(?=\w*_)({_ARGUMENTS})\b")
_SPEAKER = re.compile(r"^\w+: (?=expected )")


def as_options(message: str) -> str:
    """An error of the package's functions with options in the place of arguments, and without the function's name.

    Example:
        >>> as_options("update: expected x, got y; pass normalize=True, or input='logits'")
        'expected x, got y; pass --normalize, or --input logits'
        >>> as_options("set ignore_index, with channels_last=False or ignore_index=(0, 255)")
        'set --ignore-index, with no --channels-last or --ignore-index 0 --ignore-index 255'
    """
    return _NAMED.sub(lambda found: _option(found[1]), _GIVEN.sub(_given, _SPEAKER.sub("", message)))


def _given(found: Match[str]) -> str:
    option, value = _option(found[1]), found[2]
    if value in ("True", "False"):
        value = " bilinear" if option == "--upsample" else ""
        return f"{option}{value}" if found[2] == "True" else f"no {option}"
    values = [one.strip() for one in value.strip("()").split(",") if one.strip()]
    return " ".join(f"{option} {one.strip(chr(39))}" for one in values)


def _option(name: str) -> str:
    return "--" + _OPTIONS.get(name, name).replace("_", "-")
