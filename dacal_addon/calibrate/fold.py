"""A temperature folded into the last layer: the logits are divided by it, the argmax stays, inference costs nothing more.

Where the note of it is. A module holds it as a plain attribute of the layer, which copies and pickles of the module keep
without needing this package. A checkpoint holds it beside the weights: `fold_checkpoint` writes it. It is no buffer: the
state dict of a folded module has the keys that it had, so that an unchanged model loads it, strictly or not. A state dict that
is taken of a folded module carries no note.
"""

import copy
import math
from collections import OrderedDict
from typing import Any, Callable, Dict, Mapping, Optional, Sequence, Tuple, Union, cast

import torch
from torch import Tensor, nn

from .._check import describe, problem
from ..learners.networks import Outputs
from .classifiers import AFFINE, classifiers
from .evaluating import evaluating

_NOTE = "dacal_fold"  # a layer's attribute: (temperature, norm of the weights after)
_ENTRY = "dacal"  # of a checkpoint's meta, or of a state dict's metadata: {"temperature": float, "layers": [names]}
# A note is about these weights, not about others that were loaded since; rounding to half precision does not make others.
_SAME = 1e-3
_CLOSE = 1e-3


def fold_temperature(
    layer_or_model: nn.Module,
    temperature: float,
    *,
    layer: Union[str, Sequence[str], None] = None,
    check_on: Optional[Tensor] = None,
    logits_of: Optional[Callable[[Any], Tensor]] = None,
) -> Tuple[str, ...]:
    """Divide weight and bias of the layer that makes the logits by T, in place: the network gives logits / T from then on.

    Exact up to rounding. A T of 1 changes and notes nothing.

    Args:
        layer_or_model: a linear layer or convolution, or a model in which `classifiers` finds the last one, or several whose
            outputs are summed or averaged (HRDA). Auxiliary heads stay as they are. The EMA teacher is another model.
        temperature: finite, > 0.
        layer: the name of that layer in the model, or the names, where it is not found.
        check_on: a batch (N, K, *S) to try it on: the logits must become those before, divided by T, else nothing is
            changed. Finds what the structure does not show: a layer that is not used, something that is added behind it.
        logits_of: for `check_on`, where the logits are in the output. One sigmoid channel needs none: z / T of it is enough.

    Returns:
        The names of the layers (`""` for a layer that was passed itself), as `fold_checkpoint` takes them.

    Raises:
        ValueError, TypeError: no such layer; one that shares its weights with another, is quantised, in half precision,
            parametrised (weight norm) or has a forward pass of its own; one that is folded already; a wrong T. Nothing has
            changed then.

    Example:
        >>> head = nn.Conv2d(8, 4, 1)
        >>> x = torch.randn(1, 8, 2, 2)
        >>> before = head(x)
        >>> fold_temperature(head, 2.0)
        ('',)
        >>> bool(torch.equal(head(x), before / 2)), folded_temperature(head)
        (True, 2.0)
    """
    t = _checked(temperature, "fold_temperature")
    found = classifiers(layer_or_model, layer=layer)
    for name, module in found.items():
        _check_layer(name or "layer", module)
        _check_untied(name or "layer", module, layer_or_model)
        held = folded_temperature(module)
        if held is not None:
            raise _folded_already("fold_temperature", held)
    if t == 1:
        return tuple(found)
    parameters = [parameter for module in found.values() for parameter in module.parameters(recurse=False)]
    own = [p.detach().clone() for p in parameters]
    new = [_divided("fold_temperature", value, t) for value in own]
    before = None if check_on is None else _logits(layer_or_model, check_on, logits_of)
    _write(parameters, new)
    try:
        if check_on is not None and before is not None:
            _check_logits(before / t, _logits(layer_or_model, check_on, logits_of))
    except BaseException:
        _write(parameters, own)
        raise
    for module in found.values():
        setattr(module, _NOTE, (t, _norm(cast(Tensor, module.weight))))
    return tuple(found)


def folded_temperature(of: Union[nn.Module, Mapping[str, Any]]) -> Optional[float]:
    """The temperature that is folded into a layer, a model or a checkpoint; None where there is none.

    Args:
        of: a module, of which one layer with a note is enough; or what `torch.load` returns: a state dict, or a dict with
            one under "state_dict". A module's note ends where other weights are loaded into it.

    Example:
        >>> head = nn.Conv2d(8, 4, 1)
        >>> original = {name: value.clone() for name, value in head.state_dict().items()}
        >>> _ = fold_temperature(head, 2.0)
        >>> _ = head.load_state_dict(original)
        >>> print(folded_temperature(head), folded_temperature(fold_checkpoint(original, 2.0, layers=[""])))
        None 2.0
    """
    if isinstance(of, nn.Module):
        for module in of.modules():
            note = getattr(module, _NOTE, None)
            if note is not None and math.isclose(note[1], _norm(cast(Tensor, module.weight)), rel_tol=_SAME):
                return float(note[0])
        return None
    entry = of["meta"].get(_ENTRY) if isinstance(of.get("meta"), Mapping) else None
    if entry is None:
        entry = getattr(_state_of(of), "_metadata", {}).get("", {}).get(_ENTRY)
    return None if entry is None else float(entry["temperature"])


