"""The claims: the rule on intervals, each statistic on numbers whose answer is known, and the record behind them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from hessnb.attacks import ATTACKS
from hessnb.errors import InputError
from hessnb.experiments.grid import Task, artefact
from hessnb.experiments.profile import load_profile
from hessnb.experiments.results import Measurement, Outcome, RunResult, measurement_to_json, run_result_to_json
from hessnb.experiments.spec import (
    AttackAccuracy,
    InputCurvature,
    Interpolation,
    LossLine,
    Measure,
    RunSpec,
    Spectrum,
)
from hessnb.paper import (
    adversarial,
    claims,
    evidence,
    large_batch,
    numbers,
    origins,
    recorded,
    scoreboard,
    theory,
    verdicts,
)
from hessnb.paper.claims import Claim, assess
from hessnb.paper.published import published
from hessnb.paper.recorded import Recorded, from_record, fullest
from hessnb.paper.tables import Table
from hessnb.paper.verdicts import Part, Region, Verdict
from hessnb.statistics import Interval, difference, mean
from hessnb.training import Epoch

PROVENANCE = {
    "commit": "0123456789abcdef0123",
    "device": "A processor",
    "torch": "2.13.0",
    "date": "2026-11-23T10:00:00+00:00",
    "threads": 1,
    "seed": 0,
    "seconds": 1.0,
}
BY_ID = {claim.id: claim for claim in claims.claims()}


def run_result(spec: RunSpec, test_accuracy: float = 0.99) -> RunResult:
    epoch = Epoch(
        1, train_loss=0.001, train_accuracy=1.0, test_loss=0.1, test_accuracy=test_accuracy, seconds=1.0, lr=0.1
    )
    return RunResult(spec=spec, status="done", reason="", history=[epoch], provenance=PROVENANCE)


def as_printed(table: str, measure: Measure, key: tuple[str, int]) -> Measurement | None:
    """What a measure would have given if ours were the numbers of the paper's large-batch table."""
    paper = published(table)

    if not isinstance(measure, Spectrum | InputCurvature | AttackAccuracy):
        return None
    split = measure.split

    def cell(name: str) -> float:
        return float(paper[f"{name}_{split}"][key])

    if isinstance(measure, Spectrum):
        values: dict[str, object] = {"eigenvalues": [cell("lambda1")] * measure.k, "residuals": [1e-5] * measure.k}
    elif isinstance(measure, InputCurvature):
        values = {"lambda1": cell("lambda1_x"), "gradient_norm": cell("gradient_x")}
    elif isinstance(measure, AttackAccuracy) and measure.attack.precision == "plain":
        values = {"accuracy": cell(f"adversarial_{measure.attack.eps:g}") / 100}
    else:
        return None
    return Measurement(measure, values, PROVENANCE)


def invented(table: str, profile: str = "paper") -> list[Recorded]:
    """The paper's numbers of a large-batch table as if they were recorded."""
    outcomes = []
    for task in artefact(table).tasks_of_seed(load_profile("paper"), 0):
        key = (task.spec.model.name, task.spec.recipe.batch_size)
        found = {m: printed for m in task.measures if (printed := as_printed(table, m, key))}
        accuracy = float(published(table)["accuracy_test"][key]) / 100
        outcomes.append(Recorded(task, run_result(task.spec, accuracy), found, profile))
    return outcomes


def interval_of(parts: Mapping[str, Part], label: str) -> Interval:
    found = parts[label].interval
    assert found is not None
    return found


def labelled(parts: Iterable[Part]) -> dict[str, Part]:
    return {f"{part.network} {part.label}": part for part in parts}


# -- the rule --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("region", "low", "high", "expected"),
    [
        (Region(low=0.0), 0.1, 0.9, Verdict.HOLDS),
        (Region(low=0.0), -0.1, 0.9, Verdict.UNDECIDED),
        (Region(low=0.0), -0.9, 0.0, Verdict.FAILS),
        (Region(high=1.0), 0.2, 1.0, Verdict.UNDECIDED),
        (Region(high=1.0), 1.0, 2.0, Verdict.FAILS),
        (Region(-0.5, 0.5, fails_without=0.0), -0.4, 0.3, Verdict.HOLDS),
        (Region(-0.5, 0.5, fails_without=0.0), 0.1, 0.4, Verdict.HOLDS),  # surely weak, though surely not zero
        (Region(-0.5, 0.5, fails_without=0.0), 0.1, 0.9, Verdict.FAILS),
        (Region(-0.5, 0.5, fails_without=0.0), -0.2, 0.9, Verdict.UNDECIDED),
        (Region(0.5, 2.0), 1.5, 2.5, Verdict.UNDECIDED),
        (Region(0.5, 2.0), 2.5, 3.0, Verdict.FAILS),
    ],
)
def test_part_is_judged_by_its_whole_interval(region: Region, low: float, high: float, expected: Verdict) -> None:
    assert region.judge(Interval((low + high) / 2, low, high)) is expected
    assert region.judge(None) is Verdict.MISSING


def test_claim_holds_only_if_all_its_parts_do() -> None:
    holds, fails, unknown, missing = Verdict.HOLDS, Verdict.FAILS, Verdict.UNDECIDED, Verdict.MISSING
    assert verdicts.verdict([holds, holds]) is Verdict.HOLDS
    assert verdicts.verdict([holds, unknown]) is Verdict.IN_PART
    assert verdicts.verdict([missing, holds]) is Verdict.IN_PART
    assert verdicts.verdict([holds, fails]) is Verdict.IN_PART
    assert verdicts.verdict([fails, unknown]) is Verdict.FAILS
    assert verdicts.verdict([missing, unknown]) is Verdict.UNDECIDED
    assert verdicts.verdict([missing]) is Verdict.MISSING
    assert verdicts.verdict([]) is Verdict.MISSING


