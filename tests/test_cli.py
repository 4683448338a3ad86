"""The command line: what it says, its exit codes, and one line for each kind of bad input."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from hessnb.cli import main
from hessnb.experiments import grid, provenance, status
from hessnb.experiments.profile import load_profile
from hessnb.experiments.results import RunResult
from hessnb.experiments.store import Store
from hessnb.training import Epoch, State

SMOKE = ["--profile", "smoke"]


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store in which table7 has been computed by code that says that it is committed."""
    root = tmp_path_factory.mktemp("cli") / "store"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(provenance, "COMMIT", "0" * 40)
        done = call("run", "table7", "fig1", *SMOKE, "--store", root)
    assert done.exit_code == 0, done.output
    assert "4 of 4 networks" in done.stdout
    return root


def test_help_of_every_command_teaches(monkeypatch: pytest.MonkeyPatch) -> None:
    text = call("--help").stdout
    assert "Exit codes" in text
    for command in main.commands:
        assert command in text
        told = call(command, "--help")
        assert told.exit_code == 0
        assert len(told.stdout.splitlines()) > 4


def test_status_shows_what_is_there(store: Path) -> None:
    shown = call("status", *SMOKE, "--store", store)
    assert shown.exit_code == 0
    assert "there" in shown.stdout
    measures = sum(len(task.measures) for task in grid.artefact("table7").tasks(load_profile("smoke"), 1))
    assert f"{measures}/{measures}" in shown.stdout
    every = call("status", "--all", "--store", store)
    assert all(profile in every.stdout for profile in ("smoke", "quick", "laptop", "paper"))


