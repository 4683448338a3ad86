"""Stochastic gradient descent with momentum, to a training loss or for a number of epochs (the paper's section 3.1).

Data stay on the device and minibatches are gathered there; there is no loader. A training is a pure function of the
model's initial weights, the data and the recipe: the order of samples depends on the seed and the epoch alone, so a
training that goes on from a saved `State` ends in the same bits as one that was never stopped (same machine, same
number of threads).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hessnb.data import Split, Splits
from hessnb.errors import InputError, RunFailed
from hessnb.models import eval_mode

# Samples per forward pass of an evaluation: large enough to be fast, small enough for any network here.
EVALUATION_BATCH = 1000

# Called with the network, the inputs (N, C, H, W) and labels (N,) of a minibatch; returns the inputs to train on.
Perturbation = Callable[[nn.Module, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Recipe:
    """How a network is trained.

    Training stops at the end of the first epoch whose loss over the whole training set, in eval mode, is at most
    ``loss_target``, and after ``max_epochs`` at the latest. The learning rate of epoch e (from 0) is
    ``lr * decay_factor ** (e // decay_every)``, or constant without ``decay_every``. The last minibatch of an epoch
    may be smaller than ``batch_size``. Raises InputError for values that cannot be trained with.
    """

    batch_size: int
    lr: float
    momentum: float
    max_epochs: int
    seed: int
    loss_target: float | None = None
    decay_every: int | None = None
    decay_factor: float | None = None

    def __post_init__(self) -> None:
        for name, ok, need in (
            ("batch_size", self.batch_size >= 1, "at least 1"),
            ("lr", 0 < self.lr < math.inf, "positive and finite"),
            ("momentum", 0 <= self.momentum < 1, "in [0, 1)"),
            ("max_epochs", self.max_epochs >= 1, "at least 1"),
            ("seed", 0 <= self.seed < 2**32, "in [0, 2**32)"),
            ("loss_target", self.loss_target is None or self.loss_target > 0, "positive"),
            ("decay_every", self.decay_every is None or self.decay_every >= 1, "at least 1"),
            ("decay_factor", self.decay_factor is None or 0 < self.decay_factor <= 1, "in (0, 1]"),
        ):
            if not ok:
                raise InputError(f"{name} = {getattr(self, name)}: it must be {need}")
        if (self.decay_every is None) != (self.decay_factor is None):
            raise InputError("decay_every and decay_factor belong together: give both or neither")

    def lr_at(self, epoch: int) -> float:
        """Return the learning rate of an epoch, counted from 0."""
        if self.decay_every is None or self.decay_factor is None:
            return self.lr
        return self.lr * self.decay_factor ** (epoch // self.decay_every)


@dataclass(frozen=True)
class Epoch:
    """One line of a training's history: losses (mean cross-entropy, nats) and accuracies (fractions), in eval mode."""

    epoch: int
    lr: float
    train_loss: float
    train_accuracy: float
    test_loss: float
    test_accuracy: float
    seconds: float


@dataclass
class State:
    """All that a training needs to go on: finished epochs, the model's and the optimiser's tensors, the history."""

    epoch: int = 0
    model: dict[str, Tensor] = field(default_factory=dict)
    momentum: list[Tensor] = field(default_factory=list)
    history: list[Epoch] = field(default_factory=list)


class Diverged(RunFailed):
    """The training loss became infinite or NaN; ``state.history`` ends with that epoch."""

    def __init__(self, state: State) -> None:
        last = state.history[-1]
        super().__init__(
            f"training diverged: loss {last.train_loss} after epoch {last.epoch} at learning rate {last.lr:g}; lower it"
        )
        self.state = state


def is_finished(history: list[Epoch], recipe: Recipe) -> bool:
    """Return whether the recipe's loss target or its last epoch has been reached."""
    return len(history) >= recipe.max_epochs or reached_target(history, recipe)


def reached_target(history: list[Epoch], recipe: Recipe) -> bool:
    """Return whether the last epoch's training loss is at most the recipe's target."""
    return recipe.loss_target is not None and bool(history) and history[-1].train_loss <= recipe.loss_target


def train(
    model: nn.Module,
    data: Splits,
    recipe: Recipe,
    *,
    perturbation: Perturbation | None = None,
    state: State | None = None,
    on_epoch: Callable[[State], None] | None = None,
) -> State:
    """Train ``model`` in place on ``data.train`` by minimising the mean cross-entropy, and return the final state.

    With a ``perturbation`` each step is taken on inputs perturbed for the network as it is then: adversarial training
    (the paper's Algorithm 1), if the perturbation is an attack. ``state`` resumes an earlier training; ``on_epoch`` is
    called with the state at the end of each epoch (its tensors are the live ones: copy or save them before returning).
    Model and data must be on one device.

    Raises InputError for a batch size larger than the training set, and Diverged when the loss is not finite.
    """
    train_set = data.train
    if recipe.batch_size > len(train_set):
        raise InputError(f"batch_size = {recipe.batch_size}: the training set has only {len(train_set):,} samples")
    optimizer = torch.optim.SGD(model.parameters(), lr=recipe.lr, momentum=recipe.momentum)
    state = state or State()
    if state.model:
        model.load_state_dict(state.model)
        for parameter, buffer in zip(model.parameters(), state.momentum, strict=False):
            optimizer.state[parameter]["momentum_buffer"] = buffer.clone()
    model.train()
    while not is_finished(state.history, recipe):
        started = time.perf_counter()
        lr = recipe.lr_at(state.epoch)
        for group in optimizer.param_groups:
            group["lr"] = lr
        order = _order(len(train_set), recipe.seed, state.epoch)
        train_epoch(model, train_set, optimizer, recipe.batch_size, order, perturbation)
        train_loss, train_accuracy = evaluate(model, train_set)
        test_loss, test_accuracy = evaluate(model, data.test)
        seconds = time.perf_counter() - started
        state = State(
            epoch=state.epoch + 1,
            model=model.state_dict(),
            momentum=[_momentum(optimizer, p) for p in model.parameters()] if recipe.momentum else [],
            history=[
                *state.history,
                Epoch(state.epoch + 1, lr, train_loss, train_accuracy, test_loss, test_accuracy, seconds),
            ],
        )
        if not math.isfinite(train_loss):
            raise Diverged(state)
        if on_epoch:
            on_epoch(state)
    return state


def _momentum(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> Tensor:
    """Return a weight's momentum: zero for one that has had no gradient, which is where the optimiser starts."""
    buffer: Tensor | None = optimizer.state[parameter].get("momentum_buffer")
    return torch.zeros_like(parameter) if buffer is None else buffer


def train_epoch(
    model: nn.Module,
    data: Split,
    optimizer: torch.optim.Optimizer,
    batch_size: int,
    order: Tensor,
    perturbation: Perturbation | None = None,
) -> None:
    """Take one pass of optimiser steps over ``data`` in the given order of sample indices (N,)."""
    for index in order.to(data.labels.device).split(batch_size):
        images, labels = data.images[index], data.labels[index]
        if perturbation is not None:
            images = perturbation(model, images, labels)
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def evaluate(model: nn.Module, data: Split) -> tuple[float, float]:
    """Return the mean cross-entropy (nats) and the accuracy over ``data``, in eval mode, summed in float64."""
    loss = torch.zeros((), dtype=torch.float64, device=data.labels.device)
    correct = torch.zeros((), dtype=torch.int64, device=data.labels.device)
    with torch.no_grad(), eval_mode(model):
        for images, labels in data.batches(EVALUATION_BATCH):
            logits = model(images)
            loss += F.cross_entropy(logits.double(), labels, reduction="sum")
            correct += (logits.argmax(1) == labels).sum()
    return loss.item() / len(data), correct.item() / len(data)


def _order(n: int, seed: int, epoch: int) -> Tensor:
    """Return the order of samples in an epoch: a function of seed and epoch alone, drawn on the CPU for any device."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(n, generator=generator)
