"""The Hessian and the Gauss-Newton matrix of a loss over a whole data set as linear operators (section 3.1).

A product with the Hessian costs about three gradients when it is made from scratch (Pearlmutter, 1994) and at most two
when the graph of the first gradient is kept; one with the Gauss-Newton matrix (Schraudolph, 2002) a third less. The
operators keep the graphs of as many minibatches as fit a memory budget and make the others anew in each product.
Products are taken in the model's precision and summed over minibatches in float64.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from hessnb.checks import check_data, check_labels, is_mean, varied
from hessnb.curvature import checks
from hessnb.curvature.cheap_layers import cheap_layers, suits
from hessnb.curvature.memory import available_memory, held_bytes
from hessnb.errors import InputError, whole_number
from hessnb.models import evaluation

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator

LossFunction = Callable[[Tensor, Tensor], Tensor]
# Maps a vector, split like the parameters, to its product, split likewise; the flag says whether it is called again.
Linearisation = Callable[[list[Tensor], bool], Sequence[Tensor]]


@dataclass
class _Batch:
    x: Tensor
    y: Tensor
    weight: float  # its share of the samples
    kept: Linearisation | None = None


class CurvatureOperator(ABC):
    """What `HessianOperator` and `GGNOperator` share: data, checks, kept graphs, and products.

    ``shape`` is (n, n), ``dtype`` and ``device`` are the parameters', ``names`` are the parameters that the rows
    belong to, in order, ``n_samples`` counts the samples and ``n_matvecs`` the products made so far.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction,
        batches: Iterable[tuple[Tensor, Tensor]],
        *,
        parameters: Sequence[str] | None = None,
        samples: Tensor | Sequence[int] | None = None,
        graph_memory: int | None = None,
    ) -> None:
        if graph_memory is not None:
            whole_number("graph_memory", graph_memory, 0)
        self._model, self._loss_fn = model, loss_fn
        chosen = checks.chosen_parameters(model, parameters)
        self.names = tuple(chosen)
        self._parameters = list(chosen.values())
        self._constants = {name: p.detach() for name, p in model.named_parameters() if name not in chosen}
        self.dtype, self.device = self._parameters[0].dtype, self._parameters[0].device
        n = sum(p.numel() for p in self._parameters)
        self.shape = (n, n)
        self.n_matvecs = 0
        self._in_place = False

        # Reading the data and trying out the model may draw random numbers; nobody else shall notice.
        with evaluation(model):
            every, again = checks.read_twice(batches)
            pairs = every if samples is None else _select(every, samples)
            self.n_samples = sum(len(x) for x, _ in pairs)
            self._noted = checks.note(model, pairs)
            check_data(pairs, self.device, self.dtype)
            with torch.no_grad():
                self._in_place = self._works_in_place(pairs[0][0][:1])
                check_labels(self._forward(pairs[0][0][:1]), pairs)
            for x, y in (pairs[0], varied(pairs)):
                checks.model_and_loss(model, self._forward, loss_fn, x, y)
            if again is not None:
                checks.same_samples(every, again, self._mean_loss)
            self._batches = [_Batch(x, y, len(x) / self.n_samples) for x, y in pairs]
            self._check_all_used()
            self._cheap = self._is_cheap_right()
            self._check_derivatives()
            self._keep_graphs(available_memory(self.device) // 2 if graph_memory is None else graph_memory)

    # -- products -------------------------------------------------------------------------------------------------

    def matvec(self, v: Tensor) -> Tensor:
        """Return the product with a vector (n,), in the dtype of ``v``, float64 for integers.

        Raises InputError for another shape.
        """
        if v.shape != (self.shape[0],):
            raise InputError(f"a vector of shape {tuple(v.shape)} does not fit an operator of shape {self.shape}")
        return self._products(v[:, None])[:, 0].to(_floating(v))

    def __matmul__(self, v: Tensor) -> Tensor:
        """Return the product with a vector (n,) or a block (n, k), which goes over the data once for all columns."""
        if v.ndim == 2 and v.shape[0] == self.shape[0]:
            return self._products(v).to(_floating(v))
        return self.matvec(v)

    def dense(self) -> Tensor:
        """Return the whole matrix (n, n) in the model's dtype: n products, for small networks.

        Raises InputError when it would not fit into the memory at hand.
        """
        n = self.shape[0]
        if 2 * 8 * n * n > available_memory(self.device):
            raise InputError(f"a dense matrix of shape {self.shape} does not fit into memory; use products, or lanczos")
        return self @ torch.eye(n, dtype=self.dtype, device=self.device)

    def to_scipy(self) -> LinearOperator:
        """Return a view for SciPy's sparse solvers (eigsh, cg, ...), in float64."""
        from scipy.sparse.linalg import LinearOperator

        def product(block: object) -> object:
            return (self @ torch.from_numpy(np.array(block, "float64", order="C")).to(self.device)).cpu().numpy()

        def vector_product(v: object) -> object:
            return product(np.ravel(v))  # type: ignore[call-overload]

        return LinearOperator(
            self.shape, matvec=vector_product, rmatvec=vector_product, matmat=product, rmatmat=product, dtype="float64"
        )

    def _products(self, block: Tensor) -> Tensor:
        """Return the products with the columns of (n, k) in float64."""
        checks.unchanged(self._model, self._noted)
        with evaluation(self._model):
            # Scaled by powers of two, which is exact, since float32 does not hold what float64 does.
            block = block.detach().to(self.device, torch.float64)
            scale = torch.exp2(torch.frexp(block.abs().amax(0)).exponent.double())
            vectors = [self._split(v) for v in (block / scale).to(self.dtype).unbind(1)]
            total = torch.zeros(len(vectors), self.shape[0], dtype=torch.float64, device=self.device)
            for batch in self._batches:
                linearisation = batch.kept or self._linearise(batch.x, batch.y)
                for j, v in enumerate(vectors):
                    again = batch.kept is not None or j + 1 < len(vectors)
                    for sum_of_part, part in zip(self._split(total[j]), linearisation(v, again), strict=True):
                        sum_of_part.add_(part, alpha=batch.weight)
        self.n_matvecs += len(vectors)
        return total.T * scale

    # -- graphs ---------------------------------------------------------------------------------------------------

    @abstractmethod
    def _linearise(self, x: Tensor, y: Tensor) -> Linearisation:
        """Return the map from a vector to its product with the matrix of one minibatch's mean loss.

        The operator keeps it, so it must not hold on to the operator: the graphs go when that goes, not when Python
        next looks for circles.
        """

    @abstractmethod
    def _check_derivatives(self) -> None:
        """Raise InputError for a model whose derivatives are not what the products rest on."""

    def _layers(self, *, fixed: bool = False) -> AbstractContextManager[object]:
        return cheap_layers(fixed=fixed) if self._cheap else nullcontext()

    def _is_cheap_right(self) -> bool:
        """Return whether cheap layers give the same product as PyTorch's own, on a sample or two.

        They do not where the model calls itself again in the backward pass, as checkpoints do, or is written with
        functional transforms, which cannot see through them.
        """
        batch = self._batches[0]
        x, y = batch.x[:2], batch.y[:2]
        v = torch.randn(self.shape[0], generator=torch.Generator().manual_seed(0)).to(self.device, self.dtype)

        def product(cheap: bool) -> Tensor:
            self._cheap = cheap
            return _flat(self._linearise(x, y)(self._split(v), False))

        return suits(lambda: product(True), lambda: product(False))

    def _forward(self, x: Tensor) -> Tensor:
        if self._in_place:
            x = x.clone()
        if self._constants:
            return torch.func.functional_call(self._model, self._constants, (x,))  # type: ignore[no-any-return]
        return self._model(x)  # type: ignore[no-any-return]

    def _works_in_place(self, x: Tensor) -> bool:
        """Return whether the model writes on its input, so that it needs a copy."""
        x = x.clone()
        version = x._version
        self._forward(x)
        return x._version != version

    def _loss(self, outputs: Tensor, y: Tensor) -> Tensor:
        loss = self._loss_fn(outputs, y)
        if not torch.isfinite(loss):
            raise InputError(
                f"the loss of a batch is {loss.item()}; look for overflow in the model's outputs, or class weights"
            )
        with torch.no_grad():
            is_mean(self._loss_fn, outputs.detach(), y, loss.detach())
        return loss

    def _mean_loss(self, pairs: list[tuple[Tensor, Tensor]]) -> tuple[float, float]:
        """Return the mean loss over all samples, and the mean of the magnitudes of the batches' losses."""
        with torch.no_grad():
            losses = [(len(x), self._loss_fn(self._forward(x), y).double()) for x, y in pairs]
        n = sum(size for size, _ in losses)
        return tuple(float(sum(size * f(loss) for size, loss in losses)) / n for f in (lambda t: t, abs))  # type: ignore[return-value]

    def _check_all_used(self) -> None:
        """Raise InputError if a parameter has no influence on the loss of any batch."""
        unused = dict(zip(self.names, self._parameters, strict=True))
        for batch in self._batches:
            loss = self._loss(self._forward(batch.x), batch.y)
            if not loss.requires_grad:
                break
            gradient = torch.autograd.grad(loss, list(unused.values()), allow_unused=True)
            unused = {name: p for (name, p), g in zip(unused.items(), gradient, strict=True) if g is None}
            if not unused:
                return
        raise InputError(
            f"the loss does not depend on {', '.join(unused)}; restrict the operator to the others: parameters=[...]"
        )

    def _keep_graphs(self, budget: int) -> None:
        """Keep the graphs of the first batches, as many as ``budget`` bytes hold; measured on the first batch.

        Unless all graphs are kept, room is left for the one that is made anew; in any case for a product's temporaries.
        """
        per_sample = self._graph_bytes(self._batches[0]) / len(self._batches[0].x)
        gradient = self.shape[0] * self.dtype.itemsize
        sizes = [int(per_sample * len(batch.x)) + gradient for batch in self._batches]
        temporaries = max(sizes)
        budget -= temporaries if sum(sizes) + temporaries <= budget else 2 * temporaries
        for batch, size in zip(self._batches, sizes, strict=True):
            budget -= size
            if budget < 0:
                break
            batch.kept = self._linearise(batch.x, batch.y)

    @property
    def graph_bytes(self) -> int:
        """How many bytes the graph of the first minibatch holds on to, beside the parameters and the data."""
        with evaluation(self._model):
            return self._graph_bytes(self._batches[0])

    def _graph_bytes(self, batch: _Batch) -> int:
        """Return how many bytes the graph of one batch holds on to, beside the parameters and the data."""
        own = (*self._model.parameters(), batch.x, batch.y)
        return held_bytes(lambda: self._linearise(batch.x, batch.y), own)

    def _split(self, v: Tensor) -> list[Tensor]:
        """Return a vector's parts in the parameters' shapes; views of it where it is contiguous."""
        parts = v.contiguous().split([p.numel() for p in self._parameters])
        return [part.view_as(p) for part, p in zip(parts, self._parameters, strict=True)]


class HessianOperator(CurvatureOperator):
    """The Hessian of the mean loss over all samples of ``batches``, with respect to the trainable parameters.

    ``batches`` is an iterable of (x, y), read twice, to see that it stays the same, and held; ``loss_fn(model(x), y)``
    is a batch mean, so batches are weighted by their size and a ragged last one is exact. The model is evaluated in
    eval mode. ``parameters`` restricts it to a diagonal block: names of parameters, or of modules, which stand for all
    parameters below them.
    ``samples`` restricts the data to the samples with these indices, counted through the batches, with repetitions.
    ``graph_memory`` bounds the bytes of kept graphs and of what a product needs beside them (default: half of the free
    memory; 0 keeps none; what one minibatch needs is always taken).

    Raises InputError, naming cause and remedy, for an empty data set, NaN in data or weights, labels out of range,
    mixed devices or dtypes, parameters that are frozen or unused, a loss that is not a batch mean, batches that change
    from one pass to the next, a model or loss that is random, or samples that depend on each other through batch
    statistics, a second derivative that is not symmetric, or a ``graph_memory`` that is no number of bytes. A product
    raises it when weights or data were changed after the operator was made, in a way that PyTorch counts: not through
    ``.data`` or NumPy.
    """

    def _check_derivatives(self) -> None:
        with self._layers():
            outputs = self._forward(self._batches[0].x[:2])
        weights = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(0)).to(outputs)
        checks.symmetric(_second_derivative((outputs * weights).sum(), self._parameters), self._parameters)

    def _linearise(self, x: Tensor, y: Tensor) -> Linearisation:
        with self._layers():
            loss = self._loss(self._forward(x), y)
        return _second_derivative(loss, self._parameters)


