"""A campaign: the order of the work, what a time limit leaves, estimates, and real kills."""

from __future__ import annotations

import importlib
import multiprocessing
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import workers

from hessnb.curvature import HessianOperator, lanczos
from hessnb.errors import Held, InputError
from hessnb.experiments import campaign, grid, measure, run, status
from hessnb.experiments.campaign import Unit
from hessnb.experiments.estimate import Estimates, in_words, seconds_of
from hessnb.experiments.measure import Report
from hessnb.experiments.profile import load_profile
from hessnb.experiments.provenance import device_name
from hessnb.experiments.results import Measurement, RunResult
from hessnb.experiments.spec import (
    AttackAccuracy,
    AttackSpec,
    InputCurvature,
    LossLine,
    LossPlane,
    Measure,
    RunSpec,
    Spectrum,
)
from hessnb.experiments.store import Spent, Store
from hessnb.training import Epoch, State

CPU = torch.device("cpu")


LANDSCAPES = (LossLine, LossPlane)


def tasks(*names: str, profile: str = "smoke", seeds: int = 1) -> list[grid.Task]:
    return grid.plan([grid.artefact(name) for name in names], load_profile(profile), seeds)


def epochs(n: int, seconds: float, loss: float = 1.0) -> list[Epoch]:
    return [Epoch(i + 1, 0.01, loss, 0.5, loss, 0.5, seconds) for i in range(n)]


def told(seconds: float, device: str | None = None) -> dict[str, Any]:
    return {"device": device or device_name(CPU), "seconds": seconds}


def trained(store: Store, spec: RunSpec, history: list[Epoch], status: Any = "done", device: str | None = None) -> None:
    store.save_result(RunResult(spec, status, "", history, told(1.0, device)), State(1, {"w": torch.ones(1)}, [], []))


def measured(store: Store, spec: RunSpec, measure: Measure, seconds: float, device: str | None = None) -> None:
    store.save_measurement(spec, Measurement(measure, {"accuracy": 0.5}, told(seconds, device)))


def begun(store: Store, spec: RunSpec, history: list[Epoch]) -> None:
    store.save_checkpoint(spec, State(len(history), {"w": torch.ones(1)}, [], history))


# -- the order -----------------------------------------------------------------------------------------------------


def test_order_is_seed_by_seed_cheap_before_expensive_and_never_before_what_is_needed(tmp_path: Path) -> None:
    plan = tasks(*grid.ARTEFACTS, profile="paper", seeds=2)
    units = campaign.units(plan)
    order = campaign.ordered(units, Estimates(Store(tmp_path), CPU))
    assert set(order) == set(units)
    assert len(order) == len(units) == sum(1 + len(task.measures) for task in plan)
    assert [unit.spec.recipe.seed for unit in order] == sorted(unit.spec.recipe.seed for unit in order)
    place = {unit: i for i, unit in enumerate(order)}
    assert all(place[Unit(needed)] < place[unit] for unit in units for needed in unit.needs)
    along = [(Unit(unit.spec, unit.measure.along), unit) for unit in units if isinstance(unit.measure, LANDSCAPES)]
    assert sum(spectrum in place for spectrum, _ in along) > 1
    assert all(place[spectrum] < place[unit] for spectrum, unit in along if spectrum in place)
    for seed in (0, 1):
        kinds = ["training" if u.measure is None else u.measure.kind for u in order if u.spec.recipe.seed == seed]
        expensive = [kind not in ("training", "attack_accuracy", "input_curvature") for kind in kinds]
        assert expensive == sorted(expensive), "expensive ones come last"
        assert kinds[-1] == "power_iteration"
    sizes = [u.spec.recipe.batch_size for u in order if u.measure is None and u.spec.recipe.loss_target == 0.001]
    assert sizes[:8] == [16, 32, 64, 128, 256, 512, 1024, 2048]


