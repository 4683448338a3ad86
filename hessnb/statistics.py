"""Intervals for the few statistics that the book reports: a proportion, and a rank correlation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import scipy.stats

from hessnb.errors import InputError

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
    if not 0 <= successes <= n or n == 0:
        raise InputError(f"{successes} of {n}: a proportion needs 0 <= successes <= n and n at least 1")
    share, shrink = successes / n, 1 + _Z**2 / n
    centre = (share + _Z**2 / (2 * n)) / shrink
    half = _Z / shrink * math.sqrt(share * (1 - share) / n + _Z**2 / (4 * n * n))
    return Interval(share, min(share, max(0.0, centre - half)), max(share, min(1.0, centre + half)))


def spearman(x: Sequence[float], y: Sequence[float]) -> Interval | None:
    """Return Spearman's rank correlation with the interval of Bonett and Wright (2000).

    None where it says nothing: for fewer than five pairs, or where one of the two does not vary. Raises InputError for
    sequences of different lengths.
    """
    n = len(x)
    if n != len(y):
        raise InputError(f"a correlation of {n} and {len(y)} values: give as many of one as of the other")
    if n < 5 or len(set(x)) < 2 or len(set(y)) < 2:
        return None
    r = float(scipy.stats.spearmanr(x, y).statistic)
    r = max(-1.0, min(1.0, r))
    # At 1 the transformation has no finite value: the bound then follows from the ranking that comes nearest.
    z = math.atanh(min(abs(r), 1 - 6 / (n * (n * n - 1))))
    half = _Z * math.sqrt((1 + r * r / 2) / (n - 3))
    low, high = math.tanh(z - half), math.tanh(z + half) if abs(r) < 1 else 1.0
    return Interval(r, low, high) if r >= 0 else Interval(r, -high, -low)