# -- the list ----------------------------------------------------------------------------------------------------------


def test_list_is_whole() -> None:
    assert len(BY_ID) == len(claims.claims()) >= 15
    assert {claim.question for claim in BY_ID.values()} == set(scoreboard.QUESTIONS)
    assert all(claim.sentence.endswith(".") and claim.place and claim.title for claim in BY_ID.values())
    figures = {f"fig{i}" for i in range(1, 14)}
    known = figures | {f"table{i}" for i in (1, 2, 3, 4, 7)} | {claims.THEORY}
    assert {name for claim in BY_ID.values() for name in claim.frames} <= known
    assert {claim.statistic for claim in BY_ID.values()} == set(evidence.STATISTICS), "a statistic that nothing uses"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"statistic": "pearson"}, "pearson"),
        ({"parameters": {"over": ["a"], "below": ["b"]}}, "ratio.*under"),
        ({"question": "Q4"}, "question"),
        ({"frames": []}, "frames"),
        ({"holds": {"above": 0.0}}, "above"),
    ],
)
def test_ill_formed_claim_is_an_input_error_that_names_it(change: dict[str, object], named: str) -> None:
    content = BY_ID["test-sharper"].model_dump(exclude_none=True) | change
    with pytest.raises(InputError, match=named):
        Claim.parse(content, "a claim")


def only(table: str, frame: pd.DataFrame) -> Callable[[str], pd.DataFrame]:
    """Give these numbers for one artefact, and none for any other."""
    return lambda name: frame if name == table else pd.DataFrame()


def on_paper(claim: str) -> claims.Tested:
    return claims.examine(BY_ID[claim], numbers.printed)


def test_papers_own_tables_say_what_they_say() -> None:
    assert on_paper("robust-everywhere").verdict is Verdict.HOLDS
    assert on_paper("test-sharper").verdict is Verdict.HOLDS
    assert on_paper("second-order-fine-on-mnist").verdict is Verdict.FAILS
    assert on_paper("spectrum-shrinks").parts == ()
    clean = on_paper("clean-accuracy-pays")
    assert clean.verdict is Verdict.IN_PART
    against = [part for part, _ in clean.parts if part.interval and part.interval.value < 0]
    assert [part.label for part in against] == [f"ORI/clean − {m}/clean" for m in ("FGSM", "FGSM-10", "FHSM")]
    assert {part.network for part in against} == {"M1"}
    iterated = {part.network: found for part, found in on_paper("iterated-stronger").parts}
    assert iterated == {"M1": Verdict.FAILS, "C3": Verdict.HOLDS}


def test_four_networks_in_perfect_order_are_too_few() -> None:
    found = {part.network: verdict for part, verdict in on_paper("lambda1-test").parts}
    assert found == {"C1": Verdict.HOLDS, "C2": Verdict.MISSING, "CR": Verdict.MISSING, "M1": Verdict.HOLDS}


# -- the statistics ----------------------------------------------------------------------------------------------------


def frame(**columns: object) -> dict[str, pd.DataFrame]:
    return {"x": pd.DataFrame({"network": "N", "seed": 0, "profile": "paper", "n_test": 1000, **columns})}


def test_rank_correlation_pairs_columns_of_the_same_set_and_leaves_out_what_is_missing() -> None:
    rows = frame(
        **{
            "batch_size": [1, 2, 3, 4, 5, 6],
            "lambda1_x_test": [6, 5, 4, 3, 2, 1],
            "lambda1_x_train": [1, 2, 3, 4, 5, 6],
            "adversarial_0.1_test": [1, 2, 3, 4, 5, math.nan],
            "adversarial_0.1_train": [1, 2, 3, 4, 6, 5],
        }
    )
    parts = labelled(evidence.rank_correlation(rows, first="lambda1_x", second=["adversarial_*"]))
    test, train = (parts[f"N FGSM (float32), ε = 0.1, {of} set"] for of in ("test", "training"))
    assert (test.n, train.n) == (5, 6)
    assert test.interval is not None
    assert test.interval.value == pytest.approx(-1)
    assert test.numbers == "6: 1; 5: 2; 4: 3; 3: 4; 2: 5"
    assert train.interval is not None
    assert 0.9 < train.interval.value < 1
    by_size = labelled(evidence.rank_correlation(rows, first="batch_size", second=["adversarial_0.1_test"]))
    assert interval_of(by_size, "N FGSM (float32), ε = 0.1, test set").value == pytest.approx(1)


def test_ratio_is_a_geometric_mean_over_runs_and_over_spectra() -> None:
    rows = frame(over1_a=[2.0, 2.0, 2.0], over2_a=[8.0, 8.0, 8.0], under1=[1.0, 1.0, 1.0], under2=[1.0, 1.0, math.nan])
    (part,) = evidence.ratio(rows, over=["over1_a"], under=["under1"])
    assert part.interval is not None
    assert (part.interval.value, part.interval.low, part.interval.high) == pytest.approx((2, 2, 2))
    (spectra,) = evidence.ratio(rows, over=["over*_a"], under=["under*"])
    assert (spectra.n, spectra.interval) == (2, None), "a run with a missing cell does not count"
    assert "needs three runs" in spectra.lacks
    assert spectra.numbers == "4; 4"


