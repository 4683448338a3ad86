"""Figures and tables of landscapes: what is drawn and written are the numbers that were measured."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn

from hessnb.curvature import HessianOperator
from hessnb.data import Split
from hessnb.experiments import grid, networks, run
from hessnb.experiments.measure import eigenvectors
from hessnb.experiments.profile import load_profile
from hessnb.experiments.results import Measurement, Outcome
from hessnb.experiments.spec import LossLine, LossPlane, Measure, Spectrum
from hessnb.experiments.store import Store
from hessnb.figures import landscape as drawn
from hessnb.landscape import along, random_direction
from hessnb.paper import landscapes
from hessnb.paper.recorded import Recorded
from hessnb.paper.tables import NOT_MEASURED, Table

CPU = torch.device("cpu")
SMOKE = load_profile("smoke")
LINES, PLANES = ("fig2", "fig6", "fig8"), ("fig3", "fig7", "fig9")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("figures") / "store")


@pytest.fixture(scope="module")
def lines(store: Store) -> list[Outcome]:
    return run.compute(store, grid.artefact("fig6").tasks(SMOKE))


@pytest.fixture(scope="module")
def planes(store: Store) -> list[Outcome]:
    return run.compute(store, grid.artefact("fig7").tasks(SMOKE))


def absent(name: str) -> list[Outcome]:
    return [Outcome(task, None, {}) for task in grid.artefact(name).tasks(load_profile("paper"), 1)]


def made(outcome: Outcome, losses: dict[float, list[float]], eigenvalue: float = 1.0) -> Outcome:
    """Return an outcome whose lines have these losses, by reach, for all three sets."""
    found: dict[Measure, Measurement] = {}
    for reach, values in losses.items():
        measure = LossLine(along=Spectrum(split="train", k=2, tol=1e-3), reach=reach, points=len(values), batch=20)
        places = np.linspace(-reach, reach, len(values)).tolist()
        found[measure] = Measurement(
            measure, {"positions": places, "losses": dict.fromkeys(landscapes.SETS, values)}, {}
        )
    spectrum = Spectrum(split="train", k=2, tol=1e-3)
    return Outcome(
        outcome.task, outcome.result, {**found, spectrum: Measurement(spectrum, {"eigenvalues": [eigenvalue]}, {})}
    )


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for axis in figure.axes for text in axis.texts]


def column(table: Table, title: str) -> list[str]:
    return [row[table.header.index(title)] for row in table.rows]


# -- lines -----------------------------------------------------------------------------------------------------------


def test_each_panel_shows_the_three_measured_losses_of_its_batch_size(lines: list[Outcome]) -> None:
    figure = drawn.loss_lines(lines)
    titles = [axis.get_title() for axis in figure.axes]
    assert titles == [f"B = {b}" for b in SMOKE.large_batch["M1"].batch_sizes]
    for axis, outcome in zip(figure.axes, lines, strict=True):
        found = landscapes.line(outcome)
        assert found is not None
        assert len(found["positions"]) == SMOKE.landscape.line_points
        assert axis.get_yscale() == "log"
        for shown, losses in zip(axis.lines, found["losses"].values(), strict=True):
            assert np.asarray(shown.get_xdata()).tolist() == found["positions"]
            assert np.asarray(shown.get_ydata()).tolist() == losses
        assert len({shown.get_linestyle() for shown in axis.lines}) == 3  # not by colour alone
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["training set", "test set", "training batch"]


def test_panels_are_compared_on_the_same_axes(lines: list[Outcome]) -> None:
    first, second = drawn.loss_lines(lines).axes
    assert first.get_ylim() == second.get_ylim()
    assert first.get_xlim() == second.get_xlim()


def test_panel_that_is_not_measured_says_so_and_the_others_are_drawn(lines: list[Outcome]) -> None:
    figure = drawn.loss_lines([lines[0], Outcome(lines[1].task, None, {})])
    assert [len(axis.lines) for axis in figure.axes] == [3, 0]
    assert texts(figure) == [NOT_MEASURED]


@pytest.mark.parametrize("name", LINES + PLANES)
def test_nothing_measured_is_one_strip_that_names_the_batch_sizes(name: str) -> None:
    draw = drawn.loss_lines if name in LINES else drawn.loss_planes
    (text,) = texts(draw(absent(name)))
    sizes = [o.task.spec.recipe.batch_size for o in absent(name)]
    assert text == f"B = {', '.join(map(str, sizes))}:\n{NOT_MEASURED}"


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_lowest_panel_of_each_column_has_tick_labels(lines: list[Outcome], n: int) -> None:
    specs = [lines[0].task.spec.model_copy(update={"recipe": recipe}) for recipe in _recipes(lines[0], n)]
    many = [Outcome(grid.Task(spec, lines[0].task.measures), None, lines[0].measurements) for spec in specs]
    figure = drawn.loss_lines(many)
    figure.canvas.draw()
    shown = [axis for axis in figure.axes if axis.axison]
    assert len(shown) == n
    for axis in shown[-2:]:
        assert any(label.get_visible() and label.get_text() for label in axis.get_xticklabels())


def _recipes(outcome: Outcome, n: int) -> list[object]:
    return [dataclasses.replace(outcome.task.spec.recipe, batch_size=10 * (i + 1)) for i in range(n)]


def test_first_measured_seed_is_drawn(lines: list[Outcome]) -> None:
    later = dataclasses.replace(lines[0].task.spec.recipe, seed=1)
    measured = Outcome(
        grid.Task(lines[0].task.spec.model_copy(update={"recipe": later}), lines[0].task.measures),
        None,
        lines[0].measurements,
    )
    empty = Outcome(lines[0].task, None, {})
    assert landscapes.first_of_each([empty, measured]) == [measured]
    assert landscapes.first_of_each([measured, lines[0]]) == [lines[0]]


def test_recorded_panels_and_rows_of_a_smaller_scale_say_so(lines: list[Outcome]) -> None:
    first, second = (
        Recorded(o.task, o.result, o.measurements, "laptop", papers_own=own)
        for o, own in zip(lines, (True, False), strict=True)
    )
    sizes = [o.task.spec.recipe.batch_size for o in lines]
    titles = [axis.get_title() for axis in drawn.loss_lines([first, second]).axes]
    assert titles == [f"B = {sizes[0]}", f"B = {sizes[1]} (laptop)"]
    table = landscapes.curvatures([first, second], name="tab-x", caption="x")
    assert column(table, "Profile") == ["laptop", "laptop, smaller"]
    assert "Profile" not in landscapes.curvatures(lines, name="tab-x", caption="x").header


# -- curvature -------------------------------------------------------------------------------------------------------


def test_curvature_is_that_of_a_quartic_exactly_and_of_the_shortest_line(lines: list[Outcome]) -> None:
    def quartic(t: float) -> float:
        return 3.0 - t + 2.5 * t**2 + t**3 - 4 * t**4

    near = [quartic(t) for t in np.linspace(-0.1, 0.1, 5)]
    outcome = made(lines[0], {0.1: near, 1.0: [9.0, 5.0, 3.0, 5.0, 9.0]})
    assert landscapes.curvature(outcome, "test") == pytest.approx(5.0, rel=1e-9)
    found = landscapes.line(outcome)
    assert found is not None
    assert found["positions"][-1] == 1.0


def test_rise_is_without_the_slope_and_from_both_lines(lines: list[Outcome]) -> None:
    def loss(t: float) -> float:
        return 1.0 + 7 * t + 2 * t**2

    outcome = made(lines[0], {reach: [loss(t) for t in np.linspace(-reach, reach, 5)] for reach in (0.1, 1.0)})
    distances, rises = landscapes.rise(outcome)
    assert distances == pytest.approx([0.05, 0.1, 0.5, 1.0])
    assert rises == pytest.approx([2 * t**2 for t in distances])
    assert landscapes.rise(Outcome(lines[0].task, None, {})) == ([], [])


def test_measured_curvature_is_close_to_the_eigenvalue_and_the_table_says_both(lines: list[Outcome]) -> None:
    table = landscapes.curvatures(lines, name="tab-x", caption="x")
    assert column(table, "Batch") == [str(o.task.spec.recipe.batch_size) for o in lines]
    for outcome, certified, measured in zip(
        lines, column(table, "λ₁, certified"), column(table, "training loss"), strict=True
    ):
        assert float(certified) == pytest.approx(outcome.eigenvalues("train")[0], rel=1e-2)
        assert float(measured) == pytest.approx(float(certified), rel=0.2)  # kinks
    ratios = [
        float(a) / float(b) for a, b in zip(column(table, "test loss"), column(table, "training loss"), strict=True)
    ]
    assert list(map(float, column(table, "test / training"))) == pytest.approx(ratios, abs=0.06)


def test_row_without_a_measurement_says_so_in_each_cell() -> None:
    table = landscapes.curvatures(absent("fig6"), name="tab-x", caption="x")
    assert {cell for row in table.rows for cell in row[1:]} == {NOT_MEASURED}
    assert len(table.rows) == 6


def test_several_seeds_give_mean_and_spread(lines: list[Outcome]) -> None:
    curved = [made(lines[0], {0.1: [c * t**2 for t in (-0.1, -0.05, 0, 0.05, 0.1)]}, 2 * c) for c in (1.0, 2.0)]
    (row,) = landscapes.curvatures(curved, name="tab-x", caption="x").rows
    assert row[1:3] == ("3 ± 1.41", "3 ± 1.41")


def test_eigenvalue_of_a_row_is_that_of_the_networks_that_were_drawn(lines: list[Outcome]) -> None:
    undrawn = made(lines[0], {}, 99.0)
    together, alone, bare = (
        landscapes.curvatures(outcomes, name="tab-x", caption="x").rows[0]
        for outcomes in ([lines[0], undrawn], [lines[0]], [undrawn])
    )
    assert together == alone
    assert bare[1:3] == ("99", NOT_MEASURED)


def test_second_differences_come_to_the_eigenvalue(store: Store, lines: list[Outcome]) -> None:
    rows = []
    for outcome in lines:
        model = networks.trained_model(store, outcome.task.spec)
        along_this = outcome.task.measures[0]
        assert isinstance(along_this, Spectrum)
        rows.append((outcome, model, eigenvectors(store, outcome.task.spec, along_this, CPU)[0]))
    train = networks.load_split(lines[0].task.spec, "train", CPU)
    table = landscapes.second_differences(rows, train, name="tab-x", caption="x")
    assert len(table.rows) == len(lines)
    for row in table.rows:
        assert float(row[-1]) == pytest.approx(
            1.0, abs=2e-3
        )  # the eigen-solve's tolerance, and few samples near a kink


def test_parabolas_show_the_rise_and_the_eigenvalue(lines: list[Outcome]) -> None:
    figure = drawn.parabolas(lines)
    for axis, outcome in zip(figure.axes, lines, strict=True):
        parabola, points = axis.lines
        distances = np.asarray(parabola.get_xdata(), dtype=float)
        assert np.asarray(parabola.get_ydata()) == pytest.approx(outcome.eigenvalues("train")[0] * distances**2 / 2)
        assert (distances.tolist(), np.asarray(points.get_ydata()).tolist()) == landscapes.rise(outcome)


# -- the noise of a batch --------------------------------------------------------------------------------------------


def test_sample_losses_average_to_the_loss_and_the_noise_is_that_of_draws(store: Store, lines: list[Outcome]) -> None:
    model = networks.trained_model(store, lines[0].task.spec)
    train = networks.load_split(lines[0].task.spec, "train", CPU)
    losses = landscapes.sample_losses(model, train)
    found = landscapes.line(lines[0])
    assert found is not None
    assert float(losses.mean()) == pytest.approx(found["losses"]["train"][2], rel=1e-5)
    generator = torch.Generator().manual_seed(0)
    means = torch.stack([losses[torch.randperm(len(losses), generator=generator)[:20]].mean() for _ in range(4000)])
    assert landscapes.deviation_of_mean(losses, 20) == pytest.approx(float(means.std()), rel=0.05)
    assert landscapes.deviation_of_mean(losses, len(losses)) == 0.0


def test_table_of_noise_has_the_drawn_shift_and_the_share_of_the_worst(lines: list[Outcome]) -> None:
    losses = torch.zeros(200, dtype=torch.float64)
    losses[:4] = 1.0
    table = landscapes.batch_noise([(lines[0], losses)], name="tab-x", caption="x")
    found = landscapes.line(lines[0])
    assert found is not None
    train, batch = found["losses"]["train"][2], found["losses"]["batch"][2]
    assert len(table.rows) == 1
    assert column(table, "shift") == [f"{batch / train - 1:+.0%}"]
    assert column(table, "in the worst 1 %") == ["50%"]
    sigma = math.sqrt(0.02 * 0.98)
    expected = sigma / math.sqrt(20) * math.sqrt(180 / 199) / train
    assert column(table, "deviation") == column(table, "of B samples") == [f"± {expected:.0%}"]
    assert landscapes.batch_noise([(Outcome(lines[0].task, None, {}), losses)], name="a", caption="b").rows == ()


# -- planes and directions -------------------------------------------------------------------------------------------


def test_contours_run_where_the_loss_has_their_value_with_the_first_eigenvector_to_the_right(
    planes: list[Outcome],
) -> None:
    places = np.linspace(-1, 1, 9)
    steep = 10.0 ** (2 * places[:, None] + 0.5 * places[None, :])  # rises fourfold faster along the first eigenvector
    outcome = with_plane(planes[0], places.tolist(), {"train": steep.tolist(), "test": steep.tolist()})
    (axis, _) = drawn.loss_planes([outcome]).axes
    for contours in axis.collections:
        assert any(map(len, (ring for rings in contours.allsegs for ring in rings)))  # type: ignore[attr-defined]
        for level, rings in zip(contours.levels, contours.allsegs, strict=True):  # type: ignore[attr-defined]
            for ring in filter(len, rings):
                assert 2 * ring[:, 0] + 0.5 * ring[:, 1] == pytest.approx(np.full(len(ring), level), abs=1e-6)


def test_contours_of_both_sets_are_at_the_same_losses_and_told_apart(planes: list[Outcome]) -> None:
    figure = drawn.loss_planes(planes)
    for axis in figure.axes:
        train, test = axis.collections
        assert {level * 2 for level in train.levels} <= set(range(-20, 20))  # type: ignore[attr-defined]
        assert {level * 2 for level in test.levels} <= set(range(-20, 20))  # type: ignore[attr-defined]
        assert not np.array_equal(np.asarray(train.get_edgecolor()), np.asarray(test.get_edgecolor()))
        assert train.get_linestyle() != test.get_linestyle()


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_loss_that_is_not_finite_leaves_a_gap_and_the_rest_is_drawn(planes: list[Outcome], bad: float) -> None:
    places = np.linspace(-1, 1, 5)
    losses = 10.0 ** (2 * places[:, None] + places[None, :])
    losses[0, 0] = bad
    outcome = with_plane(planes[0], places.tolist(), {"train": losses.tolist()})
    (axis, _) = drawn.loss_planes([outcome]).axes
    (contours,) = axis.collections
    assert any(len(ring) for rings in contours.allsegs for ring in rings)  # type: ignore[attr-defined]


def with_plane(outcome: Outcome, positions: list[float], losses: dict[str, list[list[float]]]) -> Outcome:
    measure = next(m for m in outcome.measurements if isinstance(m, LossPlane))
    return Outcome(
        outcome.task,
        outcome.result,
        {measure: Measurement(measure, {"positions": positions, "losses": losses}, {})},
    )


def test_random_directions_have_the_exact_trace_and_quotient_of_a_small_network() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).double().eval()
    split = Split(torch.randn(40, 4, dtype=torch.float64), torch.randint(2, (40,)))
    H = HessianOperator(model, F.cross_entropy, split.batches(40))
    dense = H @ torch.eye(H.shape[0], dtype=torch.float64)
    largest = float(torch.linalg.eigvalsh(dense)[-1])
    (row,) = landscapes.directional({"16": model}, split, [largest], name="tab-x", caption="x").rows
    chance = random_direction(model, torch.Generator().manual_seed(0), filter_normalised=True)
    assert row[:3] == ("16", str(len(dense)), f"{largest:.3g}")
    assert row[3].startswith(f"{float(dense.trace()):.3g} ± 0")  # 23 weights, 30 products: exact
    assert float(row[4]) == pytest.approx(float(dense.trace()) / len(dense), rel=0.05)
    assert row[5] == f"1 / {largest * len(dense) / float(dense.trace()):,.0f}"
    quotient = float(chance @ dense @ chance / (chance @ chance))
    assert float(row[6]) == pytest.approx(quotient, rel=0.05)


def test_directions_are_told_apart_in_each_panel(tiny_m1: nn.Module) -> None:
    split = Split(torch.rand(10, 1, 28, 28), torch.arange(10))
    ways = {name: random_direction(tiny_m1, torch.Generator().manual_seed(i)) for i, name in enumerate("ab")}
    found = {
        title: {
            name: along(tiny_m1, F.cross_entropy, {"train": split.batches(10)}, scale * d, [-0.5, 0.0, 0.5])
            for name, d in ways.items()
        }
        for title, scale in (("one", 1.0), ("ten", 10.0))
    }
    figure = drawn.directions(found)
    assert [axis.get_title() for axis in figure.axes] == ["one", "ten"]
    for axis, panel in zip(figure.axes, found.values(), strict=True):
        for shown, landscape in zip(axis.lines, panel.values(), strict=True):
            assert np.asarray(shown.get_ydata()).tolist() == landscape.losses["train"].tolist()
        assert axis.lines[0].get_color() != axis.lines[1].get_color()


def test_figures_do_not_stay_open(lines: list[Outcome], planes: list[Outcome], tmp_path: Path) -> None:
    for figure in (drawn.loss_lines(lines), drawn.parabolas(lines), drawn.loss_planes(planes)):
        figure.savefig(tmp_path / "figure.svg")
    drawn.loss_lines(absent("fig6"))
    assert plt.get_fignums() == []


# -- eigenvectors ----------------------------------------------------------------------------------------------------


def test_eigenvectors_are_solved_for_again_where_the_store_has_lost_them(store: Store, lines: list[Outcome]) -> None:
    spec, measure = lines[0].task.spec, lines[0].task.measures[0]
    assert isinstance(measure, Spectrum)
    kept = eigenvectors(store, spec, measure, CPU)
    (file,) = (store.root / "runs" / spec.slug).glob("*.vectors.safetensors")
    file.unlink()
    again = eigenvectors(store, spec, measure, CPU)
    assert file.exists()
    assert (again * kept).sum(1).abs().tolist() == pytest.approx([1.0, 1.0], abs=1e-3)
