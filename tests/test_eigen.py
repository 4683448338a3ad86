"""Eigen-solvers on matrices whose eigenvalues are known, and on trained networks against dense float64 truth."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from typing import Literal
from unittest.mock import patch

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import batches, dense_hessian, network, samples
from torch import Tensor, nn

from hessnb.curvature import EigenResult, HessianOperator, Progress, lanczos, power_iteration
from hessnb.curvature.krylov import Basis, KrylovState, SymmetricOperator, Which
from hessnb.data import Splits
from hessnb.errors import InputError
from hessnb.training import Recipe, train


class Matrix:
    """A matrix that multiplies in its own dtype, and gives the product in that of the vector."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix, self.shape, self.device = matrix, (len(matrix), len(matrix)), torch.device("cpu")
        self.dtype = matrix.dtype

    def matvec(self, v: Tensor) -> Tensor:
        return (self.matrix @ v.to(self.dtype)).to(v.dtype)


class Diagonal:
    def __init__(self, entries: Tensor) -> None:
        self.entries, self.shape, self.device = entries, (len(entries), len(entries)), torch.device("cpu")
        self.dtype = entries.dtype

    def matvec(self, v: Tensor) -> Tensor:
        return (self.entries * v.to(self.dtype)).to(v.dtype)


class Interrupted(Exception):
    pass


class Counted:
    """Another operator that counts its products, and is interrupted when it is asked for one more than ``at_most``."""

    def __init__(self, H: SymmetricOperator, at_most: int | None = None) -> None:
        self._H, self._at_most, self.products = H, at_most, 0
        self.shape, self.device, self.dtype = H.shape, H.device, getattr(H, "dtype", torch.float64)

    def matvec(self, v: Tensor) -> Tensor:
        if self.products == self._at_most:
            raise Interrupted
        self.products += 1
        return self._H.matvec(v)


def symmetric(eigenvalues: Tensor, seed: int = 0) -> Matrix:
    n = len(eigenvalues)
    q, _ = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))
    return Matrix(q * eigenvalues @ q.T)


KINDS: dict[str, Callable[[Tensor], SymmetricOperator]] = {
    "diagonal": Diagonal,
    "dense": symmetric,
    "diagonal in float32": lambda eigenvalues: Diagonal(eigenvalues.float()),
    "dense in float32": lambda eigenvalues: Matrix(symmetric(eigenvalues).matrix.float()),
}

ORDERS: dict[str, Callable[[Tensor], Tensor]] = {
    "LM": lambda e: e[e.abs().argsort(descending=True)],
    "LA": lambda e: e.sort(descending=True).values,
    "SA": lambda e: e.sort().values,
}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def fresh_residuals(H: SymmetricOperator, found: EigenResult) -> Tensor:
    products = torch.stack([H.matvec(v) for v in found.eigenvectors])
    defects = products - found.eigenvalues[:, None] * found.eigenvectors
    norms: Tensor = torch.linalg.vector_norm(defects, dim=1)
    return norms / found.eigenvalues.abs()


