"""What estimators look at: images of both domains, and what the network says of them."""

import zlib
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple, cast

import torch
from torch import Tensor, nn

from .._check import as_whole, check_choice, problem
from ..ignoring import IgnoreIndex, ignored_or_255
from ..learners.networks import Network, Outputs
from .classifiers import AFFINE, classifiers
from .curves import Curves, curves_of
from .evaluating import evaluating
from .pictures import Pictures, batches
from .pixels import FEATURE_POSITIONS, Pixels, Sample

Restyle = Callable[[Tensor], Tensor]


class Material:
    """What all estimators are given. Each draws from a generator of its own, so that none changes another.

    Args:
        student: the network to calibrate, in any mode; read and left as it was.
        source: labelled images that it was not trained on.
        target: images without labels.
        labelled_target: a few with labels; they may be among those of `target`.
        outputs: where logits and features are in what it returns.
        layer: the name of its last layer, where `classifiers` does not find it: features are what that is given.
        generator: gives the seed of everything that is drawn.
        device: where it runs.
        batch_size: images at a time.
        pixels: how many are looked at in each image.
        ignore_index: label or labels of pixels that are not judged, which may be classes; None for 255, and must be given where
            that is a class.
        value_range: of the images, see `shadows`.
    """

    def __init__(
        self,
        student: Network,
        *,
        source: Pictures,
        target: Pictures,
        labelled_target: Optional[Pictures] = None,
        outputs: Optional[Outputs] = None,
        layer: Optional[str] = None,
        generator: torch.Generator,
        device: Optional[torch.device] = None,
        batch_size: int = 4,
        pixels: int = 2048,
        ignore_index: Optional[IgnoreIndex] = None,
        value_range: Optional[Tuple[float, float]] = None,
    ) -> None:
        self.student, self.source, self.target, self.labelled_target = student, source, target, labelled_target
        self.outputs = Outputs() if outputs is None else outputs
        self._last = _last_layer(student, layer) if self.outputs.features_of is None else None
        self.device = _device_of(student) if device is None else device
        self.batch_size = as_whole("Material", "batch_size", batch_size, low=1)
        self.pixels = as_whole("Material", "pixels", pixels, low=1)
        self.ignore_index, self._ignore_given = ignored_or_255("Material", ignore_index), ignore_index
        self.value_range = value_range
        self._seed = int(torch.randint(1 << 31, (1,), generator=generator, device=generator.device))
        self._seen: Dict[str, Pixels] = {}
        self._curves: Dict[str, Curves] = {}

    def generator_for(self, name: str) -> torch.Generator:
        """The same for the same name and the same material, whatever was drawn before."""
        return torch.Generator().manual_seed((self._seed + zlib.crc32(name.encode())) % (1 << 31))

    def seen(self, domain: str) -> Pixels:
        """What the student says of "source", "target" or "labelled_target", asked once."""
        check_choice("Material.seen", "domain", domain, ("source", "target", "labelled_target"))
        if domain not in self._seen:
            pictures = getattr(self, domain)
            self._seen[domain] = self.look(pictures, generator=self.generator_for(domain))
        return self._seen[domain]

    def curves(self, domain: str) -> Curves:
        """Of what the student says of a domain, computed once."""
        if domain not in self._curves:
            self._curves[domain] = curves_of(self.seen(domain))
        return self._curves[domain]

    def look(self, pictures: Pictures, *, generator: torch.Generator, restyle: Optional[Restyle] = None) -> Pixels:
        """What the student says of pictures, each batch of them first handed to `restyle`."""
        sample = Sample(self.pixels, self.ignore_index, generator)
        with evaluating(self.student, of=[torch.empty(0, device=self.device)]), _Listener(self._last, self.outputs) as heard:
            for index in batches(pictures.image, self.batch_size):
                image = torch.stack([pictures.image[i] for i in index]).to(self.device)
                label = torch.stack([pictures.label[i] for i in index]) if pictures.label else None
                logits, output = self.logits(image if restyle is None else restyle(image))
                sample.add(logits, label, features=heard.features(len(image), output))
        return sample.pixels()

    def logits(self, image: Tensor) -> Tuple[Tensor, Any]:
        """(N, C, *S) of images that are on the device, and the whole output; for use inside of `evaluating`.

        Raises:
            ValueError: NaN or infinite logits (a class masked out with -inf is none).
        """
        output = self.student(image)
        logits = self.outputs.logits("estimate_temperature", output, image.shape[2:]).detach()
        ignored_or_255("estimate_temperature", self._ignore_given, logits.shape[1])
        if bool(torch.isnan(logits).any()) or bool((logits == float("inf")).any()):
            remedy = "look at the network's weights and at the images: are they normalised as in training?"
            raise problem("estimate_temperature", expected="finite logits", got="NaN or inf among them", remedy=remedy)
        return logits, output


def _last_layer(student: Network, layer: Optional[str]) -> Optional[nn.Module]:
    """The layer, or the first of several, whose input are the features; None where there are only logits."""
    if not isinstance(student, nn.Module):
        return None
    try:
        return next(iter(classifiers(student, layer=layer).values()))
    except ValueError:
        if layer is not None:
            raise
        return None  # logits have to do


class _Listener:
    """Hears what the last layer is given, while it is used as a context."""

    def __init__(self, layer: Optional[nn.Module], outputs: Outputs) -> None:
        self._layer, self._outputs = layer, outputs
        self._handle: Any = None
        self._heard: List[Tensor] = []
        self._generator = torch.Generator().manual_seed(0)

    def __enter__(self) -> "_Listener":
        if self._layer is not None:
            self._handle = self._layer.register_forward_pre_hook(self._hear)
        return self

    def __exit__(self, *_: object) -> None:
        if self._handle is not None:
            self._handle.remove()

    def features(self, count: int, output: Any) -> Optional[Sequence[Tensor]]:
        """Of each of the N images of the last call, (F, ...); None where nothing is heard.

        HRDA's layer is asked about whole images first, and about their details then: the first call counts. A network that
        takes images one by one, or in windows, asks several times: its calls are shared out in their order.
        """
        if self._outputs.features_of is not None:
            found = self._outputs.features("estimate_temperature", output)
            return None if found is None else list(found)
        heard, self._heard = self._heard, []
        if not heard:
            return None
        maps = [part for call in (heard[:1] if len(heard[0]) == count else heard) for part in call]
        bounds = [i * len(maps) // count for i in range(count + 1)]
        return [torch.cat(maps[low : max(low + 1, high)], 1) for low, high in zip(bounds, bounds[1:])]

    def _hear(self, layer: nn.Module, inputs: Tuple[Any, ...]) -> None:
        x = inputs[0] if inputs else None
        # Of linear layers nobody knows which dimension is the image's. Maps without a batch dimension are one less.
        mapped = isinstance(layer, AFFINE) and not isinstance(layer, nn.Linear)
        if mapped and isinstance(x, Tensor) and x.dim() == cast(Tensor, layer.weight).dim():
            # Few positions of each map: a network in windows has many maps.
            order = torch.randperm(x[0, 0].numel(), generator=self._generator)[:FEATURE_POSITIONS].to(x.device)
            self._heard.append(x.detach().flatten(2)[:, :, order])


def _device_of(student: Network) -> torch.device:
    if isinstance(student, nn.Module):
        for tensor in (*student.parameters(), *student.buffers()):
            return tensor.device
    return torch.device("cpu")
