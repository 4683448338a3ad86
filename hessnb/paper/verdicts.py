"""From numbers to verdicts: the named statistics, each with an interval, and the one rule that judges intervals.

A statistic gives one `Part` for each network, set and size that a claim speaks of. The rule (see `Region.judge` and
`verdict`) is the same for all:

- a part *holds* when its whole interval is in the region that the claim names, *does not hold* when its whole interval
  is outside, and is *open* otherwise, or where there is too little data for an interval;
- a claim *holds* when all its parts hold, *holds in part* when some do, *does not hold* when none does and at least one
  does not hold, and is *not measured yet* when all are open.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from fnmatch import fnmatchcase
from itertools import product
from typing import Any

import pandas as pd

from hessnb.attacks import ATTACKS
from hessnb.paper.tables import SUBSCRIPTS
from hessnb.statistics import Interval, difference, exact_proportion, geometric_mean, mean, proportion, spearman

ORIGINAL = "ORI"


class Verdict(StrEnum):
    """What became of a claim."""

    HOLDS = "holds"
    IN_PART = "holds in part"
    FAILS = "does not hold"
    OPEN = "not measured yet"


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
        """Return the verdict on one part; without an interval it is open."""
        if interval is None:
            return Verdict.OPEN
        if self.low < interval.low and interval.high < self.high:
            return Verdict.HOLDS
        outside = interval.high <= self.low or interval.low >= self.high
        without = self.fails_without is not None and not interval.low <= self.fails_without <= interval.high
        return Verdict.FAILS if outside or without else Verdict.OPEN


def verdict(parts: Sequence[Verdict]) -> Verdict:
    """Return the verdict on a claim from those on its parts."""
    if parts and all(part is Verdict.HOLDS for part in parts):
        return Verdict.HOLDS
    if Verdict.HOLDS in parts:
        return Verdict.IN_PART
    return Verdict.FAILS if Verdict.FAILS in parts else Verdict.OPEN


Frames = Mapping[str, pd.DataFrame]


def rank_correlation(frames: Frames, *, first: str, second: list[str]) -> Iterator[Part]:
    """Spearman's rank correlation of two columns over the runs of a network, all seeds together.

    ``first`` is ``batch_size``, or a column without its set; ``second`` are patterns of columns.
    """
    for network, rows in _networks(frames):
        for column in _matching(rows, second):
            other = first if first in rows else f"{first}_{column.rsplit('_', 1)[-1]}"
            label = column_label(column)
            if other not in rows:
                continue
            used = list(dict.fromkeys([other, column, "batch_size", "seed"]))
            known = rows[used].dropna().sort_values(["batch_size", "seed"])
            x, y = known[other].tolist(), known[column].tolist()
            told = "; ".join(f"{a:g}: {b:.4g}" for a, b in zip(x, y, strict=True))
            yield _part(network, label, rows, known.index, len(x), spearman(x, y), told, "five runs that differ")


def ratio(frames: Frames, *, over: list[str], under: list[str]) -> Iterator[Part]:
    """Geometric mean, over the runs of a network, of a ratio of two columns, or of lists of columns (spectra)."""
    for network, rows in _networks(frames):
        ratios = _log_ratios(_matching(rows, over), _matching(rows, under), rows, rows)
        yield _of_ratios(network, "all runs", rows, ratios)


def ratio_to_original(frames: Frames, *, columns: list[str]) -> Iterator[Part]:
    """The same of a robust network to the original one of its seed, over robust networks; one part a kind of column.

    Columns of the same data (a spectrum) are averaged within a run.
    """
    for network, rows in _networks(frames):
        originals = rows[rows["training"] == ORIGINAL].set_index("seed")
        robust = rows[(rows["training"] != ORIGINAL) & rows["seed"].isin(originals.index)]
        for pattern in columns:
            names = _matching(rows, [pattern])
            if not names:
                continue
            before = originals.loc[robust["seed"]].set_axis(robust.index)
            label = column_label(pattern)
            yield _of_ratios(network, label, robust, _log_ratios(names, names, robust, before))


def relative_change(frames: Frames, *, start: str, end: str) -> Iterator[Part]:
    """Mean, over the runs of a network, of (end - start) / |start|, for quantities of either sign; one part a set."""
    for network, rows in _networks(frames):
        for column in _matching(rows, [f"{end}_*"]):
            of = column.rsplit("_", 1)[-1]
            known = rows[[column, f"{start}_{of}"]].dropna()
            changes = ((known[column] - known[f"{start}_{of}"]) / known[f"{start}_{of}"].abs()).tolist()
            told = "; ".join(f"{change:+.3g}" for change in changes)
            yield _part(network, SETS[of], rows, known.index, len(changes), mean(changes), told, "three networks")


def drop_after_peak(frames: Frames, *, column: str) -> Iterator[Part]:
    """Fall of an accuracy from its best batch size to the largest, in points, over test samples (means over seeds).

    Newcombe's interval, widened for having chosen the best (Bonferroni).
    """
    for network, rows in _networks(frames):
        known = rows[["batch_size", column, "n_test"]].dropna(subset=[column])
        means = known.groupby("batch_size")[column].mean()
        told = "; ".join(f"{size}: {value:.4g}" for size, value in means.items())
        found = None
        if len(means) >= 3 and means.index.max() == rows["batch_size"].max():
            best, last = means.max() / 100, means.iloc[-1] / 100
            found = difference(best, last, int(known["n_test"].iloc[0]), comparisons=len(means) - 1)
        lacks = "three batch sizes, the largest among them"
        yield _part(network, "best − largest batch", rows, known.index, len(means), _points(found), told, lacks)


def accuracy_difference(frames: Frames, *, pairs: list[list[str]]) -> Iterator[Part]:
    """Difference of two accuracies of Tables 3 and 4, "row/column" each, in points (means over seeds).

    Newcombe's interval, over test samples. ``{robust}`` and ``{any}`` stand for each robust and each network,
    ``{attack}`` for each attack.
    """
    for network, rows in _networks(frames):
        for first, second in _expanded(pairs):
            cells = [_cell(rows, *name.split("/")) for name in (first, second)]
            values = [cell for cell in cells if not math.isnan(cell)]
            n = int(rows["n_test"].iloc[0])
            found = difference(values[0] / 100, values[1] / 100, n) if len(values) == 2 else None
            told = " and ".join(f"{value:.4g}" for value in values)
            label, n = f"{first} − {second}", n if found else 0
            yield _part(network, label, rows, rows.index, n, _points(found), told, "both accuracies")


def share_with_negative(frames: Frames, *, samples: int, threshold: float) -> Iterator[Part]:
    """Share of sub-sampled spectra whose lowest eigenvalue is below minus ``threshold`` times the largest.

    The exact interval of Clopper and Pearson, over networks and draws.
    """
    for network, rows in _networks(frames):
        draws = [c.removeprefix("lowest_") for c in _matching(rows, [f"lowest_B{samples}_*"])]
        lowest = [
            (row[f"lowest_{draw}"] / row[f"lambda1_{draw}"])
            for draw in draws
            for _, row in rows.iterrows()
            if not math.isnan(row[f"lowest_{draw}"])
        ]
        n, hits = len(lowest), sum(value < -threshold for value in lowest)
        told = "; ".join(f"{value:.2g}" for value in sorted(lowest))
        found = exact_proportion(hits, n) if n else None
        yield _part(network, f"B_H = {samples}", rows, rows.index, n, found, told, "a spectrum")


def lowest_eigenvalue(frames: Frames, *, trainings: list[str]) -> Iterator[Part]:
    """Lowest of the top eigenvalues of the full training Hessian, one part a network, relative to its largest.

    The interval is the certified one of the eigenvalue, its residual each way; over several seeds it spans all of them.
    """
    for network, rows in _networks(frames):
        for training in trainings:
            chosen = rows[rows["training"] == training]
            known = chosen.dropna(subset=["lowest_train"]) if "lowest_train" in chosen else chosen.iloc[:0]
            lows = [(row["lowest_train"] / row["lambda1_train"]) for _, row in known.iterrows()]
            errors = [(row["error_train"] / row["lambda1_train"]) for _, row in known.iterrows()]
            found = None
            if lows:
                low, high = (f(a + s * e for a, e in zip(lows, errors, strict=True)) for f, s in ((min, -1), (max, 1)))
                found = Interval(math.fsum(lows) / len(lows), low, high)
            told = "; ".join(f"{value:.2g}" for value in lows)
            yield _part(network, training, chosen, known.index, len(lows), found, told, "a spectrum")


def share_of_samples(frames: Frames, *, column: str) -> Iterator[Part]:
    """Share of samples of which something is true (1) and not false (0), with Wilson's interval."""
    for network, rows in _networks(frames):
        hits, n = int(rows[column].sum()), len(rows)
        yield _part(network, "test samples", rows, rows.index, n, proportion(hits, n), f"{hits} of {n}", "samples")


