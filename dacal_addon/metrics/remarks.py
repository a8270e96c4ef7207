"""What a reader of the figures has to know: classes that no pixel has, and pixels that were ignored."""

from typing import List, Optional, Sequence

import torch

from .._check import problem
from .settings import Settings
from .totals import Totals

_NAMED = 5
# A share of ignored pixels above this is more than void borders and the car's own bonnet (a tenth on Cityscapes).
_IGNORED = 0.2


def remarks(totals: Totals, settings: Settings, class_names: Optional[Sequence[str]] = None) -> List[str]:
    """A sentence each, with numbers; none where there is nothing to say, or nothing was counted.

    Args:
        class_names: one a class; numbers by default.

    Raises:
        ValueError: another number of names.
    """
    if class_names is not None and len(class_names) != settings.num_classes:
        expected, got = f"class_names: {settings.num_classes} of them", str(len(class_names))
        raise problem("remarks", expected=expected, got=got, remedy="name every class, in their order")
    found: List[str] = []
    valid, ignored = int(totals.pixels.sum()), int(totals.ignored)
    if valid:
        target = totals.confusion.sum(1).cpu()
        candidates = [c for c in range(settings.num_classes) if c not in settings.ignored_classes]
        absent = [c for c in torch.nonzero(target == 0, as_tuple=True)[0].tolist() if c in candidates]
        if absent:
            named = ", ".join(f"{c}" if class_names is None else class_names[c] for c in absent[:_NAMED])
            more = f" and {len(absent) - _NAMED} more" if len(absent) > _NAMED else ""
            has = "has" if len(absent) == 1 else "have"
            found.append(f"{len(absent)} of {len(candidates)} classes {has} no target pixel: {named}{more}.")
    if ignored > _IGNORED * (valid + ignored):
        share = 100 * ignored / (valid + ignored)
        labels = [*([0] if settings.reduce_zero_label and 0 not in settings.ignore_index else []), *settings.ignore_index]
        named = ", ".join(map(str, labels))
        found.append(f"{share:.1f} % of the pixels are ignored ({ignored:,} of {valid + ignored:,}; labels {named}).")
    return found
