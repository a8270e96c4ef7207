"""cells.md: what holds in how many cells, and every figure behind it."""

import math
import statistics
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Sequence

import numpy as np
from cell_folds import CURVE, LABELLED, reached
from cell_methods import Method

from dacal_addon.calibrate import ESTIMATORS
from dacal_addon.calibrate.estimators import TYPICAL
from dacal_addon.plots import BLUE, GREY, ORANGE, new_figure, save, styled

Row = Dict[str, Any]
LOST = 0.5
"""Points of mIoU, and of ECE, beyond which a cell counts as harmed."""
CONSTANTS = (TYPICAL**0.5, 1.15, 1.2, TYPICAL, 1.3, 1.35, 1.4, TYPICAL**2)
"""Temperatures: the typical one, its neighbours, half and double of its logarithm."""
CHOSEN_ON = ("streets-600", "digits-600", "mitochondria-600", "streets_india_cambridge-1000")
"""Cells that were to choose constants."""


class Outcome(NamedTuple):
    """A method with a fold, or without, in one cell: means over the seeds, paired with hard labels of the same seeds."""

    cell: str
    seeds: int
    gained: float
    """Points of mIoU more than hard labels; likewise the next one, of accuracy."""
    accuracy_gained: float
    before: float
    """ECE of hard labels as they are, %."""
    ece: float
    best: float
    """ECE of hard labels at their best single temperature."""


def write_report(rows: Sequence[Row], path: Path, methods: Mapping[str, Method]) -> None:
    """Write cells.md."""
    parts = [
        "# What holds in how many cells",
        "Written by `benchmarks/cells.py` from `cells.json`; [README](../README.md) says what it means. Target test images, "
        "percent; means over seeds, differences paired with hard labels by seed. *taken*: the temperature of "
        "`estimate_temperature`, without target labels. *aim*: ECE 40 % lower than hard labels' as they are, or by three "
        "quarters of what their best single temperature takes off.",
        "## In short",
        summary(rows, methods),
        "## mIoU and ECE by cell",
        by_cell(rows, methods),
        "## Hard labels: a constant, or an estimate",
        rules(rows),
        "## Hard labels: every estimate",
        estimates(rows),
        "## Hard labels: a few labelled target images",
        labelled(rows),
        "## Other figures",
        others(rows, methods),
    ]
    path.write_text("\n\n".join(parts) + "\n")
    if any(row["labelled"] for row in rows):
        save(labelled_figure(rows), path.with_name(f"{path.stem}_labelled.png"))


def cells_of(rows: Sequence[Row]) -> List[str]:
    return list(dict.fromkeys(row["cell"] for row in rows))


def of(rows: Sequence[Row], method: str, cell: str) -> Dict[int, Row]:
    """By seed."""
    return {row["seed"]: row for row in rows if row["method"] == method and row["cell"] == cell}


def outcomes(rows: Sequence[Row], method: str, ece_of: Callable[[Row], float]) -> List[Outcome]:
    """In every cell that has the method and hard labels."""
    found = []
    for cell in cells_of(rows):
        own, hard = of(rows, method, cell), of(rows, "hard", cell)
        seeds = sorted(own.keys() & hard.keys())
        if not seeds:
            continue

        pairs = [(own[seed], hard[seed]) for seed in seeds]
        found.append(
            Outcome(
                cell,
                len(seeds),
                statistics.fmean(row["miou"] - other["miou"] for row, other in pairs),
                statistics.fmean(row["accuracy"] - other["accuracy"] for row, other in pairs),
                statistics.fmean(other["ece"] for _, other in pairs),
                statistics.fmean(ece_of(row) for row, _ in pairs),
                statistics.fmean(other["folds"]["best"]["ece"] for _, other in pairs),
            )
        )
    return found


def summary(rows: Sequence[Row], methods: Mapping[str, Method]) -> str:
    """One row a method and fold: in how many cells it reaches the aim, harms, and the worst one."""
    columns = ("cells", "reaches the aim", "ECE rises", f"by more than {LOST}", f"mIoU falls by more than {LOST}")
    head = f"| | {' | '.join((*columns, 'mean mIoU', 'mean ECE', 'worst ECE', 'worst mIoU'))} |"
    lines = [head, "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"]
    for name, method in methods.items():
        for fold, ece_of in _folds(method).items():
            each = outcomes(rows, name, ece_of)
            if not each:
                continue
            worst, lowest = max(each, key=lambda o: o.ece - o.before), min(each, key=lambda o: o.gained)
            lines.append(
                f"| {method.title}{fold} | {len(each)} | {sum(reached(o.before, o.ece, o.best) for o in each)} "
                f"| {sum(o.ece > o.before for o in each)} | {sum(o.ece > o.before + LOST for o in each)} "
                f"| {sum(o.gained < -LOST for o in each)} | {statistics.fmean(o.gained for o in each):+.1f} "
                f"| {statistics.fmean(o.ece - o.before for o in each):+.2f} | {worst.cell} {worst.ece - worst.before:+.2f} "
                f"| {lowest.cell} {lowest.gained:+.1f} |"
            )
    return "\n".join(lines)