STATISTICS: dict[str, Callable[..., Iterator[Part]]] = {
    function.__name__: function
    for function in (
        rank_correlation,
        ratio,
        ratio_to_original,
        relative_change,
        drop_after_peak,
        accuracy_difference,
        share_with_negative,
        lowest_eigenvalue,
        share_of_samples,
    )
}

SETS = {"train": "training set", "test": "test set", "batch": "batch"}

_COLUMNS = {
    "lambda1_x": "λ₁ˣ",
    "gradient_x": "‖∇ₓJ‖",
    "lambda1_gap": "test over training λ₁",
    "adversarial": "FGSM (float32)",
    "exact": "FGSM (exact)",
    "curvature": "curvature along the line",
    "accuracy": "accuracy",
}


def column_label(column: str) -> str:
    """Return a column of `hessnb.paper.numbers`, or a pattern of such, in words."""
    *stem, of = column.split("_")
    if column in _COLUMNS:
        return _COLUMNS[column]
    if of.isdigit():  # a draw of the training set
        return f"B_H = {stem[-1].removeprefix('B')}"
    eps = f", ε = {stem.pop()}" if len(stem) > 1 and stem[-1].replace(".", "").isdigit() else ""
    name = "_".join(stem)
    rank = name.removeprefix("lambda")
    eigenvalue = f"λ{rank.translate(SUBSCRIPTS)}" if rank.isdigit() else name
    what = _COLUMNS.get(name, "all samples" if rank == "*" else eigenvalue)
    return f"{what}{eps}" + ("" if rank == "*" else f", {SETS.get(of, of)}")


