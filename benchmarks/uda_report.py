"""uda.md and the figures, from the runs in uda.json."""

import itertools
import statistics
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple

import torch
from post_hoc import CALIBRATIONS
from uda_methods import Method

from dacal_addon import plots
from dacal_addon.demo.datasets import NAMES
from dacal_addon.metrics.binned import ReliabilityTable

Row = Dict[str, Any]
Runs = Mapping[int, Row]
"""Seed -> run, of one method, data set and model."""
DRAWN = ("hard", "hard+pseudocal", "soft", "dacal-bilevel", "dacal")
"""The reliability diagrams."""


def write_report(rows: Sequence[Row], out: Path, table: Mapping[str, Method], ablation: Mapping[str, Method]) -> List[Path]:
    """Write uda.md and the figures; returns their paths."""
    written = [out / "uda.md"]
    written[0].write_text(report(rows, table, ablation))
    main = [row for row in rows if row["method"].split("+")[0] in table]
    datasets = [name for name in NAMES if any(row["dataset"] == name for row in main)]
    # Both figures show differences from hard pseudo-labels.
    with_hard = [name for name in datasets if any((row["dataset"], row["method"]) == (name, "hard") for row in rows)]
    figures = {"uda_frontier.png": frontier(main, with_hard, table)} if with_hard else {}
    for name in datasets:
        tables, ece = pooled([row for row in main if row["dataset"] == name], table)
        if tables:
            figures[f"uda_reliability_{name}.png"] = plots.reliability_diagram(tables, ece=ece)
    if "streets" in with_hard and any(row["method"] in ablation for row in rows):
        figures["uda_ablation.png"] = ablation_figure(rows, table, ablation)
    for name, figure in figures.items():
        plots.save(figure, out / name)
        written.append(out / name)
    return written


def title_of(method: str, table: Mapping[str, Method]) -> str:
    """Of a method, or of one with a post-hoc calibration behind a plus."""
    base, _, calibration = method.partition("+")
    return table[base].title + (f" + {CALIBRATIONS[calibration][0]}" if calibration else "")


def report(rows: Sequence[Row], table: Mapping[str, Method], ablation: Mapping[str, Method]) -> str:
    """The page, in Markdown."""
    lines = [
        "# Calibration under domain adaptation: the runs of `uda.py`",
        "",
        "Written by `benchmarks/uda.py` from `uda.json`; [../README.md](../README.md) says what it means. All figures are of",
        "the target's test images: means ± standard deviations over seeds; differences are paired by seed, and the change of",
        "ECE in percent is that of the mean. AUROC of the confidence: the chance that a wrong pixel is less confident than a",
        "right one. Of T: the chance that the teacher's wrong pixels get a higher temperature than its right ones; above 0.5 T",
        "softens errors, below it softens what is right, most of all what is sure. Of the label: as of the confidence, for",
        "the teacher's soft labels softmax(z / T), whose ECE stands beside. Behind a plus stands a calibration of the trained",
        "student, whose own T and seconds the row shows. Bounds see target labels.",
    ]
    main = [row for row in rows if row["method"].split("+")[0] in table]
    lines += ["", "## In short: students against hard pseudo-labels", "", *summary_lines(main, table)]
    for dataset in NAMES:
        for model in ("student", "EMA teacher"):
            of = by_method([row for row in main if row["dataset"] == dataset], model.split()[-1])
            if of:
                lines += ["", f"## {dataset}, {model}", "", *table_lines(of, table)]
    premise = [row for row in main if "blends_accuracy" in row]
    if premise:
        lines += ["", *premise_lines(premise, table)]
    if any(row["method"] in ablation for row in rows):
        lines += ["", *ablation_lines(rows, table, ablation)]
    return "\n".join(lines) + "\n"


def in_order(table: Mapping[str, Method]) -> List[str]:
    """Every method, each followed by itself with the post-hoc calibrations."""
    return [f"{base}{suffix}" for base in table for suffix in ("", *(f"+{name}" for name in CALIBRATIONS))]


def summary_lines(rows: Sequence[Row], table: Mapping[str, Method]) -> List[str]:
    """All data sets in one table: hard pseudo-labels' figures, and the others' differences from them."""
    datasets = [name for name in NAMES if any(row["dataset"] == name for row in rows)]
    of = {name: by_method([row for row in rows if row["dataset"] == name], "student") for name in datasets}
    body = []
    for method in [name for name in in_order(table) if any(name in runs for runs in of.values())]:
        line = [title_of(method, table), "/".join(sorted({str(len(runs[method])) for runs in of.values() if method in runs}))]
        for runs in of.values():
            own = runs.get(method, {})
            if method == "hard":
                line.append(f"{spread(own, 'miou', 100, 1)}; {spread(own, 'ece', 100, 2)}")
            else:
                line.append("; ".join(filter(None, against(own, runs.get("hard", {})))))
        body.append(line)
    return markdown(["labels on target", "seeds", *(f"{name}: mIoU; ECE" for name in datasets)], body)


