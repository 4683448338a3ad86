"""Fixtures shared by the tests: data sets, a small network, and a check that nothing was changed on the side."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import numpy as np
import pytest
import torch
from built import browser, html, site, visit  # noqa: F401 (the fixtures of tests/browser)
from torch import nn

from hessnb.data import Split, Splits, data_root, load, where
from hessnb.experiments.spec import RunSpec
from hessnb.experiments.store import Store
from hessnb.models import build


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Compute on one thread: the tests' tensors are small, and threads that share busy cores wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture
def published() -> Callable[[str], Splits]:
    """Return a function that loads a published set, and skips the test where the set is not found."""

    def load_or_skip(name: str) -> Splits:
        if where(name) is None:
            pytest.skip(f"{name} is not in {data_root()}: set HESSNB_DATA, or run hessnb data fetch {name}")
        return load(name)

    return load_or_skip


@pytest.fixture(scope="session")
def digits() -> Splits:
    """Return 300 training and 100 test digits of mnist5k; the tests must not write to them."""
    return load("mnist5k", n_train=300, n_test=100)


@pytest.fixture(scope="session")
def in_float64() -> Callable[[str], Splits]:
    """Return a function that loads 70 training and 30 test images of a set in float64: batches of 16 leave one of 6."""

    def loaded(name: str) -> Splits:
        data = load(name, n_train=70, n_test=30)
        train, test = (Split(split.images.double(), split.labels) for split in (data.train, data.test))
        return Splits(train, test, data.classes)

    return loaded


@pytest.fixture
def tiny_m1() -> nn.Module:
    """Return a float32 M1 of 1,163 weights, in train mode."""
    return build("M1", width=0.05, seed=0)


@pytest.fixture
def untouched() -> Callable[..., AbstractContextManager[None]]:
    """Return a context ``untouched(model)`` that fails when the model or a global random state has changed.

    Of the model it compares parameters, buffers, ``.grad`` and each module's mode, by identity and bit by bit.
    """

    @contextmanager
    def context(model: nn.Module | None = None) -> Iterator[None]:
        model = model or nn.Module()
        tensors = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters() if p.grad is not None)]
        values = [tensor.detach().clone() for tensor in tensors]
        modes = [module.training for module in model.modules()]
        randomness = random.getstate(), copy.deepcopy(np.random.get_state()), torch.get_rng_state()
        yield
        now = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters() if p.grad is not None)]
        assert [id(tensor) for tensor in now] == [id(tensor) for tensor in tensors]
        assert all(torch.equal(tensor, value) for tensor, value in zip(now, values, strict=True))
        assert [module.training for module in model.modules()] == modes
        assert random.getstate() == randomness[0]
        np.testing.assert_equal(np.random.get_state(), randomness[1])
        assert torch.equal(torch.get_rng_state(), randomness[2])

    return context


@pytest.fixture
def before_the_lock(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Store, RunSpec], None]], None]:
    """Return a function that has another process do something to a run just before this one gets its lock."""

    def does(work: Callable[[Store, RunSpec], None]) -> None:
        lock = Store.lock

        @contextmanager
        def late(store: Store, spec: RunSpec, *, wait: bool = True) -> Iterator[None]:
            with lock(store, spec, wait=wait):
                work(store, spec)
                yield

        monkeypatch.setattr(Store, "lock", late)

    return does
