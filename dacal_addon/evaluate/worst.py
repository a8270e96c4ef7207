"""The images with the largest calibration error, read again: what of them is drawn."""

from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import torch

from ..metrics.arrays import as_tensor
from .compare import Network
from .files import BadFile, inside, listed
from .images import FORMATS, read_picture
from .judging import ImageRow, Results, read_image
from .matching import matched
from .options import EvaluateOptions
from .predictions import Prediction

# Enough for a picture 4 cm wide at 300 dots an inch; of more pixels every second, third ... is taken.
_MOST_PIXELS_ACROSS = 480
_ROWS_AT_ONCE = 16


class Seen(NamedTuple):
    """What is drawn of an image; the maps are (H, W) of every so many pixels."""

    row: ImageRow
    label: np.ndarray
    """int64."""
    predicted: np.ndarray
    """int64."""
    confidence: np.ndarray
    """float32."""
    void: np.ndarray
    """bool: the label does not count."""
    photograph: Optional[np.ndarray] = None
    """(H', W', 3) uint8."""

    @property
    def wrong(self) -> np.ndarray:
        """bool: the prediction is wrong."""
        found: np.ndarray = (self.predicted != self.label) & ~self.void
        return found


def worst_rows(rows: Sequence[ImageRow], count: int) -> List[ImageRow]:
    """Those with the largest calibration error, the largest first; images without a valid pixel have none."""
    return sorted((row for row in rows if row.ece == row.ece), key=lambda row: -row.ece)[:count]


def find_photographs(options: EvaluateOptions, network: Network) -> Dict[str, Path]:
    """Image -> photograph below --images, matched by name as predictions are; `BadFile` for no folder, or nothing in it."""
    if options.images is None:
        return {}
    paths, folder, _ = listed(options.images, list(FORMATS), follow_links=options.follow_links)
    labels = network.plan.labels
    found = matched(paths, list(labels.values()), folders=(folder, options.labels), label_suffixes=options.label_suffix)
    of_label = {path: found.predictions[name] for name, path in found.labels.items() if name in found.predictions}
    return {name: of_label[path] for name, path in labels.items() if path in of_label}


def look_at_worst(
    network: Network, results: Results, options: EvaluateOptions, photographs: Dict[str, Path]
) -> Tuple[List[Seen], List[str]]:
    """Read the worst images again, and no others: what is to be drawn, worst first; and remarks."""
    found, remarks = [], []
    kind = network.plan.label_kind
    ignored = [one - kind.first for one in kind.uncounted]
    for row in worst_rows(results.images, options.worst):
        try:
            prediction, label = read_image(row.name, network.plan, network.options)
        except BadFile as error:  # though it was read before
            remarks.append(f"no picture of image {row.name!r}: {error}")
            continue
        photograph = None
        if row.name in photographs:
            try:
                photograph = read_photograph(photographs[row.name], options.images, options.max_pixels)
            except BadFile as error:
                remarks.append(str(error))
        elif options.images is not None:
            remarks.append(f"no photograph of image {row.name!r} in {options.images}")
        found.append(look(row, prediction, label - kind.first, network.plan.input, ignored, photograph=photograph))
    return found, remarks


def look(
    row: ImageRow,
    prediction: Prediction,
    label: np.ndarray,
    kind: str,
    ignored: Sequence[int],
    *,
    photograph: Optional[np.ndarray] = None,
) -> Seen:
    """At most 480 pixels across of a prediction (1, C, *S), or a pair (1, H, W), and its label (1, *S), classes or `ignored`.

    Of a volume, the slice with the most confidence in what is wrong. `kind`: as `CalibrationStats(input=...)`.

    Example:
        >>> scores = np.array([[[[0.9, 0.2]], [[0.1, 0.8]]]])
        >>> row = ImageRow("a", 2, 0.5, 0.85, 0.35, 0.25)
        >>> look(row, scores, np.array([[[0, 0]]]), "probs", (255,)).wrong.tolist()
        [[False, True]]
    """
    height, width = label.shape[-2:]
    step = -(-max(height, width) // _MOST_PIXELS_ACROSS)

    def thin(values: Any, *leading: int) -> Any:
        return values.reshape(*leading, -1, height, width)[..., ::step, ::step]

    slices = thin(label)
    if isinstance(prediction, tuple):
        pair = [thin(as_tensor("evaluate", "x", part)) for part in prediction]
        sure = [(pair[0][index].float().numpy(), pair[1][index].long().numpy()) for index in range(len(slices))]
    else:
        scores = as_tensor("evaluate", "x", prediction)
        classes = thin(scores, scores.shape[1])
        sure = [_top(classes[:, index], kind) for index in range(len(slices))]
    if photograph is not None:
        across = -(-max(photograph.shape) // _MOST_PIXELS_ACROSS)
        photograph = photograph[::across, ::across]
    void = [np.isin(one, ignored) for one in slices]
    found = [
        Seen(row, one, predicted, confidence, without, photograph)
        for one, without, (confidence, predicted) in zip(slices, void, sure)
    ]
    return max(found, key=lambda seen: float(seen.confidence[seen.wrong].sum()))


def _top(scores: torch.Tensor, kind: str) -> Tuple[np.ndarray, np.ndarray]:
    """Confidence and class of scores (C, H, W), some rows at a time: hundreds of classes in float32 would take a gigabyte."""
    confidence, predicted = [], []
    for begin in range(0, scores.shape[1], _ROWS_AT_ONCE):
        x = scores[:, begin : begin + _ROWS_AT_ONCE].float()
        x = torch.softmax(x, 0) if kind == "logits" else x.exp() if kind == "log_probs" else x / x.sum(0)
        top, which = x.max(0)
        confidence.append(top.numpy())
        predicted.append(which.numpy())
    return np.concatenate(confidence), np.concatenate(predicted)


def read_photograph(path: Path, source: Optional[Path], max_pixels: int) -> np.ndarray:
    """(H, W, 3) uint8, of a colour or a grey image below `source`; `BadFile` for what is neither, or elsewhere."""
    assert source is not None  # there are no photographs without
    inside(path, source if source.is_dir() else source.parent)
    return read_picture(path, max_pixels=max_pixels)
