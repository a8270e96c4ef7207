"""What each method gives in each cell: one data set at one length of training, with every fold of a temperature behind it.

    python benchmarks/cells.py                          # the embedded data sets at 600 and 2400 iterations
    python benchmarks/cells.py --data FOLDER            # and the real pictures in FOLDER/*.npz, where there are some
    python benchmarks/cells.py --methods hard soft --cells streets-600 --seeds 0
    python benchmarks/cells.py --quick --out /tmp/cells  # a few iterations, only to see that it runs

Every method trains on seven eighths of the source; an eighth, drawn at random, is held out for shadows and estimators. Writes
cells.json, one run a line as soon as it is finished (the same command goes on after an interruption), and cells.md. Trained
students are kept in --cache: `--again` computes the folds of those that are there anew. Figures are of the target's test
images, percent.
"""

import argparse
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional

import real_pictures
import torch
from cell_folds import row_of
from cell_methods import METHODS
from cells_report import write_report
from networks import ImageNetSegmenter

from dacal_addon.demo.datasets import NAMES, Dataset, hold_out_source, load_dataset
from dacal_addon.demo.network import SmallUNet
from dacal_addon.demo.recipes import RECIPES, Recipe
from dacal_addon.demo.training import Start, train, train_start

CPU = torch.device("cpu")
LENGTHS = (600, 2400)
QUICK_ITERATIONS = 4


class Cell(NamedTuple):
    """A data set at one length of training, with one seed."""

    dataset: str
    iterations: int
    seed: int
    data: Optional[str]
    """The folder of the real pictures."""
    cache: str
    quick: bool

    @property
    def name(self) -> str:
        return f"{self.dataset}-{self.iterations}"

    @property
    def embedded(self) -> bool:
        return self.dataset in NAMES

    def recipe(self) -> Recipe:
        whole = RECIPES[self.dataset] if self.embedded else real_pictures.RECIPE
        return whole if self.iterations == whole.iterations else whole.scaled(self.iterations)

    def path(self, kind: str) -> Path:
        size = "-quick" if self.quick else ""
        return Path(self.cache) / f"{kind}-{self.name}-{self.seed}{size}.pt"


class Job(NamedTuple):
    """One method in one cell."""

    cell: Cell
    method: str

    @property
    def student(self) -> Path:
        """Where it is kept."""
        return self.cell.path(f"student-{self.method}")


def data_of(cell: Cell) -> Dataset:
    """The cell's images; those of the embedded sets are made from the seed."""
    if not cell.embedded:
        assert cell.data is not None  # for mypy
        return real_pictures.load(Path(cell.data) / f"{cell.dataset}.npz")
    path = Path(cell.cache) / f"data-{cell.dataset}-{cell.seed}{'-quick' if cell.quick else ''}.pt"
    if not path.exists():  # streets take 16 s
        few = {"train_images": 16, "test_images": 4} if cell.quick else {}
        save(tuple(load_dataset(cell.dataset, seed=cell.seed, **few)), path)
    return Dataset(*torch.load(path, map_location="cpu", weights_only=False))


def network_of(cell: Cell) -> Any:
    return SmallUNet if cell.embedded else ImageNetSegmenter


def start_of(cell: Cell, dataset: Dataset, recipe: Recipe) -> Start:
    """The common start of a cell's methods, from the cache where it is there."""
    path = cell.path("start")
    if not path.exists():
        start = train_start(dataset, recipe, seed=cell.seed, device=CPU, make_network=network_of(cell))
        # A seventh less time on a CPU (measured). torch's annotations of Module.to lack the keyword.
        start.student.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        save(tuple(start), path)
    return Start(*torch.load(path, map_location="cpu", weights_only=False))


def save(value: Any, path: Path) -> None:
    unfinished = path.with_suffix(f".{os.getpid()}")
    torch.save(value, unfinished)
    unfinished.replace(path)


def run(job: Job) -> Dict[str, Any]:
    """Train the student, or take it from the cache, and score it with every fold."""
    cell = job.cell
    dataset, held_out = hold_out_source(data_of(cell))
    recipe, path = cell.recipe(), job.student
    student = network_of(cell)(len(dataset.class_names), width=recipe.width, seed=cell.seed)
    if not path.exists():
        start = start_of(cell, dataset, recipe)

        def teaching(*arguments: Any) -> Any:
            return METHODS[job.method](*arguments, held_out=held_out)

        done = train(teaching, start, dataset, recipe, seed=cell.seed, device=CPU)
        save({"student": done.student.state_dict(), "seconds": done.seconds}, path)
    kept = torch.load(path, map_location="cpu", weights_only=False)
    student.load_state_dict(kept["student"])
    method = METHODS[job.method]
    row = row_of(student.eval(), dataset, held_out, seed=cell.seed, typical=method.typical, closely=method.closely)
    return {"cell": cell.name, "seed": cell.seed, "method": job.method, "seconds": kept["seconds"], **row}


