"""Carrying out the grid: what is computed, what is read, what is published, and that the numbers are true."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hessnb import models, training
from hessnb.curvature import EigenResult, HessianOperator, Progress, lanczos, spectral_density
from hessnb.data import Splits
from hessnb.errors import InputError, RunFailed
from hessnb.experiments import grid, measure, networks, run, status
from hessnb.experiments.estimate import Estimates
from hessnb.experiments.profile import load_profile
from hessnb.experiments.results import Measurement, RunResult, look_up
from hessnb.experiments.spec import DataSpec, Density, InputCurvature, ModelSpec, PowerIteration, RunSpec, Spectrum
from hessnb.experiments.store import Spent, Store
from hessnb.paper import large_batch
from hessnb.paper.published import published as published_table
from hessnb.paper.spectra import stopping
from hessnb.paper.tables import NOT_MEASURED, mean_and_spread
from hessnb.training import Epoch, Recipe, State


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store in which table7 of the smoke profile has been computed."""
    store = Store(tmp_path_factory.mktemp("smoke") / "store")
    run.compute(store, grid.artefact("table7").tasks(load_profile("smoke")))
    return store


def tasks() -> list[grid.Task]:
    return grid.artefact("table7").tasks(load_profile("smoke"))


def test_outcomes_are_complete_and_the_target_is_reached(smoke: Store) -> None:
    outcomes = look_up(smoke, tasks())
    assert all(outcome.complete for outcome in outcomes)
    for outcome in outcomes:
        assert outcome.result is not None
        assert outcome.result.reason == "loss target reached"
        assert outcome.result.history[-1].train_loss <= (outcome.task.spec.recipe.loss_target or 0)
        assert outcome.result.provenance["seconds"] > 0


def test_second_call_computes_nothing(smoke: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "train", lambda *args, **kwargs: pytest.fail("trained again"))
    monkeypatch.setattr(measure, "lanczos", lambda *args, **kwargs: pytest.fail("measured again"))
    assert all(outcome.complete for outcome in run.compute(smoke, tasks()))


def test_recorded_numbers_are_those_of_the_network(smoke: Store) -> None:
    outcome = look_up(smoke, tasks())[0]
    spec = outcome.task.spec
    model = networks.trained_model(smoke, spec)
    splits = networks.load_data(spec.data, "cpu")
    assert outcome.result is not None
    last = outcome.result.history[-1]
    assert training.evaluate(model, splits.test) == (last.test_loss, last.test_accuracy)
    spectra = {m: found for m, found in outcome.measurements.items() if isinstance(m, Spectrum)}
    assert len(spectra) == 3
    for spectrum, found in spectra.items():
        split = splits.train if spectrum.split == "train" else splits.test
        operator = HessianOperator(model, F.cross_entropy, split.batches(64))
        top = found.values["eigenvalues"]
        v = torch.randn(operator.shape[0], generator=torch.Generator().manual_seed(1))
        for _ in range(200):  # an independent method: plain power iteration
            v = F.normalize(operator.matvec(v), dim=0)
        assert float(v @ operator.matvec(v)) == pytest.approx(top[0], rel=2e-3)
        assert max(found.values["residuals"]) <= spectrum.tol
        assert found.values["n_samples"] == len(split)


def test_blocks_and_power_iteration_are_measured_on_the_same_networks(smoke: Store) -> None:
    profile = load_profile("smoke")
    plan = grid.plan([grid.artefact(name) for name in ("table7", "layers", "stopping")], profile)
    assert {task.spec for task in plan} == {task.spec for task in tasks()}
    outcomes = run.compute(smoke, plan)
    for outcome in outcomes:
        whole = outcome.eigenvalues("train")[0]
        blocks = [outcome.eigenvalues("train", layer) for layer in models.layers("M1")]
        assert [len(block) for block in blocks] == [5, 5, 5, 5]
        # By Cauchy's interlacing theorem; the largest in magnitude is positive here.
        assert all(block[0] <= whole * (1 + 1e-3) for block in blocks)
    measured = next(o for o in outcomes if any(isinstance(m, PowerIteration) for m in o.measurements))
    table = stopping(measured, name="tab", caption="both")
    assert [row[0] for row in table.rows] == ["λ₁", "λ₂", "λ₃", "λ₄", "λ₅", "Products"]
    for i, row in enumerate(table.rows[:-1]):
        assert float(row[3]) == pytest.approx(measured.eigenvalues("train")[i], rel=1e-4)
        assert float(row[1]) == pytest.approx(float(row[3]), rel=0.05)
        assert float(row[2]) > float(row[4])


