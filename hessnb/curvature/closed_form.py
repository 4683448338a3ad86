"""The input Hessians of piecewise linear networks in closed form (Theorem 2.1).

For a piecewise linear network with logits s, p = softmax(s) and J = ds/dx, the Hessian of the cross-entropy is

    H = J^T (diag(p) - p p^T) J,

whatever the label. Take the differences to the most probable class r: K has the c - 1 rows J_i - J_r, q the square
roots of their probabilities. Then H = K^T C C^T K with C = diag(q) (I - q q^T / (1 + sqrt(p_r))): nothing cancels.
So the non-zero eigenvalues of H are those of the (c - 1) x (c - 1) matrix C^T K K^T C, and its inverses follow from
K K^T: one forward pass and c - 1 vector-Jacobian products for all samples at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hessnb.checks import PROBES, finite_gradients
from hessnb.curvature.evaluation import differentiable, in_chunks
from hessnb.errors import InputError
from hessnb.models import evaluation

# A network counts as piecewise linear when its gradient changes, along a random direction as long as the sample, or one
# where that is shorter, by at most this share.
_STRAIGHT = 1e-6


@dataclass(frozen=True)
class ClosedForm:
    """H = K^T C C^T K of m samples: ``rows`` K (m, c - 1, d) in the model's dtype, ``factor`` C (m, c - 1, c - 1) and
    ``gram`` K K^T in float64, the class (m, c - 1) of each row, and the probabilities of the reference class (m,) and
    of the others (m, c - 1).
    """

    rows: Tensor
    factor: Tensor
    gram: Tensor
    classes: Tensor
    reference: Tensor
    others: Tensor

    @property
    def small(self) -> Tensor:
        """C^T K K^T C, with the non-zero eigenvalues of H."""
        return self.factor.mT @ self.gram @ self.factor

    def along(self, g: Tensor) -> Tensor:
        """Return K g (m, c - 1) for g (m, d), in float64."""
        return (self.rows.double() @ g[:, :, None])[:, :, 0]

    def combined(self, weights: Tensor) -> Tensor:
        """Return K^T w (m, d) for weights w (m, c - 1) of the rows, in the dtype of these."""
        return (weights.to(self.rows.dtype)[:, None] @ self.rows)[:, 0]

    def pseudo_inverse(self, along: Tensor, step: Tensor | None = None) -> Tensor:
        """Return H^+ g (m, d) for K g (m, c - 1), float64, which is all of g that counts; in float64.

        ``step`` is a multiple of K H^+ g where that is known, and more exactly than from K g; it counts where the rows
        are independent.
        """
        values, vectors = torch.linalg.eigh(self.gram)
        eps = torch.finfo(self.rows.dtype).eps * self.rows.shape[1]
        independent = values[:, 0] > eps * values[:, -1]
        # With independent rows, H^+ = K^T (K K^T)^-1 A^-1 (K K^T)^-1 K, and A^-1 = diag(1 / p) + 1 1^T / p_r.
        safe = torch.where(independent[:, None], values, torch.ones_like(values))

        def gram_inverse(b: Tensor) -> Tensor:
            solved: Tensor = vectors @ ((vectors.mT @ b[:, :, None]) / safe[:, :, None])
            return solved[:, :, 0]

        if step is None:
            b = gram_inverse(along)
            tiny = torch.finfo(torch.float64).tiny
            step = b / self.others.clamp_min(tiny) + (b.sum(1) / self.reference)[:, None]
        exact = gram_inverse(step)
        if bool(independent.all()):
            return self._pulled(exact)
        # Otherwise from the eigenvectors of C^T K K^T C, without those at rounding level.
        values, vectors = torch.linalg.eigh(self.small)
        kept = values > eps * values[:, -1:]
        squared = torch.where(kept, values, torch.ones_like(values)) ** -2 * kept
        b = self.factor.mT @ along[:, :, None]
        general = (self.factor @ (vectors @ (squared[:, :, None] * (vectors.mT @ b))))[:, :, 0]
        return self._pulled(torch.where(independent[:, None], exact, general))

    def damped_inverse(self, g: Tensor, damping: float | Tensor) -> Tensor:
        """Return (H + damping I)^-1 g (m, d) for g (m, d), in float64; ``damping`` is positive, one or (m,)."""
        damping = torch.as_tensor(damping, dtype=torch.float64, device=g.device).expand(len(g))[:, None]
        b = self.factor.mT @ self.along(g)[:, :, None]
        small = self.small
        eye = torch.eye(small.shape[1], dtype=small.dtype, device=small.device)
        solved: Tensor = torch.linalg.solve(small + damping[:, :, None] * eye, b)
        return (g - self._pulled((self.factor @ solved)[:, :, 0])) / damping

    def _pulled(self, coordinates: Tensor) -> Tensor:
        """Return K^T z (m, d) for coordinates z (m, c - 1), in float64."""
        return (coordinates[:, None] @ self.rows.double())[:, 0]


def closed_forms(model: nn.Module, x: Tensor, memory: int) -> Iterator[ClosedForm]:
    """Go through the samples in chunks that take about ``memory`` bytes each."""
    with evaluation(model):
        with torch.no_grad():
            classes = model(x[:1].clone()).shape[1]
        size = x[0].numel() * (classes - 1) * (2 * x.element_size() + 8) + 8 * 9 * classes**2
        for part, _ in in_chunks(model, x, None, memory, size):
            yield closed_form(*differentiable(model, part))


def closed_form(leaf: Tensor, logits: Tensor) -> ClosedForm:
    """Return the input Hessians of samples ``leaf`` (m, ...) from the graph of their piecewise linear logits (m, c)."""
    classes = logits.shape[1]
    p = F.softmax(logits.detach().double(), dim=1)
    top = p.argmax(1)
    order = (top[:, None] + torch.arange(1, classes, device=leaf.device)) % classes
    reference, others = p.gather(1, top[:, None])[:, 0], p.gather(1, order)
    rows = leaf.new_empty(len(leaf), classes - 1, leaf[0].numel())
    differences = (F.one_hot(order.mT, classes) - F.one_hot(top, classes)).to(logits.dtype)
    for i, difference in enumerate(differences):
        last = i + 1 == len(differences)
        (row,) = torch.autograd.grad(logits, leaf, difference, retain_graph=not last, materialize_grads=True)
        rows[:, i] = row.flatten(1)
    q = others.sqrt()
    share = q / (1 + reference.sqrt())[:, None]
    eye = torch.eye(classes - 1, dtype=q.dtype, device=q.device)
    factor = q[:, :, None] * (eye - q[:, :, None] * share[:, None, :])
    wide = rows.double()  # squares of what float32 holds may leave its range
    gram = wide @ wide.mT
    finite_gradients(gram)
    return ClosedForm(rows, factor, gram, order, reference, others)


def piecewise_linear(model: nn.Module, x: Tensor) -> bool:
    """Return whether the logits are piecewise linear in the input, as far as a probe of ``x`` can tell."""
    return _bend(model, x) <= _STRAIGHT


def require_piecewise_linear(model: nn.Module, x: Tensor, *, remedy: str) -> None:
    """Raise InputError, with the reason and what else to use, for a network that has no closed form."""
    bend = _bend(model, x)
    if bend > _STRAIGHT:
        raise InputError(
            f"the closed form needs logits that are piecewise linear in the input; along a random direction as long "
            f"as a sample their gradient changes by {bend:.1e} of itself. Look for smooth activations or normalisation "
            f"by the sample's own statistics, or use {remedy}"
        )


def _bend(model: nn.Module, x: Tensor) -> float:
    """Return by which share the gradient of the logits changes along a random direction, in no units of the inputs."""
    generator = torch.Generator().manual_seed(0)
    some = x.detach()[:: max(1, len(x) // PROBES)][:PROBES]
    with evaluation(model):
        leaf, logits = differentiable(model, some)
        weights = torch.randn(logits.shape, dtype=logits.dtype, generator=generator).to(logits)
        (slope,) = torch.autograd.grad(logits, leaf, weights, create_graph=True, materialize_grads=True)
        if not slope.requires_grad:
            return 0.0
        direction = torch.randn(leaf.shape, dtype=leaf.dtype, generator=generator).to(leaf)
        length = torch.linalg.vector_norm(some.flatten(1), dim=1).clamp_min(1.0)
        length = length / torch.linalg.vector_norm(direction.flatten(1), dim=1)
        direction = direction * length.view(-1, *[1] * (x.ndim - 1))
        (change,) = torch.autograd.grad(slope, leaf, direction, materialize_grads=True)
    sizes = [torch.linalg.vector_norm(t.detach().flatten(1), dim=1) for t in (change, slope)]
    return float((sizes[0] / sizes[1].clamp_min(torch.finfo(x.dtype).tiny)).max())
