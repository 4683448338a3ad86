"""hessnb.together: each network of those trained together becomes what it becomes alone."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace

import pytest
import torch
from torch import nn

from hessnb import together
from hessnb.data import Splits
from hessnb.errors import InputError
from hessnb.models import build
from hessnb.together import is_faster_together, train_together
from hessnb.training import Diverged, Recipe, State, TrainingFailed, train

RECIPE = Recipe(batch_size=16, lr=0.05, momentum=0.9, max_epochs=4, seed=0)
SEEDS = (3, 1, 4)


def networks(name: str) -> list[nn.Module]:
    return [build(name, num_classes=10, width=0.1, seed=seed).double() for seed in SEEDS]


def recipes(**changes: float) -> list[Recipe]:
    return [replace(RECIPE, seed=seed, **changes) for seed in SEEDS]  # type: ignore[arg-type]


def assert_same_training(found: State | TrainingFailed, expected: State) -> None:
    assert isinstance(found, State)
    assert found.epoch == expected.epoch
    for ours, theirs in zip(found.history, expected.history, strict=True):
        assert (ours.epoch, ours.lr) == (theirs.epoch, theirs.lr)
        assert ours.train_loss == pytest.approx(theirs.train_loss, rel=1e-9)
        assert ours.test_loss == pytest.approx(theirs.test_loss, rel=1e-9)
        assert (ours.train_accuracy, ours.test_accuracy) == (theirs.train_accuracy, theirs.test_accuracy)
    assert found.model.keys() == expected.model.keys()
    for name, tensor in expected.model.items():
        assert torch.allclose(found.model[name], tensor, rtol=1e-9, atol=1e-12), name
    for momentum, theirs_too in zip(found.momentum, expected.momentum, strict=True):
        assert torch.allclose(momentum, theirs_too, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("name", ["M1", "C1", "C2", "C3", "CR"])
def test_each_network_is_trained_as_it_would_be_alone(
    in_float64: Callable[[str], Splits], name: str, momentum: float
) -> None:
    data, ours, alone = in_float64("mnist5k" if name == "M1" else "mnistm5k"), networks(name), networks(name)
    chosen = recipes(momentum=momentum, max_epochs=2, lr=0.01)
    states = train_together(ours, data, chosen)
    for found, model, other, recipe in zip(states, ours, alone, chosen, strict=True):
        assert_same_training(found, train(other, data, recipe))
        assert isinstance(found, State)
        assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), found.model.values(), strict=True))


def test_a_network_that_reaches_its_target_leaves_the_others(in_float64: Callable[[str], Splits]) -> None:
    data = in_float64("mnist5k")
    pairs = zip(networks("M1"), recipes(), strict=True)
    losses = [[line.train_loss for line in train(m, data, r).history] for m, r in pairs]
    first = [each[1] for each in losses]
    target = sorted(first)[0] * 1.0001  # reached after two epochs by one of them, later by the others
    chosen = recipes(loss_target=target, max_epochs=8)
    expected = [train(m, data, r) for m, r in zip(networks("M1"), chosen, strict=True)]
    assert len({state.epoch for state in expected}) > 1
    for found, alone in zip(train_together(networks("M1"), data, chosen), expected, strict=True):
        assert_same_training(found, alone)


def test_trainings_go_on_together_from_different_epochs(in_float64: Callable[[str], Splits]) -> None:
    data, models = in_float64("mnist5k"), networks("M1")
    states = [
        train(model, data, replace(recipe, max_epochs=epochs)) if epochs else State()
        for model, recipe, epochs in zip(models, recipes(), (0, 3, 1), strict=True)
    ]
    seen: list[tuple[int, int]] = []
    found = train_together(
        models, data, recipes(), states=states, on_epoch=lambda i, state: seen.append((i, state.epoch))
    )
    for state, alone, recipe in zip(found, networks("M1"), recipes(), strict=True):
        assert_same_training(state, train(alone, data, recipe))
    assert seen == [(0, 1), (1, 4), (2, 2), (0, 2), (2, 3), (0, 3), (2, 4), (0, 4)]


def test_a_training_that_fails_does_not_hinder_the_others(in_float64: Callable[[str], Splits]) -> None:
    data, models = in_float64("mnist5k"), networks("M1")
    with torch.no_grad():
        next(models[1].parameters()).fill_(1e100)
    found = train_together(models, data, recipes())
    assert isinstance(found[1], Diverged)
    assert len(found[1].state.history) == 1
    for i in (0, 2):
        assert_same_training(found[i], train(networks("M1")[i], data, recipes()[i]))


def test_a_training_that_fails_in_its_last_epoch_has_failed(in_float64: Callable[[str], Splits]) -> None:
    data, models = in_float64("mnist5k"), networks("M1")
    with torch.no_grad():
        next(models[1].parameters()).fill_(1e100)
    found = train_together(models, data, recipes(max_epochs=1))
    assert [type(ended) for ended in found] == [State, Diverged, State]


def test_an_epoch_that_shows_a_failure_is_not_told(in_float64: Callable[[str], Splits]) -> None:
    data, models, seen = in_float64("mnist5k"), networks("M1"), list[tuple[int, int]]()
    with torch.no_grad():
        next(models[1].parameters()).fill_(1e100)
    train_together(models, data, recipes(max_epochs=2), on_epoch=lambda i, state: seen.append((i, state.epoch)))
    assert seen == [(0, 1), (2, 1), (0, 2), (2, 2)]


def test_seconds_of_networks_trained_together_are_their_shares(in_float64: Callable[[str], Splits]) -> None:
    data, models = in_float64("mnist5k"), networks("M1")
    train_together(networks("M1"), data, recipes(max_epochs=1))  # the first one imports much, outside of its steps
    started = time.perf_counter()
    found = train_together(models, data, recipes(batch_size=2, max_epochs=2))
    whole = time.perf_counter() - started
    told = [line.seconds for state in found if isinstance(state, State) for line in state.history]
    assert 0.5 * whole < sum(told) <= whole


def test_timing_leaves_the_networks_as_they_are(
    in_float64: Callable[[str], Splits], untouched: Callable[..., AbstractContextManager[None]]
) -> None:
    data, models = in_float64("mnist5k").train, networks("M1")
    with ExitStack() as stack:
        for model in models:
            stack.enter_context(untouched(model.eval()))
        is_faster_together(models, data, RECIPE)
    with pytest.raises(InputError, match="has only 70 samples"):
        is_faster_together(models, data, replace(RECIPE, batch_size=71))


@pytest.mark.parametrize(("seconds", "faster"), [(2.0, True), (4.0, False)])
def test_three_together_are_faster_in_less_than_three_times_what_one_takes(
    in_float64: Callable[[str], Splits], monkeypatch: pytest.MonkeyPatch, seconds: float, faster: bool
) -> None:
    times = iter([0.0, seconds, 10.0, 11.0])  # of all together, and of one
    monkeypatch.setattr(together, "time_when_done", lambda device: next(times))
    assert is_faster_together(networks("M1"), in_float64("mnist5k").train, RECIPE) is faster


class Tied(nn.Module):
    """Two layers that share their weights, with a buffer that is no part of the state."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(784, 784), nn.Linear(784, 784), nn.Linear(784, 10)
        self.second.weight = self.first.weight
        self.shift: torch.Tensor
        self.register_buffer("shift", torch.tensor(0.1 * seed), persistent=False)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.second(self.first(x.flatten(1) + self.shift).relu()).relu())  # type: ignore[no-any-return]


