"""Spectral densities and traces against matrices of known spectrum, and the honesty of their error bars."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hessnb.curvature.density import DensityState, Estimate, SpectralDensity, spectral_density, trace
from hessnb.errors import InputError

Method = Literal["hutch++", "hutchinson"]
METHODS: list[Method] = ["hutch++", "hutchinson"]


class Matrix:
    """A dense matrix as an operator that counts its products; it takes and returns them in the matrix's precision."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix, self.shape, self.device = matrix, (len(matrix), len(matrix)), matrix.device
        self.n_matvecs = 0

    def matvec(self, v: Tensor) -> Tensor:
        self.n_matvecs += 1
        return self.matrix @ v.to(self.matrix.dtype)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def symmetric(eigenvalues: Tensor, seed: int = 0) -> Matrix:
    n = len(eigenvalues)
    q, _ = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=seeded(seed)))
    return Matrix(q * eigenvalues @ q.T)


def linspace(low: float, high: float, n: int) -> Tensor:
    return torch.linspace(low, high, n, dtype=torch.float64)


def identity(n: int) -> Tensor:
    return torch.eye(n, dtype=torch.float64)


def probes_of(seed: int, n_probes: int, n: int) -> list[Tensor]:
    """Return the probes that spectral_density draws from a generator of this seed."""
    generator = seeded(seed)
    draws = [torch.randn(n, dtype=torch.float64, generator=generator) for _ in range(n_probes)]
    return [v / v.norm() for v in draws]