def assert_orthonormal(rows: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(rows @ rows.T, torch.eye(len(rows), dtype=rows.dtype), rtol=0, atol=tolerance)


def fewest_rows(H: SymmetricOperator, k: int) -> int:
    """Return the smallest ``max_basis`` that lanczos takes for ``k`` eigenvalues."""
    for rows in range(1, H.shape[0] + 1):
        with pytest.raises((InputError, Interrupted)) as refusal:
            lanczos(Counted(H, at_most=0), k, max_basis=rows)
        if refusal.type is Interrupted:
            return rows
    raise AssertionError("no basis is large enough")


@contextmanager
def counted_rows() -> Iterator[list[int]]:
    """Give a list of how many rows each basis had after each row that was added to it."""
    append, rows = Basis.append, [0]

    def counting(basis: Basis, v: Tensor) -> None:
        append(basis, v)
        rows.append(len(basis))

    with patch.object(Basis, "append", counting):
        yield rows


@settings(deadline=None, max_examples=25)
@given(
    n=st.integers(1, 40), share=st.floats(0, 1), which=st.sampled_from(["LM", "LA", "SA"]), seed=st.integers(0, 1000)
)
def test_lanczos_finds_the_eigenvalues_of_random_matrices(n: int, share: float, which: str, seed: int) -> None:
    eigenvalues = 5 * torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    k = 1 + round(share * (n - 1))
    H = symmetric(eigenvalues, seed)
    found = lanczos(H, k, tol=1e-8, which=which)  # type: ignore[arg-type]
    torch.testing.assert_close(found.eigenvalues, ORDERS[which](eigenvalues)[:k], rtol=1e-7, atol=1e-9)
    assert_orthonormal(found.eigenvectors)
    assert found.n_matvecs <= n
    assert found.converged


def test_residuals_are_what_a_fresh_product_gives() -> None:
    H = symmetric(torch.linspace(-3, 10, 200, dtype=torch.float64) ** 3)
    found = lanczos(H, 6, tol=1e-3)
    torch.testing.assert_close(found.residuals, fresh_residuals(H, found), rtol=1e-6, atol=1e-13)
    assert 1e-6 < found.residuals.max() <= 1e-3, "stopped because of the tolerance, not by luck"


def test_eigenvectors_are_orthonormal_over_many_orders_of_magnitude() -> None:
    eigenvalues = 10 ** torch.linspace(0, -12, 100, dtype=torch.float64)
    found = lanczos(symmetric(eigenvalues), 60)
    assert_orthonormal(found.eigenvectors, 1e-13)


def test_residual_shows_an_asymmetry_of_the_products() -> None:
    H = symmetric(torch.arange(1.0, 31.0, dtype=torch.float64))
    H.matrix[0, 1:] += 1e-3
    found = lanczos(H, 3, tol=1e-10)
    assert not found.converged
    assert 1e-6 < found.residuals.max() < 1e-2


@pytest.mark.parametrize("distinct", [1, 2, 3])
def test_invariant_subspaces_do_not_stop_it_and_multiple_eigenvalues_are_found(distinct: int) -> None:
    eigenvalues = torch.tensor([7.0, -4.0, 2.0], dtype=torch.float64)[:distinct].repeat(5)
    found = lanczos(symmetric(eigenvalues), len(eigenvalues), tol=1e-9)
    torch.testing.assert_close(found.eigenvalues, ORDERS["LM"](eigenvalues), rtol=1e-9, atol=0)


@pytest.mark.parametrize("which", ["LM", "LA", "SA"])
@pytest.mark.parametrize(
    "eigenvalues",
    [
        pytest.param([4.0] + [1.0] * 29, id="identity plus rank one"),
        pytest.param([-3.0] * 3 + [2.0] * 10 + [3.5] * 2, id="three distinct values"),
        pytest.param([1.0] * 12, id="identity"),
    ],
)
def test_the_first_eigenvalues_are_found_as_often_as_they_occur(eigenvalues: list[float], which: str) -> None:
    spectrum = torch.tensor(eigenvalues, dtype=torch.float64)
    for k in (1, 2, 3, 5):
        found = lanczos(Matrix(torch.diag(spectrum)), k, tol=1e-9, which=which)  # type: ignore[arg-type]
        torch.testing.assert_close(found.eigenvalues, ORDERS[which](spectrum)[:k], rtol=1e-9, atol=0)
        assert found.converged
        assert found.n_matvecs < len(spectrum)


@pytest.mark.parametrize("rank", [1, 4])
def test_the_eigenvalues_of_a_matrix_of_low_rank_take_few_products(rank: int) -> None:
    eigenvalues = torch.cat([torch.arange(1.0, rank + 1), torch.zeros(200)]).double()
    found = lanczos(symmetric(eigenvalues), rank, tol=1e-9)
    torch.testing.assert_close(found.eigenvalues, ORDERS["LM"](eigenvalues)[:rank], rtol=1e-9, atol=0)
    assert found.converged
    assert found.n_matvecs <= rank + 3


ZEROS = "an eigenvalue that is zero to the operator's precision counts as found"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("which", ["LM", "LA", "SA"])
@pytest.mark.parametrize("bounded", [False, True])
def test_zero_eigenvalues_count_as_found_when_more_are_sought_than_the_rank(
    kind: str, which: Which, bounded: bool
) -> None:
    eigenvalues = torch.cat([torch.tensor([3.0, -2.0, 1.0]), torch.zeros(297)]).double()
    H = KINDS[kind](eigenvalues)
    for k in (4, 6):
        found = lanczos(H, k, which=which, max_basis=fewest_rows(H, k) if bounded else None)
        precision = 1e-6 if "float32" in kind else 1e-13
        torch.testing.assert_close(found.eigenvalues, ORDERS[which](eigenvalues)[:k], rtol=0, atol=precision)
        assert_orthonormal(found.eigenvectors)
        assert found.converged, ZEROS


@pytest.mark.parametrize("n", [9, 20])
def test_all_eigenvalues_of_a_matrix_of_low_rank_count_as_found(n: int) -> None:
    eigenvalues = torch.cat([torch.arange(1.0, 6.0), torch.zeros(n - 5)]).double()
    for seed in range(5):
        found = lanczos(Diagonal(eigenvalues), n, generator=seeded(seed))
        torch.testing.assert_close(found.eigenvalues, ORDERS["LM"](eigenvalues), rtol=0, atol=1e-13)
        assert found.converged, f"seed {seed}: {ZEROS}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("which", ["LM", "LA", "SA"])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (6, 2), (6, 6), (100, 20)])
def test_zero_operator_has_zero_eigenvalues(dtype: torch.dtype, which: Which, n: int, k: int) -> None:
    H = Diagonal(torch.zeros(n, dtype=dtype))
    for rows in (None, fewest_rows(H, k)):
        found = lanczos(H, k, which=which, max_basis=rows)
        assert torch.equal(found.eigenvalues, torch.zeros(k, dtype=torch.float64))
        assert not found.residuals.any()
        assert_orthonormal(found.eigenvectors)
        assert found.converged
        assert found.n_matvecs <= k + 1


@pytest.mark.parametrize("which", ["LM", "LA", "SA"])
@pytest.mark.parametrize("value", [-3.0, 0.0, 2.0])
def test_a_matrix_of_one_row(value: float, which: Which) -> None:
    found = lanczos(Diagonal(torch.tensor([value], dtype=torch.float64)), 1, which=which)
    assert found.eigenvalues.tolist() == [value]
    assert found.eigenvectors.abs().tolist() == [[1.0]]
    assert (found.n_matvecs, found.converged) == (1, True)


@pytest.mark.parametrize("which", ["LM", "LA", "SA"])
@pytest.mark.parametrize("n", [2, 3, 5, 8, 12])
def test_matrices_smaller_than_the_check_for_missed_eigenvalues(n: int, which: Which) -> None:
    eigenvalues = torch.tensor([4.0, -4.5, 4.0, 1.0, -1.0, 0.5, 0.5, -4.5, 3.0, 2.0, -2.0, -3.0][:n]).double()
    H = symmetric(eigenvalues)
    for k in range(1, n + 1):
        found = lanczos(H, k, tol=1e-9, which=which)
        values, expected = found.eigenvalues, ORDERS[which](eigenvalues)[:k]
        if which == "LM":  # the order of eigenvalues of one magnitude is free
            values, expected = values.abs(), expected.abs()
        torch.testing.assert_close(values, expected, rtol=1e-9, atol=0)
        assert found.converged
        assert found.n_matvecs <= n


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("which", ["LM", "LA", "SA"])
def test_eigenvalues_of_a_negative_matrix(kind: str, which: Which) -> None:
    eigenvalues = -torch.linspace(1, 50, 50, dtype=torch.float64)
    found = lanczos(KINDS[kind](eigenvalues), 4, which=which)
    torch.testing.assert_close(found.eigenvalues, ORDERS[which](eigenvalues)[:4], rtol=1e-6, atol=0)
    assert found.converged


# -- multiple eigenvalues, and those at the other end of the spectrum -------------------------------------------------

COPIES = [10.0] * 3 + [7.0] * 2 + [5.0] * 2 + [-4.5] * 2 + [4.0] * 2 + [3.0] * 2  # more than 10 % from each to the next


def with_copies(n: int = 300, seed: int = 0) -> Tensor:
    """Return n eigenvalues: a few of two or three copies each, and a bulk between -2.5 and 2.5."""
    bulk = 0.6 * torch.randn(n - len(COPIES), dtype=torch.float64, generator=seeded(seed))
    return torch.cat([torch.tensor(COPIES, dtype=torch.float64), bulk.clamp(-2.5, 2.5)])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("which", "ks"), [("LM", [1, 2, 3, 5, 7, 8, 9, 11, 13]), ("LA", [1, 3, 4, 6, 7, 8, 9, 11]), ("SA", [1, 2, 1, 2])]
)
@pytest.mark.parametrize("bounded", [False, True])
def test_copies_of_an_eigenvalue_are_not_missed(kind: str, which: Which, ks: list[int], bounded: bool) -> None:
    eigenvalues = with_copies()
    H = KINDS[kind](eigenvalues)
    for seed, k in enumerate(ks):
        rows = fewest_rows(H, k) if bounded else None
        found = lanczos(H, k, which=which, generator=seeded(seed), max_basis=rows, max_matvecs=300)
        torch.testing.assert_close(found.eigenvalues, ORDERS[which](eigenvalues)[:k], rtol=1e-4, atol=0)
        assert_orthonormal(found.eigenvectors)
        assert found.residuals.max() <= 1e-4
        assert found.converged