class GGNOperator(CurvatureOperator):
    """The generalised Gauss-Newton matrix J^T (d^2 L / d s^2) J of the mean loss L (Schraudolph, 2002).

    J is the derivative of the model's outputs s with respect to the parameters. It is the Hessian of the loss of the
    model linearised in its parameters; for cross-entropy and the squared loss it is positive semidefinite, and equal to
    the Fisher information (for the squared loss up to a factor). Arguments and errors are those of `HessianOperator`.
    """

    def _check_derivatives(self) -> None:
        pass  # J^T A J is symmetric whatever J is

    def _linearise(self, x: Tensor, y: Tensor) -> Linearisation:
        parameters = self._parameters
        with self._layers(fixed=True):
            outputs = self._forward(x)
        # J^T u is linear in u: its derivative along v, as a function of u, is J v.
        u = torch.zeros_like(outputs, requires_grad=True)
        pulled = torch.autograd.grad(outputs, parameters, u, create_graph=True, materialize_grads=True)
        s = outputs.detach().requires_grad_()
        (slope,) = torch.autograd.grad(self._loss(s, y), s, create_graph=True)

        def product(v: list[Tensor], again: bool) -> Sequence[Tensor]:
            (pushed,) = torch.autograd.grad(pulled, u, v, retain_graph=True)
            curved = torch.zeros_like(s)
            if slope.requires_grad:  # else the loss is linear in the outputs
                (curved,) = torch.autograd.grad(slope, s, pushed, retain_graph=again, materialize_grads=True)
            return torch.autograd.grad(outputs, parameters, curved, retain_graph=again, materialize_grads=True)

        return product


