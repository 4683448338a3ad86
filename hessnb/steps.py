"""The optimiser steps of a training: on CUDA captured once as a graph and replayed, with products in TF32.

A replay is one launch instead of hundreds, which is what a step on a small minibatch mostly consists of.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hessnb.data import Split
from hessnb.precision import tf32

# Called with a network, inputs (N, ...) and labels (N,); returns the inputs perturbed, as an attack does.
Perturb = Callable[[nn.Module, Tensor, Tensor], Tensor]

# Takes an optimiser step on the samples of these indices.
Step = Callable[[Tensor], None]

# Calls before the capture, in which cuDNN and cuBLAS choose their kernels and take their memory.
_WARM_UP = 3


def minibatch_step(
    model: nn.Module, data: Split, optimizer: torch.optim.Optimizer, perturbation: Perturb | None = None
) -> Step:
    """Return the step of a network on the mean cross-entropy of a minibatch, perturbed first if so wished."""

    def step(index: Tensor) -> None:
        images, labels = data.images[index], data.labels[index]
        if perturbation is not None:
            images = perturbation(model, images, labels)
        optimizer.zero_grad()  # of what the perturbation, or somebody before, left behind
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


class Steps:
    """The optimiser steps of a training, epoch for epoch; on CUDA those on whole minibatches are captured.

    ``step`` takes one on the samples of an index whose last dimension runs over a minibatch, changes nothing but the
    optimiser's parameters, their momenta and ``buffers``, and leaves no gradients behind. It may only be captured if it
    does nothing on the host.
    """

    def __init__(
        self, step: Step, optimizer: torch.optim.Optimizer, buffers: Sequence[Tensor], *, capture: bool = True
    ) -> None:
        self._step, self._optimizer, self._buffers = step, optimizer, buffers
        self._parameters: list[Tensor] = [p for group in optimizer.param_groups for p in group["params"]]
        self._capture = capture and self._parameters[0].is_cuda
        self._captured: Step | None = None
        self._lr = math.nan

    def epoch(self, order: Tensor, batch_size: int, lr: float) -> None:
        """Take one pass of steps over the samples in an order (..., N) of their indices."""
        if lr != self._lr:  # a captured step has its learning rate within
            self._lr, self._captured = lr, None
            for group in self._optimizer.param_groups:
                group["lr"] = lr
        with tf32() if self._parameters[0].is_cuda else nullcontext():
            for index in order.to(self._parameters[0].device).split(batch_size, dim=-1):
                whole = index.shape[-1] == batch_size
                if whole and self._capture and self._captured is None:
                    self._captured = captured(self._step, index, self._changed())
                (self._captured if whole and self._captured else self._step)(index)

    def _changed(self) -> list[Tensor]:
        """Return all that a step changes, with momenta where there are none yet: captured steps have a fixed place."""
        for parameter in self._parameters:
            if self._optimizer.defaults["momentum"]:
                self._optimizer.state[parameter]["momentum_buffer"] = momentum_of(self._optimizer, parameter)
        momenta = [state["momentum_buffer"] for state in self._optimizer.state.values() if "momentum_buffer" in state]
        return [*self._parameters, *momenta, *self._buffers]


def momentum_of(optimizer: torch.optim.Optimizer, parameter: Tensor) -> Tensor:
    """Return a weight's momentum: zero for one that has had no gradient, which is where the optimiser starts."""
    buffer: Tensor | None = optimizer.state[parameter].get("momentum_buffer")
    return torch.zeros_like(parameter) if buffer is None else buffer


def captured(
    function: Callable[[Tensor], None], argument: Tensor, changed: Sequence[Tensor]
) -> Callable[[Tensor], None]:
    """Return a function of tensors like ``argument``, on its CUDA device, that does what ``function`` does.

    ``function`` works in place: ``changed`` are all tensors that it changes and reads again. They keep their values
    here, and must stay where they are as long as the result is called. What it does on the host happens here alone.
    After the notes on CUDA graphs in PyTorch's documentation.
    """
    static, kept = argument.clone(), [tensor.detach().clone() for tensor in changed]
    with torch.cuda.device(argument.device):
        side, current = _side_stream(argument.device), torch.cuda.current_stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP):
                function(static)
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # The stream is entered here as well, since a capture that fails does not leave it.
        with _no_collection(), torch.cuda.stream(side), torch.cuda.graph(graph, stream=side):
            function(static)
    with torch.no_grad():
        for tensor, value in zip(changed, kept, strict=True):
            tensor.copy_(value)

    def replay(argument: Tensor) -> None:
        static.copy_(argument)
        graph.replay()

    return replay


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream of all captures on a device: cuBLAS keeps a workspace for each stream that it has seen."""
    return torch.cuda.Stream(device)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Collect garbage before, and none inside: a CUDA graph that goes during a capture breaks it."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def time_when_done(device: torch.device) -> float:
    """Return the time, in seconds of ``time.perf_counter``, at which all that was begun on a device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
