"""What DA-Cal costs inside DAFormer, HRDA and MIC: time of an iteration and peak memory, against the host alone.

    python benchmarks/hosts.py --daformer PATH --hrda PATH --mic PATH --python HOST_ENVIRONMENT/bin/python
    python benchmarks/hosts.py --daformer PATH ... --crop 256 --whole-network --iters 9 --variants default "fitted, every=4"

Runs the host's own training on a CPU with `examples/mmseg/try_on_cpu.py` (MiT-B0, or the config's MiT-B5; one thread), a fresh
process each, see `VARIANTS`. The checkouts have `configs/dacal/` from the examples' patches. Times are processor time of an
iteration, without the data loader's processes. Ratios are to the host alone, in the same session. Writes
results/hosts_torchVERSION.json, of other crops or networks hosts_mit_b5_256_torchVERSION.json and the like.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Dict, List

ROOT = Path(__file__).parent.parent
BILEVEL, FIT = "uda.dacal.learner=bilevel", "uda.dacal.learner=fit"
VARIANTS = {
    "host alone": ["uda.type=DACS"],
    "default": [BILEVEL, "uda.dacal.every=4"],
    "default, share_pass=False": [BILEVEL, "uda.dacal.every=4", "uda.dacal.share_pass=False"],
    "fitted, every=4": [FIT, "uda.dacal.every=4"],
    "every=1": [BILEVEL, "uda.dacal.every=1"],
}
WARMUP = 4  # iterations before the first that is timed
ITERATIONS = WARMUP + 20 + 1  # whole rounds of every=4; and the last, whose row has the evaluation's time in it
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def measured(checkout: Path, python: str, changes: List[str], iters: int, data: Path, size: List[str]) -> Dict[str, Any]:
    """Mean seconds of an iteration, the process's peak memory, and whether every loss was finite."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "data").symlink_to(data, target_is_directory=True)
        command = [python, str(ROOT / "examples/mmseg/try_on_cpu.py"), "configs/dacal/gta2cs.py"]
        command += ["--iters", str(iters), "--work-dir", folder, "--processor-time", *size, "--set", *changes]
        environment = {**os.environ, **ENVIRONMENT}
        with open(Path(folder) / "output", "w") as output:
            process = subprocess.Popen(command, cwd=checkout, env=environment, stdout=output, stderr=subprocess.STDOUT)
            _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise SystemExit(f"{checkout}: {' '.join(command)} failed:\n{(Path(folder) / 'output').read_text()[-2000:]}")
        lines = [json.loads(line) for line in next(Path(folder).glob("*.log.json")).read_text().splitlines()]
    rows = [line for line in lines if line.get("mode") == "train"]
    losses = [value for row in rows for name, value in row.items() if "loss_seg" in name]
    # Without what the data loader takes. A mean, since every fourth iteration may differ. The last row is the evaluation's.
    times = [row["time"] - row["data_time"] for row in rows[WARMUP:-1]]
    return {
        "seconds": statistics.mean(times),
        "peak_bytes": usage.ru_maxrss * 1024,
        "iterations": len(rows),
        "finite": all(abs(loss) < float("inf") for loss in losses),
        "last": {name: value for name, value in rows[-1].items() if name.startswith("dacal.")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for host in ("daformer", "hrda", "mic"):
        parser.add_argument(f"--{host}", type=Path)
    # Not resolved: the link in a virtual environment is what makes it one.
    parser.add_argument("--python", type=os.path.abspath, default=sys.executable, help="of the hosts' environment")
    parser.add_argument("--iters", type=int, default=ITERATIONS)
    parser.add_argument("--crop", type=int, default=128, help="side of the crops")
    parser.add_argument("--whole-network", action="store_true", help="MiT-B5")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS), help="beside the host alone")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    say = "import sys, torch; print(sys.version.split()[0], torch.__version__)"
    versions = subprocess.run(
        [options.python, "-c", say], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True, text=True
    )
    python, torch = versions.stdout.split()
    rows: List[Dict[str, Any]] = []
    data = Path(tempfile.mkdtemp())
    environment = {**os.environ, **ENVIRONMENT}
    subprocess.run([options.python, str(ROOT / "examples/mmseg/tiny_data.py"), str(data)], env=environment, check=True)
    size = ["--crop", str(options.crop), *(["--whole-network"] if options.whole_network else [])]
    print(f"Python {python}, torch {torch}, {options.iters} iterations")
    for host in ("daformer", "hrda", "mic"):
        checkout = getattr(options, host)
        if checkout is None:
            continue
        checkout = checkout / "seg" if (checkout / "seg").is_dir() else checkout
        alone: Dict[str, Any] = {}
        for name in ["host alone", *(name for name in options.variants if name != "host alone")]:
            begun = time.time()
            row = measured(checkout.resolve(), options.python, VARIANTS[name], options.iters, data, size)
            alone = alone or row
            ratios = {"time": row["seconds"] / alone["seconds"], "memory": row["peak_bytes"] / alone["peak_bytes"]}
            rows.append({"host": host, "variant": name, **row, "ratio": ratios})
            times = f"{row['seconds']:6.2f} s  x {ratios['time']:.2f}"
            memory = f"{row['peak_bytes'] / 1e6:6.0f} MB  x {ratios['memory']:.2f}"
            print(f"{host:<10}{name:<38}{times}   {memory}   finite {row['finite']}   ({time.time() - begun:.0f} s)")
    shutil.rmtree(data)
    report = {"python": python, "torch": torch, "crop": options.crop, "rows": rows}
    options.out.mkdir(parents=True, exist_ok=True)
    kind = "" if size == ["--crop", "128"] else f"{'mit_b5' if options.whole_network else 'mit_b0'}_{options.crop}_"
    (options.out / f"hosts_{kind}torch{torch.split('+')[0]}.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
