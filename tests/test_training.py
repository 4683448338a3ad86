"""hessnb.training: the loop, when it stops, how it resumes, its errors, and evaluation."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hessnb import training
from hessnb.attacks import fgsm, l2_hessian
from hessnb.data import Split, Splits
from hessnb.errors import InputError, RunFailed
from hessnb.models import build
from hessnb.training import (
    PATIENCE,
    Collapsed,
    Diverged,
    Epoch,
    Recipe,
    State,
    constant_loss,
    evaluate,
    is_finished,
    reached_target,
    train,
)

RECIPE = Recipe(batch_size=16, lr=0.05, momentum=0.9, max_epochs=3, seed=7)


@pytest.fixture
def data(digits: Splits) -> Splits:
    """Return 70 training and 30 test digits: a batch of 16 leaves a ragged last one of 6."""
    return Splits(digits.train.head(70), digits.test.head(30), digits.classes)


def batch_norm_net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 3, 5, stride=3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 8 * 8, 10)
        )


def tiny() -> nn.Module:
    return build("M1", width=0.05, seed=0)


def bits(model: nn.Module) -> list[Tensor]:
    return [tensor.clone() for tensor in model.state_dict().values()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def plain_loop(model: nn.Module, data: Split, recipe: Recipe) -> None:
    """Train without anything of hessnb but the order of samples; momentum is written out."""
    velocity = [torch.zeros_like(p) for p in model.parameters()]
    for epoch in range(recipe.max_epochs):
        order = training.epoch_order(data, recipe, epoch).tolist()
        for start in range(0, len(order), recipe.batch_size):
            index = order[start : start + recipe.batch_size]
            loss = F.cross_entropy(model(data.images[index]), data.labels[index])
            gradients = torch.autograd.grad(loss, list(model.parameters()))
            with torch.no_grad():
                for p, v, g in zip(model.parameters(), velocity, gradients, strict=True):
                    v.mul_(recipe.momentum).add_(g)
                    p.sub_(v, alpha=recipe.lr)


# The loop


def test_gradients_that_a_perturbation_or_somebody_before_left_have_no_part_in_a_step(data: Splits) -> None:
    def leaves(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        F.cross_entropy(model(x), y).backward()
        return x

    expected, perturbed, before = tiny(), tiny(), tiny()
    for parameter in before.parameters():
        parameter.grad = torch.ones_like(parameter)
    train(expected, data, RECIPE)
    train(perturbed, data, RECIPE, perturbation=leaves)
    train(before, data, RECIPE)
    assert same(bits(perturbed), bits(expected))
    assert same(bits(before), bits(expected))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("make", [tiny, batch_norm_net])
def test_training_equals_a_plain_loop_bit_for_bit(data: Splits, make: Callable[[], nn.Module], momentum: float) -> None:
    recipe = replace(RECIPE, momentum=momentum)
    ours, plain = make(), make()
    train(ours, data, recipe)
    plain_loop(plain, data.train, recipe)
    assert same(bits(ours), bits(plain))
    assert not same(bits(ours), bits(make()))


def test_the_order_of_samples_is_a_new_permutation_for_each_seed_and_epoch(data: Splits) -> None:
    recipes = [replace(RECIPE, seed=seed) for seed in (0, 1)]
    orders = [tuple(training.epoch_order(data.train, recipe, epoch).tolist()) for recipe in recipes for epoch in (0, 1)]
    assert len(set(orders)) == 4
    assert all(sorted(order) == list(range(70)) for order in orders)


def test_training_leaves_the_global_random_state(
    data: Splits, untouched: Callable[..., AbstractContextManager[None]]
) -> None:
    with untouched():
        train(tiny(), data, RECIPE)


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(data: Splits) -> None:
    results = []
    for seed in (1, 1, 2):
        model = tiny()
        train(model, data, replace(RECIPE, seed=seed))
        results.append(bits(model))
    assert same(results[0], results[1])
    assert not same(results[0], results[2])


def test_a_network_with_batch_norm_learns(data: Splits) -> None:
    model = batch_norm_net()
    state = train(model, data, replace(RECIPE, max_epochs=15))
    assert state.history[-1].train_accuracy > 0.9
    assert int(model[1].num_batches_tracked) == 15 * 5  # type: ignore[index]


def test_frozen_weights_stay_as_they_are_and_do_not_hinder_a_resumption(data: Splits) -> None:
    def make() -> nn.Module:
        model = tiny()
        next(model.parameters()).requires_grad_(False)
        return model

    whole, halves = make(), make()
    train(whole, data, RECIPE)
    train(halves, data, RECIPE, state=train(halves, data, replace(RECIPE, max_epochs=1)))
    assert same(bits(whole), bits(halves))
    assert torch.equal(bits(whole)[0], bits(make())[0])
    assert not torch.equal(bits(whole)[2], bits(make())[2])


# When it stops


def test_training_stops_at_the_first_epoch_whose_loss_reaches_the_target(data: Splits) -> None:
    losses = [epoch.train_loss for epoch in train(batch_norm_net(), data, replace(RECIPE, max_epochs=6)).history]
    assert losses == sorted(losses, reverse=True)  # so the targets below are reached in their own epoch
    for epoch in (1, 3, 6):
        recipe = replace(RECIPE, max_epochs=6, loss_target=losses[epoch - 1])
        history = train(batch_norm_net(), data, recipe).history
        assert [line.train_loss for line in history] == losses[:epoch]
        assert reached_target(history, recipe)
        assert is_finished(history, recipe)


def test_the_loss_and_accuracy_of_an_epoch_are_over_whole_sets_in_eval_mode(data: Splits) -> None:
    model = batch_norm_net()
    last = train(model, data, RECIPE).history[-1]
    for split, loss, accuracy in (
        (data.train, last.train_loss, last.train_accuracy),
        (data.test, last.test_loss, last.test_accuracy),
    ):
        logits = model.eval()(split.images)
        assert loss == pytest.approx(F.cross_entropy(logits, split.labels).item(), rel=1e-6)
        assert accuracy == (logits.argmax(1) == split.labels).sum().item() / len(split)
        train_mode_loss = F.cross_entropy(copy.deepcopy(model).train()(split.images), split.labels).item()
        assert loss != pytest.approx(train_mode_loss, rel=1e-3)


def test_training_stops_after_max_epochs_when_the_target_is_not_reached(data: Splits) -> None:
    recipe = replace(RECIPE, loss_target=1e-9)
    state = train(tiny(), data, recipe)
    assert state.epoch == len(state.history) == 3
    assert [epoch.epoch for epoch in state.history] == [1, 2, 3]
    assert is_finished(state.history, recipe)
    assert not reached_target(state.history, recipe)
    assert not is_finished(state.history[:2], recipe)


def test_the_learning_rate_decays_in_steps(data: Splits) -> None:
    recipe = replace(RECIPE, lr=0.08, max_epochs=5, decay_every=2, decay_factor=0.5)
    assert [recipe.lr_at(epoch) for epoch in range(5)] == [0.08, 0.08, 0.04, 0.04, 0.02]
    assert [epoch.lr for epoch in train(tiny(), data, recipe).history] == [0.08, 0.08, 0.04, 0.04, 0.02]
    assert {RECIPE.lr_at(epoch) for epoch in range(100)} == {0.05}


def test_the_decayed_learning_rate_is_the_one_that_is_used(data: Splits) -> None:
    decayed, constant = tiny(), tiny()
    first = train(constant, data, replace(RECIPE, max_epochs=1))
    train(constant, data, replace(RECIPE, max_epochs=2, lr=0.005), state=first)
    train(decayed, data, replace(RECIPE, max_epochs=2, decay_every=1, decay_factor=0.1))
    assert all(torch.allclose(a, b) for a, b in zip(bits(decayed), bits(constant), strict=True))


# How it resumes


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("make", [tiny, batch_norm_net])
def test_resuming_from_any_epoch_ends_in_the_same_bits(
    data: Splits, make: Callable[[], nn.Module], momentum: float
) -> None:
    recipe = replace(RECIPE, momentum=momentum, max_epochs=4, decay_every=2, decay_factor=0.5)
    saved: list[State] = []

    def save(state: State) -> None:
        tensors = {name: tensor.clone() for name, tensor in state.model.items()}
        saved.append(State(state.epoch, tensors, [m.clone() for m in state.momentum], list(state.history)))

    whole = make()
    end = train(whole, data, recipe, on_epoch=save)
    assert [state.epoch for state in saved] == [1, 2, 3, 4]
    for state in saved:
        before = [buffer.clone() for buffer in state.momentum]
        model = make()
        with torch.no_grad():  # the state alone counts
            next(model.parameters()).zero_()
        resumed = train(model, data, recipe, state=state)
        assert same(bits(model), bits(whole))
        assert same(resumed.momentum, end.momentum)
        assert [line.train_loss for line in resumed.history] == [line.train_loss for line in end.history]
        assert same(before, state.momentum)


def test_a_finished_training_is_not_trained_again(data: Splits) -> None:
    model = tiny()
    state = train(model, data, RECIPE)
    before = bits(model)
    assert train(model, data, RECIPE, state=state).epoch == 3
    assert same(before, bits(model))


# Errors


def test_a_training_that_diverges_is_an_error_that_carries_its_history(data: Splits) -> None:
    calls: list[State] = []
    with pytest.raises(Diverged, match="training diverged: loss nan after epoch 1 at learning rate 1e") as caught:
        train(tiny(), data, replace(RECIPE, lr=1e30), on_epoch=calls.append)
    assert isinstance(caught.value, RunFailed)
    (line,) = caught.value.state.history
    assert (line.epoch, line.lr) == (1, 1e30)
    assert not math.isfinite(line.train_loss)
    assert not calls


def losses(*values: float) -> State:
    return State(history=[Epoch(i + 1, 0.1, value, 0.1, value, 0.1, 1.0) for i, value in enumerate(values)])


@pytest.mark.parametrize("attack", [fgsm, l2_hessian])
def test_an_adversarial_training_that_diverges_is_one_that_diverges(data: Splits, attack: Any) -> None:
    wild = Recipe(batch_size=20, lr=1e30, momentum=0.9, max_epochs=3, seed=0)
    with pytest.raises(Diverged, match="diverged"):
        train(build("M1", width=0.1, seed=0), data, wild, perturbation=partial(attack, eps=0.1))


def test_a_perturbation_that_refuses_a_sound_network_is_heard(data: Splits) -> None:
    def refusing(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        raise InputError("not like this")

    calm = Recipe(batch_size=20, lr=0.01, momentum=0.9, max_epochs=3, seed=0)
    with pytest.raises(InputError, match="not like this"):
        train(build("M1", width=0.1, seed=0), data, calm, perturbation=refusing)


def test_a_network_that_has_lost_what_it_had_learned_is_given_up() -> None:
    ten = Split(torch.zeros(50, 1, 1, 1), torch.arange(10).repeat(5))
    assert constant_loss(ten.labels) == pytest.approx(math.log(10), rel=1e-12)
    training.check_progress(losses(*[2.31] * 100), ten)  # it may begin yet
    training.check_progress(losses(2.3, 0.5, *[2.31] * (PATIENCE - 1)), ten)
    training.check_progress(losses(2.3, 0.5, *[2.31] * (PATIENCE - 1), 2.2), ten)
    training.check_progress(losses(2.3, 2.2, *[2.31] * PATIENCE), ten)  # it has hardly begun
    with pytest.raises(Collapsed, match="training collapsed: loss 2.31 after epoch 22 at learning rate 0.1; lower it"):
        training.check_progress(losses(2.3, 0.5, *[2.31] * PATIENCE), ten)


def test_the_constant_answer_knows_the_shares_of_the_classes() -> None:
    assert constant_loss(torch.tensor([2, 2, 2, 0])) == pytest.approx(2 * math.log(2) - 0.75 * math.log(3), rel=1e-12)
    assert constant_loss(torch.tensor([3, 3])) == 0.0


def test_dead_units_make_a_training_collapse(data: Splits) -> None:
    model = tiny()
    state = train(model, data, replace(RECIPE, max_epochs=15))
    assert state.history[-1].train_loss < 0.9 * constant_loss(data.train.labels)
    for name, tensor in state.model.items():
        if name.endswith("bias"):
            tensor.fill_(0.0 if tensor.numel() == 10 else -100.0)  # no unit of a hidden layer is active any more
    with pytest.raises(Collapsed) as caught:
        train(model, data, replace(RECIPE, lr=1e-3, max_epochs=100), state=state)
    assert len(caught.value.state.history) == 15 + PATIENCE


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("batch_size", value) for value in (0, -1)),
        *(("lr", value) for value in (0.0, -0.1, math.inf, math.nan)),
        *(("momentum", value) for value in (-0.1, 1.0, math.nan)),
        ("max_epochs", 0),
        *(("seed", value) for value in (-1, 2**32, 1.0)),
        ("batch_size", 8.5),
        ("max_epochs", True),
        *(("loss_target", value) for value in (0.0, -1.0, math.nan)),
        ("decay_every", 0),
        *(("decay_factor", value) for value in (0.0, 1.5, math.nan)),
    ],
)
def test_a_value_that_cannot_be_trained_with_is_an_error_that_names_it(field: str, value: Any) -> None:
    partners: dict[str, dict[str, Any]] = {"decay_every": {"decay_factor": 0.5}, "decay_factor": {"decay_every": 1}}
    with pytest.raises(InputError, match=f"^{field} = {value}: it must be"):
        replace(RECIPE, **{field: value}, **partners.get(field, {}))


@pytest.mark.parametrize("half", [{"decay_every": 1}, {"decay_factor": 0.5}])
def test_half_a_decay_is_an_error(half: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="belong together"):
        replace(RECIPE, **half)


def test_a_batch_may_be_the_whole_training_set_and_no_larger(data: Splits) -> None:
    assert train(tiny(), data, replace(RECIPE, batch_size=70)).epoch == 3
    with pytest.raises(InputError, match="batch_size = 71: the training set has only 70 samples"):
        train(tiny(), data, replace(RECIPE, batch_size=71))


@pytest.mark.parametrize(
    ("split", "change", "fault"),
    [
        ("train", lambda s: Split(s.images * torch.nan, s.labels), "holds NaN or infinity"),
        ("train", lambda s: Split(s.images.double(), s.labels), "are torch.float64, the parameters torch.float32"),
        ("train", lambda s: Split(s.images, s.labels + 10), "labels from 10 to"),
        ("test", lambda s: Split(s.images[:0], s.labels[:0]), "there are no inputs"),
        ("test", lambda s: Split(s.images, s.labels - 10), "labels from -10 to"),
    ],
)
def test_data_that_do_not_fit_are_refused_before_the_first_step(
    data: Splits, split: str, change: Callable[[Split], Split], fault: str
) -> None:
    model = tiny()
    before = bits(model)
    with pytest.raises(InputError, match=fault):
        train(model, replace(data, **{split: change(getattr(data, split))}), RECIPE)  # type: ignore[arg-type]
    assert same(bits(model), before)


def test_a_network_that_is_all_frozen_or_has_one_sample_left_to_normalise_is_refused(data: Splits) -> None:
    with pytest.raises(InputError, match="no weights that can be trained"):
        train(tiny().requires_grad_(False), data, RECIPE)
    flat = nn.Sequential(nn.Flatten(), nn.Linear(784, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 10))
    statistics = flat[2].running_mean
    assert isinstance(statistics, Tensor)
    with pytest.raises(InputError, match="batch_size = 23: of 70 samples one is left"):
        train(flat, data, replace(RECIPE, batch_size=23))
    assert not statistics.any()
    assert train(flat, data, replace(RECIPE, batch_size=22)).epoch == 3


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_training_does_not_mind_where_it_is_called(
    data: Splits, mode: Callable[[], AbstractContextManager[None]]
) -> None:
    first, second = tiny(), tiny()
    half = train(first, data, replace(RECIPE, max_epochs=1))
    with mode():
        state = train(
            second,
            data,
            RECIPE,
            state=State(1, {k: v.clone() for k, v in half.model.items()}, half.momentum, half.history),
        )
    train(first, data, RECIPE, state=half)
    assert state.epoch == 3
    assert same(bits(first), bits(second))


# Evaluation


@pytest.mark.parametrize("batch", [1, 9, 70, 1000])
def test_evaluate_equals_the_direct_computation(data: Splits, monkeypatch: pytest.MonkeyPatch, batch: int) -> None:
    monkeypatch.setattr(training, "EVALUATION_BATCH", batch)
    model = batch_norm_net().double().eval()
    images, labels = data.train.images.double(), data.train.labels
    loss, accuracy = evaluate(model, Split(images, labels))
    logits = model(images)
    expected = -logits.log_softmax(1)[range(70), labels].mean().item()
    assert loss == pytest.approx(expected, rel=1e-12)
    assert accuracy == (logits.argmax(1) == labels).sum().item() / 70


def test_evaluate_leaves_the_model_as_it_was(
    data: Splits, untouched: Callable[..., AbstractContextManager[None]]
) -> None:
    model = batch_norm_net().train()
    list(model.children())[1].eval()
    with untouched(model):
        evaluate(model, data.train)


def test_a_very_confident_network_has_a_loss_that_is_not_rounded_to_zero(data: Splits) -> None:
    class Confident(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 20 * F.one_hot(data.train.labels, 10).float()

    assert evaluate(Confident(), data.train)[0] == pytest.approx(9 * math.exp(-20), rel=1e-6)