@pytest.mark.parametrize(
    ("kind", "n", "rows"),
    [
        ("diagonal", 300, None),
        ("diagonal", 1000, 50),
        ("diagonal", 1000, 36),
        ("diagonal in float32", 300, None),
        ("diagonal in float32", 1000, 50),
    ],
)
def test_more_copies_of_one_eigenvalue_than_are_sought(kind: str, n: int, rows: int | None) -> None:
    bulk = torch.randn(n - 30, dtype=torch.float64, generator=seeded(0)).clamp(-2.5, 2.5)
    H = KINDS[kind](torch.cat([torch.full((30,), 5.0, dtype=torch.float64), bulk]))
    found = lanczos(H, 20, max_basis=rows, max_matvecs=n)
    torch.testing.assert_close(found.eigenvalues, torch.full((20,), 5.0, dtype=torch.float64), rtol=1e-6, atol=0)
    assert found.converged


@pytest.mark.parametrize(("kind", "starts"), [("diagonal", 200), ("diagonal in float32", 50)])
def test_three_copies_of_the_first_eigenvalue_are_found_from_every_start(kind: str, starts: int) -> None:
    H = KINDS[kind](torch.cat([torch.full((3,), 5.0), torch.linspace(-0.3, 0.3, 97)]).double())
    for seed in range(starts):
        found = lanczos(H, 3, tol=1e-2, generator=seeded(seed))
        assert found.eigenvalues.tolist() == pytest.approx([5.0] * 3, rel=1e-2), f"seed {seed}"
        assert found.converged, f"seed {seed}"


@pytest.mark.parametrize("seed", [80, 170, 0, 1])
def test_three_copies_of_the_first_eigenvalue_are_found_with_the_smallest_basis(seed: int) -> None:
    H = Diagonal(torch.cat([torch.full((3,), 5.0), torch.linspace(-4, 4, 297)]).double())
    found = lanczos(H, 3, which="LA", generator=seeded(seed), max_basis=fewest_rows(H, 3), max_matvecs=300)
    assert found.converged
    assert found.eigenvalues.tolist() == pytest.approx([5.0] * 3, rel=1e-6)


BULKS: dict[str, Callable[[int, int], Tensor]] = {
    "random": lambda n, seed: torch.randn(n, dtype=torch.float64, generator=seeded(seed)),
    "equidistant": lambda n, seed: torch.linspace(-1, 1, n, dtype=torch.float64),
    "of few values": lambda n, seed: torch.randint(-2, 3, (n,), generator=seeded(seed)).double(),
    "geometric": lambda n, seed: 0.8 ** torch.arange(n, dtype=torch.float64),
}


