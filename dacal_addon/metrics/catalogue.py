"""Every metric, once: its name, what it is, and what those who show or compute it need to know.

Read by `stats` (what can be bootstrapped), the tests (a function each) and `evaluate` (the report and its page). To add a
metric, write it as a pure function of counts in `figures`, give `CalibrationStats` a method and `functional` a function with
the key's name, enter it here, and test it against its definition; interval, report and page follow. One that needs a new sum
also has a field in `totals` and in `images`, filled in `pixels`, in `fused` and in `triton_kernel`.
"""

from typing import Dict, NamedTuple


class Metric(NamedTuple):
    """What is known of a metric without its figures."""

    key: str
    """The name of the method of `CalibrationStats`, of the function of one batch, and in report.json."""
    name: str
    """As readers see it."""
    unit: str
    """"%" of a fraction, which is computed in 0..1 and shown in percent; "nats"; or "" for a number without unit."""
    definition: str
    """In a sentence, with its source."""
    distribution: bool = False
    """Needs the probability of every class, which input="top1" does not have."""
    classwise: bool = False
    """Needs the counts of every class's probability, `classwise=True`, which images do not keep: it cannot be bootstrapped, and
    the report has one figure a class."""
    interval: bool = True
    """The report has an interval of it."""


_METRICS = (
    Metric("accuracy", "Accuracy", "%", "Share of the pixels whose most probable class is the target."),
    Metric(
        "mean_confidence",
        "Mean confidence",
        "%",
        "Mean of the largest probability. Above the accuracy: overconfident.",
    ),
    Metric(
        "ece",
        "ECE",
        "%",
        "Expected calibration error: mean over bins of confidence, weighted by their pixels, of |accuracy - mean confidence| "
        "(Naeini et al., AAAI 2015; Guo et al., ICML 2017). Bins of equal width, closed on the right.",
    ),
    Metric(
        "mce",
        "MCE",
        "%",
        "Maximum calibration error: the largest gap of a bin, however few pixels it holds (Naeini et al., 2015).",
    ),
    Metric(
        "ks",
        "KS error",
        "%",
        "Kolmogorov-Smirnov calibration error: the largest gap of the cumulative confidence and accuracy, without bins "
        "(Gupta et al., ICLR 2021).",
    ),
    Metric(
        "smece",
        "Smooth ECE",
        "%",
        "Calibration error smoothed by a kernel as wide as its own value, without bins (Błasiok & Nakkiran, ICLR 2024).",
        interval=False,  # takes as long as all others
    ),
    Metric(
        "aurc",
        "AURC",
        "%",
        "Area under the risk-coverage curve: the error rate among the k most confident pixels, averaged over k. Small where "
        "confidence ranks right before wrong (Geifman & El-Yaniv, NIPS 2017).",
    ),
    Metric(
        "brier",
        "Brier score",
        "",
        "Mean over the pixels of the sum over all classes of (probability - target)², in 0 to 2 (Brier, 1950).",
        distribution=True,
    ),
    Metric("nll", "NLL", "nats", "Mean negative log-likelihood of the target.", distribution=True),
    Metric(
        "miou",
        "mIoU",
        "%",
        "Intersection over union, pooled over all images, mean over the classes that occur and are not ignored (Everingham et "
        "al., IJCV 2010).",
    ),
    Metric(
        "classwise_ece",
        "Class-wise ECE",
        "%",
        "Calibration error of the probability of one class over all pixels, not only where it is predicted; most have a "
        "probability near 0, which makes it small (Kull et al., NeurIPS 2019).",
        distribution=True,
        classwise=True,
        interval=False,
    ),
)
CATALOGUE: Dict[str, Metric] = {metric.key: metric for metric in _METRICS}
"""By key, in the order of the report."""
