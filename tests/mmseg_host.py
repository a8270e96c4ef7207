"""The real mmsegmentation 1.x for tests, and a small segmentor of its parts.

The stand-in for its older self has its name: only one of both may be loaded at a time.
"""

import importlib
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

EXAMPLES = Path(__file__).parent.parent / "examples/mmengine"
OURS = "dacal_addon.integrations.mmengine"
_kept = {}


def load():
    """Our integration; mmsegmentation registers its classes at its first import, and is not imported a second time."""
    sys.modules.update(_kept)
    if not _kept:
        sys.path.insert(0, str(EXAMPLES))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of each other's age
                importlib.import_module("without_ops")  # before mmseg
                importlib.import_module("mmseg.models")
                importlib.import_module("mmseg.datasets")
                importlib.import_module("mmseg.evaluation")
                importlib.import_module("mmseg.apis")
                importlib.import_module(OURS)
        finally:
            sys.path.remove(str(EXAMPLES))
        _register()
        _kept.update({name: module for name, module in sys.modules.items() if name.split(".")[0] == "mmseg" or name == OURS})
    return sys.modules[OURS]


@contextmanager
def loaded():
    """Inside, `mmseg` is mmsegmentation 1.x."""
    try:
        yield load()
    finally:
        for name in _kept:
            sys.modules.pop(name, None)


def _register():
    from mmengine.optim import OptimWrapper
    from mmengine.registry import init_default_scope
    from mmseg.registry import MODELS, OPTIM_WRAPPERS

    init_default_scope("mmseg")

    @MODELS.register_module()
    class TinyBackbone(nn.Module):
        """Features at half resolution, and at full."""

        def __init__(self, dropout=0.0, norm=True):
            super().__init__()
            self.first = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6) if norm else nn.Tanh())
            self.second = nn.Sequential(nn.Tanh(), nn.Dropout(dropout), nn.Conv2d(6, 8, 3, stride=2, padding=1))

        def forward(self, x):
            full = self.first(x)
            return full, self.second(full)

    @OPTIM_WRAPPERS.register_module()
    class HalfOnCpu(OptimWrapper):
        """mmengine's AmpOptimWrapper wants a GPU; this one enters autocast as it does."""

        @contextmanager
        def optim_context(self, model):
            with super().optim_context(model), torch.autocast("cpu", dtype=torch.bfloat16):
                yield


CE = {"type": "CrossEntropyLoss", "avg_non_ignore": True}


def head(channels, index, **changes):
    """The config of a small head of one convolution."""
    return {
        "type": "FCNHead",
        "in_channels": channels,
        "in_index": index,
        "channels": 5,
        "num_convs": 1,
        "concat_input": False,
        "dropout_ratio": 0.0,
        "num_classes": 3,
        "norm_cfg": None,
        "align_corners": False,
        "loss_decode": dict(CE),
        **changes,
    }


def segmentor(kind="DACalEncoderDecoder", *, dropout=0.0, norm=True, decode=None, auxiliary=None, size=(16, 16), **options):
    """The config of a small segmentor with an auxiliary head; `options` are those of `dacal`."""
    config = {
        "type": kind,
        "data_preprocessor": {"type": "SegDataPreProcessor", "mean": [100.0] * 3, "std": [50.0] * 3, "size": size},
        "backbone": {"type": "TinyBackbone", "dropout": dropout, "norm": norm},
        "decode_head": decode or head(8, 1),
        "auxiliary_head": auxiliary or head(6, 0, loss_decode={**CE, "loss_weight": 0.4}),
        "train_cfg": {},
        "test_cfg": {"mode": "whole"},
    }
    return config if kind == "EncoderDecoder" else {**config, "dacal": {"threshold": 0.6, **options}}
