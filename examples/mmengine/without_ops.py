"""Import mmsegmentation 1.x where mmcv has no compiled operations, as mmcv-lite has none: nothing here needs them.

`import without_ops`, before mmseg. A model that does need one fails when it is built or used, and says which.
"""

import importlib.util
import sys
from types import ModuleType
from typing import Any


class _Missing(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*args: Any, **kwargs: Any) -> Any:
            raise RuntimeError(f"mmcv.ops.{name} is compiled, and this mmcv has no compiled operations; install mmcv itself")

        return missing


if importlib.util.find_spec("mmcv._ext") is None:
    sys.modules.setdefault("mmcv.ops", _Missing("mmcv.ops"))
