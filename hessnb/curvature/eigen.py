"""Leading eigenpairs of a symmetric operator: Lanczos iteration, and the paper's power iteration.

Both work in float64 over products in the operator's own precision and return residuals computed from products that were
made, at no further product.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hessnb.curvature.krylov import Krylov, KrylovState, SymmetricOperator, Which, product
from hessnb.curvature.memory import available_memory
from hessnb.errors import InputError, tolerance, unknown, whole_number
from hessnb.pace import Pace

# An eigenvalue beyond the k-th by this share that was missed, as a further copy of a multiple one can be ...
_MISSED_BEYOND = 0.1
# ... is missed with at most this probability over the random start.
_MISSED_PROBABILITY = 0.01
# The fewest rows of basis that a restart leaves room for, beside the k that are sought.
_FEWEST_SPARE_ROWS = 8


@dataclass(frozen=True)
class EigenResult:
    """Eigenpairs and what they cost.

    ``eigenvalues`` (k,) in the order of ``which``; ``eigenvectors`` (k, n), orthonormal rows, float64;
    ``residuals`` (k,), relative: |H v - lambda v| / |lambda|, where `lanczos` takes the operator's rounding error for
    an eigenvalue that is smaller than that; ``converged``: the stopping rule was met for all k.
    """

    eigenvalues: Tensor
    eigenvectors: Tensor
    residuals: Tensor
    n_matvecs: int
    converged: bool


@dataclass(frozen=True)
class Progress:
    """How far a solve has come: products made, pairs converged of those wanted, the largest residual of these.

    ``remaining`` is the number of products that are still expected, or None while nothing can be said.
    """

    n_matvecs: int
    n_converged: int
    k: int
    residual: float
    remaining: int | None

    def __str__(self) -> str:
        expected = "" if self.remaining is None else f", about {self.remaining} more"
        found = f"{self.n_converged} of {self.k} eigenvalues"
        return f"{self.n_matvecs} products{expected}; {found}; largest residual {self.residual:.0e}"


def lanczos(
    H: SymmetricOperator,
    k: int = 20,
    tol: float = 1e-4,
    which: Which = "LM",
    generator: torch.Generator | None = None,
    progress: Callable[[Progress], None] | bool = False,
    *,
    max_matvecs: int | None = None,
    max_basis: int | None = None,
    state: KrylovState | None = None,
    save: Callable[[KrylovState], None] | None = None,
    save_seconds: float = 60.0,
) -> EigenResult:
    """Return the ``k`` eigenpairs of ``H`` that are largest in magnitude (LM), largest (LA) or smallest (SA).

    Lanczos iteration with full reorthogonalisation (Paige, 1972; Parlett, 1998). It ends when all k relative residuals
    are at most ``tol`` (an eigenvalue that is zero to the operator's precision counts as found) and a second chain of
    products, from a random direction orthogonal to everything seen, shows that nothing was missed: after it, an
    eigenvalue more than 10 % beyond the k-th, a further copy of a multiple one say, is left out with a probability of
    at most 1 % (Kuczynski and Wozniakowski, 1992, theorem 4.2; a basis so small that this chain is restarted loses the
    promise). Or it ends after ``max_matvecs`` products (default:
    10 k + 200); ``converged`` says which. Eigenvalues come in descending order of magnitude (LM), descending
    (LA) or ascending (SA).

    When the basis has ``max_basis`` rows of 8 n bytes (default: what half of the free memory holds; a row more for each
    chain that looks for a further copy) it is restarted from its leading Ritz vectors (Stewart, 2001; Wu and Simon,
    2000). ``generator`` draws the start (default: seed 0).
    ``progress`` is called after each product with a `Progress`, or prints it when True. ``save`` is called with the
    state every ``save_seconds``, or as often as takes a twentieth of the time; given as ``state`` to a later call with
    the same arguments, it goes on from there and ends as if never interrupted.

    Raises InputError for a k outside 1..n, a tolerance that is not between 0 and 1, an unknown ``which``, a
    ``max_matvecs`` below k, a basis too small, a state of another operator, or a product that is not finite. Source:
    section 3.1 of the paper asks for the top 20 at relative error 1e-4.
    """
    n = H.shape[0]
    _check_request(n, k, tol)
    if which not in ("LM", "LA", "SA"):
        raise unknown("which", which, ["LM", "LA", "SA"])
    limit = _limit(k, max_matvecs, 10 * k + 200)
    check = min(_steps_of_check(n), n - k)
    fewest = min(n, k + max(check, _FEWEST_SPARE_ROWS) + 2)
    if max_basis is None:
        max_basis = max(fewest, available_memory(H.device) // (2 * 8 * n))
    elif whole_number("max_basis", max_basis, None) < fewest:
        raise InputError(f"max_basis = {max_basis}: {k} eigenvalues need a basis of at least {fewest} rows")
    generator = generator or torch.Generator().manual_seed(0)
    krylov = Krylov(H, generator) if state is None else Krylov.resume(H, generator, state)
    noise = _noise(H)
    if max_basis >= n:
        max_basis = 2 * n + 2  # never full
    report = _reporter(progress, tol, check, limit)
    pace = Pace(save_seconds)

    def make_room(rows: int) -> None:
        if len(krylov.basis) + rows > max_basis:
            width = len(krylov.columns)
            left = max_basis - rows - (len(krylov.basis) - width)
            krylov.compress(max(k, min((k + width) // 2, left)), which)

    while True:
        grew = krylov.expand(krylov.following)
        if not krylov.chain:
            make_room(2)
        elif len(krylov.basis) + 2 > max_basis:
            krylov.compress(max(1, (len(krylov.columns) - krylov.chain) // 2), which, first=krylov.chain)
        theta, coordinates, defects = krylov.ritz(which)
        norms, last = torch.linalg.vector_norm(defects, dim=0), float(theta[:k][-1])
        floor = noise * float(krylov.projection.abs().max())
        allowed = tol * abs(last) + floor
        residuals = norms[:k] / theta[:k].abs().clamp_min(floor or 1.0)
        wrong = (residuals > tol) & (norms[:k] + theta[:k].abs() > floor)
        if len(theta) >= k:
            report(krylov.n_matvecs, residuals, ~wrong)
        if not krylov.chain:  # a pair after the k-th may still grow beyond it
            reach = _beyond(theta[k:], last, which) + norms[k:]
            wrong = torch.cat([wrong, reach > allowed])
        complete = len(theta) >= k and not bool(wrong.any())
        whole = len(krylov.columns) == n
        explored = whole or _nothing_missed(krylov, last, allowed, which, exhausted=not grew)
        if (complete and explored) or whole or krylov.n_matvecs >= limit:
            break
        if complete and krylov.chain and grew and not _holds_one_beyond(krylov, last, allowed, which):
            krylov.following = krylov.pending[-1]
        elif complete:
            if len(krylov.basis) + check + 2 > max_basis:
                krylov.compress(k, which)
            krylov.following = krylov.new_chain()
        else:
            if krylov.chain:
                make_room(krylov.n_parked + 1)
                krylov.end_chain()
                _, _, defects = krylov.ritz(which)
            wanted = torch.nonzero(wrong).flatten() if len(theta) >= k else slice(None)
            krylov.following = _most_needed(krylov, defects[:, wanted])
        if save is not None and pace.is_due():
            save(krylov.state)
            pace.saved()
    if progress is True:
        print()
    vectors = krylov.basis.combination(coordinates[:, :k].T)
    return EigenResult(theta[:k], vectors, residuals, krylov.n_matvecs, complete and explored)


def _most_needed(krylov: Krylov, defects: Tensor) -> int:
    """Return the pending row that the defects (rows, pairs) lie in most, or a new one when they lie in none."""
    rows = krylov.pending
    shares = torch.linalg.vector_norm(defects[rows], dim=1) if rows else torch.zeros(1)
    return rows[int(shares.argmax())] if bool(shares.max() > 0) else krylov.new_row()


def _holds_one_beyond(krylov: Krylov, last: float, tol: float, which: Which) -> bool:
    """Return whether the present chain has found an eigenvalue before ``last``: then another chain may find more."""
    theta, _, _ = krylov.ritz(which, first=krylov.chain)
    return bool(_beyond(theta[:1], last, which) > tol)


def _nothing_missed(krylov: Krylov, last: float, tol: float, which: Which, *, exhausted: bool) -> bool:
    """Return whether the present chain makes it improbable that the rest holds an eigenvalue well beyond ``last``.

    The chain is a Lanczos iteration from a random start on the operator restricted to the complement of what was there
    before. After m steps the largest eigenvalue exceeds the largest Ritz value by less than the share e of the
    spectrum's width with a probability of at least 1 - 1.648 sqrt(n) exp(-sqrt(e) (2 m - 1)).
    """
    if not krylov.chain:
        return False
    theta, _, _ = krylov.ritz(which, first=krylov.chain)
    if exhausted:  # a random start sees every eigenvalue of the complement, once
        return bool(_beyond(theta[:1], last, which) <= tol)
    steps = krylov.n_matvecs - krylov.before_chain
    share = (_exponent(krylov.H.shape[0]) / (2 * steps - 1)) ** 2
    margin = share / (1 - share) * float(theta.max() - theta.min()) if share < 1 else math.inf
    return bool((_beyond(theta, last, which) + margin <= max(tol, _MISSED_BEYOND * abs(last))).all())


def _exponent(n: int) -> float:
    return math.log(1.648 * math.sqrt(n) / _MISSED_PROBABILITY)


def _steps_of_check(n: int) -> int:
    """Return how many steps `_nothing_missed` takes where the rest of the spectrum ends 10 % before the k-th value."""
    share = 2 * _MISSED_BEYOND / (1 + 2 * _MISSED_BEYOND)
    return math.ceil((1 + _exponent(n) / math.sqrt(share)) / 2)


def _beyond(values: Tensor, last: float, which: Which) -> Tensor:
    """Return by how much ``values`` come before ``last`` in the order of ``which``."""
    return {"LM": values.abs() - abs(last), "LA": values - last, "SA": last - values}[which]


def _reporter(
    progress: Callable[[Progress], None] | bool, tol: float, check: int, limit: int
) -> Callable[[int, Tensor, Tensor], None]:
    """Return a function that passes on the state of a solve with an estimate of the products that remain.

    Residuals fall about geometrically once they fall at all: the estimate extrapolates the sum of their logarithms,
    over the pairs that are not found, by its slope over the last products, and adds the ``check`` for missed ones.
    """
    past: list[tuple[int, float]] = []

    def report(m: int, residuals: Tensor, found: Tensor) -> None:
        excess = (residuals.clamp_min(1e-300) / tol).log().clamp_min(0.0)
        past.append((m, float(excess.sum())))
        remaining = None
        if bool(found.all()):
            all_found_at = next((i for i, (_, left) in enumerate(past) if left == 0.0), len(past))
            remaining = max(0, check - (m - past[all_found_at][0])) if all_found_at < len(past) else check
        elif len(past) > 8:
            (before, high), (now, low) = past[-9], past[-1]
            slope = (high - low) / (now - before)
            remaining = math.ceil(low / slope) + check if slope > 0.05 else None
        remaining = None if remaining is None else min(remaining, limit - m)
        told = Progress(m, int(found.sum()), len(found), float(residuals.max()), remaining)
        if callable(progress):
            progress(told)
        elif progress:
            print(f"\rLanczos: {told!s:<90}", end="", flush=True)

    return report


def power_iteration(
    H: SymmetricOperator,
    k: int = 1,
    tol: float = 1e-4,
    criterion: Literal["rayleigh", "residual"] = "rayleigh",
    generator: torch.Generator | None = None,
    *,
    max_matvecs: int | None = None,
) -> EigenResult:
    """Return ``k`` eigenpairs of largest magnitude by power iteration with deflation: the method of the paper.

    One after the other, each iterate orthogonalised against the vectors before it. With ``criterion`` "rayleigh" a
    vector is taken when its Rayleigh quotient has changed by at most ``tol``, relatively, since the step before, which
    is the paper's "relative error" (section 3.1) and says little of the eigenvector; with "residual" when
    |H v - lambda v| is at most ``tol`` |lambda|. The residuals returned are those of the pairs returned, either way,
    and show the error of deflation too: they contain the components along the vectors found before. ``max_matvecs``
    bounds the products of all k together (default: 1,000 k); what is not there then has not converged.

    Raises InputError for a k outside 1..n, a tolerance that is not between 0 and 1, an unknown criterion, a
    ``max_matvecs`` below k, or a product that is not finite.
    """
    n = H.shape[0]
    _check_request(n, k, tol)
    if criterion not in ("rayleigh", "residual"):
        raise unknown("criterion", criterion, ["rayleigh", "residual"])
    limit = _limit(k, max_matvecs, 1000 * k)
    generator = generator or torch.Generator().manual_seed(0)
    vectors = torch.zeros(k, n, dtype=torch.float64, device=H.device)
    values, residuals = torch.zeros(2, k, dtype=torch.float64)
    n_matvecs, converged = 0, True
    noise = _noise(H)
    for i in range(k):
        v = torch.randn(n, dtype=torch.float64, generator=generator).to(H.device)
        v = _deflate(v, vectors[:i])
        before, done = math.nan, False
        # The pairs that come after need a product each.
        while not done and n_matvecs < limit - (k - 1 - i):
            v = v / torch.linalg.vector_norm(v)
            w = product(H, v)
            n_matvecs += 1
            value = float(v @ w)
            defect = float(torch.linalg.vector_norm(w - value * v))
            rest = _deflate(w, vectors[:i])
            inner = float(torch.linalg.vector_norm(rest - value * v))
            vectors[i], values[i] = v, value
            residuals[i] = defect / abs(value) if value else 0.0
            error = abs(value - before) if criterion == "rayleigh" else inner
            done = error <= tol * abs(value)
            before, v = value, rest
            if inner + abs(value) <= noise * float(values.abs().max()):
                done = True  # v is in the null space, and so is all that is left
        converged = converged and done
    return EigenResult(values, vectors, residuals, n_matvecs, converged)


def _deflate(v: Tensor, found: Tensor) -> Tensor:
    for _ in range(2):
        v = v - found.T @ (found @ v)
    return v


def _check_request(n: int, k: int, tol: float) -> None:
    if not whole_number("k", k) <= n:
        raise InputError(f"k = {k}: an operator of shape {(n, n)} has 1 to {n} eigenvalues")
    tolerance(tol)


def _limit(k: int, max_matvecs: int | None, default: int) -> int:
    """Return how many products a solve may make; raise InputError for fewer than one for each eigenvalue."""
    limit = default if max_matvecs is None else whole_number("max_matvecs", max_matvecs, None)
    if limit < k:
        raise InputError(f"max_matvecs = {max_matvecs}: {k} eigenvalues need at least {k} products")
    return limit


def _noise(H: SymmetricOperator) -> float:
    """Return what rounding leaves of an eigenvalue that is zero, relative to the largest."""
    return max(10 * torch.finfo(getattr(H, "dtype", torch.float64)).eps, 1e-13)
