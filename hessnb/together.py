"""Several seeds of one training side by side: each step takes one minibatch of every network at once.

The steps of small networks on small minibatches leave a GPU nearly idle, so that several cost hardly more than one. On
a CPU they are slower together (1.2 to 1.5 times, for three seeds of the networks here).
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from hessnb.data import Split, Splits
from hessnb.errors import InputError
from hessnb.identity import architecture, digest
from hessnb.steps import Step, Steps, minibatch_step, momentum_of, time_when_done
from hessnb.training import (
    Recipe,
    State,
    TrainingFailed,
    after_epoch,
    check_batch_size,
    check_progress,
    check_trainable,
    epoch_order,
    is_finished,
)

__all__ = ["is_faster_together", "train_together"]

# Steps that are timed, after those in which kernels are chosen and steps are captured.
_TIMED_STEPS = 50


def train_together(
    models: Sequence[nn.Module],
    data: Splits,
    recipes: Sequence[Recipe],
    *,
    states: Sequence[State] | None = None,
    on_epoch: Callable[[int, State], None] | None = None,
) -> list[State | TrainingFailed]:
    """Train each of ``models``, in place, by its recipe, as `hessnb.training.train` would but for rounding.

    The recipes differ in nothing but the seed. ``states`` resume earlier trainings, from whatever epochs; ``on_epoch``
    is called with the number of a network and its state after each of its epochs. A network leaves the others when its
    training has ended. Returned is the final state of each, or why its training failed.

    Raises InputError for models that are not alike, one model twice, frozen weights, random layers and batch
    normalisation without ``momentum``, for recipes that differ in more than their seed or whose learning rate is not
    constant, and for what `hessnb.training.train` refuses.
    """
    _check_alike(models, recipes)
    for model in models:
        check_trainable(model, data, recipes[0])
    ended: dict[int, State | TrainingFailed] = {}
    under_way = {i: states[i] if states else State() for i in range(len(models))}
    for i, state in under_way.items():
        models[i].train()
        if state.model:
            models[i].load_state_dict(state.model)
    while under_way:
        for i, state in under_way.items():
            if i not in ended and is_finished(state.history, recipes[i]):
                ended[i] = state
        under_way = {i: state for i, state in under_way.items() if i not in ended}
        if under_way:
            _until_one_ends(models, data, recipes, under_way, ended, on_epoch)
    return [ended[i] for i in range(len(models))]


def _until_one_ends(
    models: Sequence[nn.Module],
    data: Splits,
    recipes: Sequence[Recipe],
    under_way: dict[int, State],
    ended: dict[int, State | TrainingFailed],
    on_epoch: Callable[[int, State], None] | None,
) -> None:
    """Train the networks ``under_way`` until one is finished or has failed; change their states."""
    numbers, recipe = list(under_way), recipes[0]
    stacked = Stacked([models[i] for i in numbers], [under_way[i].momentum for i in numbers], recipe)
    steps = Steps(stacked.step_on(data.train), stacked.optimizer, list(stacked.buffers.values()))
    while not any(i in ended or is_finished(under_way[i].history, recipe) for i in numbers):
        started = time.perf_counter()
        orders = [epoch_order(data.train, recipes[i], under_way[i].epoch) for i in numbers]
        steps.epoch(torch.stack(orders), recipe.batch_size, recipe.lr)
        seconds = (time_when_done(data.train.labels.device) - started) / len(numbers)
        for place, i in enumerate(numbers):
            begun = time.perf_counter() - seconds  # its share of the steps, and all of its evaluation
            state = after_epoch(models[i], data, under_way[i], recipe.lr, stacked.momentum(place), begun)
            under_way[i] = state
            try:
                check_progress(state, data.train)
            except TrainingFailed as failed:
                ended[i] = failed
            else:
                if on_epoch:
                    on_epoch(i, state)


class Stacked:
    """Networks whose parameters and buffers lie behind each other, by name; those of the models are views of these."""

    def __init__(self, models: Sequence[nn.Module], momenta: Sequence[list[Tensor]], recipe: Recipe) -> None:
        # Not on the device "meta", which unties tied weights.
        self._skeleton = copy.deepcopy(models[0]).train()
        self.parameters = _behind([dict(model.named_parameters()) for model in models])
        self.buffers = _behind([dict(model.named_buffers()) for model in models])
        for i, model in enumerate(models):
            for name, tensor in (*model.named_parameters(), *model.named_buffers()):
                tensor.data = (self.parameters | self.buffers)[name][i]
        self.optimizer = torch.optim.SGD(self.parameters.values(), lr=recipe.lr, momentum=recipe.momentum)
        if recipe.momentum:
            for place, parameter in enumerate(self.parameters.values()):
                each = [m[place].to(parameter) if m else torch.zeros_like(parameter[i]) for i, m in enumerate(momenta)]
                self.optimizer.state[parameter]["momentum_buffer"] = torch.stack(each)

    def momentum(self, place: int) -> list[Tensor]:
        """Return the momenta of the network at a place of the stack."""
        if not self.optimizer.defaults["momentum"]:
            return []
        return [momentum_of(self.optimizer, parameter)[place] for parameter in self.parameters.values()]

    def step_on(self, data: Split) -> Step:
        """Return the step of all networks on minibatches of an index (networks, samples)."""

        def loss(parameters: dict[str, Tensor], buffers: dict[str, Tensor], images: Tensor, labels: Tensor) -> Tensor:
            logits: Tensor = functional_call(self._skeleton, (parameters, buffers), (images,))
            return F.cross_entropy(logits, labels)

        gradients = vmap(grad(loss))

        def step(index: Tensor) -> None:
            found = gradients(self.parameters, self.buffers, data.images[index], data.labels[index])
            for name, parameter in self.parameters.items():
                parameter.grad = found[name]
            self.optimizer.step()
            self.optimizer.zero_grad()

        return step


def _behind(each: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([tensors[name].detach() for tensors in each]) for name in each[0]}


def is_faster_together(models: Sequence[nn.Module], data: Split, recipe: Recipe) -> bool:
    """Return whether steps of these networks take less time together than one after the other; changes none of them.

    Timed here and now, on the device where models and data are. Raises InputError for a batch size larger than the
    training set.
    """
    check_batch_size(recipe, data)
    count = min(_TIMED_STEPS, len(data) // recipe.batch_size)
    order = torch.arange(count * recipe.batch_size)

    def seconds(steps: Steps, order: Tensor) -> float:
        steps.epoch(order, recipe.batch_size, recipe.lr)
        started = time_when_done(data.labels.device)
        steps.epoch(order, recipe.batch_size, recipe.lr)
        return time_when_done(data.labels.device) - started

    alone = copy.deepcopy(models[0]).train()
    optimizer = torch.optim.SGD(alone.parameters(), lr=recipe.lr, momentum=recipe.momentum)
    steps = Steps(minibatch_step(alone, data, optimizer), optimizer, list(alone.buffers()))
    stacked = Stacked(copy.deepcopy(list(models)), [[] for _ in models], recipe)
    together = Steps(stacked.step_on(data), stacked.optimizer, list(stacked.buffers.values()))
    return seconds(together, order.expand(len(models), -1)) < len(models) * seconds(steps, order)


def _check_alike(models: Sequence[nn.Module], recipes: Sequence[Recipe]) -> None:
    kinds = {digest(_kind(model)) for model in models}
    if len(kinds) != 1 or len(models) != len(recipes):
        raise InputError("networks are trained together that are alike, each with its recipe")
    if len(set(models)) < len(models):
        raise InputError("a network is there twice: give copies of it, copy.deepcopy(model)")
    for name, module in models[0].named_modules():
        if isinstance(module, _DropoutNd) or (isinstance(module, _BatchNorm) and module.momentum is None):
            raise InputError(f"networks with such a layer are trained one by one: {name} is {module}")
    if not all(parameter.requires_grad for model in models for parameter in model.parameters()):
        raise InputError("networks with frozen weights are trained one by one")
    if len({replace(recipe, seed=0) for recipe in recipes}) > 1:
        raise InputError("recipes of networks that are trained together differ in nothing but the seed")
    if recipes[0].decay_every is not None:
        raise InputError("networks are trained together at a constant learning rate: take off decay_every")


def _kind(model: nn.Module) -> list[object]:
    """Return what must be the same of networks that are trained together: all but the values of their tensors."""
    tensors = (*model.named_parameters(), *model.named_buffers())
    return [*architecture(model), *((name, tuple(t.shape), str(t.dtype), str(t.device)) for name, t in tensors)]
