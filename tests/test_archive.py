"""Archives: what is exported comes back byte for byte, and nothing else comes in."""

from __future__ import annotations

import hashlib
import multiprocessing
import shutil
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import workers
from click.testing import CliRunner, Result

from hessnb.cli import main
from hessnb.errors import InputError
from hessnb.experiments import archive, grid, run
from hessnb.experiments.files import seal, unseal
from hessnb.experiments.profile import load_profile
from hessnb.experiments.results import ended, look_up
from hessnb.experiments.spec import RunSpec
from hessnb.experiments.store import Store
from hessnb.training import State

PROFILE = load_profile("smoke")


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store with layers of the smoke profile: two networks, four spectra of each."""
    store = Store(tmp_path_factory.mktemp("full") / "store")
    run.compute(store, grid.artefact("layers").tasks(PROFILE))
    return store


def exported(store: Store, folder: Path, *, weights: bool = True, max_size: int = 15_000_000) -> list[Path]:
    return archive.export(store, folder, "smoke", ended(store, ["layers"], PROFILE), weights=weights, max_size=max_size)


def results(store: Store) -> dict[str, bytes]:
    return {
        f"{path.parent.name}/{path.name}": path.read_bytes()
        for path in store.root.glob("runs/*/*")
        if path.suffix in (".json", ".safetensors")
    }


def copy_of(store: Store, root: Path) -> Store:
    shutil.copytree(store.root, root)
    return Store(root)


@pytest.mark.parametrize("max_size", [15_000_000, 60_000, 20_000])
def test_all_comes_back_byte_for_byte_in_files_of_bounded_size(full: Store, tmp_path: Path, max_size: int) -> None:
    paths = exported(full, tmp_path / "out", max_size=max_size)
    assert (len(paths) > 1) == (max_size < 1_000_000)
    assert all(path.stat().st_size <= max_size for path in paths)
    other = Store(tmp_path / "other")
    done = archive.import_(other, paths)
    assert results(other) == results(full)
    assert (len(done.written), done.there) == (12, 0)
    assert other.check() == []
    assert archive.import_(other, paths) == archive.Imported([], 12)
    assert all(outcome.complete for outcome in look_up(other, grid.artefact("layers").tasks(PROFILE)))


def test_archives_are_put_together_in_whatever_order_they_are_given(full: Store, tmp_path: Path) -> None:
    paths = exported(full, tmp_path / "out", max_size=20_000)
    other = Store(tmp_path / "other")
    archive.import_(other, paths[::-1])
    assert results(other) == results(full)


def test_same_results_give_the_same_bytes(full: Store, tmp_path: Path) -> None:
    first = exported(full, tmp_path / "a", max_size=60_000)
    time.sleep(1.1)  # more than the resolution of a file's date
    second = exported(copy_of(full, tmp_path / "store"), tmp_path / "b", max_size=60_000)
    assert [path.name for path in first] == [path.name for path in second]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    assert first[0].name == f"smoke-1of{len(first)}.zip"
    (tmp_path / "a" / "smoke-wide-1of1.zip").touch()  # of another name
    assert exported(full, tmp_path / "a", max_size=60_000) == first
    with pytest.raises(InputError, match="of another export"):
        exported(full, tmp_path / "a", max_size=15_000_000)
    with pytest.raises(InputError, match="at least"):
        exported(full, tmp_path / "c", max_size=100)


def test_numbers_alone_come_without_weights_which_can_follow(full: Store, tmp_path: Path) -> None:
    other = Store(tmp_path / "other")
    archive.import_(other, exported(full, tmp_path / "numbers", weights=False))
    assert results(other) == {name: c for name, c in results(full).items() if not name.endswith(".safetensors")}
    spec = grid.artefact("layers").tasks(PROFILE)[0].spec
    with pytest.raises(InputError, match="imported without its weights"):
        other.weights(spec)
    assert archive.import_(other, exported(full, tmp_path / "all")).there == 10
    assert results(other) == results(full)


def test_what_is_missing_is_said(full: Store, tmp_path: Path) -> None:
    paths = exported(full, tmp_path / "out", max_size=20_000)
    other = Store(tmp_path / "other")
    for left_out in paths[1:]:
        with pytest.raises(InputError, match="is in none of the files given"):
            archive.import_(other, [path for path in paths if path != left_out])
    assert not other.root.exists()


def test_measures_are_not_merged_into_a_training_that_the_files_do_not_hold(full: Store, tmp_path: Path) -> None:
    paths = exported(full, tmp_path / "out", weights=False, max_size=10_000)
    other = copy_of(full, tmp_path / "other")
    for path in other.root.glob("runs/*/spectrum-*"):
        path.unlink()
    lacking = [path for path in paths if not any(n.endswith("run.json") for n in zipfile.ZipFile(path).namelist())]
    assert lacking
    with pytest.raises(InputError, match="is in none of the files given"):
        archive.import_(other, lacking)


def test_folder_that_cannot_be_made_is_one_line(full: Store) -> None:
    with pytest.raises(InputError, match="cannot write /dev/null/out"):
        exported(full, Path("/dev/null/out"))


def test_same_result_computed_elsewhere_stays_as_it_is(full: Store, tmp_path: Path) -> None:
    other = copy_of(full, tmp_path / "other")
    task = grid.artefact("layers").tasks(PROFILE)[0]
    result, measure = full.result(task.spec), task.measures[0]
    assert result is not None
    history = [replace(epoch, seconds=99.0) for epoch in result.history]
    again = replace(result, history=history, provenance=result.provenance | {"device": "another machine"})
    other.save_result(again, State(1, full.weights(task.spec), [], []))
    measurement = full.measurement(task.spec, measure)
    assert measurement is not None
    other.save_measurement(task.spec, replace(measurement, provenance={"device": "another machine"}))
    before = results(other)
    assert archive.import_(other, exported(full, tmp_path / "out")) == archive.Imported([], 12)
    assert results(other) == before


def test_different_result_is_refused_with_both_origins_and_replaced_when_told(full: Store, tmp_path: Path) -> None:
    other, task = copy_of(full, tmp_path / "other"), grid.artefact("layers").tasks(PROFILE)[0]
    measure = task.measures[0]
    measurement = full.measurement(task.spec, measure)
    assert measurement is not None
    origin = measurement.provenance | {"device": "an abacus"}
    other.save_measurement(task.spec, replace(measurement, values={"eigenvalues": [1.0]}, provenance=origin))
    before, paths = results(other), exported(full, tmp_path / "out")
    with pytest.raises(InputError, match="differ from finished ones") as error:
        archive.import_(other, paths)
    assert "an abacus" in str(error.value)
    assert measurement.provenance["device"] in str(error.value)
    assert results(other) == before
    done = archive.import_(other, paths, replace=True)
    assert done.written == [f"{task.spec.slug}/{measure.slug}.json"]
    assert results(other) == results(full)


def test_replaced_network_takes_with_it_what_was_measured_on_it(full: Store, tmp_path: Path) -> None:
    other, task = copy_of(full, tmp_path / "other"), grid.artefact("layers").tasks(PROFILE)[0]
    result, more = full.result(task.spec), grid.artefact("table7").tasks(PROFILE)[0].measures[2]
    assert result is not None
    history = [replace(epoch, train_loss=0.123) for epoch in result.history]
    other.save_result(replace(result, history=history), State(1, {"w": torch.ones(2)}, [], []))
    run.measure_run(full, task.spec, more)
    measurement = full.measurement(task.spec, more)
    (full.root / "runs" / task.spec.slug / f"{more.slug}.json").unlink()
    assert measurement is not None
    other.save_measurement(task.spec, measurement)
    paths = exported(full, tmp_path / "out")
    with pytest.raises(InputError, match=f"{task.spec.slug}/run.json"):
        archive.import_(other, paths)
    archive.import_(other, paths, replace=True)
    assert results(other) == results(full)
    assert other.measurement(task.spec, more) is None


def test_other_weights_of_the_same_training_are_another_result(full: Store, tmp_path: Path) -> None:
    other, task = copy_of(full, tmp_path / "other"), grid.artefact("layers").tasks(PROFILE)[0]
    result, more = full.result(task.spec), grid.artefact("table7").tasks(PROFILE)[0].measures[2]
    assert result is not None
    weights = {name: tensor + 1 for name, tensor in full.weights(task.spec).items()}
    other.save_result(result, State(1, weights, [], []))
    run.measure_run(other, task.spec, more)
    before, paths = results(other), exported(full, tmp_path / "out")
    with pytest.raises(InputError, match=f"{task.spec.slug}/{archive.WEIGHTS}"):
        archive.import_(other, paths)
    assert results(other) == before
    archive.import_(other, paths, replace=True)
    assert results(other) == results(full)
    assert other.measurement(task.spec, more) is None, "it was measured on the weights that gave way"


def rebuilt(path: Path, edit: Callable[[dict[str, bytes]], Any], *, seal_again: bool = True) -> None:
    """Change the members of an archive; with ``seal_again`` its manifest says that this is right."""
    with zipfile.ZipFile(path) as old:
        members = {name: old.read(name) for name in old.namelist()}
    edit(members)
    if seal_again:
        manifest = unseal(members[archive.MANIFEST], path)
        manifest["members"] = {
            name: {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
            for name, content in members.items()
            if name != archive.MANIFEST
        }
        members[archive.MANIFEST] = seal(manifest)
    with zipfile.ZipFile(path, "w") as new:
        for name, content in members.items():
            new.writestr(name, content)


def _newer(members: dict[str, bytes]) -> None:
    members[archive.MANIFEST] = seal(unseal(members[archive.MANIFEST], "") | {"schema": archive.SCHEMA + 1})


def _first(members: dict[str, bytes], end: str) -> str:
    return sorted(name for name in members if name.endswith(end))[0]


def _moved(members: dict[str, bytes]) -> None:
    name = next(name for name in members if "spectrum" in name)
    members[f"{name.split('/')[0]}/x.json"] = members.pop(name)


def _elsewhere(members: dict[str, bytes]) -> None:
    for name in [name for name in members if "/" in name]:
        members[f"../{name.split('/')[1]}"] = members.pop(name)


def _swapped(members: dict[str, bytes]) -> None:
    one, other = sorted(name for name in members if name.endswith(archive.WEIGHTS))
    members[one], members[other] = members[other], members[one]


def _unknown(members: dict[str, bytes]) -> None:
    name = next(name for name in members if "spectrum" in name)
    body = unseal(members[name], name)
    body["measure"]["kind"] = "horoscope"
    members[name] = seal(body)


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-100]), "is damaged"),
    "no zip": (lambda path: path.write_text("hello"), "is damaged"),
    "absent": (lambda path: path.unlink(), "cannot be read"),
    "a byte": (lambda path: path.write_bytes(path.read_bytes().replace(b"F32", b"F33", 1)), "is damaged"),
    "another zip": (lambda path: rebuilt(path, lambda m: m.pop(archive.MANIFEST), seal_again=False), "no manifest"),
    "a member too few": (
        lambda path: rebuilt(path, lambda m: m.pop(_first(m, "run.json")), seal_again=False), "does not hold what"),
    "a member too many": (lambda path: rebuilt(path, lambda m: m.update(x=b""), seal_again=False), "does not hold"),
    "another content": (
        lambda path: rebuilt(path, lambda m: m.update({_first(m, "run.json"): b"{}"}), seal_again=False), "checksum"),
    "newer": (lambda path: rebuilt(path, _newer, seal_again=False), "newer hessnb"),
    "measure of a newer version": (lambda path: rebuilt(path, _unknown), "unknown kind of measure 'horoscope'"),
    "not sealed": (lambda path: rebuilt(path, lambda m: m.update({_first(m, "run.json"): b"{}"})), "is damaged"),
    "weights of another run": (lambda path: rebuilt(path, _swapped), "weights of another run"),
    "another measure": (lambda path: rebuilt(path, _moved), "its name says"),
    "out of the store": (lambda path: rebuilt(path, _elsewhere), "its name says"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_file_is_one_line_exit_code_two_and_nothing_is_imported(
    full: Store, tmp_path: Path, damage: str
) -> None:
    (path,) = exported(full, tmp_path / "out")
    edit, message = DAMAGE[damage]
    edit(path)
    shown = call("store", "import", path, "--store", tmp_path / "other")
    assert shown.exit_code == 2, shown.output
    assert message in shown.stderr
    assert len(shown.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "other").exists()


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_export_and_import_on_the_command_line(full: Store, tmp_path: Path) -> None:
    options = ["--profile", "smoke", "--store", full.root]
    shown = call("store", "export", tmp_path / "out", "layers", *options, "--weights", "--max-size", "60kB")
    assert shown.exit_code == 0, shown.output
    files: Sequence[Path] = sorted((tmp_path / "out").iterdir())
    assert f"2 network(s) in {len(files)} file(s)" in shown.stdout
    shown = call("store", "import", *files, "--store", tmp_path / "other")
    assert shown.exit_code == 0, shown.output
    assert "12 result(s) imported" in shown.stdout
    assert "0 result(s) imported" in call("store", "import", *files, "--store", tmp_path / "other").stdout
    everything = call("store", "export", tmp_path / "everything", *options)
    assert "2 network(s) in 1 file(s)" in everything.stdout
    shown = call("store", "export", tmp_path / "none", "--store", full.root)  # the default profile is "paper"
    assert shown.exit_code == 2
    assert "no finished run of these under the profile paper" in shown.stderr
    assert not (tmp_path / "none").exists()
    for size in ("15", "MB", "-1MB", "15XB"):
        shown = call("store", "export", tmp_path / "out", *options, "--max-size", size)
        assert shown.exit_code == 2
        assert "15MB" in shown.stderr


@pytest.mark.parametrize("flip", [0x01, 0x0C, 0x80, 0xFF])
def test_any_flipped_byte_is_an_error_that_is_told(tmp_path: Path, flip: int) -> None:
    path, store = tmp_path / "a.zip", Store(tmp_path / "store")
    with zipfile.ZipFile(path, "w") as opened:  # not sealed, so that it is refused even where the flip does no harm
        opened.writestr("manifest.json", b"{}" * 9, compress_type=zipfile.ZIP_DEFLATED)
        opened.writestr("run/weights.safetensors", bytes(100))
    whole = path.read_bytes()
    for i in range(len(whole)):
        path.write_bytes(whole[:i] + bytes([whole[i] ^ flip]) + whole[i + 1 :])
        with pytest.raises(InputError, match=r"a\.zip"):
            archive.import_(store, [path])


def test_damaged_result_is_not_exported(full: Store, tmp_path: Path) -> None:
    store = copy_of(full, tmp_path / "store")
    next(store.root.rglob("weights.safetensors")).write_bytes(b"")
    with pytest.raises(InputError, match="is damaged"):
        exported(store, tmp_path / "out")


def test_of_files_with_a_run_that_another_process_holds_nothing_is_imported(full: Store, tmp_path: Path) -> None:
    paths = exported(full, tmp_path / "out")
    for i, task in enumerate(grid.artefact("layers").tasks(PROFILE)):
        other = Store(tmp_path / f"other{i}")
        with other.lock(task.spec), pytest.raises(InputError, match="another process is at work"):
            archive.import_(other, paths)
        assert results(other) == {}
        archive.import_(other, paths)
        assert results(other) == results(full)


def test_of_files_with_a_run_that_another_process_changes_nothing_is_imported(
    full: Store, tmp_path: Path, before_the_lock: Callable[[Callable[[Store, RunSpec], None]], None]
) -> None:
    other, paths = Store(tmp_path / "other"), exported(full, tmp_path / "out")
    last = max((task.spec for task in grid.artefact("layers").tasks(PROFILE)), key=lambda spec: spec.slug)

    def end(store: Store, spec: RunSpec) -> None:
        result = full.result(spec)
        assert result is not None
        if spec == last:
            store.save_result(replace(result, reason="ended meanwhile"), State(1, {"w": torch.ones(2)}, [], []))

    before_the_lock(end)
    with pytest.raises(InputError, match="another process has just changed .*; import again"):
        archive.import_(other, paths)
    assert [(result.spec, result.reason) for result in other.results()] == [(last, "ended meanwhile")]


servers = multiprocessing.get_context("forkserver")
servers.set_forkserver_preload(["workers"])


def test_import_killed_at_any_moment_leaves_whole_results_and_goes_on(full: Store, tmp_path: Path) -> None:
    paths = [str(path) for path in exported(full, tmp_path / "out")]
    for pause in (0.0, 0.01, 0.02, 0.04):
        root = tmp_path / f"other{pause}"
        process = servers.Process(target=workers.bring, args=(str(root), paths))
        process.start()
        while not list(root.glob("runs/*")) and process.is_alive():
            time.sleep(0.001)
        time.sleep(pause)
        process.kill()
        process.join()
        other = Store(root)
        assert other.check() == []
        there = results(other)
        assert there.items() <= results(full).items()
        for result in other.results():
            assert other.weights(result.spec)
        archive.import_(other, [Path(path) for path in paths])
        assert results(other) == results(full)
        assert not list(root.rglob("runs/*/*.part"))
