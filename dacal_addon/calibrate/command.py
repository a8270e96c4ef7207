"""What `dacal calibrate` does: estimate one temperature for a saved network, and write its weights with that folded in."""

import json
import pickle
import runpy
import sys
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Callable, Dict, Iterator, List, Mapping, NamedTuple, Optional

import torch
from torch import Tensor, nn

from .._check import describe, problem
from ..ignoring import IgnoreIndex
from .classifiers import classifiers
from .estimate import estimate_temperature
from .estimators import TYPICAL
from .fold import fold_checkpoint, fold_temperature
from .pictures import unlabelled
from .report import as_numbers, as_text

PARTS = ("network", "source", "target")
"""Functions without arguments that a set-up file must have."""
_OPTIONAL = ("labelled_target", "logits_of")  # functions that it may have
_PACKAGE = Path(__file__).resolve().parent.parent


class CalibrateOptions(NamedTuple):
    """The options of `dacal calibrate`; its help says what they mean."""

    checkpoint: Path
    setup: Path
    out: Optional[Path] = None
    key: Optional[str] = None
    prefix: str = ""
    temperature: Optional[float] = None
    max_images: int = 64
    batch_size: int = 4
    seed: int = 0
    device: str = "cpu"


class Setup(NamedTuple):
    """What a set-up file defines."""

    network: Callable[[], nn.Module]
    """Builds the network; its weights come from the checkpoint."""
    source: Callable[[], Any]
    """Held-out source images and labels, as `estimate_temperature` takes them; likewise the next two."""
    target: Callable[[], Any]
    """Called once more for an image to try the fold on."""
    labelled_target: Optional[Callable[[], Any]] = None
    logits_of: Optional[Callable[[Any], Tensor]] = None
    layer: Optional[str] = None
    """The name of the last layer, where it is not found."""
    typical: float = TYPICAL
    """See `estimate_temperature`."""
    ignore_index: Optional[IgnoreIndex] = None
    """Likewise."""
    value_range: Any = None


def calibrate(options: CalibrateOptions) -> int:
    """Run the command; returns the exit code: 1 where something does not fit, which is named.

    Errors that the code of the set-up file raises are its author's, and keep their traceback.
    """
    try:
        for what, path in (("CHECKPOINT", options.checkpoint), ("SETUP", options.setup)):
            _check_file(what, path)
        _check_out(options)
        with _importable(options.setup.resolve().parent):
            _calibrate(options, read_setup(options.setup))
    except (ValueError, TypeError) as error:
        if not _is_own(error.__traceback__):
            raise
        text = str(error)
        print(f"dacal {text}" if text.startswith("calibrate: ") else f"dacal calibrate: {text}", file=sys.stderr)
        return 1
    return 0


def read_setup(path: Path) -> Setup:
    """Run a set-up file, which is Python, and take what it defines.

    Raises:
        ValueError: a part is missing, or no function.
    """
    found = runpy.run_path(str(path))
    names = [*PARTS, *(name for name in _OPTIONAL if found.get(name) is not None)]
    wrong = [name for name in names if not callable(found.get(name))]
    if wrong:
        remedy = "see `dacal calibrate --help` for an example"
        expected = f"{path} to define {', '.join(f'{name}()' for name in names)}"
        raise problem("calibrate", expected=expected, got=f"no function {', '.join(wrong)}", remedy=remedy)
    return Setup(**{name: found[name] for name in Setup._fields if name in found})


def _calibrate(options: CalibrateOptions, setup: Setup) -> None:
    out, device = options.out, _device(options.device)
    checkpoint = _read(options.checkpoint)
    weights = _weights_of(checkpoint, options.key)
    network: Any = setup.network()
    if not isinstance(network, nn.Module):
        remedy = "return the network itself, a torch.nn.Module"
        raise problem("calibrate", expected="network() to return a network", got=describe(network), remedy=remedy)
    _load(network, weights, options.prefix)
    network.to(device).eval()
    layers: List[str] = []
    if out is not None:
        # What cannot be folded, or is folded already, is an error before the work and not after it.
        layers = list(classifiers(network, layer=setup.layer))
        planned = 1.0 if options.temperature is None else options.temperature
        fold_checkpoint(weights, planned, layers=layers, prefix=options.prefix)
        image = _one_image(setup).to(device)
        fold_temperature(network, 2.0, layer=setup.layer, check_on=image, logits_of=setup.logits_of)
        _load(network, weights, options.prefix)
    t: float
    done: Dict[str, Any]
    if options.temperature is None:
        found = estimate_temperature(
            network,
            source=setup.source(),
            target=setup.target(),
            labelled_target=None if setup.labelled_target is None else setup.labelled_target(),
            logits_of=setup.logits_of,
            layer=setup.layer,
            typical=setup.typical,
            generator=torch.Generator().manual_seed(options.seed),
            max_images=options.max_images,
            batch_size=options.batch_size,
            ignore_index=setup.ignore_index,
            value_range=setup.value_range,
            device=device,
        )
        print(as_text(found))
        t, done = found.temperature, as_numbers(found)
    else:
        t, done = options.temperature, {"taken": "given", "reason": "--temperature"}
    if out is None:
        return
    folded = fold_checkpoint(weights, t, layers=layers, prefix=options.prefix)
    beside = out.with_name(out.name + ".json")
    report = json.dumps({"temperature": t, "layers": layers, **done}, indent=2, allow_nan=False)
    try:
        with out.open("wb") as file:
            torch.save(folded if options.key is None else {**checkpoint, options.key: folded}, file)
        beside.write_text(report + "\n", encoding="utf-8")
    except OSError as error:
        raise _unwritable(out, error) from error
    print(f"{out}: " + (f"T = {t:.4g} in {', '.join(layers)}" if t != 1 else "T = 1, all weights are as they were"))
    print(f"{beside}: " + ("every estimate" if options.temperature is None else "a note of it"))


