"""hessnb.steps: captured steps are the steps; on CUDA for real, elsewhere by a stand-in for the graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hessnb import steps
from hessnb.data import Split, Splits
from hessnb.models import build
from hessnb.together import is_faster_together, train_together
from hessnb.training import Recipe, train

RECIPE = Recipe(batch_size=16, lr=0.01, momentum=0.9, max_epochs=4, seed=7, decay_every=2, decay_factor=0.5)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


@pytest.fixture
def data(in_float64: Callable[[str], Splits]) -> Splits:
    return in_float64("mnistm5k")


def network() -> nn.Module:
    return build("C1", width=0.1, seed=0).double()


def on(device: str, data: Splits) -> Splits:
    def moved(split: Split) -> Split:
        return Split(split.images.to(device), split.labels.to(device))

    return Splits(moved(data.train), moved(data.test), data.classes)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_all_that_a_step_changes_is_known(data: Splits, monkeypatch: pytest.MonkeyPatch, momentum: float) -> None:
    """A capture runs the step some times before and puts back what it was told of: so does this stand-in."""
    captures: list[int] = []

    def captured(function: steps.Step, argument: Tensor, changed: Sequence[Tensor]) -> steps.Step:
        captures.append(len(argument))
        kept = [tensor.detach().clone() for tensor in changed]
        places = [tensor.data_ptr() for tensor in changed]
        for _ in range(3):
            function(argument.clone())
        with torch.no_grad():
            for tensor, value in zip(changed, kept, strict=True):
                tensor.copy_(value)
        static = argument.clone()

        def replay(index: Tensor) -> None:
            assert [tensor.data_ptr() for tensor in changed] == places
            static.copy_(index)
            function(static)

        return replay

    class Eager(steps.Steps):
        def __init__(self, *args: Any, **settings: Any) -> None:
            super().__init__(*args, **settings)
            self._capture = True

    recipe, eager = replace(RECIPE, momentum=momentum), network()
    expected = train(eager, data, recipe)
    monkeypatch.setattr(steps, "captured", captured)
    monkeypatch.setattr("hessnb.training.Steps", Eager)
    model = network()
    found = train(model, data, recipe)
    assert captures == [16, 16]  # once for each learning rate
    for name, tensor in expected.model.items():
        assert torch.equal(found.model[name], tensor), name
    for ours, theirs in zip(found.momentum, expected.momentum, strict=True):
        assert torch.equal(ours, theirs)


def test_steps_are_of_one_minibatch_each_and_have_the_learning_rate_of_the_epoch() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)
    seen: list[list[int]] = []
    taken = steps.Steps(lambda index: seen.append(index.tolist()), optimizer, [])
    taken.epoch(torch.arange(7), 3, 0.25)
    assert seen == [[0, 1, 2], [3, 4, 5], [6]]
    assert optimizer.param_groups[0]["lr"] == 0.25


@pytest.mark.parametrize("perturbed", [False, True])
def test_steps_under_a_perturbation_are_never_captured(
    data: Splits, monkeypatch: pytest.MonkeyPatch, perturbed: bool
) -> None:
    asked: list[bool] = []

    class Told(steps.Steps):
        def __init__(self, *args: Any, capture: bool = True) -> None:
            super().__init__(*args, capture=capture)
            asked.append(capture)

    monkeypatch.setattr("hessnb.training.Steps", Told)
    perturbation = (lambda model, x, y: x) if perturbed else None
    train(network(), data, replace(RECIPE, max_epochs=1), perturbation=perturbation)
    assert asked == [not perturbed]


@needs_cuda
@pytest.mark.parametrize("name", ["M1", "C1"])
def test_on_cuda_captured_steps_are_those_of_the_cpu(in_float64: Callable[[str], Splits], name: str) -> None:
    data = in_float64("mnist5k" if name == "M1" else "mnistm5k")

    def make() -> nn.Module:
        return build(name, width=0.1, seed=0).double()

    model = make()
    expected = train(make(), data, RECIPE)
    found = train(model.to("cuda"), on("cuda", data), RECIPE)
    for ours, theirs in zip(found.history, expected.history, strict=True):
        assert ours.train_loss == pytest.approx(theirs.train_loss, rel=1e-8)
    for name, tensor in expected.model.items():
        assert torch.allclose(found.model[name].cpu(), tensor, rtol=1e-7, atol=1e-10), name


@needs_cuda
def test_on_cuda_networks_together_are_those_of_the_cpu(data: Splits) -> None:
    recipes = [replace(RECIPE, seed=seed, decay_every=None, decay_factor=None) for seed in (0, 1, 2)]
    models = [build("C1", width=0.1, seed=recipe.seed).double() for recipe in recipes]
    expected = train_together([build("C1", width=0.1, seed=r.seed).double() for r in recipes], data, recipes)
    found = train_together([model.to("cuda") for model in models], on("cuda", data), recipes)
    for ours, theirs in zip(found, expected, strict=True):
        assert not isinstance(ours, Exception)
        assert not isinstance(theirs, Exception)
        for name, tensor in theirs.model.items():
            assert torch.allclose(ours.model[name].cpu(), tensor, rtol=1e-7, atol=1e-10), name


@needs_cuda
@pytest.mark.parametrize("together", [False, True])
def test_on_cuda_a_training_goes_on_from_a_state_on_the_cpu(data: Splits, together: bool) -> None:
    recipe = replace(RECIPE, decay_every=None, decay_factor=None)
    expected = train(network(), data, recipe)
    state = train(network(), data, replace(recipe, max_epochs=2))
    model = network().to("cuda")
    if together:
        train_together([model], on("cuda", data), [recipe], states=[state])
    else:
        train(model, on("cuda", data), recipe, state=state)
    for name, tensor in model.state_dict().items():
        assert torch.allclose(tensor.cpu(), expected.model[name], rtol=1e-7, atol=1e-10), name


@needs_cuda
def test_on_cuda_a_step_does_nothing_on_the_host(data: Splits) -> None:
    there, model = on("cuda", data).train, network().to("cuda")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    taken = steps.Steps(steps.minibatch_step(model, there, optimizer), optimizer, list(model.buffers()))
    order = torch.arange(64, device="cuda")
    taken.epoch(order, 16, 0.01)
    torch.cuda.set_sync_debug_mode("error")
    try:
        taken.epoch(order, 16, 0.01)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_cuda
def test_on_cuda_timing_leaves_the_networks_as_they_are(data: Splits) -> None:
    there, models = on("cuda", data).train, [network().to("cuda") for _ in range(2)]
    before = [[tensor.clone() for tensor in model.state_dict().values()] for model in models]
    is_faster_together(models, there, replace(RECIPE, decay_every=None, decay_factor=None))
    for model, tensors in zip(models, before, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), tensors, strict=True))
