"""report.html: one page that needs nothing else, made from what report.json holds."""

import base64
import shlex
from html import escape
from string import Template
from typing import Any, Iterable, Mapping, Sequence, Union

from ..metrics.catalogue import CATALOGUE

_INTERVAL = (
    "95 % interval",
    "Percentile bootstrap, 1000 draws of the images with replacement: pixels of one image are not independent (Efron, 1979).",
)
_WORST = 10
_PAGE = Template(
    """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>Calibration report</title>
<style>
:root { --ink: #1b1f24; --soft: #57606a; --line: #d0d7de; --paper: #ffffff; --tint: #f6f8fa; --mark: #0072b2;
  color-scheme: light dark }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --soft: #9da7b1; --line: #3d444d; --paper: #0d1117; --tint: #161b22; --mark: #56b4e9 }
}
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 60rem; padding: 2rem 1.25rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif }
h1 { font-size: 1.6rem; margin: 0 0 .25rem }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .75rem; border-bottom: 1px solid var(--line); padding-bottom: .25rem }
p { max-width: 44rem }
.verdict { font-size: 1.15rem; border-left: 4px solid var(--mark); padding: .5rem 1rem;
  background: var(--tint); max-width: none }
.note, caption, figcaption { color: var(--soft); font-size: .875rem; text-align: left }
.scroll { overflow-x: auto }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .75rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap }
th:first-child, td.text { text-align: left }
td.text { white-space: normal; overflow-wrap: anywhere; min-width: 10rem }
thead th { color: var(--soft); font-weight: 600; border-bottom: 2px solid var(--line) }
tbody th { font-weight: 400; overflow-wrap: anywhere; white-space: normal; min-width: 7rem }
figure { margin: 1rem 0 }
figure img { max-width: min(100%, 46rem); height: auto; background: #fff; padding: .75rem;
  border: 1px solid var(--line); border-radius: 6px }
dt { font-weight: 600; margin-top: .5rem }
dd { margin: 0; max-width: 44rem }
code { font-size: .85rem; overflow-wrap: anywhere }
@media print { body { max-width: none; padding: 0 } h2 { break-after: avoid } figure, tr { break-inside: avoid } }
</style>
</head>
<body>
<h1>Calibration report</h1>
<p class="note">$subtitle</p>
<p class="verdict">$headline</p>
$body
</body>
</html>
"""
)


def make_page(report: Mapping[str, Any], pictures: Mapping[str, bytes]) -> str:
    """The page; every name that comes from a file is escaped, and the page forbids itself scripts and requests."""
    sections = [
        ("Figures", _figures(report)),
        ("Reliability", _reliability(report, pictures)),
        ("Classes", _classes(report, pictures)),
        ("Images with the largest calibration error", _worst(report["per_image"])),
        ("Skipped files", _skipped(report["skipped"])),
        ("Definitions", _definitions(report)),
        ("How this was made", _made(report)),
    ]
    body = "\n".join(f"<section>\n<h2>{title}</h2>\n{content}\n</section>" for title, content in sections if content)
    images = report["images"]
    subtitle = f"{images} image{'s' * (images != 1)}, {_count(report['pixels'])} valid pixels, {report['date']}"
    return _PAGE.substitute(subtitle=escape(subtitle), headline=escape(report["headline"]), body=body)


def _figures(report: Mapping[str, Any]) -> str:
    rows = []
    for key, found in report["metrics"].items():
        metric = CATALOGUE[key]
        low, high = (_number(found[end], metric.unit) for end in ("low", "high"))
        interval = "" if found["low"] is None else f"{low} to {high}"
        rows.append([metric.name, _number(found["value"], metric.unit, with_unit=True), interval])
    near = report["boundary"]
    if near is not None:
        width = report["settings"]["boundary"]
        for metric in (CATALOGUE[key] for key in near if key in CATALOGUE):
            name = f"{metric.name} within {width} px of a boundary"
            rows.append([name, _number(near[metric.key], metric.unit, with_unit=True), ""])
    return _table(["Metric", "Value", _INTERVAL[0]], rows)


def _reliability(report: Mapping[str, Any], pictures: Mapping[str, bytes]) -> str:
    caption = (
        "Above: accuracy by confidence; what a bar lacks to the diagonal is overconfidence (orange), what it has beyond it "
        "underconfidence (light blue). Below: the share of the pixels in each bin, with mean confidence and accuracy."
    )
    rows = [
        [
            f"{row['lower']:.3f} to {row['upper']:.3f}",
            _count(row["pixels"]),
            _number(row["confidence"], "%"),
            _number(row["accuracy"], "%"),
        ]
        for row in report["reliability"]
    ]
    table = _table(["Confidence", "Pixels", "Mean confidence %", "Accuracy %"], rows)
    picture = _picture("reliability.png", pictures["reliability.png"], f"Reliability diagram. {report['headline']}", caption)
    return f"{picture}\n<details><summary>The diagram as a table</summary>\n{table}\n</details>"