def start_worker() -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends its workers


def cells_of(options: argparse.Namespace) -> List[Cell]:
    """Short ones first, so that an interrupted grid has figures of every data set."""
    lengths = (QUICK_ITERATIONS,) if options.quick else LENGTHS
    real = real_pictures.names(options.data) if options.data else []
    if not real:
        print("real pictures: none (--data FOLDER, see benchmarks/README.md); their cells are left out")
    at = {"data": str(options.data) if real else None, "cache": str(options.cache), "quick": options.quick}
    pairs = [(name, lengths[0]) for name in NAMES]
    pairs += [(name, QUICK_ITERATIONS if options.quick else real_pictures.RECIPE.iterations) for name in real]
    pairs += [(name, length) for length in lengths[1:] for name in NAMES]
    cells = [Cell(name, length, seed, **at) for seed in options.seeds for name, length in pairs]
    return [cell for cell in cells if options.cells is None or cell.name in options.cells]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="METHOD")
    parser.add_argument("--cells", nargs="+", metavar="NAME-ITERATIONS", help="default: all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--data", type=Path, help="folder of the real pictures")
    parser.add_argument("--quick", action="store_true", help="a few iterations of one seed: only to see that it runs")
    parser.add_argument("--again", action="store_true", help="train nothing; compute the folds of all trained students anew")
    parser.add_argument("--report", action="store_true", help="train nothing; write cells.md again")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="runs at a time, one thread each")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results, with --quick a new temporary folder")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "dacal-cells")
    options = parser.parse_args()
    if options.out is None:
        options.out = Path(tempfile.mkdtemp(prefix="dacal-cells-") if options.quick else Path(__file__).parent / "results")
    if options.quick:
        options.seeds = options.seeds[:1]
    options.out.mkdir(parents=True, exist_ok=True)
    options.cache.mkdir(parents=True, exist_ok=True)
    path = options.out / "cells.json"
    rows: List[Dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    if not options.report:
        jobs = [Job(cell, method) for cell in cells_of(options) for method in options.methods]
        if options.again:
            jobs = [job for job in jobs if job.student.exists()]
        rows = finish(jobs, rows, path, again=options.again, at_once=options.jobs)
    if rows:
        write_report(rows, options.out / "cells.md", METHODS)
        print(f"written: {options.out / 'cells.md'}")


def finish(jobs: List[Job], rows: List[Dict[str, Any]], path: Path, *, again: bool, at_once: int) -> List[Dict[str, Any]]:
    """The rows with those that were missing, written after each."""

    def key(row: Dict[str, Any]) -> Any:
        return row["cell"], row["seed"], row["method"]

    done = {} if again else {key(row): row for row in rows}
    jobs = [job for job in jobs if (job.cell.name, job.cell.seed, job.method) not in done]
    held = {key(row): row for row in rows}
    os.environ["TQDM_DISABLE"] = "1"  # the bars of parallel runs would write over each other
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # or the runs in progress would outlive this process
    begun = time.time()
    # A start is trained by whoever comes first: the first job of each cell before the others of it.
    first = [job for i, job in enumerate(jobs) if job.cell not in [other.cell for other in jobs[:i]]]
    order = first + [job for job in jobs if job not in first]
    with multiprocessing.get_context("spawn").Pool(at_once, start_worker) as pool:
        for i, row in enumerate(pool.imap_unordered(run, order)):
            held[key(row)] = row
            unfinished = path.with_suffix(".unfinished")
            unfinished.write_text("[\n" + ",\n".join(json.dumps(each) for each in held.values()) + "\n]\n")
            unfinished.replace(path)
            folds = row["folds"]
            print(
                f"{time.time() - begun:6.0f} s  {i + 1:3d} of {len(order)}  {row['cell']:<24}{row['seed']:2d}  "
                f"{row['method']:<16}{row['miou']:5.1f} mIoU  ECE {row['ece']:5.2f}, folded {folds['taken']['ece']:5.2f}, "
                f"best {folds['best']['ece']:5.2f}",
                flush=True,
            )
        pool.close()
        pool.join()  # leaving the block without it would terminate workers in the middle of their own end
    return list(held.values())


if __name__ == "__main__":
    main()