def _folds(method: Method) -> Dict[str, Callable[[Row], float]]:
    """What is behind a method's title: the ECE of it."""
    folds: Dict[str, Callable[[Row], float]] = {
        "": lambda row: float(row["ece"]),
        " + fold": lambda row: float(row["folds"]["taken"]["ece"]),
        " + best single T (bound)": lambda row: float(row["folds"]["best"]["ece"]),
    }
    if method.closely:
        folds.update({f" + fold, {k} labelled": partial(_with_labels, str(k)) for k in LABELLED})
    return folds


def _with_labels(k: str, row: Row) -> float:
    return statistics.fmean(row["labelled"][k]["combined"])


def by_cell(rows: Sequence[Row], methods: Mapping[str, Method]) -> str:
    """mIoU, its and accuracy's gain on hard labels of the same seeds; ECE as trained / folded / at the best temperature."""
    cells = cells_of(rows)
    lines = [f"| | {' | '.join(cells)} |", "| --- |" + " --- |" * len(cells)]
    for name, method in methods.items():
        entries = []
        for cell in cells:
            own = list(of(rows, name, cell).values())
            if not own:
                entries.append("")
                continue
            miou, ece, taken, best = (
                statistics.fmean(values)
                for values in zip(*((r["miou"], r["ece"], r["folds"]["taken"]["ece"], r["folds"]["best"]["ece"]) for r in own))
            )
            gains = "".join(
                f" ({each.gained:+.1f}, accuracy {each.accuracy_gained:+.1f})"
                for each in outcomes(rows, name, lambda row: float(row["ece"]))
                if each.cell == cell and name != "hard"
            )
            entries.append(f"{miou:.1f}{gains}; {ece:.2f} / {taken:.2f} / {best:.2f} ({len(own)})")
        if any(entries):
            lines.append(f"| {method.title} | {' | '.join(entries)} |")
    return "\n".join(lines)


def rules(rows: Sequence[Row]) -> str:
    """How constants and estimators do as the temperature of hard labels' students. A constant's ECE is read off the curve."""
    hard = [row for row in rows if row["method"] == "hard"]
    if not hard:
        return "(none)"
    columns = ("reaches the aim", "worst ECE", "mean of log(ECE after / before)", "of cells chosen on", "of others")
    lines = [f"| | {' | '.join(columns)} | log T from the best |", "| --- |" + " --- |" * (len(columns) + 1)]
    for title, ece_of, temperature_of in [*map(_constant, CONSTANTS), *map(_estimator, ESTIMATORS)]:
        each = outcomes(hard, "hard", ece_of)
        worst = max(each, key=lambda o: o.ece - o.before)
        logs = {o.cell: math.log(o.ece / o.before) for o in each}
        parts = (logs.values(), *([v for c, v in logs.items() if (c in CHOSEN_ON) == own] for own in (True, False)))
        means = " | ".join(f"{statistics.fmean(part):+.2f}" if part else "" for part in parts)
        squares = [math.log(temperature_of(row) / row["folds"]["best"]["temperature"]) ** 2 for row in hard]
        lines.append(
            f"| {title} | {sum(reached(o.before, o.ece, o.best) for o in each)} of {len(each)} "
            f"| {worst.cell} {worst.ece - worst.before:+.2f} | {means} | {math.sqrt(statistics.fmean(squares)):.2f} |"
        )
    by_set: Dict[str, List[float]] = {}
    for row in hard:
        by_set.setdefault(row["cell"].rsplit("-", 1)[0], []).append(math.log(row["folds"]["best"]["temperature"]))
    means_of_sets = [statistics.fmean(values) for values in by_set.values()]
    lines.append(
        f"\nOf the best temperatures, log T by data set: mean {statistics.fmean(means_of_sets):.2f}, standard deviation "
        f"{statistics.pstdev(means_of_sets):.2f}."
    )
    return "\n".join(lines)


class _Rule(NamedTuple):
    title: str
    ece_of: Callable[[Row], float]
    temperature_of: Callable[[Row], float]


def _constant(t: float) -> _Rule:
    at = np.log(CURVE)
    return _Rule(f"T = {t:.3g}", lambda row: float(np.interp(math.log(t), at, row["curve"])), lambda row: t)


def _estimator(name: str) -> _Rule:
    """Where it has no estimate, T = 1."""

    def fold(row: Row) -> Row:
        found: Row = row["folds"].get(name, {"ece": row["ece"], "temperature": 1.0})
        return found

    return _Rule(f"`{name}`", lambda row: float(fold(row)["ece"]), lambda row: float(fold(row)["temperature"]))


