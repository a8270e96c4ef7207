"""What was estimated, as text for a terminal and as plain numbers for a file."""

import math
from typing import Any, Dict, Optional

from .estimate import TemperatureEstimate


def as_text(found: TemperatureEstimate) -> str:
    """Every estimate in a line, and the one that is taken."""
    lines = [f"{'estimate':<14}{'T':>7}{'+- log T':>10}{'accuracy':>10}  on"]
    for name, each in found.estimates.items():
        numbers = _shown(each.temperature, 7), _shown(each.spread, 10), _shown(each.accuracy, 10, ".1%")
        lines.append(f"{name:<14}{''.join(numbers)}  {each.note}")
    return "\n".join([*lines, f"taken: T = {found.temperature:.4g} ({found.taken}); {found.reason}"])


def as_numbers(found: TemperatureEstimate) -> Dict[str, Any]:
    """Plain numbers and text, without the temperature itself; None for NaN, which JSON does not have."""
    return {
        "taken": found.taken,
        "reason": found.reason,
        "abstained": found.abstained,
        "estimates": {
            name: {
                "temperature": _known(each.temperature),
                "spread": _known(each.spread),
                "accuracy": _known(each.accuracy),
                "note": each.note,
            }
            for name, each in found.estimates.items()
        },
    }


def _shown(value: float, width: int, form: str = ".3f") -> str:
    return f"{'-':>{width}}" if math.isnan(value) else f"{value:{width}{form}}"


def _known(value: float) -> Optional[float]:
    return None if math.isnan(value) else value
