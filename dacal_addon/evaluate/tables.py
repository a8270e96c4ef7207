"""The tables of a report as text, from what report.json holds: report.html and report.md show the same ones."""

from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Union

from ..metrics.catalogue import CATALOGUE

INTERVAL = (
    "95 % interval",
    "Percentile bootstrap, 1000 draws of the images with replacement: pixels of one image are not independent (Efron, 1979).",
)
_DIFFERENCE = (
    "Difference",
    "To the first network, with the 95 % interval of the difference over the same 1000 draws of the images for both: what is "
    "hard in an image is hard for both, and cancels. \u2713 marks the better value where that interval does not contain 0.",
)
_WORST = 10
Cell = Union[float, str, None]


class Table(NamedTuple):
    """One table."""

    head: List[str]
    rows: List[List[str]]
    """The first cell of a row is its name."""
    wordy: bool = False
    """Columns after the first hold words and not numbers."""


def figures(report: Mapping[str, Any]) -> Table:
    """Every metric with its interval, or why it has none."""
    rows = [[CATALOGUE[key].name, *_with_interval(key, found)] for key, found in report["metrics"].items()]
    near = report["boundary"]
    if near is not None:
        width = report["settings"]["boundary"]
        for metric in (CATALOGUE[key] for key in near if key in CATALOGUE):
            rows.append(
                [
                    f"{metric.name} within {width} px of a boundary",
                    number(near[metric.key], metric.unit, with_unit=True),
                    "none: computed for all images together",
                ]
            )
    return Table(["Metric", "Value", INTERVAL[0]], rows)


def comparison(report: Mapping[str, Any]) -> Optional[Table]:
    """Every metric of every network, and its difference to the first one; the better value is marked where that is certain."""
    if report["comparison"] is None:
        return None
    first, *others = report["comparison"]["networks"]
    rows = []
    for key, found in first["metrics"].items():
        metric = CATALOGUE[key]
        compared = [other["differences"].get(key) for other in others]
        lost = bool(compared) and all(one is not None and one["better"] == first["name"] for one in compared)
        row = [metric.name, _marked(number(found["value"], metric.unit, with_unit=True), lost)]
        for other, one in zip(others, compared):
            value = other["metrics"].get(key, {"value": None})["value"]
            better = one is not None and one["better"] == other["name"]
            row += [_marked(number(value, metric.unit, with_unit=True), better), _difference(one, found, metric.unit)]
        rows.append(row)
    head = ["Metric", first["name"]]
    for other in others:
        head += [other["name"], f"Difference of {other['name']}"]
    return Table(head, rows)


def compared_classes(report: Mapping[str, Any]) -> Optional[Table]:
    """The IoU of every class in every network."""
    if report["comparison"] is None:
        return None
    networks = report["comparison"]["networks"]
    rows = [[row["name"], *(number(one["iou"][c], "%") for one in networks)] for c, row in enumerate(report["classes"])]
    return Table(["IoU %", *(one["name"] for one in networks)], rows)


def reliability(report: Mapping[str, Any]) -> Table:
    """The diagram as numbers."""
    rows = [
        [
            f"{row['lower']:.3f} to {row['upper']:.3f}",
            count(row["pixels"]),
            number(row["confidence"], "%"),
            number(row["accuracy"], "%"),
        ]
        for row in report["reliability"]
    ]
    return Table(["Confidence", "Pixels", "Mean confidence %", "Accuracy %"], rows)


def thresholds(report: Mapping[str, Any]) -> Table:
    """What is left above a confidence, and how right it is."""
    rows = [[f"{row['threshold']:g}", number(row["share"], "%"), number(row["accuracy"], "%")] for row in report["thresholds"]]
    return Table(["Confidence at least", "Share of pixels %", "Their accuracy %"], rows)


def classes(report: Mapping[str, Any]) -> Table:
    """Every class: its pixels, how well it is found, and how sure the network is where it says so."""
    keys = {"iou": "IoU %", "recall": "Recall %", "confidence": "Confidence where predicted %", "precision": "Precision %"}
    keys.update(classwise_ece=f"{CATALOGUE['classwise_ece'].name} %", gap="Mean gap %")
    keys = {key: name for key, name in keys.items() if key in report["classes"][0]}
    rows = [[row["name"], count(row["pixels"]), *(number(row[key], "%") for key in keys)] for row in report["classes"]]
    return Table(["Class", "Target pixels", *keys.values()], rows)


def worst(report: Mapping[str, Any]) -> Optional[Table]:
    """The images with the largest calibration error."""
    found = sorted((row for row in report["per_image"] if row["ece"] is not None), key=lambda row: -row["ece"])[:_WORST]
    metrics = [CATALOGUE[key] for key in ("ece", "mean_confidence", "accuracy", "miou")]
    rows = [[row["name"], count(row["pixels"]), *(number(row[metric.key], metric.unit) for metric in metrics)] for row in found]
    return Table(["Image", "Valid pixels", *(f"{metric.name} {metric.unit}" for metric in metrics)], rows) if rows else None


