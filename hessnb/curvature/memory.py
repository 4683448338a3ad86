"""How much memory there is."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def available_memory(device: torch.device) -> int:
    """Return how many bytes of memory are free on a device; for the CPU, those that need no swapping."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as file:
            facts = dict(line.split(":", 1) for line in file)
        return int(facts["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):  # not Linux
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def held_bytes(build: Callable[[], object], own: Iterable[Tensor]) -> int:
    """Return how many bytes the autograd graphs that ``build`` makes hold on to, beside the tensors ``own``."""
    known = {t.untyped_storage().data_ptr() for t in own}
    held: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        build()
    return sum(held.values())