def five_values(n: int = 100) -> tuple[Matrix, Tensor]:
    """Return a matrix of five distinct eigenvalues, two of them negative, for which five steps are exact."""
    eigenvalues = torch.tensor([-2.0, -0.5, 0.0, 1.0, 6.0], dtype=torch.float64).repeat_interleave(n // 5)
    return symmetric(eigenvalues), eigenvalues


def is_within(estimate: Estimate, truth: float, n_errors: float) -> bool:
    return abs(estimate.value - truth) <= n_errors * estimate.error


# -- Gauss rules -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("m", [1, 2, 5, 12])
def test_rules_are_exact_for_polynomials_up_to_degree_2m_minus_1_and_not_beyond(m: int) -> None:
    H = symmetric(linspace(-1, 1.5, 50))
    found = spectral_density(H, n_probes=3, n_steps=m, generator=seeded(4))
    assert found.nodes.shape == found.weights.shape == (3, m)
    assert found.nodes.dtype == found.weights.dtype == torch.float64
    assert (found.n, found.n_matvecs, H.n_matvecs) == (50, 3 * m, 3 * m)
    assert (found.nodes.diff(dim=1) > 0).all()
    torch.testing.assert_close(found.weights.sum(1), torch.ones(3, dtype=torch.float64), rtol=1e-13, atol=0)
    for v, nodes, weights in zip(probes_of(4, 3, 50), found.nodes, found.weights, strict=True):
        product = v
        for degree in range(2 * m):
            assert float(weights @ nodes**degree) == pytest.approx(float(v @ product), rel=1e-12, abs=1e-12), degree
            product = H.matrix @ product
        assert abs(float(weights @ nodes ** (2 * m) - v @ product)) > 1e-9


def test_all_steps_give_the_eigenvalues_and_the_probes_components() -> None:
    eigenvalues = linspace(-2, 3, 30)
    H = symmetric(eigenvalues)
    found = spectral_density(H, n_probes=2, n_steps=1000, generator=seeded(0))
    assert found.nodes.shape == (2, 30)
    q = torch.linalg.eigh(H.matrix).eigenvectors
    for v, nodes, weights in zip(probes_of(0, 2, 30), found.nodes, found.weights, strict=True):
        torch.testing.assert_close(nodes, eigenvalues, rtol=0, atol=1e-12)
        torch.testing.assert_close(weights, (q.T @ v) ** 2, rtol=1e-8, atol=1e-14)


def test_rules_stay_sharp_over_many_orders_of_magnitude() -> None:
    eigenvalues = 10 ** linspace(-12, 0, 100)
    found = spectral_density(symmetric(eigenvalues), n_probes=2, n_steps=60)
    torch.testing.assert_close(found.nodes[:, -40:], eigenvalues[-40:].expand(2, 40), rtol=1e-9, atol=0)


def test_ends_of_a_share_belong_to_it() -> None:
    nodes, weights = (torch.tensor([row], dtype=torch.float64) for row in ([-1e3, -1.0, 0.0], [0.25, 0.25, 0.5]))
    found = SpectralDensity(nodes, weights, n=4, n_matvecs=3)
    ends = [(-1.0, 0.0), (0.0, math.inf), (-1e3, -1e3), (-math.inf, -1e3), (-999.0, -1.5)]
    assert [found.share(low, high).value for low, high in ends] == [0.75, 0.5, 0.25, 0.25, 0.0]


@pytest.mark.parametrize("value", [0.0, 1.0, -3e5, 2e-9])
def test_multiples_of_the_identity_take_one_product_for_each_probe(value: float) -> None:
    found = spectral_density(Matrix(value * identity(40)), n_probes=4, n_steps=20)
    assert found.n_matvecs == 4
    torch.testing.assert_close(found.nodes, torch.full((4, 20), value, dtype=torch.float64), rtol=1e-14, atol=0)
    assert found.share(value - abs(value) / 2, value + abs(value) / 2) == Estimate(1.0, 0.0, 4)
    estimate = found.trace_of(lambda t: t)
    assert estimate.value == pytest.approx(40 * value, rel=1e-14)
    assert estimate.error <= 1e-13 * abs(value)
    assert found.sigma == pytest.approx(1e-6 * abs(value) or 1, rel=1e-9)
    grid = found.grid()
    assert float(torch.trapezoid(found.density(grid)[0], grid)) == pytest.approx(1, abs=1e-5)
    assert grid[0] < value < grid[-1]


def test_exhausted_rules_are_padded_inside_the_spectrum_and_exact() -> None:
    eigenvalues = torch.tensor([1.0, 4.0, 9.0], dtype=torch.float64).repeat_interleave(20)
    found = spectral_density(symmetric(eigenvalues), n_probes=50, n_steps=10)
    assert found.n_matvecs == 50 * 3
    assert (found.nodes[:, 3:] == found.nodes[:, 2:3]).all()
    assert not found.weights[:, 3:].any()
    assert is_within(found.trace_of(torch.log), float(eigenvalues.log().sum()), 2)


def test_low_rank_is_exhausted_one_step_beyond_its_rank() -> None:
    eigenvalues = torch.cat([torch.zeros(200), torch.tensor([-5.0, 1.0, 2.0, 30.0])]).double()
    found = spectral_density(symmetric(eigenvalues), n_probes=3, n_steps=50)
    assert found.n_matvecs == 3 * 5


def test_float32_products_give_nodes_and_traces_to_float32_accuracy() -> None:
    H, _ = five_values()
    exact = spectral_density(H, n_probes=5, n_steps=20)
    rounded = spectral_density(Matrix(H.matrix.float()), n_probes=5, n_steps=20)
    torch.testing.assert_close(rounded.weights.sum(1), torch.ones(5, dtype=torch.float64), rtol=1e-13, atol=0)
    assert rounded.nodes.min() == pytest.approx(-2, abs=1e-5)
    assert rounded.nodes.max() == pytest.approx(6, abs=1e-5)
    for f in (torch.exp, torch.square):
        assert rounded.trace_of(f).value == pytest.approx(exact.trace_of(f).value, rel=1e-5)
    assert rounded.share(0.5, math.inf).value == pytest.approx(exact.share(0.5, math.inf).value, abs=1e-5)
    for method in METHODS:
        single, double = (trace(operator, method=method) for operator in (Matrix(H.matrix.float()), H))
        assert single.value == pytest.approx(double.value, rel=1e-4)


def test_an_asymmetry_of_the_products_is_averaged() -> None:
    H = symmetric(linspace(-1, 2, 30))
    skewed = Matrix(H.matrix + 0.1 * torch.randn(30, 30, dtype=torch.float64, generator=seeded(1)).triu(1))
    found = spectral_density(skewed, n_probes=1, n_steps=30)
    truth = torch.linalg.eigvalsh((skewed.matrix + skewed.matrix.T) / 2)
    torch.testing.assert_close(found.nodes[0], truth, rtol=0, atol=1e-12)


@settings(deadline=None, max_examples=30)
@given(
    n=st.integers(10, 40),
    m=st.integers(1, 8),
    seed=st.integers(0, 1000),
    shift=st.floats(-10, 10),
    a=st.floats(0.01, 100) | st.floats(-100, -0.01),
)
def test_nodes_move_with_a_shift_and_a_scale_and_weights_stay(
    n: int, m: int, seed: int, shift: float, a: float
) -> None:
    H = symmetric(torch.randn(n, dtype=torch.float64, generator=seeded(seed)), seed)
    before = spectral_density(H, n_probes=2, n_steps=m, generator=seeded(seed))
    moved = Matrix(a * H.matrix + shift * identity(n))
    after = spectral_density(moved, n_probes=2, n_steps=m, generator=seeded(seed))
    # A negative factor turns the rows around.
    nodes, weights = (t if a > 0 else t.flip(1) for t in (before.nodes, before.weights))
    size = abs(shift) + abs(a)
    torch.testing.assert_close(after.nodes, a * nodes + shift, rtol=0, atol=1e-9 * size)
    torch.testing.assert_close(after.weights, weights, rtol=0, atol=1e-7 * size / abs(a))


# -- what the density says -------------------------------------------------------------------------------------------


def test_density_trace_and_share_agree_with_the_truth_within_their_errors() -> None:
    eigenvalues = torch.cat([torch.randn(90, dtype=torch.float64, generator=seeded(3)), linspace(5, 12, 10)])
    found = spectral_density(symmetric(eigenvalues), n_probes=60, n_steps=100, generator=seeded(0))
    assert found.n_matvecs == 6000
    for f in (torch.exp, torch.abs, lambda t: t > 2):
        estimate = found.trace_of(f)
        assert is_within(estimate, float(f(eigenvalues).sum()), 2)
        assert estimate.n_matvecs == 6000
    assert found.trace_of(torch.ones_like).value == pytest.approx(100, rel=1e-12)
    for low, high in [(4.0, 13.0), (-math.inf, 0.0), (-0.5, 0.5)]:
        truth = float(((eigenvalues >= low) & (eigenvalues <= high)).double().mean())
        assert is_within(found.share(low, high), truth, 2)
        assert 0 < found.share(low, high).error < 0.02
    grid = found.grid(200, sigma=0.5)
    mean, error = found.density(grid, sigma=0.5)
    bells = torch.exp(-(((grid[:, None] - eigenvalues) / 0.5) ** 2) / 2) / (0.5 * math.sqrt(2 * math.pi))
    deviation = (mean - bells.mean(1)).abs()
    assert (deviation <= 2 * error).double().mean() > 0.9
    assert (deviation <= 4 * error).all()
    assert error.max() < 0.05 * mean.max()


def test_share_is_off_by_the_weights_of_the_neighbouring_nodes_at_most() -> None:
    H = symmetric(torch.randn(150, dtype=torch.float64, generator=seeded(5)))
    eigenvalues, q = torch.linalg.eigh(H.matrix)
    found = spectral_density(H, n_probes=1, n_steps=12, generator=seeded(1))
    measure = (q.T @ probes_of(1, 1, 150)[0]) ** 2
    nodes, weights = found.nodes[0], found.weights[0]
    defects = []
    for x in linspace(float(nodes[0]) + 1e-3, float(nodes[-1]) - 1e-3, 200):
        left = int((nodes <= x).sum()) - 1
        defect = float(measure[eigenvalues <= x].sum()) - found.share(-math.inf, float(x)).value
        assert -weights[left] - 1e-12 <= defect <= weights[left + 1] + 1e-12
        defects.append(abs(defect))
    assert max(defects) > 0.01, "and twelve steps are indeed not sharp here"


def test_truth_is_inside_two_standard_errors_about_nineteen_times_in_twenty() -> None:
    H, eigenvalues = five_values()
    at = torch.tensor([0.5], dtype=torch.float64)
    truth_at = float(torch.exp(-((eigenvalues - 0.5) ** 2) / 2).mean() / math.sqrt(2 * math.pi))
    hits = {"exp": 0, "share": 0, "density": 0}
    for seed in range(200):
        found = spectral_density(H, n_probes=20, n_steps=6, generator=seeded(seed))
        mean, error = found.density(at, sigma=1.0)
        hits["exp"] += is_within(found.trace_of(torch.exp), float(eigenvalues.exp().sum()), 2)
        hits["share"] += is_within(found.share(-3, -0.1), 0.4, 2)
        hits["density"] += is_within(Estimate(float(mean), float(error), 0), truth_at, 2)
    assert all(0.9 <= count / 200 <= 0.985 for count in hits.values()), hits


@pytest.mark.parametrize("method", METHODS)
def test_errors_of_the_trace_are_of_the_right_size(method: Method) -> None:
    eigenvalues = linspace(-1, 3, 100)
    H = symmetric(eigenvalues)
    estimates = [trace(H, method=method, n_matvecs=60, generator=seeded(seed)) for seed in range(200)]
    share = sum(is_within(estimate, float(eigenvalues.sum()), 2) for estimate in estimates) / 200
    assert 0.9 <= share <= 0.985
    values = torch.tensor([estimate.value for estimate in estimates])
    errors = torch.tensor([estimate.error for estimate in estimates])
    assert float(values.std()) == pytest.approx(float(errors.square().mean().sqrt()), rel=0.15)
    assert abs(float(values.mean() - eigenvalues.sum())) <= 2.5 * float(values.std()) / math.sqrt(200), "no bias"


def test_errors_fall_with_the_root_of_the_number_of_probes() -> None:
    H, _ = five_values()
    errors = [spectral_density(H, n_probes=r, n_steps=5).trace_of(torch.exp).error for r in (50, 800)]
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.25)


