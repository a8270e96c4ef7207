"""What `dacal evaluate` is asked for."""

from pathlib import Path
from typing import NamedTuple, Optional, Tuple

from .images import MOST_PIXELS


class EvaluateOptions(NamedTuple):
    """The arguments of the command; see its --help."""

    predictions: Path
    labels: Path
    num_classes: int
    input: Optional[str] = None
    key: Optional[str] = None
    one_channel: bool = False
    channels_last: bool = False
    upsample: Optional[str] = None
    normalize: bool = False
    label_map: Optional[str] = None
    palette: Optional[str] = None
    reduce_zero_label: bool = False
    ignore_index: Optional[Tuple[int, ...]] = None
    trust: bool = False
    prediction_suffix: Tuple[str, ...] = ()
    label_suffix: Tuple[str, ...] = ()
    only_labels_of_predictions: bool = False
    follow_links: bool = False
    max_pixels: int = MOST_PIXELS
    class_names: Optional[str] = None
    n_bins: int = 15
    classwise: bool = False
    boundary: int = 0
    out: Path = Path("evaluate-out")
    keep_going: bool = False
    jobs: int = 0
    name: Optional[str] = None
    compare: Tuple[str, ...] = ()
    images: Optional[Path] = None
    worst: int = 5