def _classes(report: Mapping[str, Any], pictures: Mapping[str, bytes]) -> str:
    keys = {"iou": "IoU %", "recall": "Recall %", "precision": "Precision %"}
    keys["classwise_ece"] = f"{CATALOGUE['classwise_ece'].name} %"
    keys = {key: name for key, name in keys.items() if key in report["classes"][0]}
    rows = [[row["name"], _count(row["pixels"]), *(_number(row[key], "%") for key in keys)] for row in report["classes"]]
    content = _table(["Class", "Target pixels", *keys.values()], rows)
    if "classwise.png" in pictures:
        caption = "How often a pixel is of the class, by the probability that the network gave it."
        content += "\n" + _picture(
            "classwise.png", pictures["classwise.png"], "Reliability of every class's probability", caption
        )
    return content


def _worst(images: Sequence[Mapping[str, Any]]) -> str:
    worst = sorted((row for row in images if row["ece"] is not None), key=lambda row: -row["ece"])[:_WORST]
    metrics = [CATALOGUE[key] for key in ("ece", "mean_confidence", "accuracy", "miou")]
    rows = [
        [row["name"], _count(row["pixels"]), *(_number(row[metric.key], metric.unit) for metric in metrics)] for row in worst
    ]
    head = ["Image", "Valid pixels", *(f"{metric.name} {metric.unit}" for metric in metrics)]
    return _table(head, rows) if rows else ""


def _skipped(skipped: Sequence[Mapping[str, str]]) -> str:
    if not skipped:
        return ""
    rows = [[row["file"], row["reason"]] for row in skipped]
    note = f"<p>{len(skipped)} could not be used; nothing of them is in the figures.</p>"
    return note + _table(["File", "Reason"], rows, text=True)


def _definitions(report: Mapping[str, Any]) -> str:
    shown = [CATALOGUE[key] for key in (*report["metrics"], *report["classes"][0]) if key in CATALOGUE]
    terms = [*((metric.name, metric.definition) for metric in shown), _INTERVAL]
    items = (f"<dt>{escape(name)}</dt><dd>{escape(definition)}</dd>" for name, definition in terms)
    bins = report["settings"]["n_bins"]
    note = f"Figures are pooled over all valid pixels; {bins} bins. Sums are taken in float64, counts are whole numbers."
    return f"<p>{note}</p>\n<dl>{''.join(items)}</dl>"


def _made(report: Mapping[str, Any]) -> str:
    seconds, versions = report["seconds"], report["versions"]
    share = seconds["reading_share"]
    text = f"{seconds['total']:.1f} s in {seconds['jobs']} threads"
    text += f", {100 * share:.0f} % of their time for reading." if share is not None else "."
    command = " ".join(shlex.quote(word) for word in report["command"])
    listed = ", ".join(f"{name} {version}" for name, version in versions.items())
    return f"<p><code>{escape(command)}</code></p>\n<p class='note'>{escape(listed)}. {escape(text)}</p>"


def _table(head: Iterable[str], rows: Iterable[Sequence[str]], *, text: bool = False) -> str:
    """`text`: columns after the first hold words."""
    titles = "".join(f'<th scope="col">{escape(title)}</th>' for title in head)
    kind = ' class="text"' if text else ""
    lines = [
        f'<tr><th scope="row">{escape(first)}</th>' + "".join(f"<td{kind}>{escape(cell)}</td>" for cell in rest) + "</tr>"
        for first, *rest in rows
    ]
    body = "\n".join(lines)
    return f'<div class="scroll"><table>\n<thead><tr>{titles}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>'


def _picture(name: str, content: bytes, alternative: str, caption: str) -> str:
    data = base64.b64encode(content).decode()
    image = f'<img src="data:image/png;base64,{data}" alt="{escape(alternative)}">'
    return f"<figure>{image}<figcaption>{escape(caption)} ({escape(name)})</figcaption></figure>"


def _number(value: Union[float, str, None], unit: str, *, with_unit: bool = False) -> str:
    if value is None or isinstance(value, str):
        return value or "n/a"
    text = f"{100 * value:.2f}" if unit == "%" else f"{value:.4f}"
    return f"{text} {unit}".rstrip() if with_unit else text


def _count(value: float) -> str:
    return f"{value:,.0f}".replace(",", "\u202f")