def estimates(rows: Sequence[Row]) -> str:
    """ECE at every estimator's temperature, which that is, and how far its accuracy is off."""
    hard = [row for row in rows if row["method"] == "hard"]
    if not hard:
        return "(none)"
    names = list(dict.fromkeys(name for row in hard for name in row["folds"]))
    lines = [f"| cell | as trained | {' | '.join(names)} |", "| --- | --- |" + " --- |" * len(names)]
    for cell in cells_of(hard):
        own = list(of(hard, "hard", cell).values())
        entries = []
        for name in names:
            there = [row["folds"][name] for row in own if name in row["folds"]]
            if not there:
                entries.append("")
                continue
            text = (
                f"{statistics.fmean(x['ece'] for x in there):.2f} (T {statistics.fmean(x['temperature'] for x in there):.2f})"
            )
            off = [
                100 * fold["accuracy"] - row["accuracy"]
                for row in own
                for fold in [row["folds"].get(name, {})]
                if name not in ("best", "taken", "source", "blends", "mixed_blends") and fold.get("accuracy") is not None
            ]
            entries.append(text + (f", accuracy {statistics.fmean(off):+.1f}" if off else ""))
        lines.append(f"| {cell} ({len(own)}) | {statistics.fmean(row['ece'] for row in own):.2f} | {' | '.join(entries)} |")
    return "\n".join(lines)


def labelled(rows: Sequence[Row]) -> str:
    """ECE by number of labelled images, joined with the estimate without labels: mean of draws and seeds, and the worst."""
    hard = [row for row in rows if row["method"] == "hard" and row["labelled"]]
    lines = [
        f"| cell | as trained | 0 | {' | '.join(map(str, LABELLED))} | best single T |",
        "| --- | --- | --- |" + " --- |" * (len(LABELLED) + 1),
    ]
    for cell in cells_of(hard):
        own = list(of(hard, "hard", cell).values())
        entries = [f"{statistics.fmean(row['ece'] for row in own):.2f}"]
        entries.append(f"{statistics.fmean(row['folds']['taken']['ece'] for row in own):.2f}")
        for k in LABELLED:
            values = [value for row in own for value in row["labelled"][str(k)]["combined"]]
            entries.append(f"{statistics.fmean(values):.2f} ({max(values):.2f})")
        entries.append(f"{statistics.fmean(row['folds']['best']['ece'] for row in own):.2f}")
        lines.append(f"| {cell} | {' | '.join(entries)} |")
    return "\n".join(lines)


def labelled_figure(rows: Sequence[Row]) -> Any:
    """A panel a cell: ECE of hard labels against the number of labelled target images, between as trained and the best."""
    hard = [row for row in rows if row["method"] == "hard" and row["labelled"]]
    cells = cells_of(hard)
    columns = min(3, len(cells))
    with styled():
        figure, axes = new_figure(-(-len(cells) // columns), columns, (3.0 * columns, 2.0 * -(-len(cells) // columns) + 0.6))
        for axis in axes.flat[len(cells) :]:
            axis.set_visible(False)
        for axis, cell in zip(axes.flat, cells):
            own = list(of(hard, "hard", cell).values())
            draws = [[row["folds"]["taken"]["ece"] for row in own]]
            draws += [[value for row in own for value in row["labelled"][str(k)]["combined"]] for k in LABELLED]
            x = range(len(draws))
            middle = [statistics.fmean(values) for values in draws]
            axis.fill_between(x, [min(v) for v in draws], [max(v) for v in draws], color=BLUE, alpha=0.2, linewidth=0)
            axis.plot(x, middle, color=BLUE, marker="o", markersize=3, label="folded T (band: all seeds and draws)")
            for name, value, style in (
                ("as trained", statistics.fmean(row["ece"] for row in own), "--"),
                ("best single T", statistics.fmean(row["folds"]["best"]["ece"] for row in own), ":"),
            ):
                axis.axhline(value, color=ORANGE if style == "--" else GREY, linestyle=style, label=name)
            axis.set(ylim=(0, None), xticks=list(x), xticklabels=[0, *LABELLED])
            axis.set_title(cell, fontsize=8)
        for axis in axes[:, 0]:
            axis.set_ylabel("ECE %")
        for axis in axes[-1]:
            axis.set_xlabel("labelled target images")
        handles, names = axes.flat[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncol=3)
        return figure


def others(rows: Sequence[Row], methods: Mapping[str, Method]) -> str:
    """The other figures, as trained -> folded."""
    names = {
        "accuracy": "accuracy",
        "ece_mass": "ECE, equal mass",
        "ece_classwise": "class-wise ECE",
        "nll": "NLL",
        "brier": "Brier",
    }
    names["ece_wrong"] = "ECE of wrong pixels"
    lines = [f"| cell | method | {' | '.join(names.values())} |", "| --- | --- |" + " --- |" * len(names)]
    for cell in cells_of(rows):
        for name, method in methods.items():
            own = list(of(rows, name, cell).values())
            if own:
                entries = []
                for key in names:
                    plain, folded = (
                        statistics.fmean(x[key] for x in each) for each in (own, [row["folds"]["taken"] for row in own])
                    )
                    entries.append(f"{plain:.2f}" if key == "accuracy" else f"{plain:.2f} -> {folded:.2f}")
                lines.append(f"| {cell} | {method.title} | {' | '.join(entries)} |")
    return "\n".join(lines)