def test_ratio_to_original_compares_within_a_seed() -> None:
    rows = frame(
        training=["ORI", "ORI", "FGSM", "L2GRAD", "FGSM", "FGSM"],
        seed=[0, 1, 0, 0, 1, 2],
        lambda1_train=[10.0, 100.0, 1.0, 2.0, 10.0, 77.0],
    )
    parts = labelled(evidence.ratio_to_original(rows, columns=["lambda*_train", "curvature_train"]))
    assert parts["N all samples, seed 0"].numbers == "0.1; 0.2"
    assert parts["N all samples, seed 1"].numbers == "0.1"
    assert len(parts) == 2, "the robust network of seed 2 has no original"


def test_networks_of_one_original_are_not_taken_for_independent_ones() -> None:
    """Five robust networks that are alike within a seed, while seeds differ: what the interval is over matters."""
    seeds = {0: 0.5, 1: 0.6, 2: 3.0, 3: 1.4}
    runs = [(seed, method) for seed in seeds for method in ("ORI", *ATTACKS)]
    values = [seeds[seed] * (1 + 0.01 * i) if method != "ORI" else 1.0 for i, (seed, method) in enumerate(runs)]
    columns: dict[str, list[Any]] = {
        "seed": [s for s, _ in runs],
        "training": [m for _, m in runs],
        "lambda1_train": values,
    }
    (part,) = evidence.ratio_to_original(frame(**columns), columns=["lambda*_train"])
    assert part.n == 4
    assert part.interval is not None
    assert part.interval.low < 0.5 < 2 < part.interval.high, "as wide as four seeds that disagree"
    few = {name: column[:12] for name, column in columns.items()}
    each = labelled(evidence.ratio_to_original(frame(**few), columns=["lambda*_train"]))
    assert [p.n for p in each.values()] == [5, 5]
    assert interval_of(each, "N all samples, seed 0").high < interval_of(each, "N all samples, seed 1").low


def test_three_seeds_are_enough_for_an_interval_over_seeds() -> None:
    ratios = {0: 0.5, 1: 0.6, 2: 3.0}
    runs = [(seed, method) for seed in ratios for method in ("ORI", *ATTACKS)]
    rows = frame(
        seed=[seed for seed, _ in runs],
        training=[method for _, method in runs],
        lambda1_train=[1.0 if method == "ORI" else ratios[seed] for seed, method in runs],
    )
    (part,) = evidence.ratio_to_original(rows, columns=["lambda*_train"])
    assert (part.n, part.label) == (3, "all samples")


def test_accuracies_of_three_seeds_are_compared_over_seeds() -> None:
    columns = {"seed": [0, 1, 2] * 2, "training": ["ORI"] * 3 + ["FGSM"] * 3, "clean": [90, 92, 97, 89, 90, 94]}
    (part,) = evidence.accuracy_difference(frame(**columns), pairs=[["ORI/clean", "FGSM/clean"]])
    assert part.n == 3
    over_seeds = mean([1.0, 2.0, 3.0])
    assert over_seeds is not None
    assert part.interval == over_seeds, "wider than that of as many test samples"


def test_accuracies_are_compared_on_the_seeds_that_have_both() -> None:
    columns = {"seed": [0, 1, 0], "training": ["ORI", "ORI", "FGSM"], "clean": [99.0, 90.0, 98.0]}
    (part,) = evidence.accuracy_difference(frame(**columns), pairs=[["ORI/clean", "FGSM/clean"]])
    assert part.n == 1
    assert part.interval is not None
    assert part.interval.value == pytest.approx(1.0), "not that of 94.5 to 98, whose networks are not of one origin"
    assert part.numbers == "99 and 98"
    apart = {"seed": [1, 0], "training": ["ORI", "FGSM"], "clean": [90.0, 98.0]}
    (none,) = evidence.accuracy_difference(frame(**apart), pairs=[["ORI/clean", "FGSM/clean"]])
    assert (none.n, none.interval) == (0, None)


def test_seeds_that_agree_do_not_make_up_for_few_test_samples() -> None:
    columns = {"seed": [0, 1, 2] * 2, "training": ["ORI"] * 3 + ["FGSM"] * 3, "clean": [90.1] * 3 + [90.0] * 3}
    (part,) = evidence.accuracy_difference(frame(**columns, n_test=1000), pairs=[["ORI/clean", "FGSM/clean"]])
    assert part.interval is not None
    assert part.interval.value == pytest.approx(0.1)
    assert part.interval.low < -2 < 2 < part.interval.high


def test_ratio_of_what_is_not_positive_is_no_number_and_the_rest_no_answer() -> None:
    rows = frame(
        training=["ORI", *ATTACKS],
        seed=0,
        curvature_train=[1.0, 2.0, 2.2, 2.1, -0.5, -0.4],
        lambda1_train=[1.0] + [0.5] * 5,
    )
    parts = labelled(evidence.ratio_to_original(rows, columns=["curvature_train", "lambda1_train"]))
    part = parts["N curvature along the line, training set, seed 0"]
    assert part.interval is None
    assert part.lacks == "5 measured, needs positive numbers in all of them"
    assert part.numbers == "2; 2.2; 2.1; not positive; not positive"
    assert interval_of(parts, "N λ₁, training set, seed 0").value == pytest.approx(0.5)


def test_networks_of_further_seeds_take_no_verdict_away() -> None:
    runs = [(0, method) for method in ("ORI", *ATTACKS)] + [(seed, m) for seed in (1, 2) for m in ("ORI", "FGSM")]
    rows = frame(
        seed=[seed for seed, _ in runs],
        training=[method for _, method in runs],
        lambda1_train=[1.0 if method == "ORI" else 0.5 for _, method in runs],
    )
    parts = labelled(evidence.ratio_to_original(rows, columns=["lambda*_train"]))
    assert interval_of(parts, "N all samples, seed 0").value == pytest.approx(0.5)
    assert len(parts) == 1, "a seed that has begun is no part of its own where there is a whole one"
    rows["x"].loc[6 + 1, "training"] = "L2GRAD"
    begun = labelled(evidence.ratio_to_original({"x": rows["x"][6:]}, columns=["lambda*_train"]))
    assert begun["N all samples, seed 1"].lacks == "1 measured, needs three networks"


