"""Images of one domain, out of tensors or loaders."""

from typing import Any, Iterable, Iterator, List, NamedTuple, Sequence, Tuple

import torch
from torch import Tensor

from .._check import check_image, check_label, describe, problem


class Pictures(NamedTuple):
    """Images of one domain, on the CPU or wherever they came from; sizes may differ."""

    image: Tuple[Tensor, ...]
    """(K, *S) each."""
    label: Tuple[Tensor, ...] = ()
    """(*S) int64 each; none at all of an unlabelled domain."""


def batches(image: Sequence[Tensor], size: int) -> Iterator[List[int]]:
    """Indices of images that go together: of one size, in their order, at most `size` of them.

    Example:
        >>> list(batches([torch.zeros(3, 4, n) for n in (4, 4, 4, 8, 4)], 2))
        [[0, 1], [2], [3], [4]]
    """
    run: List[int] = []
    for i, x in enumerate(image):
        if run and (len(run) == size or image[run[0]].shape != x.shape):
            yield run
            run = []
        run.append(i)
    if run:
        yield run


def labelled(function: str, name: str, given: Any, *, limit: int, generator: torch.Generator) -> Pictures:
    """At most `limit` images with labels, of a pair of tensors or of an iterable of such batches.

    Raises:
        ValueError, TypeError: neither of both, shapes that do not fit, no image.
    """
    expected = f"{name}: a pair (image (N, K, *spatial), label (N, *spatial)), or an iterable of such pairs"
    pair = isinstance(given, (tuple, list)) and len(given) == 2 and all(isinstance(x, Tensor) for x in given)
    image: List[Tensor] = []
    label: List[Tensor] = []
    for batch in [given] if pair else _iterable(function, expected, given):
        if not isinstance(batch, (tuple, list)) or len(batch) < 2:
            raise problem(
                function, expected=expected, got=describe(batch), remedy="pair the images with their labels", error=TypeError
            )
        x = check_image(function, f"image of {name}", batch[0])
        check_label(function, f"label of {name}", batch[1], shape=(len(x), *x.shape[2:]))
        chosen = _chosen(len(x), limit, generator) if pair else range(len(x))
        image.extend(x[i] for i in chosen)
        label.extend(batch[1][i] for i in chosen)
        if len(image) >= limit:
            break
    _check_any(function, expected, image)
    return Pictures(tuple(image[:limit]), tuple(label[:limit]))


def unlabelled(function: str, name: str, given: Any, *, limit: int, generator: torch.Generator) -> Pictures:
    """At most `limit` images of a tensor, or of an iterable of batches, each a tensor or a tuple that begins with one.

    Raises:
        ValueError, TypeError: neither of both, no image.
    """
    expected = f"{name}: images (N, K, *spatial), or an iterable of batches of them"
    image: List[Tensor] = []
    for batch in [given] if isinstance(given, Tensor) else _iterable(function, expected, given):
        x = check_image(function, name, batch[0] if isinstance(batch, (tuple, list)) and len(batch) else batch)
        chosen = _chosen(len(x), limit, generator) if isinstance(given, Tensor) else range(len(x))
        image.extend(x[i] for i in chosen)
        if len(image) >= limit:
            break
    _check_any(function, expected, image)
    return Pictures(tuple(image[:limit]))


def _iterable(function: str, expected: str, given: Any) -> Iterable[Any]:
    if not hasattr(given, "__iter__") or isinstance(given, (Tensor, dict, str)):
        remedy = "pass tensors, or a loader of batches"
        raise problem(function, expected=expected, got=describe(given), remedy=remedy, error=TypeError)
    iterable: Iterable[Any] = given
    return iterable


def _chosen(count: int, limit: int, generator: torch.Generator) -> List[int]:
    """Which of a tensor's images: at random where there are too many, in their order."""
    if count <= limit:
        return list(range(count))
    order = torch.randperm(count, generator=generator, device=generator.device)
    return sorted(order[:limit].tolist())


def _check_any(function: str, expected: str, image: Sequence[Tensor]) -> None:
    if not image:
        raise problem(function, expected=expected, got="no image", remedy="pass at least one (has the iterator been used up?)")
