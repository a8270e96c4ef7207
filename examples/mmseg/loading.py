"""A trained student out of a host's config and checkpoint, as the host's `tools/test.py` builds it."""

import os
import sys
from typing import Any, Dict, Mapping, Tuple

import torch
from torch import nn

from dacal_addon._check import problem

# Before the student's names: in the trainer's checkpoints, which have the teacher and DA-Cal's state, too; in one of several
# GPUs; in one of the student alone.
PREFIXES = ("model.", "module.model.", "module.", "")


def prepare() -> torch.device:
    """Make the host's modules importable from the current folder, with a GPU or without; returns where to run."""
    sys.path.insert(0, os.getcwd())
    if torch.cuda.is_available():
        return torch.device("cuda")
    from try_on_cpu import run_without_gpu

    run_without_gpu()
    return torch.device("cpu")


def read_config(path: str) -> Any:
    """The config of an experiment, a script or the JSON file of its work folder, as for a test."""
    from mmcv import Config
    from tools.test import update_legacy_cfg

    config = update_legacy_cfg(Config.fromfile(path))
    config.model.update(pretrained=None, train_cfg=None)
    config.data.test.test_mode = True
    return config


def read_checkpoint(path: str) -> Dict[str, Any]:
    """What was saved, on the CPU: {"state_dict": ..., "meta": ...}; a bare state dict becomes one with no meta."""
    saved: Dict[str, Any] = torch.load(path, map_location="cpu")
    return saved if "state_dict" in saved else {"state_dict": saved}


def prefix_of(state: Mapping[str, Any]) -> str:
    """What is before the student's names in a checkpoint.

    Raises:
        ValueError: no decode head in it.
    """
    for prefix in PREFIXES:
        if any(name.startswith(f"{prefix}decode_head.") for name in state):
            return prefix
    expected = "a checkpoint with model.decode_head or decode_head in its state_dict"
    got = ", ".join(map(repr, list(state)[:3])) or "nothing in it"
    raise problem("loading", expected=expected, got=got, remedy="pass a checkpoint of the host, for example latest.pth")


def build_student(config: Any, state: Mapping[str, Any]) -> Tuple[Any, str]:
    """The student in evaluation mode, and what is before its names in the checkpoint."""
    from mmseg.models import build_segmentor

    prefix = prefix_of(state)
    student: nn.Module = build_segmentor(config.model, test_cfg=config.get("test_cfg"))
    student.load_state_dict({name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)})
    return student.eval(), prefix