def test_relative_change_can_pass_through_zero() -> None:
    rows = frame(start_train=[2.0, 4.0, 1.0], end_train=[1.0, -4.0, 0.5])
    (part,) = evidence.relative_change(rows, start="start", end="end")
    assert part.interval is not None
    assert part.interval.value == pytest.approx((-0.5 - 2 - 0.5) / 3)
    assert part.label == "training set"


def test_drop_is_from_the_best_batch_size_and_needs_the_largest() -> None:
    values = {"batch_size": [1, 2, 4, 8], "accuracy_test": [90.0, 95.0, 94.0, 85.0], "n_test": 10_000}
    (part,) = evidence.drop_after_peak(frame(**values), column="accuracy_test")
    assert part.interval is not None
    assert part.interval.value == pytest.approx(10)
    assert part.interval.low < 100 * difference(0.95, 0.85, 10_000).low, "the best of several looks better than it is"
    assert 8.5 < part.interval.low < part.interval.high < 11.5
    (open_,) = evidence.drop_after_peak(
        frame(**values | {"accuracy_test": [90, 95, 94, math.nan]}), column="accuracy_test"
    )
    assert open_.interval is None
    assert "the largest among them" in open_.lacks


def test_drop_is_over_the_seeds_that_have_the_largest_batch_size() -> None:
    values = {
        "batch_size": [1, 2, 4, 8, 1, 2],
        "seed": [0, 0, 0, 0, 1, 1],
        "accuracy_test": [90.0, 95.0, 94.0, 85.0, 99.0, 90.0],
        "n_test": 10_000,
    }
    (part,) = evidence.drop_after_peak(frame(**values), column="accuracy_test")
    assert part.interval is not None
    assert part.interval.value == pytest.approx(10)
    assert part.numbers == "1: 90; 2: 95; 4: 94; 8: 85"


def test_drop_is_widened_for_the_choice_of_the_best_also_over_seeds_which_are_paired_by_number() -> None:
    values = {
        "batch_size": [1] * 3 + [2] * 3 + [4] * 3,
        "seed": [0, 1, 2, 0, 1, 2, 2, 0, 1],
        "accuracy_test": [80.0, 80, 80, 95, 96, 98, 88, 90, 92],
        "n_test": 10_000,
    }
    (part,) = evidence.drop_after_peak(frame(**values), column="accuracy_test")
    assert part.interval == mean([5.0, 4.0, 10.0], comparisons=2)


def test_accuracy_that_rises_to_the_largest_batch_size_does_not_fall() -> None:
    values = {"batch_size": [1, 2, 4, 8], "accuracy_test": [60.0, 70.0, 80.0, 90.0], "n_test": 10_000}
    (part,) = evidence.drop_after_peak(frame(**values), column="accuracy_test")
    assert part.interval is not None
    assert part.interval.value == pytest.approx(-10)
    assert BY_ID["accuracy-falls"].holds.region().judge(part.interval) == Verdict.FAILS


def test_differences_of_accuracies_are_in_points_and_each_pair_once() -> None:
    rows = frame(training=["ORI", *ATTACKS], clean=[99.0, 98, 97, 96, 95, math.nan], FGSM=[50.0, 90, 90, 90, 90, 40])
    clean = labelled(evidence.accuracy_difference(rows, pairs=[["ORI/clean", "{robust}/clean"]]))
    assert len(clean) == 5
    assert interval_of(clean, "N ORI/clean − FHSM/clean").value == pytest.approx(4)
    assert clean["N ORI/clean − L2HESS/clean"].lacks == "none measured, needs both accuracies"
    best = list(evidence.accuracy_difference(rows, pairs=[["FGSM/FGSM", "{any}/FGSM"]]))
    assert len(best) == 5, "a network is not compared with itself"
    everywhere = evidence.accuracy_difference(rows, pairs=[["{robust}/{attack}", "ORI/{attack}"]])
    assert len(list(everywhere)) == 25


def test_share_of_negative_spectra_counts_what_is_significant() -> None:
    def share(**lowest: list[float]) -> Part:
        rows = frame(seed=[0, 0, 1, 2], lambda1_B1_0=[10.0] * 4, lambda1_B1_1=5.0, **lowest)
        (part,) = evidence.share_with_negative(rows, samples=1, threshold=0.01)
        return part

    missing = math.nan
    none = share(lowest_B1_0=[-1.0, -0.05, -2.0, missing], lowest_B1_1=[-5.0, -1.0, 0.1, -1.0])  # -0.05 is too little
    assert none.n == 2, "a draw is the same samples for all seeds"
    assert none.interval is not None
    assert none.interval.value == 0
    all_of_them = share(lowest_B1_0=[-1.0, -0.5, -2.0, missing], lowest_B1_1=[-5.0, -1.0, -1.0, -1.0])
    assert all_of_them.interval is not None
    assert (all_of_them.n, all_of_them.interval.value) == (2, 1)
    lacking = share(lowest_B1_0=[-1.0, *[missing] * 3], lowest_B1_1=[missing] * 4)
    assert (lacking.n, lacking.interval) == (0, None)
    assert "all networks of a seed" in lacking.lacks


