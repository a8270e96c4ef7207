"""What judges pixels: torch's operations, the same compiled, the sweep of `fused`, or the launch of `triton_kernel`."""

import functools
import os
from importlib.util import find_spec
from typing import Any, Dict, Optional

import torch
from torch import Tensor

from .._check import check_choice, problem
from .pieces import Batch
from .pixels import judge

BACKENDS = ("numba", "triton", "torch", "compile")
# Scores from which on the sweep is worth a second for loading it, and at the first time ten for compiling it.
_WORTH_LOADING = 4_000_000


def check_backend(function: str, backend: Optional[str]) -> None:
    """`ValueError` unless it is one of `BACKENDS` or None, `RuntimeError` if it is not to be had here."""
    if backend is None:
        return
    check_choice(function, "backend", backend, BACKENDS)
    if backend == "numba" and not _has_numba():
        remedy = "pip install 'dacal-addon[fast]', or pass backend='torch'"
        raise problem(function, expected="numba with backend='numba'", got="none", remedy=remedy, error=RuntimeError)
    if backend == "triton" and not _has_triton():
        remedy = "use a torch built for CUDA, >= 2.6, which brings it, or pass backend='torch'"
        raise problem(function, expected="triton >= 3.2 with backend='triton'", got="none", remedy=remedy, error=RuntimeError)
    if backend == "compile" and not hasattr(torch, "compile"):
        remedy, got = "pass backend='torch', or use torch >= 2.0", f"torch {torch.__version__}"
        raise problem(function, expected="torch.compile with backend='compile'", got=got, remedy=remedy, error=RuntimeError)


def backend_for(batch: Batch, backend: Optional[str]) -> str:
    """Which one judges: the launch what is on a GPU; on a CPU the sweep takes scores alone, and by itself large batches.

    Example:
        >>> backend_for(Batch(torch.zeros(1, 2, 4), torch.zeros(1, 4), None), None)
        'torch'
    """
    if backend in ("torch", "compile"):
        return backend
    device = batch.label.device
    if device.type == "cuda" and backend != "numba" and _has_triton() and _kernel().works(device):
        return "triton"
    if device.type != "cpu":
        return "torch"
    # Triton's interpreter, which has to be asked for in the environment, is for tests.
    if backend == "triton":
        return "triton" if os.environ.get("TRITON_INTERPRET") == "1" else "torch"
    if not isinstance(batch.scores, Tensor) or not _has_numba():
        return "torch"
    return "numba" if backend == "numba" or batch.scores.numel() >= _WORTH_LOADING else "torch"


@functools.lru_cache(maxsize=None)
def functions_of(backend: str) -> Dict[str, Any]:
    """What `count_` is told for it."""
    if backend == "numba":
        from .fused import sweep_  # here: numba is an extra, and takes a while to load

        return {"sweep": sweep_}
    if backend == "triton":
        return {"launch": _kernel().launch_}
    return {"compiled": torch.compile(judge)} if backend == "compile" else {}


def _kernel() -> Any:
    from . import triton_kernel  # here: only some builds of torch bring triton

    return triton_kernel


@functools.lru_cache(maxsize=None)
def _has_triton() -> bool:
    """As torch >= 2.6 brings it; before, its language lacked some of what is used."""
    try:
        import triton
    except ImportError:
        return False
    return tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 2)


@functools.lru_cache(maxsize=None)
def _has_numba() -> bool:
    return find_spec("numba") is not None