def fold_checkpoint(
    checkpoint: Mapping[str, Any], temperature: float, *, layers: Sequence[str], prefix: str = ""
) -> Dict[str, Any]:
    """The checkpoint with T folded in and noted, ready for `torch.save`; the one that is passed stays as it is.

    Keys, shapes and kinds are the same, so that it loads as before. With a "meta" (mmcv's checkpoints) the note is in there,
    else in the state dict's own metadata, beside torch's versions; `folded_temperature` reads both. Optimizers' states and
    other entries are handed on as they are: it is for inference, and training goes on from the original.

    Args:
        checkpoint: a state dict, or a dict with one under "state_dict"; of the original weights. Of a network that
            `fold_temperature` has changed it would be folded a second time, which nothing in a state dict tells.
        temperature: finite, > 0.
        layers: names of the layers, as `fold_temperature` returns them.
        prefix: before these names in the state dict, "model." in checkpoints of the hosts' UDA trainers.

    Raises:
        ValueError, TypeError: a layer whose weight is missing, tied to another entry or no float32 or float64; a checkpoint
            that is folded already; a wrong T.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))
        >>> saved = fold_checkpoint({"state_dict": model.state_dict(), "meta": {}}, 2.0, layers=["2"])
        >>> bool(torch.equal(saved["state_dict"]["2.bias"], model[2].bias / 2)), saved["meta"]
        (True, {'dacal': {'temperature': 2.0, 'layers': ['2']}})
    """
    t = _checked(temperature, "fold_checkpoint")
    held = folded_temperature(checkpoint)
    if held is not None:
        raise _folded_already("fold_checkpoint", held)
    state = _state_of(checkpoint)
    folded: Any = OrderedDict(state)  # to which torch adds `_metadata`, as here
    for name in layers:
        stem = f"{prefix}{name}." if name else prefix
        _check_entry(stem, state)
        for key in (f"{stem}weight", f"{stem}bias"):
            if key in state:
                folded[key] = _divided("fold_checkpoint", state[key], t)
    entry = {"temperature": t, "layers": [f"{prefix}{name}" for name in layers]}
    metadata = copy.deepcopy(getattr(state, "_metadata", OrderedDict()))
    if isinstance(checkpoint.get("meta"), Mapping):
        folded._metadata = metadata
        return {**checkpoint, "state_dict": folded, "meta": {**checkpoint["meta"], _ENTRY: entry}}
    metadata.setdefault("", {})[_ENTRY] = entry
    folded._metadata = metadata
    return folded if state is checkpoint else {**checkpoint, "state_dict": folded}


class TemperatureScaled(nn.Module):
    """A network whose logits are divided by T behind it, where no layer can be folded. One division more at inference.

    Args:
        model: returns a tensor of logits; anything else is an error.
        temperature: finite, > 0; a buffer, so that a state dict holds it.

    Example:
        >>> scaled = TemperatureScaled(nn.Softplus(), 2.0)
        >>> x = torch.ones(1, 3, 2, 2)
        >>> bool(torch.equal(scaled(x), nn.functional.softplus(x) / 2))
        True
    """

    temperature: Tensor

    def __init__(self, model: nn.Module, temperature: float) -> None:
        super().__init__()
        self.model = model
        # float64: where it is saved it loses nothing; of no dimension, so that the logits keep their kind.
        self.register_buffer("temperature", torch.tensor(_checked(temperature, "TemperatureScaled"), dtype=torch.float64))

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        logits = self.model(*args, **kwargs)
        if not isinstance(logits, Tensor) or not logits.is_floating_point():
            raise problem(
                "TemperatureScaled",
                expected="a model that returns a tensor of logits",
                got=describe(logits),
                remedy="divide the logits in its output by the temperature where they are used",
                error=TypeError,
            )
        return logits / self.temperature


def _checked(temperature: Any, function: str) -> float:
    try:
        # numpy's and torch's numbers too, but no text.
        t = math.nan if isinstance(temperature, str) else float(temperature)
    except (TypeError, ValueError, RuntimeError):
        t = math.nan
    if not 0 < t < math.inf:
        got = repr(temperature) if not isinstance(temperature, Tensor) else describe(temperature)
        raise problem(function, expected="a finite temperature > 0", got=got, remedy="pass one number, as 1.4")
    return t