def table_lines(of: Mapping[str, Runs], table: Mapping[str, Method]) -> List[str]:
    """The methods of one data set and model, with their post-hoc calibrations, against hard pseudo-labels."""
    body = []
    for method in [name for name in in_order(table) if name in of]:
        body.append([title_of(method, table), *cells(of[method]), *against(of[method], of.get("hard", {}))])
    return markdown(["labels on target", *FIGURES, "mIoU against hard", "ECE against hard"], body)


def premise_lines(rows: Sequence[Row], table: Mapping[str, Method]) -> List[str]:
    """Whether blends of target images stand for the target."""
    figures = {
        "accuracy on the target %": "accuracy",
        "on blends %": "blends_accuracy",
        "confidence on the target %": "confidence",
        "on blends, %": "blends_confidence",
    }
    body = []
    for dataset in NAMES:
        for method, runs in by_method([row for row in rows if row["dataset"] == dataset], "student").items():
            cells_ = [spread(runs, figure, 100, 1) for figure in figures.values()]
            body.append([dataset, title_of(method, table), str(len(runs)), *cells_])
    return [
        "## Do blends stand for the target?",
        "",
        "What PseudoCal and fitted temperatures rest on: that a network is right as often, at the same confidence, on blends",
        "(65 to 35, pixels whose two pseudo-labels differ, judged by the dominant one's) as on the target by true labels.",
        "",
        *markdown(["data set", "labels on target", "seeds", *figures], body),
    ]


def ablation_lines(rows: Sequence[Row], table: Mapping[str, Method], ablation: Mapping[str, Method]) -> List[str]:
    """The search: every variant beside the method that it varies, on the same seeds."""
    lines = ["## The search, on streets, student", "", "One change at a time of what stands above in bold, on the same seeds."]
    of = by_method([row for row in rows if row["dataset"] == "streets"], "student")
    methods = {**table, **ablation}
    for base, prefix, title in (
        ("dacal-bilevel", "bilevel-", "Learned by the bilevel step"),
        ("first", "first-", "Fitted directly, first round"),
        ("dacal", "fit-", "Fitted directly, second round"),
    ):
        variants = [name for name in ablation if name.startswith(prefix) and name in of]
        seeds = {seed for name in variants for seed in of[name]}
        body = []
        for name in ["hard", "soft", base, *variants]:
            own = {seed: run for seed, run in of.get(name, {}).items() if seed in seeds}
            if own:
                bold = "" if name in variants else "**"
                body.append([f"{bold}{title_of(name, methods)}{bold}", *cells(own), *against(own, of.get(base, {}))])
        if variants:
            lines += ["", f"### {title}", ""]
            lines += markdown(["change", *FIGURES, "mIoU against the last in bold", "ECE against the same"], body)
    return lines


FIGURES: Dict[str, Callable[[Runs], str]] = {
    "seeds": lambda runs: str(len(runs)),
    "mIoU %": lambda runs: spread(runs, "miou", 100, 1),
    "accuracy %": lambda runs: spread(runs, "accuracy", 100, 1),
    "confidence %": lambda runs: spread(runs, "confidence", 100, 1),
    "ECE %": lambda runs: spread(runs, "ece", 100, 2),
    "NLL": lambda runs: spread(runs, "nll", 1, 3),
    "AUROC of confidence": lambda runs: spread(runs, "confidence_auroc", 1, 2),
    "of T": lambda runs: spread(runs, "temperature_auroc", 1, 2),
    "of the label": lambda runs: spread(runs, "label_auroc", 1, 2),
    "ECE of the label %": lambda runs: spread(runs, "label_ece", 100, 2),
    "mean T": lambda runs: spread(runs, "temperature_mean", 1, 2),
    "s": lambda runs: spread(runs, "seconds", 1, 0).split(" ")[0],
}


def cells(runs: Runs) -> List[str]:
    return [figure(runs) for figure in FIGURES.values()]


def markdown(header: Sequence[str], body: Sequence[Sequence[str]]) -> List[str]:
    return [f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *body)]


