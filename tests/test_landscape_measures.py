"""Landscapes, sub-sampled spectra and densities as measures: the numbers kept are those of the network."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from hessnb import training
from hessnb.curvature import HessianOperator
from hessnb.data import Split
from hessnb.errors import InputError
from hessnb.experiments import grid, measure, run
from hessnb.experiments.networks import drawn, load_split, trained_model
from hessnb.experiments.profile import load_profile
from hessnb.experiments.spec import (
    Density,
    Interpolation,
    LossLine,
    LossPlane,
    Measure,
    RunSpec,
    Spectrum,
    parse_measure,
)  # fmt: skip
from hessnb.experiments.store import Store

CPU = torch.device("cpu")
SMOKE = load_profile("smoke")
FIGURES = [f"fig{i}" for i in range(1, 14)]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("landscapes") / "store")


def values(store: Store, spec: RunSpec, wanted: Measure) -> dict[str, object]:
    run.train_run(store, spec)
    return run.measure_run(store, spec, wanted).values


def first(name: str) -> grid.Task:
    return grid.artefact(name).tasks(SMOKE)[0]


@pytest.mark.parametrize("name", FIGURES)
@pytest.mark.parametrize("profile", ["smoke", "quick", "laptop", "paper"])
def test_every_figure_of_the_paper_is_in_the_grid_of_every_profile(name: str, profile: str) -> None:
    tasks = grid.artefact(name).tasks(load_profile(profile), 1)
    assert tasks
    assert all(task.measures for task in tasks)


def test_line_goes_along_the_dominant_eigenvector_and_curves_as_the_eigenvalue_says(store: Store) -> None:
    task = first("fig6")
    _, line, _ = task.measures
    assert isinstance(line, LossLine)
    found = values(store, task.spec, line)
    spectrum = values(store, task.spec, line.along)
    assert store.vectors(task.spec, line.along) is not None
    model = trained_model(store, task.spec)
    losses = found["losses"]
    assert isinstance(losses, dict)
    assert set(losses) == {"train", "test", "batch"}
    middle = line.points // 2
    for split in ("train", "test"):
        at_zero = training.evaluate(model, load_split(task.spec, split, CPU))[0]
        assert losses[split][middle] == pytest.approx(at_zero, rel=1e-5)
    train = load_split(task.spec, "train", CPU)
    few = drawn(len(train), line.batch, 0)
    batch = training.evaluate(model, Split(train.images[few], train.labels[few]))[0]
    assert losses["batch"][middle] == pytest.approx(batch, rel=1e-5)
    # On a finer line of its own: the second difference at 0 is the eigenvalue.
    close = values(store, task.spec, line.model_copy(update={"reach": 0.02, "points": 3}))["losses"]
    eigenvalues = spectrum["eigenvalues"]
    assert isinstance(close, dict)
    assert isinstance(eigenvalues, list)
    left, here, right = close["train"]
    assert (left - 2 * here + right) / 0.02**2 == pytest.approx(eigenvalues[0], rel=0.05)


def test_plane_holds_the_line(store: Store) -> None:
    plane, line = first("fig7"), first("fig6")
    _, square = plane.measures
    assert isinstance(square, LossPlane)
    found = values(store, plane.spec, square)["losses"]
    assert isinstance(found, dict)
    assert set(found) == {"train", "test"}
    along = line.measures[1].model_copy(update={"points": square.points})
    on_line = values(store, plane.spec, along)["losses"]
    assert isinstance(on_line, dict)
    middle = square.points // 2
    assert [row[middle] for row in found["train"]] == pytest.approx(on_line["train"], rel=1e-6)


def test_interpolation_passes_through_both_networks(store: Store) -> None:
    task = first("fig10")
    (line,) = task.measures
    assert isinstance(line, Interpolation)
    found = values(store, task.spec, line)
    positions, losses = found["positions"], found["losses"]
    assert isinstance(positions, list)
    assert isinstance(losses, dict)
    assert task.spec.parent is not None
    for position, spec in ((0.0, task.spec.parent), (1.0, task.spec)):
        loss = training.evaluate(trained_model(store, spec), load_split(spec, "test", CPU))[0]
        assert losses["test"][positions.index(position)] == pytest.approx(loss, rel=1e-6)
    with pytest.raises(InputError, match="no parent"):
        run.measure_run(store, task.spec.parent, line)


def test_single_samples_have_the_spectrum_of_their_own_hessian(store: Store) -> None:
    task = next(t for t in grid.artefact("fig11").tasks(SMOKE) if t.spec.parent is None)
    one, other, some, _ = task.measures
    assert isinstance(one, Spectrum)
    assert [(m.samples, m.draw) for m in (one, other, some) if isinstance(m, Spectrum)] == [(1, 0), (1, 1), (20, 0)]
    found = values(store, task.spec, one)
    train = load_split(task.spec, "train", CPU)
    sample = drawn(len(train), 1, 0)
    model = trained_model(store, task.spec)
    assert sum(p.numel() for p in model.parameters()) < 20_000
    exact = HessianOperator(model.double(), F.cross_entropy, [(train.images[sample].double(), train.labels[sample])])
    assert found["n_samples"] == 1
    vectors = store.vectors(task.spec, one)
    assert vectors is not None
    eigenvalues = torch.tensor(found["eigenvalues"])
    v = vectors[0].double()
    assert torch.linalg.vector_norm(exact.matvec(v) - eigenvalues[0] * v) <= 2e-3 * abs(eigenvalues[0])
    assert found["eigenvalues"] != values(store, task.spec, other)["eigenvalues"]


def test_more_samples_than_there_are_is_an_input_error() -> None:
    with pytest.raises(InputError, match="only 10"):
        drawn(10, 11, 0)
    with pytest.raises(InputError, match="belong together"):
        Spectrum.parse({"split": "train", "k": 1, "tol": 1e-4, "samples": 3}, "here")


def test_density_has_the_mass_and_the_mean_of_the_spectrum_that_its_probe_sees(store: Store) -> None:
    task = first("density")
    (wanted,) = task.measures
    assert isinstance(wanted, Density)
    assert wanted.probes == 1
    found = values(store, task.spec, wanted)
    (weights,), (nodes,) = torch.tensor(found["weights"]), torch.tensor(found["nodes"])
    assert float(weights.sum()) == pytest.approx(1.0)
    train = load_split(task.spec, "train", CPU)
    H = HessianOperator(trained_model(store, task.spec), F.cross_entropy, train.batches(60))
    probe = F.normalize(torch.randn(H.shape[0], dtype=torch.float64, generator=torch.Generator().manual_seed(0)), dim=0)
    assert float(weights @ nodes) == pytest.approx(float(probe @ H.matvec(probe)), rel=1e-4)
    leading = values(store, task.spec, Spectrum(split="train", k=2, tol=1e-3))["eigenvalues"]
    assert isinstance(leading, list)
    assert nodes.max() <= leading[0] * 1.001


def test_interrupted_landscape_goes_on_from_its_points(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    task = first("fig8")
    _, line, _ = task.measures
    assert isinstance(line, LossLine)
    values(store, task.spec, line.along)

    def stop_after_two(what: str, share: float, detail: str) -> None:
        if "line-" in what and share >= 0.4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.measure_run(store, task.spec, line, report=stop_after_two)
    kept = store.points_file(task.spec, line)
    assert kept.exists()
    n_points = len(kept.read_text().splitlines()) - 1
    assert 0 < n_points < 5
    asked: list[float] = []
    again = run.measure_run(store, task.spec, line, report=lambda what, share, detail: asked.append(share)).values
    assert asked[1] == n_points / 5
    assert not kept.exists()
    monkeypatch.setattr(measure, "along", lambda *args, **kwargs: pytest.fail("computed again"))
    assert run.measure_run(store, task.spec, line).values == again


@pytest.mark.parametrize("name", ["fig7", "fig8"])
def test_landscape_goes_on_where_its_directions_had_to_be_solved_for(store: Store, tmp_path: Path, name: str) -> None:
    task = first(name)
    landscape = task.measures[1]
    assert isinstance(landscape, LossLine | LossPlane)
    values(store, task.spec, landscape.along)
    bare = Store(tmp_path / "store")
    shutil.copytree(store.root, bare.root)
    for kept in bare.root.rglob("*.vectors.safetensors"):  # as after an import, which brings no vectors
        kept.unlink()
    for ended in bare.root.glob(f"runs/{task.spec.slug}/{landscape.slug}.json"):
        ended.unlink()

    def stop_half_way(what: str, share: float, detail: str) -> None:
        if landscape.label in what and share >= 0.4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.measure_run(bare, task.spec, landscape, report=stop_half_way)
    again = run.measure_run(bare, task.spec, landscape).values
    assert again == run.measure_run(store, task.spec, landscape).values


def test_planes_keep_the_spectrum_that_they_lie_along() -> None:
    task = first("fig7")
    plane = task.measures[-1]
    assert isinstance(plane, LossPlane)
    assert plane.along in task.measures
    with pytest.raises(InputError, match="first two eigenvectors"):
        parse_measure({**json.loads(plane.canonical()), "along": json.loads(plane.along.canonical()) | {"k": 1}}, "x")


def test_minibatches_of_a_gpu_are_the_largest_whose_graph_fits() -> None:
    mebibyte, gibibyte = 2**20, 2**30
    sizes = {free: measure._fitting(12 * mebibyte, free * gibibyte) for free in (80, 20, 12, 3, 1, 0)}
    assert sizes == {80: 2000, 20: 1000, 12: 1000, 3: 250, 1: 60, 0: 30}
    split = load_split(first("fig6").spec, "train", CPU)
    assert measure.hessian_batch(torch.nn.Linear(1, 1), split) == 250, "on a CPU whatever the network"


def test_vectors_are_of_length_one_and_orthogonal_and_survive_a_reopening(store: Store, tmp_path: Path) -> None:
    task = first("fig6")
    values(store, task.spec, task.measures[1])
    vectors = Store(store.root).vectors(task.spec, task.measures[1].along)  # type: ignore[union-attr]
    assert vectors is not None
    assert vectors.dtype == torch.float32
    assert torch.allclose(vectors @ vectors.T, torch.eye(2), atol=1e-5)
    model = trained_model(store, task.spec)
    theta = parameters_to_vector(model.parameters())
    assert vectors.shape == (2, len(theta))
    vector_to_parameters(theta + vectors[0], model.parameters())
    moved = training.evaluate(model, load_split(task.spec, "train", CPU))[0]
    assert moved > training.evaluate(trained_model(store, task.spec), load_split(task.spec, "train", CPU))[0]
