"""Settings with which a run of a host cannot do what they ask for: said at its first iteration, and not after its last."""

from typing import List, NamedTuple, Optional

from .options import HostOptions


class Run(NamedTuple):
    """What is known of a host's run at its first iteration."""

    iterations: Optional[int]
    """How many there will be, those before a resumed one among them; None: the host does not say."""
    ignored_rows: int
    """At the top and at the bottom together, whose pseudo-labels do not count."""
    height: int
    """Of the target images, in rows."""


def learning_iterations(options: HostOptions, iterations: int) -> int:
    """At how many iterations of a run the temperatures may learn.

    Example:
        >>> learning_iterations(HostOptions(), 40_000), learning_iterations(HostOptions(), 3000)
        (9250, 0)
    """
    return -(-max(0, iterations - options.warmup) // options.every) if options.every else 0


def doubts(options: HostOptions, run: Run) -> List[str]:
    """What in `uda.dacal` and in the host's settings cannot work together, each with its remedy.

    Example:
        >>> run = Run(iterations=40_000, ignored_rows=135, height=512)
        >>> doubts(HostOptions(), run), doubts(HostOptions(), run._replace(ignored_rows=512))[0][:36]
        ([], 'no pseudo-label ever has a weight: p')
    """
    found = []
    if run.ignored_rows >= run.height:
        rows = f"pseudo_weight_ignore_top and _bottom leave out {run.ignored_rows} rows of crops of {run.height}"
        found.append(f"no pseudo-label ever has a weight: {rows}; lower them, as the crops are")
    if options.every:
        found += _of_learning(options, run)
    return found


def _of_learning(options: HostOptions, run: Run) -> List[str]:
    found = []
    if run.iterations is not None and not learning_iterations(options, run.iterations):
        warmup = f"warmup_iters={options.warmup}" + (", the default" if options.warmup_iters is None else "")
        remedy = f"say warmup_iters={run.iterations // 10}, or every=0 if T is to stay {options.initial_temperature:g}"
        found.append(f"temperatures never learn: {warmup}, and the run has {run.iterations} iterations; {remedy}")
    if options.learning_rate == 0:
        found.append("temperatures never learn: meta_lr=0; leave it out, or say every=0")
    if options.labels == "hard":
        remedy = "say labels='soft', or every=0 to save the time"
        found.append(f"temperatures learn, and nothing is taught them: labels='hard'; {remedy}")
    if options.learner != "bilevel":
        unused = [f"{name}=" for name in ("engine", "clip_norm") if getattr(options, name) != getattr(HostOptions(), name)]
        if unused:
            found.append(f"{' and '.join(unused)} of no effect: they are the meta-step's; leave out, or say learner='bilevel'")
    return found
