"""Intervals: against published values, closed forms, and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from hessnb.errors import InputError
from hessnb.statistics import proportion, spearman


def test_wilsons_interval_is_that_of_the_literature() -> None:
    """Newcombe (1998), Statistics in Medicine 17, table I: 81 of 263 and 0 of 20."""
    found = proportion(81, 263)
    assert found.low == pytest.approx(0.2553, abs=5e-5)
    assert found.high == pytest.approx(0.3662, abs=5e-5)
    none = proportion(0, 20)
    assert (none.value, none.low) == (0.0, 0.0)
    assert none.high == pytest.approx(0.1611, abs=5e-5)


@given(st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilsons_interval_is_scipys(case: tuple[int, int]) -> None:
    successes, n = case
    found = proportion(successes, n)
    expected = scipy.stats.binomtest(successes, n).proportion_ci(method="wilson")
    assert found.low == pytest.approx(expected.low, abs=1e-12)
    assert found.high == pytest.approx(expected.high, abs=1e-12)
    assert 0 <= found.low <= found.value <= found.high <= 1


@pytest.mark.parametrize(("successes", "n"), [(3, 2), (-1, 2), (0, 0)])
def test_impossible_counts_are_input_errors(successes: int, n: int) -> None:
    with pytest.raises(InputError, match=f"{successes} of {n}"):
        proportion(successes, n)


def test_rank_correlation_is_scipys_and_its_interval_contains_it() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=30), rng.normal(size=30)
    found = spearman(list(x), list(x + y))
    assert found is not None
    assert found.value == pytest.approx(scipy.stats.spearmanr(x, x + y).statistic)
    assert -1 <= found.low < found.value < found.high <= 1
    opposite = spearman(list(x), list(-x - y))
    assert opposite is not None
    assert (opposite.value, opposite.low, opposite.high) == (-found.value, -found.high, -found.low)


def test_interval_of_rank_correlation_covers_the_truth_about_as_often_as_it_says() -> None:
    rng, rho, covered, rounds = np.random.default_rng(1), 0.6, 0, 400
    truth = 6 / math.pi * math.asin(rho / 2)  # of a normal distribution (Pearson, 1907)
    for _ in range(rounds):
        x = rng.normal(size=25)
        y = rho * x + math.sqrt(1 - rho**2) * rng.normal(size=25)
        found = spearman(list(x), list(y))
        assert found is not None
        covered += found.low <= truth <= found.high
    assert 0.91 <= covered / rounds <= 0.99


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_perfect_correlation_of_few_points_is_not_certain(sign: float) -> None:
    found = spearman([1, 2, 3, 4, 5, 6], [sign * v for v in (1, 2, 3, 4, 5, 60)])
    assert found is not None
    assert found.value == pytest.approx(sign)
    assert 1.0 in (found.high, -found.low)
    assert 0.3 < min(abs(found.low), abs(found.high)) < 0.95


def test_too_few_or_constant_values_have_no_correlation() -> None:
    assert spearman([1, 2, 3, 4], [1, 2, 3, 4]) is None
    assert spearman([1, 2, 3, 4, 5], [7, 7, 7, 7, 7]) is None
    with pytest.raises(InputError, match="5 and 4"):
        spearman([1, 2, 3, 4, 5], [1, 2, 3, 4])


def test_interval_is_written_with_its_bounds() -> None:
    assert f"{proportion(81, 263):.3f}" == "0.308 (0.255 to 0.366)"
