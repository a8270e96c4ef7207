"""`dacal demo` over several seeds: mean and standard deviation of its table.

    python benchmarks/demo_seeds.py                       # both data sets, 3 seeds: about 25 minutes on two cores
    python benchmarks/demo_seeds.py --seeds 0 --iters 20  # does it run?

Two runs at a time, one thread each, as processes of the command itself. Writes `benchmarks/results/demo_seeds.json` with every
run, and prints the table that the README shows.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Dict, List, Tuple

FIGURES = ("miou", "accuracy", "confidence", "ece", "nll")


def one_run(job: Tuple[str, int, int, Path]) -> Dict[str, Any]:
    dataset, seed, iterations, folder = job
    out = folder / f"{dataset}-{seed}"
    command = [sys.executable, "-m", "dacal_addon", "demo", "--dataset", dataset, "--seed", str(seed), "--out", str(out)]
    command += ["--iters", str(iterations)] if iterations else []
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    report: Dict[str, Any] = json.loads((out / "results.json").read_text())
    return report


def table(reports: List[Dict[str, Any]]) -> str:
    """Markdown: a row per data set and method, mean ± standard deviation over the seeds; percentages, NLL in nats."""
    lines = [
        "| data set | labels on target | mIoU % | accuracy % | confidence % | ECE % | NLL |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    rows: Dict[Tuple[str, str], List[Dict[str, float]]] = {}
    for report in reports:
        for row in report["rows"]:
            rows.setdefault((report["dataset"], row["method"]), []).append(row)
    for (dataset, method), runs in rows.items():
        cells = []
        for figure in FIGURES:
            scale = 1 if figure == "nll" else 100
            values = [scale * run[figure] for run in runs]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(
                f"{statistics.mean(values):.2f} ± {spread:.2f}"
                if scale == 1
                else f"{statistics.mean(values):.1f} ± {spread:.1f}"
            )
        lines.append(f"| {dataset} | {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--datasets", nargs="+", default=["streets", "digits"])
    parser.add_argument("--iters", type=int, default=0, help="of each self-training run; 0 for the demo's own")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.jobs) as pool:
        jobs = [(dataset, seed, options.iters, Path(folder)) for seed in options.seeds for dataset in options.datasets]
        reports = list(pool.map(one_run, jobs))
    reports.sort(key=lambda report: (options.datasets.index(report["dataset"]), report["seed"]))
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "demo_seeds.json").write_text(json.dumps(reports, indent=1) + "\n")
    print(table(reports))


if __name__ == "__main__":
    main()
