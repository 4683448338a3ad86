"""The whole spectrum of a symmetric operator from products alone: its density, traces of its functions, its trace.

The density is stochastic Lanczos quadrature (Golub & Meurant, 2010; Ubaru, Chen & Saad, 2017; for networks Ghorbani,
Krishnan & Xiao, 2019). A random unit vector v sees the spectrum as a measure with mass (v . q_i)^2 at lambda_i, whose
expectation has mass 1/n at each eigenvalue. m steps of Lanczos from v give the m-point Gauss rule of that measure,
exact for polynomials up to degree 2 m - 1. The trace is Hutchinson's estimate (1990), or Hutch++ (Meyer, Musco, Musco
& Woodruff, 2021), which takes the part of the operator that a sketch finds exactly and estimates only the rest.

Every standard error here is the spread over random probes: it knows nothing of the error of the Gauss rules, nor of
products that are off by the operator's own rounding. A single eigenvalue weighs 1/n in a rule with a standard deviation
of sqrt(2)/n and a long tail, so that with few probes its error bar is rough itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from hessnb.curvature.krylov import Krylov, KrylovState, SymmetricOperator, product
from hessnb.errors import InputError, real_number, unknown, whole_number
from hessnb.pace import Pace


@dataclass(frozen=True)
class Estimate:
    """A random estimate: its value, its standard error (NaN where one probe leaves it unknown), and its products."""

    value: float
    error: float
    n_matvecs: int


@dataclass(frozen=True)
class SpectralDensity:
    """Gauss rules of the spectrum, one for each probe, and what they say about it.

    ``nodes`` and ``weights`` (n_probes, m), float64 on the CPU: nodes ascend along a row and each row of weights sums
    to 1. A rule of fewer than m points repeats its last node with weight zero. ``n`` is the operator's dimension and
    ``n_matvecs`` what all rules cost. Errors are standard errors of the mean over probes, NaN for a single probe.
    """

    nodes: Tensor
    weights: Tensor
    n: int
    n_matvecs: int

    @property
    def sigma(self) -> float:
        """The default broadening, in units of the eigenvalues: 1 % of the range of the nodes.

        It is at least 1e-6 of the largest magnitude, about what float32 products resolve, and 1 for the zero operator.
        One large eigenvalue makes it wide, and it then hides the shape of the rest: choose a narrower one for that.
        """
        low, high = float(self.nodes.min()), float(self.nodes.max())
        return max((high - low) / 100, 1e-6 * max(abs(low), abs(high))) or 1.0

    def grid(self, size: int = 1000, sigma: float | None = None) -> Tensor:
        """Return ``size`` equidistant points (size,) from 5 sigma below the nodes to 5 above: the density ends there.

        Raises InputError for fewer than two points or a sigma that is not positive.
        """
        if whole_number("size", size, None) < 2:
            raise InputError(f"size = {size}: a grid needs at least 2 points")
        margin = 5 * self._broadening(sigma)
        low, high = float(self.nodes.min()) - margin, float(self.nodes.max()) + margin
        return torch.linspace(low, high, size, dtype=torch.float64)

    def density(self, grid: Tensor, sigma: float | None = None) -> tuple[Tensor, Tensor]:
        """Return the density at the points of ``grid`` (g,) and its standard error, both (g,), float64 on the CPU.

        Each node is broadened to a Gaussian of standard deviation ``sigma`` (default: the property of that name); the
        density, per unit of eigenvalue, integrates to 1. Where sigma is narrower than the gaps between nodes of a
        continuous part of the spectrum it shows the nodes as peaks that are not there. Raises InputError for a grid
        that is empty or not one-dimensional, or a sigma that is not positive.
        """
        if grid.ndim != 1 or len(grid) == 0:
            raise InputError(f"a grid of shape {tuple(grid.shape)}: give a vector of at least one point")
        sigma = self._broadening(sigma)
        points = grid.to("cpu", torch.float64)
        rules = zip(self.nodes, self.weights, strict=True)  # one at a time: all at once would be n_probes x m x g
        samples = [w @ torch.exp(-(((points - t[:, None]) / sigma) ** 2) / 2) for t, w in rules]
        return _mean_and_error(torch.stack(samples) / (sigma * math.sqrt(2 * math.pi)))

    def trace_of(self, f: Callable[[Tensor], Tensor]) -> Estimate:
        """Return an estimate of the trace of f(H), where ``f`` maps a tensor of eigenvalues to one of the same shape.

        Without bias for polynomials of degree up to 2 m - 1; for other functions the bias falls with m as fast as
        polynomials come to approximate f. Raises InputError where f changes the shape or is not finite at a node.
        """
        values = f(self.nodes)
        if values.shape != self.nodes.shape or not bool(torch.isfinite(values).all()):
            low, high = float(self.nodes.min()), float(self.nodes.max())
            raise InputError(
                f"f must return one finite value for each of its arguments, here {tuple(self.nodes.shape)} nodes "
                f"between {low:g} and {high:g}; define it on that whole interval"
            )
        return _estimate(self.n * (self.weights * values).sum(1), self.n_matvecs)

    def share(self, low: float, high: float) -> Estimate:
        """Return an estimate of the share of the eigenvalues that lie in [low, high]; either end may be infinite.

        A rule is sharp where its nodes have converged to eigenvalues. Inside a continuous part of the spectrum it may
        be off by the weights of the nodes next to either end (the inequalities of Chebyshev, Markov and Stieltjes), so
        put the ends into gaps or take more steps. Raises InputError unless low <= high.
        """
        if not real_number("low", low) <= real_number("high", high):
            raise InputError(f"the interval [{low}, {high}] is empty: give its lower end first")
        inside = (self.nodes >= low) & (self.nodes <= high)
        return _estimate((self.weights * inside).sum(1), self.n_matvecs)

    def _broadening(self, sigma: float | None) -> float:
        if sigma is None:
            return self.sigma
        if not 0 < real_number("sigma", sigma) < math.inf:
            raise InputError(f"sigma = {sigma}: the broadening must be positive and finite; None chooses one")
        return sigma


@dataclass(frozen=True)
class DensityState:
    """Gauss rules under way: ``nodes`` and ``weights`` as in `SpectralDensity`, of those that are there.

    ``counters`` (2,) are the number of these and all products so far, ``krylov`` is the basis of the next.
    """

    nodes: Tensor
    weights: Tensor
    counters: Tensor
    krylov: KrylovState


def spectral_density(
    H: SymmetricOperator,
    *,
    n_probes: int = 10,
    n_steps: int = 100,
    generator: torch.Generator | None = None,
    progress: Callable[[int, int], None] | None = None,
    state: DensityState | None = None,
    save: Callable[[DensityState], None] | None = None,
    save_seconds: float = 60.0,
) -> SpectralDensity:
    """Return the Gauss rules that ``n_steps`` products (at most n) give from each of ``n_probes`` random unit vectors.

    Probes are Gaussian vectors, normalised, drawn from ``generator`` (default: seed 0) on the CPU for any device; the
    first ones of a longer run are those of a shorter one. A probe whose Krylov space is exhausted stops there: its
    rule is exact. ``progress`` is called with the number of products done and of all that are still expected, which
    are the same number in the last call. The Krylov basis takes 8 n_steps n bytes on the operator's device. ``save`` is
    called with the state every ``save_seconds``, or as often as takes a twentieth of the time; given as ``state`` to a
    later call with the same arguments, it goes on from there and ends in the same bits.

    Raises InputError for n_probes or n_steps below 1, a state of another operator or of other rules, or a product that
    is not finite.
    """
    whole_number("n_probes", n_probes)
    whole_number("n_steps", n_steps)
    n = H.shape[0]
    limit = min(n_steps, n)
    generator = generator or torch.Generator().manual_seed(0)
    nodes, weights = torch.zeros(2, n_probes, limit, dtype=torch.float64)
    first = n_matvecs = 0
    if state:
        if state.nodes.shape != nodes.shape:
            told = tuple(state.nodes.shape)
            raise InputError(f"the saved state is of {told} probes and steps, these are {tuple(nodes.shape)}")
        nodes, weights = state.nodes.clone(), state.weights.clone()
        first, n_matvecs = state.counters.tolist()
    pace = Pace(save_seconds)
    for i in range(first, n_probes):
        krylov = Krylov.resume(H, generator, state.krylov) if state and i == first else Krylov(H, generator)
        grew = True
        while grew and krylov.n_matvecs < limit:
            grew = krylov.expand(krylov.pending[-1])
            n_matvecs += 1
            if progress:
                left = (limit - krylov.n_matvecs if grew else 0) + (n_probes - 1 - i) * limit
                progress(n_matvecs, n_matvecs + left)
            if save and grew and pace.is_due():
                save(DensityState(nodes.clone(), weights.clone(), torch.tensor([i, n_matvecs]), krylov.state))
                pace.saved()
        T = krylov.projection[: krylov.n_matvecs]
        theta, s = torch.linalg.eigh((T + T.T) / 2)
        # The padding is a node of the rule itself, so that no function is asked for its value outside the spectrum.
        nodes[i, : len(T)], nodes[i, len(T) :] = theta, theta[-1]
        weights[i, : len(T)] = s[0] ** 2
    return SpectralDensity(nodes, weights, n, n_matvecs)


def trace(
    H: SymmetricOperator,
    *,
    method: Literal["hutch++", "hutchinson"] = "hutch++",
    n_matvecs: int = 90,
    generator: torch.Generator | None = None,
) -> Estimate:
    """Return an estimate of the trace of ``H`` from ``n_matvecs`` products; from n products it is exact, with error 0.

    "hutchinson" is the mean of z . H z over probes z of random signs. "hutch++" spends a third of the products on a
    sketch of the range of H, a third on the trace of H within it, and the rest on Hutchinson's estimate in its
    complement: exact where the rank of H is at most a third of the products, and the more accurate the faster the
    magnitudes of the eigenvalues decay. Where they do not decay Hutchinson's is better, having three times the probes.

    Both are without bias, also where H is indefinite; there, however, the trace may be small beside the sum of
    magnitudes, which sets the scale of the error. ``error`` is the standard error over the probes, for "hutch++" those
    in the complement: NaN where there is one only (3 products), itself uncertain by about 1 / sqrt(2 (probes - 1)) of
    its size, and rounding where the sketch finds everything. ``generator`` (default: seed 0) draws on the CPU for any
    device. The sketch and its basis take about 16 n_matvecs n / 3 bytes on the operator's device.

    Raises InputError for an unknown method, fewer than 3 (hutch++) or 2 (hutchinson) products, or a product that is
    not finite.
    """
    fewest = {"hutch++": 3, "hutchinson": 2}
    if method not in fewest:
        raise unknown("method", method, list(fewest))
    if whole_number("n_matvecs", n_matvecs) < fewest[method]:
        raise InputError(f"n_matvecs = {n_matvecs}: the method {method!r} needs at least {fewest[method]} products")
    n = H.shape[0]
    if n_matvecs >= n:
        units = (one_hot(torch.tensor(i), n).to(H.device, torch.float64) for i in range(n))
        return Estimate(sum(float(e @ product(H, e)) for e in units), 0.0, n)
    generator = generator or torch.Generator().manual_seed(0)
    rank = n_matvecs // 3 if method == "hutch++" else 0
    # A Gaussian sketch: random signs, as in the paper, can be orthogonal to the range of a sparse H.
    sketch = torch.randn(rank, n, dtype=torch.float64, generator=generator).to(H.device)
    for row in sketch:
        row.copy_(product(H, row))
    Q = torch.linalg.qr(sketch.T).Q  # (n, rank); without columns for Hutchinson's estimate
    found = sum(float(q @ product(H, q)) for q in Q.T)
    samples = torch.empty(n_matvecs - 2 * rank, dtype=torch.float64)
    for i in range(len(samples)):
        z = (2 * torch.randint(2, (n,), generator=generator) - 1).to(H.device, torch.float64)
        for _ in range(2):
            z = z - Q @ (Q.T @ z)
        samples[i] = z @ product(H, z)
    return _estimate(found + samples, n_matvecs)


def _estimate(samples: Tensor, n_matvecs: int) -> Estimate:
    mean, error = _mean_and_error(samples)
    return Estimate(float(mean), float(error), n_matvecs)


def _mean_and_error(samples: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean of samples (r, ...) over r and its standard error; of one sample the error is 0 / 0, NaN."""
    r, mean = len(samples), samples.mean(0)
    return mean, ((samples - mean).square().sum(0) / (r * (r - 1))).sqrt()
