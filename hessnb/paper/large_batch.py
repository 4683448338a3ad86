"""Tables 1, 2 and 7 of the paper, ours beside the published numbers: what training with large batches does."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

import pandas as pd

from hessnb.experiments.results import Outcome
from hessnb.experiments.spec import SPLITS, AttackAccuracy, AttackSpec, InputCurvature, SplitName
from hessnb.paper.origins import origins
from hessnb.paper.outcomes import clean
from hessnb.paper.published import published
from hessnb.paper.recorded import Recorded, papers_own, profiles
from hessnb.paper.tables import NOT_MEASURED, PROFILE, TOO_FEW, Table, mean_and_spread
from hessnb.statistics import spearman, spearman_within

_SETS: dict[SplitName, str] = {"train": "training", "test": "test"}

# Title, values, the paper's column if it has one, and how a value is written.
Columns = Sequence["tuple[str, Column, str | None, str]"]
# From the runs of one network and batch size to their values on a split.
Column = Callable[[Sequence[Outcome], SplitName], list[float]]


def curvature(table: str, outcomes: Sequence[Outcome], *, name: str, caption: str) -> Table:
    """Return accuracy and dominant Hessian eigenvalue of ``table`` ("table1", "table2" or "table7"), with the paper's.

    One row a network and batch size of ``outcomes``; values on the training set, on the test set in brackets; several
    seeds give mean and standard deviation. A cell without a measurement says so. Recorded outcomes also get their
    origins and, where the scale is the paper's, the difference to it (ours - paper, or ours / paper for an eigenvalue).
    """
    columns: Columns = [("Accuracy %", clean, "accuracy", "{:.2f}"), ("λ₁", lambda1, "lambda1", "{:.3g}")]
    return _table(table, outcomes, columns, name, caption, epochs=True)


def input_curvature(table: str, outcomes: Sequence[Outcome], *, name: str, caption: str) -> Table:
    """Return the means of the norms of input Hessian and input gradient (section 3.2), laid out as `curvature`."""
    columns: Columns = [
        ("λ₁ˣ", input_lambda1, "lambda1_x", "{:.3g}"),
        ("‖∇ₓJ‖", input_gradient, "gradient_x", "{:.2g}"),
    ]
    return _table(table, outcomes, columns, name, caption)


def robustness(table: str, outcomes: Sequence[Outcome], *, name: str, caption: str) -> Table:
    """Return the accuracies (%) under FGSM, laid out as `curvature`, for one eps of the paper's table below the other.

    Twice: with the exact gradient, and with that of the loss as float32 rounds it, which stands beside the paper's.
    """
    sizes = [c.split("_")[1] for c in published(table).columns if c.startswith("adversarial") and c.endswith("train")]
    parts = []
    for eps in sizes:
        columns: Columns = [
            ("exact", attacked(float(eps)), None, "{:.1f}"),
            ("float32", attacked(float(eps), plain=True), f"adversarial_{eps}", "{:.1f}"),
        ]
        parts.append(_table(table, outcomes, columns, name, caption))
    rows = [(eps, *row) for eps, part in zip(sizes, parts, strict=True) for row in part.rows]
    return replace(parts[0], header=("ε", *parts[0].header), rows=tuple(rows))


def iterated(outcomes: Sequence[Outcome], eps: float, *, name: str, caption: str) -> Table:
    """Return accuracies (%) on the test set under FGSM and FGSM-10 of size ``eps``, exact: section 3.2's second attack.

    One row a batch size of one network's ``outcomes``; last, each column's rank correlation with the batch size.
    """
    columns = {"clean": clean, "FGSM": attacked(eps), "FGSM-10": attacked(eps, method="FGSM-10")}
    from_record = any(isinstance(o, Recorded) for o in outcomes)
    sizes = sorted({o.task.spec.recipe.batch_size for o in outcomes})
    rows = []
    for size in sizes:
        runs = [o for o in outcomes if o.task.spec.recipe.batch_size == size]
        cells = [mean_and_spread(column(runs, "test"), "{:.1f}") for column in columns.values()]
        counted = seeds([column(runs, "test") for column in columns.values()], runs)
        rows.append((str(size), *cells, counted, *((profiles(runs),) if from_record else ())))
    ranks = [_correlation(outcomes, _batch_size, column, "test") for column in columns.values()]
    rows.append(("correlation with it", *ranks, "–", *(("–",) if from_record else ())))
    header = ("Batch", *columns, "Seeds", *((PROFILE,) if from_record else ()))
    return Table(name, caption, header, tuple(rows), origins(outcomes))


def _measures() -> dict[str, Column]:
    """Return the measures that may go with robustness, by title."""
    return {"λ₁": lambda1, "λ₁ˣ": input_lambda1, "‖∇ₓJ‖": input_gradient}


def correlations(outcomes: Sequence[Outcome], eps: float, *, name: str, caption: str) -> Table:
    """Return Spearman's rank correlation of accuracy under FGSM with each measure of curvature, by network and split.

    One point a trained network, with 95 % intervals (see `hessnb.statistics.spearman`).
    """
    measures = _measures()
    rows = []
    for network in dict.fromkeys(o.task.spec.model.name for o in outcomes):
        runs = [o for o in outcomes if o.task.spec.model.name == network]
        for split in SPLITS:
            pairs = [_pairs(runs, measure, attacked(eps), split) for measure in measures.values()]
            counted = number_of([x for x, _ in pairs])
            rows.append((network, _SETS[split], counted, *(_shown(*pair) for pair in pairs)))
    return Table(name, caption, ("Network", "Set", "n", *measures), tuple(rows))


def correlations_within(outcomes: Sequence[Outcome], eps: float, *, name: str, caption: str) -> Table:
    """Return the rank correlations of `correlations` among networks of one batch size, which differ by the seed alone.

    The mean over the batch sizes with three seeds or more, and its exact p-value (`hessnb.statistics.spearman_within`).
    """
    measures = _measures()
    kinds: dict[tuple[str, int], list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        if outcome.measurements:
            kinds[outcome.task.spec.model.name, outcome.task.spec.recipe.batch_size].append(outcome)
    rows = []
    for network in dict.fromkeys(name for name, _ in kinds):
        groups = [runs for (of, _), runs in kinds.items() if of == network]
        for split in SPLITS:
            each = [[_pairs(runs, measure, attacked(eps), split) for runs in groups] for measure in measures.values()]
            used = [[pair for pair in pairs if len(pair[0]) >= 3] for pairs in each]
            told = dict.fromkeys(" + ".join(str(len(x)) for x, _ in pairs) for pairs in used)
            counted = "; ".join(filter(None, told)) or TOO_FEW
            rows.append((network, _SETS[split], counted, *(_chance(pairs) for pairs in used)))
    return Table(name, caption, ("Network", "Set", "n", *measures), tuple(rows))


def _chance(groups: Sequence[tuple[Sequence[float], Sequence[float]]]) -> str:
    found = spearman_within(groups)
    return TOO_FEW if found is None else f"{found[0]:.2f}" + f" (p = {found[1]:.2g})"


def published_correlations(table: str, eps: float, *, name: str, caption: str) -> Table:
    """Return the same for the numbers that the paper printed in ``table``."""
    measures = {"λ₁": "lambda1", "λ₁ˣ": "lambda1_x", "‖∇ₓJ‖": "gradient_x"}
    paper = published(table)
    rows = []
    for network in dict.fromkeys(key[0] for key in paper.index):
        part = paper.loc[network]
        for split in SPLITS:
            robust = part[f"adversarial_{eps:g}_{split}"].tolist()
            cells = [_shown(part[f"{measure}_{split}"].tolist(), robust) for measure in measures.values()]
            rows.append((network, _SETS[split], str(len(part)), *cells))
    return Table(name, caption, ("Network", "Set", "n", *measures), tuple(rows))


def _correlation(runs: Sequence[Outcome], first: Column, second: Column, split: SplitName) -> str:
    return _shown(*_pairs(runs, first, second, split))


def _pairs(runs: Sequence[Outcome], first: Column, second: Column, split: SplitName) -> tuple[list[float], list[float]]:
    """Return the values of two columns for the runs that have both."""
    pairs = [(a[0], b[0]) for o in runs if (a := first([o], split)) and (b := second([o], split))]
    return [a for a, _ in pairs], [b for _, b in pairs]


def _shown(x: Sequence[float], y: Sequence[float]) -> str:
    found = spearman(x, y)
    return TOO_FEW if found is None else f"{found:.2f}"


def input_lambda1(outcomes: Sequence[Outcome], split: SplitName) -> list[float]:
    """Return the mean norms of the input Hessian."""
    return _values(outcomes, InputCurvature(split=split), "lambda1")


def input_gradient(outcomes: Sequence[Outcome], split: SplitName) -> list[float]:
    """Return the mean norms of the input gradient."""
    return _values(outcomes, InputCurvature(split=split), "gradient_norm")


def _batch_size(outcomes: Sequence[Outcome], split: SplitName) -> list[float]:
    return [float(o.task.spec.recipe.batch_size) for o in outcomes]


def attacked(eps: float, *, plain: bool = False, method: Literal["FGSM", "FGSM-10"] = "FGSM") -> Column:
    """Return the column of accuracies, in per cent, under an attack of size ``eps``, clipped to the pixels' range.

    ``plain`` takes the gradient of the loss as float32 rounds it.
    """

    def column(outcomes: Sequence[Outcome], split: SplitName) -> list[float]:
        attack = AttackSpec(method=method, eps=eps, clip=True, precision="plain" if plain else None)
        measure = AttackAccuracy(split=split, attack=attack)
        return [100 * accuracy for accuracy in _values(outcomes, measure, "accuracy")]

    return column


def lambda1(outcomes: Sequence[Outcome], split: SplitName) -> list[float]:
    """Return the dominant eigenvalues of the Hessian in the weights."""
    return [outcome.eigenvalues(split)[0] for outcome in outcomes if outcome.eigenvalues(split)]


def _values(outcomes: Sequence[Outcome], measure: InputCurvature | AttackAccuracy, field: str) -> list[float]:
    return [found.values[field] for o in outcomes if (found := o.measurements.get(measure))]


def _table(
    table: str,
    outcomes: Sequence[Outcome],
    columns: Columns,
    name: str,
    caption: str,
    *,
    epochs: bool = False,
) -> Table:
    paper = published(table)
    groups: dict[tuple[str, int], list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        groups[(outcome.task.spec.model.name, outcome.task.spec.recipe.batch_size)].append(outcome)
    several = len({network for network, _ in groups}) > 1
    from_record = any(isinstance(o, Recorded) for o in outcomes)
    compared = from_record and any(papers_own(group) for group in groups.values())
    rows = []
    for key in sorted(groups):
        cells = [*(key[:1] if several else ()), str(key[1])]
        values: list[list[float]] = []
        for _, column, field, form in columns:
            ours = [column(groups[key], split) for split in SPLITS]
            values += ours
            cells.append(_both(ours, form))
            if field:
                cells.append(_published(paper, key, field))
                if compared:
                    cells.append(_difference(ours, paper, key, field) if papers_own(groups[key]) else "–")
        if epochs:
            lengths = [float(len(o.result.history)) for o in groups[key] if o.result and o.result.status == "done"]
            cells.append(mean_and_spread(lengths, "{:.0f}") if lengths else "–")
        cells.append(seeds(values, groups[key]))
        rows.append((*cells, *((profiles(groups[key]),) if from_record else ())))
    titles = [
        title
        for column in columns
        for title in (
            (f"{column[0]}, ours", "paper", *(("difference",) if compared else ())) if column[2] else (column[0],)
        )
    ]
    header = (*(("Network",) if several else ()), "Batch", *titles, *(("Epochs",) if epochs else ()), "Seeds")
    return Table(name, caption, (*header, *((PROFILE,) if from_record else ())), tuple(rows), origins(outcomes))


def number_of(columns: Sequence[Sequence[float]]) -> str:
    """Return how many values the cells of a row are of, those that have any: "3", or "1 to 3" where they differ."""
    sizes = sorted({len(values) for values in columns if values}) or [0]
    return str(sizes[0]) if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"


def seeds(columns: Sequence[Sequence[float]], outcomes: Sequence[Outcome]) -> str:
    """Return how many seeds the cells of a row are of, and how many trainings of it failed."""
    failed = sum(o.result is not None and o.result.status == "failed" for o in outcomes)
    return number_of(columns) + (f", {failed} failed" if failed else "")


def _both(pair: Sequence[Sequence[float]], form: str) -> str:
    shown = [mean_and_spread(values, form) for values in pair]
    return NOT_MEASURED if all(text == NOT_MEASURED for text in shown) else f"{shown[0]} ({shown[1]})"


def _published(paper: pd.DataFrame, key: tuple[str, int], column: str) -> str:
    if key not in paper.index or f"{column}_train" not in paper.columns:
        return "–"
    train, test = (float(paper[f"{column}_{split}"][key]) for split in SPLITS)
    return f"{train:g} ({test:g})"


def _difference(ours: Sequence[Sequence[float]], paper: pd.DataFrame, key: tuple[str, int], field: str) -> str:
    """Return training (test): ours - paper for accuracies, ours / paper for what has no scale of its own."""
    if key not in paper.index or f"{field}_train" not in paper.columns:
        return "–"
    shown = []
    for values, split in zip(ours, SPLITS, strict=True):
        if not values:
            shown.append("–")
            continue
        mean, theirs = statistics.mean(values), float(paper[f"{field}_{split}"][key])
        accuracies = field.startswith(("accuracy", "adversarial"))
        shown.append(f"{mean - theirs:+.2f}" if accuracies else f"× {mean / theirs:.2f}")
    return "–" if set(shown) == {"–"} else f"{shown[0]} ({shown[1]})"
