"""A growing orthonormal basis and the projection of a symmetric operator on it: the common core of the Lanczos methods.

Every coefficient of the reorthogonalisation is kept, not only the three of the symmetric recurrence, so that

    H V[columns] = V T        (V orthonormal rows, one column of T for each row that was multiplied)

holds to float64 rounding for the products as they were computed. The residual of a Ritz pair is then computed from what
H returned, and not estimated from the last coefficient: a product that is asymmetric by float32 rounding shows in it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from hessnb.errors import InputError

Which = Literal["LM", "LA", "SA"]

_BLOCK_ROWS = 32
_CHUNK = 1 << 16  # columns of the basis that a rotation takes at a time


class SymmetricOperator(Protocol):
    """What an eigen-solver needs to know of an operator: its shape (n, n), device, and product with a vector (n,)."""

    shape: tuple[int, int]
    device: torch.device

    def matvec(self, v: Tensor, /) -> Tensor:
        """Return the product with a vector (n,)."""
        ...


class Basis:
    """Rows (n,) in float64, in blocks, so that growing copies nothing and takes little more than is used."""

    def __init__(self, n: int, device: torch.device) -> None:
        self._blocks: list[Tensor] = []
        self._n, self._device, self._rows = n, device, 0

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, row: int) -> Tensor:
        return self._blocks[row // _BLOCK_ROWS][row % _BLOCK_ROWS]

    def append(self, v: Tensor) -> None:
        """Add a row (n,)."""
        if self._rows == _BLOCK_ROWS * len(self._blocks):
            self._blocks.append(torch.empty(_BLOCK_ROWS, self._n, dtype=torch.float64, device=self._device))
        self._rows += 1
        self[self._rows - 1].copy_(v)

    def coefficients(self, w: Tensor) -> Tensor:
        """Return the scalar products of all rows with w (n,), on its device."""
        return torch.cat([block @ w for block in self._filled()])

    def combination(self, coefficients: Tensor) -> Tensor:
        """Return the combinations of the rows with coefficients (k, rows): (k, n)."""
        coefficients = coefficients.to(self._device)
        result = coefficients.new_zeros(len(coefficients), self._n)
        for block, part in zip(self._filled(), coefficients.split(_BLOCK_ROWS, dim=1), strict=True):
            result.addmm_(part, block)
        return result

    def orthogonalise(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Return w (n,) without its components along the rows, and these components (rows,), on the CPU."""
        total = w.new_zeros(self._rows)
        if not self._rows:
            return w, total.cpu()
        for _ in range(2):  # twice is enough (Parlett, 1998, section 6.9)
            coefficients = self.coefficients(w)
            for block, part in zip(self._filled(), coefficients.split(_BLOCK_ROWS), strict=True):
                w = w - part @ block
            total += coefficients
        return w, total.cpu()

    def rotate(self, rotation: Tensor) -> None:
        """Put the combinations with ``rotation`` (k, rows), k <= rows, in the place of the rows, chunk by chunk."""
        rotation = rotation.to(self._device)
        for start in range(0, self._n, _CHUNK):
            part = slice(start, start + _CHUNK)
            rotated = rotation @ torch.cat([block[:, part] for block in self._filled()])
            for block, rows in zip(self._blocks, rotated.split(_BLOCK_ROWS), strict=False):
                block[: len(rows), part] = rows
        self._rows = len(rotation)
        del self._blocks[-(-self._rows // _BLOCK_ROWS) :]

    def tensor(self) -> Tensor:
        """Return all rows as one tensor (rows, n)."""
        return torch.cat(self._filled())

    def _filled(self) -> list[Tensor]:
        last = self._rows - _BLOCK_ROWS * (len(self._blocks) - 1)
        return [*self._blocks[:-1], self._blocks[-1][:last]]


@dataclass(frozen=True)
class KrylovState:
    """A basis under way, as plain tensors: what an interrupted solve goes on from.

    ``basis`` (rows, n) and ``projection`` (rows, columns); ``parked`` and ``parked_projection`` likewise; ``columns``:
    the row that each column is the product of; ``counters``: the first column of the present chain, the products made
    before it, all products, and the row to be multiplied next; ``generator``: the state of the random generator.
    """

    basis: Tensor
    projection: Tensor
    parked: Tensor
    parked_projection: Tensor
    taken: Tensor
    columns: Tensor
    counters: Tensor
    generator: Tensor


class Krylov:
    """A basis in which each product with one of its rows leaves at most one new row behind.

    ``columns`` are the rows that were multiplied, in order, ``pending`` those that were not. A *chain* is a Lanczos
    iteration from a random direction in the complement of what was multiplied before: the columns from ``chain`` on; 0
    when all columns are seen as one. Rows that are pending when a chain begins are parked meanwhile: their vectors are
    kept orthogonal to the basis, but the basis is not kept orthogonal to them, so that the chain sees all of the
    complement.
    """

    def __init__(self, H: SymmetricOperator, generator: torch.Generator) -> None:
        self.H, self.generator = H, generator
        self.basis = Basis(H.shape[0], H.device)
        self.projection = torch.zeros(0, 0, dtype=torch.float64)
        self._parked = torch.zeros(0, H.shape[0], dtype=torch.float64, device=H.device)
        self._parked_projection = torch.zeros(0, 0, dtype=torch.float64)
        self._taken = torch.zeros(0, 0, dtype=torch.float64)  # (rows, p): what the rows took out of the parked vectors
        self.columns: list[int] = []
        self.chain = self.before_chain = self.n_matvecs = 0
        self.following = self.new_row()  # the row that is to be multiplied next

    @property
    def pending(self) -> list[int]:
        """The rows that were not multiplied yet."""
        done = set(self.columns)
        return [row for row in range(len(self.basis)) if row not in done]

    @property
    def n_parked(self) -> int:
        """How many rows are parked."""
        return len(self._parked)

    def new_row(self) -> int:
        """Append a random direction orthogonal to the basis, drawn on the CPU for any device, and return its row."""
        v = torch.randn(self.H.shape[0], dtype=torch.float64, generator=self.generator).to(self.H.device)
        v, _ = self.basis.orthogonalise(v)
        return self._append(torch.nn.functional.normalize(v, dim=0, eps=0.0))

    def new_chain(self) -> int:
        """Park what is pending, begin a chain, and return its first row."""
        pending = self.pending
        self._parked = torch.cat([self._parked, *(self.basis[row][None] for row in pending)])
        self._parked_projection = torch.cat([self._parked_projection, self.projection[pending]])
        self._rotate(torch.eye(len(self.basis), dtype=torch.float64)[self.columns])
        self.columns = list(range(len(self.columns)))
        self.chain, self.before_chain = len(self.columns), self.n_matvecs
        self._taken = torch.zeros(len(self.basis), len(self._parked), dtype=torch.float64)
        return self.new_row()

    def end_chain(self) -> None:
        """See all columns as one again, and take what was parked back as pending rows."""
        self.chain = 0
        q, r = torch.linalg.qr(self._parked.T)
        rows = r.cpu() @ self._parked_projection
        self._parked, self._parked_projection = self._parked[:0], self._parked_projection[:0]
        self._taken = self._taken[:, :0]
        for v, row in zip(q.T, rows, strict=True):
            v, _ = self.basis.orthogonalise(v)
            if len(self.basis) < self.H.shape[0] and torch.linalg.vector_norm(v) > 0.5:  # else it was only rounding
                new = self._append(torch.nn.functional.normalize(v, dim=0))
                self.projection[new] += row

    def expand(self, row: int) -> bool:
        """Multiply a pending row, and return whether the product left a new row, which is then the last pending one."""
        w = product(self.H, self.basis[row])
        self.n_matvecs += 1
        w, coefficients = self.basis.orthogonalise(w)
        norm = torch.linalg.vector_norm(w)
        self.columns.append(row)
        self.projection = torch.cat([self.projection, coefficients[:, None]], dim=1)
        self._parked_projection = torch.nn.functional.pad(self._parked_projection, (0, 1))
        grows = len(self.basis) < self.H.shape[0] and bool(norm > 1e-14 * self.projection.abs().max())
        if grows:
            new = self._append(w / norm)
            self.projection[new, -1] += norm.cpu()
        return grows

    def ritz(self, which: Which, *, first: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Return Ritz values (m,), leading ones first, their coordinates (rows, m), and their defects (rows + p, m).

        A defect H v - theta v is given by its coordinates along the rows and, orthonormalised, the p parked vectors.
        All is seen from the columns from ``first`` on: what leads back to the rows before them is left out.
        """
        rows = self.columns[first:]
        T = self.projection[:, first:].clone()
        T[self.columns[:first]] = 0.0
        theta, s = torch.linalg.eigh((T[rows] + T[rows].T) / 2)
        order = leading(theta, which)
        theta, s = theta[order], s[:, order]
        coordinates = torch.zeros(len(T), len(theta), dtype=torch.float64)
        coordinates[rows] = s
        defects = T @ s - coordinates * theta
        if len(self._parked):
            triangle = torch.linalg.qr(self._parked.T, mode="r")[1].cpu()
            defects = torch.cat([defects, triangle @ self._parked_projection[:, first:] @ s])
        return theta, coordinates, defects

    def compress(self, keep: int, which: Which, *, first: int = 0) -> None:
        """Put about ``keep`` columns that span the leading Ritz vectors in the place of the columns from ``first`` on.

        The basis of an ordered Schur form keeps the relation exact (Stewart, 2001), also where rounding has made the
        projection slightly asymmetric.
        """
        rows = self.columns[first:]
        square = self.projection[rows, first:].numpy()
        values = torch.from_numpy(np.linalg.eigvals(square).real.copy())
        border = float(_merit(values[leading(values, which)[keep - 1]], which))

        def wanted(real: float, imaginary: float) -> bool:
            return bool(_merit(torch.tensor(real), which) >= border)

        _, schur_vectors, kept = scipy.linalg.schur(square, output="real", sort=wanted)
        kept = max(kept, 1)
        q = torch.from_numpy(np.ascontiguousarray(schur_vectors[:, :kept]))
        if first:  # what the earlier columns have along the rows that are given up is parked again
            lost = torch.zeros_like(self._taken)
            lost[rows] = self._taken[rows] - q @ (q.T @ self._taken[rows])
            self._parked = self._parked + self.basis.combination(lost.T)
        others = sorted(set(range(len(self.basis))) - set(rows))
        rotation = torch.zeros(len(others) + kept, len(self.basis), dtype=torch.float64)
        rotation[range(len(others)), others] = 1.0
        rotation[len(others) :, rows] = q.T
        self.projection, self._parked_projection = (
            torch.cat([T[:, :first], T[:, first:] @ q], dim=1) for T in (self.projection, self._parked_projection)
        )
        self._rotate(rotation)
        place = {row: i for i, row in enumerate(others)}
        self.columns = [place[row] for row in self.columns[:first]] + [len(others) + i for i in range(kept)]

    @property
    def state(self) -> KrylovState:
        """What is there, as plain tensors on the CPU."""
        return KrylovState(
            self.basis.tensor().cpu(),
            self.projection,
            self._parked.cpu(),
            self._parked_projection,
            self._taken,
            torch.tensor(self.columns, dtype=torch.int64),
            torch.tensor([self.chain, self.before_chain, self.n_matvecs, self.following]),
            self.generator.get_state(),
        )

    @classmethod
    def resume(cls, H: SymmetricOperator, generator: torch.Generator, state: KrylovState) -> Krylov:
        """Go on from ``state``; raise InputError if it belongs to an operator of another size."""
        if state.basis.shape[1] != H.shape[0]:
            raise InputError(f"the saved state is of an operator of size {state.basis.shape[1]}, this is {H.shape[0]}")
        krylov = cls(H, generator)
        krylov.basis = Basis(H.shape[0], H.device)
        for row in state.basis:
            krylov.basis.append(row)
        krylov.projection, krylov.columns = state.projection.clone(), state.columns.tolist()
        krylov._parked, krylov._parked_projection = state.parked.clone().to(H.device), state.parked_projection.clone()
        krylov._taken = state.taken.clone()
        krylov.chain, krylov.before_chain, krylov.n_matvecs, krylov.following = state.counters.tolist()
        generator.set_state(state.generator)
        return krylov

    def _append(self, v: Tensor) -> int:
        """Append a row, take it out of the parked vectors, and return its index."""
        along = self._parked @ v
        self._parked = self._parked - along[:, None] * v
        self.basis.append(v)
        self.projection = torch.cat([self.projection, along.cpu()[None] @ self._parked_projection])
        self._taken = torch.cat([self._taken, along.cpu()[None]])
        return len(self.basis) - 1

    def _rotate(self, rotation: Tensor) -> None:
        self.basis.rotate(rotation)
        self.projection = rotation @ self.projection
        self._taken = rotation @ self._taken


def product(H: SymmetricOperator, v: Tensor) -> Tensor:
    """Return H v (n,) in float64, whatever precision H has; raise InputError where it is not finite."""
    w = H.matvec(v).to(torch.float64)
    if not bool(torch.isfinite(w).all()):
        raise InputError("a product with the operator is not finite: look for NaN in the data or the weights")
    return w


def leading(values: Tensor, which: Which) -> Tensor:
    """Return the order (m,) of values (m,): descending magnitude (LM), descending (LA) or ascending (SA)."""
    return _merit(values, which).argsort(descending=True)


def _merit(values: Tensor, which: Which) -> Tensor:
    return {"LM": values.abs(), "LA": values, "SA": -values}[which]