def test_one_probe_leaves_the_error_unknown() -> None:
    H, _ = five_values()
    found = spectral_density(H, n_probes=1, n_steps=5)
    mean, error = found.density(found.grid())
    assert math.isnan(found.trace_of(torch.exp).error)
    assert math.isnan(found.share(0, 1).error)
    assert error.isnan().all()
    assert mean.isfinite().all()
    assert math.isnan(trace(H, n_matvecs=3).error)


@settings(deadline=None, max_examples=30)
@given(
    n=st.integers(1, 30),
    m=st.integers(1, 12),
    seed=st.integers(0, 1000),
    scale=st.floats(1e-6, 1e6),
    relative_sigma=st.none() | st.floats(0.01, 10),
)
def test_density_is_positive_and_integrates_to_one_on_its_grid(
    n: int, m: int, seed: int, scale: float, relative_sigma: float | None
) -> None:
    H = symmetric(scale * torch.randn(n, dtype=torch.float64, generator=seeded(seed)), seed)
    found = spectral_density(H, n_probes=2, n_steps=m, generator=seeded(seed))
    sigma = None if relative_sigma is None else relative_sigma * scale
    grid = found.grid(2000, sigma)
    mean, _ = found.density(grid, sigma)
    assert mean.shape == grid.shape == (2000,)
    assert (mean >= 0).all()
    assert float(torch.trapezoid(mean, grid)) == pytest.approx(1, abs=1e-5)


