"""Stochastic gradient descent with momentum, to a training loss or for a number of epochs (the paper's section 3.1).

Data stay on the device and minibatches are gathered there; there is no loader. A training is a pure function of the
model's initial weights, the data and the recipe: the order of samples depends on the seed and the epoch alone, so a
training that goes on from a saved `State` ends in the same bits as one that was never stopped (same machine, same
number of threads). Layers that draw random numbers are outside of this: dropout takes PyTorch's global generator.

How steps are taken fast on CUDA is in `hessnb.steps`; losses and accuracies are computed in full precision everywhere.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hessnb.checks import check_samples
from hessnb.data import Split, Splits
from hessnb.errors import InputError, RunFailed, real_number, whole_number
from hessnb.models import cuda_devices, inference
from hessnb.steps import Perturb, Steps, minibatch_step, momentum_of

__all__ = [
    "PATIENCE",
    "Collapsed",
    "Diverged",
    "Epoch",
    "Recipe",
    "State",
    "TrainingFailed",
    "evaluate",
    "is_finished",
    "reached_target",
    "train",
]

# Samples per forward pass of an evaluation: large enough to be fast, small enough for any network here.
EVALUATION_BATCH = 1000

# Epochs in a row without anything learned after which a network that had learned something is given up.
PATIENCE = 20


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
        for name, count, least in (
            ("batch_size", self.batch_size, 1),
            ("max_epochs", self.max_epochs, 1),
            ("seed", self.seed, 0),
            ("decay_every", 1 if self.decay_every is None else self.decay_every, 1),
        ):
            whole_number(name, count, least)
        for name, number in (
            ("lr", self.lr),
            ("momentum", self.momentum),
            ("loss_target", 1.0 if self.loss_target is None else self.loss_target),
            ("decay_factor", 1.0 if self.decay_factor is None else self.decay_factor),
        ):
            real_number(name, number)
        for name, ok, need in (
            ("lr", 0 < self.lr < math.inf, "positive and finite"),
            ("momentum", 0 <= self.momentum < 1, "in [0, 1)"),
            ("seed", self.seed < 2**32, "below 2**32"),
            ("loss_target", self.loss_target is None or self.loss_target > 0, "positive"),
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


class TrainingFailed(RunFailed):
    """A training that cannot end well; ``state.history`` ends with the epoch that showed it."""

    def __init__(self, state: State, reason: str) -> None:
        last = state.history[-1]
        super().__init__(
            f"training {reason}: loss {last.train_loss:.4g} after epoch {last.epoch} at learning rate {last.lr:g}; "
            "lower it"
        )
        self.state = state


class Diverged(TrainingFailed):
    """The training loss became infinite or NaN."""

    def __init__(self, state: State) -> None:
        super().__init__(state, "diverged")


class Collapsed(TrainingFailed):
    """A network has lost what it had learned: for `PATIENCE` epochs its loss has been that of a constant answer."""

    def __init__(self, state: State) -> None:
        super().__init__(state, "collapsed")


def is_finished(history: list[Epoch], recipe: Recipe) -> bool:
    """Return whether the recipe's loss target or its last epoch has been reached."""
    return len(history) >= recipe.max_epochs or reached_target(history, recipe)


def reached_target(history: list[Epoch], recipe: Recipe) -> bool:
    """Return whether the last epoch's training loss is at most the recipe's target."""
    return recipe.loss_target is not None and bool(history) and history[-1].train_loss <= recipe.loss_target


