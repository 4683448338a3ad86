"""Figures of large batches, and what all figures share: names of what is missing, plain labels, curves told apart."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from matplotlib.container import BarContainer
from matplotlib.figure import Figure

from hessnb import figures
from hessnb.data import Splits
from hessnb.experiments.grid import artefact
from hessnb.experiments.profile import load_profile
from hessnb.experiments.results import Measurement, Outcome
from hessnb.experiments.spec import Spectrum
from hessnb.figures import beyond, landscape, robust
from hessnb.figures.style import grid, plain_log_labels
from hessnb.paper.attacks import DampingSweep
from hessnb.paper.large_batch import attacked
from hessnb.paper.recorded import Recorded, from_record
from hessnb.paper.tables import NOT_MEASURED
from hessnb.statistics import Interval


@pytest.fixture(scope="module")
def seeds() -> list[Recorded]:
    """Three seeds of one batch size and one of another, from the published Table 7, which is of the paper's scale."""
    chosen = {(512, 0), (512, 1), (512, 2), (1024, 0)}  # however many more are published
    recipes = [(o, o.task.spec.recipe) for o in from_record("table7")]
    return [o for o, recipe in recipes if (recipe.batch_size, recipe.seed) in chosen]


def _shown(outcomes: Sequence[Outcome], value: Callable[[Outcome], float]) -> tuple[list[float], list[float]]:
    """Return the heights that belong on the line, and those of the dashes."""
    three = [value(o) for o in outcomes if o.task.spec.recipe.batch_size == 512]
    (one,) = (value(o) for o in outcomes if o.task.spec.recipe.batch_size == 1024)
    assert len(three) == 3
    return [statistics.mean(three), one], sorted(three)


def _eigenvalue(split: str, outcome: Outcome) -> float:
    return float(outcome.eigenvalues(split)[0])


def test_eigenvalue_line_goes_through_the_means_and_each_seed_is_a_dash(seeds: list[Recorded]) -> None:
    live = [o for o in seeds if o.task.spec.recipe.seed == 0]
    for axis, split in zip(figures.lambda1_against_batch("table7", live, seeds).axes, ("train", "test"), strict=True):
        means, each = _shown(seeds, partial(_eigenvalue, split))
        _, line, dashes, alone = axis.lines  # the paper's, ours with its seeds, the live one of a single seed
        assert np.asarray(line.get_xdata()).tolist() == [512, 1024]
        assert np.asarray(line.get_ydata()).tolist() == pytest.approx(means)
        assert sorted(np.asarray(dashes.get_ydata()).tolist()) == pytest.approx(each)
        assert set(np.asarray(dashes.get_xdata()).tolist()) == {512}
        assert (line.get_label(), alone.get_label()) == ("ours, paper's scale", "ours, live")
        assert (axis.get_xscale(), axis.get_yscale()) == ("log", "log")


def test_accuracy_line_goes_through_the_means(seeds: list[Recorded]) -> None:
    first = figures.accuracy_against_batch("table7", seeds, seeds).axes[0]
    size = float(first.get_title().removeprefix("ε = "))
    means, _ = _shown(seeds, lambda o: attacked(size, plain=True)([o], "test")[0])
    line = next(line for line in first.lines if line.get_label() == "ours, paper's scale, float32")
    assert np.asarray(line.get_ydata()).tolist() == pytest.approx(means)


def test_nothing_recorded_draws_no_line_of_ours(seeds: list[Recorded]) -> None:
    axis = figures.lambda1_against_batch("table7", seeds, []).axes[0]
    assert [line.get_label() for line in axis.lines if not str(line.get_label()).startswith("_")] == [
        "paper",
        "ours, live",
    ]