def test_interrupted_spectrum_goes_on_from_what_was_kept_and_ends_in_the_same_numbers(
    smoke: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = tasks()[0]
    spectrum = Spectrum(split="train", k=4, tol=1e-3)
    whole = run.measure_run(smoke, task.spec, spectrum)
    store = Store(tmp_path / "store")
    run.train_run(store, task.spec)
    solve = partial(lanczos, save_seconds=0.0)

    def until(limit: int) -> Callable[..., EigenResult]:
        def stop(told: Progress) -> None:
            if told.n_matvecs == limit:
                raise KeyboardInterrupt

        return lambda *args, **kwargs: solve(*args, **(kwargs | {"progress": stop}))

    products: list[int] = []
    multiply = HessianOperator.matvec

    def counted(operator: HessianOperator, v: Tensor) -> Tensor:
        products.append(1)
        return multiply(operator, v)

    monkeypatch.setattr(HessianOperator, "matvec", counted)
    for limit in (6, 9):
        monkeypatch.setattr(measure, "lanczos", until(limit))
        with pytest.raises(KeyboardInterrupt):
            run.measure_run(store, task.spec, spectrum)
        assert store.partial(task.spec, spectrum) is not None
        assert store.check() == []
    monkeypatch.setattr(measure, "lanczos", solve)
    resumed = run.measure_run(store, task.spec, spectrum)
    assert resumed.values == whole.values
    assert len(products) <= whole.values["n_matvecs"] + 2  # one for each interruption
    assert store.partial(task.spec, spectrum) is None
    assert not list(store.root.rglob("*.partial.*"))


def test_interrupted_density_goes_on_from_what_was_kept_and_ends_in_the_same_numbers(
    smoke: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, density = tasks()[0].spec, Density(split="train", probes=2, steps=5)
    whole = run.measure_run(smoke, spec, density)
    store = Store(tmp_path / "store")
    run.train_run(store, spec)
    monkeypatch.setattr(measure, "spectral_density", partial(spectral_density, save_seconds=-1.0))
    seen: list[str] = []
    for limit in (3, 8):

        def stop(what: str, share: float, detail: str, limit: int = limit) -> None:
            seen.append(detail)
            if detail == f"product {limit} of 10":
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run.measure_run(store, spec, density, report=stop)
        assert store.check() == []
    resumed = run.measure_run(store, spec, density, report=lambda what, share, detail: seen.append(detail))
    assert resumed.values == whole.values
    products = [int(detail.split()[1]) for detail in seen if detail.startswith("product")]
    assert products == [1, 2, 3, 3, 4, 5, 6, 7, 8, 8, 9, 10]
    assert not list(store.root.rglob("*.partial.*"))


def test_diverged_training_is_recorded_as_failed_and_the_next_one_goes_on(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    good = tasks()[1]
    recipe = replace(good.spec.recipe, lr=1e9)
    bad = grid.Task(good.spec.model_copy(update={"recipe": recipe}), good.measures)
    failed, done = run.compute(store, [bad, good])
    assert failed.result is not None
    assert failed.result.status == "failed"
    assert "diverged" in failed.result.reason
    assert len(failed.result.history) >= 1
    assert failed.measurements == {}
    assert failed.complete, "it is not tried again"
    assert done.complete


def test_child_of_a_failed_training_is_not_begun_and_the_next_one_goes_on(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    original, robust, *_ = grid.artefact("table3").tasks(load_profile("smoke"))
    wild = original.spec.model_copy(update={"recipe": replace(original.spec.recipe, lr=1e9)})
    child = grid.Task(robust.spec.model_copy(update={"parent": wild}), ())
    failed, orphan, done = run.compute(store, [grid.Task(wild, ()), child, grid.Task(original.spec, ())])
    assert failed.result is not None
    assert failed.result.status == "failed"
    assert orphan.result is None
    assert done.complete
    with pytest.raises(RunFailed, match=f"{child.spec.label}: the training of {wild.label}"):
        run.all_trained([orphan])


def test_training_whose_loss_is_zero_reaches_its_target(tmp_path: Path) -> None:
    spec = tasks()[0].spec
    target = spec.model_copy(update={"recipe": replace(spec.recipe, loss_target=1e-3)})
    kept = run._Checkpoints(Store(tmp_path / "store"), target, seen := Seen())
    constant, epoch = math.log(10), 1 / spec.recipe.max_epochs
    half_way = math.log(constant / 1e-2) / math.log(constant / 1e-3)
    for loss, share in ((0.0, 1.0), (1e-3, 1.0), (100.0, epoch), (1e-2, half_way)):
        line = Epoch(1, 0.1, loss, 0.5, loss, 0.5, 0.5)
        kept.after_epoch(State(1, {"w": torch.zeros(1)}, [], [line]))
        assert seen.shares[-1] == pytest.approx(share)


class Seen:
    """A report that keeps the shares."""

    def __init__(self) -> None:
        self.shares: list[float] = []

    def __call__(self, what: str, share: float, detail: str) -> None:
        self.shares.append(share)


def test_a_network_that_another_process_is_at_work_on_is_left_for_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (grid.Task(task.spec, ()) for task in grid.artefact("table7").tasks(load_profile("smoke")))
    monkeypatch.setattr(Store, "is_held", lambda self, spec: spec == first.spec)
    begun: list[str] = []

    def report(label: str, share: float, detail: str) -> None:
        if share == 0.0:
            begun.append(label.split(":")[0])

    outcomes = run.compute(Store(tmp_path), [first, second], report=report)
    assert begun == [second.spec.label, first.spec.label]
    assert [outcome.task for outcome in outcomes] == [first, second], "in the order asked for"
    assert all(outcome.complete for outcome in outcomes)


def test_run_is_held_while_it_is_trained_and_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, spec, held = Store(tmp_path / "store"), tasks()[0].spec, list[bool]()
    train = training.train

    def trained(*args: Any, **settings: Any) -> State:
        held.append(store.is_held(spec))
        return train(*args, **settings)

    def measured(*args: Any) -> dict[str, object]:
        held.append(store.is_held(spec))
        return {"lambda1": 1.0}

    monkeypatch.setattr(training, "train", trained)
    monkeypatch.setattr(run, "measured", measured)
    run.train_run(store, spec)
    run.measure_run(store, spec, InputCurvature(split="test"))
    assert held == [True, True]
    assert not store.is_held(spec)


def test_what_another_process_ended_while_this_one_waited_is_not_done_again(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    before_the_lock: Callable[[Callable[[Store, RunSpec], None]], None],
) -> None:
    spec, measure = tasks()[0].spec, InputCurvature(split="test")
    result = RunResult(spec, "done", "ended elsewhere", [Epoch(1, 0.1, 1.0, 0.5, 1.0, 0.5, 1.0)], {})
    measurement = Measurement(measure, {"lambda1": 1.0}, {})

    def end(store: Store, spec: RunSpec) -> None:
        store.save_result(result, State(1, {"w": torch.ones(1)}, [], []))
        store.save_measurement(spec, measurement)

    before_the_lock(end)
    monkeypatch.setattr(training, "train", lambda *args, **settings: pytest.fail("trained again"))
    monkeypatch.setattr(run, "measured", lambda *args: pytest.fail("measured again"))
    assert run.train_run(Store(tmp_path / "one"), spec) == result
    assert run.measure_run(Store(tmp_path / "other"), spec, measure) == measurement


def test_longest_attempt_that_led_to_nothing_is_remembered(tmp_path: Path) -> None:
    store, spec, measure = Store(tmp_path / "store"), tasks()[0].spec, InputCurvature(split="test")
    store.save_spent(spec, measure, Spent(lost=5.0))
    with pytest.raises(KeyboardInterrupt), run._worked(store, spec, measure):
        raise KeyboardInterrupt
    assert store.spent(spec, measure) == Spent(lost=5.0)


def test_notebook_call_raises_for_a_failed_training(tmp_path: Path) -> None:
    text = (Path(grid.__file__).parent / "profiles" / "smoke.toml").read_text().replace("lr = 0.05", "lr = 1e9")
    (tmp_path / "wild.toml").write_text(text)
    with pytest.raises(RunFailed, match="diverged"):
        run.results("fig6", profile=str(tmp_path / "wild.toml"), store=tmp_path / "store")


def test_batch_larger_than_the_set_is_an_input_error_and_leaves_no_result(tmp_path: Path) -> None:
    spec = tasks()[0].spec
    large = spec.model_copy(update={"recipe": replace(spec.recipe, batch_size=301)})
    store = Store(tmp_path / "store")
    with pytest.raises(InputError, match="only 300 samples"):
        run.train_run(store, large)
    assert store.result(large) is None


def test_missing_data_set_is_an_input_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HESSNB_DATA", str(tmp_path))
    networks.load_data.cache_clear()
    spec = RunSpec(data=DataSpec(name="mnist"), model=ModelSpec(name="M1"), recipe=Recipe(64, 0.01, 0.9, 1, 0))
    with pytest.raises(InputError, match="hessnb data fetch mnist"):
        run.train_run(Store(tmp_path / "store"), spec)


def test_status_says_what_is_there_and_estimates_the_rest(smoke: Store) -> None:
    estimates = Estimates(smoke, torch.device("cpu"))

    def lines(profile: str, seeds: int | None = None) -> dict[str, status.Line]:
        return {line.artefact: line for line in status.lines(smoke, load_profile(profile), estimates, seeds)}

    there = lines("smoke")
    assert there["table7"].state == "there"
    assert there["table7"].left == "nothing"
    more = lines("smoke", 2)
    assert more["table7"].state == "partly there"
    assert (more["table7"].runs_done, more["table7"].runs) == (2, 4)
    assert more["table7"].left.startswith("about ")
    together = more.pop(status.TOGETHER)
    assert together.runs_done == 2
    assert together.runs < sum(line.runs for line in more.values()), "what is shared counts once"
    none = lines("paper", 1)
    assert none["fig1"].state == "missing"
    assert "not known" in none["fig1"].left


def test_status_reads_each_file_of_the_store_once(smoke: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    read: Counter[Path] = Counter()
    content = Path.read_bytes

    def counted(path: Path) -> bytes:
        read[path] += 1
        return content(path)

    monkeypatch.setattr(Path, "read_bytes", counted)
    estimates = Estimates(smoke, torch.device("cpu"))
    for profile in ("smoke", "quick", "paper"):
        assert list(status.lines(smoke, load_profile(profile), estimates, 3))
    assert set(read) == set(smoke.root.glob("runs/*/*.json"))
    assert set(read.values()) == {1}


def test_published_table_is_the_papers() -> None:
    table = published_table("table7")
    assert list(table.index) == [("M1", size) for size in (64, 128, 256, 512, 1024, 2048)]
    assert not any(column.startswith("network") for column in table.columns)
    assert len(table.columns) == 14
    row, last = ({c: table[c][("M1", size)] for c in table.columns} for size in (64, 2048))
    assert [row[name] for name in ("lambda1_train", "lambda1_test", "accuracy_test")] == [0.49, 2.96, 99.21]
    assert [last[name] for name in ("lambda1_train", "lambda1_test", "adversarial_0.05_test")] == [44.3, 49.36, 94]
    with pytest.raises(InputError, match="table12"):
        published_table("table12")


def test_table_shows_ours_beside_the_papers_and_says_what_is_missing(smoke: Store) -> None:
    outcomes = look_up(smoke, tasks())
    table = large_batch.curvature("table7", outcomes, name="tab-x", caption="a caption")
    assert [row[0] for row in table.rows] == ["20", "100"]
    first = next(iter(outcomes[0].measurements.values())).values["eigenvalues"][0]
    assert table.rows[0][3].startswith(f"{first:.3g} (")
    nothing = [replace(outcomes[0], result=None, measurements={})]
    empty = large_batch.curvature("table7", nothing, name="tab-y", caption="a caption")
    assert empty.rows[0][1] == empty.rows[0][3] == NOT_MEASURED
    markdown, page = table._repr_markdown_(), table._repr_html_()
    assert ":name: tab-x" in markdown
    assert "<caption>a caption</caption>" in page


def test_spread_is_the_sample_standard_deviation() -> None:
    assert mean_and_spread([1.0, 2.0, 3.0], "{:.1f}") == "2.0 ± 1.0"
    assert mean_and_spread([1.25], "{:.2f}") == "1.25"
    assert mean_and_spread([], "{:.2f}") == NOT_MEASURED
    assert mean_and_spread([5834.0], "{:.3g}") == "5,830"
    assert mean_and_spread([1e6, 3e6], "{:.3g}") == "2e+06 ± 1.41e+06"


# Several seeds together


def seeds_of_table7() -> list[RunSpec]:
    """Return the trainings of three seeds at one batch size."""
    specs = [task.spec for task in grid.artefact("table7").tasks(load_profile("smoke"), 3)]
    return [spec for spec in specs if spec.recipe.batch_size == specs[0].recipe.batch_size]


def test_mates_are_the_other_seeds_of_a_training() -> None:
    tasks = grid.plan(list(grid.ARTEFACTS.values()), load_profile("smoke"), 3)
    spec, *others = seeds_of_table7()
    assert {other.key for other in run.mates_of(spec, (task.spec for task in tasks))} == {s.key for s in others}
    original, robust = (task.spec for task in grid.artefact("table3").tasks(load_profile("smoke"), 1)[:2])
    assert run.mates_of(original, (task.spec for task in tasks)) == []  # its learning rate decays
    assert run.mates_of(robust, (task.spec for task in tasks)) == []


def test_run_of_other_data_or_another_network_or_that_goes_on_from_one_is_no_mate() -> None:
    spec, other, _ = seeds_of_table7()
    robust = grid.artefact("table3").tasks(load_profile("smoke"))[1].spec
    changes: list[dict[str, object]] = [
        {"data": spec.data.model_copy(update={"n_train": 50})},
        {"model": spec.model.model_copy(update={"variant": "strided"})},
        {"parent": other},
        {"attack": robust.attack, "parent": spec},
    ]
    assert run.mates_of(spec, [other, *(other.model_copy(update=change) for change in changes)]) == [other]


def test_seeds_that_are_trained_together_are_results_like_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    specs, store = seeds_of_table7(), Store(tmp_path / "store")
    monkeypatch.setattr(run, "is_faster_together", lambda models, data, recipe: len(models) == 2)
    run.train_run(store, specs[1])
    splits, seen = networks.load_data(specs[0].data, "cpu"), list[str]()

    def stop(what: str, share: float, detail: str) -> None:
        if "epoch 2," in detail and specs[2].label in what:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run._train_together(store, specs, splits, torch.device("cpu"), stop)
    states = [store.checkpoint(spec) for spec in (specs[0], specs[2])]
    assert all(state is not None and state.epoch >= 1 for state in states)
    assert states[1] is not None
    assert states[1].epoch == 2  # what ends a training between epochs costs it none
    assert run._train_together(store, specs, splits, torch.device("cpu"), lambda what, *rest: seen.append(what))
    assert {what.split(":")[0] for what in seen} == {specs[0].label, specs[2].label}
    for spec in specs:
        result, alone = store.result(spec), Store(tmp_path / "alone")
        assert result is not None
        assert result.reason == "loss target reached"
        assert result.provenance.get("seeds_together") == (None if spec == specs[1] else [0, 2])
        first, expected = result.history[0], run.train_run(alone, spec).history[0]
        assert first.train_loss == pytest.approx(expected.train_loss, rel=1e-3)
        model = networks.trained_model(store, spec)
        assert training.evaluate(model, splits.train)[0] == pytest.approx(result.history[-1].train_loss, rel=1e-6)
    assert not run._train_together(store, specs, splits, torch.device("cpu"), lambda *rest: None)


def test_training_on_all_of_mnist_starts_as_the_paper_has_it(published: Callable[[str], Splits]) -> None:
    """One epoch of the paper's batch-64 row: the whole path on the published data (the full row takes half an hour)."""
    splits = published("mnist")
    task = grid.artefact("table7").tasks(load_profile("paper"), 1)[0]
    assert (len(splits.train), len(splits.test)) == (60_000, 10_000)
    model: nn.Module = networks.new_model(task.spec, len(splits.classes))
    recipe = replace(task.spec.recipe, max_epochs=1)
    state = training.train(model, splits, recipe)
    assert state.history[0].test_accuracy > 0.97
    operator = HessianOperator(model, F.cross_entropy, splits.test.head(1000).batches(250))
    assert torch.isfinite(operator.matvec(torch.ones(operator.shape[0]))).all()
    assert Spectrum(split="train", k=2, tol=1e-4) in task.measures