def test_order_follows_the_costs_that_the_store_knows(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    plan = tasks("table7", profile="paper")
    spec = plan[0].spec
    trained(store, spec, epochs(18, 10.0))
    for kind, seconds in ((Spectrum, 20.0), (InputCurvature, 5000.0)):
        for one in (m for m in plan[0].measures if isinstance(m, kind)):
            measured(store, spec, one, seconds)
    order = campaign.ordered(campaign.units(plan[1:]), Estimates(store, CPU))
    assert [isinstance(unit.measure, InputCurvature) for unit in order] == [False] * (len(order) - 10) + [True] * 10
    first = order.index(Unit(plan[2].spec))
    assert {u.measure.kind for u in order[1:first] if u.measure} == {"spectrum", "attack_accuracy"}


def test_parents_and_sources_that_no_task_names_are_units_too() -> None:
    robust = tasks("table3")[-1]
    assert robust.spec.parent is not None
    units = campaign.units([robust])
    assert units[:2] == [Unit(robust.spec.parent), Unit(robust.spec)]
    source = tasks("table7")[0].spec
    attack = AttackAccuracy(split="test", attack=AttackSpec(method="FGSM", eps=0.1, clip=True), source=source)
    assert campaign.units([grid.Task(robust.spec, (attack,))])[2:] == [Unit(source), Unit(robust.spec, attack)]


# -- estimates -----------------------------------------------------------------------------------------------------


def test_estimates_are_none_where_nothing_is_known_and_improve_with_what_is(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    plan = tasks("table7", profile="paper", seeds=2)
    by_size = {(t.spec.recipe.batch_size, t.spec.recipe.seed): t.spec for t in plan}
    wanted = by_size[(256, 1)]

    def estimates() -> Estimates:
        return Estimates(store, CPU)

    assert estimates().training(wanted) is None
    assert campaign.rest(store, plan, estimates()).left == "not known yet"
    begun(store, by_size[(64, 0)], [*epochs(1, 9.0, 1.0), *epochs(1, 9.0)])
    assert estimates().epoch(wanted) == 9.0, "as at the nearest batch size"
    assert estimates().training(wanted) is None, "nothing is known of how many epochs it takes"
    trained(store, by_size[(64, 0)], epochs(20, 10.0))
    assert estimates().training(wanted) == pytest.approx(20 * 4 * 10.0), "as many steps"
    assert campaign.rest(store, plan, estimates()).left.startswith("at least "), "no measure has been timed"
    trained(store, by_size[(128, 0)], epochs(35, 8.0))
    assert estimates().training(wanted) == pytest.approx(35 * 2 * 8.0), "the nearest batch size"
    trained(store, by_size[(256, 0)], epochs(65, 7.0))
    assert estimates().training(wanted) == pytest.approx(65 * 7.0), "another seed"
    begun(store, wanted, epochs(40, 6.0))
    assert estimates().training(wanted) == pytest.approx(25 * 6.0), "its own epochs"
    trained(store, wanted, epochs(2, 1000.0), device="another machine")
    assert estimates().epoch(by_size[(512, 1)]) == 7.0, "another machine's seconds say nothing"
    assert estimates().training(by_size[(2048, 0)]) == pytest.approx(7.0 * 2048 / 256 * (65 + 2) / 2)


def test_length_of_the_first_training_follows_its_own_loss(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    spec = tasks("table7", profile="paper")[0].spec
    history = [Epoch(i + 1, 0.01, 2.0**-i, 0.5, 1.0, 0.5, 1.0) for i in range(6)]  # the target, 0.001, is 2^-9.97
    begun(store, spec, history)
    assert Estimates(store, CPU).training(spec) == pytest.approx(4.97, abs=0.01)
    begun(store, spec, epochs(6, 1.0))
    assert Estimates(store, CPU).training(spec) == spec.recipe.max_epochs - 6


def test_training_of_which_only_the_result_is_missing_takes_an_epoch_at_most(tmp_path: Path) -> None:
    store, spec = Store(tmp_path / "store"), tasks("table7", profile="paper")[0].spec
    begun(store, spec, epochs(spec.recipe.max_epochs, 2.0))
    assert Estimates(store, CPU).training(spec) == 2.0


def test_epoch_takes_what_the_last_ones_took(tmp_path: Path) -> None:
    store, spec = Store(tmp_path / "store"), tasks("table7", profile="paper")[0].spec
    begun(store, spec, [*epochs(10, 100.0), *epochs(5, 1.0)])
    assert Estimates(store, CPU).epoch(spec) == 1.0


def test_nearest_batch_size_is_that_of_the_smallest_ratio(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    by_size = {task.spec.recipe.batch_size: task.spec for task in tasks("table7", profile="paper")}
    trained(store, by_size[64], epochs(3, 10.0))
    trained(store, by_size[512], epochs(3, 7.0))
    assert Estimates(store, CPU).epoch(by_size[256]) == 7.0


def test_training_under_way_on_another_machine_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, spec = Store(tmp_path / "store"), tasks("table7", profile="paper")[0].spec
    with monkeypatch.context() as patch:
        patch.setattr("hessnb.experiments.store.device_name", lambda device: "another machine")
        begun(store, spec, epochs(3, 10.0))
    assert Estimates(store, CPU).epoch(spec) is None
    begun(store, spec, epochs(3, 10.0))
    assert Estimates(store, CPU).epoch(spec) == 10.0


def test_measures_are_estimated_by_the_same_one_elsewhere_then_by_their_kind(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    first, second = (task.spec for task in tasks("table7", profile="paper")[:2])
    eps = [AttackAccuracy(split="test", attack=AttackSpec(method="FGSM", eps=e, clip=True)) for e in (0.1, 0.2)]
    other = AttackAccuracy(split="test", attack=AttackSpec(method="L2GRAD", eps=0.1, clip=True))
    trained(store, first, epochs(3, 1.0))
    assert Estimates(store, CPU).measure(second, eps[0]) is None
    measured(store, first, eps[0], 3.0)
    assert [Estimates(store, CPU).measure(second, m) for m in (*eps, other)] == [3.0, 3.0, None]
    measured(store, first, eps[1], 9.0)
    assert [Estimates(store, CPU).measure(second, m) for m in eps] == [3.0, 9.0]
    measured(store, second, eps[0], 500.0, device="another machine")
    assert Estimates(store, CPU).measure(second, eps[0]) == 3.0


def test_rest_counts_what_failed_as_lost_and_not_as_left(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    plan = tasks("table3")
    trained(store, plan[0].spec, epochs(1, 1.0), "failed")
    rest = campaign.rest(store, plan, Estimates(store, CPU))
    assert (rest.trainings_left, rest.measures_left, rest.trainings_lost, rest.left) == (0, 0, len(plan), "nothing")
    assert rest.measures_lost == rest.measures
    (line,) = (
        line for line in status.lines(store, load_profile("smoke"), Estimates(store, CPU)) if line.artefact == "table3"
    )
    assert (line.runs_done, line.measures_done, line.state) == (0, 0, "failed")


def test_seconds_that_are_kept_are_not_left(tmp_path: Path) -> None:
    store, spectrum = Store(tmp_path / "store"), Spectrum(split="train", k=2, tol=1e-3)
    first, second = (task.spec for task in tasks("table7"))
    for spec in (first, second):
        trained(store, spec, epochs(3, 1.0))
    measured(store, second, spectrum, 1000.0)
    left = []
    for kept in (0.0, 600.0, 2000.0):
        store.save_spent(first, spectrum, Spent(kept=kept))
        left.append(campaign.rest(store, [grid.Task(first, (spectrum,))], Estimates(store, CPU)).seconds)
    assert left == [1000.0, 400.0, 100.0], "one that takes longer than foretold: a tenth, for nobody knows"


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("9m", 540), ("2h30m", 9000), ("1h1m1s", 3661), ("1.5h", 5400), (" 5s ", 5)]
)
def test_time_is_read(text: str, seconds: float) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "9", "9 m", "m", "-3m", "0s", "3m2h", "nine minutes", "1e3s", "infs", "9000h"])
def test_time_that_cannot_be_read_is_an_input_error(text: str) -> None:
    with pytest.raises(InputError, match="90s, 9m or 2h30m"):
        seconds_of(text)


def test_time_in_words() -> None:
    assert [in_words(s) for s in (5.4, 600, 9000)] == ["5 s", "10 min", "2.5 h"]


# -- a time limit --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with one trained network."""
    root = tmp_path_factory.mktemp("network") / "store"
    run.train_run(Store(root), tasks("table7")[0].spec)
    return root


def copy_of(root: Path, target: Path) -> Store:
    for path in (path for path in root.rglob("*") if path.is_file()):
        (target / path.relative_to(root)).parent.mkdir(parents=True, exist_ok=True)
        (target / path.relative_to(root)).write_bytes(path.read_bytes())
    return Store(target)


def busy(seconds: float, done: list[str], *args: Any) -> dict[str, object]:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.01)
    done.append(args[-1])
    return {"accuracy": 0.5}


FGSM = [AttackAccuracy(split="test", attack=AttackSpec(method="FGSM", eps=e, clip=True)) for e in (0.1, 0.2, 0.3)]
L2 = AttackAccuracy(split="test", attack=AttackSpec(method="L2GRAD", eps=0.1, clip=True))


def test_what_is_not_known_to_fit_is_stopped_in_time_remembered_and_not_tried_again(
    network: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, done = copy_of(network, tmp_path / "store"), list[str]()
    task = grid.Task(tasks("table7")[0].spec, (FGSM[0],))
    monkeypatch.setattr(run, "measured", partial(busy, 60.0, done))
    started = time.monotonic()
    assert campaign.carry_out(store, [task], budget=1.0) == []
    assert 0.9 < time.monotonic() - started < 3.0
    assert store.spent(task.spec, FGSM[0]).lost == pytest.approx(1.0, abs=0.3)
    assert store.check() == []
    monkeypatch.setattr(run, "measured", lambda *args: pytest.fail("tried again in a time that it does not fit"))
    (refusal,) = campaign.carry_out(store, [task], budget=1.0)
    assert "FGSM-eps0.1-test: needs about 1 s at a time; give it more than 1 s" in refusal.line
    assert not refusal.impossible
    monkeypatch.setattr(run, "measured", partial(busy, 0.0, done))
    assert campaign.carry_out(store, [task], budget=60.0) == []
    assert len(done) == 1
    assert store.spent(task.spec, FGSM[0]) == Spent()
    found = store.measurement(task.spec, FGSM[0])
    assert found is not None
    assert found.provenance["seconds"] < 0.5, "what was lost is not what it took"


def test_what_does_not_fit_by_its_estimate_is_not_started_and_what_fits_goes_first(
    network: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, done = copy_of(network, tmp_path / "store"), list[str]()
    first, second = tasks("table7")
    trained(store, second.spec, epochs(3, 1.0))
    measured(store, second.spec, FGSM[0], 100.0)
    measured(store, second.spec, L2, 0.1)
    monkeypatch.setattr(run, "measured", partial(busy, 0.0, done))
    started = time.monotonic()
    refused = campaign.carry_out(store, [grid.Task(first.spec, (FGSM[0], L2))], budget=5.0)
    assert done == [f"{first.spec.label}: {L2.label}"]
    assert "needs about 100 s at a time" in refused[0].line
    assert time.monotonic() - started < 4.0
    rest = campaign.rest(store, [grid.Task(first.spec, (FGSM[0], L2))], Estimates(store, CPU))
    assert (rest.measures_left, rest.left) == (1, "about 100 s")


def test_what_is_learnt_on_the_way_changes_the_order(
    network: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, done = copy_of(network, tmp_path / "store"), list[str]()
    spec = tasks("table7")[0].spec
    result = store.result(spec)
    assert result is not None
    slow = 12 * sum(epoch.seconds for epoch in result.history) / len(result.history)

    def costs(*args: Any) -> dict[str, object]:
        return busy(slow if args[2].kind == "attack_accuracy" and args[2].attack.method == "FGSM" else 0.0, done, *args)

    monkeypatch.setattr(run, "measured", costs)
    campaign.carry_out(store, [grid.Task(spec, (*FGSM, L2))])
    assert [name.split(": ")[1] for name in done] == [m.label for m in (FGSM[0], L2, *FGSM[1:])]


def test_training_stops_between_epochs_and_goes_on_from_there_to_the_same_bits(network: Path, tmp_path: Path) -> None:
    spec = tasks("table7")[0].spec
    recipe = replace(spec.recipe, loss_target=None, max_epochs=120, lr=0.02)
    longer = grid.Task(spec.model_copy(update={"recipe": recipe}), ())
    whole = Store(tmp_path / "whole")
    reference = run.train_run(whole, longer.spec)
    seconds = sum(epoch.seconds for epoch in reference.history)
    store, reached = Store(tmp_path / "store"), [0]
    while store.result(longer.spec) is None:
        started = time.monotonic()
        assert campaign.carry_out(store, [longer], budget=max(seconds / 4, 1.0)) == []
        assert time.monotonic() - started < max(seconds / 4, 1.0) + 2.0
        state = store.checkpoint(longer.spec)
        reached.append(recipe.max_epochs if state is None else state.epoch)
        assert reached[-1] > reached[-2], "each call gets further"
    assert len(reached) > 3
    ours = store.weights(longer.spec)
    assert all(torch.equal(tensor, ours[name]) for name, tensor in whole.weights(longer.spec).items())


def test_eigensolve_stops_at_a_save_and_goes_on_from_there(
    network: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = copy_of(network, tmp_path / "store")
    spec = tasks("table7")[0].spec
    spectrum = Spectrum(split="train", k=4, tol=1e-3)
    multiply, products, pause = HessianOperator.matvec, 0, 0.0

    def slowly(operator: HessianOperator, v: torch.Tensor) -> torch.Tensor:
        nonlocal products
        products += 1
        time.sleep(pause)
        return multiply(operator, v)

    monkeypatch.setattr(HessianOperator, "matvec", slowly)
    whole = run.measure_run(copy_of(network, tmp_path / "whole"), spec, spectrum)
    pause = 4.0 / products  # longer than the budget below, on a machine of any speed
    monkeypatch.setitem(run.RESUMED, "spectrum", 0.2)
    monkeypatch.setattr(campaign, "_STEP", 0.1)
    monkeypatch.setattr(measure, "lanczos", partial(lanczos, save_seconds=0.2))
    calls, spent = 0, [0.0]
    while store.measurement(spec, spectrum) is None:
        started = time.monotonic()
        campaign.carry_out(store, [grid.Task(spec, (spectrum,))], budget=1.5)
        assert time.monotonic() - started < 3.0
        calls, spent = calls + 1, [*spent, store.spent(spec, spectrum).kept]
        assert calls < 20
    assert calls > 1
    found = store.measurement(spec, spectrum)
    assert found is not None
    assert found.values == whole.values
    assert found.provenance["seconds"] > max(spent) > 0.3, "the seconds of all calls"
    assert spent[-1] == 0.0


def test_eigensolve_that_is_nearly_done_is_let_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, spectrum, ended = Store(tmp_path / "store"), Spectrum(split="train", k=2, tol=1e-3), list[bool]()
    first, second = (task.spec for task in tasks("table7"))
    for spec in (first, second):
        trained(store, spec, epochs(3, 1.0))
    measured(store, second, spectrum, 1.0)

    def nearly_done(*args: Any, report: Report, on_save: Callable[[], None], **settings: Any) -> Measurement:
        report("a solve", 0.99, "")
        on_save()
        ended.append(True)
        return Measurement(spectrum, {}, told(1.0))

    monkeypatch.setattr(campaign, "measure_run", nearly_done)
    campaign.carry_out(store, [grid.Task(first, (spectrum,))], budget=30.0)  # less than from one save to the next
    assert ended == [True]


def test_landscape_keeps_its_points_and_their_seconds(
    network: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, done = copy_of(network, tmp_path / "store"), list[str]()
    spec = tasks("table7")[0].spec
    line = LossLine(along=Spectrum(split="train", k=1, tol=1e-2), reach=0.1, points=3, batch=10)
    monkeypatch.setattr(run, "measured", partial(busy, 60.0, done))
    monkeypatch.setattr(campaign, "_STEP", 0.2)
    for calls in (1, 2):
        assert campaign.carry_out(store, [grid.Task(spec, (line,))], budget=1.5) == []
        assert store.spent(spec, line).kept == pytest.approx(1.5 * calls, abs=0.5)
        assert store.spent(spec, line).lost == 0.0
    monkeypatch.undo()
    assert campaign.carry_out(store, [grid.Task(spec, (line,))], budget=60.0) == []
    found = store.measurement(spec, line)
    assert found is not None
    assert 2.5 < found.provenance["seconds"] < 30.0
    assert store.spent(spec, line) == Spent()


def test_eigensolve_too_slow_for_a_single_save_is_told(
    network: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, spec = copy_of(network, tmp_path / "store"), tasks("table7")[0].spec
    spectrum = Spectrum(split="train", k=4, tol=1e-3)
    monkeypatch.setitem(run.RESUMED, "spectrum", 0.1)
    monkeypatch.setattr(campaign, "_STEP", 0.1)
    monkeypatch.setattr(HessianOperator, "matvec", lambda operator, v: time.sleep(60.0))
    started = time.monotonic()
    assert campaign.carry_out(store, [grid.Task(spec, (spectrum,))], budget=1.5) == []
    assert 1.4 < time.monotonic() - started < 3.0
    assert store.spent(spec, spectrum).lost == pytest.approx(1.5, abs=0.5)
    (refusal,) = campaign.carry_out(store, [grid.Task(spec, (spectrum,))], budget=1.5)
    assert "at a time; give it more" in refusal.line


def test_network_without_weights_is_told_and_the_rest_goes_on(network: Path, tmp_path: Path) -> None:
    store = copy_of(network, tmp_path / "store")
    first, second = tasks("table7")
    (weights,) = store.root.rglob("weights.safetensors")
    weights.unlink()
    plan = [grid.Task(first.spec, (FGSM[0],)), grid.Task(second.spec, (FGSM[0],))]
    (refusal,) = campaign.carry_out(store, plan)
    assert f"the weights of {first.spec.slug} are not here" in refusal.line
    assert refusal.impossible
    assert store.measurement(second.spec, FGSM[0]) is not None


def test_what_arrives_without_weights_while_the_campaign_runs_is_no_obstacle(network: Path, tmp_path: Path) -> None:
    store = copy_of(network, tmp_path / "store")
    first, second = tasks("table7")
    plan = [grid.Task(first.spec, (FGSM[0],)), grid.Task(second.spec, (FGSM[0],))]

    def arrives(what: str, share: float, detail: str) -> None:
        if what.startswith(first.spec.label) and not store.result(second.spec):
            trained(store, second.spec, epochs(1, 1.0))
            measured(store, second.spec, FGSM[0], 1.0)
            store.file(second.spec, "weights.safetensors").unlink()

    assert campaign.carry_out(store, plan, report=arrives) == []
    assert campaign.rest(store, plan, Estimates(store, CPU)).left == "nothing"


def test_attack_whose_package_is_missing_is_told_and_the_rest_goes_on(
    network: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = copy_of(network, tmp_path / "store")
    first = tasks("table7")[0]
    auto = AttackAccuracy(split="test", attack=AttackSpec(method="AUTOATTACK", eps=0.1, clip=True))
    monkeypatch.setattr(campaign, "find_spec", lambda name: None)
    (refusal,) = campaign.carry_out(store, [grid.Task(first.spec, (auto, FGSM[0]))])
    assert "pip install 'hessnb[attacks]'" in refusal.line
    assert refusal.impossible
    assert store.measurement(first.spec, FGSM[0]) is not None


def test_children_of_a_failed_training_are_left_alone(tmp_path: Path) -> None:
    original, robust, *_ = tasks("table3")
    recipe = replace(original.spec.recipe, lr=1e9)
    wild = original.spec.model_copy(update={"recipe": recipe})
    plan = [grid.Task(wild, (L2,)), grid.Task(robust.spec.model_copy(update={"parent": wild}), (L2,))]
    store = Store(tmp_path / "store")
    assert campaign.carry_out(store, plan) == []
    assert [result.status for result in store.results()] == ["failed"]
    assert campaign.rest(store, plan, Estimates(store, CPU)).left == "nothing"


@contextmanager
def held_elsewhere(store: Store, spec: RunSpec) -> Iterator[threading.Event]:
    """Hold a run as another process would, until the event is set, or to the end."""
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with store.lock(spec):
            held.set()
            done.wait()

    with ThreadPoolExecutor() as other:
        other.submit(hold)
        held.wait()
        try:
            yield done
        finally:
            done.set()


def test_where_another_process_is_faster_nothing_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, plan = Store(tmp_path / "store"), [grid.Task(task.spec, (L2,)) for task in tasks("table7")]
    first, second = (task.spec for task in plan)
    with held_elsewhere(store, first), pytest.raises(Held, match="at work on"):
        run.train_run(store, first, wait=False)
    run.train_run(store, first)
    with held_elsewhere(store, first), pytest.raises(Held, match="at work on"):
        run.measure_run(store, first, L2, wait=False)
    with held_elsewhere(store, first) as done:
        looked, is_held = list[RunSpec](), Store.is_held

        def late(self: Store, spec: RunSpec) -> bool:  # it took the lock after this one has looked
            looked.append(spec)
            return False if looked.count(first) == 1 and spec == first else is_held(self, spec)

        def release(*report: object) -> None:
            if store.measurement(second, L2) is not None:
                done.set()

        monkeypatch.setattr(Store, "is_held", late)
        threading.Timer(20.0, done.set).start()
        assert campaign.carry_out(store, plan, report=release) == []
    assert looked.count(first) > 1
    assert store.measurement(first, L2) is not None


def test_what_another_process_is_at_work_on_is_put_off(tmp_path: Path) -> None:
    store, plan = Store(tmp_path / "store"), [grid.Task(task.spec, (L2,)) for task in tasks("table7")]
    first, second = (task.spec for task in plan)
    assert not store.is_held(first)
    with held_elsewhere(store, first):
        assert store.is_held(first)
        assert not store.is_held(second)
        started = time.monotonic()
        assert campaign.carry_out(store, plan, budget=10.0) == []
        assert 9.5 < time.monotonic() - started < 15.0, "it has waited to the end"
    assert store.result(first) is None
    assert store.measurement(second, L2) is not None
    assert campaign.carry_out(store, plan) == []
    assert store.measurement(first, L2) is not None


def test_of_two_that_others_are_at_work_on_the_one_that_is_free_first_goes_first(tmp_path: Path) -> None:
    store, plan = Store(tmp_path / "store"), [grid.Task(task.spec, ()) for task in tasks("table7")]
    first, second = (task.spec for task in plan)
    order = list[str]()
    with ExitStack() as others:
        let_go_of_first = others.enter_context(held_elsewhere(store, first))
        let_go_of_second = others.enter_context(held_elsewhere(store, second))
        threading.Timer(1.0, let_go_of_second.set).start()

        def report(what: str, share: float, detail: str) -> None:
            if share == 1.0:
                order.append(what)
                let_go_of_first.set()

        assert campaign.carry_out(store, plan, report=report) == []
    assert list(dict.fromkeys(order)) == [f"{second.label}: training", f"{first.label}: training"]


def test_network_that_is_trained_is_built_on_while_another_process_measures_it(tmp_path: Path) -> None:
    original, robust, *_ = tasks("table3")
    store = Store(tmp_path / "store")
    run.train_run(store, original.spec)
    with held_elsewhere(store, original.spec):
        assert campaign.carry_out(store, [grid.Task(robust.spec, ())], budget=60.0) == []
        assert store.result(robust.spec) is not None


def test_alarm_is_put_back(tmp_path: Path) -> None:
    def mine(*args: object) -> None: ...

    earlier = signal.signal(signal.SIGALRM, mine)
    try:
        campaign.carry_out(Store(tmp_path), [], budget=5.0)
        assert signal.getsignal(signal.SIGALRM) is mine
        assert signal.getitimer(signal.ITIMER_REAL)[0] == 0.0
    finally:
        signal.signal(signal.SIGALRM, earlier)


def test_alarm_waits_for_the_end_of_an_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "slowly.py").write_text("import time\ntime.sleep(0.3)\nended = True\n")
    monkeypatch.syspath_prepend(tmp_path)
    began = time.monotonic()
    with pytest.raises(campaign.OutOfTime), campaign._Clock(0.05).alarm():
        importlib.import_module("slowly")
        time.sleep(30)
    assert importlib.import_module("slowly").ended
    assert time.monotonic() - began < 10


# -- real processes ------------------------------------------------------------------------------------------------

servers = multiprocessing.get_context("forkserver")
servers.set_forkserver_preload(["workers"])
KILLS = 8


def contents(root: Path) -> dict[Path, bytes]:
    """Return what is finished: run.json, weights and measures."""
    ended = {path.parent for path in root.glob("runs/*/run.json")}
    return {
        path: path.read_bytes()
        for folder in ended
        for path in (*folder.glob("*.json"), *folder.glob("weights.safetensors"))
    }


def results(root: Path) -> dict[str, Any]:
    store, found = Store(root), dict[str, Any]()
    for result in store.results():
        found[result.spec.slug] = [replace(epoch, seconds=0) for epoch in result.history]
        for one in store.measurements(result.spec):
            found[f"{result.spec.slug}/{one.measure.slug}"] = one.values
    return found


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The results of a campaign that was never stopped."""
    root = tmp_path_factory.mktemp("reference") / "store"
    process = servers.Process(target=workers.campaign, args=(str(root),))
    process.start()
    process.join()
    assert process.exitcode == 0
    return results(root)


def test_campaign_killed_at_random_moments_loses_nothing_that_was_finished(
    tmp_path: Path, reference: dict[str, Any]
) -> None:
    root, chance, before = tmp_path / "store", random.Random(18_10), dict[Path, bytes]()
    for _ in range(KILLS):
        n = len(contents(root))
        process = servers.Process(target=workers.campaign, args=(str(root),))
        process.start()
        while len(list(root.glob("runs/*/*.json"))) <= n and process.is_alive():
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.05))
        assert process.is_alive(), "the last kills must have hit the campaign"
        process.kill()
        process.join()
        now = contents(root)
        assert before.items() <= now.items()
        assert Store(root).check() == []
        before = now
    assert len(before) >= KILLS
    process = servers.Process(target=workers.campaign, args=(str(root),))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert before.items() <= contents(root).items()
    assert results(root) == reference


def test_two_campaigns_with_a_time_limit_share_a_store(tmp_path: Path, reference: dict[str, Any]) -> None:
    root = tmp_path / "store"
    for _ in range(10):
        both = [servers.Process(target=workers.campaign, args=(str(root), 15.0)) for _ in range(2)]
        for process in both:
            process.start()
        for process in both:
            process.join(60)
        assert [process.exitcode for process in both] == [0, 0]
        if (found := results(root)) == reference:
            break
        assert found.items() <= reference.items()
    assert found == reference