def test_lowest_eigenvalue_has_the_interval_of_its_residual_over_all_seeds() -> None:
    rows = frame(
        training=["ORI", "ORI", "FGSM"],
        seed=[0, 1, 0],
        lambda1_train=[2.0, 2.0, 1.0],
        lowest_train=[-0.2, -0.4, 0.5],
        error_train=[0.02, 0.1, 0.0],
    )
    parts = labelled(evidence.lowest_eigenvalue(rows, trainings=["ORI", "FGSM", "FHSM"]))
    found = interval_of(parts, "N ORI")
    assert (found.low, found.value, found.high) == pytest.approx((-0.25, -0.15, -0.09))
    assert Region(high=0.0).judge(found) is Verdict.HOLDS
    assert parts["N FHSM"].interval is None


def test_violations_of_the_theorem_are_seen() -> None:
    eigenvalues = torch.zeros(3, 20, dtype=torch.float64)
    eigenvalues[:, :9] = 1.0
    eigenvalues[0, 19] = 1e-14  # rounding
    eigenvalues[1, 19] = -1e-3
    eigenvalues[2, 9] = 1e-3
    found = theory.violations(eigenvalues, classes=10)
    assert found["indefinite"].tolist() == [0, 1, 0]
    assert found["rank_above"].tolist() == [0, 1, 1]


def test_theorem_holds_for_a_trained_network() -> None:
    found = theory.checked_samples()
    assert found[["indefinite", "rank_above"]].to_numpy().sum() == 0
    for name in ("saddle-free", "low-rank"):
        assert claims.examine(BY_ID[name], lambda _: found).verdict is Verdict.HOLDS


# -- the numbers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("table", ["table1", "table7"])
def test_recorded_numbers_give_the_verdicts_of_equal_printed_ones(table: str) -> None:
    ours = numbers.measured(invented(table))
    printed = numbers.printed(table)
    shared = [c for c in printed if c in ours and c not in ("profile", "accuracy_train")]
    assert len(shared) == len(printed.columns) - 2
    pd.testing.assert_frame_equal(ours[shared], printed[shared], check_dtype=False)
    for name in ("lambda1-train", "test-gap-grows", "accuracy-falls", "input-hessian-silent", "input-gradient-silent"):
        claim = BY_ID[name]
        one, other = (claims.examine(claim, only(table, f)) for f in (ours, printed))
        assert [(p.network, p.label, v) for p, v in one.parts] == [(p.network, p.label, v) for p, v in other.parts]
    exact = [
        part for part, _ in claims.examine(BY_ID["robustness-falls"], lambda _: ours).parts if "exact" in part.label
    ]
    assert exact
    assert all(part.interval is None and part.n == 0 for part in exact), "what is planned and not measured is open"


def test_a_spectrum_counts_where_a_longer_one_has_not_been_measured() -> None:
    whole = invented("table7")[0]
    (leading, _), (longer, _) = sorted(
        ((m, found) for m, found in whole.measurements.items() if isinstance(m, Spectrum) and m.split == "train"),
        key=lambda pair: getattr(pair[0], "k", 0),
    )
    assert isinstance(leading, Spectrum)
    assert isinstance(longer, Spectrum)
    assert leading.k < longer.k
    found = {m: measurement for m, measurement in whole.measurements.items() if m != longer}
    (row,) = numbers.measured([replace(whole, measurements=found)]).to_dict("records")
    assert row["lambda1_train"] == published("table7")["lambda1_train"]["M1", 64]
    assert math.isnan(row[f"lambda{longer.k}_train"])


def test_spectra_are_told_apart_by_what_they_are_over() -> None:
    spectrum = Spectrum(split="train", k=3, tol=1e-4)
    values = {"eigenvalues": [4.0, -2.0, 1.0], "residuals": [0.0, 0.1, 0.0]}
    row = numbers._spectrum(spectrum, values)
    assert row == {
        "lambda1_train": 4.0, "lambda2_train": 2.0, "lambda3_train": 1.0, "lowest_train": -2.0, "error_train": 0.2
    }  # fmt: skip
    drawn = numbers._spectrum(Spectrum(split="train", k=3, tol=1e-4, samples=320, draw=0), values)
    assert list(drawn.values()) == list(row.values())
    assert {name.split("_", 1)[1] for name in drawn} == {"B320_0"}
    missing = numbers._spectrum(spectrum, {})
    assert missing.keys() == row.keys()
    assert all(math.isnan(value) for value in missing.values())


def test_accuracies_of_tables_3_and_4_are_those_on_sets_of_the_original_network() -> None:
    _, robust, *_ = tasks_of("table3", "paper")
    found: dict[Measure, Measurement] = {
        m: Measurement(m, {"accuracy": 0.9 if m.source else 0.2}, PROVENANCE)
        for m in robust.measures
        if isinstance(m, AttackAccuracy)
    }
    (row,) = numbers.measured([Recorded(robust, run_result(robust.spec), found, "paper")]).to_dict("records")
    assert [row[method] for method in (*ATTACKS, "mean")] == pytest.approx([90.0] * 6)
    assert row["clean"] == pytest.approx(99.0)


def test_number_of_test_samples_is_that_of_the_specification() -> None:
    first = invented("table7")[0]
    data = first.task.spec.data.model_copy(update={"n_test": 500})
    spec = first.task.spec.model_copy(update={"data": data})
    smaller = replace(first, task=replace(first.task, spec=spec))
    assert numbers.measured([first, smaller])["n_test"].tolist() == [10_000, 500]