def test_density_does_not_depend_on_the_grids_precision_or_order() -> None:
    H, _ = five_values()
    found = spectral_density(H, n_probes=3, n_steps=5)
    grid = torch.arange(-4.0, 8.0)
    mean, error = found.density(grid, 1.0)
    backwards = found.density(grid.double().flip(0), 1.0)
    assert mean.dtype == error.dtype == torch.float64
    assert torch.equal(mean, backwards[0].flip(0))
    assert torch.equal(error, backwards[1].flip(0))


def test_default_broadening_is_a_hundredth_of_the_range() -> None:
    H, _ = five_values()
    found = spectral_density(H, n_probes=3, n_steps=5)
    assert found.sigma == pytest.approx(0.08)
    assert torch.equal(found.grid(), found.grid(sigma=found.sigma))
    assert float(found.grid()[0]) == pytest.approx(-2.4)
    assert float(found.grid()[-1]) == pytest.approx(6.4)
    assert torch.equal(found.density(found.grid())[0], found.density(found.grid(), found.sigma)[0])


# -- traces ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_hutch_plus_plus_is_exact_on_low_rank(seed: int) -> None:
    eigenvalues = torch.cat([torch.zeros(280), linspace(-3, 10, 20)])
    estimate = trace(symmetric(eigenvalues, seed), n_matvecs=60, generator=seeded(seed))
    assert estimate.value == pytest.approx(float(eigenvalues.sum()), rel=1e-9)
    assert estimate.error <= 1e-9
    assert trace(symmetric(eigenvalues, seed), n_matvecs=57, generator=seeded(seed)).error > 1e-6, "one rank short"


