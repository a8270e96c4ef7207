"""The state of what learns the temperatures as plain tensors under flat names, as a host's checkpoint wants them."""

from typing import Any, Dict, Mapping, Union

import torch
from torch import Tensor, nn

from .._check import problem

Counters = Dict[str, int]


def flatten(net: nn.Module, optimizer: torch.optim.Optimizer, counters: Counters) -> Dict[str, Tensor]:
    """`temperature_net.<name>`, `meta_optimizer.<parameter>.<name>` and the counters."""
    flat = {f"temperature_net.{name}": value.detach().clone() for name, value in net.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            flat[f"meta_optimizer.{index}.{name}"] = torch.as_tensor(value).detach().clone()
    flat.update({name: torch.tensor(value) for name, value in counters.items()})
    return flat


def restore(flat: Mapping[str, Tensor], net: nn.Module, optimizer: torch.optim.Optimizer, counters: Counters) -> Counters:
    """Put what `flatten` gave into the net and the optimizer; returns the counters, all those named in `counters`.

    Raises:
        ValueError: something is missing or of another shape; nothing has changed then.
    """
    device = next(net.parameters()).device
    own = net.state_dict()
    loaded = {name: flat.get(f"temperature_net.{name}") for name in own}
    for name, value in loaded.items():
        if value is None or value.shape != own[name].shape:
            raise problem(
                "uda.dacal",
                expected=f"a checkpoint with {name} of the temperature net, {tuple(own[name].shape)}",
                got="none" if value is None else f"{tuple(value.shape)}",
                remedy="resume with the learn, the hidden_channels and the classes that it was written with",
            )
    missing = [name for name in counters if name not in flat]
    if missing:
        remedy = "resume from a checkpoint that DACalDACS wrote"
        raise problem("uda.dacal", expected=f"a checkpoint with {', '.join(missing)}", got="none", remedy=remedy)
    state: Dict[int, Dict[str, Any]] = {}
    settings = optimizer.state_dict()
    for key, value in flat.items():
        if key.startswith("meta_optimizer."):
            _, index, name = key.split(".", 2)
            state.setdefault(int(index), {})[name] = _as_adam_has_it(name, value)
    net.load_state_dict({name: value.to(device) for name, value in loaded.items() if value is not None})
    optimizer.load_state_dict({"state": state, "param_groups": settings["param_groups"]})
    return {name: int(flat[name]) for name in counters}


def _as_adam_has_it(name: str, value: Tensor) -> Union[Tensor, int]:
    """torch 1.7's Adam counts its steps in an int, later ones in a tensor."""
    if name == "step" and tuple(int(part) for part in torch.__version__.split(".")[:2]) < (1, 12):
        return int(value)
    return value.float() if name == "step" else value.clone()