def _check_layer(name: str, layer: nn.Module) -> None:
    """Only what torch's own forward pass makes of a plain weight is linear in it for certain."""
    kind = next((kind for kind in AFFINE if isinstance(layer, kind)), None)
    expected = f"{name}: a linear layer or convolution of torch with a plain weight"
    wrap = "wrap the model: TemperatureScaled(model, temperature)"
    if kind is None:
        remedy = f"name the last linear layer or convolution with layer=..., or {wrap}"
        raise problem("fold_temperature", expected=expected, got=type(layer).__name__, remedy=remedy, error=TypeError)
    weight = layer._parameters.get("weight")
    if hasattr(layer, "parametrizations") or weight is None:
        got = f"a {kind.__name__} whose weight is computed from other parameters (weight norm, spectral norm, pruning)"
        remedy = f"make it plain (torch.nn.utils.remove_weight_norm, parametrize.remove_parametrizations), or {wrap}"
        raise problem("fold_temperature", expected=expected, got=got, remedy=remedy)
    same = all(getattr(type(layer), own, None) is getattr(kind, own, None) for own in ("forward", "_conv_forward"))
    if not same or "forward" in vars(layer):
        got = f"{type(layer).__name__}, which has a forward pass of its own"
        raise problem("fold_temperature", expected=expected, got=got, remedy=wrap)
    if weight.dtype not in (torch.float32, torch.float64):
        raise _rounded("fold_temperature", f"{name}.weight", weight)
    if not weight.numel() or type(weight) not in (nn.Parameter, Tensor):
        remedy = f"run the model once before, or {wrap}"
        raise problem(
            "fold_temperature", expected=expected, got=f"{type(weight).__name__} {tuple(weight.shape)}", remedy=remedy
        )


def _check_untied(name: str, layer: nn.Module, model: nn.Module) -> None:
    own = {parameter.data_ptr() for parameter in layer.parameters()}
    for other_name, other in model.named_modules():
        if other is not layer and any(p is not None and p.data_ptr() in own for p in other._parameters.values()):
            expected = f"{name} to have its weight for itself"
            remedy = "wrap the model: TemperatureScaled(model, temperature)"
            raise problem("fold_temperature", expected=expected, got=f"one that is {other_name}'s too", remedy=remedy)


def _check_entry(stem: str, state: Mapping[str, Any]) -> None:
    key = f"{stem}weight"
    if not isinstance(state.get(key), Tensor):
        alike = [other for other in state if other.endswith(key.split(".", 1)[-1]) or other.startswith(stem)]
        got = f"{', '.join(map(repr, alike[:3]))}" if alike else f"{len(state)} others"
        remedy = "check layers and prefix; a layer with weight norm has to be made plain before it is saved"
        raise problem("fold_checkpoint", expected=f"an entry {key!r}", got=got, remedy=remedy)
    weight = state[key]
    if weight.dtype not in (torch.float32, torch.float64):
        raise _rounded("fold_checkpoint", key, weight)
    for other, value in state.items():
        if other != key and isinstance(value, Tensor) and value.numel() and value.data_ptr() == weight.data_ptr():
            remedy = "wrap the model: TemperatureScaled(model, temperature)"
            raise problem("fold_checkpoint", expected=f"{key!r} to be no other entry", got=f"{other!r}", remedy=remedy)


def _rounded(function: str, name: str, weight: Tensor) -> Exception:
    expected = f"{name} in float32 or float64"
    remedy = "fold before converting: half precision rounds the weights anew, so that the argmax could change"
    return problem(function, expected=expected, got=describe(weight), remedy=remedy)


def _folded_already(function: str, held: float) -> Exception:
    remedy = "start from the original weights"
    return problem(function, expected="weights into which nothing is folded", got=f"T = {held:g} in them", remedy=remedy)


def _divided(function: str, value: Tensor, t: float) -> Tensor:
    new = value.detach() / t
    if bool(torch.isfinite(value).all()) and not bool(torch.isfinite(new).all()):
        raise problem(function, expected="weights that stay finite", got=f"a temperature of {t:g}", remedy="pass a larger one")
    return new


def _write(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for parameter, value in zip(parameters, values):
            parameter.copy_(value)


def _norm(weight: Tensor) -> float:
    return float(weight.detach().double().norm())


def _state_of(checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
    inner = checkpoint.get("state_dict")
    return inner if isinstance(inner, Mapping) else checkpoint


def _logits(model: nn.Module, image: Tensor, logits_of: Optional[Callable[[Any], Tensor]]) -> Tensor:
    with evaluating(model, of=[image]):
        output = model(image)
    found = output if logits_of is None else logits_of(output)
    if isinstance(found, Tensor):  # of any shape: what is divided by T may be one channel, or vectors
        return found
    return Outputs(logits_of).logits("fold_temperature", output, image.shape[2:])  # raises, and says where logits may be


def _check_logits(expected: Tensor, found: Tensor) -> None:
    apart = float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-30))
    if not apart <= _CLOSE:
        raise problem(
            "fold_temperature",
            expected="logits that are those before, divided by T",
            got=f"a difference of {apart:.1%} of the largest",
            remedy='name the right layer(s) with layer="...", or wrap the model: TemperatureScaled(model, temperature)',
        )
