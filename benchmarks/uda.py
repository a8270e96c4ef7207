"""Does it calibrate? Methods x data sets x seeds on the embedded benchmarks, with everything else equal.

    python benchmarks/uda.py                 # the table: under two hours on two cores
    python benchmarks/uda.py --ablation      # the search for DA-Cal's configuration, on `streets`
    python benchmarks/uda.py --quick --out /tmp/uda   # a minute or two: does it run?
    python benchmarks/uda.py --device cuda --width 4 --iterations 4000 --batch 16 --crop 128 --out large

Every method starts from the same network and sees the same images, augmentations and masks, so that differences within a
seed are paired. Writes uda.json (a list of runs, each appended as soon as it is finished: the same command continues after
an interruption; one command at a time), uda.md and the figures; `--report` only writes the latter two again.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

import torch
from post_hoc import CALIBRATIONS, Material, blends, temperatures
from torch import Tensor
from uda_ablation import ABLATION, BASES
from uda_methods import METHODS, Method
from uda_report import write_report

from dacal_addon import demo
from dacal_addon.demo.datasets import NAMES, Dataset, load_dataset
from dacal_addon.demo.evaluation import predict, score, temperature_of
from dacal_addon.demo.recipes import RECIPES, Recipe
from dacal_addon.demo.training import Start, train, train_start
from dacal_addon.metrics import ece, reliability


class Cell(NamedTuple):
    """What the methods of one data set and seed share."""

    dataset: str
    seed: int
    recipe: Recipe
    train_images: Optional[int]
    test_images: int
    device: str
    code: str
    """A digest of what makes images and common starts."""
    cache: str


class Job(NamedTuple):
    """One training run, and the post-hoc calibrations of its student."""

    cell: Cell
    method: str
    code: str
    """A digest of everything that a run goes through."""


def method_of(name: str) -> Method:
    return METHODS[name] if name in METHODS else ABLATION[name]


def shared(cell: Cell) -> Tuple[Dataset, Start]:
    """The images and the common start, from the cache where they are there, made by the same code."""
    key = hashlib.sha1(repr((*cell[:-1], torch.__version__)).encode()).hexdigest()
    path = Path(cell.cache) / f"{cell.dataset}-{cell.seed}-{key[:12]}.pt"
    if not path.exists():
        dataset = load_dataset(cell.dataset, seed=cell.seed, train_images=cell.train_images, test_images=cell.test_images)
        start = train_start(dataset, cell.recipe, seed=cell.seed, device=torch.device(cell.device))
        unfinished = path.with_suffix(f".{os.getpid()}")
        torch.save((dataset, start), unfinished)
        unfinished.replace(path)
    dataset, start = torch.load(path, map_location="cpu", weights_only=False)
    start.student.to(cell.device, memory_format=torch.channels_last)  # an iteration takes a seventh less time on a CPU
    return dataset, start


def code_digest(*sources: Path) -> str:
    """Taken once, before anything is run: a file may be edited while the processes go on with what they have imported."""
    digest = hashlib.sha1()
    for source in sorted(sources):
        digest.update(source.read_bytes())
    return digest.hexdigest()


def prepare(cell: Cell) -> None:
    shared(cell)


def run(job: Job) -> List[Dict[str, Any]]:
    """Train, evaluate student and teacher, calibrate the student post hoc: the runs for uda.json."""
    cell, method = job.cell, method_of(job.method)
    device = torch.device(cell.device)
    dataset, start = shared(cell)
    trained = train(method.make, start, dataset, cell.recipe, seed=cell.seed, device=device)
    image, label = dataset.target_test
    rows = []

    def add(name: str, model: str, logits: Tensor, temperatures: Dict[str, Optional[float]], seconds: float) -> None:
        bins = reliability(logits, label, input="logits")
        rows.append(
            {
                "dataset": cell.dataset,
                "method": name,
                "seed": cell.seed,
                "model": model,
                **{figure: round(value, 6) for figure, value in score(logits, label)._asdict().items()},
                "confidence_auroc": confidence_auroc(logits, label),
                **temperatures,
                "seconds": round(seconds, 1),
                "code": job.code,
                "iterations": cell.recipe.iterations,
                "bins": [
                    [int(n), round(float(c), 4), round(float(a), 4)] if n else [0, 0.0, 0.0]
                    for n, c, a in zip(bins.pixels, bins.confidence, bins.accuracy)
                ],
            }
        )

    logits, of_teacher = (predict(network, image, device=device) for network in (trained.student, trained.teacher))
    learned = temperature_of(trained.teaching, trained.teacher, image, device=device)
    diagnosed = diagnose(of_teacher, learned, label)
    add(job.method, "student", logits, diagnosed, trained.seconds)
    add(job.method, "teacher", of_teacher, diagnosed, trained.seconds)
    if method.post_hoc:

        def material() -> Material:
            return Material(trained.student, dataset, torch.Generator().manual_seed(cell.seed), device)

        on_blends = score(*blends(material()))
        rows[0].update(blends_accuracy=round(on_blends.accuracy, 6), blends_confidence=round(on_blends.confidence, 6))
        for name, (_, calibration) in CALIBRATIONS.items():
            begun = time.perf_counter()
            found = calibration(material())
            seconds = time.perf_counter() - begun
            temperature = temperatures(found, logits, image, device=device)
            add(f"{job.method}+{name}", "student", logits / temperature, diagnose(logits, temperature, label), seconds)
    return rows


def diagnose(logits: Tensor, temperature: Optional[Tensor], label: Tensor) -> Dict[str, Optional[float]]:
    """What temperatures know of a network's errors, by true labels: nothing is trained on it. None without temperatures."""
    if temperature is None:
        return {"temperature_mean": None, "temperature_auroc": None, "label_auroc": None, "label_ece": None}
    wrong = logits.argmax(1) != label
    return {
        "temperature_mean": round(float(temperature.mean()), 4),
        "temperature_auroc": round(auroc(temperature[:, 0], wrong), 4),
        "label_auroc": confidence_auroc(logits / temperature, label),
        "label_ece": round(ece(logits / temperature, label, input="logits"), 6),
    }


