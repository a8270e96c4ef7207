"""What a training step costs beside another busy process, by how torch's threads wait for each other.

    python benchmarks/neighbour.py            # a minute on two cores

A thread that waits by spinning holds a core that the neighbour, or the thread it waits for, could use. `dacal demo` and `dacal
calibrate` wait passively (OMP_WAIT_POLICY=PASSIVE), unless the variable says something else. Prints the time of a step as a
multiple of one with torch's own setting and no neighbour.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Dict

import torch

WAYS = {
    "torch's own": {},
    "passive waiting": {"OMP_WAIT_POLICY": "PASSIVE"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
STEPS = 20


def step_seconds() -> float:
    """Median seconds of a training step of the demo's network, in this process."""
    from dacal_addon.demo.network import SmallUNet

    torch.manual_seed(0)
    net = SmallUNet(7, width=4)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    image, label = torch.rand(2, 3, 48, 64), torch.randint(0, 7, (2, 48, 64))
    times = []
    for _ in range(STEPS + 3):
        begun = time.perf_counter()
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(image), label).backward()
        optimizer.step()
        times.append(time.perf_counter() - begun)
    return statistics.median(times[3:])


def be_a_neighbour() -> None:
    """Multiply matrices with as many threads as there are cores, which spin between the operations, until killed."""
    product = torch.rand(300, 300)
    while True:
        product = (product @ product).tanh()


def in_process(what: str, variables: Dict[str, str]) -> "subprocess.Popen[str]":
    environment = {**os.environ, "OMP_NUM_THREADS": str(os.cpu_count()), **variables}
    return subprocess.Popen([sys.executable, __file__, "--as", what], env=environment, stdout=subprocess.PIPE, text=True)


def measured(variables: Dict[str, str]) -> float:
    output, _ = in_process("trainer", variables).communicate()
    return float(output)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=3, help="medians of so many processes each")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--as", dest="role", choices=("trainer", "neighbour"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.role == "trainer":
        print(step_seconds())
        return
    if options.role == "neighbour":
        be_a_neighbour()
    seconds: Dict[str, Dict[str, float]] = {way: {} for way in WAYS}
    for beside in (False, True):
        neighbour = in_process("neighbour", {}) if beside else None
        try:
            for way, variables in WAYS.items():
                several = [measured(variables) for _ in range(options.runs)]
                seconds[way]["beside" if beside else "alone"] = statistics.median(several)
        finally:
            if neighbour is not None:
                neighbour.kill()
                neighbour.communicate()
    unit = seconds["torch's own"]["alone"]
    print(f"{'threads wait':<20}{'alone':>8}{'beside a neighbour':>20}")
    for way, both in seconds.items():
        print(f"{way:<20}{both['alone'] / unit:8.2f}{both['beside'] / unit:20.2f}")
    report = {"cores": os.cpu_count(), "torch": torch.__version__, "seconds": seconds}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "neighbour.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
