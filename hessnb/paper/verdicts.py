"""From intervals to verdicts: the one rule that judges every claim.

`hessnb.paper.evidence` gives one `Part`, with an interval, for each network, set and size that a claim speaks of. Then

- a part *holds* when its whole interval is in the region that the claim names, *does not hold* when its whole interval
  is outside, is *not decided* otherwise, and *not measured yet* where there is too little data for an interval;
- a claim *holds* when all its parts hold, *holds in part* when some do, *does not hold* when none does and at least one
  does not hold, is *not decided* when at least one is not decided, and *not measured yet* when no part has an interval.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from hessnb.statistics import Interval


class Verdict(StrEnum):
    """What became of a claim."""

    HOLDS = "holds"
    IN_PART = "holds in part"
    FAILS = "does not hold"
    UNDECIDED = "not decided"
    MISSING = "not measured yet"


@dataclass(frozen=True)
class Part:
    """What a statistic says of one part of a claim: its interval over ``n`` values, or what it ``lacks``.

    ``numbers`` writes out what it was computed from, ``profile`` says where that comes from; ``label`` names the part
    of the ``network`` that it speaks of.
    """

    network: str
    label: str
    n: int
    interval: Interval | None
    numbers: str = ""
    profile: str = ""
    lacks: str = ""


@dataclass(frozen=True)
class Region:
    """Where a claim says that a statistic lies: from ``low`` to ``high``.

    With ``fails_without`` a part whose interval is not wholly inside also fails when the interval does not contain that
    value: a correlation that is surely not zero is not "no correlation".
    """

    low: float = -math.inf
    high: float = math.inf
    fails_without: float | None = None

    def judge(self, interval: Interval | None) -> Verdict:
        """Return the verdict on one part, whose interval may be missing."""
        if interval is None:
            return Verdict.MISSING
        if self.low < interval.low and interval.high < self.high:
            return Verdict.HOLDS
        outside = interval.high <= self.low or interval.low >= self.high
        without = self.fails_without is not None and not interval.low <= self.fails_without <= interval.high
        return Verdict.FAILS if outside or without else Verdict.UNDECIDED


def verdict(parts: Sequence[Verdict]) -> Verdict:
    """Return the verdict on a claim from those on its parts."""
    if Verdict.HOLDS in parts:
        return Verdict.HOLDS if set(parts) == {Verdict.HOLDS} else Verdict.IN_PART
    return next((found for found in (Verdict.FAILS, Verdict.UNDECIDED) if found in parts), Verdict.MISSING)