def test_record_of_a_smaller_scale_or_of_an_unknown_one_does_not_pass_for_the_papers(seeds: list[Recorded]) -> None:
    smaller = [replace(o, profile="laptop", papers_own=False) for o in seeds]
    unknown = [Outcome(o.task, o.result, o.measurements) for o in seeds]
    for record, name in ((smaller, "record (laptop, smaller)"), (unknown, "record")):
        eigenvalues = figures.lambda1_against_batch("table7", [], record).axes[0]
        assert eigenvalues.get_legend_handles_labels()[1] == ["paper", name]
        accuracies = figures.accuracy_against_batch("table7", [], record).axes[0]
        assert accuracies.get_legend_handles_labels()[1] == ["paper", f"{name}, float32", f"{name}, exact"]


def test_record_beside_live_numbers_names_its_profile() -> None:
    sizes, steps, rates = (from_record(name, network="M1") for name in ("eps", "cg", "silent_lr"))
    assert [axis.get_title() for axis in figures.accuracy_against_size(sizes, sizes).axes] == ["live", "record (paper)"]
    labels = figures.accuracy_against_cg_steps([], steps).axes[0].get_legend_handles_labels()[1]
    assert labels == ["FHSM, record (paper)", "L2HESS, record (paper)"]
    assert "record (paper)" in beyond.learning_rates([], rates, 0.1).axes[0].get_legend_handles_labels()[1]


def test_spectra_are_those_of_the_first_seed_and_what_is_missing_says_so() -> None:
    task, result = next((o.task, o.result) for o in from_record("fig1") if o.measurements)
    (measure,) = task.measures

    def outcome(batch_size: int, seed: int, eigenvalues: list[float], name: str = "M1") -> Recorded:
        model = task.spec.model.model_copy(update={"name": name})
        recipe = replace(task.spec.recipe, batch_size=batch_size, seed=seed)
        spec = task.spec.model_copy(update={"model": model, "recipe": recipe})
        found = {measure: Measurement(measure, {"eigenvalues": eigenvalues}, {})} if eigenvalues else {}
        return Recorded(replace(task, spec=spec), result, found, "laptop", papers_own=name == "M1")

    small, missing, large = outcome(64, 0, [3.0, 2.0]), outcome(128, 0, []), outcome(256, 0, [9.0, 4.0])
    again, other = outcome(64, 1, [7.0, 6.0]), outcome(64, 0, [], "C1")
    left, right = figures.spectra([small, missing, large, again, other]).axes
    assert [np.asarray(line.get_ydata()).tolist() for line in left.lines] == [[3.0, 2.0], [9.0, 4.0]]
    assert [line.get_label() for line in left.lines] == ["B = 64", "B = 256"]
    assert (left.get_title(), left.get_yscale()) == ("M1", "log")
    assert (right.get_title(), right.lines[:]) == ("C1 (laptop)", [])
    assert [text.get_text() for text in left.texts] == ["not measured yet:\nB\xa0=\xa0128"]
    assert [text.get_text() for text in right.texts] == ["not measured yet"]


@pytest.mark.parametrize(
    ("low", "high", "labels"),
    [
        (0.149, 8.6, ["0.2", "0.3", "0.5", "1", "2", "3", "5"]),
        (0.2, 0.9, ["0.2", "0.3", "0.5"]),
        (0.9, 11, ["$\\mathdefault{10^{0}}$", "$\\mathdefault{10^{1}}$"]),
        (1, 10, ["$\\mathdefault{10^{0}}$", "$\\mathdefault{10^{1}}$"]),
    ],
)
def test_logarithmic_axis_has_plain_labels_unless_two_powers_of_ten_are_in_view(
    low: float, high: float, labels: list[str]
) -> None:
    (axis, _) = grid(2)[1]
    axis.set(yscale="log", ylim=(low, high))
    plain_log_labels(axis.yaxis)
    axis.figure.canvas.draw()
    ticks = [tick for which in ("major", "minor") for tick in axis.yaxis.get_ticklabels(which=which)]
    # A tick at an end may lie beyond it by rounding.
    ends = low * (1 - 1e-9), high * (1 + 1e-9)
    places = {tick.get_position()[1]: tick for tick in ticks if tick.get_text()}
    shown = {place: tick for place, tick in places.items() if ends[0] <= place <= ends[1]}
    assert [shown[place].get_text() for place in sorted(shown)] == labels
    assert {tick.get_fontsize() for tick in shown.values()} == {10}