def _second_derivative(value: Tensor, parameters: list[nn.Parameter]) -> Linearisation:
    """Return the map from a vector to its product with the second derivative of a scalar by the parameters."""
    gradient = torch.autograd.grad(value, parameters, create_graph=True, materialize_grads=True)
    # Where the value is linear in a parameter its gradient has no graph; as a leaf it differentiates to zero.
    gradient = tuple(part if part.requires_grad else part.requires_grad_() for part in gradient)

    def product(v: list[Tensor], again: bool) -> Sequence[Tensor]:
        # H is symmetric, so the vector-Jacobian product of the gradient is the product H v.
        return torch.autograd.grad(gradient, parameters, v, retain_graph=again, materialize_grads=True)

    return product


def _select(pairs: list[tuple[Tensor, Tensor]], samples: Tensor | Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """Return the samples with the given indices in batches of the size of the first one."""
    indices = torch.as_tensor(samples, device="cpu").flatten()
    if not len(indices) or indices.is_floating_point() or indices.dtype == torch.bool:
        raise InputError("samples: give at least one integer index; of a mask, mask.nonzero().flatten()")
    indices = indices.to(torch.int64)
    ends = torch.tensor([len(x) for x, _ in pairs]).cumsum(0)
    n = int(ends[-1])
    if not 0 <= int(indices.min()) <= int(indices.max()) < n:
        raise InputError(f"samples: indices from {indices.min()} to {indices.max()}; there are {n} samples, from 0 on")
    batch_of = torch.searchsorted(ends, indices, right=True).tolist()
    starts = [0, *ends.tolist()]
    alike: dict[object, list[tuple[Tensor, Tensor]]] = {}  # of one shape, as batches of sequences may not be
    for b, i in zip(batch_of, indices.tolist(), strict=True):
        x, y = pairs[b][0][i - starts[b]], pairs[b][1][i - starts[b]]
        alike.setdefault((x.shape, y.shape), []).append((x, y))
    size = len(pairs[0][0])
    return [
        (torch.stack([x for x, _ in part]), torch.stack([y for _, y in part]))
        for picked in alike.values()
        for part in (picked[i : i + size] for i in range(0, len(picked), size))
    ]


def _floating(v: Tensor) -> torch.dtype:
    return v.dtype if v.is_floating_point() else torch.float64


def _flat(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([part.reshape(-1) for part in parts])