def by_method(rows: Sequence[Row], model: str) -> Dict[str, Dict[int, Row]]:
    """Method -> seed -> run."""
    result: Dict[str, Dict[int, Row]] = {}
    for row in rows:
        if row["model"] == model:
            result.setdefault(row["method"], {})[row["seed"]] = row
    return result


def values(runs: Runs, figure: str, scale: float = 1.0) -> List[float]:
    return [scale * row[figure] for row in runs.values() if row.get(figure) is not None]


def spread(runs: Runs, figure: str, scale: float, digits: int) -> str:
    """Mean ± standard deviation, the latter from two runs on; empty where there is none.

    Example:
        >>> spread({0: {"ece": 0.1}, 1: {"ece": 0.2}}, "ece", 100, 1)
        '15.0 ± 7.1'
    """
    own = values(runs, figure, scale)
    if not own:
        return ""
    deviation = f" ± {statistics.stdev(own):.{digits}f}" if len(own) > 1 else ""
    return f"{statistics.mean(own):.{digits}f}{deviation}"


def differences(own: Runs, other: Runs) -> Runs:
    """Of mIoU and ECE, by the seeds that both have.

    Example:
        >>> differences({0: {"miou": 0.5, "ece": 0.02}, 1: {"miou": 0.7, "ece": 0.1}}, {0: {"miou": 0.25, "ece": 0.08}})
        {0: {'miou': 0.25, 'ece': -0.06}}
    """
    return {
        seed: {figure: own[seed][figure] - other[seed][figure] for figure in ("miou", "ece")} for seed in own if seed in other
    }


def against(own: Runs, other: Runs) -> List[str]:
    """The paired differences of mIoU and ECE, in points, and the change of the mean ECE.

    Example:
        >>> against({0: {"miou": 0.5, "ece": 0.02}}, {0: {"miou": 0.51, "ece": 0.08}})
        ['-1.0', '-75 % (-6.00)']
    """
    paired = differences(own, other)
    if not paired:
        return ["", ""]
    signed = [
        text if text.startswith("-") else f"+{text}" for text in (spread(paired, "miou", 100, 1), spread(paired, "ece", 100, 2))
    ]
    before = {seed: other[seed] for seed in paired}
    change = statistics.mean(values(paired, "ece")) / statistics.mean(values(before, "ece"))
    return [signed[0], f"{100 * change:+.0f} % ({signed[1]})"]


def pooled(rows: Sequence[Row], table: Mapping[str, Method]) -> Tuple[Dict[str, ReliabilityTable], Dict[str, float]]:
    """The students' reliability tables over the seeds that all have, and the means of their ECE: pooled gaps could cancel."""
    of = by_method(rows, "student")
    drawn = [name for name in DRAWN if name in of]
    common = set.intersection(*(set(of[name]) for name in drawn)) if drawn else set()
    of = {name: {seed: of[name][seed] for seed in common} for name in drawn}
    tables, ece = {}, {}
    for method in drawn if common else []:
        bins = torch.tensor([row["bins"] for row in of[method].values()], dtype=torch.float64)
        pixels = bins[..., 0].sum(0)
        means = (bins[..., 1:] * bins[..., :1]).sum(0) / pixels[:, None]
        edges = torch.linspace(0, 1, len(pixels) + 1, dtype=torch.float64)
        title = title_of(method, table)
        tables[title] = ReliabilityTable(edges[:-1], edges[1:], pixels.long(), means[:, 0], means[:, 1])
        ece[title] = statistics.mean(values(of[method], "ece"))
    return tables, ece


AIM = {"miou": 0.01, "ece": -0.4}
"""What was aimed at, against hard pseudo-labels: points of mIoU, and a fraction of their ECE."""


