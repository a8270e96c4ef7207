"""Which layers of a network make its logits: those that a temperature can be folded into."""

from typing import Any, Dict, List, Sequence, Tuple, Type, Union

from torch import nn

from .._check import problem

AFFINE: Tuple[Type[nn.Module], ...] = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
"""Layers whose output is linear in weight and bias together."""
_BEHIND = (nn.Identity, nn.Upsample, nn.Dropout, nn.Dropout2d, nn.Dropout3d)  # what scales with its input, when evaluated
_ATTENTION = "scale_attention"  # HRDA's: weighs its logits, and makes none
_LISTED = 6


def classifiers(model: nn.Module, *, layer: Union[str, Sequence[str], None] = None) -> Dict[str, nn.Module]:
    """The layers whose outputs, summed or averaged, are a network's logits, by their names in it.

    Found are: a layer itself; the end of an `nn.Sequential`; mmseg's `decode_head` (`conv_seg`, SegFormer's `linear_pred`, the
    branches that DeepLab-v2 sums; the last stage of a cascade; HRDA's head of all scales without its attention); transformers'
    `decode_head.classifier`; torchvision's `classifier` (both of LRASPP). Auxiliary heads are not among them.

    Args:
        model: may be wrapped for several GPUs or compiled.
        layer: the name, or the names, to take instead; as the model has it without its wrapper will do.

    Raises:
        ValueError: nothing of the kind; the message names the layers that could be it. A name that the model lacks.

    Example:
        >>> list(classifiers(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.Upsample(scale_factor=2))))
        ['2']

    Source: lhoyer/DAFormer, HRDA and MIC for the heads; HRDA (Hoyer et al., ECCV 2022), equation 7: its fused logits are
    convex combinations of those of its scales.
    """
    if layer is not None:
        return _named(model, [layer] if isinstance(layer, str) else list(layer))
    found = _found(model)
    if found:
        return found
    raise problem(
        "classifiers",
        expected="a model whose last layer is where mmseg, torchvision or transformers have it",
        got=type(model).__name__,
        remedy=_candidates(model),
    )


def _found(model: nn.Module) -> Dict[str, nn.Module]:
    prefix, inner = _unwrapped(model)
    for find in (_at_the_end, _of_decode_head, _of_classifier):
        found = find(inner)
        if found:
            return {(prefix + name).rstrip("."): module for name, module in found.items()}
    return {}


def _named(model: nn.Module, names: Sequence[str]) -> Dict[str, nn.Module]:
    modules, (prefix, _) = dict(model.named_modules()), _unwrapped(model)
    found = {name if name in modules else prefix + name: name for name in names}
    for full, name in found.items():
        if full not in modules:
            expected = f"layer to name modules of {type(model).__name__}"
            raise problem("classifiers", expected=expected, got=repr(name), remedy=_candidates(model))
    return {full: modules[full] for full in found}


def _unwrapped(model: nn.Module) -> Tuple[str, nn.Module]:
    """What is inside of DataParallel and its kin, and of a compiled module."""
    prefix = ""
    while [name for name, _ in model.named_children()] in (["module"], ["_orig_mod"]):
        ((name, model),) = model.named_children()
        prefix += f"{name}."
    return prefix, model


def _at_the_end(module: nn.Module, name: str = "") -> Dict[str, nn.Module]:
    """A layer, or the last one of a sequence but for what scales with its input."""
    if isinstance(module, AFFINE):
        return {name: module}
    if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
        for child_name, child in reversed(list(module.named_children())):
            if not isinstance(child, _BEHIND):
                return _at_the_end(child, f"{name}.{child_name}".lstrip("."))
    return {}


def _of_decode_head(model: nn.Module) -> Dict[str, nn.Module]:
    name, head = "decode_head", getattr(model, "decode_head", None)
    if isinstance(head, nn.ModuleList) and len(head):  # a cascade, of which the last stage answers
        name, head = f"decode_head.{len(head) - 1}", head[-1]
    if not isinstance(head, nn.Module):
        return {}
    found: Dict[str, nn.Module] = {}
    for inner_name, inner in head.named_modules(prefix=name):
        if _ATTENTION not in inner_name.split("."):
            found.update(_of_head(inner_name, inner))
    return found


def _of_head(name: str, head: nn.Module) -> Dict[str, nn.Module]:
    """The layers of one head, not of what is inside of it."""
    # SegFormer's head has a `conv_seg` too, which it does not use.
    for own in ("linear_pred", "conv_seg", "classifier"):
        layer = getattr(head, own, None)
        if isinstance(layer, AFFINE):
            return {f"{name}.{own}": layer}
    branches = getattr(head, "aspp_modules", None)
    if not isinstance(branches, nn.ModuleList):
        return {}
    # Without `conv_seg`, and without a norm or an activation behind the branches, the head sums them: DeepLab-v2.
    bare: List[Any] = [branch for branch in branches if isinstance(getattr(branch, "conv", None), AFFINE) and _is_bare(branch)]
    if len(bare) < len(branches):
        return {}
    return {f"{name}.aspp_modules.{i}.conv": branch.conv for i, branch in enumerate(bare)}


def _is_bare(branch: nn.Module) -> bool:
    return not (getattr(branch, "with_norm", False) or getattr(branch, "with_activation", False))


def _of_classifier(model: nn.Module) -> Dict[str, nn.Module]:
    end = getattr(model, "classifier", None)
    if not isinstance(end, nn.Module):
        return {}
    found = _at_the_end(end, "classifier")
    if found:
        return found
    both = [getattr(end, name, None) for name in ("low_classifier", "high_classifier")]
    if all(isinstance(layer, AFFINE) for layer in both):  # LRASPP, which sums them
        return {f"classifier.{name}": getattr(end, name) for name in ("low_classifier", "high_classifier")}
    return {}


def _candidates(model: nn.Module) -> str:
    """What to do: the last layer of every part of the model, the last part first."""
    last: List[str] = []
    for name, child in model.named_children():
        layers = [(inner, layer) for inner, layer in child.named_modules(prefix=name) if isinstance(layer, AFFINE)]
        # A part may be a whole model, as in a trainer of student and teacher.
        of_part = [(f"{name}.{inner}".rstrip("."), layer) for inner, layer in _found(child).items()] or layers[-1:]
        for inner, layer in of_part[:1]:
            outputs = getattr(layer, "out_channels", getattr(layer, "out_features", "?"))
            last.insert(0, f'"{inner}" ({type(layer).__name__} with {outputs} outputs)')
    if not last:
        return "wrap it: TemperatureScaled(model, temperature)"
    listed = ", ".join(last[:_LISTED]) + (", ..." if len(last) > _LISTED else "")
    return f'say which with layer="...", one of {listed}; or wrap it: TemperatureScaled(model, temperature)'