def skipped(report: Mapping[str, Any]) -> Optional[Table]:
    """What could not be used, and why."""
    rows = [[row["file"], row["reason"]] for row in report["skipped"]]
    return Table(["File", "Reason"], rows, wordy=True) if rows else None


def definitions(report: Mapping[str, Any]) -> List[Tuple[str, str]]:
    """What the words of the tables mean."""
    shown = [CATALOGUE[key] for key in (*report["metrics"], *report["classes"][0]) if key in CATALOGUE]
    terms = [*((metric.name, metric.definition) for metric in shown), INTERVAL]
    terms.append(
        (
            "Confidence where predicted, precision",
            "Over the pixels that are predicted as the class: their mean confidence, and the share that is of it. The first "
            "above the second: overconfident.",
        )
    )
    if "gap" in report["classes"][0]:
        terms.append(
            (
                "Mean gap",
                "Of a class: the mean over bins of |probability - share of pixels in the class|, each bin with the weight of "
                "its pixels of the class, by label or by probability, whichever are more. Pixels that neither are of the class "
                "nor could be, which make class-wise ECE small, have next to no weight.",
            )
        )
    return terms if report["comparison"] is None else [*terms, _DIFFERENCE]


def number(value: Cell, unit: str, *, with_unit: bool = False) -> str:
    """As readers see it.

    >>> number(0.0421, "%"), number(1.5, "nats", with_unit=True), number(None, "%"), number("infinite", "nats")
    ('4.21', '1.5000 nats', 'n/a', 'infinite')
    """
    if value is None or isinstance(value, str):
        return value or "n/a"
    text = f"{100 * value:.2f}" if unit == "%" else f"{value:.4f}"
    return f"{text} {unit}".rstrip() if with_unit else text


def count(value: float) -> str:
    """With narrow spaces between thousands."""
    return f"{value:,.0f}".replace(",", "\u202f")


def _with_interval(key: str, found: Mapping[str, Any]) -> List[str]:
    unit = CATALOGUE[key].unit
    low, high = (number(found[end], unit) for end in ("low", "high"))
    return [number(found["value"], unit, with_unit=True), f"none: {found['why']}" if found["why"] else f"{low} to {high}"]


def _difference(found: Optional[Dict[str, Any]], first: Mapping[str, Any], unit: str) -> str:
    if found is None:
        return f"none: {first['why'] or 'not of both'}"
    value, low, high = (_signed(found[key], unit) for key in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def _signed(value: Cell, unit: str) -> str:
    text = number(value, unit)
    return text if not isinstance(value, float) or text.startswith("-") else f"+{text}"


def _marked(text: str, better: bool) -> str:
    return f"{text} \u2713" if better else text


def said(report: Mapping[str, Any]) -> str:
    """How much was evaluated, and when."""
    images = report["images"]
    return f"{images} image{'s' * (images != 1)}, {count(report['pixels'])} valid pixels, {report['date']}"


def timed(report: Mapping[str, Any]) -> str:
    """With what, and for how long."""
    seconds, versions = report["seconds"], report["versions"]
    share = seconds["reading_share"]
    text = f"{seconds['judging_all']:.1f} s in {seconds['jobs']} threads"
    text += f", {100 * share:.0f} % of their time for reading." if share is not None else "."
    return f"{', '.join(f'{name} {version}' for name, version in versions.items())}. {text}"


def described(report: Mapping[str, Any]) -> str:
    """How the figures were counted."""
    bins = report["settings"]["n_bins"]
    return f"Figures are pooled over all valid pixels; {bins} bins. Sums are taken in float64, counts are whole numbers."


_CAPTIONS: Dict[str, str] = {
    "reliability.png": "Above: accuracy by confidence; what a bar lacks to the diagonal is overconfidence (orange), what it "
    "has beyond it underconfidence (light blue). Below: the share of the pixels in a bin, with mean confidence and accuracy.",
    "classwise.png": "How often a pixel is of the class, by the probability that the network gave it. The area of a dot, and "
    "the thickness of its line, grow with the pixels of the class in the bin, by label or by probability, whichever are more; "
    "the number is the mean length of the lines with these weights. Class-wise ECE, in the table, weighs all pixels alike, of "
    "which nearly all have a probability near 0 of a rare class.",
    "worst": "The image if it was given, label, prediction, and the pixels that are wrong: the darker, the surer it was.",
}


def caption(name: str) -> str:
    """Of a picture."""
    return _CAPTIONS["worst" if name.startswith("worst-") else name]


def pictures_of_worst(names: Sequence[str]) -> List[str]:
    """Of the pictures of a report, those of the worst images."""
    return [name for name in names if name.startswith("worst-")]
