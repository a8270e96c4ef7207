"""The command itself: evaluate, write the report, say how it went."""

import json
import sys
from typing import Callable, List, Sequence, TextIO, TypeVar

import torch

from .. import plots
from .files import BadFile, shown
from .judging import Results, judge_all
from .options import EvaluateOptions
from .page import make_page
from .plan import make_plan
from .report import headline, make_pictures, make_report

_Result = TypeVar("_Result")
BAD, WRONG_USE, SKIPPED, INTERRUPTED = 1, 2, 3, 130
"""Exit codes: a bad file stopped it; wrong arguments; finished, with files skipped (--keep-going); Ctrl-C."""


def evaluate(options: EvaluateOptions, *, command: Sequence[str] = ()) -> int:
    """Run the command; returns its exit code. `command`: its words, for the report."""
    threads = torch.get_num_threads()
    try:
        plan = make_plan(options)
        _writing(options, lambda: options.out.mkdir(parents=True, exist_ok=True))
        results = judge_all(plan, options)
        written = _writing(options, lambda: _write(results, options, plan.input, command))
    except BadFile as error:
        return _complain(error, BAD)
    except ValueError as error:
        return _complain(error, WRONG_USE)
    except KeyboardInterrupt:
        return _complain("interrupted", INTERRUPTED)
    finally:
        torch.set_num_threads(threads)
    for bad in results.skipped:
        _complain(f"skipped {bad}", SKIPPED)
    _say(headline(results.stats), sys.stdout)
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


def _write(results: Results, options: EvaluateOptions, kind: str, command: Sequence[str]) -> List[str]:
    """Write report.json, report.html and the pictures; returns their names."""
    report = make_report(results, options, kind, command)
    figures = make_pictures(results, options)
    for name, figure in figures.items():
        plots.save(figure, options.out / name)
    (options.out / "report.json").write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    pictures = {name: (options.out / name).read_bytes() for name in figures}
    # A file's name may hold bytes that are no text.
    (options.out / "report.html").write_bytes(make_page(report, pictures).encode("utf-8", "backslashreplace"))
    return ["report.html", "report.json", *figures]


def _complain(what: object, code: int) -> int:
    _say(f"dacal evaluate: {what}", sys.stderr)
    return code


def _say(text: str, file: TextIO) -> None:
    """Print what the terminal can show, and spell out the rest."""
    encoding = file.encoding or "utf-8"
    print(shown(text).encode(encoding, "backslashreplace").decode(encoding), file=file)
