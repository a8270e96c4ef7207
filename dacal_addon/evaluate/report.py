"""Everything that was found, as numbers, and the pictures of them."""

import datetime
import math
import platform
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

import torch

from .. import __version__, plots
from ..metrics import CalibrationStats, ReliabilityTable
from ..metrics.catalogue import CATALOGUE, Metric
from .judging import Results
from .options import EvaluateOptions

_NEAR_BOUNDARIES = ("accuracy", "mean_confidence", "ece")


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


def make_pictures(results: Results, options: EvaluateOptions) -> Dict[str, Any]:
    """File name -> matplotlib `Figure`."""
    tables = {"all pixels": results.stats.reliability()}
    if results.boundary is not None:
        tables["near boundaries"] = results.boundary.reliability()
    figures = {"reliability.png": plots.reliability_diagram(tables)}
    if options.classwise:
        by_class = {name: results.stats.reliability(of_class=c) for c, name in enumerate(results.class_names)}
        figures["classwise.png"] = plots.classwise_panel(by_class)
    return figures


def make_report(results: Results, options: EvaluateOptions, kind: str, command: Sequence[str]) -> Dict[str, Any]:
    """What report.json holds: fractions, not percent; null where there is no value, "infinite" for an infinite one."""
    stats = results.stats
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in options._asdict().items()}
    busy = results.reading_seconds + results.judging_seconds
    report = {
        "format": 1,
        "headline": headline(stats),
        "images": stats.images,
        "pixels": stats.pixels,
        "metrics": {
            key: _with_interval(stats, metric)
            for key, metric in CATALOGUE.items()
            if not metric.classwise and not (metric.distribution and kind == "top1")
        },
        "boundary": None if results.boundary is None else _near_boundaries(results.boundary),
        "reliability": _rows(stats.reliability()),
        "classes": _classes(results, options),
        "per_image": [row._asdict() for row in results.images],
        "skipped": [{"file": bad.path, "reason": bad.reason} for bad in results.skipped],
        "settings": {**settings, "input": kind},
        "seconds": {
            "total": results.seconds,
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


def _with_interval(stats: CalibrationStats, metric: Metric) -> Dict[str, Optional[float]]:
    if not metric.interval or stats.images < 2:
        return {"value": getattr(stats, metric.key)(), "low": None, "high": None}
    found = stats.bootstrap(metric.key)
    return {"value": found.estimate, "low": found.low, "high": found.high}


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
    }
    if options.classwise:
        columns["classwise_ece"] = torch.as_tensor(stats.classwise_ece(None)).tolist()
    return [{"name": name, **{key: column[c] for key, column in columns.items()}} for c, name in enumerate(results.class_names)]


def _rows(table: ReliabilityTable) -> List[Dict[str, float]]:
    columns = [column.tolist() for column in table]
    return [dict(zip(table._fields, row)) for row in zip(*columns)]


def _finite(value: Any) -> Any:
    """The same without what JSON does not have: None for NaN, and infinity as a word."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_finite(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else "infinite"
    return value
