"""Independent float64 implementations of the metrics, pixel by pixel in numpy, and predictions to try them on."""

import numpy as np
import torch
from scipy.special import softmax


def predictions(seed=0, shape=(3, 4, 5, 6), dtype=torch.float64, sharpness=3.0, ignored=0.3):
    """Logits and labels that agree more often than not, some of them ignored."""
    g = torch.Generator().manual_seed(seed)
    z = sharpness * torch.randn(shape, generator=g, dtype=torch.float64)
    target = torch.randint(0, shape[1], (shape[0], *shape[2:]), generator=g)
    easy = torch.rand(target.shape, generator=g) < 0.5
    target = torch.where(easy, z.argmax(1), target)
    target[torch.rand(target.shape, generator=g) < ignored] = 255
    return z.to(dtype), target


def flat(z, target):
    """Probabilities (P, C) and labels (P,) of the valid pixels, of any number of spatial dimensions."""
    p = np.moveaxis(softmax(z.double().numpy(), axis=1), 1, -1).reshape(-1, z.shape[1])
    y = target.numpy().reshape(-1)
    return p[y != 255], y[y != 255]


def top(p, y):
    """Confidences and whether they are right."""
    return p.max(1), (p.argmax(1) == y).astype(float)


def width_members(confidence, n_bins):
    """For each bin of equal width, the pixels (l, r] in it."""
    for b in range(n_bins):
        inside = (confidence > b / n_bins) & (confidence <= (b + 1) / n_bins)
        yield inside | ((confidence == 0) & (b == 0))


def binned(confidence, right, members, norm="l1", debias=False):
    total, largest = 0.0, 0.0
    for inside in members:
        n = inside.sum()
        if n:
            accuracy = right[inside].mean()
            gap = abs(accuracy - confidence[inside].mean())
            largest = max(largest, gap)
            noise = accuracy * (1 - accuracy) / (n - 1) if debias and n > 1 else (gap**2 if debias else 0.0)
            total += n / len(right) * (gap if norm == "l1" else gap**2 - noise)
    return largest if norm == "max" else total if norm == "l1" else np.sqrt(max(total, 0.0))


def width_ece(p, y, n_bins=15, **options):
    confidence, right = top(p, y)
    return binned(confidence, right, width_members(confidence, n_bins), **options)


def mass_ece(confidence, right, n_bins=15, norm="l1"):
    """Bins of n / n_bins pixels each, in the order of confidence; a pixel on an edge belongs to both in part."""
    order = np.argsort(confidence, kind="stable")
    gap = np.concatenate([[0.0], np.cumsum((right - confidence)[order])])
    edges = np.interp(len(gap[1:]) * np.arange(n_bins + 1) / n_bins, np.arange(len(gap)), gap)
    gaps = np.abs(np.diff(edges)) / len(right)
    return gaps.sum() if norm == "l1" else gaps.max() * n_bins if norm == "max" else np.sqrt((gaps**2).sum() * n_bins)


def classwise(p, y, n_bins=15, error=binned):
    errors = []
    for c in range(p.shape[1]):
        is_c = (y == c).astype(float)
        if error is binned:
            errors.append(binned(p[:, c], is_c, width_members(p[:, c], n_bins)))
        else:
            errors.append(error(p[:, c], is_c, n_bins))
    return np.array(errors)


def ks(confidence, right):
    order = np.argsort(confidence, kind="stable")
    gap = np.cumsum((right - confidence)[order]) / len(right)
    last_of_ties = np.append(np.diff(confidence[order]) > 0, True)
    return np.abs(gap[last_of_ties]).max()


def aurc(confidence, right, draws=1, generator=None):
    """By definition; the mean over random orders of equal confidences."""
    generator = generator or np.random.default_rng(0)
    areas = []
    for _ in range(draws):
        order = np.lexsort((generator.random(len(right)), -confidence))
        areas.append((np.cumsum(1 - right[order]) / np.arange(1, len(right) + 1)).mean())
    return np.mean(areas)


def smooth_ece(confidence, right, points=4000):
    """The fixed point, with the reflected kernel summed directly."""
    t = (np.arange(points) + 0.5) / points

    def smoothed(width):
        kernel = sum(
            np.exp(-0.5 * ((t[:, None] - (sign * confidence[None] + shift)) / width) ** 2)
            for shift in (-2, 0, 2)
            for sign in (1, -1)
        ) / (width * np.sqrt(2 * np.pi))
        return np.abs(kernel @ (right - confidence)).mean() / len(right)

    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if smoothed(middle) > middle else (low, middle)
    return high


def brier(p, y):
    return ((p - np.eye(p.shape[1])[y]) ** 2).sum(1).mean()
