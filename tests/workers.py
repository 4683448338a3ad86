"""What the subprocesses of test_resume.py do; in a module of its own, so that a fork server can load it once."""

from __future__ import annotations

import resource
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from hessnb import training
from hessnb.errors import InputError
from hessnb.experiments.archive import import_
from hessnb.experiments.campaign import carry_out
from hessnb.experiments.grid import artefact
from hessnb.experiments.profile import load_profile
from hessnb.experiments.run import train_run
from hessnb.experiments.spec import DataSpec, ModelSpec, RunSpec
from hessnb.experiments.store import Store
from hessnb.training import Recipe, State

MESSAGE = "message.txt"
TRAININGS = "trainings.txt"
SPEC = RunSpec(
    data=DataSpec(name="mnist5k", n_train=250, n_test=50),
    model=ModelSpec(name="M1", width=0.2),
    recipe=Recipe(batch_size=20, lr=0.02, momentum=0.9, max_epochs=60, seed=3, decay_every=7, decay_factor=0.8),
)


def train(root: str, largest_file: int | None = None) -> None:
    """Train in the store at ``root``; with ``largest_file`` the system refuses to write more bytes into one
    file. An error that is meant to be read goes into the file MESSAGE in the store, and the exit code is 2. Each
    training that is begun leaves a line in the file TRAININGS beside the store.
    """
    torch.set_num_threads(1)
    whole = training.train

    def told(*args: Any, **settings: Any) -> State:
        with (Path(root).parent / TRAININGS).open("a") as file:
            file.write(f"{SPEC.label}\n")
        return whole(*args, **settings)

    training.train = told
    if largest_file is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    try:
        train_run(Store(root), SPEC)
    except InputError as error:
        (Path(root) / MESSAGE).write_text(str(error))
        sys.exit(2)


def campaign(root: str, budget: float | None = None) -> None:
    """Carry out table3 of the smoke profile in the store at ``root``."""
    torch.set_num_threads(1)
    carry_out(Store(root), artefact("table3").tasks(load_profile("smoke")), budget=budget)


def bring(root: str, paths: list[str]) -> None:
    """Import archives into the store at ``root``."""
    import_(Store(root), [Path(path) for path in paths])