def test_curvature_along_lines_is_taken_at_the_right_places() -> None:
    places = [i / 10 - 0.5 for i in range(21)]
    losses = {"train": [x**4 for x in places], "test": [3 * x**2 for x in places]}
    line_measure = LossLine(along=Spectrum(split="train", k=2, tol=1e-4), reach=0.5, points=21, batch=20)
    way = numbers._lines(Interpolation(points=21), {"positions": places, "losses": losses})
    assert way["start_test"] == pytest.approx(6)
    assert way["end_train"] == pytest.approx(12, abs=0.1)
    assert way["start_train"] == pytest.approx(0, abs=0.1)
    line = numbers._lines(line_measure, {"positions": places, "losses": {**losses, "batch": losses["test"]}})
    # Five places have no error for a polynomial of the fourth degree; three have 2 h^2 for its last term.
    assert line == {name: pytest.approx(value, abs=1e-9) for name, value in
                    {"curvature_train": 0, "curvature_test": 6, "curvature_batch": 6}.items()}  # fmt: skip
    assert set(numbers._lines(line_measure, {})) == set(line)


# -- the record --------------------------------------------------------------------------------------------------------


def write(folder: Path, profile: str, task: Task, measures: int) -> None:
    """Record a run under a profile, with its first measures."""
    target = folder / profile / task.spec.slug
    target.mkdir(parents=True)
    (target / "run.json").write_text(json.dumps(run_result_to_json(run_result(task.spec))))
    for measure in task.measures[:measures]:
        found = Measurement(measure, {"eigenvalues": [float(measures)], "residuals": [0.0]}, PROVENANCE)
        (target / f"{measure.slug}.json").write_text(json.dumps(measurement_to_json(found)))


def tasks_of(table: str, profile: str) -> list[Task]:
    return artefact(table).tasks_of_seed(load_profile(profile), 0)


def test_smaller_scale_steps_in_for_a_network_that_was_not_measured_and_says_so(tmp_path: Path) -> None:
    c1 = next(t for t in tasks_of("table1", "laptop") if t.spec.model.name == "C1")
    c2 = next(t for t in tasks_of("table1", "paper") if t.spec.model.name == "C2")
    write(tmp_path, "laptop", c1, 1)
    write(tmp_path, "paper", c2, 1)
    write(tmp_path, "laptop", next(t for t in tasks_of("table1", "laptop") if t.spec.model.name == "C2"), 1)
    found = from_record("table1", folder=tmp_path)
    there = {o.task.spec.model.name: o for o in found if o.result}
    assert (there["C1"].scale, there["C1"].papers_own) == ("laptop, smaller", False)
    assert (there["C2"].scale, there["C2"].task.spec) == ("paper", c2.spec)
    assert [o.task.spec.recipe.batch_size for o in found if o.task.spec.model.name == "C1"] == [64, 128, 256, 512, 1024]
    assert len([o for o in found if o.task.spec.model.name == "C2"]) == 4
    assert {o.task.spec.model.name for o in from_record("table1", network="C2", folder=tmp_path)} == {"C2"}


def test_network_that_is_trained_and_not_measured_yet_hides_no_measured_one(tmp_path: Path) -> None:
    own, smaller = (
        [t for t in tasks_of("table1", profile) if t.spec.model.name == "C1"] for profile in ("paper", "laptop")
    )
    for task in smaller[:2]:
        write(tmp_path, "laptop", task, 1)
    write(tmp_path, "paper", own[0], 0)
    write(tmp_path, "paper", own[1], 1)
    assert {o.profile for o in from_record("table1", network="C1", folder=tmp_path) if o.result} == {"laptop"}
    write(tmp_path, "paper", own[2], 1)
    found = from_record("table1", network="C1", folder=tmp_path)
    assert [o.profile for o in found if o.result] == ["paper"] * 3, "as many are measured at the paper's own scale"


def test_papers_specification_counts_wherever_it_was_recorded_and_the_fuller_one_wins(tmp_path: Path) -> None:
    first, second = tasks_of("table7", "paper")[:2]
    write(tmp_path, "laptop", first, 2)
    write(tmp_path, "paper", first, 1)
    write(tmp_path, "paper", second, 1)
    found = from_record("table7", folder=tmp_path)
    assert [o.profile for o in found] == ["laptop", "paper", None, None, None, None]
    assert all(o.papers_own for o in found)
    assert found[0].folder == f"book/record/laptop/{first.spec.slug}"


def test_of_later_seeds_what_is_not_there_is_not_listed(tmp_path: Path) -> None:
    later = artefact("table7").tasks_of_seed(load_profile("paper"), 1)[1]
    write(tmp_path, "paper", later, 1)
    found = from_record("table7", folder=tmp_path)
    assert [(o.task.spec.recipe.seed, o.result is not None) for o in found] == [(0, False)] * 6 + [(1, True)]


def test_empty_record_has_a_row_for_each_batch_size_and_no_origin(tmp_path: Path) -> None:
    found = from_record("table7", folder=tmp_path)
    table = large_batch.curvature("table7", found, name="tab-x", caption="a caption")
    assert [row[0] for row in table.rows] == ["64", "128", "256", "512", "1024", "2048"]
    assert {row[-1] for row in table.rows} == {"–"}
    assert table.origins == ()
    assert "dropdown" not in table._repr_markdown_()