@settings(deadline=None, max_examples=100)
@given(
    n=st.integers(2, 60),
    share=st.floats(0, 1),
    which=st.sampled_from(["LM", "LA", "SA"]),
    bulk=st.sampled_from(sorted(BULKS)),
    excess=st.sampled_from([1e-6, 1e-3, 0.01, 0.05, 0.2]),
    tol=st.sampled_from([1e-4, 1e-8]),
    seed=st.integers(0, 10000),
)
def test_an_eigenvalue_at_the_other_end_that_is_slightly_larger_is_not_overlooked(
    n: int, share: float, which: Which, bulk: str, excess: float, tol: float, seed: int
) -> None:
    eigenvalues = BULKS[bulk](n, seed)
    first = int(eigenvalues.abs().argmax())
    eigenvalues[(first + 1) % n] = -(1 + excess) * eigenvalues[first]
    k = 1 + round(share * (n - 1))
    H = symmetric(eigenvalues, seed)
    found = lanczos(H, k, tol=tol, which=which, generator=seeded(seed))
    values, expected = found.eigenvalues, ORDERS[which](eigenvalues)[:k]
    if which == "LM":  # of two that differ by less than the tolerance in magnitude either may be first
        values, expected = values.abs(), expected.abs()
    torch.testing.assert_close(values, expected, rtol=tol, atol=1e-13)
    assert_orthonormal(found.eigenvectors)
    fresh = (H.matrix @ found.eigenvectors.T - found.eigenvectors.T * found.eigenvalues).norm(dim=0)
    if found.converged:
        assert bool((fresh <= 1.001 * tol * expected.abs() + 1e-13).all())
    else:
        assert found.n_matvecs == min(n, 10 * k + 200)


@pytest.mark.parametrize("which", ["LM", "LA", "SA"])
def test_identity_plus_rank_one_in_float32(which: Which) -> None:
    eigenvalues = torch.tensor([4.0] + [1.0] * 99, dtype=torch.float64)
    for k in (1, 2, 5):
        found = lanczos(KINDS["dense in float32"](eigenvalues), k, which=which)
        torch.testing.assert_close(found.eigenvalues, ORDERS[which](eigenvalues)[:k], rtol=1e-6, atol=0)
        assert found.converged


# -- restarts ---------------------------------------------------------------------------------------------------------

SLOW = torch.linspace(-1, 1.2, 2000, dtype=torch.float64) ** 3
SLOW_CASES = [("diagonal", "LM"), ("diagonal in float32", "LA"), ("diagonal", "SA")]


@cache
def solve_slow(kind: str, which: Which, spare_rows: int | None) -> tuple[EigenResult, int]:
    """Return the first 5 eigenpairs of SLOW, and the most rows that the basis had."""
    H = KINDS[kind](SLOW)
    max_basis = None if spare_rows is None else fewest_rows(H, 5) + spare_rows
    with counted_rows() as rows:
        found = lanczos(H, 5, which=which, max_basis=max_basis, max_matvecs=2000)
    return found, max(rows) - (max_basis or 0)


@pytest.mark.parametrize(("kind", "which"), SLOW_CASES)
@pytest.mark.parametrize("spare_rows", [0, 10, 60])
def test_restarts_cost_products_but_change_no_eigenvalue(kind: str, which: Which, spare_rows: int) -> None:
    found, excess = solve_slow(kind, which, spare_rows)
    without, _ = solve_slow(kind, which, None)
    assert excess <= 0
    assert found.converged
    torch.testing.assert_close(found.eigenvalues, ORDERS[which](SLOW)[:5], rtol=1e-6, atol=0)
    torch.testing.assert_close(found.eigenvalues, without.eigenvalues, rtol=1e-6, atol=0)
    assert_orthonormal(found.eigenvectors)
    if not spare_rows:
        assert found.n_matvecs > 1.2 * without.n_matvecs


@pytest.mark.parametrize(("kind", "which"), SLOW_CASES)
@pytest.mark.parametrize("spare_rows", [None, 0, 10, 60])
def test_residuals_after_restarts_are_what_fresh_products_give(kind: str, which: Which, spare_rows: int | None) -> None:
    found, _ = solve_slow(kind, which, spare_rows)
    fresh = fresh_residuals(KINDS[kind](SLOW), found)
    rounding = 3e-7 if "float32" in kind else 1e-12
    torch.testing.assert_close(found.residuals, fresh, rtol=0, atol=rounding)
    assert fresh.max() <= 1e-4 + rounding


def test_the_smallest_ritz_value_of_a_restarted_basis_is_not_below_the_spectrum() -> None:
    for seed in range(20):
        H = Diagonal(with_copies(seed=seed))
        found = lanczos(H, 1, which="SA", generator=seeded(seed), max_basis=fewest_rows(H, 1), max_matvecs=300)
        assert float(found.eigenvalues) >= -4.5 - 1e-13, f"seed {seed}"


@pytest.mark.parametrize(("which", "k"), [("LM", 2), ("LM", 3), ("LA", 8), ("SA", 1), ("SA", 2)])
def test_the_basis_has_never_more_rows_than_allowed(which: Which, k: int) -> None:
    for seed in range(4):
        H = Diagonal(with_copies(seed=seed))
        for spare_rows in (0, 9):
            max_basis = fewest_rows(H, k) + spare_rows
            with counted_rows() as rows:
                lanczos(H, k, which=which, generator=seeded(seed), max_basis=max_basis)
            assert max(rows) <= max_basis, f"seed {seed}"


