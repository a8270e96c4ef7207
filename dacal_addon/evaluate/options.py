"""What `dacal evaluate` is asked for."""

from pathlib import Path
from typing import NamedTuple, Optional


class EvaluateOptions(NamedTuple):
    """The arguments of the command; see its --help."""

    predictions: Path
    labels: Path
    num_classes: int
    input: Optional[str] = None
    key: Optional[str] = None
    label_map: Optional[Path] = None
    ignore_index: int = 255
    class_names: Optional[str] = None
    n_bins: int = 15
    classwise: bool = False
    boundary: int = 0
    out: Path = Path("evaluate-out")
    keep_going: bool = False
    jobs: int = 0