@pytest.mark.parametrize("seed", range(10))
def test_hutch_plus_plus_finds_a_sparse_matrix_of_rank_one(seed: int) -> None:
    v = torch.zeros(50, dtype=torch.float64)
    v[7], v[9] = 1, -1  # random signs are orthogonal to it half of the time
    assert trace(Matrix(torch.outer(v, v)), n_matvecs=4, generator=seeded(seed)).value == pytest.approx(2, rel=1e-9)


def test_hutch_plus_plus_beats_hutchinson_where_the_spectrum_decays_and_only_there() -> None:
    def rms(eigenvalues: Tensor, method: Method) -> float:
        H, truth = symmetric(eigenvalues), float(eigenvalues.sum())
        deviations = [trace(H, method=method, n_matvecs=60, generator=seeded(s)).value - truth for s in range(40)]
        return math.sqrt(sum(d**2 for d in deviations) / 40)

    decaying = linspace(1, 200, 200) ** -2
    assert rms(decaying, "hutch++") < rms(decaying, "hutchinson") / 10
    flat = torch.cat([torch.ones(100), -torch.ones(100)]).double()
    assert rms(flat, "hutch++") > rms(flat, "hutchinson")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("n", "n_matvecs"), [(1, 3), (20, 20), (20, 10**9)])
def test_trace_is_exact_when_the_products_suffice(method: Method, n: int, n_matvecs: int) -> None:
    H = symmetric(linspace(-5, 2, n))
    estimate = trace(H, method=method, n_matvecs=n_matvecs)
    assert estimate.value == pytest.approx(float(H.matrix.trace()), rel=1e-13)
    assert (estimate.error, estimate.n_matvecs, H.n_matvecs) == (0, n, n)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("n_matvecs", [3, 4, 5, 61, 90])
def test_trace_takes_the_products_it_is_given(method: Method, n_matvecs: int) -> None:
    H = symmetric(linspace(-1, 1, 100))
    assert trace(H, method=method, n_matvecs=n_matvecs).n_matvecs == n_matvecs == H.n_matvecs


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [0.0, -2.5])
def test_trace_of_multiples_of_the_identity(method: Method, value: float) -> None:
    estimate = trace(Matrix(value * identity(50)), method=method, n_matvecs=12)
    # Random signs see the diagonal without error; projected they no longer do.
    assert estimate.value == pytest.approx(50 * value, abs=3 * estimate.error + 1e-10)
    assert estimate.error == pytest.approx(0, abs=1e-12 if method == "hutchinson" or value == 0 else 10)


