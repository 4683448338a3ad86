"""Where a number came from: code, versions, machine, time."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

import hessnb


def provenance(*, device: torch.device, seed: int, seconds: float, **more: object) -> dict[str, Any]:
    """Return the provenance of a result computed just now: ``seconds`` of work, peak memory of this process in MiB.

    ``more`` is what else there is to say of how it was computed.
    """
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform != "darwin" else 1024**2)
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": COMMIT,
        "hessnb": hessnb.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "seed": seed,
        "seconds": round(seconds, 3),
        "peak_memory_mib": round(peak),
        **more,
    }


def line(label: str, provenance: Mapping[str, Any]) -> str:
    """Return where a result came from in one readable line; ``label`` is that of the run, or of a measure of it."""
    seed, commit = provenance.get("seed"), str(provenance.get("commit") or "")
    seconds, threads = provenance.get("seconds"), provenance.get("threads")
    told = (
        label,
        "seed unknown" if seed is None else f"seed {seed}",
        f"commit {commit[:10]}{'+changes' if '+' in commit else ''}" if commit else "commit unknown",
        f"{provenance.get('device', 'machine unknown')}" + (f" ({threads} threads)" if threads and threads > 1 else ""),
        str(provenance["date"])[:10] if "date" in provenance else "date unknown",
        "time unknown" if seconds is None else f"{seconds:,.1f} s" if seconds < 100 else f"{seconds:,.0f} s",
    )
    return ", ".join(told)


def _commit() -> str | None:
    """Return the commit of the package's own repository, with ``+changes`` if it was modified; None outside of one."""
    folder = Path(hessnb.__file__).parent

    def git(*args: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(folder), *args], capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if git("ls-files", "--error-unmatch", "__init__.py") is None:  # a copy inside somebody else's repository
        return None
    head = git("rev-parse", "HEAD")
    return f"{head}+changes" if head and git("status", "--porcelain", "--", str(folder)) else head


# Taken when the package is loaded: what is on the disk when a long run ends may be something else.
COMMIT = _commit()


@lru_cache
def device_name(device: torch.device) -> str:
    """Return a readable name of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