def test_training_curves_are_told_apart_by_a_few_marks(published: Callable[[str], Splits]) -> None:
    published("mnist")  # its size counts the steps
    outcomes = [o for o in from_record("table7") if o.task.spec.recipe.seed == 0]
    for axis in figures.training_curves(outcomes).axes:
        assert len({line.get_marker() for line in axis.lines}) == len(outcomes) == 6
        for line in axis.lines:
            marked, n = line.get_markevery(), len(np.asarray(line.get_xdata()))
            assert isinstance(marked, list)
            assert (marked[0], marked[-1]) == (0, n - 1)
            assert len(marked) <= 8


def test_marks_tell_which_layers_a_largest_eigenvalue_belongs_to() -> None:
    blocks = [
        Outcome(task, None, {m: Measurement(m, {"eigenvalues": [2.0, 1.0]}, {}) for m in task.measures})
        for task in artefact("layers").tasks(load_profile("smoke"), 1)
    ]
    whole = Spectrum(split="train", k=1, tol=1e-3)
    wholes = [replace(o, measurements={whole: Measurement(whole, {"eigenvalues": [3.0]}, {})}) for o in blocks]
    (axis,) = figures.layer_spectra(blocks, wholes).axes
    bounds = [line for line in axis.lines if line.get_linestyle() == "--"]
    points = [line for line in axis.lines if not str(line.get_label()).startswith("_")]
    assert [line.get_marker() for line in bounds] == [line.get_marker() for line in points]
    assert len({line.get_marker() for line in bounds}) == len(blocks) == 2


def test_bars_of_dampings_are_told_apart_by_hatches_that_a_legend_names() -> None:
    sweep = DampingSweep((0.0, 1.0), [Interval(0.5, 0.4, 0.6)] * 2, [3, 1])
    upper, lower = figures.dampings({"M1": sweep, "C3": sweep}).axes
    assert len({bars.patches[0].get_hatch() for bars in lower.containers if isinstance(bars, BarContainer)}) == 2
    for axis in (upper, lower):
        assert axis.get_legend_handles_labels()[1] == ["M1", "C3"]


# How each figure of outcomes is drawn of some, and an artefact that it shows.
DRAWN: dict[Callable[[list[Outcome]], Figure], str] = {
    figures.training_curves: "table7",
    figures.spectra: "fig1",
    lambda some: figures.lambda1_against_batch("table7", some, some): "table7",
    lambda some: figures.accuracy_against_batch("table7", some, some): "table7",
    lambda some: figures.accuracy_against_measures(some, 0.1): "table7",
    lambda some: figures.layer_spectra(some, some): "layers",
    figures.transfer_and_white_box: "table4",
    lambda some: figures.accuracy_against_cg_steps(some, some): "cg",
    lambda some: figures.accuracy_against_size(some, some): "eps",
    lambda some: beyond.densities(some, some): "density",
    beyond.edge: "edge",
    beyond.sharpening: "sharpening",
    lambda some: beyond.learning_rates(some, some, 0.1): "silent_lr",
    landscape.loss_lines: "fig6",
    landscape.loss_planes: "fig7",
    landscape.parabolas: "fig6",
    robust.interpolations: "fig10",
    robust.robust_lines: "fig12",
    robust.robust_spectra: "fig11",
    lambda some: robust.few_against_all({"M1": some}): "fig11",
}


@pytest.mark.parametrize(("draw", "name"), DRAWN.items())
def test_figure_with_nothing_to_draw_says_so(draw: Callable[[list[Outcome]], Figure], name: str) -> None:
    planned = [Outcome(task, None, {}) for task in artefact(name).tasks(load_profile("paper"), 1)]
    for none in ([], planned):
        told = [text.get_text() for axis in draw(none).axes for text in axis.texts]
        assert told
        assert all(NOT_MEASURED in text for text in told)
