"""The command `dacal`, also `python -m dacal_addon`."""

import argparse
import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional

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
        help="train three methods on an embedded benchmark and compare their calibration (about 3 minutes on 2 cores)",
        description="Train source-only, hard-label and DA-Cal self-training with one seed and one budget, and fold one "
        "temperature into the student of hard labels; print a table, and write it as JSON with reliability diagrams and a "
        "picture of confidence beside correctness.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument("--dataset", choices=("streets", "digits", "mitochondria"), default="streets", help="the benchmark")
    demo.add_argument("--seed", type=_at_least(0), default=0, help="of the data, the networks and the training")
    demo.add_argument("--iters", type=_at_least(1), help="iterations of each self-training run; default: the benchmark's own")
    demo.add_argument("--out", type=Path, default=Path("demo-out"), help="folder for the table and the pictures")
    demo.add_argument("--device", default="cpu", help="a torch device, for example cuda")
    _add_evaluate(commands)
    _add_calibrate(commands)
    return parser


CALIBRATE = """\
Estimate the temperature at which a trained network is calibrated on the
target, without target labels or with a few, and write a checkpoint of the same
keys and shapes whose logits are divided by it. No prediction changes.
"""
SETUP_EXAMPLE = """\
SETUP says where network and images are. It may import what lies beside it:

    from mine import build, held_out_loader, target_loader

    def network():  # its weights come from the checkpoint
        return build(num_classes=19)

    def source():  # (image, label) batches, held out, scaled as in training
        return held_out_loader()

    def target():  # images, or batches that begin with them; no labels needed
        return target_loader()

Tensors will do for loaders. Where they are needed, it says too:

    def labelled_target():  # a few labelled target images, as source()
        return image, label

    logits_of = lambda output: output["out"]  # where the logits are
    layer = "head.classifier"  # which layer makes them, where it is not found
    typical = 1.0  # of networks that were not taught hard pseudo-labels
    ignore_index = 255  # the label of pixels that do not count
    value_range = (0.0, 1.0)  # of the images, where they are not normalised

Exit codes: 0 done; 1 something does not fit, which is named; 2 wrong
arguments; 130 Ctrl-C.
"""


def _add_calibrate(commands: Any) -> None:
    calibrate = commands.add_parser(
        "calibrate",
        help="find one temperature for a trained network, and write its weights with that folded into the last layer",
        description=CALIBRATE,
        epilog=SETUP_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    calibrate.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="a state dict, or a dictionary that has one")
    calibrate.add_argument("setup", type=Path, metavar="SETUP", help="a Python file, as below")
    calibrate.add_argument(
        "--out", type=Path, help="the new checkpoint; a report goes to OUT.json. Without it the estimates are only printed"
    )
    calibrate.add_argument("--key", help="where the state dict is in the checkpoint, if not under state_dict")
    calibrate.add_argument("--prefix", default="", help="what the names in the state dict begin with, for example model.")
    calibrate.add_argument("--temperature", type=float, metavar="T", help="fold this one; nothing is estimated")
    calibrate.add_argument(
        "--max-images", type=_at_least(2), default=64, metavar="N", help="of source and target each (%(default)s)"
    )
    calibrate.add_argument("--batch-size", type=_at_least(1), default=4, metavar="N", help="images at a time (%(default)s)")
    calibrate.add_argument("--seed", type=_at_least(0), default=0, help="of everything that is drawn (%(default)s)")
    calibrate.add_argument("--device", default="cpu", help="a torch device, for example cuda (%(default)s)")


def _add_evaluate(commands: Any) -> None:
    evaluate = commands.add_parser(
        "evaluate",
        help="measure the calibration of saved predictions: a report with diagrams, per class and per image",
        description="Compare saved predictions with label images and write report.html, .md, .json, .csv and pictures. "
        "Predictions are arrays (C, H, W), .npy, .npz or .pt, or pairs NAME_confidence.png (8 or 16 bits, the largest value "
        "is 1) and NAME_prediction.png (classes). A prediction belongs to the label of the same name; endings such as "
        "_leftImg8bit, _gtFine_labelTrainIds, _rgb_anon or _train_id do not count, and folders count where names alone do not "
        "tell files apart.",
        epilog="Exit codes: 0 done; 1 a file is bad, which is named; 2 wrong arguments; 3 done, with files skipped "
        "(--keep-going); 130 Ctrl-C.",
    )
    evaluate.add_argument("predictions", type=Path, metavar="PREDICTIONS", help="a folder, or a text file that lists files")
    evaluate.add_argument(
        "labels", type=Path, metavar="LABELS", help="a folder of PNG, TIFF or .npy of training ids, for example labelTrainIds"
    )
    evaluate.add_argument("--num-classes", type=_at_least(2), required=True, help="C")
    _add_predictions(evaluate)
    _add_labels(evaluate)
    _add_files(evaluate)
    _add_comparison(evaluate)
    evaluate.add_argument("--n-bins", type=_at_least(1), default=15, help="of the diagram and the ECE (%(default)s)")
    evaluate.add_argument("--classwise", action="store_true", help="class-wise calibration too (four to eight times slower)")
    evaluate.add_argument(
        "--boundary", type=_at_least(1), default=0, metavar="WIDTH", help="report pixels this near a boundary too"
    )
    evaluate.add_argument("--out", type=Path, default=Path("evaluate-out"), help="folder of the report (%(default)s)")
    evaluate.add_argument("--keep-going", action="store_true", help="skip bad files, and say which and why")
    evaluate.add_argument(
        "--trust",
        action="store_true",
        help="go on where labels look shifted, or like masks of 0 and 255, or logits like probabilities",
    )
    evaluate.add_argument("--jobs", type=_at_least(1), default=0, help="images at a time; default: as many as cores")


