"""The command itself: evaluate, write the report, say how it went."""

import sys
from typing import Any, Callable, Dict, List, Sequence, TextIO, TypeVar

import torch

from .compare import judge_networks, plan_networks
from .files import BadFile, shown
from .options import EvaluateOptions
from .pictures import make_pictures
from .report import Found, draw, headline, make_report
from .worst import find_photographs, look_at_worst
from .worst_picture import draw_worst
from .written import write

_Result = TypeVar("_Result")
BAD, WRONG_USE, SKIPPED, INTERRUPTED = 1, 2, 3, 130
"""Exit codes: a bad file stopped it; wrong arguments; finished, with files skipped (--keep-going); Ctrl-C."""


def evaluate(options: EvaluateOptions, *, command: Sequence[str] = ()) -> int:
    """Run the command; returns its exit code. `command`: its words, for the report."""
    threads = torch.get_num_threads()
    try:
        try:
            networks = plan_networks(options)
        except ValueError as error:  # of the arguments; a later one is nobody's fault but this package's
            return _complain(error, WRONG_USE)
        photographs = find_photographs(options, networks[0])
        _writing(options, lambda: options.out.mkdir(parents=True, exist_ok=True))
        found = [draw(network, results) for network, results in zip(networks, judge_networks(networks))]
        seen, missing = look_at_worst(found[0].network, found[0].results, options, photographs)
        report = make_report(found, options, command)
        report["remarks"] += missing
        light = {**make_pictures(found, options), **draw_worst(seen, found[0])}
        dark = make_pictures(found, options, dark=True)
        written = _writing(options, lambda: write(options.out, report, light, dark))
    except BadFile as error:
        return _complain(error, BAD)
    except KeyboardInterrupt:
        return _complain("interrupted", INTERRUPTED)
    finally:
        torch.set_num_threads(threads)
    return _tell(found, report, options, written)


def _tell(found: List[Found], report: Dict[str, Any], options: EvaluateOptions, written: List[str]) -> int:
    results = found[0].results
    for remark in report["remarks"]:
        _complain(f"warning: {remark}", 0)
    for bad in results.skipped:
        _complain(f"skipped {bad}", SKIPPED)
    for one in found:
        named = f"{one.network.name}: " if len(found) > 1 else ""
        _say(f"{named}{headline(one.results.stats)}", sys.stdout)
    _say(f"Written to {options.out}: {', '.join(written)}", sys.stdout)
    if not results.stats.pixels:
        return _complain("no valid pixel in any image", BAD)
    if results.skipped:
        return _complain(f"{len(results.skipped)} skipped, {len(results.images)} evaluated", SKIPPED)
    return 0


def _writing(options: EvaluateOptions, write: Callable[[], _Result]) -> _Result:
    try:
        return write()
    except OSError as error:
        raise BadFile(options.out, f"cannot be written to: {error.strerror}") from error


def _complain(what: object, code: int) -> int:
    _say(f"dacal evaluate: {what}", sys.stderr)
    return code


def _say(text: str, file: TextIO) -> None:
    """Print what the terminal can show, and spell out the rest."""
    encoding = file.encoding or "utf-8"
    print(shown(text).encode(encoding, "backslashreplace").decode(encoding), file=file)
