"""Full float32 precision inside, whatever the user's switches say outside."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def full_precision() -> Iterator[None]:
    """Switch TF32 and bfloat16 products off inside and restore them afterwards.

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
        yield
    finally:
        if older:
            torch.set_float32_matmul_precision(older[0])
            cudnn.allow_tf32 = older[1]
        for switch, precision in zip(switches, newer, strict=True):
            switch.fp32_precision = precision
