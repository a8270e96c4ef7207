"""A learner's state as plain tensors under flat names, as a host's checkpoint wants it."""

from typing import Any, Dict, Mapping, Union

import torch
from torch import Tensor

from ..learners import Learner

NET, OPTIMIZER = "temperature_net.", "meta_optimizer."


def flatten(learner: Learner) -> Dict[str, Tensor]:
    """`temperature_net.<name>`, `meta_optimizer.<parameter>.<name>`, `generator` and `iteration`: everything that a resumed run
    needs. The optimizer's settings are not among it: they are the config's."""
    state = learner.state_dict()
    flat = {NET + name: value.detach().clone() for name, value in state["temperature_net"].items()}
    for index, values in state["meta_optimizer"]["state"].items():
        for name, value in values.items():
            flat[f"{OPTIMIZER}{index}.{name}"] = torch.as_tensor(value).detach().clone()
    return {**flat, "generator": state["generator"], "iteration": torch.tensor(state["iteration"])}


def restore(flat: Mapping[str, Tensor], learner: Learner) -> None:
    """Continue exactly where `flatten` was called.

    Raises:
        ValueError: something is missing, or another net's; nothing has changed then.
    """
    device = next(learner.temperature_net.parameters()).device
    moments: Dict[int, Dict[str, Any]] = {}
    for key, value in flat.items():
        if key.startswith(OPTIMIZER):
            index, name = key[len(OPTIMIZER) :].split(".", 1)
            moments.setdefault(int(index), {})[name] = _as_adam_has_it(name, value)
    state: Dict[str, Any] = {
        "learner": type(learner).__name__,  # no tensor could say it; another one's net has other shapes
        "temperature_net": {key[len(NET) :]: value.to(device) for key, value in flat.items() if key.startswith(NET)},
        "meta_optimizer": {"state": moments, "param_groups": learner.meta_optimizer.state_dict()["param_groups"]},
    }
    if "generator" in flat:
        state["generator"] = flat["generator"]
    if "iteration" in flat:
        state["iteration"] = int(flat["iteration"])
    learner.load_state_dict(state)


def _as_adam_has_it(name: str, value: Tensor) -> Union[Tensor, int]:
    """torch 1.7's Adam counts its steps in an int, later ones in a tensor."""
    if name == "step" and tuple(int(part) for part in torch.__version__.split(".")[:2]) < (1, 12):
        return int(value)
    return value.float() if name == "step" else value.clone()
