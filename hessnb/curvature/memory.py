"""How much memory there is."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from hessnb.errors import whole_number

# Where Linux tells how much memory is free, and how much a container (cgroup v2) may take.
_MEMINFO, _CONTAINER = Path("/proc/meminfo"), Path("/sys/fs/cgroup")


def available_memory(device: torch.device) -> int:
    """Return how many bytes of memory are free on a device.

    For the CPU those that need no swapping, within the limit of the container if there is one; for CUDA with those that
    PyTorch holds ready for tensors to come.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + (
            torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        )
    try:
        free = int(_facts(_MEMINFO, ":")["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):  # not Linux
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    try:
        limit, used = (int((_CONTAINER / name).read_text()) for name in ("memory.max", "memory.current"))
        reclaimable = int(_facts(_CONTAINER / "memory.stat", " ")["inactive_file"])
    except (OSError, KeyError, ValueError):  # no container, or one without a limit, which is "max"
        return free
    return min(free, max(0, limit - used + reclaimable))


def at_a_time(memory: int | None, device: torch.device) -> int:
    """Return how many bytes may be used at a time: ``memory``, or 1 GiB, or on CUDA an eighth of what is free.

    Raises InputError for a memory that is no whole number, or below zero.
    """
    if memory is not None:
        return whole_number("memory", memory, 0)
    return available_memory(device) // 8 if device.type == "cuda" else 1 << 30


def _facts(path: Path, separator: str) -> dict[str, str]:
    """Return the lines of one of the kernel's files, name by value."""
    return dict(line.split(separator, 1) for line in path.read_text().splitlines() if separator in line)


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
