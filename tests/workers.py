"""What the subprocesses of test_resume.py do; in a module of its own, so that a fork server can load it once."""

from __future__ import annotations

import resource
import signal
import sys
from pathlib import Path

import torch

from hessnb.errors import InputError
from hessnb.experiments.run import train_run
from hessnb.experiments.spec import DataSpec, ModelSpec, RunSpec
from hessnb.experiments.store import Store
from hessnb.training import Recipe

MESSAGE = "message.txt"
SPEC = RunSpec(
    data=DataSpec(name="mnist5k", n_train=250, n_test=50),
    model=ModelSpec(name="M1", width=0.2),
    recipe=Recipe(batch_size=20, lr=0.02, momentum=0.9, max_epochs=60, seed=3, decay_every=7, decay_factor=0.8),
)


def train(root: str, largest_file: int | None = None) -> None:
    """Train in the store at ``root``; with ``largest_file`` the system refuses to write more bytes into one
    file. An error that is meant to be read goes into the file MESSAGE in the store, and the exit code is 2.
    """
    torch.set_num_threads(1)
    if largest_file is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    try:
        train_run(Store(root), SPEC)
    except InputError as error:
        (Path(root) / MESSAGE).write_text(str(error))
        sys.exit(2)
