"""Time and memory of a piece of work, on the CPU or a GPU."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Callable

import torch


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """How long one call takes, until the device has finished it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begun = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begun


def device_name(device: torch.device) -> str:
    """For a report: the GPU's name, or the CPU's threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu, {torch.get_num_threads()} threads"


def result_name(benchmark: str, device: torch.device) -> str:
    """Of the files in results/, so that a GPU's do not replace the CPU's."""
    return benchmark if device.type == "cpu" else f"{benchmark}_{device.type}"


def peak_bytes(make_work: Callable[[], Callable[[], object]], device: torch.device, *, calls: int = 3) -> int:
    """The peak memory of this process while it builds the work and calls it; take a fresh process for each figure."""
    if device.type != "cuda":
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the highest so far is the present
    held = 0 if device.type == "cuda" else _resident_bytes("VmRSS")
    work = make_work()
    for _ in range(calls):
        work()
    return (torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _resident_bytes("VmHWM")) - held


def peak_in_fresh_process(*arguments: str) -> int:
    """What a script prints of its own `peak_bytes`.

    glibc keeps freed blocks for later, so that resident memory grows beyond what is in use (here by a third); the threshold
    sends every large block back at once, which makes figures comparable with those of a GPU.
    """
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    return int(subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.PIPE, env=environment).stdout)


def _resident_bytes(field: str) -> int:
    """Of this process, from Linux: "VmRSS" now, "VmHWM" at its highest. (getrusage's maximum starts at the parent's.)"""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"peak_bytes: expected {field} in /proc/self/status, got none; run on Linux or with --device cuda")
