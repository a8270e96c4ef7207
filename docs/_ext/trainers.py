"""What `dacal_addon.integrations` imports, for a reference that is built with the trainers or without them."""

import importlib
import importlib.util
import sys
import warnings
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, List

_NAMES = ("mmcv", "mmengine", "mmseg", "torchmetrics")
_WITHOUT_OPS = Path(__file__).resolve().parents[2] / "examples/mmengine"


def loaded() -> List[str]:
    """Import what is here; what is missing is named, for Sphinx to mock."""
    missing = [name for name in _NAMES if importlib.util.find_spec(name) is None]
    if not {"mmcv", "mmengine", "mmseg"} & set(missing):
        sys.path.insert(0, str(_WITHOUT_OPS))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of each other's ages
            importlib.import_module("without_ops")  # mmcv may lack its compiled operations
            importlib.import_module("mmseg.models")
    else:  # a mock is no class of which type() makes others, and mocks what it decorates
        _put("mmseg.models.segmentors", **{name: type(name, (), {}) for name in ("EncoderDecoder", "CascadeEncoderDecoder")})
        registry = SimpleNamespace(register_module=lambda **options: lambda kind: kind)
        _put("mmseg.registry", **dict.fromkeys(("DATASETS", "HOOKS", "METRICS", "MODELS"), registry))
    return missing


def _put(name: str, **content: Any) -> None:
    sys.modules[name] = ModuleType(name)
    vars(sys.modules[name]).update(content)
