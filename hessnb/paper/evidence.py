"""The statistics by which claims are tested, by name: from tables of numbers to parts with intervals.

The tables are those of `hessnb.paper.numbers`, by artefact. What an interval is taken over is said by each statistic,
since networks that share an origin, or the same few samples, are not independent of each other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import product
from typing import Any

import numpy as np
import pandas as pd

from hessnb.attacks import ATTACKS
from hessnb.paper.adversarial import ORIGINAL
from hessnb.paper.tables import SUBSCRIPTS
from hessnb.paper.verdicts import Part
from hessnb.statistics import Interval, difference, exact_proportion, geometric_mean, mean, proportion, spearman

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
    """Geometric mean, over the runs of a network, of a ratio of two columns, or of lists of columns (spectra).

    Networks that were trained on from one original are one run: see `ratio_to_original`.
    """
    for network, rows in _networks(frames):
        ratios = _ratios(rows, _matching(rows, over), rows, _matching(rows, under))
        yield from _means(network, "", ratios, rows, geometric_mean)


def ratio_to_original(frames: Frames, *, columns: list[str]) -> Iterator[Part]:
    """Geometric mean of the ratio of a robust network to the original one of its seed; one part a kind of column.

    Columns of the same data (a spectrum) are averaged within a network. The five robust networks of a seed go on from
    one original and are not five independent ones: of three seeds or more the interval is over seeds, of fewer there is
    one for each seed, over its networks, and it speaks of that original alone.
    """
    for network, rows in _networks(frames):
        originals = rows[rows["training"] == ORIGINAL].set_index("seed")
        robust = rows[(rows["training"] != ORIGINAL) & rows["seed"].isin(originals.index)]
        before = originals.loc[robust["seed"]].set_axis(robust.index)
        for pattern in columns:
            if names := _matching(rows, [pattern]):
                ratios = _ratios(robust, names, before, names)
                yield from _means(network, column_label(pattern), ratios, robust, geometric_mean)


def relative_change(frames: Frames, *, start: str, end: str) -> Iterator[Part]:
    """Mean of (end - start) / |start|, for quantities of either sign; one part a set.

    Seeds are taken as in `ratio_to_original`.
    """
    for network, rows in _networks(frames):
        for column in _matching(rows, [f"{end}_*"]):
            of = column.rsplit("_", 1)[-1]
            changes = (rows[column] - rows[f"{start}_{of}"]) / rows[f"{start}_{of}"].abs()
            yield from _means(network, SETS[of], changes, rows, mean)


def drop_after_peak(frames: Frames, *, column: str) -> Iterator[Part]:
    """Fall of an accuracy from the best of the smaller batch sizes to the largest, in points.

    Of the seeds that were trained with the largest. Widened for having chosen the best (Bonferroni); seeds and test
    samples as in `accuracy_difference`.
    """
    for network, rows in _networks(frames):
        known = rows[["batch_size", "seed", column, "n_test"]].dropna(subset=[column])
        largest = rows["batch_size"].max()
        known = known[known["seed"].isin(known.loc[known["batch_size"] == largest, "seed"])]
        means = known.groupby("batch_size")[column].mean()
        told = "; ".join(f"{size}: {value:.4g}" for size, value in means.items())
        found = None
        if len(means) >= 3:
            best = means.drop(largest).idxmax()
            before, after = (known[known["batch_size"] == size].set_index("seed")[column] for size in (best, largest))
            found = _difference(before, after, int(known["n_test"].iloc[0]), comparisons=len(means) - 1)
        lacks = "three batch sizes, the largest among them"
        yield _part(network, "best − largest batch", rows, known.index, len(means), found, told, lacks)


def accuracy_difference(frames: Frames, *, pairs: list[list[str]]) -> Iterator[Part]:
    """Difference of two accuracies of Tables 3 and 4, "row/column" each, in points.

    The interval is Newcombe's over test samples; of three seeds or more it also spans Student's over seeds. Seeds that
    have but one of the two are left out. ``{robust}`` and ``{any}`` stand for each robust and each network,
    ``{attack}`` for each attack.
    """
    for network, rows in _networks(frames):
        for first, second in _expanded(pairs):
            cells = pd.concat([_cells(rows, *name.split("/")) for name in (first, second)], axis=1, join="inner")
            one, other = (cells.iloc[:, i] for i in range(2))
            n = int(rows["n_test"].iloc[0])
            found = _difference(one, other, n) if len(cells) else None
            told = f"{one.mean():.4g} and {other.mean():.4g}" if len(cells) else ""
            used = rows.index[rows["seed"].isin(cells.index)]
            yield _part(network, f"{first} − {second}", rows, used, len(cells), found, told, "both accuracies")


def share_with_negative(frames: Frames, *, samples: int, threshold: float) -> Iterator[Part]:
    """Share of draws of single samples (B_H = ``samples``) on which every network has significant negative curvature.

    That is a lowest eigenvalue below minus ``threshold`` times the largest. A draw is the same samples for all networks
    of all seeds: it counts once, if all networks of a seed were measured. The interval is the exact one of Clopper and
    Pearson.
    """
    for network, rows in _networks(frames):
        hits, told = [], []
        for draw in (c.removeprefix("lowest_") for c in _matching(rows, [f"lowest_B{samples}_*"])):
            lowest = rows[f"lowest_{draw}"] / rows[f"lambda1_{draw}"]
            if not lowest.notna().groupby(rows["seed"]).all().any():
                continue
            hits.append(bool((lowest.dropna() < -threshold).all()))
            for seed, of_seed in lowest.dropna().groupby(rows["seed"]):
                told.append(f"seed {seed}, {draw}: " + ", ".join(f"{value:.2g}" for value in of_seed))
        n = len(hits)
        found = exact_proportion(sum(hits), n) if n else None
        lacks = "a draw measured on all networks of a seed"
        yield _part(network, f"B_H = {samples}", rows, rows.index, n, found, "; ".join(told), lacks)


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


def _ratios(rows: pd.DataFrame, over: list[str], others: pd.DataFrame, under: list[str]) -> pd.Series[float]:
    """Return for each run the geometric mean of the ratios of its columns.

    NaN where one is missing; infinite where one is not positive, so that there is no such mean.
    """
    if not over or len(over) != len(under):
        return pd.Series(math.nan, index=rows.index)
    above, below = rows[over].to_numpy(float), others[under].to_numpy(float)
    missing = np.isnan(above) | np.isnan(below)
    usable = (above > 0) & (below > 0)
    logs = np.log(np.where(usable, above, 1.0) / np.where(usable, below, 1.0))
    logs = np.where(missing, math.nan, np.where(usable, logs, math.inf))
    return pd.Series(np.exp(logs.mean(axis=1)), index=rows.index)


def _means(
    network: str,
    label: str,
    values: pd.Series[float],
    rows: pd.DataFrame,
    average: Callable[[Sequence[float]], Interval | None],
) -> Iterator[Part]:
    """Return the average over runs; where several share an original, over seeds, or one for each of a few seeds.

    Seeds of fewer than three networks are left out where there is one of three. There is none of values that are not
    finite.
    """
    known = values.dropna()
    seeds = rows.loc[known.index, "seed"]

    def part(name: str, of: pd.Series[float], numbers: list[float], needed: str) -> Part:
        told = "; ".join(f"{value:.3g}" if math.isfinite(value) else "not positive" for value in of)
        found, lacks = (
            (average(numbers), needed) if np.isfinite(of).all() else (None, "positive numbers in all of them")
        )
        return _part(network, name, rows, of.index, len(numbers), found, told, lacks)

    of_seeds = {seed: of_seed for seed, of_seed in known.groupby(seeds) if len(of_seed) >= 3}
    if "training" not in rows or rows["training"].nunique() == 1 or not len(known):
        yield part(label or "all runs", known, known.tolist(), "three runs")
    elif len(of_seeds) >= 3:
        averages = [found.value for of_seed in of_seeds.values() if (found := average(of_seed.tolist()))]
        yield part(label or "all seeds", pd.concat(of_seeds.values()), averages, "three seeds of three networks")
    else:
        for seed, of_seed in (of_seeds or dict(iter(known.groupby(seeds)))).items():
            name = f"{label}, seed {seed}" if label else f"seed {seed}"
            yield part(name, of_seed, of_seed.tolist(), "three networks")


def _difference(first: pd.Series[float], second: pd.Series[float], n: int, *, comparisons: int = 1) -> Interval | None:
    """Return the difference of accuracies (%) by seed, over ``n`` test samples and, of three or more, over seeds.

    Of the seeds that have both, of which there is one at least.
    """
    first, second = first.align(second, join="inner")
    gaps = (first - second).tolist()
    found = difference(float(first.mean()) / 100, float(second.mean()) / 100, n, comparisons=comparisons)
    over_samples = Interval(100 * found.value, 100 * found.low, 100 * found.high)
    over_seeds = mean(gaps, comparisons=comparisons)
    if over_seeds is None:
        return over_samples
    return Interval(over_seeds.value, min(over_seeds.low, over_samples.low), max(over_seeds.high, over_samples.high))


def _expanded(pairs: Sequence[Sequence[str]]) -> Iterator[tuple[str, str]]:
    names = {"robust": list(ATTACKS), "any": [ORIGINAL, *ATTACKS], "attack": list(ATTACKS)}
    for first, second in pairs:
        used = [name for name in names if f"{{{name}}}" in first + second]
        for values in product(*(names[name] for name in used)):
            filled = dict(zip(used, values, strict=True))
            one, two = first.format(**filled), second.format(**filled)
            if one != two:
                yield one, two


def _cells(rows: pd.DataFrame, training: str, column: str) -> pd.Series[float]:
    """Return the accuracies of a cell of Tables 3 and 4 by seed, those that are there."""
    found = rows[rows["training"] == training].set_index("seed")
    return found[column].dropna() if column in found else pd.Series(dtype=float)


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