@settings(deadline=None, max_examples=30)
@given(
    n=st.integers(4, 30),
    seed=st.integers(0, 1000),
    a=st.floats(1e-9, 1e9) | st.floats(-1e9, -1e-9),
    method=st.sampled_from(METHODS),
)
def test_trace_scales_with_the_operator(n: int, seed: int, a: float, method: Method) -> None:
    H = symmetric(torch.randn(n, dtype=torch.float64, generator=seeded(seed)), seed)
    one, scaled = (
        trace(operator, method=method, n_matvecs=max(4, n // 2), generator=seeded(seed))
        for operator in (H, Matrix(a * H.matrix))
    )
    assert scaled.value == pytest.approx(a * one.value, rel=1e-8, abs=1e-8 * abs(a))
    assert scaled.error == pytest.approx(abs(a) * one.error, rel=1e-8, abs=1e-8 * abs(a))


def test_hutchinson_is_the_mean_over_random_signs() -> None:
    H = symmetric(linspace(-1, 2, 40))
    estimate = trace(H, method="hutchinson", n_matvecs=6, generator=seeded(2))
    generator = seeded(2)
    signs = [(2 * torch.randint(2, (40,), generator=generator) - 1).double() for _ in range(6)]
    forms = torch.stack([z @ H.matrix @ z for z in signs])
    assert estimate.value == pytest.approx(float(forms.mean()), rel=1e-12)
    assert estimate.error == pytest.approx(float(forms.std() / math.sqrt(6)), rel=1e-12)


# -- randomness, progress, devices, bad input ------------------------------------------------------------------------


def test_generator_decides_and_the_default_is_seed_0(untouched: Callable[..., AbstractContextManager[None]]) -> None:
    H = symmetric(linspace(-1, 2, 40))
    with untouched():
        density = [spectral_density(H, n_probes=2, n_steps=4, generator=seeded(s)) for s in (0, 0, 1)]
        default = spectral_density(H, n_probes=2, n_steps=4)
        longer = spectral_density(H, n_probes=5, n_steps=4)
        traces = [trace(H, n_matvecs=12, generator=seeded(s)) for s in (0, 0, 1)]
        default_trace = trace(H, n_matvecs=12)
    assert torch.equal(density[0].weights, density[1].weights)
    assert torch.equal(density[0].weights, default.weights)
    assert torch.equal(density[0].weights, longer.weights[:2])
    assert not torch.equal(density[0].weights, density[2].weights)
    assert traces[0] == traces[1] == default_trace != traces[2]


def test_progress_counts_products_and_those_still_to_come() -> None:
    seen: list[tuple[int, int]] = []
    H = symmetric(linspace(-1, 2, 40))
    spectral_density(H, n_probes=3, n_steps=4, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(done, 12) for done in range(1, 13)]
    seen.clear()
    H = symmetric(torch.tensor([1.0, 2.0], dtype=torch.float64).repeat(20))  # two steps exhaust each probe
    spectral_density(H, n_probes=3, n_steps=4, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 12), (2, 10), (3, 10), (4, 8), (5, 8), (6, 6)]


@pytest.mark.parametrize("n", [5, 30])
def test_an_estimate_goes_on_from_any_state_to_the_same_bits(n: int) -> None:
    H = symmetric(linspace(-1, 3, n))
    states: list[DensityState] = []
    whole = spectral_density(H, n_probes=3, n_steps=8, generator=seeded(5), save=states.append, save_seconds=-1.0)
    # Of a probe that exhausts its space nothing is left to keep at its last product.
    assert len(states) == whole.n_matvecs - (3 if n == 5 else 0)
    for i, state in enumerate(states):
        done: list[tuple[int, int]] = []
        H.n_matvecs = 0
        found = spectral_density(
            H,
            n_probes=3,
            n_steps=8,
            generator=seeded(77),  # the state has its own
            state=state,
            progress=lambda a, b, done=done: done.append((a, b)),  # type: ignore[misc]
        )
        assert torch.equal(found.nodes, whole.nodes)
        assert torch.equal(found.weights, whole.weights)
        assert found.n_matvecs == whole.n_matvecs
        assert H.n_matvecs == whole.n_matvecs - int(state.counters[1])
        assert not done or done[-1][0] == done[-1][1] == whole.n_matvecs, i


def test_a_state_of_another_estimate_is_refused() -> None:
    states: list[DensityState] = []
    H = symmetric(linspace(0, 1, 30))
    spectral_density(H, n_probes=2, n_steps=4, save=states.append, save_seconds=-1.0)
    with pytest.raises(InputError, match=r"the saved state is of \(2, 4\) probes and steps, these are \(3, 4\)"):
        spectral_density(H, n_probes=3, n_steps=4, state=states[0])
    with pytest.raises(InputError, match="the saved state is of an operator of size 30, this is 31"):
        spectral_density(symmetric(linspace(0, 1, 31)), n_probes=2, n_steps=4, state=states[0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_a_gpu_gives_what_the_cpu_gives() -> None:
    H = symmetric(linspace(-1, 2, 40))
    there = Matrix(H.matrix.cuda())
    here, found = (spectral_density(operator, n_probes=2, n_steps=6) for operator in (H, there))
    torch.testing.assert_close(found.nodes, here.nodes, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.weights, here.weights, rtol=1e-9, atol=1e-12)
    for n_matvecs in (12, 40):
        assert trace(there, n_matvecs=n_matvecs).value == pytest.approx(trace(H, n_matvecs=n_matvecs).value, rel=1e-9)


def rules() -> SpectralDensity:
    return spectral_density(symmetric(linspace(-1, 2, 6)), n_probes=2, n_steps=3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda H: spectral_density(H, n_probes=0), "n_probes = 0: .* at least 1"),
        (lambda H: spectral_density(H, n_steps=0), "n_steps = 0: .* at least 1"),
        (lambda H: trace(H, n_matvecs=2), "n_matvecs = 2: .* at least 3"),
        (lambda H: trace(H, method="hutchinson", n_matvecs=1), "n_matvecs = 1: .* at least 2"),
        (lambda H: trace(H, method="exact"), "unknown method 'exact'; there is: hutch"),  # type: ignore[arg-type]
        (lambda H: rules().density(torch.ones(3), sigma=0.0), "sigma = 0.0: .* positive"),
        (lambda H: rules().density(torch.ones(3), sigma=math.nan), "sigma = nan"),
        (lambda H: rules().grid(sigma=-1.0), "sigma = -1.0"),
        (lambda H: rules().grid(sigma=math.inf), "sigma = inf"),
        (lambda H: rules().grid(1), "size = 1: .* at least 2"),
        (lambda H: rules().density(torch.ones(0)), "at least one point"),
        (lambda H: rules().density(torch.ones(2, 2)), "shape \\(2, 2\\)"),
        (lambda H: rules().share(2.0, 1.0), "lower end first"),
        (lambda H: rules().share(math.nan, 1.0), "empty"),
        (lambda H: rules().trace_of(torch.log), "finite value .* between -"),
        (lambda H: rules().trace_of(torch.sum), "one finite value for each"),
    ],
)
def test_bad_input_is_refused(make: Callable[[Matrix], object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make(symmetric(linspace(-1, 2, 6)))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("n_matvecs", [2, 90])
def test_product_that_is_not_finite_is_refused(value: float, n_matvecs: int) -> None:
    H = Matrix(torch.full((3, 3), value, dtype=torch.float64))
    with pytest.raises(InputError, match="not finite"):
        spectral_density(H)
    with pytest.raises(InputError, match="not finite"):
        trace(H, method="hutchinson", n_matvecs=n_matvecs)
