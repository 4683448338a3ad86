"""The trainer: the same weights as a plain loop, honest stopping, exact resumption, clear refusals."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hessnb.data import Split, Splits, load
from hessnb.errors import InputError
from hessnb.models import build
from hessnb.training import Diverged, Recipe, State, evaluate, train

RECIPE = Recipe(batch_size=64, lr=0.05, momentum=0.9, max_epochs=4, seed=5, decay_every=2, decay_factor=0.5)


def model() -> nn.Module:
    return build("M1", width=0.1, seed=0)


def weights(network: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(network.parameters()).detach()


def frozen(state: State) -> State:
    """Return a state whose tensors no longer change with the training."""
    return State(
        state.epoch,
        {name: tensor.clone() for name, tensor in state.model.items()},
        [tensor.clone() for tensor in state.momentum],
        list(state.history),
    )


def without_seconds(state: State) -> list[object]:
    return [replace(line, seconds=0) for line in state.history]


def test_training_equals_a_plain_loop(digits: Splits) -> None:
    ours, plain = model(), model()
    state = train(ours, digits, RECIPE)
    velocity = [torch.zeros_like(p) for p in plain.parameters()]
    first = True
    for epoch in range(4):
        lr = 0.05 * 0.5 ** (epoch // 2)
        order = torch.randperm(300, generator=torch.Generator().manual_seed(5 * 1_000_003 + epoch))
        for start in range(0, 300, 64):  # the last batch holds 44 samples
            batch = order[start : start + 64]
            loss = F.cross_entropy(plain(digits.train.images[batch]), digits.train.labels[batch])
            gradients = torch.autograd.grad(loss, list(plain.parameters()))
            with torch.no_grad():
                for parameter, gradient, v in zip(plain.parameters(), gradients, velocity, strict=True):
                    v.copy_(gradient if first else 0.9 * v + gradient)
                    parameter.sub_(lr * v)
            first = False
    torch.testing.assert_close(weights(ours), weights(plain), rtol=1e-5, atol=1e-6)
    assert [line.lr for line in state.history] == [0.05, 0.05, 0.025, 0.025]
    assert [line.epoch for line in state.history] == [1, 2, 3, 4]


def test_same_seed_gives_the_same_bits_and_another_seed_does_not(digits: Splits) -> None:
    runs = []
    for seed in (5, 5, 6):
        network = model()
        train(network, digits, replace(RECIPE, seed=seed))
        runs.append(weights(network))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


@pytest.mark.parametrize("momentum", [0.9, 0.0])
@pytest.mark.parametrize("name", ["M1", "C1"])
def test_resuming_after_any_epoch_gives_the_same_bits(digits: Splits, name: str, momentum: float) -> None:
    data = digits
    if name == "C1":  # with running statistics
        data = load("mnistm5k", n_train=60, n_test=20)
    recipe = replace(RECIPE, batch_size=25, momentum=momentum, max_epochs=3)
    network = build(name, width=0.1, seed=0)
    states: list[State] = []
    final = train(network, data, recipe, on_epoch=lambda state: states.append(frozen(state)))
    for state in states[:-1]:
        other = build(name, width=0.1, seed=1)  # its own weights must not matter
        resumed = train(other, data, recipe, state=state)
        assert all(
            torch.equal(a, b) for a, b in zip(other.state_dict().values(), network.state_dict().values(), strict=True)
        )
        assert without_seconds(resumed) == without_seconds(final)


def test_training_that_has_ended_is_not_continued(digits: Splits) -> None:
    network = model()
    final = frozen(train(network, digits, RECIPE))
    again = train(model(), digits, RECIPE, state=final)
    assert again.history == final.history


def test_stops_at_the_first_epoch_whose_loss_is_at_most_the_target(digits: Splits) -> None:
    whole = train(model(), digits, replace(RECIPE, max_epochs=12)).history
    target = whole[6].train_loss
    expected = next(line.epoch for line in whole if line.train_loss <= target)
    stopped = train(model(), digits, replace(RECIPE, max_epochs=12, loss_target=target)).history
    assert len(stopped) == expected
    assert stopped[-1].train_loss <= target < min(line.train_loss for line in stopped[:-1])


def test_losses_of_the_history_are_those_of_the_network_in_eval_mode(digits: Splits) -> None:
    network = model()
    last = train(network, digits, RECIPE).history[-1]
    network.eval()
    with torch.no_grad():
        logits = network(digits.train.images).double()
    assert last.train_loss == pytest.approx(F.cross_entropy(logits, digits.train.labels).item(), rel=1e-6)
    assert last.train_accuracy == (logits.argmax(1) == digits.train.labels).double().mean().item()
    assert (last.test_loss, last.test_accuracy) == evaluate(network, digits.test)


@pytest.mark.parametrize("n", [1, 7, 1000, 1001])
def test_evaluation_is_exact_for_ragged_sizes_and_leaves_the_modes(n: int) -> None:
    generator = torch.Generator().manual_seed(n)
    network = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 3)).double()
    network[2].eval()
    modes = [module.training for module in network.modules()]
    split = Split(
        torch.rand(n, 1, 2, 2, dtype=torch.float64, generator=generator), torch.randint(3, (n,), generator=generator)
    )
    loss, accuracy = evaluate(network, split)
    assert [module.training for module in network.modules()] == modes
    logits = network.eval()(split.images)
    assert loss == pytest.approx(F.cross_entropy(logits, split.labels).item(), rel=1e-12)
    assert accuracy == (logits.argmax(1) == split.labels).double().mean().item()


def test_divergence_is_an_error_that_carries_the_history(digits: Splits) -> None:
    seen: list[int] = []
    with pytest.raises(Diverged, match="lower it") as error:
        train(model(), digits, replace(RECIPE, lr=1e8), on_epoch=lambda state: seen.append(state.epoch))
    history = error.value.state.history
    assert not math.isfinite(history[-1].train_loss)
    assert len(history) == len(seen) + 1, "a diverged epoch is not handed on as a finished one"


def test_schedule_decays_in_steps() -> None:
    recipe = replace(RECIPE, lr=0.8, decay_every=5, decay_factor=0.5)
    assert [recipe.lr_at(epoch) for epoch in (0, 4, 5, 9, 10)] == [0.8, 0.8, 0.4, 0.4, 0.2]
    assert replace(recipe, decay_every=None, decay_factor=None).lr_at(99) == 0.8


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("batch_size", 0),
        ("batch_size", -3),
        ("lr", 0.0),
        ("lr", -0.1),
        ("lr", math.nan),
        ("lr", math.inf),
        ("momentum", 1.0),
        ("momentum", -0.1),
        ("max_epochs", 0),
        ("seed", -1),
        ("loss_target", 0.0),
        ("decay_every", 0),
        ("decay_every", None),
        ("decay_factor", 1.5),
    ],
)
def test_recipe_that_cannot_be_trained_with_is_refused(field: str, value: object) -> None:
    with pytest.raises(InputError, match=field):
        replace(RECIPE, **{field: value})  # type: ignore[arg-type]


def test_batch_larger_than_the_training_set_is_refused(digits: Splits) -> None:
    with pytest.raises(InputError, match="only 300 samples"):
        train(model(), digits, replace(RECIPE, batch_size=301))