@pytest.mark.parametrize("width", [80, 40])
def test_status_cuts_no_word_however_narrow(store: Path, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    shown = call("status", "--all", "--store", store).stdout
    assert "…" not in shown
    rows = [line.strip("│").split()[0] for line in shown.splitlines() if line.startswith("│")]
    names = [row for row in rows if row != "│"]
    assert names == [*grid.ARTEFACTS, status.TOGETHER] * 4


def test_record_publishes_and_then_has_nothing_more_to_do(store: Path, tmp_path: Path) -> None:
    first = call("record", *SMOKE, "--store", store, "--into", tmp_path)
    assert first.exit_code == 0, first.output
    tasks = grid.plan([grid.artefact(name) for name in ("table7", "fig1")], load_profile("smoke"))
    assert f"{sum(1 + len(task.measures) for task in tasks)} file(s) changed" in first.stdout
    for names in ([], ["all"], ["fig1", "all"]):
        assert "0 file(s) changed" in call("record", *names, *SMOKE, "--store", store, "--into", tmp_path).stdout


@pytest.mark.parametrize("names", [["all"], ["fig1", "all"]])
def test_export_of_all_is_export_without_a_name(store: Path, tmp_path: Path, names: list[str]) -> None:
    for folder, artefacts in (("one", []), ("other", names)):
        shown = call("store", "export", tmp_path / folder, *artefacts, *SMOKE, "--store", store)
        assert shown.exit_code == 0, shown.output
    one, other = ([path.read_bytes() for path in sorted((tmp_path / f).iterdir())] for f in ("one", "other"))
    assert one == other


def test_record_check_says_what_is_wrong(store: Path, tmp_path: Path) -> None:
    call("record", *SMOKE, "--store", store, "--into", tmp_path)
    assert call("record", "--check", "--into", tmp_path).exit_code == 0
    path = next(tmp_path.rglob("FGSM*.json"))
    path.write_text(path.read_text().replace("0" * 40, "by hand"))
    shown = call("record", "--check", "--into", tmp_path)
    assert shown.exit_code == 2
    assert f"{path}: commit 'by hand'" in shown.stderr


def test_time_budget_ends_with_what_is_left_and_the_next_call_goes_on(tmp_path: Path) -> None:
    command = ["run", "table3", *SMOKE, "--store", tmp_path / "store", "--time-budget"]
    shown = call(*command, "1s")
    assert shown.exit_code == 0, shown.output
    assert "of 6 networks trained, " in shown.stdout
    assert "the same command goes on from here" in shown.stdout
    shown = call(*command, "10m")
    assert shown.exit_code == 0, shown.output
    assert "6 of 6 networks trained and measured" in shown.stdout


def test_run_without_a_name_or_with_all_is_the_whole_grid(tmp_path: Path) -> None:
    tasks = grid.plan(list(grid.ARTEFACTS.values()), load_profile("smoke"))
    measures = sum(len(task.measures) for task in tasks)
    for names in ([], ["all"], ["fig1", "all"]):
        shown = call("run", *names, *SMOKE, "--store", tmp_path / "store", "--time-budget", "0.01s")
        assert shown.exit_code == 0, shown.output
        assert f"0 of {len(tasks)} networks trained, 0 of {measures} measures" in shown.stdout


def test_missing_weights_are_bad_input(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    for task in grid.artefact("layers").tasks(load_profile("smoke")):
        epoch = Epoch(1, 0.1, 1.0, 0.5, 1.0, 0.5, 1.0)
        store.save_result(RunResult(task.spec, "done", "", [epoch], {}), State(1, {"w": torch.ones(1)}, [], [epoch]))
        store.file(task.spec, "weights.safetensors").unlink()
    shown = call("run", "layers", *SMOKE, "--store", store.root)
    assert shown.exit_code == 2
    assert "measure(s) cannot be taken here: see above" in shown.stderr


def test_store_check_finds_a_damaged_file(store: Path) -> None:
    assert call("store", "check", "--store", store).exit_code == 0
    path = next(store.rglob("run.json"))
    content = path.read_bytes()
    try:
        path.write_bytes(content[:100])
        shown = call("store", "check", "--store", store)
        assert shown.exit_code == 2
        assert str(path) in shown.stderr
    finally:
        path.write_bytes(content)


def test_names_with_brackets_are_shown_as_they_are(tmp_path: Path) -> None:
    shown = call("data", "list", "--root", tmp_path / "a[/b]")
    assert shown.exit_code == 0
    odd = tmp_path / "a[red]b"
    assert call("run", "layers", *SMOKE, "--store", odd).exit_code == 0
    assert "a[red]b: every file is whole" in call("store", "check", "--store", odd).stdout.replace("\n", "")
    mine = tmp_path / "a[/b]" / "mine.toml"
    mine.parent.mkdir(parents=True)
    mine.write_text(PROFILE)
    shown = call("status", "--profile", mine, "--store", tmp_path / "store")
    assert shown.exit_code == 0, shown.output
    assert "a[/b]/mine.toml" in "".join(shown.stdout.split())


def test_names_with_colons_are_no_emoji(tmp_path: Path) -> None:
    odd = tmp_path / ":x:"
    (odd / "locks").mkdir(parents=True)
    assert ":x:: every file is whole" in call("store", "check", "--store", odd).stdout
    assert ":x:" in call("data", "list", "--root", odd).stdout.replace("\n", "")


def test_data_list_names_every_set_and_how_to_get_it(tmp_path: Path) -> None:
    shown = call("data", "list", "--root", tmp_path)
    assert shown.exit_code == 0
    assert "hessnb data fetch cifar100" in shown.stdout
    assert "mnistm5k" in shown.stdout


BAD: dict[str, tuple[list[object], str]] = {
    "artefact": (["run", "table99", *SMOKE], "unknown artefact 'table99'"),
    "artefact beside all": (["run", "all", "table99", *SMOKE], "unknown artefact 'table99'"),
    "profile": (["run", "table7", "--profile", "huge"], "unknown profile 'huge'"),
    "profile file": (["run", "table7", "--profile", "absent.toml"], "absent.toml cannot be read"),
    "seeds": (["run", "table7", *SMOKE, "--seeds", 0], "seeds = 0"),
    "time": (["run", "table7", *SMOKE, "--time-budget", "soon"], "time 'soon' cannot be read"),
    "endless time": (["run", "table7", *SMOKE, "--time-budget", "99999999999h"], "longer than a year"),
    "too many seeds": (["status", *SMOKE, "--seeds", 20000], "seeds = 20000"),
    "seeds of the book": (["book", *SMOKE, "--seeds", 0], "seeds = 0"),
    "nothing to export": (["store", "export", "never", *SMOKE], "holds no finished run"),
    "record that is not there": (["record", "--check", "--into", "never"], "never is no folder"),
    "check of a part": (["record", "table7", "--check"], "--check is of the whole record"),
    "size": (["store", "export", "never", *SMOKE, "--max-size", "much"], "size 'much' cannot be read"),
    "size in strange digits": (["store", "export", "never", *SMOKE, "--max-size", "²MB"], "size '²MB' cannot be read"),
    "export artefact": (["store", "export", "never", "fig99", *SMOKE], "unknown artefact 'fig99'"),
    "chapter": (["book", "42", *SMOKE], "unknown chapter '42'"),
    "data set": (["data", "fetch", "imagenet"], "unknown data set 'imagenet'"),
    "data that comes with the package": (["data", "fetch", "mnist5k"], "needs no download"),
    "device": (["run", "table7", *SMOKE, "--device", "abacus"], "device 'abacus' cannot be used here"),
    "device without numbers": (["run", "table7", *SMOKE, "--device", "meta"], "meta is neither cpu nor cuda"),
    "store that is not there": (["store", "check"], "is not there"),
    "record of a profile of one's own": (["record", "--profile", "mine.toml"], "'mine.toml' is none of these"),
    "record artefact": (["record", "fig99", *SMOKE], "unknown artefact 'fig99'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_two(case: str, tmp_path: Path) -> None:
    arguments, message = BAD[case]
    with_store = [] if arguments[0] == "data" else ["--store", tmp_path / "store"]
    shown = call(*arguments, *with_store)
    assert shown.exit_code == 2
    assert message in shown.stderr
    assert len(shown.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("option", "command"),
    [
        ("--store", ["status", *SMOKE]),
        ("--store", ["run", "table7", *SMOKE]),
        ("--store", ["store", "check"]),
        ("--into", ["record", "--check"]),
        ("--root", ["data", "list"]),
        ("--root", ["data", "fetch", "mnist"]),
    ],
)
def test_empty_folder_is_not_the_current_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str, command: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shown = call(*command, option, "")
    assert shown.exit_code == 2
    assert shown.stderr == f"hessnb: {option} is empty (an unset variable?): name a folder, or leave the option out\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_without_a_gpu_is_bad_input(tmp_path: Path) -> None:
    for command in (["run", "table7"], ["book"]):
        shown = call(*command, *SMOKE, "--device", "cuda", "--store", tmp_path)
        assert shown.exit_code == 2
        assert "device 'cuda' cannot be used here" in shown.stderr


PROFILE = (Path(__file__).parents[1] / "hessnb" / "experiments" / "profiles" / "smoke.toml").read_text()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("batch_sizes = [20, 100]", "batch_sizes = [0]", "batch_sizes"),
        ("batch_sizes = [20, 100]", "batch_sizes = [-5]", "batch_sizes"),
        ("batch_sizes = [20, 100]", "batch_sizes = [301]", "a batch of 301 samples: n_train is 300"),
        ('name = "mnist5k"', 'name = "mnist6k"', "unknown data set 'mnist6k'"),
        ('name = "M1"', 'name = "M2"', "unknown model 'M2'"),
        ('name = "mnist5k"', 'name = "mnistm5k"', "M1 takes 1 colour channel"),
        ("n_train = 300", "n_train = 5000", "mnist5k has 4,000 train images"),
        ("k = 5", "k = 5\ncolour = 1", "colour"),
        ("k = 5", "k = 5.5", "spectrum.k"),
    ],
)
def test_bad_profile_is_one_line_and_exit_code_two(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(PROFILE.replace(old, new))
    shown = call("run", "table7", "--profile", path, "--store", tmp_path / "store")
    assert shown.exit_code == 2
    assert message in shown.stderr
    assert len(shown.stderr.strip().splitlines()) == 1


def test_diverged_training_exits_with_one_and_keeps_its_history(tmp_path: Path) -> None:
    path = tmp_path / "wild.toml"
    path.write_text(PROFILE.replace("lr = 0.05", "lr = 1e9").replace("[20, 100]", "[100]"))
    shown = call("run", "fig6", "--profile", path, "--store", tmp_path / "store")
    assert shown.exit_code == 1
    assert "diverged" in shown.stderr
    assert "0 of 1 networks trained" in shown.stdout
    (result,) = Store(tmp_path / "store").results()
    assert (result.status, len(result.history)) == ("failed", 1)


def test_read_only_store_is_one_line_and_exit_code_two(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    shown = call("run", "fig1", *SMOKE, "--store", tmp_path / "file" / "store")
    assert shown.exit_code == 2
    assert "cannot write" in shown.stderr
    assert len([line for line in shown.stderr.splitlines() if line.startswith("hessnb:")]) == 1


@pytest.mark.parametrize("command", [["book"], ["notebooks", "sync"], ["notebooks", "check"]], ids=" ".join)
def test_command_without_its_extra_names_it(command: list[str]) -> None:
    hidden = "import sys; sys.modules['nbformat'] = None; from hessnb.__main__ import main; main()"
    done = subprocess.run([sys.executable, "-c", hidden, *command], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert "nbformat: pip install 'hessnb[book]'" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_module_runs_as_a_program() -> None:
    done = subprocess.run([sys.executable, "-m", "hessnb", "--version"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert "hessnb, version" in done.stdout


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
@pytest.mark.parametrize("command", [["status", *SMOKE], ["data", "list"], ["store", "check"]])
def test_output_that_cannot_be_written_is_one_line_and_exit_code_two(tmp_path: Path, command: list[str]) -> None:
    (tmp_path / "locks").mkdir()  # an empty store
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "hessnb", *command],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            env=os.environ | {"HESSNB_STORE": str(tmp_path)},
        )
    assert done.returncode == 2
    assert done.stderr.startswith("hessnb: cannot write to the standard output: No space left on device")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_path_that_the_output_cannot_encode_is_shown_escaped(tmp_path: Path, encoding: str) -> None:
    store = os.fsencode(tmp_path) + b"/\xc3\xa9\xff"  # an e with an accent, and what is no UTF-8
    os.makedirs(store + b"/locks")
    done = subprocess.run(
        [sys.executable, "-m", "hessnb", "store", "check", "--store", store],
        capture_output=True,
        timeout=60,
        env=os.environ | {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "1"},
    )
    assert done.returncode == 0, done.stderr
    shown = {"ascii": r"\xe9", "utf-8": "\u00e9"}[encoding] + r"\udcff: every file is whole"
    assert shown in done.stdout.decode()
