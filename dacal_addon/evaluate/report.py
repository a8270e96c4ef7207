"""Everything that was found, as numbers."""

import datetime
import math
import platform
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Sequence

import torch

from .. import __version__
from ..metrics import CalibrationStats, ReliabilityTable
from ..metrics.binned import class_gap
from ..metrics.bootstrap import Bootstrap
from ..metrics.catalogue import CATALOGUE, Metric
from .compare import Network, difference
from .judging import Results
from .options import EvaluateOptions

SCHEMA = "dacal-evaluate/2"
THRESHOLDS = (0.0, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.968, 0.99, 0.999)
"""Of the confidence; 0.968 is DAFormer's."""
_NEAR_BOUNDARIES = ("accuracy", "mean_confidence", "ece")


class Found(NamedTuple):
    """One network and everything that was found of it."""

    network: Network
    results: Results
    draws: Dict[str, Bootstrap]
    """By metric, of one shared resample of the images; none of fewer than two images."""


def headline(stats: CalibrationStats) -> str:
    """The result in a sentence.

    Example:
        >>> stats = CalibrationStats(2, input="top1")
        >>> stats.update((torch.tensor([[[0.9, 0.8]]]), torch.zeros(1, 1, 2).long()), torch.tensor([[[0, 1]]]))
        >>> headline(stats)
        'Overconfident: mean confidence 85.0 %, accuracy 50.0 %; calibration error (ECE) 45.00 %.'
    """
    if not stats.pixels:
        return "No valid pixel was found."
    confidence, accuracy = stats.mean_confidence(), stats.accuracy()
    # On the whole: errors of both signs may cancel in the means, and show in the ECE alone.
    gap = confidence - accuracy
    kind = (
        "Neither over- nor underconfident on the whole"
        if abs(gap) < 0.005
        else "Overconfident"
        if gap > 0
        else "Underconfident"
    )
    means = f"mean confidence {100 * confidence:.1f} %, accuracy {100 * accuracy:.1f} %"
    return f"{kind}: {means}; calibration error (ECE) {100 * stats.ece():.2f} %."


def draw(network: Network, results: Results) -> Found:
    """Add the intervals, all from one resample of the images."""
    keys = [metric.key for metric in _metrics(network) if metric.interval]
    stats = results.stats
    return Found(network, results, stats.bootstrap(keys, progress=True) if stats.images >= 2 else {})