@pytest.mark.parametrize(("n", "k"), [(1, 1), (2, 2), (3, 1), (3, 3), (9, 4), (9, 9), (15, 12)])
def test_a_basis_that_holds_all_rows_is_not_restarted(n: int, k: int) -> None:
    H = symmetric(torch.randn(n, dtype=torch.float64, generator=seeded(n)))
    without, found = lanczos(H, k), lanczos(H, k, max_basis=n)
    assert torch.equal(found.eigenvalues, without.eigenvalues)
    assert found.n_matvecs == without.n_matvecs
    assert found.converged


@pytest.mark.parametrize("n", [24, 34, 44, 54])
def test_a_restarted_solve_of_a_small_matrix_is_right_where_it_says_so(n: int) -> None:
    H = Diagonal(torch.cat([torch.full((3,), 5.0), torch.linspace(-4, 4, n - 3)]).double())
    rows, converged = fewest_rows(H, 3), 0
    for seed in range(6):
        found = lanczos(H, 3, which="LA", generator=seeded(seed), max_basis=rows)
        assert found.n_matvecs > rows
        if found.converged:
            converged += 1
            assert found.eigenvalues.tolist() == pytest.approx([5.0] * 3, rel=1e-4), f"seed {seed}"
    assert converged


def test_a_restarted_solve_may_make_more_products_than_the_matrix_has_rows() -> None:
    H = Diagonal(torch.linspace(-1, 1, 41, dtype=torch.float64))
    found = lanczos(H, 3, which="LA", max_basis=fewest_rows(H, 3), max_matvecs=500)
    assert found.converged
    assert found.eigenvalues.tolist() == pytest.approx([1.0, 0.95, 0.9], rel=1e-6)


# -- interrupted solves -----------------------------------------------------------------------------------------------


def stored(state: KrylovState) -> KrylovState:
    """Return a state as it comes back from a safetensors file."""
    names = [field.name for field in dataclasses.fields(state)]
    return KrylovState(**safetensors.torch.load(safetensors.torch.save({name: getattr(state, name) for name in names})))


def same(a: KrylovState, b: KrylovState) -> bool:
    return all(torch.equal(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))


@pytest.mark.parametrize(
    ("kind", "which", "k", "spare_rows"),
    [
        ("dense", "LM", 3, None),
        ("dense", "LM", 3, 0),
        ("diagonal", "LA", 8, 0),
        ("diagonal", "SA", 2, 4),
        ("dense in float32", "LM", 3, None),
        ("dense in float32", "LA", 2, 0),
    ],
)
def test_an_interrupted_solve_goes_on_from_its_last_state_as_if_never_interrupted(
    kind: str, which: Which, k: int, spare_rows: int | None
) -> None:
    H = KINDS[kind](with_copies(120))
    max_basis = None if spare_rows is None else fewest_rows(H, k) + spare_rows

    def solve(
        H: SymmetricOperator, state: KrylovState | None = None, save: Callable[[KrylovState], None] | None = None
    ) -> EigenResult:
        return lanczos(
            H, k, which=which, generator=seeded(5), max_basis=max_basis, state=state, save=save, save_seconds=0.0
        )

    whole = solve(H)
    assert whole.converged
    n_in_a_check, wrong = 0, []
    for j in range(1, whole.n_matvecs):
        states: list[KrylovState] = []
        with pytest.raises(Interrupted):
            solve(Counted(H, at_most=j), save=states.append)
        assert len(states) == j
        n_in_a_check += int(states[-1].counters[0]) > 0
        rest = Counted(H)
        found = solve(rest, state=stored(states[-1]))
        right = (
            torch.equal(found.eigenvalues, whole.eigenvalues)
            and torch.equal(found.eigenvectors, whole.eigenvectors)
            and torch.equal(found.residuals, whole.residuals)
            and (found.n_matvecs, found.converged) == (whole.n_matvecs, True)
            and rest.products == whole.n_matvecs - j
        )
        if not right:
            wrong.append(j)
    assert n_in_a_check >= 2
    assert not wrong, f"interrupted after these products of {whole.n_matvecs} it ends otherwise"


def test_a_saved_state_does_not_change_afterwards_and_serves_more_than_once() -> None:
    H = symmetric(with_copies(80))
    states: list[KrylovState] = []
    copies: list[KrylovState] = []

    def save(state: KrylovState) -> None:
        states.append(state)
        copies.append(stored(state))

    whole = lanczos(H, 3, save=save, save_seconds=0.0)
    assert len(states) == whole.n_matvecs - 1
    assert all(same(state, copy) for state, copy in zip(states, copies, strict=True))
    ends = [lanczos(H, 3, state=states[10]) for _ in range(2)]
    assert torch.equal(ends[0].eigenvectors, ends[1].eigenvectors)
    assert same(states[10], copies[10])


def test_a_state_is_saved_only_as_often_as_asked() -> None:
    states: list[KrylovState] = []
    lanczos(symmetric(with_copies(40)), 3, save=states.append, save_seconds=3600.0)
    assert not states


def test_a_state_of_another_operator_is_refused() -> None:
    states: list[KrylovState] = []
    lanczos(symmetric(with_copies(40)), 2, save=states.append, save_seconds=0.0)
    with pytest.raises(InputError, match="of size 40, this is 41"):
        lanczos(symmetric(with_copies(41)), 2, state=states[5])


# -- start vector, limits, errors, progress ---------------------------------------------------------------------------


def test_global_random_state_is_untouched(untouched: Callable[..., AbstractContextManager[None]]) -> None:
    H = symmetric(with_copies(40))
    with untouched():
        lanczos(H, 3)
        lanczos(H, 3, max_basis=fewest_rows(H, 3))
        power_iteration(H, 2)


