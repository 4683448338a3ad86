"""What the pages on provenance and on what is missing say of a record."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from hessnb.experiments import grid, record
from hessnb.experiments.grid import Task
from hessnb.experiments.profile import load_profile
from hessnb.experiments.results import Measurement, RunResult
from hessnb.experiments.store import Store
from hessnb.paper.origins import distinctions
from hessnb.paper.recorded import PROFILES
from hessnb.paper.tables import NOT_MEASURED
from hessnb.record_pages import generated, missing_lists, networks_of, state_table
from hessnb.training import Epoch, State

EPOCH = Epoch(1, 0.05, 1.0, 0.5, 1.0, 0.5, 0.1)


def came_from(seed: int) -> dict[str, object]:
    return {
        "commit": "0123456789abcdef0123456789abcdef01234567", "date": "2026-01-02T03:04:05+00:00", "threads": 1,
        "device": "a machine", "torch": "2.13.0", "seed": seed, "seconds": 1.5,
    }  # fmt: skip


def record_of(folder: Path, tasks: Sequence[Task], profile: str = "paper") -> Path:
    """A record in which these trainings and all measures of each are there."""
    store = Store(folder / "store")
    for task in tasks:
        told = came_from(task.spec.recipe.seed)
        store.save_result(RunResult(task.spec, "done", "", [EPOCH], told), State(1, {}, [], [EPOCH]))
        for measure in task.measures:
            store.save_measurement(task.spec, Measurement(measure, {"accuracy": 0.5}, told))
    record.publish(store, folder / "record", profile)
    return folder / "record"


def row(table: str, artefact: str) -> list[str]:
    (line,) = (line for line in table.splitlines() if line.startswith(f"| {artefact} "))
    return [cell.strip() for cell in line.strip("|").split("|")]


def state(folder: Path) -> str:
    return state_table({profile: networks_of(folder, profile) for profile in PROFILES})


def lacking(folder: Path, profile: str = "paper") -> str:
    return missing_lists(networks_of(folder, profile))


def entry(text: str, artefact: str) -> str:
    return next(part for part in text.split("\n`") if part.lstrip("`").startswith(f"{artefact}`"))


def first_of(artefact: str, seed: int, n: int, profile: str = "paper") -> Task:
    """The first network of an artefact, with the first ``n`` of its measures."""
    task = grid.artefact(artefact).tasks_of_seed(load_profile(profile), seed)[0]
    return Task(task.spec, task.measures[:n])


def test_empty_record_lacks_everything(tmp_path: Path) -> None:
    assert row(state(tmp_path), "table7")[2:] == [NOT_MEASURED, "as the paper's"]
    assert "None of its 108 cells on 6 networks is in the record." in entry(lacking(tmp_path), "table7")
    assert set(generated(tmp_path, "https://example.org")) == {
        "state.md", "runs.md", "missing_paper.md", "missing_laptop.md",
    }  # fmt: skip


def test_what_is_there_in_part_is_counted_by_cells(tmp_path: Path) -> None:
    folder = record_of(tmp_path, [first_of("table7", 0, 3)])
    assert row(state(folder), "table7")[2] == "3 of 108 cells, seed 0"
    told = entry(lacking(folder), "table7")
    assert "Measured: 3 of 108 cells, seed 0. Not measured yet:" in told
    assert "**M1-mnist-b64**: FGSM-10-eps0.1-test, FGSM-eps0.05-test" in told
    assert "**M1-mnist-b2048**: not trained" in told


def test_measure_that_one_of_two_seeds_lacks_says_so(tmp_path: Path) -> None:
    folder = record_of(tmp_path, [first_of("seeds", 0, 2), first_of("seeds", 1, 1)])
    told = entry(lacking(folder), "seeds")
    assert "Measured: 3 of 8 cells, seeds 0, 1." in told
    assert "**M1-mnist-b64**: of 1 of 2 seeds FGSM-eps0.1-test\n" in told


def test_seed_that_is_not_trained_is_named_instead_of_all_its_measures(tmp_path: Path) -> None:
    first = first_of("seeds", 0, 2)
    largest = grid.artefact("seeds").tasks_of_seed(load_profile("paper"), 1)[1]
    told = entry(lacking(record_of(tmp_path, [first, largest])), "seeds")
    assert "**M1-mnist-b64** (not trained with seed 1): nothing else\n" in told
    assert "**M1-mnist-b2048** (not trained with seed 0): nothing else\n" in told


def test_training_that_failed_lacks_nothing(tmp_path: Path) -> None:
    tasks = grid.artefact("silent_lr").tasks_of_seed(load_profile("paper"), 0)
    folder = record_of(tmp_path, tasks[:-1])
    store = Store(tmp_path / "store")
    store.save_result(
        RunResult(tasks[-1].spec, "failed", "training diverged", [EPOCH], came_from(0)), State(1, {}, [], [EPOCH])
    )
    record.publish(store, folder, "paper")
    told = entry(lacking(folder), "silent_lr")
    there = sum(len(task.measures) for task in tasks[:-1])
    assert told.rstrip().endswith(f"Measured: {there} of {there} cells, seed 0. Nothing is missing.")


def test_complete_artefact_lacks_nothing(tmp_path: Path) -> None:
    folder = record_of(tmp_path, grid.artefact("table5").tasks_of_seed(load_profile("paper"), 0))
    told = entry(lacking(folder), "table5")
    assert told.rstrip().endswith("Measured: 22 of 22 cells, seed 0. Nothing is missing.")


def test_networks_of_the_same_label_are_told_apart(tmp_path: Path) -> None:
    middle = grid.artefact("silent_lr").tasks_of_seed(load_profile("paper"), 0)[2]
    text = lacking(record_of(tmp_path, [middle]))
    assert "**M1-mnist-b64, learning rate 0.04**: not trained" in entry(text, "silent_lr")
    assert "**M1-mnist-b64, strided**: not trained" in entry(text, "silent_variant")


def test_origins_of_the_same_label_are_told_apart() -> None:
    rates, strided = grid.artefact("silent_lr"), grid.artefact("silent_variant")
    specs = [t.spec for s in (0, 1) for a in (rates, strided) for t in a.tasks_of_seed(load_profile("paper"), s)[:2]]
    assert distinctions(specs[:2]) == [", learning rate 0.0025", ", learning rate 0.005"]
    assert distinctions(specs[2:4]) == ["", ", strided"]
    assert distinctions([specs[0], specs[4]]) == ["", ""], "two seeds of one kind"


def test_smaller_profile_lists_what_differs_from_the_papers_alone(tmp_path: Path) -> None:
    folder = record_of(tmp_path, [first_of("table1", 0, 1, "laptop")], "laptop")
    text = lacking(folder, "laptop")
    assert "Measured: 1 of 136 cells, seed 0." in entry(text, "table1")
    assert "**C1-cifar10-b64**" in entry(text, "table1")
    assert "`table7`" not in text
    assert row(state(folder), "table1")[2:] == [NOT_MEASURED, "1 of 136 cells, seed 0"]


@pytest.mark.parametrize("profile", ["paper", "laptop"])
def test_committed_record_can_be_told(profile: str) -> None:
    folder = record.record_root()
    assert folder is not None
    text = lacking(folder, profile)
    assert text.count("\n: ") == len({line for line in text.splitlines() if line.startswith("`")})