def test_recorded_table_shows_what_is_to_be_added_to_and_multiplied_with_the_papers_numbers() -> None:
    outcomes = invented("table7")
    first = outcomes[0]
    assert first.result is not None
    epoch = replace(first.result.history[-1], train_accuracy=0.9, test_accuracy=1.0)
    doubled: dict[Measure, Measurement] = {
        m: replace(f, values={"eigenvalues": [2 * value for value in f.values["eigenvalues"]]})
        for m, f in first.measurements.items()
        if isinstance(m, Spectrum)
    }
    changed = replace(first, result=replace(first.result, history=[epoch]), measurements=doubled)
    table = large_batch.curvature("table7", [changed, *outcomes[1:]], name="tab-x", caption="a caption")
    accuracies, ratios = (i for i, title in enumerate(table.header) if title == "difference")
    printed = published("table7")
    below, above = (
        100 * ours - float(printed[f"accuracy_{split}"]["M1", 64]) for split, ours in (("train", 0.9), ("test", 1.0))
    )
    assert below < 0 < above
    assert table.rows[0][accuracies] == f"{below:.2f} (+{above:.2f})"
    assert table.rows[0][ratios] == "× 2.00 (× 2.00)"
    assert table.rows[1][ratios] == "× 1.00 (× 1.00)"


def test_row_counts_the_seeds_that_its_cells_are_of_and_the_trainings_that_failed() -> None:
    first = invented("table7")[0]
    assert first.result is not None
    epochs = first.result.history * 30
    failed = replace(first, result=replace(first.result, status="failed", history=epochs), measurements={})
    unmeasured = replace(first, measurements={})

    def cells(outcomes: list[Recorded]) -> dict[str, str]:
        table = large_batch.curvature("table7", outcomes, name="tab-x", caption="a caption")
        return dict(zip(table.header, table.rows[0], strict=True))

    assert cells([first, first, first])["Seeds"] == "3"
    assert cells([first, first, unmeasured])["Seeds"] == "2 to 3"
    told = cells([first, first, failed])
    assert (told["Seeds"], told["Epochs"]) == ("2, 1 failed", "1 ± 0")
    assert cells([failed])["Seeds"] == "0, 1 failed"
    attacked = large_batch.robustness("table7", [first, unmeasured], name="tab-x", caption="a caption")
    assert {row[attacked.header.index("Seeds")] for row in attacked.rows} == {"1"}


def test_fullest_outcomes_are_those_with_the_most_measures() -> None:
    first, second, third = invented("table7")[:3]
    less = replace(third, measurements=dict(list(third.measurements.items())[:1]))
    assert fullest([less, first, second]) == [first, second]
    assert fullest([]) == []


def test_recorded_table_says_where_each_number_comes_from() -> None:
    outcomes = invented("table7")
    table = large_batch.curvature("table7", outcomes, name="tab-x", caption="a caption")
    assert [row[-1] for row in table.rows] == ["paper"] * 6
    origin = table.origins[0]
    assert dict(zip(origins.HEADER, origin.cells, strict=True)) == {
        "Run": outcomes[0].task.spec.label if origin.address else outcomes[0].task.spec.slug, "Seed": "0",
        "Profile": "paper", "Commit": "0123456789ab", "Machine": "A processor, torch 2.13.0", "Date": "2026‑11‑23",
    }  # fmt: skip
    shown, page = table._repr_markdown_(), table._repr_html_()
    assert shown.index("```{table}") < shown.index("```{dropdown} Where these numbers come from")
    assert "<details><summary>Where these numbers come from</summary>" in page
    assert shown.count("0123456789ab") == page.count("0123456789ab") == 6


def test_run_is_a_link_to_its_record_where_the_repository_is_known() -> None:
    origin = origins.Origin(("a-run", "0", "paper", "c0ffee", "A processor", "2026"), "https://example.org/x")
    table = Table("tab-x", "a caption", ("A",), (("1",),), (origin,))
    assert "| [a-run](https://example.org/x) |" in table._repr_markdown_()
    assert '<td><a href="https://example.org/x">a-run</a></td>' in table._repr_html_()


def test_profile_that_all_rows_share_is_told_by_the_caption_and_one_that_differs_by_the_rows() -> None:
    header, rows = ("Network", "A", "Profile"), (("M1", "1", "paper"), ("C1", "not measured yet", "–"))
    for page in (shared := Table("tab-x", "A caption.", header, rows))._repr_markdown_(), shared._repr_html_():
        assert "A caption. Profile paper." in page
        assert page.count("paper") == 1
    mixed = Table("tab-x", "A caption.", header, (*rows, ("C2", "2", "laptop")))._repr_markdown_()
    assert "| Network | A | Profile |" in mixed
    assert "| C2 | 2 | laptop |" in mixed


def test_negative_numbers_have_a_minus_and_names_keep_their_hyphens() -> None:
    row = ("FGSM-10", "-342", "-1.2e-09 (-0.5; +3)", "M1-b64", "2026-11-27")
    shown = Table("tab-x", "x", ("A", "B", "C", "D", "E"), (row,))._repr_markdown_()
    for cell in (
        "FGSM-10",
        "−342",
        "−1.2e−09 (−0.5; +3)".replace(" ", "\u00a0").replace("\u00a0(", " ("),
        "M1-b64",
        "2026-11-27",
    ):
        assert f"| {cell} |" in shown


def test_numbers_of_a_smaller_scale_get_no_difference() -> None:
    smaller = [Recorded(o.task, o.result, o.measurements, "laptop", papers_own=False) for o in invented("table7")]
    table = large_batch.robustness("table7", smaller, name="tab-x", caption="a caption")
    assert "difference" not in table.header
    assert {row[-1] for row in table.rows} == {"laptop, smaller"}
    mixed = [replace(o, papers_own=o.task.spec.recipe.batch_size == 64) for o in smaller]
    table = large_batch.robustness("table7", mixed, name="tab-x", caption="a caption")
    columns = [i for i, title in enumerate(table.header) if title == "difference"]
    assert len(columns) == 1
    assert {(row[1] == "64", row[i] == "–") for row in table.rows for i in columns} == {(True, False), (False, True)}
    outcomes = [Outcome(o.task, o.result, o.measurements) for o in smaller]
    live = large_batch.robustness("table7", outcomes, name="tab-y", caption="a caption")
    assert "difference" not in live.header
    assert live.origins == ()