def confidence_auroc(logits: Tensor, label: Tensor) -> float:
    """The chance that a wrong pixel is less confident than a right one."""
    return round(auroc(-torch.softmax(logits, 1).amax(1), logits.argmax(1) != label), 4)


def auroc(value: Tensor, positive: Tensor) -> float:
    """The chance that a positive pixel has a larger value than a negative one, ties counted half; 0.5 without either.

    Example:
        >>> auroc(torch.tensor([1.0, 2.0, 2.0, 3.0]), torch.tensor([False, False, True, True]))
        0.875
    """
    value, positive = value.flatten().double(), positive.flatten()
    _, inverse, count = torch.unique(value, return_inverse=True, return_counts=True)
    rank = (count.cumsum(0).double() - (count.double() - 1) / 2)[inverse]
    n = int(positive.sum())
    pairs = n * (len(value) - n)
    return float((rank[positive].sum() - n * (n + 1) / 2) / pairs) if pairs else 0.5


def start_worker(threads: int) -> None:
    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends its workers


class Results:
    """uda.json: one run a line; and what all its runs share, in uda_settings.json."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: List[Dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []

    def go_on_with(self, settings: Dict[str, Any]) -> None:
        """Refuse to mix runs of other settings with those that are there."""
        beside = self.path.with_name("uda_settings.json")
        there = json.loads(beside.read_text()) if self.rows else settings
        if there != settings:
            raise SystemExit(
                f"uda.py: expected the settings of the runs in {self.path}, {there}, got {settings}; choose another --out"
            )
        beside.write_text(json.dumps(settings, indent=2) + "\n")

    def has(self, job: Job) -> bool:
        wanted = (job.cell.dataset, job.cell.seed, job.method)
        return any((row["dataset"], row["seed"], row["method"]) == wanted for row in self.rows)

    def add(self, rows: List[Dict[str, Any]]) -> None:
        self.rows += rows
        unfinished = self.path.with_suffix(".unfinished")
        unfinished.write_text("[\n" + ",\n".join(json.dumps(row) for row in self.rows) + "\n]\n")
        unfinished.replace(self.path)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--methods", nargs="+", choices=[*METHODS, *ABLATION], metavar="METHOD", help="default: the table's")
    parser.add_argument("--datasets", nargs="+", choices=NAMES)
    parser.add_argument("--seeds", nargs="+", type=int, help="default: 0 and on, as many as a method says")
    parser.add_argument("--ablation", action="store_true", help="the search on `streets` instead of the table")
    parser.add_argument("--quick", action="store_true", help="one seed, few images and iterations: only a check that it runs")
    parser.add_argument("--iterations", type=int, help="of each run; source training is scaled with it")
    parser.add_argument("--width", type=int, default=1, help="times the network's channels")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--crop", type=int, default=64, help="width of the training crops")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, help="runs at a time; default: the cores, or 1 on a GPU")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results, with --quick a new temporary folder")
    parser.add_argument(
        "--cache", type=Path, default=Path(tempfile.gettempdir()) / "dacal-uda", help="images and common starts"
    )
    parser.add_argument(
        "--report", action="store_true", help="train nothing; write uda.md and the figures again, of the --seeds"
    )
    options = parser.parse_args()
    if options.out is None:
        options.out = Path(tempfile.mkdtemp(prefix="dacal-uda-") if options.quick else Path(__file__).parent / "results")
    options.out.mkdir(parents=True, exist_ok=True)
    results = Results(options.out / "uda.json")
    if not options.report:
        train_missing(results, options)
    rows = [row for row in results.rows if not (options.report and options.seeds) or row["seed"] in options.seeds]
    if rows:
        for path in write_report(rows, options.out, METHODS, ABLATION):
            print(f"written: {path}")


def train_missing(results: Results, options: argparse.Namespace) -> None:
    """Train what the command asks for and `results` lacks."""
    options.cache.mkdir(parents=True, exist_ok=True)
    if options.quick:
        options.iterations = options.iterations or 8
    datasets = options.datasets or (["streets"] if options.ablation else list(NAMES))
    methods = list(dict.fromkeys(options.methods or ((*BASES, *ABLATION) if options.ablation else METHODS)))
    train_images, test_images = (16, 8) if options.quick else (None, 100)
    cores = len(os.sched_getaffinity(0))
    at_once = options.jobs or (cores if options.device == "cpu" else 1)
    threads = max(1, cores // at_once)
    recipes = {
        name: recipe._replace(width=options.width, batch=options.batch, crop=options.crop) for name, recipe in RECIPES.items()
    }
    if options.iterations:
        recipes = {name: recipe.scaled(options.iterations) for name, recipe in recipes.items()}
    results.go_on_with(
        {
            "recipes": {name: recipe._asdict() for name, recipe in recipes.items()},
            "train_images": train_images,
            "test_images": test_images,
            "torch": torch.__version__,
            "device": options.device,
            "threads": threads,  # two instead of one move mIoU by about a point, by rounding alone
        }
    )
    of_starts = code_digest(*Path(demo.__path__[0]).glob("*.py"))
    names = ("uda", "uda_methods", "uda_ablation", "post_hoc", "temperature_nets")
    own = [Path(__file__).with_name(f"{name}.py") for name in names]
    code = code_digest(*own, *Path(demo.__path__[0]).parent.rglob("*.py"))[:12]
    of_other = sum(row.get("code") != code for row in results.rows)
    if of_other:
        print(f"{of_other} of the {len(results.rows)} runs that are there are of other code: see `code` there")

    def seeds_of(method: str) -> Sequence[int]:
        if options.seeds:
            return list(options.seeds)
        seeds = method_of(method).seeds
        return range(1 if options.quick else min(3, seeds) if options.ablation else seeds)

    cache = str(options.cache)
    wanted = [(seed, method) for method in methods for seed in seeds_of(method)]
    jobs = [
        Job(Cell(dataset, seed, recipes[dataset], train_images, test_images, options.device, of_starts, cache), method, code)
        for seed in sorted({seed for seed, _ in wanted})
        for dataset in datasets
        for method in methods
        if (seed, method) in wanted
    ]
    jobs = [job for job in jobs if not results.has(job)]
    cells = list(dict.fromkeys(job.cell for job in jobs))
    begun = time.time()
    os.environ["TQDM_DISABLE"] = "1"  # the bars of parallel runs would write over each other
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # or the runs in progress would outlive this process
    # Processes, started anew: forked ones would share CUDA and thread pools.
    with multiprocessing.get_context("spawn").Pool(at_once, start_worker, (threads,)) as pool:
        for i, _ in enumerate(pool.imap_unordered(prepare, cells)):
            print(f"{time.time() - begun:6.0f} s  images and common start {i + 1} of {len(cells)}", flush=True)
        prepared = time.time()
        for i, rows in enumerate(pool.imap_unordered(run, jobs)):
            results.add(rows)
            left = (time.time() - prepared) / (i + 1) * (len(jobs) - i - 1)
            row = rows[0]
            print(
                f"{time.time() - begun:6.0f} s  {i + 1:3d} of {len(jobs)}, {left / 60:3.0f} min left  {row['dataset']:<13}"
                f"{row['seed']:2d}  {row['method']:<26} student {100 * row['miou']:5.1f} mIoU {100 * row['ece']:6.2f} ECE",
                flush=True,
            )


if __name__ == "__main__":
    main()