def _add_comparison(evaluate: Any) -> None:
    what = evaluate.add_argument_group("comparison and pictures")
    what.add_argument(
        "--compare",
        nargs="+",
        action="extend",
        metavar="[NAME=]FOLDER",
        help="further predictions of the same images: differences to PREDICTIONS with intervals over the same images",
    )
    what.add_argument("--name", help="of PREDICTIONS, in figures and tables; default: the folder's")
    what.add_argument("--images", type=Path, metavar="FOLDER", help="photographs, for the pictures of the worst images")
    what.add_argument(
        "--worst", type=_at_least(0), default=5, metavar="N", help="pictures of the N images with the largest ECE (%(default)s)"
    )


def _add_predictions(evaluate: Any) -> None:
    what = evaluate.add_argument_group("what predictions are")
    what.add_argument(
        "--input",
        choices=("logits", "probs", "log_probs"),
        help="what arrays hold; nothing is guessed. uint8 and uint16 are probs times 255 and 65535",
    )
    what.add_argument("--key", help="the array of an .npz, or of a dictionary in a .pt, that has several")
    what.add_argument("--one-channel", action="store_true", help="one sigmoid channel for two classes, (H, W) or (1, H, W)")
    what.add_argument("--channels-last", action="store_true", help="arrays are (H, W, C)")
    what.add_argument(
        "--upsample", choices=("bilinear",), help="interpolate arrays of a lower resolution to that of their labels"
    )
    what.add_argument("--normalize", action="store_true", help="divide probabilities by their sum, which half precision moves")


def _add_labels(evaluate: Any) -> None:
    what = evaluate.add_argument_group("what labels are")
    what.add_argument(
        "--label-map",
        metavar="NAME_OR_FILE",
        help="raw label values and training ids: cityscapes, acdc, mapillary (v1.2), ade20k, voc, binary (0 and 255), or JSON, "
        'such as {"7": 0}',
    )
    what.add_argument(
        "--palette",
        metavar="NAME_OR_FILE",
        help='labels are colours: cityscapes, acdc, voc, binary, or JSON, {"#804080": 0} or [[128, 64, 128], ...]',
    )
    what.add_argument("--reduce-zero-label", action="store_true", help="0 is unlabelled and classes begin with 1")
    what.add_argument(
        "--ignore-index",
        type=int,
        action="append",
        metavar="LABEL",
        help="the label of pixels that do not count, which may be a class (255): as it is in the files, also with "
        "--reduce-zero-label; with --label-map or --palette a training id. Repeat it for several",
    )
    what.add_argument("--class-names", metavar="NAME_OR_FILE", help="a text file, one name a line; or the name of a label map")


def _add_files(evaluate: Any) -> None:
    which = evaluate.add_argument_group("which files")
    which.add_argument(
        "--prediction-suffix", action="append", metavar="END", help="take predictions NAME + END alone; repeat it for several"
    )
    which.add_argument(
        "--label-suffix", action="append", metavar="END", help="take labels NAME + END alone, such as _train_id; repeatable"
    )
    which.add_argument("--only-labels-of-predictions", action="store_true", help="leave out labels without a prediction")
    which.add_argument("--follow-links", action="store_true", help="look into linked folders that lie inside of the folder")
    which.add_argument("--max-pixels", type=_at_least(1), metavar="N", help="of an image, at most; default: 89 million")


# Commands whose operations take several threads each; `evaluate` has a thread an image.
_THREADED = ("demo", "calibrate")


def main(arguments: Optional[List[str]] = None) -> int:
    """Entry point; returns the exit code: 1 without extra, device, file or folder, 2 for a wrong argument, 130 after Ctrl-C."""
    words = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args(words)
    command = options.command
    if arguments is None and command in _THREADED and os.name == "posix" and "OMP_WAIT_POLICY" not in os.environ:
        # Read when torch is loaded, which has happened: begin again. Threads that wait by spinning made a training step take 4
        # times as long beside another process that does, and 2 when they sleep (benchmarks/neighbour.py).
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, "-m", "dacal_addon", *words])
    needed = {
        "evaluate": ["matplotlib", "PIL", "jinja2"],
        "demo": ["matplotlib", *(["PIL", "sklearn"] * (getattr(options, "dataset", "") == "digits"))],
        "calibrate": [],
    }[command]
    try:
        # Asked for now and not after five minutes of training.
        for name in needed:
            import_module(name)
        if command == "calibrate":
            return _calibrate(options)
        return _evaluate(options, words) if command == "evaluate" else _demo(options)
    except ImportError as error:
        if error.name not in needed:
            raise
        print(f"dacal {command}: {error.name} is not installed; pip install 'dacal-addon[{command}]'", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"dacal {command}: interrupted", file=sys.stderr)
        return 130


def _evaluate(options: argparse.Namespace, words: List[str]) -> int:
    from .evaluate.command import evaluate
    from .evaluate.options import EvaluateOptions

    given: Dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in vars(options).items()
        if name != "command" and value is not None
    }
    return evaluate(EvaluateOptions(**given), command=["dacal", *words])


def _calibrate(options: argparse.Namespace) -> int:
    from .calibrate.command import CalibrateOptions, calibrate

    return calibrate(CalibrateOptions(**{name: value for name, value in vars(options).items() if name != "command"}))


def _demo(options: argparse.Namespace) -> int:
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