def frontier(rows: Sequence[Row], datasets: Sequence[str], table: Mapping[str, Method]) -> Any:
    """mIoU against ECE of the students, both as paired differences from hard pseudo-labels, a panel a data set."""
    colours = {
        "source-only": plots.GREY,
        "soft": plots.SKY,
        "dacal-bilevel": plots.BLUE,
        "dacal": plots.ORANGE,
        "hard": "black",
    }
    others = itertools.cycle(["#8C564B", "#17BECF", "#CC79A7", "#009E73", "#E69F00", "#BCBD22", "#BBBBBB"])
    colours = {name: colours[name] if name in colours else next(others) for name in table}
    markers = {"": "o", "ts": "^", "lts": "v", "transcal": "<", "pseudocal": "D", "oracle-ts": "x"}
    with plots.styled():
        figure, axes = plots.new_figure(1, len(datasets), (3.6 * len(datasets), 4.6))
        for axis, dataset in zip(axes[0], datasets):
            of = by_method([row for row in rows if row["dataset"] == dataset], "student")
            for base, method in table.items():
                for calibration, marker in markers.items():
                    paired = differences(of.get(f"{base}+{calibration}" if calibration else base, {}), of["hard"])
                    # The bound by true labels is far from the rest, and would squeeze it into a corner.
                    if paired and base != "bound-labels":
                        point(
                            axis,
                            paired,
                            colours[base],
                            marker,
                            label=None if calibration else method.title,
                            small=bool(calibration),
                        )
            against_hard(axis, of["hard"])
            axis.set_title(
                f"{dataset}\nhard: {spread(of['hard'], 'miou', 100, 1)} % mIoU, {spread(of['hard'], 'ece', 100, 2)} % ECE"
            )
        axes[0, 0].set_ylabel("mIoU against hard pseudo-labels, points")
        for calibration, marker in list(markers.items())[1:]:
            name = CALIBRATIONS[calibration][0]
            axes[0, 0].plot([], [], linestyle="", marker=marker, color="black", markersize=4, label=f"+ {name}")
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncol=4, fontsize=7.5)
        return figure


def ablation_figure(rows: Sequence[Row], table: Mapping[str, Method], ablation: Mapping[str, Method]) -> Any:
    """mIoU against ECE of every variant of the search, as means of paired differences from hard pseudo-labels."""
    of = by_method([row for row in rows if row["dataset"] == "streets"], "student")
    hard = of["hard"]
    seeds = set().union(*(runs for name, runs in of.items() if name in ablation))
    of = {name: {seed: row for seed, row in runs.items() if seed in seeds} for name, runs in of.items()}
    groups = [
        ("bilevel-", "variants learned by the bilevel step", plots.SKY, "o"),
        ("first", "variants fitted directly, first round", "#E69F00", "s"),
        ("fit-", "variants fitted directly, second round", plots.ORANGE, "D"),
    ]
    with plots.styled():
        figure, axes = plots.new_figure(1, 1, (6.0, 5.0))
        axis = axes[0, 0]
        for prefix, title, colour, marker in groups:
            paired = [differences(runs, hard) for name, runs in of.items() if name.startswith(prefix)]
            paired = [runs for runs in paired if runs]
            x, y = ([statistics.mean(values(runs, figure_, 100)) for runs in paired] for figure_ in ("ece", "miou"))
            if paired:
                axis.plot(x, y, linestyle="", marker=marker, color=colour, markersize=5, alpha=0.8, label=title)
        for name, marker, colour in (
            ("hard", "X", "black"),
            ("soft", "P", "black"),
            ("dacal-bilevel", "*", plots.BLUE),
            ("dacal", "*", "#A03000"),
        ):
            own = differences(of.get(name, {}), hard)
            if own:
                point(axis, own, colour, marker, label=table[name].title)
        against_hard(axis, hard)
        axis.set(ylabel="mIoU against hard pseudo-labels, points", title="streets: the search")
        figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncol=2, fontsize=8)
        return figure


def against_hard(axis: Any, hard: Runs) -> None:
    """Lines through hard pseudo-labels, and a shade where what was aimed at is reached."""
    axis.set_xlabel("ECE against hard pseudo-labels, points")
    for line in (axis.axhline, axis.axvline):
        line(0, color=plots.LIGHT_GREY, linewidth=0.7, zorder=0)
    limits = axis.get_xlim(), axis.get_ylim()
    right, bottom = 100 * AIM["ece"] * statistics.mean(values(hard, "ece")), 100 * AIM["miou"]
    low, high = min(limits[0][0], 1.3 * right), max(limits[1][1], 1.5 * bottom)
    axis.fill_between([low, right], bottom, high, color="#009E73", alpha=0.12, linewidth=0, zorder=0, label="aimed at")
    axis.set(xlim=(low, limits[0][1]), ylim=(limits[1][0], high))


def point(axis: Any, runs: Runs, colour: str, marker: str, *, label: Optional[str], small: bool = False) -> None:
    """Means, and standard deviations over seeds as bars."""
    x, y = values(runs, "ece", 100), values(runs, "miou", 100)
    bars = {} if len(x) < 2 or small else {"xerr": statistics.stdev(x), "yerr": statistics.stdev(y)}
    axis.errorbar(
        statistics.mean(x),
        statistics.mean(y),
        **bars,
        fmt=marker,
        color=colour,
        markersize=4 if small else 6,
        elinewidth=0.7,
        alpha=0.9,
        label=label,
    )
