"""Full float32 precision, and kernels that can be differentiated twice, whatever the switches say outside."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


@contextmanager
def full_precision() -> Iterator[None]:
    """Switch TF32, bfloat16 products and autocasting off inside and restore them afterwards.

    TF32's 10 mantissa bits would drown a residual of 1e-4. PyTorch has two sets of switches, and reading the older one
    raises once the newer one was used: the older one is set with the newer as long as it can be read.
    """
    backends: Any = torch.backends
    cudnn, mkldnn = backends.cudnn, backends.mkldnn
    switches = (backends.cuda.matmul, cudnn.conv, cudnn.rnn, mkldnn.matmul, mkldnn.conv, mkldnn.rnn)
    newer = [switch.fp32_precision for switch in switches]
    try:
        older = torch.get_float32_matmul_precision(), cudnn.allow_tf32
    except RuntimeError:
        older = None
    try:
        if older:
            torch.set_float32_matmul_precision("highest")
            cudnn.allow_tf32 = False
        for switch in switches:
            switch.fp32_precision = "ieee"
        with ExitStack() as stack:
            for device in ("cpu", "cuda")[: 1 + torch.cuda.is_available()]:
                stack.enter_context(torch.autocast(device, enabled=False))
            # Other kernels of attention cannot be differentiated twice.
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            yield
    finally:
        if older:
            torch.set_float32_matmul_precision(older[0])
            cudnn.allow_tf32 = older[1]
        for switch, precision in zip(switches, newer, strict=True):
            switch.fp32_precision = precision
