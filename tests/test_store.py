"""The store: what it keeps, what it refuses, and that a damaged file is one clear line."""

from __future__ import annotations

import errno
import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hessnb.errors import InputError
from hessnb.experiments import store as module
from hessnb.experiments.files import read_tensors, seal, write_whole
from hessnb.experiments.results import Measurement, RunResult
from hessnb.experiments.spec import DataSpec, ModelSpec, RunSpec, Spectrum
from hessnb.experiments.store import Spent, Store
from hessnb.training import Epoch, Recipe, State

SPEC = RunSpec(
    data=DataSpec(name="mnist5k", n_train=100),
    model=ModelSpec(name="M1", width=0.1),
    recipe=Recipe(batch_size=10, lr=0.1, momentum=0.9, max_epochs=3, seed=0),
)
MEASURE = Spectrum(split="train", k=2, tol=1e-3)
HISTORY = [Epoch(1, 0.1, 2.0, 0.25, 2.1, 0.2, 0.5), Epoch(2, 0.1, 1.0, 0.75, 1.5, 0.5, 0.5)]
STATE = State(2, {"weight": torch.arange(6.0).view(2, 3), "steps": torch.tensor(7)}, [torch.ones(2, 3)], HISTORY)
RESULT = RunResult(SPEC, "done", "3 epochs done", HISTORY, {"commit": None, "seconds": 1.0})
MEASUREMENT = Measurement(MEASURE, {"eigenvalues": [0.1 + 0.2, -1e-300]}, {"seconds": 0.25})


@pytest.fixture
def full(tmp_path: Path) -> Store:
    """A store with one result, one measurement, and the checkpoint of another run."""
    store = Store(tmp_path / "store")
    store.save_result(RESULT, STATE)
    store.save_measurement(SPEC, MEASUREMENT)
    store.save_checkpoint(other(), STATE)
    return store


def other() -> RunSpec:
    return SPEC.model_copy(update={"data": DataSpec(name="mnist5k", n_train=200)})


def test_everything_comes_back_bit_for_bit(full: Store) -> None:
    again = Store(full.root)
    assert again.result(SPEC) == RESULT
    assert again.measurement(SPEC, MEASURE) == MEASUREMENT
    assert list(again.results()) == [RESULT]
    assert list(again.measurements(SPEC)) == [MEASUREMENT]
    weights = again.weights(SPEC)
    assert all(torch.equal(weights[name], tensor) for name, tensor in STATE.model.items())
    state = again.checkpoint(other())
    assert state is not None
    assert (state.epoch, state.history) == (2, HISTORY)
    assert torch.equal(state.momentum[0], STATE.momentum[0])
    assert again.check() == []


def test_momenta_come_back_in_their_order_also_beyond_the_tenth(tmp_path: Path) -> None:
    store, momentum = Store(tmp_path / "store"), [torch.tensor([float(i)]) for i in range(12)]
    store.save_checkpoint(SPEC, replace(STATE, momentum=momentum))
    state = store.checkpoint(SPEC)
    assert state is not None
    assert [float(tensor) for tensor in state.momentum] == list(range(12))


