"""Intervals for the few statistics that the book reports: proportions, their differences, means, rank correlations."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations, product

import numpy as np
import scipy.stats

from hessnb.errors import InputError, real_number, whole_number

# The two-sided 95 % quantile of the normal distribution.
_Z = 1.959963984540054


@dataclass(frozen=True)
class Interval:
    """An estimate and the bounds of its 95 % confidence interval."""

    value: float
    low: float
    high: float

    def __format__(self, form: str) -> str:
        return f"{self.value:{form}} ({self.low:{form}} to {self.high:{form}})"


def proportion(successes: int, n: int) -> Interval:
    """Return ``successes`` / ``n`` with Wilson's score interval (1927); raise InputError unless 0 <= successes <= n."""
    if not 0 <= whole_number("successes", successes, None) <= whole_number("n", n, None) or n == 0:
        raise InputError(f"{successes} of {n}: a proportion needs 0 <= successes <= n and n at least 1")
    return _wilson(successes / n, n, _Z)


def exact_proportion(successes: int, n: int) -> Interval:
    """Return ``successes`` / ``n`` with the exact interval of Clopper and Pearson (1934), for counts of a few.

    Its bounds agree with the exact sign test: one half lies outside of it where that test rejects at 5 %. Raises
    InputError as `proportion` does.
    """
    wilson = proportion(successes, n)
    low, high = scipy.stats.binomtest(successes, n).proportion_ci(method="exact")
    return Interval(wilson.value, float(low), float(high))


def difference(first: float, second: float, n: int, *, comparisons: int = 1) -> Interval:
    """Return the difference of two proportions, each of ``n`` samples, with the interval of Newcombe (1998, method 10).

    It takes the two for independent. Of two on the *same* samples it is therefore too wide wherever they tend to be
    right on the same ones. With ``comparisons`` it is widened, so that so many of them hold together (Bonferroni).
    Raises InputError for shares outside of [0, 1], and counts below one.
    """
    if not (0 <= real_number("first", first) <= 1 and 0 <= real_number("second", second) <= 1):
        raise InputError(f"the shares {first} and {second}: a proportion is between 0 and 1")
    whole_number("n", n)
    whole_number("comparisons", comparisons)
    z = float(scipy.stats.norm.ppf(1 - 0.025 / comparisons))
    one, two = (_wilson(share, n, z) for share in (first, second))
    gap = first - second
    return Interval(
        gap,
        max(-1.0, gap - math.hypot(one.value - one.low, two.high - two.value)),
        min(1.0, gap + math.hypot(one.high - one.value, two.value - two.low)),
    )


def mean(values: Sequence[float], *, comparisons: int = 1) -> Interval | None:
    """Return the mean with Student's interval, which takes the values for draws from a normal distribution.

    None for fewer than three values. ``comparisons`` as in `difference`. Raises InputError for values that are not
    finite.
    """
    whole_number("comparisons", comparisons)
    if not all(map(math.isfinite, values)):
        raise InputError("a mean of values that are not all finite: leave the others out")
    n = len(values)
    if n < 3:
        return None
    middle = math.fsum(values) / n
    deviation = math.sqrt(math.fsum((value - middle) ** 2 for value in values) / (n - 1))
    half = float(scipy.stats.t.ppf(1 - 0.025 / comparisons, n - 1)) * deviation / math.sqrt(n)
    return Interval(middle, middle - half, middle + half)


def geometric_mean(values: Sequence[float]) -> Interval | None:
    """Return the geometric mean of positive values, with the interval of `mean` for their logarithms.

    None for fewer than three values; raises InputError for values that are not positive and finite.
    """
    if not all(value > 0 for value in values):
        raise InputError("a geometric mean of values that are not all positive: leave the others out")
    found = mean([math.log(value) for value in values])
    return found and Interval(*(math.exp(bound) for bound in (found.value, found.low, found.high)))


def spearman(x: Sequence[float], y: Sequence[float]) -> Interval | None:
    """Return Spearman's rank correlation with the interval of Bonett and Wright (2000).

    None where it says nothing, since even the strictest order would come by chance more often than once in twenty: for
    fewer than five pairs, and for few with many ties. Where both sequences have ties, chance alone keeps zero out of
    the interval somewhat more often than it should. Raises InputError for sequences of different lengths and values
    that are not finite.
    """
    _check_pairs(x, y)
    n = len(x)
    orders = [math.factorial(n) // math.prod(map(math.factorial, Counter(values).values())) for values in (x, y)]
    if min(orders) < 2 / 0.05:
        return None
    r = float(scipy.stats.spearmanr(x, y).statistic)
    r = max(-1.0, min(1.0, r))
    # At 1, which rounding may miss, the transformation has no finite value: the bound then follows from a correlation
    # half-way to the nearest one that a ranking has. Of all orders of five to eight at most one in twenty then excludes
    # zero.
    nearest = 1 - 6 / (n * (n * n - 1))
    z = math.atanh(min(abs(r), nearest))
    half = _Z * math.sqrt((1 + r * r / 2) / (n - 3))
    low, high = math.tanh(z - half), math.tanh(z + half) if abs(r) <= nearest else 1.0
    return Interval(r, low, high) if r >= 0 else Interval(r, -high, -low)


def spearman_within(groups: Sequence[tuple[Sequence[float], Sequence[float]]]) -> tuple[float, float] | None:
    """Return the mean over groups of Spearman's rank correlation within each, and its two-sided p-value.

    The value is exact: the share of all ways to reorder the second sequence of each group whose mean is as far from
    zero. Groups in which one of the two does not vary say nothing and are left out; None where none is left. Raises
    InputError for sequences of different lengths, values that are not finite, and groups of more than eight.
    """
    found: list[float] = []
    chances: Counter[float] = Counter({0.0: 1})  # of each sum of correlations, in how many orders it comes
    for x, y in groups:
        _check_pairs(x, y)
        if len(x) > 8:
            raise InputError(f"a group of {len(x)}: up to eight can be reordered in all ways")
        if len(set(x)) > 1 and len(set(y)) > 1:
            first, second = (_standardised(scipy.stats.rankdata(values)) for values in (x, y))
            orders = Counter((np.array(list(permutations(second))) @ first).round(9).tolist())
            found.append(float(first @ second))
            sums: Counter[float] = Counter()
            for (a, n), (b, m) in product(chances.items(), orders.items()):
                sums[round(a + b, 9)] += n * m
            chances = sums
    if not found:
        return None
    as_far = sum(n for value, n in chances.items() if abs(value) >= abs(math.fsum(found)) - 1e-6)
    return round(math.fsum(found) / len(found), 9), as_far / chances.total()


def _check_pairs(x: Sequence[float], y: Sequence[float]) -> None:
    if len(x) != len(y):
        raise InputError(f"a correlation of {len(x)} and {len(y)} values: give as many of one as of the other")
    if not all(map(math.isfinite, (*x, *y))):
        raise InputError("a correlation of values that are not all finite: leave the others out, in pairs")


def _standardised(ranks: np.ndarray) -> np.ndarray:
    """Return the vector of mean zero and length one: the product of two such is their correlation."""
    centred = ranks - ranks.mean()
    return np.asarray(centred / np.linalg.norm(centred))


def _wilson(share: float, n: int, z: float) -> Interval:
    shrink = 1 + z**2 / n
    centre = (share + z**2 / (2 * n)) / shrink
    half = z / shrink * math.sqrt(share * (1 - share) / n + z**2 / (4 * n * n))
    return Interval(share, min(share, max(0.0, centre - half)), max(share, min(1.0, centre + half)))
