"""Real subprocesses, killed, starved of disk, and set upon the same run: nothing is lost, and the bits are the same."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest
import torch
import workers

from hessnb.experiments import profile
from hessnb.experiments.results import RunResult
from hessnb.experiments.store import Store

KILLS = 20

servers = multiprocessing.get_context("forkserver")
servers.set_forkserver_preload(["workers"])


def start(root: Path, largest_file: int | None = None) -> ForkServerProcess:
    process = servers.Process(target=workers.train, args=(str(root), largest_file))
    process.start()
    return process


def ended(root: Path) -> tuple[RunResult, dict[str, torch.Tensor]]:
    store = Store(root)
    result = store.result(workers.SPEC)
    assert result is not None
    return result, store.weights(workers.SPEC)


def assert_same_bits(root: Path, reference: Path) -> None:
    (result, weights), (expected, expected_weights) = ended(root), ended(reference)
    assert [replace(line, seconds=0) for line in result.history] == [
        replace(line, seconds=0) for line in expected.history
    ]
    assert weights.keys() == expected_weights.keys()
    assert all(torch.equal(weights[name], expected_weights[name]) for name in weights)
    assert Store(root).check() == []


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of a training that was never stopped."""
    root = tmp_path_factory.mktemp("reference") / "store"
    process = start(root)
    process.join()
    assert process.exitcode == 0
    return root


def kill(process: ForkServerProcess) -> None:
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL


def stamp(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0


def test_training_killed_at_twenty_random_moments_ends_in_the_same_bits(tmp_path: Path, reference: Path) -> None:
    root, chance = tmp_path / "store", random.Random(18_10)
    checkpoint = root / "runs" / workers.SPEC.slug / "checkpoint.safetensors"
    epochs = []
    for _ in range(KILLS):
        earlier = stamp(checkpoint)
        process = start(root)
        while stamp(checkpoint) == earlier:  # it trains, one more epoch is on the disk: now, at any moment
            assert process.is_alive()
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.06))
        kill(process)
        state = Store(root).checkpoint(workers.SPEC)
        assert state is not None
        epochs.append(state.epoch)
        assert Store(root).check() == []
    assert all(earlier < later for earlier, later in itertools.pairwise(epochs)), "a kill lost a finished epoch"
    assert epochs[-1] < workers.SPEC.recipe.max_epochs, "the last kills must have hit the training"
    process = start(root)
    process.join()
    assert process.exitcode == 0
    assert_same_bits(root, reference)


def test_two_processes_at_the_same_run_train_it_once(tmp_path: Path, reference: Path) -> None:
    root = tmp_path / "store"
    both = [start(root), start(root)]
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    assert (tmp_path / workers.TRAININGS).read_text().splitlines() == [workers.SPEC.label]
    assert_same_bits(root, reference)


def test_full_disk_stops_with_one_line_and_loses_nothing(tmp_path: Path, reference: Path) -> None:
    root = tmp_path / "store"
    checkpoint = root / "runs" / workers.SPEC.slug / "checkpoint.safetensors"
    process = start(root)
    while not checkpoint.exists():
        time.sleep(0.001)
    kill(process)
    before = checkpoint.read_bytes()
    starved = start(root, largest_file=10_000)
    starved.join()
    assert starved.exitcode == 2
    (message,) = (root / workers.MESSAGE).read_text().splitlines()
    assert "cannot write" in message
    assert "nothing that was there is lost" in message
    assert checkpoint.read_bytes() == before
    assert not list(root.rglob("*.part"))
    process = start(root)
    process.join()
    assert_same_bits(root, reference)


def _long_profile() -> str:
    """Return the smoke profile with one batch size of M1, trained for long enough to interrupt."""
    text = (Path(profile.__file__).parent / "profiles" / "smoke.toml").read_text()
    changes = {
        "batch_sizes = [20, 100]": "batch_sizes = [10]",
        "loss_target = 0.2": "loss_target = 1e-9",
        "max_epochs = 40": "max_epochs = 100000",
    }
    for old, new in changes.items():
        assert text.count(old) == 1
        text = text.replace(old, new)
    return text


def test_interrupt_says_so_exits_130_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "long.toml").write_text(_long_profile())
    store = tmp_path / "store"
    command = [sys.executable, "-m", "hessnb", "run", "table7", "--profile", "long.toml", "--store", str(store)]
    # A shell lets what it starts in the background ignore the signal, and tests may be among that.
    heeding = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, preexec_fn=heeding)
    while not list(store.glob("runs/*/checkpoint.safetensors")):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, message = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "goes on from there" in message
    assert "Traceback" not in message
    assert Store(store).check() == []
    assert not list(store.rglob("*.part"))