def _check_out(options: CalibrateOptions) -> None:
    """Whether the new checkpoint can be written, before anything is computed."""
    out = options.out
    if out is None:
        if options.temperature is not None:
            remedy = "say with --out where to write, or leave --temperature out to estimate it"
            raise problem("calibrate", expected="--out beside --temperature", got="none", remedy=remedy)
        return
    if out.exists() and options.checkpoint.exists() and out.samefile(options.checkpoint):
        remedy = "name a new file, and keep the original to train on"
        raise problem("calibrate", expected="--out to be another file than the checkpoint", got=out, remedy=remedy)
    if out.is_dir():
        remedy = f"name a file in it, for example {out / 'calibrated.pth'}"
        raise problem("calibrate", expected="--out to be a file", got=f"{out}, a folder", remedy=remedy)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(out, error) from error


def _unwritable(out: Path, error: OSError) -> Exception:
    remedy = "name another file"
    return problem("calibrate", expected=f"--out {out} to be writable", got=error.strerror or error, remedy=remedy)


def _check_file(what: str, path: Path) -> None:
    if not path.is_file():
        got = f"{path}, " + ("a folder" if path.is_dir() else "which does not exist")
        raise problem("calibrate", expected=f"{what} to be a file", got=got, remedy="check the path")


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA raises the latter
        remedy = "leave it out for the CPU"
        raise problem("calibrate", expected="--device to be here", got=f"{name!r}", remedy=remedy) from error
    return device


def _read(path: Path) -> Mapping[str, Any]:
    try:
        checkpoint = torch.load(str(path), map_location="cpu")
    except Exception as error:  # of many kinds: torch's, pickle's, those of a module that is not here
        got, remedy = f"{path}, of which it says {type(error).__name__}", "check that it is a checkpoint, and whole"
        if isinstance(error, pickle.UnpicklingError) and "eights only" in str(error):  # torch >= 2.6
            got = f"{path}, with Python objects among them"
            remedy = "save the state dict alone; or, if you trust it, torch.serialization.add_safe_globals([...]) in SETUP"
        raise problem("calibrate", expected="tensors and plain values that torch.load reads", got=got, remedy=remedy) from error
    if not isinstance(checkpoint, Mapping):
        remedy = "save network.state_dict()"
        raise problem("calibrate", expected="a checkpoint that is a dictionary", got=describe(checkpoint), remedy=remedy)
    return checkpoint


def _weights_of(checkpoint: Mapping[str, Any], key: Optional[str]) -> Mapping[str, Any]:
    """What is folded: the whole checkpoint, or what is under a key. Either may hold its state dict under "state_dict"."""
    if key is None:
        return checkpoint
    if not isinstance(checkpoint.get(key), Mapping):
        others = _dictionaries(checkpoint)
        remedy = "pass one of these" if others else "leave it out: the file is a state dict itself"
        got = f"dictionaries {', '.join(map(repr, others)) or 'of no name'}"
        raise problem("calibrate", expected=f"--key {key} to name a state dict", got=got, remedy=remedy)
    inner: Mapping[str, Any] = checkpoint[key]
    return inner


def _load(network: nn.Module, weights: Mapping[str, Any], prefix: str) -> None:
    """Give the network its weights: those whose names begin with the prefix.

    Raises:
        ValueError: they are not its weights; names a prefix or a key that could be meant.
    """
    inner = weights.get("state_dict")
    state: Any = inner if isinstance(inner, Mapping) else weights
    own = {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)} if prefix else state
    try:
        network.load_state_dict(own)
    except RuntimeError as error:
        wanted = {name: tuple(value.shape) for name, value in network.state_dict().items()}
        # What is no tensor has no shape, and no place among weights.
        given = {name: tuple(getattr(value, "shape", ("no tensor",))) for name, value in own.items()}
        name = next((name for name in {**wanted, **given} if wanted.get(name) != given.get(name)), None)
        if name is None:
            raise
        raise problem(
            "calibrate",
            expected=f"the weights of network(), with {name} of shape {wanted.get(name, 'none')}",
            got=f"{prefix}{name} of shape {given[name]}" if name in given else f"no {prefix}{name}",
            remedy=_remedy(name, state),
        ) from error


def _remedy(name: str, state: Mapping[str, Any]) -> str:
    found = sorted({str(other)[: -len(name)] for other in state if str(other).endswith(f".{name}")})
    if found:
        return f"say what the names in the checkpoint begin with: --prefix {' or '.join(found)}"
    inside = _dictionaries(state)
    if inside:
        return f"say where the state dict is: --key {' or '.join(inside)}"
    return "build the network whose weights were saved, or leave --prefix out"


def _dictionaries(checkpoint: Mapping[str, Any]) -> List[str]:
    return [str(name) for name, value in checkpoint.items() if isinstance(value, Mapping)][:6]


def _one_image(setup: Setup) -> Tensor:
    """(1, K, H, W), to see that the logits of the folded network are those before, divided by T."""
    draw = torch.Generator().manual_seed(0)
    return unlabelled("calibrate", "target()", setup.target(), limit=1, generator=draw).image[0].unsqueeze(0)


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Inside, Python finds modules in this folder, as it does for a script that lies there."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        if str(folder) in sys.path:
            sys.path.remove(str(folder))


def _is_own(trace: Optional[TracebackType]) -> bool:
    """Whether this package has raised an error itself."""
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and _PACKAGE in Path(trace.tb_frame.f_code.co_filename).resolve().parents
