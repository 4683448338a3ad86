"""The Hessian of a loss over a whole data set as a linear operator (the paper's section 3.1).

A product costs three gradients when it is made from scratch (Pearlmutter, 1994) and two when the graph of the first
gradient is kept. The operator keeps the graphs of as many minibatches as fit its memory budget and makes the others
anew in each product. Products are taken in the model's precision and summed over minibatches in float64.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hessnb.errors import InputError
from hessnb.models import eval_mode

LossFunction = Callable[[Tensor, Tensor], Tensor]


@dataclass
class _Batch:
    x: Tensor
    y: Tensor
    weight: float  # its share of the samples
    gradient: tuple[Tensor, ...] | None = None  # with its graph, if that is kept


class HessianOperator:
    """The Hessian of the mean loss over all samples of ``batches``, with respect to the trainable parameters.

    ``batches`` is an iterable of (x, y), read once and held; ``loss_fn(model(x), y)`` is a batch mean, so batches are
    weighted by their size and a ragged last one is exact. ``graph_memory`` bounds the bytes of kept graphs (default: a
    quarter of the device's memory; 0 keeps none). The model is evaluated in eval mode. While the operator is in use
    the parameters must not change: a product with a stale graph raises PyTorch's version error.

    Raises InputError for an empty data set, a model without trainable parameters, or a loss that is not a scalar or
    not finite.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction,
        batches: Iterable[tuple[Tensor, Tensor]],
        *,
        graph_memory: int | None = None,
    ) -> None:
        self._model, self._loss_fn = model, loss_fn
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        if not self._parameters:
            raise InputError("the model has no trainable parameter, so its Hessian has no rows")
        pairs = list(batches)
        self.n_samples = sum(len(y) for _, y in pairs)
        if self.n_samples == 0:
            raise InputError("the data set is empty: a Hessian needs at least one sample")
        n = sum(p.numel() for p in self._parameters)
        self.shape = (n, n)
        self.dtype = self._parameters[0].dtype
        self.device = self._parameters[0].device
        self.n_matvecs = 0
        self._batches = [_Batch(x, y, len(y) / self.n_samples) for x, y in pairs]
        with full_precision():
            self._keep_graphs(_default_graph_memory(self.device) if graph_memory is None else graph_memory)

    def matvec(self, v: Tensor) -> Tensor:
        """Return H v, shape (n,), in the dtype of ``v``; raises InputError for another shape."""
        if v.shape != (self.shape[0],):
            raise InputError(f"a vector of shape {tuple(v.shape)} does not fit a Hessian of shape {self.shape}")
        parts = self._split(v.to(self.dtype))
        total = torch.zeros(self.shape[0], dtype=torch.float64, device=self.device)
        with full_precision():
            for batch in self._batches:
                kept = batch.gradient is not None
                gradient = batch.gradient if batch.gradient is not None else self._gradient(batch)
                # H is symmetric, so the vector-Jacobian product of the gradient is the product H v.
                product = torch.autograd.grad(
                    gradient, self._parameters, parts, retain_graph=kept, allow_unused=True, materialize_grads=True
                )
                total.add_(_flat(product), alpha=batch.weight)
        self.n_matvecs += 1
        return total.to(v.dtype)

    def __matmul__(self, v: Tensor) -> Tensor:
        """Return H v for a vector (n,), or column by column for a block (n, k)."""
        if v.ndim == 2:
            return torch.stack([self.matvec(column) for column in v.unbind(1)], dim=1)
        return self.matvec(v)

    def dense(self) -> Tensor:
        """Return the whole matrix (n, n) in the model's dtype: n products, for small networks."""
        return self @ torch.eye(self.shape[0], dtype=self.dtype, device=self.device)

    def _gradient(self, batch: _Batch) -> tuple[Tensor, ...]:
        with eval_mode(self._model), torch.enable_grad():
            loss = self._loss_fn(self._model(batch.x), batch.y)
            if loss.ndim != 0 or not torch.isfinite(loss):
                raise InputError(
                    f"the loss of a batch is {loss.detach() if loss.ndim == 0 else f'of shape {tuple(loss.shape)}'}: "
                    "a Hessian needs a scalar, finite batch mean; look for NaN in the data or the weights"
                )
            gradient = torch.autograd.grad(
                loss, self._parameters, create_graph=True, allow_unused=True, materialize_grads=True
            )
            # Where the loss is linear in a parameter its gradient has no graph; as a leaf it differentiates to zero.
            return tuple(part if part.requires_grad else part.requires_grad_() for part in gradient)

    def _keep_graphs(self, budget: int) -> None:
        """Keep the graphs of the first batches, as many as ``budget`` bytes hold; measured on the first batch."""
        per_sample = self._graph_bytes(self._batches[0]) / len(self._batches[0].y)
        for batch in self._batches:
            budget -= int(per_sample * len(batch.y))
            if budget < 0:
                break
            batch.gradient = self._gradient(batch)

    def _graph_bytes(self, batch: _Batch) -> int:
        """Return how many bytes the graph of one batch's gradient holds on to, beside the parameters and the data."""
        own = {t.untyped_storage().data_ptr() for t in (*self._parameters, batch.x, batch.y)}
        held: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                held[storage.data_ptr()] = storage.nbytes()
            return tensor.detach()

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            self._gradient(batch)
        return sum(held.values())

    def _split(self, v: Tensor) -> list[Tensor]:
        sizes = [p.numel() for p in self._parameters]
        return [part.view_as(p) for part, p in zip(v.split(sizes), self._parameters, strict=True)]


def _flat(tensors: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors]).to(torch.float64)


def _default_graph_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] // 4
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4


@contextmanager
def full_precision() -> Iterator[None]:
    """Switch TF32 and bfloat16 products off inside and restore them afterwards.

    TF32's 10 mantissa bits would drown a residual of 1e-4. PyTorch has two sets of switches, and reading the older one
    raises once the newer one was used: the older one is set with the newer as long as it can be read.
    """
    backends: Any = torch.backends
    cudnn, mkldnn = backends.cudnn, backends.mkldnn
    switches = (backends.cuda.matmul, cudnn.conv, cudnn.rnn, mkldnn.matmul, mkldnn.conv, mkldnn.rnn)
    newer = [switch.fp32_precision for switch in switches]
    try:
        older = torch.get_float32_matmul_precision(), cudnn.allow_tf32
    except RuntimeError:
        older = None
    try:
        if older:
            torch.set_float32_matmul_precision("highest")
            cudnn.allow_tf32 = False
        for switch in switches:
            switch.fp32_precision = "ieee"
        yield
    finally:
        if older:
            torch.set_float32_matmul_precision(older[0])
            cudnn.allow_tf32 = older[1]
        for switch, precision in zip(switches, newer, strict=True):
            switch.fp32_precision = precision
