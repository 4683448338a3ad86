"""Eigenvalues of a symmetric operator by Lanczos iteration with full reorthogonalisation (Paige, 1972; Parlett, 1998).

The recurrence runs in float64 over products in the operator's own precision. Every coefficient of the
reorthogonalisation is kept, not only the three of the symmetric recurrence, so that

    H V_m = V_{m+1} T        (V orthonormal, T of shape (m + 1, m))

holds to float64 rounding for the products as they were computed. The residual of a Ritz pair (theta, V s) is then
|T s - theta [s; 0]|, computed from what H returned and not estimated from the last coefficient: a product that is
asymmetric by float32 rounding shows in it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from hessnb.errors import InputError


class SymmetricOperator(Protocol):
    """What an eigen-solver needs to know of an operator: its shape (n, n), device, and product with a vector (n,)."""

    shape: tuple[int, int]
    device: torch.device

    def matvec(self, v: Tensor, /) -> Tensor:
        """Return the product with a vector (n,)."""
        ...


@dataclass(frozen=True)
class EigenResult:
    """Eigenpairs and what they cost.

    ``eigenvalues`` (k,) in the order of ``which``; ``eigenvectors`` (k, n), orthonormal rows, float64;
    ``residuals`` (k,), relative: |H v - lambda v| / |lambda|; ``converged``: all residuals are at most ``tol``.
    """

    eigenvalues: Tensor
    eigenvectors: Tensor
    residuals: Tensor
    n_matvecs: int
    converged: bool


Which = Literal["LM", "LA", "SA"]


def lanczos(
    H: SymmetricOperator,
    k: int = 20,
    tol: float = 1e-4,
    which: Which = "LM",
    generator: torch.Generator | None = None,
    progress: Callable[[int, float], None] | bool = False,
    max_matvecs: int | None = None,
) -> EigenResult:
    """Return the ``k`` eigenpairs of ``H`` that are largest in magnitude (LM), largest (LA) or smallest (SA).

    Stops when all k relative residuals are at most ``tol``, or after ``max_matvecs`` products (default: 10 k + 200,
    at most n), with ``converged`` saying which. Eigenvalues come in descending order of magnitude (LM), descending
    (LA) or ascending (SA). Copies of a multiple eigenvalue are found where a float64 operator has few distinct ones;
    elsewhere they may be missed, as in every iteration from one start vector. ``generator`` draws the start vector
    (default: seed 0). ``progress`` is called with the number of products and the largest of the k residuals, or prints
    them when True.

    Raises InputError for a k outside 1..n, a tolerance that is not positive, an unknown ``which``, or a product that
    is not finite. Source: the paper's section 3.1 asks for the top 20 at relative error 1e-4.
    """
    n = H.shape[0]
    if not 1 <= k <= n:
        raise InputError(f"k = {k}: an operator of shape {(n, n)} has 1 to {n} eigenvalues")
    if not tol > 0:
        raise InputError(f"tol = {tol}: the tolerance must be positive")
    if which not in ("LM", "LA", "SA"):
        raise InputError(f"which = {which!r}: choose 'LM', 'LA' or 'SA'")
    limit = min(n, 10 * k + 200 if max_matvecs is None else max_matvecs)
    if limit < k:
        raise InputError(f"max_matvecs = {max_matvecs}: {k} eigenvalues need at least {k} products")
    generator = generator or torch.Generator().manual_seed(0)
    basis = torch.empty(min(limit + 1, 2 * k + 32), n, dtype=torch.float64, device=H.device)
    T = torch.zeros(limit + 1, limit, dtype=torch.float64)
    basis[0] = _random_direction(basis[:0], generator)
    start = 0  # the row of the basis with which the present Krylov space began

    for m in range(1, limit + 1):
        if m == len(basis):
            basis = torch.cat([basis, torch.empty_like(basis)])[: limit + 1]
        exhausted = _extend(H, basis, T, m, generator)
        space, is_first = T[start : m + 1, start:m], start == 0
        start = m if exhausted else start
        if m < k:
            continue
        theta, s, defects = _ritz_pairs(T[: m + 1, :m], k, which)
        # No relative residual is defined at an eigenvalue of zero; the floor keeps it finite there.
        floor = torch.finfo(torch.float64).eps * T.abs().max()
        residuals = defects / theta.abs().clamp_min(floor) if floor > 0 else defects
        worst = float(residuals.max())
        if callable(progress):
            progress(m, worst)
        elif progress:
            print(f"\rLanczos: {m} products, largest residual {worst:.1e}", end="", flush=True)
        # An exhausted Krylov space has one vector of each eigenspace: the next one shows whether there are more.
        explored = m == n or (not exhausted if is_first else _is_no_better(space, theta[-1], tol, which))
        converged = worst <= tol and explored
        if converged or m == limit:
            break
    if progress is True:
        print()
    vectors = s.T.to(basis.device) @ basis[:m]
    return EigenResult(theta, vectors, residuals, m, converged)


def _extend(H: SymmetricOperator, basis: Tensor, T: Tensor, m: int, generator: torch.Generator) -> bool:
    """Fill column m - 1 of T and row m of the basis from the product of H with row m - 1.

    Returns whether the rows before m span an invariant subspace; row m is then a fresh random direction, and its
    coefficient in T is zero.
    """
    w = H.matvec(basis[m - 1])
    if not bool(torch.isfinite(w).all()):
        raise InputError("a product with the operator is not finite: look for NaN in the data or the weights")
    scale = torch.linalg.vector_norm(w)
    for _ in range(2):  # twice is enough (Parlett, 1998, section 6.9)
        coefficients = basis[:m] @ w
        w = w - basis[:m].T @ coefficients
        T[:m, m - 1] += coefficients.cpu()
    norm = torch.linalg.vector_norm(w)
    if norm > 1e-13 * scale:
        T[m, m - 1] = norm.cpu()
        basis[m] = w / norm
        return False
    if m < H.shape[0]:
        basis[m] = _random_direction(basis[:m], generator)
    return True


def _ritz_pairs(T: Tensor, k: int, which: Which) -> tuple[Tensor, Tensor, Tensor]:
    """Return k Ritz values (k,), their coordinates in the basis (m, k), and the norms of their residuals (k,)."""
    m = T.shape[1]
    theta, s = torch.linalg.eigh((T[:m] + T[:m].T) / 2)
    order = {"LM": theta.abs().argsort(descending=True), "LA": theta.argsort(descending=True), "SA": theta.argsort()}
    chosen = order[which][:k]
    theta, s = theta[chosen], s[:, chosen]
    defect = T @ s
    defect[:m] -= theta * s
    return theta, s, torch.linalg.vector_norm(defect, dim=0)


def _is_no_better(T: Tensor, last: Tensor, tol: float, which: Which) -> bool:
    """Return whether the leading Ritz value of a Krylov space has converged and does not come before ``last``."""
    theta, _, defect = _ritz_pairs(T, 1, which)
    ahead = {"LM": theta.abs() - last.abs(), "LA": theta - last, "SA": last - theta}[which]
    return bool(torch.maximum(ahead, defect) <= tol * last.abs())


def _random_direction(basis: Tensor, generator: torch.Generator) -> Tensor:
    """Return a random unit vector orthogonal to the rows of ``basis``, drawn on the CPU for any device."""
    v: Tensor = torch.randn(basis.shape[1], dtype=torch.float64, generator=generator).to(basis.device)
    for _ in range(2):
        v = v - basis.T @ (basis @ v)
    return torch.nn.functional.normalize(v, dim=0, eps=0.0)
