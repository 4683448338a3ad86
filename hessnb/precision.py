"""The precision of products in float32: full, with kernels that can be differentiated twice, or CUDA's fast TF32."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

_backends: Any = torch.backends
_CUDA = (_backends.cuda.matmul, _backends.cudnn.conv, _backends.cudnn.rnn)
_CPU = (_backends.mkldnn.matmul, _backends.mkldnn.conv, _backends.mkldnn.rnn)


@contextmanager
def full_precision() -> Iterator[None]:
    """Switch TF32, bfloat16 products and autocasting off inside and restore them afterwards.

    TF32's 10 mantissa bits would drown a residual of 1e-4.
    """
    with _switched(_CUDA + _CPU, "ieee", "highest"), ExitStack() as stack:
        for device in ("cpu", "cuda")[: 1 + torch.cuda.is_available()]:
            stack.enter_context(torch.autocast(device, enabled=False))
        # Other kernels of attention cannot be differentiated twice.
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        yield


@contextmanager
def tf32() -> Iterator[None]:
    """Let CUDA round the factors of float32 products to TF32 inside, and restore the switches afterwards.

    Several times as fast, and exact enough for the steps of a training.
    """
    with _switched(_CUDA, "tf32", "high"):
        yield


@contextmanager
def _switched(switches: Sequence[Any], precision: str, matmul_precision: str) -> Iterator[None]:
    """Set PyTorch's switches inside and restore them afterwards.

    It has two sets of them, and reading the older one raises once the newer one was used: the older one is set with the
    newer as long as it can be read.
    """
    cudnn = _backends.cudnn
    newer = [switch.fp32_precision for switch in _CUDA + _CPU]
    try:
        older = torch.get_float32_matmul_precision(), cudnn.allow_tf32
    except RuntimeError:
        older = None
    try:
        if older:
            torch.set_float32_matmul_precision(matmul_precision)
            cudnn.allow_tf32 = precision == "tf32"
        for switch in switches:
            switch.fp32_precision = precision
        yield
    finally:
        if older:
            torch.set_float32_matmul_precision(older[0])
            cudnn.allow_tf32 = older[1]
        for switch, before in zip(_CUDA + _CPU, newer, strict=True):
            switch.fp32_precision = before
