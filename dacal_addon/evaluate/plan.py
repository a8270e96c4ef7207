"""What is to be judged, and how: the arguments against the files that are there, before anything long begins."""

from os.path import commonprefix
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Tuple

from ..ignoring import ignored_or_255
from ..metrics import CalibrationStats
from .files import BadFile
from .label_maps import LabelMap, read_label_map, read_palette
from .labels import LabelKind, find_labels, read_class_names
from .matching import matched
from .options import EvaluateOptions
from .predictions import PredictionKind, find_predictions
from .sets import SETS
from .wording import as_options


class Plan(NamedTuple):
    """What is to be read, and how."""

    predictions: Dict[str, Path]
    """By image, as the next one."""
    labels: Dict[str, Path]
    input: str
    prediction_kind: PredictionKind
    label_kind: LabelKind
    class_names: List[str]
    spare: List[Path]
    """Labels without prediction, for examples."""
    remarks: List[str]
    """On files and names, as sentences."""


def make_plan(options: EvaluateOptions) -> Plan:
    """`BadFile` for what is wrong with a file, `ValueError` with the arguments."""
    ignored = _ignored(options)
    names, label_map = _class_names(options), _label_map(options, ignored)
    label_kind = LabelKind(options.num_classes, ignored, label_map, options.reduce_zero_label, options.max_pixels)
    found = find_predictions(options.predictions, suffixes=options.prediction_suffix, follow_links=options.follow_links)
    labels, remarks = find_labels(options.labels, label_kind, suffixes=options.label_suffix, follow_links=options.follow_links)
    for link in [*found.links, *labels.links]:
        remarks.append(f"{link}: a linked folder, left out; pass --follow-links if it belongs to it")
    pairs = matched(
        found.paths,
        labels.paths,
        folders=(found.folder, labels.folder),
        prediction_suffixes=options.prediction_suffix,
        label_suffixes=options.label_suffix,
    )
    of_images = pairs.labels
    spare = [path for name, path in of_images.items() if name not in pairs.predictions]
    if options.only_labels_of_predictions:
        of_images = {name: path for name, path in of_images.items() if name in pairs.predictions}
        if len(of_images) < len(pairs.labels):
            remarks.append(
                f"{len(pairs.labels) - len(of_images)} of {len(pairs.labels)} labels have no prediction and are left out"
            )
    kind = _input(pairs.predictions, options)
    prediction_kind = PredictionKind(kind, options.key, options.max_pixels)
    plan = Plan(pairs.predictions, of_images, kind, prediction_kind, label_kind, names, spare, remarks)
    new_stats(plan, options)  # complains of numbers that cannot be
    if not options.keep_going:
        for name in [*plan.predictions, *plan.labels]:
            check_both(name, plan, options)
    return plan


def check_both(name: str, plan: Plan, options: EvaluateOptions) -> None:
    """`BadFile` for an image without label or without prediction."""
    if name not in plan.labels:
        # What begins most alike, letter by letter.
        alike = {path.name: len(commonprefix([path.name, name])) for path in plan.spare}  # noqa: RUF071 - names, not paths
        example = max(alike, key=lambda label: alike[label], default=None)
        remedy = f"; there is, for example, {example}: say its ending with --label-suffix" if example else ""
        raise BadFile(plan.predictions[name], f"no label of image {name!r} in {options.labels}{remedy}")
    if name not in plan.predictions:
        remedy = "pass --only-labels-of-predictions to leave such labels out, or --label-suffix for other names"
        raise BadFile(plan.labels[name], f"no prediction of image {name!r}; {remedy}")


def new_stats(plan: Plan, options: EvaluateOptions) -> CalibrationStats:
    """Nothing counted yet, of labels as `read_label` gives them; `ValueError` for numbers that cannot be."""
    try:
        return CalibrationStats(
            options.num_classes,
            input=plan.input,
            ignore_index=plan.label_kind.ignored,
            n_bins=options.n_bins,
            classwise=options.classwise,
            per_image=True,
            reduce_zero_label=options.reduce_zero_label,
        )
    except ValueError as error:
        raise ValueError(as_options(str(error))) from error


def _ignored(options: EvaluateOptions) -> Tuple[int, ...]:
    first = 1 if options.reduce_zero_label else 0
    try:
        found = ignored_or_255("evaluate", options.ignore_index, options.num_classes, first_label=first)
    except ValueError as error:
        raise ValueError(as_options(str(error))) from error
    return found if isinstance(found, tuple) else (found,)


def _input(predictions: Dict[str, Path], options: EvaluateOptions) -> str:
    """What predictions hold."""
    pairs = [path.suffix.lower() == ".png" for path in predictions.values()]
    if any(pairs) and not all(pairs):
        raise ValueError(f"{options.predictions}: expected arrays or pairs of PNGs, got both; move one kind elsewhere")
    kind = "top1" if all(pairs) else options.input
    if kind is None:
        raise ValueError(
            "expected --input logits, probs or log_probs for saved arrays, got none; nothing is guessed from values"
        )
    if kind == "top1":
        given = _given(options, ["input", "classwise", "one_channel", "channels_last", "upsample", "normalize"])
        if given:
            raise ValueError(f"pairs of PNGs hold confidences and classes alone; leave out {' and '.join(given)}")
    if options.one_channel and (options.num_classes != 2 or kind == "log_probs"):
        got = f"--num-classes {options.num_classes} and --input {kind}"
        raise ValueError(
            f"expected --num-classes 2 and --input logits or probs with --one-channel, a sigmoid's, got {got}; judge several "
            "sigmoids one by one"
        )
    if options.normalize and kind != "probs":
        raise ValueError(f"expected --input probs with --normalize, got {kind}; leave it out: others need none")
    return kind


def _label_map(options: EvaluateOptions, ignored: Tuple[int, ...]) -> Optional[LabelMap]:
    given = _given(options, ["label_map", "palette", "reduce_zero_label"])
    if len(given) > 1:
        raise ValueError(f"expected one of --label-map, --palette and --reduce-zero-label, got {' and '.join(given)}")
    read = read_label_map if options.label_map else read_palette
    name = options.label_map or options.palette
    return None if name is None else read(name, num_classes=options.num_classes, ignored=ignored)


def _class_names(options: EvaluateOptions) -> List[str]:
    """Those given, or of the set that the labels are said to be of."""
    given = options.class_names
    if given is None:
        given = next((name for name in (options.label_map, options.palette) if name in SETS), None)
        if given is not None and len(SETS[given].names) != options.num_classes:
            given = None  # which the map is going to say
    if given is not None:
        return read_class_names(given, num_classes=options.num_classes)
    return [f"class {c}" for c in range(options.num_classes)]


def _given(options: EvaluateOptions, names: List[str]) -> List[str]:
    """Of these options, those that are set."""
    return [f"--{name.replace('_', '-')}" for name in names if getattr(options, name)]
