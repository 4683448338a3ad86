"""Eigen-solvers on matrices whose eigenvalues are known, and on trained networks against dense float64 truth."""

from __future__ import annotations

import dataclasses
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
    return defects.norm(dim=1) / found.eigenvalues.abs()


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
    identity = torch.eye(k, dtype=torch.float64)
    torch.testing.assert_close(found.eigenvectors @ found.eigenvectors.T, identity, rtol=0, atol=1e-10)
    assert found.n_matvecs <= n


def test_residuals_are_what_a_fresh_product_gives() -> None:
    H = symmetric(torch.linspace(-3, 10, 200, dtype=torch.float64) ** 3)
    found = lanczos(H, 6, tol=1e-3)
    defects = H.matrix @ found.eigenvectors.T - found.eigenvectors.T * found.eigenvalues
    fresh = defects.norm(dim=0) / found.eigenvalues.abs()
    torch.testing.assert_close(found.residuals, fresh, rtol=1e-6, atol=1e-13)
    assert 1e-6 < found.residuals.max() <= 1e-3, "stopped because of the tolerance, not by luck"


def test_eigenvectors_are_orthonormal_over_many_orders_of_magnitude() -> None:
    eigenvalues = 10 ** torch.linspace(0, -12, 100, dtype=torch.float64)
    found = lanczos(symmetric(eigenvalues), 60)
    identity = torch.eye(60, dtype=torch.float64)
    torch.testing.assert_close(found.eigenvectors @ found.eigenvectors.T, identity, rtol=0, atol=1e-13)


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


def test_zero_operator_has_zero_eigenvalues() -> None:
    found = lanczos(Matrix(torch.zeros(6, 6, dtype=torch.float64)), 2)
    assert not found.eigenvalues.any()
    assert not found.residuals.any()
    assert found.converged


def test_start_vector_is_the_generators_and_the_default_is_fixed() -> None:
    H = symmetric(torch.randn(60, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    runs = [lanczos(H, 2, generator=torch.Generator().manual_seed(s)).residuals for s in (1, 1, 2)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    assert torch.equal(lanczos(H, 2).eigenvectors, lanczos(H, 2).eigenvectors)


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
        ({"k": 1, "tol": 0.0}, "tol"),
        ({"k": 1, "which": "SM"}, "which"),
        ({"k": 1, "tol": float("nan")}, "tol"),
        ({"k": 3, "max_matvecs": 2}, "max_matvecs"),
        ({"k": 3, "max_matvecs": 0}, "max_matvecs"),
    ],
)
def test_lanczos_refuses(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        lanczos(symmetric(torch.arange(6.0, dtype=torch.float64)), **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_product_that_is_not_finite_is_refused(value: float) -> None:
    with pytest.raises(InputError, match="not finite"):
        lanczos(Matrix(torch.full((3, 3), value, dtype=torch.float64)), 1)


def test_progress_is_printed_on_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    found = lanczos(symmetric(torch.arange(1.0, 31.0, dtype=torch.float64)), 2, progress=True)
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert f"{found.n_matvecs} products" in out.split("\r")[-1]


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