def test_what_is_not_there_is_none(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    assert store.result(SPEC) is None
    assert store.measurement(SPEC, MEASURE) is None
    assert store.checkpoint(SPEC) is None
    with pytest.raises(InputError, match="has not been trained"):
        store.weights(SPEC)
    assert not store.root.exists(), "looking must not create anything"


def test_result_ends_the_checkpoint(full: Store) -> None:
    full.save_result(RunResult(other(), "done", "", HISTORY, {}), STATE)
    assert full.checkpoint(other()) is None


def test_training_anew_ends_what_was_measured_on_the_one_before(full: Store) -> None:
    full.save_result(RESULT, STATE)
    assert full.measurement(SPEC, MEASURE) is not None, "kept again, it is the same training"
    full.save_partial(SPEC, MEASURE, {"left": torch.ones(1)})
    full.file(SPEC, "run.json").unlink()
    full.save_result(RESULT, STATE)
    assert full.names(SPEC) == {"run", "weights"}
    assert full.partial(SPEC, MEASURE) is None


def test_check_passes_over_what_another_process_removes_or_replaces(
    full: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = list[Path]()

    def replaced_meanwhile(path: Path) -> Any:
        reads.append(path)
        if path.name == "weights.safetensors" and reads.count(path) == 1:
            raise InputError("half of one file and half of another")
        if path.name == "checkpoint.safetensors":
            path.unlink()
        return read_tensors(path)

    monkeypatch.setattr(module, "read_tensors", replaced_meanwhile)
    assert full.check() == []
    assert len(reads) == 3


def test_numbers_from_elsewhere_leave_a_training_under_way(full: Store) -> None:
    seal_of = (full.root / "runs" / SPEC.slug / "run.json").read_bytes()
    full.save_checkpoint(SPEC, STATE)
    (full.root / "runs" / SPEC.slug / "weights.safetensors").unlink()
    assert [spec for spec, *_ in full.under_way()] == [other()], "it has ended elsewhere"
    full.adopt(SPEC, {"run.json": seal_of})
    assert full.checkpoint(SPEC) is not None, "its weights are nowhere else"


def test_store_of_which_only_the_locks_were_made_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Path] = []
    whole = Path.mkdir

    def killed(path: Path, *args: Any, **kwargs: Any) -> None:
        if made and path.name == SPEC.slug:
            raise KeyboardInterrupt
        made.append(path)
        whole(path, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", killed)
    with pytest.raises(KeyboardInterrupt):
        Store(tmp_path / "store").save_checkpoint(SPEC, STATE)
    monkeypatch.undo()
    Store(tmp_path / "store").save_checkpoint(SPEC, STATE)


@contextmanager
def killed_after_the_first(owner: object, name: str) -> Iterator[list[str]]:
    """Let the first call of what places or removes a file through and stop the second; tell which file it was."""
    done, whole = list[str](), getattr(owner, name)

    def killed(*args: Any, **kwargs: Any) -> None:
        if done:
            raise KeyboardInterrupt
        done.append(next(arg for arg in reversed(args) if isinstance(arg, Path)).name)
        whole(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(owner, name, killed)
        yield done


def test_run_is_not_there_before_its_weights_are(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    store.save_checkpoint(SPEC, STATE)
    with killed_after_the_first(os, "replace") as placed:
        store.save_result(RESULT, STATE)
    assert placed == ["weights.safetensors"]
    assert store.result(SPEC) is None
    assert store.checkpoint(SPEC) is not None, "it goes on from there"


def test_run_that_gives_way_goes_before_what_belongs_to_it(full: Store) -> None:
    body = full.file(SPEC, "run.json").read_bytes()
    with killed_after_the_first(Path, "unlink") as gone:
        full.adopt(SPEC, {"run.json": body}, anew=True)
    assert gone == ["run.json"]
    assert full.result(SPEC) is None, "what is left of it belongs to no result"


def test_check_of_a_store_that_is_not_there_says_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not there"):
        Store(tmp_path / "stroe").check()


def test_failed_training_is_kept_with_its_history_and_without_weights(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.save_result(RunResult(SPEC, "failed", "diverged", HISTORY, {}), STATE)
    found = store.result(SPEC)
    assert found is not None
    assert (found.status, found.history) == ("failed", HISTORY)
    with pytest.raises(InputError):
        store.weights(SPEC)


def files(store: Store) -> list[Path]:
    return sorted(path for path in store.root.rglob("*") if path.suffix in (".json", ".safetensors"))


def read_all(store: Store) -> None:
    again = Store(store.root)
    again.result(SPEC)
    again.measurement(SPEC, MEASURE)
    again.weights(SPEC)
    again.checkpoint(other())


@pytest.mark.parametrize("index", range(5))
@pytest.mark.parametrize("damage", ["truncated", "emptied", "one byte changed", "other content"])
def test_damaged_file_is_one_line_that_names_it_and_the_remedy(full: Store, index: int, damage: str) -> None:
    path = files(full)[index]
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        content = content[: len(content) // 2]
    elif damage == "emptied":
        content = bytearray()
    elif damage == "one byte changed":
        place = content.index(b"weight") if path.name == "weights.safetensors" else content.index(b'"') + 1
        content[place] ^= 0x20
    else:
        content = bytearray(b'{"sha256": "0", "body": {}}')
    path.write_bytes(content)
    with pytest.raises(InputError) as error:
        read_all(full)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value).strip()
    assert ("and its network is trained" if path.name == "weights.safetensors" else "remove it") in str(error.value)
    if path.name != "store.json":
        assert len(full.check()) == 1


def test_change_in_the_name_or_the_numbers_of_a_tensor_is_noticed(full: Store) -> None:
    path = next(full.root.rglob("weights.safetensors"))
    whole = path.read_bytes()
    number = bytearray(whole)
    number[-2] ^= 1
    for changed in (whole.replace(b'"weight"', b'"weighu"'), number):
        assert changed != whole
        path.write_bytes(changed)
        with pytest.raises(InputError, match="checksum"):
            full.weights(SPEC)


def test_store_of_a_newer_schema_is_refused(full: Store) -> None:
    body = {"schema": module.SCHEMA + 1}
    (full.root / "store.json").write_bytes(seal(body))
    with pytest.raises(InputError, match="newer hessnb"):
        Store(full.root)


@pytest.mark.parametrize("kind", ["a file", "a folder of other things"])
def test_something_else_in_the_place_of_the_store_is_refused(tmp_path: Path, kind: str) -> None:
    place = tmp_path / "place"
    if kind == "a file":
        place.write_text("mine")
    else:
        place.mkdir()
        (place / "thesis.tex").write_text("mine")
    with pytest.raises(InputError, match="neither a store nor an empty folder"):
        Store(place)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
@pytest.mark.parametrize("call", ["mkstemp", "fsync", "replace"])
def test_disk_that_refuses_a_write_leaves_what_was_there(
    full: Store, monkeypatch: pytest.MonkeyPatch, code: int, call: str
) -> None:
    before = {path: path.read_bytes() for path in files(full)}

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(tempfile if call == "mkstemp" else os, call, refuse)
    writes: list[Callable[[], None]] = [
        lambda: full.save_checkpoint(other(), STATE),
        lambda: full.save_measurement(SPEC, MEASUREMENT),
        lambda: full.save_result(RESULT, STATE),
    ]
    for write in writes:
        with pytest.raises(InputError, match=os.strerror(code)) as error:
            write()
        assert "choose another folder" in str(error.value)
    monkeypatch.undo()
    assert {path: path.read_bytes() for path in files(full)} == before
    assert not list(full.root.rglob("*.part"))


def test_file_is_on_the_disk_before_it_has_its_name_and_then_its_name_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done, fsync, rename = list[tuple[str, object]](), os.fsync, os.replace

    def synced(descriptor: int) -> None:
        found = os.fstat(descriptor)
        done.append(("folder", found.st_ino) if stat.S_ISDIR(found.st_mode) else ("file", found.st_size))
        fsync(descriptor)

    def renamed(source: str, target: Path) -> None:
        done.append(("rename", target.name))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    write_whole(tmp_path / "run.json", b"whole")
    assert done == [("file", 5), ("rename", "run.json"), ("folder", tmp_path.stat().st_ino)]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_interrupted_write_leaves_no_part_behind(full: Store, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, call, interrupted)
    with pytest.raises(KeyboardInterrupt):
        full.save_measurement(SPEC, MEASUREMENT)
    monkeypatch.undo()
    assert not list(full.root.rglob("*.part"))
    assert full.measurement(SPEC, MEASURE) == MEASUREMENT


def test_what_a_measure_has_under_way_stays_until_its_result_is_there(
    full: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    spent = Spent(kept=3.0, lost=5.0)
    full.save_partial(SPEC, MEASURE, {"basis": torch.ones(2)})
    full.save_spent(SPEC, MEASURE, spent)

    def refused(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refused)
        with pytest.raises(InputError):
            full.save_measurement(SPEC, MEASUREMENT)
    assert full.partial(SPEC, MEASURE) is not None
    assert full.spent(SPEC, MEASURE) == spent
    full.save_measurement(SPEC, MEASUREMENT)
    assert full.partial(SPEC, MEASURE) is None
    assert full.spent(SPEC, MEASURE) == Spent()


def test_store_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = Store(tmp_path / "file" / "store")
    with pytest.raises(InputError, match="cannot write"):
        store.save_measurement(SPEC, MEASUREMENT)


def test_lock_sweeps_what_a_killed_writer_left(full: Store) -> None:
    leftover = next(full.root.rglob("run.json")).parent / ".run.json.abc.part"
    leftover.write_bytes(b"half")
    with full.lock(SPEC):
        assert not leftover.exists()


def test_root_is_the_argument_then_the_variable_then_the_users_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HESSNB_STORE", str(tmp_path / "variable"))
    assert module.store_root(tmp_path / "argument") == tmp_path / "argument"
    assert module.store_root() == tmp_path / "variable"
    monkeypatch.delenv("HESSNB_STORE")
    assert module.store_root().parts[-2:] == ("hessnb", "store")