def make_report(found: Sequence[Found], options: EvaluateOptions, command: Sequence[str]) -> Dict[str, Any]:
    """What report.json holds: fractions, not percent; null where there is no value, "infinite" for an infinite one.

    `found`: the network itself, then those that are compared with it.
    """
    first = found[0]
    results, stats = first.results, first.results.stats
    busy = results.reading_seconds + results.judging_seconds
    report = {
        "schema": SCHEMA,
        "name": first.network.name,
        "headline": headline(stats),
        "remarks": remarks(found),
        "images": stats.images,
        "pixels": stats.pixels,
        "ignored_pixels": stats.ignored_pixels,
        "metrics": _figures(first),
        "comparison": _comparison(found) if len(found) > 1 else None,
        "boundary": None if results.boundary is None else _near_boundaries(results.boundary),
        "reliability": _rows(stats.reliability()),
        "thresholds": [
            {"threshold": threshold, "share": share, "accuracy": accuracy}
            for threshold, share, accuracy in zip(*(column.tolist() for column in stats.selective(THRESHOLDS)))
        ],
        "classes": _classes(results, options),
        "per_image": [row._asdict() for row in results.images],
        "skipped": [{"file": bad.path, "reason": bad.reason} for bad in results.skipped],
        "settings": {**{key: _plain(value) for key, value in options._asdict().items()}, "input": first.network.plan.input},
        "seconds": {
            "judging_all": sum(one.results.seconds for one in found),
            "reading": results.reading_seconds,
            "judging": results.judging_seconds,
            "reading_share": results.reading_seconds / busy if busy else math.nan,
            "jobs": results.jobs,
        },
        "command": list(command),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "versions": {"dacal_addon": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }
    cleaned: Dict[str, Any] = _finite(report)
    return cleaned


def remarks(found: Sequence[Found]) -> List[str]:
    """What a reader should know before the figures: on files and labels, on classes that no pixel has, on ignored pixels."""
    said: List[str] = []
    for one in found:
        own = [*one.results.remarks, *one.results.stats.remarks(one.results.class_names)]
        if one is found[0] or not one.results.stats.pixels:
            said += own
        else:  # the labels are the same: what is said of them has been said
            said += [f"{one.network.name}: {text}" for text in own if text not in said]
    return said


def _metrics(network: Network) -> List[Metric]:
    top1 = network.plan.input == "top1"
    return [metric for metric in CATALOGUE.values() if not metric.classwise and not (metric.distribution and top1)]


def _figures(found: Found) -> Dict[str, Dict[str, Any]]:
    return {metric.key: _figure(found, metric) for metric in _metrics(found.network)}


def _figure(found: Found, metric: Metric) -> Dict[str, Any]:
    """`why`: where there is no interval."""
    stats, drawn = found.results.stats, found.draws.get(metric.key)
    if drawn is not None:
        why = "no draw of the images has a value" if math.isnan(drawn.low) else None
        return {"value": drawn.estimate, "low": drawn.low, "high": drawn.high, "why": why}
    why = "takes as long as all others together" if not metric.interval else "needs two images or more"
    return {"value": getattr(stats, metric.key)(), "low": None, "high": None, "why": why}


def _comparison(found: Sequence[Found]) -> Dict[str, Any]:
    first = found[0]
    networks = []
    for one in found:
        shared = [key for key in first.draws if key in one.draws]
        differences = {key: difference(key, first.draws[key], one.draws[key]) for key in shared}
        for named in differences.values():
            named["better"] = {"first": first.network.name, "other": one.network.name}.get(named["better"])
        networks.append(
            {
                "name": one.network.name,
                "predictions": str(one.network.options.predictions),
                "headline": headline(one.results.stats),
                "metrics": _figures(one),
                "differences": None if one is first else differences,
                "reliability": _rows(one.results.stats.reliability()),
                "iou": one.results.stats.iou().tolist(),
            }
        )
    return {"reference": first.network.name, "networks": networks}


def _near_boundaries(stats: CalibrationStats) -> Dict[str, float]:
    return {"pixels": stats.pixels, **{key: getattr(stats, key)() for key in _NEAR_BOUNDARIES}}


def _classes(results: Results, options: EvaluateOptions) -> List[Dict[str, Any]]:
    stats = results.stats
    confusion, iou = stats.confusion().double(), stats.iou()
    columns = {
        "pixels": stats.class_pixels().tolist(),
        "iou": iou.tolist(),
        "recall": (confusion.diag() / confusion.sum(1)).tolist(),
        "precision": (confusion.diag() / confusion.sum(0)).tolist(),
        "confidence": stats.predicted_confidence().tolist(),
    }
    if options.classwise:
        columns["classwise_ece"] = torch.as_tensor(stats.classwise_ece(None)).tolist()
        columns["gap"] = [class_gap(stats.reliability(of_class=c)) for c in range(len(results.class_names))]
    return [{"name": name, **{key: column[c] for key, column in columns.items()}} for c, name in enumerate(results.class_names)]


def _rows(table: ReliabilityTable) -> List[Dict[str, float]]:
    columns = [column.tolist() for column in table]
    return [dict(zip(table._fields, row)) for row in zip(*columns)]


def _plain(value: object) -> Any:
    return str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value


def _finite(value: Any) -> Any:
    """The same without what JSON does not have: None for NaN, and infinity as a word."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_finite(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else "infinite" if value > 0 else "-infinite"
    return value
