"""The input Hessians of any network by band Lanczos iteration, all samples of a chunk at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hessnb.curvature.evaluation import (
    cheapened,
    cross_entropy_in_differences,
    differentiable,
    in_chunks,
    in_float64,
)
from hessnb.errors import InputError
from hessnb.models import evaluation

# Chunks are measured by the graph of the network in its own precision, mostly float32; here it is made in float64.
_LARGER = 2


def eigenvalues_by_lanczos(
    model: nn.Module, x: Tensor, y: Tensor | None, k: int, which: Literal["LA", "LM"], tol: float, memory: int
) -> Tensor:
    """Return the k leading eigenvalues (N, k) of each sample by Lanczos iteration on all samples of a chunk at once.

    It starts from k random directions, so that it sees as many copies of a multiple eigenvalue as are asked for.
    """
    labels = _needed(y)
    generator = torch.Generator().manual_seed(0)
    found = [x.new_zeros(0, k, dtype=torch.float64)]
    d = x[0].numel()

    def leading(theta: Tensor) -> Tensor:
        return (theta if which == "LA" else theta.abs()).argsort(dim=1, descending=True)[:, :k]

    def finished(theta: Tensor, s: Tensor, rest: Tensor) -> bool:
        residuals = torch.linalg.vector_norm(rest @ s, dim=1)
        allowed = tol * theta.abs().amax(1, keepdim=True)
        return theta.shape[1] >= k and bool((residuals.gather(1, leading(theta)) <= allowed).all())

    with evaluation(model):
        forward, dtype = in_float64(model, x)
        forward = cheapened(forward, x[:2].to(dtype), 2)
        for part, target in in_chunks(model, x, labels, memory // _LARGER, d * 8 * (4 * k + 40)):
            start = torch.randn(len(part), k, d, dtype=torch.float64, generator=generator).to(x.device)
            products = input_products(*differentiable(forward, part.to(dtype)), target)
            theta, _, _ = _lanczos_on_each(products, start, generator, finished)
            found.append(theta.gather(1, leading(theta)))
    return torch.cat(found)


def solve_by_lanczos(
    model: nn.Module, x: Tensor, y: Tensor | None, g: Tensor, damping: float, tol: float, memory: int
) -> Tensor:
    """Return (H + damping I)^-1 g of each sample, like x, from the Krylov space of g."""
    labels = _needed(y)
    generator = torch.Generator().manual_seed(0)
    solved, start = [], 0
    with evaluation(model):
        forward, dtype = in_float64(model, x)
        forward = cheapened(forward, x[:2].to(dtype), 2)
        eps = x[0].numel() * torch.finfo(dtype).eps
        for part, target in in_chunks(model, x, labels, memory // _LARGER, x[0].numel() * 8 * 100):
            right = g[start : start + len(part)].flatten(1).double()
            start += len(part)
            length = torch.linalg.vector_norm(right, dim=1)

            def solution(theta: Tensor, s: Tensor, length: Tensor = length) -> Tensor:
                """Return the coordinates of the solution in the basis, nothing along directions at rounding level."""
                shifted = theta + damping
                floor = eps * shifted.abs().amax(1, keepdim=True)
                inverse = torch.where(shifted.abs() > floor, 1 / shifted, torch.zeros_like(shifted))
                return s @ (inverse * s[:, 0] * length[:, None])[:, :, None]

            def finished(theta: Tensor, s: Tensor, rest: Tensor, length: Tensor = length) -> bool:
                residuals = torch.linalg.vector_norm(rest @ solution(theta, s), dim=1)[:, 0]
                return bool((residuals <= tol * length).all())

            products = input_products(*differentiable(forward, part.to(dtype)), target)
            theta, s, basis = _lanczos_on_each(products, right[:, None], generator, finished)
            solved.append((solution(theta, s).mT @ basis)[:, 0].to(x.dtype))
    return torch.cat(solved).view_as(x)


def _lanczos_on_each(
    product: Callable[[Tensor], Tensor],
    start: Tensor,
    generator: torch.Generator,
    finished: Callable[[Tensor, Tensor, Tensor], bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return Ritz values (N, m), coordinates (N, m, m) and bases (N, m, d) of N operators from their starts (N, b, d).

    Band Lanczos (Ruhe, 1979) with full reorthogonalisation in float64: the basis begins with the orthonormalised
    starts, and each of its rows in turn is multiplied and leaves one more row behind. Ends at m = d, or when
    ``finished(values, coordinates, rest)`` says so: ``rest`` (N, b, m) are the products' components outside the rows
    that were multiplied. Where a Krylov space is exhausted, its iteration goes on in a random direction.
    """
    n, b, d = start.shape
    basis = start.new_zeros(n, 0, d)

    def extended(w: Tensor, dependent: Tensor) -> Tensor:
        fresh = torch.randn(n, d, dtype=torch.float64, generator=generator).to(w.device)
        fresh, _ = _orthogonalise(fresh, basis)
        row = F.normalize(torch.where(dependent[:, None], fresh, w), dim=1, eps=0.0)
        return torch.cat([basis, row[:, None]], dim=1)

    for v in F.normalize(start, dim=2, eps=torch.finfo(torch.float64).tiny).unbind(1):
        w, _ = _orthogonalise(v, basis)
        basis = extended(w, torch.linalg.vector_norm(w, dim=1) <= 1e-13)
    T = start.new_zeros(n, b, 0)
    while True:
        m = T.shape[2]
        w = product(basis[:, m])
        if not bool(torch.isfinite(w).all()):
            raise InputError("a product with an input Hessian is not finite: look for overflow in the model's outputs")
        w, coefficients = _orthogonalise(w, basis)
        T = torch.cat([T, coefficients[:, :, None]], dim=2)
        if basis.shape[1] < d:
            left = torch.linalg.vector_norm(w, dim=1)
            dependent = left <= 1e-13 * T.flatten(1).abs().amax(1)
            basis = extended(w, dependent)
            T = F.pad(T, (0, 0, 0, 1))
            T[:, -1, -1] = left.masked_fill(dependent, 0.0)
        m += 1
        square, rest = T[:, :m], T[:, m:]
        theta, s = torch.linalg.eigh((square + square.mT) / 2)
        if m == d or finished(theta, s, rest):
            return theta, s, basis[:, :m]


def _orthogonalise(w: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Return w (N, d) without its components along the bases (N, m, d), and these components (N, m)."""
    total = w.new_zeros(basis.shape[:2])
    for _ in range(2):
        along = (basis @ w[:, :, None])[:, :, 0]
        w = w - (along[:, None] @ basis)[:, 0]
        total += along
    return w, total


def input_products(leaf: Tensor, logits: Tensor, y: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the map from vectors (N, d), float64, to the products with each sample's input Hessian.

    ``leaf`` (N, ...) are the samples, ``logits`` (N, c) have a graph that leads back to them, ``y`` (N,) are labels.
    """
    loss = cross_entropy_in_differences(logits, y)
    (slope,) = torch.autograd.grad(loss, leaf, create_graph=True, materialize_grads=True)

    def product(v: Tensor) -> Tensor:
        if not slope.requires_grad:
            return torch.zeros_like(v)
        direction = v.to(leaf.dtype).view_as(leaf)
        (found,) = torch.autograd.grad(slope, leaf, direction, retain_graph=True, materialize_grads=True)
        return found.flatten(1).double()

    return product


def _needed(y: Tensor | None) -> Tensor:
    if y is None:
        raise InputError("the network is not piecewise linear, so its input Hessians depend on the labels: give y")
    return y
