"""The record: it publishes only what says where it came from, and the committed one is what it says."""

from __future__ import annotations

import json
import math
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import hessnb
from hessnb.errors import InputError
from hessnb.experiments import grid, provenance, record, run
from hessnb.experiments.profile import load_profile
from hessnb.experiments.results import Measurement, RunResult, ended
from hessnb.experiments.spec import InputCurvature
from hessnb.experiments.store import Store
from hessnb.training import Epoch, State

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store in which layers of the smoke profile has been computed by code that says that it is committed."""
    store = Store(tmp_path_factory.mktemp("smoke") / "store")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(provenance, "COMMIT", COMMIT)
        run.compute(store, grid.artefact("layers").tasks(load_profile("smoke")))
    return store


@pytest.fixture
def folder(smoke: Store, tmp_path: Path) -> Path:
    """A record of that store."""
    record.publish(smoke, tmp_path / "record", "smoke")
    return tmp_path / "record"


def test_committed_record_is_what_it_says() -> None:
    folder = record.record_root()
    assert folder is not None
    assert record.check(folder) == []
    assert list(folder.glob("paper/*/run.json")), "the check has something to check"


def test_record_is_complete_deterministic_and_passes_its_check(smoke: Store, folder: Path) -> None:
    before = {path: path.read_bytes() for path in folder.rglob("*.json")}
    assert record.publish(smoke, folder, "smoke") == record.Published([], [])
    assert record.check(folder) == []
    held = ended(smoke, ["layers"], load_profile("smoke"))
    assert len(before) == sum(1 + len(outcome.measurements) for outcome in held) == 10
    read = record.recorded("layers", "smoke", folder)
    assert [outcome.measurements for outcome in read] == [outcome.measurements for outcome in held]
    for ours, theirs in zip(read, held, strict=True):
        assert ours.result is not None
        assert theirs.result is not None
        for a, b in zip(ours.result.history, theirs.result.history, strict=True):
            assert a.train_loss == pytest.approx(b.train_loss, rel=1e-6)
            assert (a.epoch, a.test_accuracy) == (b.epoch, b.test_accuracy)


def test_some_batch_sizes_of_a_seed_are_published(tmp_path: Path) -> None:
    profile = load_profile("smoke")
    first = grid.artefact("layers").tasks(profile)[0]
    store = Store(tmp_path / "store")
    result = RunResult(first.spec, "done", "", [EPOCH], came_from())
    store.save_result(
        result,
        State(1, {}, [], [EPOCH]),
    )
    assert len(record.publish(store, tmp_path / "record", "smoke").changed) == 1
    assert record.check(tmp_path / "record") == []


@pytest.mark.parametrize("seed", [1, 10**6])
def test_later_seed_is_published_from_a_store_that_holds_it_alone(tmp_path: Path, seed: int) -> None:
    profile = load_profile("smoke")
    (first, *_) = grid.of_seeds([grid.artefact("layers")], profile, [seed])
    store = Store(tmp_path / "store")
    store.save_result(RunResult(first.spec, "done", "", [EPOCH], came_from(seed=seed)), State(1, {}, [], [EPOCH]))
    (path,) = record.publish(store, tmp_path / "record", "smoke", ["layers"]).changed
    assert path.parent.name == first.spec.slug
    assert record.check(tmp_path / "record") == []
    (outcome,) = record.recorded("layers", "smoke", tmp_path / "record")
    assert outcome.task.spec == first.spec
    assert ended(store, ["layers"], profile)[0].result == store.result(first.spec)


EPOCH = Epoch(1, 0.05, 1.2345678901234, 0.5, 1.0, 0.5, 0.1234567890123)


def came_from(**changes: Any) -> dict[str, Any]:
    return {
        "commit": COMMIT, "date": "2026-01-02T03:04:05+00:00", "device": "a machine", "torch": "2.13.0", "seed": 0,
        "seconds": 1.5, **changes,
    }  # fmt: skip


@pytest.mark.parametrize("name", ["own", "laptop.toml"])
def test_profiles_of_ones_own_stay_out(smoke: Store, tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=f"'{name}' is none of these"):
        record.publish(smoke, tmp_path / "record", name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("commit", [None, f"{COMMIT}+changes", "abc"])
def test_what_uncommitted_code_computed_stays_out(smoke: Store, tmp_path: Path, commit: str | None) -> None:
    profile = load_profile("smoke")
    first, second = (smoke.result(task.spec) for task in grid.artefact("layers").tasks(profile))
    assert first is not None
    assert second is not None
    store = Store(tmp_path / "store")
    store.save_result(replace(first, provenance=first.provenance | {"commit": commit}), State(1, {}, [], []))
    store.save_result(second, State(1, {}, [], []))
    measure = grid.artefact("layers").tasks(profile)[1].measures[0]
    found = smoke.measurement(second.spec, measure)
    assert found is not None
    store.save_measurement(second.spec, replace(found, provenance=found.provenance | {"commit": commit}))
    published = record.publish(store, tmp_path / "record", "smoke")
    assert [path.parent.name for path in published.changed] == [second.spec.slug]
    assert len(published.refused) == 2
    assert first.spec.slug in published.refused[0]
    assert measure.slug in published.refused[1]
    assert record.check(tmp_path / "record") == []


def test_measures_of_another_training_do_not_stay_beside_a_new_one(smoke: Store, folder: Path, tmp_path: Path) -> None:
    profile = load_profile("smoke")
    task = grid.artefact("layers").tasks(profile)[0]
    result, before = smoke.result(task.spec), {path: path.read_bytes() for path in folder.rglob("*.json")}
    assert result is not None
    other, found = Store(tmp_path / "other"), [smoke.measurement(task.spec, measure) for measure in task.measures]
    history = [replace(epoch, train_loss=epoch.train_loss * 1.01) for epoch in result.history]
    other.save_result(replace(result, history=history), State(1, smoke.weights(task.spec), [], []))
    published = record.publish(other, folder, "smoke")
    assert published.changed == []
    assert "was measured on another training of it" in published.refused[0]
    assert {path: path.read_bytes() for path in folder.rglob("*.json")} == before
    for measurement in found:
        assert measurement is not None
        other.save_measurement(task.spec, measurement)
    assert [path.name for path in record.publish(other, folder, "smoke").changed] == ["run.json"]
    again = replace(result, provenance=result.provenance | {"device": "another machine"})
    third = Store(tmp_path / "third")
    third.save_result(replace(again, history=history), State(1, smoke.weights(task.spec), [], []))
    changed = record.publish(third, folder, "smoke").changed
    assert [path.name for path in changed] == ["run.json"], "the same training"


def test_values_that_are_not_finite_stay_out(smoke: Store, tmp_path: Path) -> None:
    task = grid.artefact("layers").tasks(load_profile("smoke"))[0]
    result, found = smoke.result(task.spec), smoke.measurement(task.spec, task.measures[0])
    assert result is not None
    assert found is not None
    store = Store(tmp_path / "store")
    store.save_result(result, State(1, {}, [], []))
    store.save_measurement(task.spec, replace(found, values={"eigenvalues": [float("inf")]}))
    published = record.publish(store, tmp_path / "record", "smoke")
    assert "not finite" in published.refused[0]
    assert record.check(tmp_path / "record") == []


@pytest.mark.parametrize(
    ("changed", "fault"),
    [
        ({"date": "2026-01-02T03:04:05"}, "no date"),
        ({"seconds": math.inf}, "seconds inf"),
        ({"seconds": -1.0}, "seconds -1.0"),
    ],
)
def test_origin_without_a_time_zone_or_a_time_that_can_be_is_none(changed: dict[str, Any], fault: str) -> None:
    assert record._untold(came_from(), 0) == []
    (told,) = record._untold(came_from(**changed), 0)
    assert fault in told


def change(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    body = json.loads(path.read_text())
    edit(body)
    path.write_bytes(record.serialised(body))


def _rename(path: Path) -> None:
    path.rename(path.with_name("spectrum-train-k5-0000000000000000.json"))


FAULTS: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "changed by hand, not as the record writes": (
        "spectrum*", lambda path: path.write_text(path.read_text().replace(": ", ":", 1)), "formatting"),
    "truncated": ("spectrum*", lambda path: path.write_bytes(path.read_bytes()[:50]), "cannot be read"),
    "not a measurement": ("spectrum*", lambda path: path.write_text("{}\n"), "does not hold a measurement"),
    "no provenance": ("spectrum*", lambda path: change(path, lambda body: body.update(provenance={})), "commit"),
    "uncommitted": (
        "spectrum*", lambda path: change(path, lambda b: b["provenance"].update(commit=COMMIT + "+changes")), "commit"),
    "no date": ("run.json", lambda path: change(path, lambda b: b["provenance"].update(date="today")), "no date"),
    "no machine": ("run.json", lambda path: change(path, lambda b: b["provenance"].update(device="")), "no device"),
    "no torch": ("run.json", lambda path: change(path, lambda b: b["provenance"].pop("torch")), "no torch"),
    "another seed": ("run.json", lambda path: change(path, lambda b: b["provenance"].update(seed=7)), "seed 7"),
    "no seconds": ("run.json", lambda path: change(path, lambda b: b["provenance"].pop("seconds")), "seconds"),
    "a number that is none": (
        "spectrum*", lambda path: change(path, lambda b: b["values"].update(eigenvalues=[float("nan")])), "not finite"),
    "another name": ("spectrum*", _rename, "the file's name says"),
    "measure of no artefact": (
        "spectrum*", lambda path: change(path, lambda b: b["measure"].update(tol=0.5)), "needs this measure"),
    "run of no artefact": (
        "run.json", lambda path: change(path, lambda b: b["spec"]["recipe"].update(lr=0.77)), "needs this run"),
    "no run": ("run.json", lambda path: path.unlink(), "a measure without its run"),
    "another file": ("run.json", lambda path: (path.parent / "notes.txt").write_text("mine"), "does not belong here"),
    "another folder": ("run.json", lambda path: path.parent.rename(path.parents[2] / "mine"), "does not belong here"),
    "too much": ("run.json", lambda path: path.write_bytes(b"1" * (record.LARGEST + 1)), "more than"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_check_finds(fault: str, folder: Path) -> None:
    pattern, damage, message = FAULTS[fault]
    path = sorted(folder.rglob(pattern))[0]
    damage(path)
    found = record.check(folder)
    assert any(message in line for line in found), found


def test_curves_are_compact_and_rounded_and_other_numbers_are_not() -> None:
    few, plane = [1 / 3] * 50, [[i / 7 + j / 3 for i in range(20)] for j in range(20)]
    body = {"values": {"few": few, "plane": plane, "one": 1 / 3, "mixed": [{"a": 1 / 3}] * 60}, "n": [1, True]}
    text = record.serialised(body).decode()
    again = json.loads(text)
    assert again["values"]["few"] == few
    assert again["values"]["one"] == 1 / 3
    assert again["values"]["mixed"] == body["values"]["mixed"]  # type: ignore[index]
    for row, expected in zip(again["values"]["plane"], plane, strict=True):
        assert row == pytest.approx(expected, rel=1e-6)
        assert row != expected
    assert len([line for line in text.splitlines() if '"plane"' in line or "[[" in line]) == 1
    assert record.serialised(again).decode() == text, "rounding once is rounding for good"
    short = {"values": {"few": few, "name": "x", "none": None}, "empty": [], "nothing": {}}
    assert record.serialised(short).decode() == json.dumps(short, indent=1, sort_keys=True) + "\n"


def test_history_takes_a_line_for_each_epoch() -> None:
    text = record.serialised({"history": [vars(EPOCH), vars(EPOCH)]}).decode()
    assert len(text.splitlines()) == 6
    assert '"train_loss":1.234568' in text
    assert '"seconds":0.1234568' in text


def test_benchmarks_are_checked_too(tmp_path: Path) -> None:
    def write(rows: list[dict[str, Any]]) -> list[str]:
        (tmp_path / record.BENCHMARKS).write_text(json.dumps({"rows": rows}, indent=1, sort_keys=True) + "\n")
        return record.check(tmp_path)

    row = {"name": "a", "our_seconds": 1.0, "provenance": came_from()}
    assert write([row, {**row, "name": "b"}]) == []
    assert "not sorted" in write([row, row])[0]
    assert "no provenance" in write([{"name": "a"}])[0]
    assert "commit" in write([{**row, "provenance": came_from(commit=None)}])[0]
    assert "not finite" in write([{**row, "our_seconds": float("inf")}])[0]
    (tmp_path / record.BENCHMARKS).write_text(json.dumps({"rows": [row]}))
    assert "formatting" in record.check(tmp_path)[0]


def test_provenance_is_one_line_that_says_all(smoke: Store) -> None:
    (outcome, *_) = ended(smoke, ["layers"], load_profile("smoke"))
    measurement = next(iter(outcome.measurements.values()))
    text = provenance.line(outcome.task.spec.label, measurement.provenance)
    assert text.startswith("M1-mnist5k-b20-s0, seed 0, commit 0123456789, ")
    told = measurement.provenance
    assert text.endswith(f"{told['device']}, {told['date'][:10]}, {told['seconds']:,.1f} s")
    changed = provenance.line("x", {"commit": f"{COMMIT}+changes", "threads": 4, "device": "a machine"})
    assert changed == "x, seed unknown, commit 0123456789+changes, a machine (4 threads), date unknown, time unknown"
    assert provenance.line("x", {}) == "x, seed unknown, commit unknown, machine unknown, date unknown, time unknown"


def test_commit_is_that_of_the_packages_own_repository_and_tells_of_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "hessnb" / "__init__.py"
    package.parent.mkdir()
    package.write_text("")
    monkeypatch.setattr(hessnb, "__file__", str(package))

    def git(*args: str) -> str:
        author = ("-c", "user.name=x", "-c", "user.email=x@example.org")
        command = ["git", "-C", str(tmp_path), *author, *args]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    assert provenance._commit() is None, "there is no repository"
    git("init", "-q")
    assert provenance._commit() is None, "a copy in somebody else's repository"
    git("add", ".")
    git("commit", "-q", "-m", "x")
    head = git("rev-parse", "HEAD")
    assert provenance._commit() == head
    package.write_text("x = 1\n")
    assert provenance._commit() == f"{head}+changes"


def test_recorded_measure_that_is_missing_is_none(folder: Path) -> None:
    task = grid.artefact("layers").tasks(load_profile("smoke"))[0]
    read: Measurement | None = record.Record(folder / "smoke").measurement(task.spec, InputCurvature(split="test"))
    assert read is None
