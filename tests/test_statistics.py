"""Intervals: against published values, closed forms, and simulation."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from hessnb.errors import InputError
from hessnb.statistics import difference, exact_proportion, geometric_mean, mean, proportion, spearman, spearman_within


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
    assert found.low <= found.value <= found.high
    assert 0.3 < min(abs(found.low), abs(found.high)) < 0.95


def test_too_few_or_constant_values_have_no_correlation() -> None:
    assert spearman([1, 2, 3, 4], [1, 2, 3, 4]) is None
    assert spearman([1, 2, 3, 4, 5], [7, 7, 7, 7, 7]) is None
    assert spearman([7, 7, 7, 7, 7], [1, 2, 3, 4, 5]) is None
    with pytest.raises(InputError, match="5 and 4"):
        spearman([1, 2, 3, 4, 5], [1, 2, 3, 4])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_values_that_are_not_finite_have_no_correlation(bad: float) -> None:
    for x, y in (([5, 4, bad, 2, 1], [1, 2, 3, 4, 5]), ([1, 2, 3, 4, 5], [5, 4, bad, 2, 1])):
        with pytest.raises(InputError, match="not all finite"):
            spearman(x, y)


@pytest.mark.parametrize("x", [[1, 1, 1, 2, 2, 2], [1, 1, 2, 2, 3], [1, 1, 1, 2, 2, 2, 2], [1, 2, 3, 4]])
def test_ties_that_leave_few_orders_have_no_interval(x: list[float]) -> None:
    y = [float(i) for i in range(len(x))]
    assert spearman(x, y) is None
    assert spearman(y, x) is None


def test_interval_with_ties_errs_no_more_often_than_it_says() -> None:
    x = [1, 1, 2, 3, 4, 5]
    wrong = [
        found.low > 0 or found.high < 0
        for order in itertools.permutations(range(6))
        if (found := spearman(x, list(order)))
    ]
    assert len(wrong) == 720
    assert sum(wrong) / 720 <= 0.05


def test_interval_is_written_with_its_bounds() -> None:
    assert f"{proportion(81, 263):.3f}" == "0.308 (0.255 to 0.366)"


def test_newcombes_interval_is_that_of_the_literature() -> None:
    """Newcombe (1998), Statistics in Medicine 17, 873-890, table II, method 10: 9 and 3 of 10, none and none of 10."""
    found = difference(0.9, 0.3, 10)
    assert (found.low, found.high) == pytest.approx((0.1705, 0.8090), abs=5e-5)
    none = difference(0.0, 0.0, 10)
    assert (none.low, none.high) == pytest.approx((-0.2775, 0.2775), abs=5e-5)


def test_more_comparisons_widen_a_difference_and_more_samples_narrow_it() -> None:
    usual = difference(0.6, 0.5, 1000)
    wide, narrow = difference(0.6, 0.5, 1000, comparisons=7), difference(0.6, 0.5, 10_000)
    assert wide.low < usual.low < narrow.low < 0.1 < narrow.high < usual.high < wide.high


@given(st.integers(1, 40).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_exact_interval_excludes_one_half_where_the_sign_test_rejects(case: tuple[int, int]) -> None:
    found = exact_proportion(*case)
    rejected = scipy.stats.binomtest(*case, p=0.5).pvalue <= 0.05
    assert (found.low > 0.5 or found.high < 0.5) == rejected
    assert found.low <= proportion(*case).value <= found.high


def test_five_of_five_are_too_few_and_six_of_six_are_not() -> None:
    assert exact_proportion(5, 5).low < 0.5 < exact_proportion(6, 6).low


@pytest.mark.parametrize(("comparisons", "confidence"), [(1, 0.95), (5, 0.99)])
def test_mean_has_students_interval_and_more_comparisons_widen_it(comparisons: int, confidence: float) -> None:
    values = [1.0, 2.0, 4.0, 9.0]
    found = mean(values, comparisons=comparisons)
    expected = scipy.stats.ttest_1samp(values, 0).confidence_interval(confidence)
    assert found is not None
    assert (found.value, found.low, found.high) == pytest.approx((4.0, expected.low, expected.high))
    assert mean(values[:2]) is None


def test_geometric_mean_does_not_care_which_way_round_a_ratio_is() -> None:
    found, turned = geometric_mean([2.0, 4.0, 8.0]), geometric_mean([1 / 2, 1 / 4, 1 / 8])
    assert found is not None
    assert turned is not None
    assert found.value == pytest.approx(4.0)
    assert (turned.low, turned.high) == pytest.approx((1 / found.high, 1 / found.low))


def test_correlation_within_groups_is_the_mean_and_its_chance_that_of_all_orders() -> None:
    rng = np.random.default_rng(3)
    sizes = (3, 4, 3)
    x, y = ([list(rng.normal(size=n)) for n in sizes] for _ in range(2))
    y[1][0] = y[1][1]  # a tie
    mean_of = [float(np.mean([scipy.stats.spearmanr(a, b).statistic for a, b in zip(x, y, strict=True)]))]
    for orders in itertools.product(*(itertools.permutations(group) for group in y)):
        each = [scipy.stats.spearmanr(a, b).statistic for a, b in zip(x, orders, strict=True)]
        mean_of.append(float(np.mean(each)))
    found = spearman_within([*zip(x, y, strict=True), ([1.0, 1.0, 1.0], [1.0, 2.0, 3.0])])
    assert found is not None
    value, chance = found
    assert value == pytest.approx(mean_of[0])
    assert chance == pytest.approx(np.mean(np.abs(mean_of[1:]) >= abs(value) - 1e-9))


def test_correlation_within_groups_ignores_what_differs_between_them() -> None:
    apart = [([10.0 * i + j for j in range(3)], [-10.0 * i + j for j in range(3)]) for i in range(4)]
    together = [[v for group in apart for v in group[side]] for side in (0, 1)]
    all_in_one, within = spearman(*together), spearman_within(apart)
    assert all_in_one is not None
    assert all_in_one.value < -0.8
    assert within == pytest.approx((1.0, 2 / 6**4))


def test_correlation_within_groups_needs_some_that_vary_and_no_large_ones() -> None:
    assert spearman_within([]) is None
    assert spearman_within([([1.0, 1.0, 1.0], [1.0, 2.0, 3.0])]) is None
    with pytest.raises(InputError, match="9"):
        spearman_within([(list(range(9)), list(range(9)))])
    with pytest.raises(InputError, match="3 and 2"):
        spearman_within([([1, 2, 3], [1, 2])])
    with pytest.raises(InputError, match="finite"):
        spearman_within([([1, 2, 3], [1, 2, math.nan])])


@pytest.mark.parametrize(
    "call",
    [
        lambda: difference(52.1, 50.0, 1000),
        lambda: difference(0.2, math.nan, 10),
        lambda: difference(0.2, 0.5, 0),
        lambda: difference(0.2, 0.5, 10, comparisons=0),
        lambda: mean([1.0, 2.0, math.inf]),
        lambda: mean([1.0, 2.0, 3.0], comparisons=-1),
        lambda: geometric_mean([1.0, 0.0, 3.0]),
        lambda: geometric_mean([1.0, math.nan, 3.0]),
    ],
)
def test_numbers_of_which_there_is_no_interval_are_refused(call: Callable[[], object]) -> None:
    with pytest.raises(InputError):
        call()


@pytest.mark.parametrize("n", [5, 6, 7, 8])
def test_interval_of_a_few_ranks_errs_no_more_often_than_it_says(n: int) -> None:
    """Without any correlation every order is equally likely: count the orders whose interval excludes zero."""
    orders = list(itertools.permutations(range(n)))
    wrong = 0
    for rho, count in _distribution(n, orders).items():
        order = next(o for o in orders if _rho(n, o) == rho)
        found = spearman(list(range(n)), list(order))
        assert found is not None
        wrong += count * (found.low > 0 or found.high < 0)
    assert wrong / len(orders) <= 0.05


def _rho(n: int, order: tuple[int, ...]) -> int:
    return sum((i - rank) ** 2 for i, rank in enumerate(order))  # all that the correlation depends on


def _distribution(n: int, orders: list[tuple[int, ...]]) -> dict[int, int]:
    counts: dict[int, int] = {}
    for order in orders:
        counts[_rho(n, order)] = counts.get(_rho(n, order), 0) + 1
    return counts