def test_start_vector_is_the_generators_and_the_default_is_fixed() -> None:
    H = symmetric(torch.randn(60, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    runs = [lanczos(H, 2, generator=torch.Generator().manual_seed(s)).residuals for s in (1, 1, 2)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    assert torch.equal(lanczos(H, 2).eigenvectors, lanczos(H, 2).eigenvectors)
    torch.manual_seed(1)
    assert torch.equal(lanczos(H, 2).eigenvectors, lanczos(H, 2, generator=seeded(0)).eigenvectors)


def test_limit_on_products_is_kept_and_said() -> None:
    H = symmetric(torch.linspace(0, 1, 300, dtype=torch.float64))
    seen: list[Progress] = []
    found = lanczos(H, 5, tol=1e-12, max_matvecs=20, progress=seen.append)
    assert (found.n_matvecs, found.converged) == (20, False)
    assert [told.n_matvecs for told in seen] == list(range(5, 21))
    assert seen[-1].residual == pytest.approx(float(found.residuals.max()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, "k = 0"),
        ({"k": 7}, "1 to 6 eigenvalues"),
        ({"k": 2.5}, "k = 2.5: it must be a whole number"),
        ({"k": True}, "k = True"),
        ({"k": 1, "tol": 0.0}, "tol"),
        ({"k": 1, "tol": math.inf}, "tol = inf"),
        ({"k": 1, "which": "SM"}, "which"),
        ({"k": 1, "tol": float("nan")}, "tol"),
        ({"k": 3, "max_matvecs": 2}, "max_matvecs"),
        ({"k": 3, "max_matvecs": 0}, "max_matvecs"),
        ({"k": -1}, "k = -1"),
        ({"k": 1, "tol": -1e-4}, "tol = -0.0001"),
        ({"k": 3, "max_basis": 5}, "max_basis = 5: 3 eigenvalues need a basis of at least 6 rows"),
        ({"k": 3, "max_basis": 0}, "max_basis"),
    ],
)
def test_lanczos_refuses(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        lanczos(symmetric(torch.arange(6.0, dtype=torch.float64)), **arguments)  # type: ignore[arg-type]


def test_too_small_a_basis_is_refused_with_the_rows_that_are_needed() -> None:
    H = Diagonal(with_copies())
    fewest = fewest_rows(H, 20)
    with pytest.raises(InputError, match=f"20 eigenvalues need a basis of at least {fewest} rows"):
        lanczos(H, 20, max_basis=fewest - 1)


@pytest.mark.parametrize("at", [1, 7, 20])
def test_a_product_that_stops_being_finite_is_refused(at: int) -> None:
    class Failing(Diagonal):
        products = 0

        def matvec(self, v: Tensor) -> Tensor:
            self.products += 1
            return super().matvec(v) * (torch.nan if self.products == at else 1.0)

    with pytest.raises(InputError, match="not finite"):
        lanczos(Failing(with_copies()), 3)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_product_that_is_not_finite_is_refused(value: float) -> None:
    with pytest.raises(InputError, match="not finite"):
        lanczos(Matrix(torch.full((3, 3), value, dtype=torch.float64)), 1)


def test_progress_is_printed_on_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    found = lanczos(symmetric(torch.arange(1.0, 31.0, dtype=torch.float64)), 2, progress=True)
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert out.endswith("\n")
    lines = out.rstrip("\n").split("\r")[1:]
    assert len(lines) == found.n_matvecs - 1
    assert len({len(line) for line in lines}) == 1, "each hides the one before"
    assert f"{found.n_matvecs} products" in lines[-1]


def test_nothing_is_printed_unasked(capsys: pytest.CaptureFixture[str]) -> None:
    H = symmetric(torch.arange(1.0, 31.0, dtype=torch.float64))
    lanczos(H, 2)
    lanczos(H, 2, progress=lambda told: None)
    assert capsys.readouterr() == ("", "")


def test_progress_says_what_is_found_and_what_remains() -> None:
    told = Progress(n_matvecs=31, n_converged=4, k=20, residual=2.3e-3, remaining=50)
    assert str(told) == "31 products, about 50 more; 4 of 20 eigenvalues; largest residual 2e-03"
    told = dataclasses.replace(told, remaining=None)
    assert str(told) == "31 products; 4 of 20 eigenvalues; largest residual 2e-03"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bounded", [False, True])
def test_progress_is_told_after_each_product(kind: str, bounded: bool) -> None:
    H = KINDS[kind](with_copies())
    seen: list[Progress] = []
    found = lanczos(H, 8, max_basis=fewest_rows(H, 8) if bounded else None, progress=seen.append)
    assert found.converged
    assert [told.n_matvecs for told in seen] == list(range(seen[0].n_matvecs, found.n_matvecs + 1))
    assert all(told.k == 8 and 0 <= told.n_converged <= 8 and told.residual >= 0 for told in seen)
    assert all(told.remaining is None or told.remaining >= 0 for told in seen)
    assert seen[-1].n_converged == 8
    assert seen[-1].residual == float(found.residuals.max())
    assert seen[-1].remaining is not None


@pytest.mark.parametrize(("base", "k"), [(0.9, 5), (0.97, 10), (0.99, 5)])
@pytest.mark.parametrize("tol", [1e-4, 1e-8])
def test_products_that_remain_are_foretold_within_a_factor_of_three(base: float, k: int, tol: float) -> None:
    seen: list[Progress] = []
    found = lanczos(Diagonal(base ** torch.arange(500, dtype=torch.float64)), k, tol=tol, progress=seen.append)
    for told in seen:
        truth = found.n_matvecs - told.n_matvecs
        if told.n_matvecs >= found.n_matvecs / 2:
            assert told.remaining is not None
            # Over the last products a few more or less are no matter.
            assert max(told.remaining, 6) <= 3 * max(truth, 6), str(told)
            assert max(truth, 6) <= 3 * max(told.remaining, 6), str(told)


def test_top_of_a_trained_network_in_float32_holds_against_dense_float64(digits: Splits) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.MaxPool2d(2), nn.Conv2d(1, 2, 5), nn.MaxPool2d(2), nn.ReLU(),
            nn.Flatten(), nn.Linear(50, 8), nn.ReLU(), nn.Linear(8, 10),
        )  # fmt: skip
    history = train(model, digits, Recipe(batch_size=20, lr=0.05, momentum=0.9, max_epochs=15, seed=0)).history
    assert history[-1].train_accuracy > 0.7
    pairs = digits.train.head(100).batches(64)
    found = lanczos(HessianOperator(model, F.cross_entropy, pairs), 10, tol=1e-4)
    assert found.converged
    truth = HessianOperator(model.double(), F.cross_entropy, [(x.double(), y) for x, y in pairs]).dense()
    eigenvalues = ORDERS["LM"](torch.linalg.eigvalsh(truth))[:10]
    torch.testing.assert_close(found.eigenvalues, eigenvalues, rtol=1e-4, atol=0)
    fresh = (truth @ found.eigenvectors.T - found.eigenvectors.T * found.eigenvalues).norm(dim=0)
    assert (fresh / found.eigenvalues.abs()).max() <= 1.5e-4


@pytest.mark.parametrize("kind", ["conv", "smooth", "relu", "residual"])
@pytest.mark.parametrize("i", [3, 11])
def test_negative_eigenvalues_of_the_hessian_of_one_sample_in_float32(kind: str, i: int) -> None:
    x, y = samples()
    eigenvalues = torch.linalg.eigvalsh(dense_hessian(network(kind), x[i : i + 1], y[i : i + 1]))
    H = HessianOperator(network(kind).float(), F.cross_entropy, batches(x.float(), y, 5), samples=[i])
    for k in (1, 3):
        found = lanczos(H, k, which="SA")
        assert found.converged
        assert found.eigenvalues[0] < -0.1
        precision = 1e-5 * float(eigenvalues.abs().max())
        torch.testing.assert_close(found.eigenvalues, eigenvalues[:k], rtol=0, atol=precision)


# -- power iteration --------------------------------------------------------------------------------------------------

Criterion = Literal["rayleigh", "residual"]
CRITERIA: list[Criterion] = ["rayleigh", "residual"]
DECAYING = torch.tensor([9.0, -7.0, 5.0, 3.5, *torch.linspace(-2, 2, 20).tolist()], dtype=torch.float64)


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_power_iteration_with_deflation_finds_the_largest_in_magnitude(criterion: Criterion, k: int) -> None:
    H = symmetric(DECAYING)
    found = power_iteration(H, k, tol={"rayleigh": 1e-12, "residual": 1e-6}[criterion], criterion=criterion)
    assert found.converged
    torch.testing.assert_close(found.eigenvalues, DECAYING[:k], rtol=1e-9, atol=0)
    assert_orthonormal(found.eigenvectors)
    values, vectors = torch.linalg.eigh(H.matrix)
    truth = vectors[:, values.abs().argsort(descending=True)[:k]].T
    assert float((found.eigenvectors * truth).sum(1).abs().min()) > 1 - 1e-9


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize(("tol", "max_matvecs"), [(1e-2, 500), (1e-4, 500), (1e-10, 40)])
def test_residuals_of_power_iteration_are_what_a_fresh_product_gives(
    criterion: Criterion, tol: float, max_matvecs: int
) -> None:
    for kind in KINDS:
        H = KINDS[kind](DECAYING)
        found = power_iteration(H, 3, tol, criterion, max_matvecs=max_matvecs)
        torch.testing.assert_close(found.residuals, fresh_residuals(H, found), rtol=1e-9, atol=1e-14)


def test_the_papers_criterion_stops_long_before_the_eigenvector_is_found_where_the_gap_is_small() -> None:
    H = symmetric(torch.cat([torch.tensor([1.0, 0.98]), torch.linspace(0, 0.5, 98)]).double())
    papers, strict = (power_iteration(H, 1, 1e-4, criterion) for criterion in CRITERIA)
    assert papers.converged
    assert strict.converged
    assert strict.residuals[0] <= 1e-4
    assert papers.residuals[0] > 30e-4, "more than 30 times the tolerance"
    assert abs(float(papers.eigenvalues) - 1.0) > 10e-4, "and the eigenvalue is off by more than 10 times"
    assert abs(float(strict.eigenvalues) - 1.0) < 1e-6
    assert strict.n_matvecs > 2 * papers.n_matvecs
    exact = lanczos(H, 1, 1e-4)
    assert exact.n_matvecs < papers.n_matvecs


def test_the_papers_criterion_takes_a_mixture_for_an_eigenvector_where_the_sign_is_undecided() -> None:
    H = Diagonal(torch.tensor([2.0, -2.0, 1.0, 0.5], dtype=torch.float64))
    papers = power_iteration(H, 1, 1e-4, "rayleigh")
    assert papers.converged
    assert abs(float(papers.eigenvalues)) < 1.99
    assert papers.residuals[0] > 0.1, "the residual shows it"
    strict = power_iteration(H, 1, 1e-4, "residual", max_matvecs=500)
    assert (strict.n_matvecs, strict.converged) == (500, False)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_power_iteration_finds_a_negative_eigenvalue(criterion: Criterion) -> None:
    found = power_iteration(symmetric(torch.tensor([-6.0, 4.0, 2.0, 1.0]).double()), 1, 1e-8, criterion)
    assert found.converged
    assert float(found.eigenvalues) == pytest.approx(-6.0, rel=1e-7)


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("unit", [2.0**-20, 2.0**20])
def test_power_iteration_takes_the_same_steps_in_any_unit_of_the_loss(criterion: Criterion, unit: float) -> None:
    matrix = symmetric(DECAYING).matrix
    expected, found = (power_iteration(Matrix(factor * matrix), 3, 1e-4, criterion) for factor in (1.0, unit))
    assert (found.n_matvecs, found.converged) == (expected.n_matvecs, True)
    assert torch.equal(found.eigenvalues, unit * expected.eigenvalues)
    assert torch.equal(found.eigenvectors, expected.eigenvectors)
    assert torch.equal(found.residuals, expected.residuals)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_power_iteration_on_the_zero_operator_and_on_the_identity(criterion: Criterion) -> None:
    for value in (0.0, 1.0):
        found = power_iteration(Diagonal(torch.full((6,), value, dtype=torch.float64)), 6, 1e-6, criterion)
        torch.testing.assert_close(found.eigenvalues, torch.full((6,), value, dtype=torch.float64), rtol=1e-12, atol=0)
        assert found.residuals.max() < 1e-12
        assert_orthonormal(found.eigenvectors)
        assert found.converged
        assert found.n_matvecs <= 12


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("kind", KINDS)
def test_power_iteration_ends_on_zero_eigenvalues(criterion: Criterion, kind: str) -> None:
    H = KINDS[kind](torch.cat([torch.tensor([5.0, -4.0]), torch.zeros(30)]).double())
    found = power_iteration(H, 4, 1e-4, criterion)
    torch.testing.assert_close(found.eigenvalues, torch.tensor([5.0, -4.0, 0, 0]).double(), rtol=1e-3, atol=1e-5)
    assert found.converged
    assert found.n_matvecs < 400


@pytest.mark.parametrize("criterion", CRITERIA)
def test_power_iteration_finds_all_eigenvalues(criterion: Criterion) -> None:
    eigenvalues = torch.tensor([5.0, -4.0, 3.0, 2.0, -1.0, 0.5], dtype=torch.float64)
    found = power_iteration(symmetric(eigenvalues), 6, {"rayleigh": 1e-12, "residual": 1e-6}[criterion], criterion)
    assert found.converged
    torch.testing.assert_close(found.eigenvalues, eigenvalues, rtol=1e-9, atol=0)
    one = power_iteration(Diagonal(torch.tensor([-3.0]).double()), 1, criterion=criterion)
    assert one.eigenvalues.tolist() == pytest.approx([-3.0])
    assert one.converged


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("max_matvecs", [3, 4, 10, 57])
def test_power_iteration_makes_no_more_products_than_allowed(criterion: Criterion, max_matvecs: int) -> None:
    H = Counted(symmetric(DECAYING))
    found = power_iteration(H, 3, 1e-12, criterion, max_matvecs=max_matvecs)
    assert found.n_matvecs == H.products == max_matvecs
    assert not found.converged
    assert bool(found.eigenvalues.all()), "each had a product"
    assert_orthonormal(found.eigenvectors)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_power_iteration_counts_its_products(criterion: Criterion) -> None:
    H = Counted(symmetric(DECAYING))
    found = power_iteration(H, 1, 1e-3, criterion)
    assert found.n_matvecs == H.products < 100
    assert found.converged
    same_limit = power_iteration(symmetric(DECAYING), 1, 1e-3, criterion, max_matvecs=found.n_matvecs)
    assert same_limit.converged
    assert torch.equal(same_limit.eigenvalues, found.eigenvalues)
    one_less = power_iteration(symmetric(DECAYING), 1, 1e-3, criterion, max_matvecs=found.n_matvecs - 1)
    assert (one_less.n_matvecs, one_less.converged) == (found.n_matvecs - 1, False)


def test_start_vectors_of_power_iteration_are_the_generators_and_the_default_is_fixed() -> None:
    H = symmetric(DECAYING)
    runs = [power_iteration(H, 2, generator=seeded(s)).eigenvectors for s in (1, 1, 2)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    assert torch.equal(power_iteration(H, 2).eigenvectors, power_iteration(H, 2, generator=seeded(0)).eigenvectors)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, "k = 0"),
        ({"k": 7}, "1 to 6 eigenvalues"),
        ({"tol": 0.0}, "tol"),
        ({"tol": float("nan")}, "tol"),
        ({"criterion": "both"}, "criterion"),
        ({"k": 3, "max_matvecs": 2}, "max_matvecs"),
    ],
)
def test_power_iteration_refuses(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        power_iteration(symmetric(torch.arange(6.0, dtype=torch.float64)), **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_product_that_is_not_finite_is_refused_by_power_iteration(value: float) -> None:
    with pytest.raises(InputError, match="not finite"):
        power_iteration(Matrix(torch.full((3, 3), value, dtype=torch.float64)))
