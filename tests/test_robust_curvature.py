"""Section 3.3: the control, the tables and figures of spectra and lines, and why curvature is negative."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parameters_to_vector

from hessnb import training
from hessnb.curvature import GGNOperator, HessianOperator
from hessnb.data import Split, Splits
from hessnb.errors import InputError
from hessnb.experiments import run
from hessnb.experiments.grid import Task, artefact
from hessnb.experiments.networks import load_data, load_split, trained_model
from hessnb.experiments.profile import AdversarialTraining, load_profile
from hessnb.experiments.results import Measurement, Outcome
from hessnb.experiments.spec import Interpolation, LossLine, Spectrum
from hessnb.experiments.store import Store
from hessnb.figures import robust as figures_robust
from hessnb.models import build, layers
from hessnb.paper import negative_curvature
from hessnb.paper import robust_curvature as rc
from hessnb.paper.adversarial import network_name, of_first_seed
from hessnb.paper.recorded import Recorded, from_record
from hessnb.paper.tables import NOT_MEASURED
from hessnb.training import train

SMOKE = load_profile("smoke")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("robust") / "store")


@pytest.fixture(scope="module")
def outcomes(store: Store) -> list[Outcome]:
    """What fig11 needs under the smoke profile, and the control, computed."""
    return rc.results_with_control("fig11", profile="smoke", store=store.root)


def test_control_is_the_original_trained_on_without_an_attack(store: Store, outcomes: list[Outcome]) -> None:
    names = [network_name(o.task.spec) for o in outcomes]
    assert names == ["ORI", "FGSM", "FGSM-10", "L2GRAD", "FHSM", "L2HESS", "control"]
    spec = outcomes[-1].task.spec
    assert spec.parent == outcomes[0].task.spec
    assert spec.recipe == outcomes[1].task.spec.recipe
    plain = trained_model(store, outcomes[0].task.spec)
    train(plain, load_data(spec.data, "cpu"), spec.recipe)
    found, attacked = (trained_model(store, outcomes[i].task.spec) for i in (-1, 1))
    theta = [parameters_to_vector(network.parameters()).detach() for network in (plain, found, attacked)]
    assert torch.equal(theta[0], theta[1])
    assert not torch.allclose(theta[0], theta[2], rtol=1e-3)


def test_record_with_control_keeps_what_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load_profile("paper").adversarial["M1"]
    *_, full = artefact("fig11").tasks(load_profile("paper"), 1)[0].measures
    (task,) = (t for t in artefact("control").tasks(load_profile("paper"), 1) if t.spec == settings.control(0))
    line = task.measures[-1]
    measured = {m: Measurement(m, {"eigenvalues": [1.0]}, {}) for m in (full, line)}
    held = {"control": [Recorded(task, None, measured, "paper")], "fig11": from_record("fig11")}
    monkeypatch.setattr(rc, "from_record", held.__getitem__)
    *robust, control = rc.recorded_with_control("fig11")
    assert robust == held["fig11"]
    assert network_name(control.task.spec) == "control"
    assert control.task.measures == robust[0].task.measures
    assert control.measurements == {full: measured[full]}
    held["fig5"] = from_record("fig5")
    assert rc.recorded_with_control("fig5") == held["fig5"], "a control of another network"


def test_spectra_of_single_samples_are_certified_and_come_in_order(outcomes: list[Outcome]) -> None:
    wanted = rc.spectra(outcomes)
    assert [rc.samples_label(m) for m in wanted] == ["1 (a)", "1 (b)", "20", "all"]
    for outcome in outcomes:
        for measure in wanted:
            assert outcome.measurements[measure].values["converged"]
            values = rc.eigenvalues(outcome, measure)
            assert len(values) == 5
            assert values == sorted(values, reverse=True)


def test_drawn_losses_are_those_of_the_samples(store: Store, outcomes: list[Outcome]) -> None:
    losses = rc.drawn_losses(outcomes[:1], store=store.root)
    spec = outcomes[0].task.spec
    model, split = trained_model(store, spec), load_split(spec, "train", torch.device("cpu"))
    first = int(torch.randperm(len(split), generator=torch.Generator().manual_seed(0))[0])
    single, *_, full = rc.spectra(outcomes)
    with torch.no_grad():
        loss = float(F.cross_entropy(model(split.images[first][None]), split.labels[first][None]))
    assert losses[spec, single] == pytest.approx(loss, rel=1e-4, abs=1e-6)
    assert losses[spec, full] == pytest.approx(training.evaluate(model, split)[0])
    assert len(losses) == 4


def test_table_of_spectra_counts_sums_and_compares_within_a_seed() -> None:
    settings = SMOKE.adversarial["M1"]
    measure = Spectrum(split="train", k=3, tol=1e-3)
    made = {
        settings.original(0): [4.0, -2.0, 1.0], settings.robust("FGSM", 0): [2.0, 1.0, 0.5],
        settings.original(1): [8.0, 1.0, 1.0], settings.robust("FGSM", 1): [2.0, 1.0, -0.5],
    }  # fmt: skip
    outcomes = [
        Outcome(Task(spec, (measure,)), None, {measure: Measurement(measure, {"eigenvalues": values}, {})})
        for spec, values in made.items()
    ]
    assert rc.ratios(outcomes, "FGSM", measure, max) == [0.5, 0.25]
    assert rc.ratios(outcomes, "FGSM", measure, math.fsum) == [3.5 / 3.0, 0.25]
    assert rc.ratios(outcomes, "ORI", measure, max) == []
    table = rc.curvature_after(outcomes[:2], name="tab-x", caption="x")
    assert table.header == ("B_H", "Network", "λ₁", "÷ ORI", "Sum", "÷ ORI", "Smallest", "Negative")
    assert table.rows == (
        ("all", "ORI", "4", "–", "3", "–", "-2", "1"),
        ("all", "FGSM", "2", "0.50", "3.5", "1.17", "0.5", "0"),
    )
    both = rc.curvature_after(outcomes, name="tab-x", caption="x").rows[1]
    assert both[3] == "0.38 ± 0.18"
    assert of_first_seed(outcomes[::-1]) == outcomes[:2]
    nothing = rc.curvature_after([replace(o, measurements={}) for o in outcomes], name="tab-x", caption="x")
    assert nothing.rows == (("all", "all", NOT_MEASURED, "–", "–", "–", "–", "–"),)


def test_answers_are_counted(outcomes: list[Outcome]) -> None:
    cells = [row[2] for row in rc.answers({"M1": outcomes}, name="tab-x", caption="x").rows]
    *_, few, full = rc.spectra(outcomes)
    six = outcomes[:6]
    lambdas = [max(rc.eigenvalues(o, full)) for o in outcomes]
    below = sum(value < lambdas[0] for value in lambdas[1:6])
    assert cells[0].endswith(f"below 1: {below} of 5")
    assert cells[2] == f"{lambdas[6] / lambdas[0]:.2g}"
    negative = sum(min(rc.eigenvalues(o, m)) < 0 for o in six for m in rc.spectra(outcomes)[:2])
    assert cells[3] == f"{negative} of 12"
    assert cells[5] == f"{sum(min(rc.eigenvalues(o, full)) < 0 for o in six)} of 6"
    closeness = [max(rc.eigenvalues(o, few)) / max(rc.eigenvalues(o, full)) for o in six]
    assert cells[6] == f"{min(closeness):.2g} to {max(closeness):.2g}"
    empty = [replace(o, measurements={}) for o in outcomes]
    assert {row[2] for row in rc.answers({"M1": empty}, name="tab-x", caption="x").rows} == {NOT_MEASURED}


def test_answers_leave_out_the_control_and_what_is_not_significant() -> None:
    single, few, full = (
        Spectrum(split="train", k=2, tol=1e-3, samples=samples, draw=draw)
        for samples, draw in ((1, 0), (20, 0), (None, None))
    )
    settings = SMOKE.adversarial["M1"]
    original, robust = settings.original(0), settings.robust("FGSM", 0)
    made = {
        original: ([100.0, -0.5], [8.0, 1.0], [4.0, 1.0]),
        robust: ([1.0, -0.5], [3.0, 1.0], [2.0, 1.0]),
        settings.control(0): ([1.0, -1.0], [50.0, 1.0], [1.0, 0.5]),
    }
    outcomes = [
        Outcome(
            Task(spec, (single, few, full)),
            None,
            {m: Measurement(m, {"eigenvalues": v}, {}) for m, v in zip((single, few, full), values, strict=True)},
        )
        for spec, values in made.items()
    ]
    cells = [row[2] for row in rc.answers({"M1": outcomes}, name="tab-x", caption="x").rows]
    assert cells[3:5] == ["2 of 2", "1 of 2"], "-0.5 is less than a hundredth of 100"
    assert cells[6] == "1.5 to 2"


def test_lines_have_their_second_differences_in_the_tables(store: Store) -> None:
    ways = run.results("fig10", profile="smoke", store=store.root)
    row = rc.way_curvatures(ways, name="tab-x", caption="x").rows[0]
    values = next(iter(ways[0].measurements.values())).values
    losses = dict(zip(values["positions"], values["losses"]["train"], strict=True))
    assert list(losses) == [-0.5, 0.0, 0.5, 1.0, 1.5]
    end = (losses[0.5] - 2 * losses[1.0] + losses[1.5]) / 0.25
    assert row[0] == "FGSM"
    assert float(row[2]) == pytest.approx(end, rel=6e-3)
    lines = run.results("fig12", profile="smoke", store=store.root)
    assert rc.line_curvatures(lines, name="tab-x", caption="x").rows[0][0] == "ORI"
    assert len(figures_robust.interpolations(ways).axes[0].lines) == 4  # two sets, two ends
    assert len(figures_robust.robust_lines(lines).axes[0].lines) == 3


def test_second_derivatives_are_those_of_each_set_at_the_network_and_at_both_ends_of_a_way() -> None:
    spec, at, on = SMOKE.adversarial["M1"].original(0), [-1.0, -0.5, 0.0, 0.5, 1.0], [-0.5, 0.0, 0.5, 1.0, 1.5]
    line = LossLine(along=Spectrum(split="train", k=2, tol=1e-3), reach=1.0, points=5, batch=20)
    curves = {split: [t**4 + half * t**2 for t in at] for split, half in (("train", 2), ("test", 3), ("batch", 4))}
    way = Interpolation(points=5)
    ways = {split: [slope * t**2 + t**3 for t in on] for split, slope in (("train", 1), ("test", 2))}

    def outcome(measure: LossLine | Interpolation, positions: list[float], losses: dict[str, list[float]]) -> Outcome:
        found = Measurement(measure, {"positions": positions, "losses": losses}, {})
        return Outcome(Task(spec, (measure,)), None, {measure: found})

    # Exact for polynomials of degree four, so that the fourth power has no part in them.
    along = rc.line_curvatures([outcome(line, at, curves)], name="tab-x", caption="x")
    assert along.rows == (("ORI", "4", "6", "8"),)
    # Second differences have no part in a cube at zero, and six times its place elsewhere.
    between = rc.way_curvatures([outcome(way, on, ways)], name="tab-x", caption="x")
    assert between.rows == (("ORI", "2", "8", "4", "10"),)


def test_figures_show_each_network_and_what_is_missing(outcomes: list[Outcome]) -> None:
    figure = figures_robust.robust_spectra(outcomes)
    drawn = figure.axes[-1].lines
    assert sum(len(line.get_xdata()) == 5 for line in drawn) == 7  # type: ignore[arg-type]
    full = rc.spectra(outcomes)[-1]
    assert list(drawn[0].get_ydata()) == rc.eigenvalues(outcomes[0], full)  # type: ignore[arg-type]
    for axis, measure in zip(figure.axes, rc.spectra(outcomes), strict=True):
        lowest = min(min(rc.eigenvalues(o, measure)) for o in outcomes)
        assert axis.get_yscale() == ("symlog" if lowest < 0 else "log")
        assert axis.get_ylim()[0] < lowest
        assert not axis.texts
    assert figures_robust.few_against_all({"M1": outcomes}).axes[0].lines
    partly = [replace(o, measurements={m: f for m, f in o.measurements.items() if m == full}) for o in outcomes]
    assert figures_robust.robust_spectra(partly).axes[0].texts[0].get_text() == NOT_MEASURED
    some = [replace(o, measurements={}) if i in (2, 5) else o for i, o in enumerate(outcomes)]
    for axis in figures_robust.robust_spectra(some).axes:
        assert [text.get_text() for text in axis.texts] == [f"{NOT_MEASURED}:\nFGSM-10, L2HESS"]
    empty = [replace(o, measurements={}) for o in outcomes]
    for show in (figures_robust.robust_spectra, figures_robust.robust_lines, figures_robust.interpolations):
        assert NOT_MEASURED in show(empty).axes[0].texts[0].get_text()
    for name, show in (("fig5", figures_robust.robust_spectra), ("fig13", figures_robust.robust_lines)):
        assert show(from_record(name)).axes


def test_recorded_panels_of_a_smaller_scale_say_so(store: Store, outcomes: list[Outcome]) -> None:
    lines = run.results("fig12", profile="smoke", store=store.root)
    for show, these in ((figures_robust.robust_lines, lines), (figures_robust.robust_spectra, outcomes)):
        plain = [axis.get_title() for axis in show(these).axes if axis.get_title()]
        smaller = [Recorded(o.task, o.result, o.measurements, "laptop", papers_own=False) for o in these]
        assert [axis.get_title() for axis in show(smaller).axes if axis.get_title()] == [f"{t} (laptop)" for t in plain]


def test_negative_curvature_is_in_the_rest_and_between_layers(digits: Splits) -> None:
    model = build("M1", width=0.05, seed=0)
    train(model, digits, training.Recipe(batch_size=20, lr=0.05, momentum=0.9, max_epochs=1, seed=0))
    model = model.double().eval()
    one = Split(digits.train.images[:1].double(), digits.train.labels[:1])
    batches = one.batches(1)
    hessian, ggn = (operator(model, F.cross_entropy, batches).dense() for operator in (HessianOperator, GGNOperator))
    exact = torch.linalg.eigvalsh(hessian)
    largest, smallest = negative_curvature.extremes(model, one)
    assert largest.eigenvalue == pytest.approx(float(exact[-1]), rel=2e-3)
    assert smallest.eigenvalue == pytest.approx(float(exact[0]), rel=2e-3)
    assert smallest.rest < 0
    assert smallest.gauss_newton > -1e-12  # zero up to rounding: the matrix is positive semi-definite
    rest = hessian - ggn
    assert abs(float(rest.trace())) < 1e-10 * float(torch.linalg.matrix_norm(rest))
    n_negative = int((torch.linalg.eigvalsh(rest) < -1e-12).sum())
    assert n_negative >= 10  # so the Hessian must have some, whatever the Gauss-Newton matrix is:
    assert int((exact < -1e-12).sum()) >= n_negative - 9
    assert negative_curvature.within_layers(model, one, list(layers("M1"))) < 1e-12


def test_gradient_is_that_of_the_mean_loss(digits: Splits, tiny_m1: nn.Module) -> None:
    loss = F.cross_entropy(tiny_m1(digits.train.images), digits.train.labels)
    expected = torch.cat([part.flatten() for part in torch.autograd.grad(loss, list(tiny_m1.parameters()))])
    torch.testing.assert_close(
        negative_curvature._gradient(tiny_m1, digits.train), expected.double(), rtol=1e-4, atol=1e-6
    )


def test_a_smooth_network_has_a_rest_within_its_layers() -> None:
    class Smooth(nn.Module):
        """One layer whose outputs are not linear in its weights."""

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.tanh(self.layer(x))

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    split = Split(x, torch.tensor([0, 1, 2, 0, 1]))
    assert negative_curvature.within_layers(Smooth().double().eval(), split, ["layer"]) > 0.01


def test_tables_of_parts_and_of_the_lowest_eigenvalue(store: Store, outcomes: list[Outcome]) -> None:
    original = outcomes[0]
    spec = original.task.spec
    train_set = load_data(spec.data, "cpu").train
    model = trained_model(store, spec)
    worst = negative_curvature.hardest(model, train_set)
    with torch.no_grad():
        every = F.cross_entropy(model(train_set.images), train_set.labels, reduction="none")
        assert float(F.cross_entropy(model(worst.images), worst.labels)) == pytest.approx(float(every.max()), rel=1e-4)
    cases = {"1 (a)": rc.picked(train_set, 1, 0), "largest loss": worst}
    (row, _) = negative_curvature.parts_of_curvature(spec, cases, store=store, name="tab-x", caption="x").rows
    numbers = [float(cell) for cell in row[2:8]]
    assert numbers[0] == pytest.approx(numbers[1] + numbers[2], rel=0.06)
    assert numbers[0] == pytest.approx(max(rc.eigenvalues(original, rc.spectra(outcomes)[0])), rel=0.06)
    assert negative_curvature.lowest_curvature([], name="tab-x", caption="x").rows == ()
    (line,) = negative_curvature.lowest_curvature([original], store=store.root, name="tab-x", caption="x").rows
    hessian = HessianOperator(model.double(), F.cross_entropy, [(train_set.images.double(), train_set.labels)])
    assert float(line[1]) < 0
    v = torch.randn(hessian.shape[0], dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert float(v @ hessian.matvec(v) / (v @ v)) > float(line[1])


def test_a_profile_chooses_networks_and_eigenvalues_by_name() -> None:
    content = SMOKE.adversarial["M1"].model_dump(mode="json")
    chosen = AdversarialTraining.parse({**content, "curvature_of": ["L2GRAD"], "eigenvalues": 3}, "here")
    profile = SMOKE.model_copy(update={"adversarial": {"M1": chosen}})
    tasks = artefact("fig11").tasks(profile)
    assert [network_name(task.spec) for task in tasks] == ["ORI", "L2GRAD"]
    assert {m.k for task in tasks for m in task.measures if isinstance(m, Spectrum)} == {3}
    assert [network_name(task.spec) for task in artefact("fig10").tasks(profile)] == ["L2GRAD"]
    with pytest.raises(InputError, match="unknown attack"):
        AdversarialTraining.parse({**content, "curvature_of": ["NONE"]}, "here")
