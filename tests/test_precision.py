"""hessnb.precision: the switches are set inside, and outside they are what they were."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize("context", ["full_precision", "tf32"])
def test_products_have_the_precision_inside_and_as_before_outside(context: str) -> None:
    subprocess.run([sys.executable, "-c", CHECK, context], check=True)


# Each setting has a process of its own: PyTorch has two sets of switches, and one spoils the other for good.
CHECK = """
import os
import sys
import torch
from hessnb import precision
b = torch.backends
NEWER = (b.cuda.matmul, b.cudnn.conv, b.cudnn.rnn, b.mkldnn.matmul, b.mkldnn.conv, b.mkldnn.rnn)
OLDER = (torch.get_float32_matmul_precision, lambda: b.cudnn.allow_tf32, lambda: b.cuda.matmul.allow_tf32)
PRODUCTS = {"full_precision": "ieee", "tf32": "tf32"}[sys.argv[1]]
MATMUL = {"full_precision": ["highest", False, False], "tf32": ["high", True, True]}[sys.argv[1]]
SETTINGS = (
    "pass",
    "torch.set_float32_matmul_precision('medium')",
    "torch.backends.cudnn.allow_tf32 = False",
    "torch.backends.fp32_precision = 'tf32'",
    "torch.backends.mkldnn.matmul.fp32_precision = 'bf16'",
)

def state():
    values = [switch.fp32_precision for switch in NEWER]
    for read in OLDER:
        try:
            values.append(read())
        except RuntimeError:
            values.append("unreadable")
    return values

def check(setting):
    exec(setting)
    before = state()
    try:
        with getattr(precision, sys.argv[1])():
            assert state()[:3] == [PRODUCTS] * 3
            assert PRODUCTS == "tf32" or state()[3:6] == ["ieee"] * 3  # a CPU has no TF32
            assert "unreadable" in before or state()[6:] == MATMUL
            raise RuntimeError("stop")
    except RuntimeError as error:
        assert str(error) == "stop"
    assert state() == before, (setting, before, state())

for setting in SETTINGS:
    child = os.fork()
    if not child:
        check(setting)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, setting
"""
