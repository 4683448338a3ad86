"""What goes beyond the paper: its artefacts computed under smoke, and each number where it belongs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from hessnb import training
from hessnb.attacks import autoattack, pgd
from hessnb.errors import InputError
from hessnb.experiments import grid, run
from hessnb.experiments import measure as measuring
from hessnb.experiments.networks import load_split, trained_model
from hessnb.experiments.profile import load_profile
from hessnb.experiments.results import Measurement, Outcome, RunResult
from hessnb.experiments.spec import (
    AUTOATTACK,
    AttackAccuracy,
    AttackSpec,
    Density,
    Measure,
    Sharpness,
    Spectrum,
    parse_measure,
)
from hessnb.experiments.store import Store
from hessnb.figures import beyond as figures_beyond
from hessnb.paper import beyond
from hessnb.paper.adversarial import network_name
from hessnb.paper.outcomes import clean
from hessnb.paper.tables import NOT_MEASURED, mean_and_spread
from hessnb.sharpness import sharpness_along
from hessnb.training import Epoch

CPU = torch.device("cpu")
SMOKE = load_profile("smoke")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("beyond") / "store")


def computed(store: Store, name: str, seeds: int = 1) -> list[Outcome]:
    return run.compute(store, grid.artefact(name).tasks(SMOKE, seeds))


def column(rows: Sequence[Sequence[str]], i: int) -> list[str]:
    return [row[i] for row in rows]


# -- specifications -------------------------------------------------------------------------------------------------


def test_new_fields_change_no_key_and_are_told_in_the_label() -> None:
    attack = AttackSpec(method="PGD", eps=0.1, clip=True)
    whole = AttackAccuracy(split="test", attack=attack)
    assert whole.canonical() == (
        '{"attack":{"clip":true,"eps":0.1,"method":"PGD"},"kind":"attack_accuracy","split":"test"}'
    )
    assert whole.label == "PGD-eps0.1-test"
    few = AttackAccuracy(split="test", attack=attack.model_copy(update={"restarts": 5}), n=40)
    assert few.label == "PGD-5-eps0.1-test-first40"
    assert parse_measure(Sharpness(points=3, tol=0.1).model_dump(), "here") == Sharpness(points=3, tol=0.1)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"method": "FGSM", "clip": True, "restarts": 5}, "restarts"),
        ({"method": AUTOATTACK, "clip": False}, "clip"),
        ({"method": AUTOATTACK, "clip": True, "precision": "own"}, "precision"),
        ({"method": AUTOATTACK, "clip": True, "scale": "unit"}, "radius"),
    ],
)
def test_attack_with_settings_that_it_does_not_have_is_an_input_error(fields: dict[str, object], named: str) -> None:
    with pytest.raises(InputError, match=named):
        AttackSpec.parse({"eps": 0.1, **fields}, "here")


def test_sweeps_change_one_thing_of_the_tables_networks() -> None:
    profile = load_profile("paper")
    usual = profile.large_batch["M1"].spec(64, 0)
    rates = [task.spec for task in grid.artefact("silent_lr").tasks(profile, 1)]
    assert [spec.recipe.lr for spec in rates] == [0.0025, 0.005, 0.01, 0.02, 0.04]
    assert {spec.model_copy(update={"recipe": replace(spec.recipe, lr=0.01)}) for spec in rates} == {usual}
    assert usual in rates
    for name, variant in (("silent_variant", "strided"), ("silent_input", "normalised")):
        specs = [task.spec for task in grid.artefact(name).tasks(profile, 1)]
        assert [(spec.recipe.batch_size, spec.model.variant) for spec in specs] == [
            (size, taken) for size in (64, 256) for taken in (None, variant)
        ]
        assert {spec.model_copy(update={"model": usual.model}) for spec in specs} == {
            profile.large_batch["M1"].spec(size, 0) for size in (64, 256)
        }


# -- measures -------------------------------------------------------------------------------------------------------


def test_sharpness_ends_where_the_run_ended(store: Store) -> None:
    for outcome in computed(store, "sharpening"):
        spec = outcome.task.spec
        (measure,) = outcome.task.measures
        assert isinstance(measure, Sharpness)
        assert outcome.result is not None
        found = outcome.measurements[measure].values
        assert found["epoch"][0] == 0
        assert found["epoch"][-1] == len(outcome.result.history)
        assert found["train_loss"][-1] == outcome.result.history[-1].train_loss
        end = Spectrum(split="train", k=1, tol=1e-4, samples=measure.samples, draw=0)
        exact = run.measure_run(store, spec, end).values["eigenvalues"][0]
        assert found["lambda1"][-1] == pytest.approx(exact, rel=1e-2)


def test_interrupted_sharpness_goes_on_to_the_same_bits(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = grid.artefact("sharpening").tasks(SMOKE, 1)[0].spec
    epochs = len(run.train_run(store, spec).history)
    assert epochs >= 2
    follow = Sharpness(points=epochs + 1, tol=0.05, samples=20)
    monkeypatch.setattr(measuring, "sharpness_along", partial(sharpness_along, save_seconds=-1.0))

    def interrupt() -> None:
        raise KeyboardInterrupt

    seen: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        run.measure_run(store, spec, follow, on_save=interrupt)
    assert store.partial(spec, follow) is not None
    resumed = run.measure_run(store, spec, follow, report=lambda what, share, detail: seen.append(detail))
    assert "epoch 1" not in seen
    assert store.partial(spec, follow) is None
    whole = measuring.measured(store, spec, follow, CPU, measuring.silent, "whole")
    assert resumed.values == whole


def test_strong_attacks_are_those_of_the_package_on_the_first_samples(store: Store) -> None:
    outcomes = computed(store, "strong")
    assert [network_name(o.task.spec) for o in outcomes] == ["ORI", "L2GRAD"]
    for outcome in outcomes:
        model = trained_model(store, outcome.task.spec)
        few = load_split(outcome.task.spec, "test", CPU).head(4)
        for measure, found in outcome.measurements.items():
            assert isinstance(measure, AttackAccuracy)
            eps = measure.attack.eps
            assert found.values["n_samples"] == measure.n == 4
            assert found.values["linf_norm"] <= eps + 1e-6
            if measure.attack.method == "PGD":
                moved = pgd(model, few.images, few.labels, eps=eps, restarts=2)
            elif measure.attack.method == AUTOATTACK:
                moved = autoattack(model, few.images, few.labels, eps=eps)
            else:
                continue
            assert found.values["accuracy"] == float((model(moved).argmax(1) == few.labels).double().mean())


def test_sharpness_of_an_adversarial_run_starts_at_its_parent(store: Store) -> None:
    spec = grid.artefact("strong").tasks(SMOKE, 1)[1].spec
    assert spec.parent is not None
    run.train_run(store, spec)
    found = run.measure_run(store, spec, Sharpness(points=2, tol=1e-2, samples=20)).values
    assert found["epoch"] == [0, 2]
    start = training.evaluate(trained_model(store, spec.parent), load_split(spec, "train", CPU))[0]
    assert found["train_loss"][0] == pytest.approx(start, rel=1e-9)


# -- tables and figures ---------------------------------------------------------------------------------------------


def test_table_of_densities_is_what_the_rules_say(store: Store) -> None:
    spectra = computed(store, "density")
    top = run.compute(store, [t for t in grid.artefact("fig1").tasks(SMOKE, 1) if t.spec.model.name == "M1"])
    table = beyond.densities(spectra, top, 4, name="tab-x", caption="a caption")
    assert column(table.rows, 0) == ["20", "100"]
    for row, outcome, exact in zip(table.rows, spectra, top, strict=True):
        (found,) = (m.values for k, m in outcome.measurements.items() if isinstance(k, Density))
        known = [value for value in exact.eigenvalues("train") if value > 0]
        rule = zip(found["nodes"][0], found["weights"][0], strict=True)
        trace = sum(known) + found["n"] * sum(t * w for t, w in rule if t < 0.999 * min(known))
        assert row[1] == f"{trace:.3g}", "one probe has no error"
        assert row[2] == f"{sum(exact.eigenvalues('train')[:3]) / trace:.0%}"
    empty = beyond.densities([replace(spectra[0], measurements={})], [], 4, name="tab-y", caption="a caption")
    assert empty.rows == ((NOT_MEASURED, "–", "–", "–", "–", "–"),)
    assert empty.origins == ()


def test_what_a_density_estimates_is_what_the_exact_eigenvalues_leave(store: Store) -> None:
    """Random vectors see the leading eigenvalues by chance: here ten times too often, and the table does not mind."""
    density = grid.artefact("density").tasks(SMOKE)[0]
    (top,) = (t for t in grid.artefact("fig1").tasks(SMOKE) if t.spec == density.spec)
    (measure,), spectrum = density.measures, top.measures[0]
    values = {"nodes": [[-1.0, 2.0, 50.0]], "weights": [[0.2, 0.7, 0.1]], "n": 100, "n_matvecs": 3}
    outcome = Outcome(density, None, {measure: Measurement(measure, values, {})})
    exact = Outcome(top, None, {spectrum: Measurement(spectrum, {"eigenvalues": [50.0, -1.0]}, {})})
    (row,) = beyond.densities([outcome], [exact], 2, name="tab-x", caption="a caption").rows
    trace, size = 50 - 20 + 140, 50 + 20 + 140
    assert row[1:3] == (f"{trace}", f"{50 / trace:.0%}")
    assert row[5] == f"{20 / size:.1%}"


def test_negative_share_of_a_density_does_not_count_what_is_zero() -> None:
    task = grid.artefact("density").tasks(SMOKE)[0]
    (measure,) = task.measures
    values = {"nodes": [[-1.0, -1e-9, 10.0]], "weights": [[0.1, 0.7, 0.2]], "n": 100, "n_matvecs": 3}
    outcome = Outcome(task, None, {measure: Measurement(measure, values, {})})
    table = beyond.densities([outcome], [], 4, name="tab-x", caption="a caption")
    assert table.rows[0][4:] == ("10.0%", f"{0.1 / 2.1:.1%}")


def test_largest_drop_is_the_one_with_five_on_either_side() -> None:
    spectrum = [100.0, 10.0, 9.0, 8.0, 7.0, 6.0, 5.0, 1.0, 0.9, 0.8, 0.7, 0.6]
    assert beyond._drop(spectrum) == "× 5.00 after 7"
    assert beyond._drop(spectrum[:5]) == NOT_MEASURED
    later = [100.0, 10.0, 9.0, 8.0, 7.0, 6.0, 4.0, 3.5, 0.5, 0.4, 0.3, 0.2]  # by seven after 8, of which four are left
    assert beyond._drop(later) == "× 1.50 after 6"
    assert beyond._drop(later[:9]) == NOT_MEASURED


def test_bars_count_all_eigenvalues(store: Store) -> None:
    (density, *_) = [beyond.spectral(o) for o in computed(store, "density")]
    assert density is not None
    edges = figures_beyond._edges(1e-3, 2 * float(density.nodes.abs().max()))
    counts, errors = figures_beyond._counts(density, edges)
    assert sum(counts) == pytest.approx(density.n, rel=1e-9)
    assert errors == [0.0] * len(counts)
    assert edges == sorted(edges)


def test_edges_have_the_bound_of_each_row(store: Store) -> None:
    live = computed(store, "table7")
    table = beyond.edges(live, [], name="tab-x", caption="a caption")
    rows = {row[0]: row for row in table.rows}
    assert rows["20"][1] == f"{live[0].eigenvalues('train')[0]:.3g}"
    assert rows["20"][4] == "76", "2 (1 + 0.9) / 0.05"
    assert rows["2048"][1:] == ("–", "–", "44.3", "–")


def test_rescalings_keep_the_function_and_change_the_hessian(store: Store) -> None:
    spec = computed(store, "table7")[0].task.spec
    data = load_split(spec, "train", CPU).head(60)
    found = beyond.rescalings(trained_model(store, spec), data, [0.25, 1, 4], first="7", second="9")
    assert [r.change for r in found] == [0.0] * 3
    assert found[0].along == pytest.approx(found[1].along, rel=1e-4)
    assert found[2].along == pytest.approx(found[1].along, rel=1e-4)
    assert found[2].lambda1_x == pytest.approx(found[1].lambda1_x, rel=1e-6)
    assert min(found[0].lambda1, found[2].lambda1) > 1.5 * found[1].lambda1
    rows = beyond.rescaling(found, name="tab-x", caption="a caption").rows
    assert column(rows, 2) == [f"{r.lambda1:.4g}" for r in found]


def test_strong_table_has_an_interval_for_one_network_and_says_what_is_missing(store: Store) -> None:
    live = computed(store, "strong")
    table = beyond.strong(live, [], name="tab-x", caption="a caption")
    assert table.header == ("Run", "ε", "Training", "clean", "FGSM", "PGD", "AutoAttack")
    for row, measures in zip(
        (table.rows[0], table.rows[2]), (live[0].task.measures[:3], live[0].task.measures[3:]), strict=True
    ):
        for cell, measure in zip(row[4:], measures, strict=True):
            assert cell.startswith(f"{100 * live[0].measurements[measure].values['accuracy']:.1f} (")
    assert table.rows[-1][2] == NOT_MEASURED
    (measure, *_) = live[0].task.measures
    assert isinstance(measure, AttackAccuracy)
    larger = measure.model_copy(update={"attack": measure.attack.model_copy(update={"eps": 0.5})})
    others = Outcome(replace(live[0].task, measures=(larger,)), live[0].result, {larger: live[0].measurements[measure]})
    of_another_size = beyond.strong(live, [others], name="tab-x", caption="a caption").rows[-1]
    assert of_another_size[:3] == ("record", "0.5", "ORI")
    assert of_another_size[5:] == ("–", "–")
    several = beyond.strong([live[0], live[0]], live, name="tab-x", caption="a caption")
    assert "±" in several.rows[0][4]
    assert [row[:3] for row in several.rows] == [
        ("live", "0.1", "ORI"), ("live", "0.3", "ORI"), ("record", "0.1", "ORI"), ("record", "0.1", "L2GRAD"),
        ("record", "0.3", "ORI"), ("record", "0.3", "L2GRAD"),
    ]  # fmt: skip


def test_spread_has_means_over_seeds_and_the_ratio_of_extremes(store: Store) -> None:
    live = computed(store, "seeds", seeds=3)
    table = beyond.spread(live, [], name="tab-x", caption="a caption")
    assert [row[:3] for row in table.rows] == [
        ("20", "live", "3"), ("100", "live", "3"), ("100 : 20", "live", "3"), (NOT_MEASURED, "record", "–"),
    ]  # fmt: skip
    small, large = ([o for o in live if o.task.spec.recipe.batch_size == b] for b in (20, 100))
    ratio = 1.0
    for a, b in zip(small, large, strict=True):
        assert a.task.spec.recipe.seed == b.task.spec.recipe.seed
        ratio *= b.eigenvalues("train")[0] / a.eigenvalues("train")[0]
    assert table.rows[2][4].startswith(f"× {ratio ** (1 / 3):.3g} (")
    assert table.rows[0][3] == mean_and_spread(clean(small), "{:.2f}")


@pytest.mark.parametrize("how", ["diverged", "collapsed"])
def test_sweep_tells_how_a_training_failed(store: Store, how: str) -> None:
    live = computed(store, "silent_lr")
    result = live[1].result
    assert result is not None
    epoch = Epoch(1, 0.05, float("nan"), 0.1, float("nan"), 0.1, 1.0)
    failed = RunResult(result.spec, "failed", f"training {how}: loss 2.303 after epoch 9; lower it", [epoch], {})
    table = beyond.sweep(
        [live[0], Outcome(live[1].task, failed, {})],
        [],
        beyond.learning_rate,
        "Rate",
        name="tab-x",
        caption="a caption",
    )
    assert table.rows[0][0] == "0.025"
    assert table.rows[0][5] == f"{live[0].eigenvalues('train')[0]:.3g}"
    assert table.rows[1] == ("0.05", "20", "live", how, "–", "–", "–")
    assert table.rows[2][0] == NOT_MEASURED
    slow = Outcome(live[1].task, live[0].result, live[0].measurements)
    (row, *_) = beyond.sweep(
        [slow, Outcome(live[1].task, failed, {})], [], beyond.learning_rate, "Rate", name="tab-x", caption="a caption"
    ).rows
    assert live[0].result is not None
    assert row[3] == f"{len(live[0].result.history)}, 1 {how}"
    variants = beyond.sweep(
        computed(store, "silent_input"), [], beyond.variant, "Inputs", name="tab-x", caption="a caption"
    )
    assert column(variants.rows, 0)[:2] == ["as taken here", "normalised"]


def test_accuracy_of_sweeps_is_not_that_of_another_attack(store: Store) -> None:
    (outcome, *_) = computed(store, "seeds")
    (measure,) = (m for m in outcome.task.measures if isinstance(m, AttackAccuracy))
    others = {
        measure.model_copy(update={"attack": measure.attack.model_copy(update={"precision": "plain"})}): 0.1,
        measure.model_copy(update={"n": 4}): 0.2,
        measure.model_copy(update={"split": "train"}): 0.3,
        measure: 0.4,
    }
    found: dict[Measure, Measurement] = {m: Measurement(m, {"accuracy": value}, {}) for m, value in others.items()}
    assert beyond.under_fgsm([replace(outcome, measurements=found)], measure.attack.eps) == [40.0]


def test_figures_draw_what_is_there(store: Store, tmp_path: Path) -> None:
    spectra, descents, paths = (computed(store, name) for name in ("density", "edge", "sharpening"))
    eps = 0.1
    figures = {
        "densities": figures_beyond.densities(spectra, []),
        "edge": figures_beyond.edge(descents),
        "sharpening": figures_beyond.sharpening(paths),
        "rates": figures_beyond.learning_rates(computed(store, "silent_lr"), [], eps),
    }
    for name, figure in figures.items():
        figure.savefig(tmp_path / f"{name}.svg")
        assert (tmp_path / f"{name}.svg").stat().st_size > 1000
    curve = figures["edge"].axes[0].lines[0]
    followed = beyond.followed(descents[0])
    assert followed is not None
    assert np.asarray(curve.get_ydata()).tolist() == followed["lambda1"]
    bound = np.asarray(figures["edge"].axes[0].lines[1].get_ydata())
    assert bound.tolist() == pytest.approx([10.0, 10.0])  # 2 / 0.2
    upper, lower = figures["edge"].axes
    marks = [line.get_marker() for line in lower.lines]  # in grey, marks tell the curves apart and whose each bound is
    assert len(set(marks)) == len(descents)
    assert [line.get_marker() for line in upper.lines] == [mark for mark in marks for _ in ("curve", "bound")]
    assert len(figures["densities"].axes) == 2