def test_transfer_table_shows_the_difference_in_its_brackets() -> None:
    (task, *_) = tasks_of("table3", "paper")
    recorded_ = Recorded(task, run_result(task.spec, 0.9942), {}, "paper")
    table = adversarial.transfer("table3", [recorded_], name="tab-x", caption="a caption")
    assert table.rows[0][1] == "99.4 (99.3; +0.1)"
    assert table.rows[0][-1] == "paper"


def test_mean_of_attacks_is_of_the_networks_that_were_measured_under_all() -> None:
    (task, *_) = tasks_of("table3", "paper")
    measures = {m.attack.method: m for m in task.measures if isinstance(m, AttackAccuracy) and m.source is None}

    def network(accuracies: Mapping[str, float]) -> Recorded:
        found: dict[Measure, Measurement] = {
            measures[method]: Measurement(measures[method], {"accuracy": value}, PROVENANCE)
            for method, value in accuracies.items()
        }
        return Recorded(task, run_result(task.spec), found, "paper")

    whole = network(dict.fromkeys(ATTACKS, 0.5))
    begun = network({"FGSM": 0.9})
    table = adversarial.white_box("table3", [whole, begun], name="tab-x", caption="a caption")
    told = dict(zip(table.header, table.rows[0], strict=True))
    assert told["mean of attacks"] == "50.0"
    assert told["FGSM"].startswith("70.0 ±")


def test_address_of_the_repository_is_that_of_the_configuration(tmp_path: Path) -> None:
    assert origins.files_address(tmp_path) is None
    (tmp_path / "_config.yml").write_text(
        "title: x\nrepository:\n  url: https://example.org/a/b/\n  branch: main\nhtml: {}\n"
    )
    origins.files_address.cache_clear()
    assert origins.files_address(tmp_path) == "https://example.org/a/b/tree/main"


# -- the scoreboard ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return scoreboard.generated(tmp_path_factory.mktemp("record"), ["03_hessian_spectrum"])


def test_every_claim_is_on_the_scoreboard_and_on_its_page(pages: dict[str, str]) -> None:
    for claim in BY_ID.values():
        assert pages[f"scoreboard_{claim.question}.md"].count(f"(#claim-{claim.id})") == 1
        assert pages["claims.md"].count(f"(claim-{claim.id})=\n") == 1
        assert claim.sentence in pages["claims.md"]
    assert "{doc}`/notebooks/03_hessian_spectrum`" in pages["claims.md"]
    assert "{doc}`/notebooks/05" not in pages["claims.md"], "a chapter that is not there cannot be linked"
    assert all(f"`{name}`\n: " in pages["statistics.md"] for name in evidence.STATISTICS)


def test_counts_add_up(pages: dict[str, str]) -> None:
    lines = [line for line in pages["scoreboard.md"].splitlines() if line.startswith("| ")][2:]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert all(sum(map(int, row[2:-1])) == int(row[-1]) for row in rows)
    totals = {row[1]: row for row in rows if row[0] == "All"}
    for where, row in totals.items():
        for i in range(2, len(row)):
            assert int(row[i]) == sum(int(r[i]) for r in rows if r[1] == where and r[0] != "All")


def test_empty_record_leaves_all_that_needs_it_unmeasured(tmp_path: Path) -> None:
    for found in assess(tmp_path):
        if found.claim.frames == (claims.THEORY,):
            assert found.ours.verdict is Verdict.HOLDS
        else:
            assert found.ours.verdict is Verdict.MISSING
            assert scoreboard.missing(found.ours)


def test_missing_names_networks_and_what_they_lack() -> None:
    one = numbers.measured(invented("table7")[:1])
    tested = claims.examine(BY_ID["lambda1-train"], only("table7", one))
    assert scoreboard.missing(tested) == "M1: 1 measured, needs five runs that differ."
    assert scoreboard.missing(claims.Tested((), Verdict.MISSING)).startswith("everything")


@pytest.mark.parametrize(
    ("bounds", "words"),
    [
        ({"low": 0.5}, "claimed to be above 0.5"),
        ({"high": 2.0}, "claimed to be below 2"),
        ({"low": -0.5, "high": 0.5}, "claimed to be between -0.5 and 0.5"),
    ],
)
def test_region_of_a_claim_is_written_out(bounds: dict[str, float], words: str) -> None:
    claim = BY_ID["test-sharper"].model_copy(update={"holds": claims.Bounds(**bounds)})
    nothing = claims.Tested((), Verdict.MISSING)
    assert words in scoreboard.details([claims.Assessment(claim, nothing, nothing)], [])


def test_claims_measured_on_a_smaller_scale_say_so() -> None:
    smaller = [Recorded(o.task, o.result, o.measurements, "laptop", papers_own=False) for o in invented("table7")]
    ours = claims.examine(BY_ID["lambda1-train"], only("table7", numbers.measured(smaller)))
    assert ours.verdict is Verdict.HOLDS
    text = scoreboard.of_question([claims.Assessment(BY_ID["lambda1-train"], on_paper("lambda1-train"), ours)])
    assert "✓ holds (laptop, smaller)" in text
    assert "Of the 1 claims on this question, 1 holds." in text


def test_recorded_profiles_of_a_row_are_listed_once() -> None:
    outcomes = invented("table7")[:2]
    assert recorded.profiles(outcomes) == "paper"
    assert recorded.profiles([]) == "–"
