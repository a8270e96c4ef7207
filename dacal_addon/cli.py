"""The command `dacal`, also `python -m dacal_addon`."""

import argparse
import sys
from importlib import import_module
from pathlib import Path
from typing import Callable, List, Optional

from . import __version__


def _at_least(low: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        value = int(text)
        if value < low:
            raise argparse.ArgumentTypeError(f"expected a number >= {low}, got {value}")
        return value

    return number


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dacal", description="Calibrated self-training for semantic segmentation.")
    parser.add_argument("--version", action="version", version=f"dacal-addon {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    demo = commands.add_parser(
        "demo",
        help="train four methods on an embedded benchmark and compare their calibration (about 5 minutes on 2 cores)",
        description="Train source-only, hard-label, soft-label and DA-Cal self-training with one seed and one budget; "
        "print a table, and write it as JSON with reliability diagrams, temperature maps and predictions.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument("--dataset", choices=("streets", "digits"), default="streets", help="the benchmark")
    demo.add_argument("--seed", type=_at_least(0), default=0, help="of the data, the networks and the training")
    demo.add_argument("--iters", type=_at_least(1), help="iterations of each self-training run; default: the benchmark's own")
    demo.add_argument("--out", type=Path, default=Path("demo-out"), help="folder for the table and the pictures")
    demo.add_argument("--device", default="cpu", help="a torch device, for example cuda")
    return parser


def main(arguments: Optional[List[str]] = None) -> int:
    """Entry point; returns the exit code: 1 without extra, device or folder, 2 for a wrong argument, 130 after Ctrl-C."""
    options = _parser().parse_args(arguments)
    try:
        # Asked for now and not after five minutes of training.
        for name in ["matplotlib", *(["PIL", "sklearn"] if options.dataset == "digits" else [])]:
            import_module(name)
    except ImportError as error:
        print(f"dacal demo: {error.name} is not installed; pip install 'dacal-addon[demo]'", file=sys.stderr)
        return 1
    import torch

    from .demo.run import run

    try:
        device = torch.device(options.device)
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA raises the latter
        print(f"dacal demo: no device {options.device!r} here: {error}", file=sys.stderr)
        return 1
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"dacal demo: cannot write to {options.out}: {error}", file=sys.stderr)
        return 1
    return run(options.dataset, seed=options.seed, iterations=options.iters or 0, out=options.out, device=device)
