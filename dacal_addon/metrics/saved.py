"""Saved counts, checked before they take the place of others."""

from typing import Any, Dict, Tuple

import torch
from torch import Tensor

from .._check import describe, problem
from .images import LENGTH_OF, Images, pack
from .totals import Totals


def loaded_totals(saved: Dict[str, Any], like: Totals) -> Totals:
    """Copies of saved totals, which must have the kinds and shapes of `like`."""
    return Totals(*(_loaded(saved, name, field, tuple(field.shape)) for name, field in like._asdict().items()))


def loaded_images(saved: Dict[str, Any], count: int, like: Totals) -> Images:
    """Copies of `count` saved images, which must have the cells and pairs of classes of `like`."""
    found: Dict[str, Tensor] = {}
    for name, field in pack([], like=like)._asdict().items():
        length = int(found[LENGTH_OF[name]].sum()) if name in LENGTH_OF else count
        found[name] = _loaded(saved, name, field, (length, *field.shape[1:]))
        limit = {"cell": like.pixels.numel(), "pair": like.confusion.numel()}.get(name, 1 << 62)
        if field.dtype != torch.float64 and length and not 0 <= int(found[name].min()) <= int(found[name].max()) < limit:
            remedy = "pass what state_dict() returned"
            got = f"{int(found[name].min())}..{int(found[name].max())}"
            raise problem("load_state_dict", expected=f"{name}: numbers in 0..{limit - 1}", got=got, remedy=remedy)
    return Images(**found)


def _loaded(saved: Dict[str, Any], name: str, like: Tensor, shape: Tuple[int, ...]) -> Tensor:
    found = saved[name]
    if not isinstance(found, Tensor) or found.dtype != like.dtype or tuple(found.shape) != shape:
        expected = f"{name}: {str(like.dtype).replace('torch.', '')} {shape}"
        remedy = "pass what state_dict() returned"
        raise problem("load_state_dict", expected=expected, got=describe(found), remedy=remedy)
    return found.detach().clone()
