"""What one iteration sees: images of both domains, flipped, cropped and augmented, and the mask by which they are mixed.

Each purpose has a random stream of its own, so that all methods see the same and results can be compared in pairs. (In a
prototype a changed stream alone moved mIoU by 7 points.)
"""

from typing import Any, Iterator, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..mixing import class_mask
from .datasets import Dataset, Split
from .recipes import Recipe


class Batch(NamedTuple):
    """What one iteration knows, for N images of each domain."""

    source_label: Tensor
    """(N, H, W) int64."""
    source_image: Tensor
    """(N, 3, H, W) in 0..1, as all images."""
    target_image: Tensor
    source_strong: Tensor
    """The images after `augment`: what the student sees."""
    target_strong: Tensor
    mask: Tensor
    """(N, 1, H, W) bool, True = source pixel of the mixed image."""
    target_label: Tensor
    """(N, H, W) int64. For diagnostics and upper bounds alone; no method may train on it."""
    generator: torch.Generator
    """For what a method draws besides."""


def augment(image: Tensor, generator: torch.Generator) -> Tensor:
    """Colour jitter and blur, each image by its own draw: DACS's strong augmentation."""
    n = image.shape[0]
    u = torch.rand(n, 8, generator=generator)
    brightness, contrast, saturation = ((0.75 + 0.5 * u[:, i]).view(n, 1, 1, 1) for i in range(3))
    tint = (0.94 + 0.12 * u[:, 3:6]).view(n, 3, 1, 1)
    image = image * brightness * tint
    mean = image.mean((1, 2, 3), keepdim=True)
    image = mean + contrast * (image - mean)
    grey = image.mean(1, keepdim=True)
    image = grey + saturation * (image - grey)
    sigma = 0.15 + u[:, 6]
    taps = torch.arange(-2.0, 3.0)
    kernel = torch.exp(-taps.pow(2) / (2 * sigma[:, None] ** 2))
    kernel = kernel / kernel.sum(1, keepdim=True)
    blur = kernel[:, :, None] * kernel[:, None, :]
    padded = F.pad(image.transpose(0, 1), (2, 2, 2, 2), mode="replicate")
    blurred = F.conv2d(padded, blur.unsqueeze(1), groups=n).transpose(0, 1)
    image = torch.where((u[:, 7] < 0.5).view(n, 1, 1, 1), blurred, image)
    return image.clamp(0.0, 1.0)


def batches(dataset: Dataset, recipe: Recipe, *, seed: int, device: torch.device) -> Iterator[Batch]:
    """Endless batches. The streams (which images, how augmented, which masks, what else) do not see each other's draws."""
    order, looks, masks, other = (torch.Generator().manual_seed(1000 * seed + i) for i in range(4))

    def draw(split: Split) -> Any:
        index = torch.randint(len(split.image), (recipe.batch,), generator=order)
        image, label = split.image[index], split.label[index]
        flip = torch.rand(recipe.batch, generator=order) < 0.5
        image = torch.where(flip.view(-1, 1, 1, 1), image.flip(-1), image)
        label = torch.where(flip.view(-1, 1, 1), label.flip(-1), label)
        spare = image.shape[-1] - recipe.crop
        if spare <= 0:
            return image, label
        lefts = torch.randint(spare + 1, (recipe.batch,), generator=order).tolist()
        crops = [slice(left, left + recipe.crop) for left in lefts]
        return tuple(torch.stack([one[..., crop] for one, crop in zip(x, crops)]) for x in (image, label))

    while True:
        source_image, source_label = draw(dataset.source_train)
        target_image, target_label = draw(dataset.target_train)
        source_label = source_label.to(device)
        yield Batch(
            source_label,
            source_image.to(device),
            target_image.to(device),
            augment(source_image, looks).to(device),
            augment(target_image, looks).to(device),
            class_mask(source_label, generator=masks),
            target_label.to(device),
            other,
        )