def _networks(frames: Frames) -> Iterator[tuple[str, pd.DataFrame]]:
    for frame in frames.values():
        if "network" in frame:
            yield from ((str(name), rows) for name, rows in frame.groupby("network", sort=False))


def _matching(rows: pd.DataFrame, patterns: Sequence[str]) -> list[str]:
    return [c for pattern in patterns for c in rows.columns if fnmatchcase(c, pattern)]


def _log_ratios(over: list[str], under: list[str], rows: pd.DataFrame, others: pd.DataFrame) -> list[float]:
    """Return for each run the mean log ratio of its columns; runs with a missing or non-positive cell are left out."""
    found = []
    for (_, a), (_, b) in zip(rows[over].iterrows(), others[under].iterrows(), strict=True):
        pairs = [(x, y) for x, y in zip(a, b, strict=True) if x > 0 and y > 0]
        if pairs and len(pairs) == len(over):
            found.append(math.fsum(math.log(x / y) for x, y in pairs) / len(pairs))
    return found


def _of_ratios(network: str, label: str, rows: pd.DataFrame, logs: Sequence[float]) -> Part:
    ratios = [math.exp(value) for value in logs]
    told = "; ".join(f"{value:.3g}" for value in ratios)
    return _part(network, label, rows, rows.index, len(ratios), geometric_mean(ratios), told, "three networks")


def _expanded(pairs: Sequence[Sequence[str]]) -> Iterator[tuple[str, str]]:
    names = {"robust": list(ATTACKS), "any": [ORIGINAL, *ATTACKS], "attack": list(ATTACKS)}
    for first, second in pairs:
        used = [name for name in names if f"{{{name}}}" in first + second]
        for values in product(*(names[name] for name in used)):
            filled = dict(zip(used, values, strict=True))
            one, two = first.format(**filled), second.format(**filled)
            if one != two:
                yield one, two


def _cell(rows: pd.DataFrame, training: str, column: str) -> float:
    found = rows[rows["training"] == training]
    return float(found[column].mean()) if column in rows and len(found) else math.nan


def _points(interval: Interval | None) -> Interval | None:
    return interval and Interval(100 * interval.value, 100 * interval.low, 100 * interval.high)


def _part(
    network: str,
    label: str,
    rows: pd.DataFrame,
    used: Any,
    n: int,
    interval: Interval | None,
    numbers: str,
    needed: str,
) -> Part:
    told = rows.loc[used, "profile"].dropna() if n else pd.Series(dtype=str)
    lacks = "" if interval else f"{n or 'none'} measured, needs {needed}"
    return Part(network, label, n, interval, numbers, ", ".join(dict.fromkeys(told)), lacks)
