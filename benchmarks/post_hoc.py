"""Post-hoc calibrations of a trained network: each finds a temperature with which to divide its logits on the target.

Every function takes `Material` and gives a scalar temperature or a module `(logits, image) -> (N, 1, H, W)`. All but
`oracle_temperature` use source labels and unlabelled target images only.
"""

from typing import Callable, Dict, NamedTuple, Tuple, Union

import numpy as np
import torch
import torch.nn.functional as F
from temperature_nets import ContextNet
from torch import Tensor

from dacal_addon.calibrate import fitted_temperature
from dacal_addon.demo.datasets import Dataset, Split
from dacal_addon.demo.evaluation import evaluated, predict
from dacal_addon.demo.network import SmallUNet
from dacal_addon.losses import cross_entropy
from dacal_addon.metrics import ece
from dacal_addon.mixing import blend_pairs

Temperature = Union[float, ContextNet]


class Material(NamedTuple):
    """What a calibration may look at. The source's test images are its validation set: the network was not trained on them."""

    network: SmallUNet
    dataset: Dataset
    generator: torch.Generator
    device: torch.device


def source_temperature(material: Material) -> float:
    """Temperature scaling on the source's validation images."""
    validation = material.dataset.source_test
    return fitted_temperature(predict(material.network, validation.image, device=material.device), validation.label)


def oracle_temperature(material: Material) -> float:
    """Bound: the temperature of the least ECE on the target's test images, by their labels, to half a percent."""
    test = material.dataset.target_test
    logits = predict(material.network, test.image, device=material.device)

    return best_temperature(logits, test.label)


def best_temperature(logits: Tensor, label: Tensor) -> float:
    """The temperature of the least ECE of these pixels, to half a percent."""

    def best(candidates: np.ndarray) -> float:
        return float(min(candidates, key=lambda temperature: ece(logits / float(temperature), label, input="logits")))

    coarse = best(np.geomspace(0.2, 5.0, 41))
    return best(coarse * np.geomspace(1 / 1.08, 1.08, 33))


def pseudocal(material: Material) -> float:
    """Temperature scaling on blends of target images, judged where the two pseudo-labels differ, by the dominant one's.

    Source: PseudoCal (Hu et al., ICML 2024): mixup at inference, share 0.65, the cross-cluster rule.
    """
    return fitted_temperature(*blends(material))


def blends(material: Material) -> Tuple[Tensor, Tensor]:
    """The network's logits on blends of target images, and the labels by which PseudoCal judges them, 255 where it does not."""
    image = _some(material, material.dataset.target_train).image
    label = predict(material.network, image, device=material.device).argmax(1)
    blended, kept = blend_pairs(image, label, generator=material.generator, differing=True)
    return predict(material.network, blended, device=material.device), kept


def transcal(material: Material) -> float:
    """The T >= 1 whose mean confidence on the target meets the accuracy estimated from weighted source pixels.

    The weights are a domain classifier's odds on the network's features, to a power found along with T; control variates
    reduce the variance of the estimated error.

    Source: TransCal (Wang et al., NeurIPS 2020) and its authors' code, of which the constants are.
    """
    from scipy.optimize import minimize
    from sklearn.linear_model import LogisticRegression

    logits, label, features = _pixels(material, material.dataset.source_test)
    target_logits, _, target_features = _pixels(material, material.dataset.target_train)
    own = fitted_temperature(logits, label)
    source_confidence = float(F.softmax(logits / own, 1).amax(1).mean())
    x = torch.cat([features, target_features]).numpy()
    mean, deviation = x.mean(0), x.std(0) + 1e-6
    domain = np.r_[np.ones(len(features)), np.zeros(len(target_features))]
    classifier = LogisticRegression(max_iter=500).fit((x - mean) / deviation, domain)
    odds = classifier.predict_proba((features.numpy() - mean) / deviation)
    weight = odds[:, 0] / np.maximum(odds[:, 1], 1e-12)
    correct = (logits.argmax(1) == label).double().flatten().numpy()
    target_logits = target_logits.double()

    def gap(parameters: np.ndarray) -> float:
        temperature, power = parameters
        w = weight**power
        risk = w * (1 - correct)
        risk_and_weight = np.cov(risk, w)
        first = risk - (risk_and_weight[0, 1] / max(risk_and_weight[1, 1], 1e-12)) * (w - 1)
        both = np.cov(first, correct)
        error = first.mean() - both[0, 1] / max(both[1, 1], 1e-12) * (correct.mean() - source_confidence)
        confidence = float(F.softmax(target_logits / float(temperature), 1).amax(1).mean())
        return float(abs(confidence - (1 - error)))

    found = minimize(gap, np.array([2.0, 0.5]), method="SLSQP", bounds=[(1.0, None), (0.0, 1.0)])
    return float(found.x[0])


def local_temperature(material: Material, *, steps: int = 200) -> ContextNet:
    """A net of the logits and the image gives every pixel its temperature, fitted on the source's validation images.

    Source: local temperature scaling (Ding et al., ICCV 2021), with a smaller net than theirs.
    """
    validation = material.dataset.source_test
    logits = predict(material.network, validation.image, device=material.device)
    net = ContextNet(logits.shape[1], extra=3).to(material.device)
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    for _ in range(steps):
        chosen = torch.randint(len(logits), (8,), generator=material.generator)
        z, image, label = (x[chosen].to(material.device) for x in (logits, validation.image, validation.label))
        optimizer.zero_grad()
        cross_entropy(z / net(z, image), label).backward()
        optimizer.step()
    return net


CALIBRATIONS: Dict[str, Tuple[str, Callable[[Material], Temperature]]] = {
    "ts": ("temperature scaling on source", source_temperature),
    "lts": ("local temperature scaling", local_temperature),
    "transcal": ("TransCal", transcal),
    "pseudocal": ("PseudoCal", pseudocal),
    "oracle-ts": ("bound: the temperature of the least ECE", oracle_temperature),
}


def temperatures(temperature: Temperature, logits: Tensor, image: Tensor, *, device: torch.device) -> Tensor:
    """(N, 1, H, W) of many images, on the CPU."""
    if isinstance(temperature, float):
        return torch.full_like(logits[:, :1], temperature)
    with torch.no_grad():
        parts = zip(logits.split(25), image.split(25))
        return torch.cat([temperature(z.to(device), x.to(device)).cpu() for z, x in parts])


def _some(material: Material, split: Split, *, count: int = 100) -> Split:
    chosen = torch.randperm(len(split.image), generator=material.generator)[:count]
    return Split(split.image[chosen], split.label[chosen])


def _pixels(material: Material, split: Split, *, count: int = 50_000) -> Tuple[Tensor, Tensor, Tensor]:
    """Logits (P, C, 1, 1), labels (P, 1, 1) and features (P, F) of random pixels of random images."""
    split = _some(material, split)
    logits = predict(material.network, split.image, device=material.device)
    features = evaluated(material.network, material.network.features, split.image, device=material.device)
    features = F.interpolate(features, size=logits.shape[-2:], mode="bilinear", align_corners=False)
    chosen = torch.randperm(split.label.numel(), generator=material.generator)[:count]
    z, f = (x.permute(0, 2, 3, 1).flatten(0, 2)[chosen] for x in (logits, features))
    return z[..., None, None], split.label.flatten()[chosen].view(-1, 1, 1), f
