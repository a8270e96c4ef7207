"""Attention as in training: not the fused kernels that have no further derivative, nor those of inference."""

from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Iterator

import torch
from torch import nn


def plain_attention() -> "AbstractContextManager[Any]":
    """Inside, scaled dot-product attention is computed step by step: the fused kernels have neither a second nor a forward
    derivative."""
    if not hasattr(nn.functional, "scaled_dot_product_attention"):  # torch < 2 has no fused kernel
        return nullcontext()
    try:
        from torch.nn.attention import SDPBackend, sdpa_kernel
    except ImportError:  # torch 2.0 to 2.2
        return torch.backends.cuda.sdp_kernel(enable_flash=False, enable_math=True, enable_mem_efficient=False)
    return sdpa_kernel(SDPBackend.MATH)


@contextmanager
def no_inference_kernels() -> Iterator[None]:
    """Inside, transformer layers in eval mode whose parameters need no gradient compute what they compute when these do.

    Their fast path has no forward derivative, and treats padding otherwise.
    """
    mha: Any = getattr(torch.backends, "mha", None)
    if mha is None:  # torch < 2.3
        yield
        return
    enabled = mha.get_fastpath_enabled()
    try:
        mha.set_fastpath_enabled(False)
        yield
    finally:
        mha.set_fastpath_enabled(enabled)
