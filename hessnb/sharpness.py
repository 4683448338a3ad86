"""How sharp the loss is: along a training, and under a rescaling that leaves the network's function as it is.

The largest eigenvalue of gradient descent rises until 2 / lr and stays about there (Cohen, Kaur, Li, Kolter &
Talwalkar, 2021, the edge of stability): on a quadratic of larger curvature the steps would grow without end. With
momentum beta that bound is 2 (1 + beta) / lr. What it is worth as a measure of the function is another question: in a
network of ReLUs one layer can be multiplied by a positive number and the next divided by it, and nothing changes but
the Hessian (Dinh, Pascanu, Bengio & Bengio, 2017).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hessnb.curvature import HessianOperator, lanczos
from hessnb.data import Splits
from hessnb.errors import InputError, real_number
from hessnb.pace import Pace
from hessnb.steps import Perturb
from hessnb.training import Recipe, State, evaluate, train


@dataclass(frozen=True)
class SharpnessAt:
    """One place of a training: after which epoch, the training loss, the largest eigenvalue of its Hessian, how exact.

    The residual is relative to the eigenvalue.
    """

    epoch: int
    train_loss: float
    lambda1: float
    residual: float


@dataclass(frozen=True)
class Followed:
    """What is there of a training that is followed: its ``state`` after some epoch, and the ``points`` up to there."""

    state: State
    points: list[SharpnessAt]


def stability_bound(lr: float, momentum: float = 0.0) -> float:
    """Return the curvature beyond which gradient descent with momentum grows along an eigenvector of a quadratic.

    Raises InputError for a learning rate that is not positive, or a momentum outside of [0, 1).
    """
    if not real_number("lr", lr) > 0:
        raise InputError(f"lr = {lr}: it must be positive")
    if not 0 <= real_number("momentum", momentum) < 1:
        raise InputError(f"momentum = {momentum}: it must be in [0, 1)")
    return 2 * (1 + momentum) / lr


def sharpness_along(
    model: nn.Module,
    data: Splits,
    recipe: Recipe,
    epochs: Collection[int],
    *,
    tol: float = 1e-2,
    samples: Tensor | None = None,
    batch_size: int = 250,
    perturbation: Perturb | None = None,
    progress: Callable[[int], None] = lambda epoch: None,
    followed: Followed | None = None,
    save: Callable[[Followed], None] | None = None,
    save_seconds: float = 60.0,
) -> list[SharpnessAt]:
    """Train ``model`` in place and return the largest Hessian eigenvalue after each of ``epochs``, 0 being the start.

    The eigenvalue is that of the mean loss over the training set, or over its ``samples``, indices (m,), to a relative
    residual of ``tol``. ``recipe`` and ``perturbation`` as for `hessnb.training.train`. With a batch of the whole
    training set an epoch is a step. ``progress`` is called with each epoch that is done.

    ``save`` is called after an epoch every ``save_seconds``, with tensors that are live: copy or write them before
    returning. Given one of these as ``followed``, it goes on from there, to the same points.

    Raises InputError for epochs that the recipe does not have, and what `hessnb.training.train` does.
    """
    if outside := sorted(epoch for epoch in epochs if not 0 <= epoch <= recipe.max_epochs):
        raise InputError(f"epochs {outside}: the training has those from 0 to {recipe.max_epochs}")
    points = list(followed.points) if followed else []
    pace = Pace(save_seconds)
    batches = data.train.batches(batch_size)

    def look(epoch: int, loss: float) -> None:
        operator = HessianOperator(model, F.cross_entropy, batches, samples=samples)
        found = lanczos(operator, 1, tol, which="LA")
        points.append(SharpnessAt(epoch, loss, float(found.eigenvalues[0]), float(found.residuals[0])))

    def after_epoch(state: State) -> None:
        if state.epoch in epochs:
            look(state.epoch, state.history[-1].train_loss)
        progress(state.epoch)
        if save is not None and pace.is_due():
            save(Followed(state, points))
            pace.saved()

    if 0 in epochs and followed is None:
        look(0, evaluate(model, data.train)[0])
    state = followed.state if followed else None
    train(model, data, recipe, perturbation=perturbation, state=state, on_epoch=after_epoch)
    return points


def rescaled(model: nn.Module, first: str, second: str, factor: float) -> nn.Module:
    """Return a copy of ``model``, the layer ``first`` multiplied by ``factor`` and the weight of ``second`` divided.

    Where nothing but ReLUs and max-pooling lie between the two modules of these names, the copy computes the same
    function; with a power of two as factor to the last bit, as long as nothing overflows or underflows. Raises
    InputError for a module without a weight, a weight that both have, or a factor that is not positive and finite.
    """
    if not 0 < real_number("factor", factor) < math.inf:
        raise InputError(f"factor = {factor}: a ReLU commutes with positive finite factors alone")
    result = copy.deepcopy(model)
    named = dict(result.named_modules())
    for name in (first, second):
        if not isinstance(getattr(named.get(name), "weight", None), Tensor):
            known = [known for known, module in named.items() if isinstance(getattr(module, "weight", None), Tensor)]
            raise InputError(f"the model has no layer {name!r} with a weight; it has: {', '.join(known)}")
    if any(p is named[second].weight for p in named[first].parameters()):
        raise InputError(f"the layers {first!r} and {second!r} have the same weight: name two that follow each other")
    with torch.no_grad():
        for parameter in named[first].parameters():
            parameter.mul_(factor)
        named[second].get_parameter("weight").div_(factor)
    return result
