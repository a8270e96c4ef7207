"""What is to be judged, and how: the arguments against the files that are there, before anything long begins."""

from pathlib import Path
from typing import Dict, List, NamedTuple, Optional

import numpy as np

from ..metrics import CalibrationStats
from .labels import CITYSCAPES, find_labels, read_class_names, read_label_map
from .options import EvaluateOptions
from .predictions import find_predictions


class Plan(NamedTuple):
    """What is to be read, and how."""

    predictions: Dict[str, Path]
    labels: Dict[str, Path]
    input: str
    table: Optional[np.ndarray]
    class_names: List[str]


def make_plan(options: EvaluateOptions) -> Plan:
    """`BadFile` for what is wrong with a file, `ValueError` with the arguments."""
    predictions = find_predictions(options.predictions)
    labels = find_labels(options.labels, mapped=options.label_map is not None)
    pairs = [path.suffix.lower() == ".png" for path in predictions.values()]
    if any(pairs) and not all(pairs):
        raise ValueError(f"{options.predictions}: expected arrays or pairs of PNGs, got both; move one kind elsewhere")
    kind = "top1" if all(pairs) else options.input
    if kind is None:
        raise ValueError(
            "expected --input logits, probs or log_probs for saved arrays, got none; nothing is guessed from values"
        )
    if kind == "top1" and (options.input is not None or options.classwise):
        raise ValueError("pairs of PNGs hold confidences and classes alone; leave out --input and --classwise")
    if options.class_names == "cityscapes":
        if options.num_classes != len(CITYSCAPES):
            raise ValueError(
                f"expected --num-classes {len(CITYSCAPES)} with --class-names cityscapes, got {options.num_classes}"
            )
        names = list(CITYSCAPES)
    elif options.class_names is not None:
        names = read_class_names(Path(options.class_names), num_classes=options.num_classes)
    else:
        names = [f"class {c}" for c in range(options.num_classes)]
    table = None
    if options.label_map is not None:
        ids = {"num_classes": options.num_classes, "ignore_index": options.ignore_index}
        table = read_label_map(options.label_map, **ids)
    plan = Plan(predictions, labels, kind, table, names)
    new_stats(plan, options)  # complains of numbers that cannot be
    return plan


def new_stats(plan: Plan, options: EvaluateOptions) -> CalibrationStats:
    """Nothing counted yet."""
    return CalibrationStats(
        options.num_classes,
        input=plan.input,
        ignore_index=options.ignore_index,
        n_bins=options.n_bins,
        classwise=options.classwise,
        per_image=True,
    )