def test_tied_weights_stay_tied(in_float64: Callable[[str], Splits]) -> None:
    data, chosen = in_float64("mnist5k"), recipes(max_epochs=2)
    ours, alone = ([Tied(seed).double() for seed in SEEDS] for _ in range(2))
    for found, model, other, recipe in zip(train_together(ours, data, chosen), ours, alone, chosen, strict=True):
        assert_same_training(found, train(other, data, recipe))
        assert model.second.weight is model.first.weight


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda models, chosen: ([*models[:2], nn.Sequential(*models[2], nn.Tanh())], chosen), "that are alike"),
        (lambda models, chosen: ([*models[:2], models[1]], chosen), "a network is there twice"),
        (lambda models, chosen: ([nn.Sequential(*m, nn.Dropout(0.5)) for m in models], chosen), "10 is Dropout"),
        (lambda models, chosen: (models[:2], chosen), "alike, each with its recipe"),
        (lambda models, chosen: ([], []), "alike, each with its recipe"),
        (lambda models, chosen: ([*models[:2], build("M1", width=0.2)], chosen), "alike, each with its recipe"),
        (lambda models, chosen: (models, [*chosen[:2], replace(chosen[2], lr=1.0)]), "nothing but the seed"),
        (
            lambda models, chosen: (models, [replace(r, decay_every=1, decay_factor=0.5) for r in chosen]),
            "constant learning rate: take off decay_every",
        ),
        (lambda models, chosen: (models, [replace(r, batch_size=71) for r in chosen]), "has only 70 samples"),
        (lambda models, chosen: ([m.requires_grad_(False) for m in models], chosen), "frozen weights"),
    ],
)
def test_what_cannot_be_trained_together_is_refused(
    in_float64: Callable[[str], Splits],
    change: Callable[[list[nn.Module], list[Recipe]], tuple[list[nn.Module], list[Recipe]]],
    message: str,
) -> None:
    models, chosen = change(networks("M1"), recipes())
    with pytest.raises(InputError, match=message):
        train_together(models, in_float64("mnist5k"), chosen)