@torch.inference_mode(False)
@torch.enable_grad()
def train(
    model: nn.Module,
    data: Splits,
    recipe: Recipe,
    *,
    perturbation: Perturb | None = None,
    state: State | None = None,
    on_epoch: Callable[[State], None] | None = None,
) -> State:
    """Train ``model`` in place, in train mode, by the mean cross-entropy on ``data.train``; return the final state.

    With a ``perturbation`` each step is taken on inputs perturbed for the network as it is then: adversarial training
    (the paper's Algorithm 1), if the perturbation is an attack. ``state`` resumes an earlier training; ``on_epoch`` is
    called with the state at the end of each epoch (its tensors are the live ones: copy or save them before returning).
    Model and data must be on one device. On CUDA let go of the curvature operators of a model before you train it:
    steps cannot be captured while their graphs hold on to its weights.

    Raises InputError for a batch size larger than the training set, a network without trainable weights, a state of
    another network, and samples or labels that do not fit it or are not finite; Diverged when the loss is not finite;
    and Collapsed when a network has learned something and then `PATIENCE` epochs in a row is no better than a constant
    answer.
    """
    train_set = data.train
    check_trainable(model, data, recipe)
    optimizer = torch.optim.SGD(model.parameters(), lr=recipe.lr, momentum=recipe.momentum)
    state = state or State()
    if state.model:
        try:
            model.load_state_dict(state.model)
        except RuntimeError as error:  # with a line for each tensor
            told = str(error).splitlines()[-1].strip()
            raise InputError(f"the state does not fit the network: {told} Give the state of the same layers") from error
        for parameter, buffer in zip(model.parameters(), state.momentum, strict=False):
            optimizer.state[parameter]["momentum_buffer"] = buffer.to(parameter.device, copy=True)
    model.train()
    step = minibatch_step(model, train_set, optimizer, perturbation)
    steps = Steps(step, optimizer, list(model.buffers()), capture=perturbation is None)
    while not is_finished(state.history, recipe):
        started = time.perf_counter()
        lr = recipe.lr_at(state.epoch)
        try:
            steps.epoch(epoch_order(train_set, recipe, state.epoch), recipe.batch_size, lr)
        except InputError:  # of an attack, which refuses a network that has diverged
            if math.isfinite(evaluate(model, train_set)[0]):
                raise
        momentum = [momentum_of(optimizer, p) for p in model.parameters()] if recipe.momentum else []
        state = after_epoch(model, data, state, lr, momentum, started)
        check_progress(state, train_set)
        if on_epoch:
            on_epoch(state)
    return state


def check_batch_size(recipe: Recipe, train_set: Split) -> None:
    """Raise InputError for a batch size larger than the training set."""
    if recipe.batch_size > len(train_set):
        raise InputError(f"batch_size = {recipe.batch_size}: the training set has only {len(train_set):,} samples")


def check_trainable(model: nn.Module, data: Splits, recipe: Recipe) -> None:
    """Raise InputError unless a network can be trained on the data by the recipe, as far as can be told beforehand."""
    check_batch_size(recipe, data.train)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputError("the network has no weights that can be trained: unfreeze some with .requires_grad_()")
    for split in (data.train, data.test):
        check_samples(model, split.images, split.labels, probes=0)
    if (len(data.train) - 1) % recipe.batch_size == 0:
        with torch.no_grad(), torch.random.fork_rng(cuda_devices(model)):
            try:
                copy.deepcopy(model).train()(data.train.images[:1])
            except ValueError as error:  # of batch normalisation
                raise InputError(
                    f"batch_size = {recipe.batch_size}: of {len(data.train):,} samples one is left for the last step "
                    "of an epoch, which batch normalisation cannot take; choose another"
                ) from error


def after_epoch(
    model: nn.Module, data: Splits, state: State, lr: float, momentum: list[Tensor], started: float
) -> State:
    """Return the state after one more epoch, whose losses and accuracies are computed here."""
    train_loss, train_accuracy = evaluate(model, data.train)
    test_loss, test_accuracy = evaluate(model, data.test)
    seconds = time.perf_counter() - started
    line = Epoch(state.epoch + 1, lr, train_loss, train_accuracy, test_loss, test_accuracy, seconds)
    return State(state.epoch + 1, model.state_dict(), momentum, [*state.history, line])


def check_progress(state: State, train_set: Split) -> None:
    """Raise Diverged or Collapsed when the last epochs of a training show that it will not end well."""
    losses = [epoch.train_loss for epoch in state.history]
    if not math.isfinite(losses[-1]):
        raise Diverged(state)
    constant = constant_loss(train_set.labels)  # of the share of each class, the best of all constant answers
    if min(losses) < 0.9 * constant < 0.99 * constant < min(losses[-PATIENCE:]):
        raise Collapsed(state)


def constant_loss(labels: Tensor) -> float:
    """Return the cross-entropy (nats) of labels (N,) under the shares of their classes."""
    shares = labels.bincount().double() / len(labels)
    return float(torch.special.entr(shares).sum())


def evaluate(model: nn.Module, data: Split) -> tuple[float, float]:
    """Return the mean cross-entropy (nats) and the accuracy over ``data``, in eval mode, summed in float64."""
    loss = torch.zeros((), dtype=torch.float64, device=data.labels.device)
    correct = torch.zeros((), dtype=torch.int64, device=data.labels.device)
    with inference(model) as forward:
        for images, labels in data.batches(EVALUATION_BATCH):
            logits = forward(images)
            loss += F.cross_entropy(logits.double(), labels, reduction="sum")
            correct += (logits.argmax(1) == labels).sum()
    return loss.item() / len(data), correct.item() / len(data)


def epoch_order(train_set: Split, recipe: Recipe, epoch: int) -> Tensor:
    """Return the order of samples in an epoch: a function of seed and epoch alone, drawn on the CPU for any device."""
    generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + epoch)
    return torch.randperm(len(train_set), generator=generator)
