"""TransCal: source errors, weighted by how much a source pixel looks like the target's, as an estimate of the target's."""

import math
from typing import Tuple

import numpy as np
import torch
from scipy.optimize import minimize
from scipy.special import expit

from .contract import Estimate
from .material import Material
from .pixels import Pixels
from .scaling import BOUNDS, at, fitted

_PENALTY = 1e-3  # on the squared weights of the domain classifier, per pixel


def transcal(material: Material) -> Estimate:
    """The T >= 1 whose mean confidence on the target meets an accuracy that is estimated from weighted source pixels.

    The weights are a domain classifier's odds on the network's features, to a power that is found along with T; control
    variates reduce the variance of the estimated error. The classifier is logistic regression; features and logits are of
    other pixels of the same images, so that a pixel has the mean odds of its image.

    Source: TransCal (Wang et al., NeurIPS 2020) and its authors' code, of which start and bounds of the search are.
    """
    source, target = material.seen("source"), material.seen("target")
    own = fitted(source.logits, source.label, source.weight)
    said = at(source.logits, math.log(own)).softmax(1).max(1)[0].numpy()
    correct = (source.logits.argmax(1) == source.label).double().numpy()
    odds = odds_of_target(source, target)[source.image.numpy()]
    mass = (source.weight / source.weight.sum()).numpy()
    target_mass = (target.weight / target.weight.sum()).numpy()

    def gap(parameters: np.ndarray) -> float:
        temperature, power = parameters
        confidence = at(target.logits, math.log(temperature)).softmax(1).max(1)[0].numpy()
        accuracy = 1 - error_on_target(correct, said, odds**power, mass)
        return abs(float((target_mass * confidence).sum()) - accuracy)

    found = minimize(gap, np.array([2.0, 0.5]), method="SLSQP", bounds=[(1.0, BOUNDS[1]), (0.0, 1.0)])
    temperature, power = found.x
    accuracy = float(np.clip(1 - error_on_target(correct, said, odds**power, mass), 0.0, 1.0))
    return Estimate("transcal", float(temperature), math.nan, accuracy, f"weights to the power {power:.2f}")


def error_on_target(correct: np.ndarray, said: np.ndarray, weight: np.ndarray, mass: np.ndarray) -> float:
    """The error rate on the target, of P source pixels, as TransCal estimates it.

    Args:
        correct: (P,) 1 where the network is right, else 0.
        said: (P,) its confidence, calibrated on the source: what accuracy its mean expects.
        weight: (P,) how much each resembles the target; scaled to a mean of 1 here, as the numbers of images differ.
        mass: (P,) how many pixels each stands for; sums to 1.

    Example:
        >>> correct = np.array([1.0, 1.0, 1.0, 0.0])
        >>> round(error_on_target(correct, correct, np.array([1.0, 1.0, 1.0, 3.0]), np.full(4, 0.25)), 6)
        0.5
    """
    w = weight / max(float((mass * weight).sum()), 1e-12)
    risk = w * (1 - correct)
    # Two control variates, whose means are known: the weights', and the accuracy's.
    first = risk - _slope(risk, w, mass) * (w - 1)
    return float((mass * first).sum() - _slope(first, correct, mass) * (mass * (correct - said)).sum())


def odds_of_target(source: Pixels, target: Pixels) -> np.ndarray:
    """How many times as probable the target is as the source, of each source image (n,): the mean over its features."""
    x = torch.cat([source.features, target.features]).double().numpy()
    x -= x.mean(0)
    x /= x.std(0) + 1e-6
    is_target = np.r_[np.zeros(len(source.features)), np.ones(len(target.features))]

    def loss(parameters: np.ndarray) -> Tuple[float, np.ndarray]:
        slopes, offset = parameters[:-1], parameters[-1]
        z = x @ slopes + offset
        excess = expit(z) - is_target
        value = np.mean(np.logaddexp(0, z) - is_target * z) + _PENALTY * slopes @ slopes
        return float(value), np.r_[x.T @ excess / len(x) + 2 * _PENALTY * slopes, excess.mean()]

    fit = minimize(loss, np.zeros(x.shape[1] + 1), jac=True, method="L-BFGS-B").x
    z = (x[: len(source.features)] @ fit[:-1] + fit[-1]).clip(-20, 20)
    index = source.feature_image.numpy()
    counts = np.maximum(np.bincount(index, minlength=source.images), 1)
    odds: np.ndarray = np.bincount(index, weights=np.exp(z), minlength=source.images) / counts
    return odds


def _slope(x: np.ndarray, y: np.ndarray, mass: np.ndarray) -> float:
    """Covariance over variance, of weighted pixels."""
    mean_x, mean_y = (mass * x).sum(), (mass * y).sum()
    return float((mass * (x - mean_x) * (y - mean_y)).sum() / max(float((mass * (y - mean_y) ** 2).sum()), 1e-12))
