"""The tables of the attack chapters: each number where it belongs, and what is not measured says so."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from hessnb.attacks import ATTACKS, damped_newton, l2_gradient, l2_hessian, nearest_class
from hessnb.data import Splits
from hessnb.experiments import grid
from hessnb.experiments.profile import load_profile
from hessnb.experiments.results import Measurement, Outcome, RunResult
from hessnb.experiments.spec import AttackAccuracy, AttackSpec
from hessnb.models import build
from hessnb.paper import attacks
from hessnb.paper.live import live_and_recorded
from hessnb.paper.outcomes import under
from hessnb.paper.recorded import Recorded
from hessnb.paper.tables import NOT_MEASURED
from hessnb.training import Epoch, Recipe, train


def outcome(name: str, network: str = "M1", seed: int = 0) -> Outcome:
    """An invented outcome of an artefact: the accuracy of its i-th attack is i per cent, of 200 samples."""
    tasks = grid.artefact(name).tasks_of_seed(load_profile("smoke"), seed)
    task = next(t for t in tasks if t.spec.model.name == network)
    values = {
        measure: Measurement(measure, {"accuracy": (i + seed) / 100, "n_samples": 200}, {})
        for i, measure in enumerate(task.measures, start=1)
    }
    epoch = Epoch(epoch=1, train_loss=0.1, train_accuracy=1.0, test_loss=0.1, test_accuracy=0.95, seconds=1.0, lr=0.1)
    result = RunResult(spec=task.spec, status="done", reason="", history=[epoch], provenance={})
    return Outcome(task, result, values)


def expected(found: Outcome, **settings: object) -> str:
    """The percentage of the one attack with these settings."""
    specs = [m.attack for m in found.task.measures if isinstance(m, AttackAccuracy)]
    (spec,) = [a for a in specs if all(getattr(a, field) == value for field, value in settings.items())]
    return f"{100 * found.measurements[AttackAccuracy(split='test', attack=spec)].values['accuracy']:.1f}"


@pytest.fixture(scope="module")
def network(digits: Splits) -> nn.Module:
    model = build("M1", width=0.2, seed=0)
    train(model, digits, Recipe(batch_size=20, lr=0.05, momentum=0.9, max_epochs=3, seed=0))
    return model.eval()


@pytest.fixture(scope="module")
def samples(digits: Splits) -> tuple[Tensor, Tensor]:
    some = digits.test.head(40)
    return some.images, some.labels


def column(rows: Sequence[Sequence[str]], i: int) -> list[str]:
    return [row[i] for row in rows]


def test_variations_change_one_choice_in_each_column() -> None:
    found = outcome("table5")
    table = attacks.variations([found], name="tab-x", caption="a caption")
    assert column(table.rows, 0) == list(ATTACKS)
    for row in table.rows:
        usual = {"method": row[0], "clip": False, "precision": None, "scale": None}
        assert row[1] == expected(found, **usual)
        assert row[2] == expected(found, **(usual | {"clip": True}))
        assert row[3] == expected(found, **(usual | {"precision": "own"}))
        assert row[4] == expected(found, **(usual | {"precision": "plain"}))
        assert row[5] == (expected(found, **(usual | {"scale": "unit"})) if row[0].startswith("L2") else "–")
    assert column(table.rows, 6) == ["60.4", "77.3", "14.3", "82.0", "33.2"]
    empty = attacks.variations([], name="tab-y", caption="a caption")
    assert {cell for row in empty.rows for cell in row[1:5]} == {NOT_MEASURED}


def test_clipping_shows_live_beside_record() -> None:
    live, record = outcome("table5"), [outcome("table5", seed=0), outcome("table5", seed=2)]
    table = attacks.clipping([live], record, name="tab-x", caption="a caption")
    assert column(table.rows, 0) == ["FGSM", "FGSM-10"]
    assert table.rows[1][1] == expected(live, method="FGSM-10", clip=False, precision=None)
    assert table.rows[1][2] == expected(live, method="FGSM-10", clip=True, precision=None)
    assert table.rows[0][3] == "2.0 ± 1.4"  # 1 and 3 per cent
    assert table.rows[1][5] == "77.3"


def test_steps_of_cg_go_from_one_to_exact_and_end_with_the_paper() -> None:
    live = outcome("cg")
    table = attacks.steps_of_cg([live], [], name="tab-x", caption="a caption")
    assert column(table.rows, 0) == ["1", "2", "3", "5", "10", "exact", "paper, steps not given"]
    assert table.rows[2][1] == expected(live, method="FHSM", cg_steps=3)
    assert table.rows[4][3] == expected(live, method="L2HESS", cg_steps=10)
    assert table.rows[5][3] == expected(live, method="L2HESS", solver="exact")
    assert set(column(table.rows[:-1], 2)) == {NOT_MEASURED}
    assert table.rows[-1][1:] == ("", "82.0", "", "33.2")
    alone = attacks.steps_of_cg([], [live], name="tab-x", caption="a caption")
    assert alone.header == ("CG steps", "FHSM, record", "L2HESS, record")
    assert alone.rows == tuple((row[0], row[1] or "82.0", row[3] or "33.2") for row in table.rows)


def test_attacks_of_equal_size_have_intervals_and_the_papers_numbers() -> None:
    live = outcome("section34", "C3")
    table = attacks.equal_size([live], [], name="tab-x", caption="a caption")
    assert column(table.rows, 0) == [
        "none", "FGSM", "L2GRAD", "FHSM, exact", "L2HESS, exact", "PGD", "DAMPED", "NEAREST",
    ]  # fmt: skip
    assert column(table.rows, 3) == ["79.5", "15.2", "12.4", "29.6", "22.9", "–", "–", "–"]
    assert table.rows[0][1].startswith("95.0 (")
    assert table.rows[1][1] == "1.0 (0.3 to 3.6)"  # 2 of 200, by Wilson
    assert set(column(table.rows, 2)) == {NOT_MEASURED}
    few = {m: replace(found, values=found.values | {"n_samples": 100}) for m, found in live.measurements.items()}
    (measure, *_), begun = live.task.measures, Outcome(live.task, None, {})
    mixed = replace(live, measurements=live.measurements | {measure: few[measure]})
    rows = attacks.equal_size([begun, mixed], [], name="tab-x", caption="a caption").rows
    assert rows[1][1] == "1.0 (0.2 to 5.4)", "1 of 100: the first attack was measured on fewer"
    assert rows[2][1] == table.rows[2][1]
    several = attacks.equal_size([live, outcome("section34", "C3", 2)], [], name="tab-x", caption="a caption")
    assert several.rows[1][1] == "2.0 ± 1.4"


def test_record_of_the_papers_scale_has_differences_and_says_under_which_profile_it_was_made() -> None:
    live = outcome("section34", "M1")
    provenance = {"commit": None, "device": "A processor", "torch": "2.13.0", "date": "2026-11-23T10:00:00"}
    assert live.result is not None
    there = {m: replace(found, provenance=provenance) for m, found in live.measurements.items()}
    own = Recorded(live.task, replace(live.result, provenance=provenance), there, "laptop")
    table = attacks.equal_size([live], [own], name="tab-x", caption="a caption")
    assert table.header[2:] == ("record (laptop)", "paper", "difference")
    assert column(table.rows, 4)[:4] == ["-4.3", "-59.4", "-12.3", "-79.0"]  # 95 - 99.3, then 1 to 3 per cent
    assert set(column(table.rows, 4)[-3:]) == {"–"}
    assert [origin.cells[3] for origin in table.origins] == ["unknown"]
    fhsm = next(m for m in there if isinstance(m, AttackAccuracy) and m.attack.method == "FHSM")
    close = replace(there[fhsm], values={"accuracy": 0.8988, "n_samples": 200})
    near = replace(own, measurements=there | {fhsm: close})
    row = attacks.equal_size([live], [near], name="tab-x", caption="a caption").rows[3]
    assert row[3:] == ("82.0", "+7.8"), "the paper's number is 82.04, and 7.84 the difference"
    smaller = attacks.equal_size([live], [replace(own, papers_own=False)], name="tab-x", caption="a caption")
    assert smaller.header[2:] == ("record (laptop, smaller)", "paper")
    found = outcome("table5")
    assert found.result is not None
    told = {m: replace(value, provenance=provenance) for m, value in found.measurements.items()}
    recorded = Recorded(found.task, replace(found.result, provenance=provenance), told, "paper")
    varied = attacks.variations([recorded], name="tab-y", caption="a caption")
    assert varied.header[-1] == "difference"
    assert varied.rows[0][-1] == f"{float(varied.rows[0][1]) - 60.37:+.1f}"


def test_accuracies_are_of_the_attack_on_the_network_itself() -> None:
    found = outcome("table5")
    attack = AttackSpec(method="PGD", eps=0.1, clip=False)
    transferred = AttackAccuracy(split="test", attack=attack, source=found.task.spec)
    other = Outcome(found.task, found.result, {transferred: Measurement(transferred, {"accuracy": 0.5}, {})})
    assert under([other], "PGD") == []


class Brightest(nn.Module):
    """Takes pixels for logits."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)


def seen(*classes: int) -> Tensor:
    """Return images that are taken for these classes."""
    return torch.eye(4)[list(classes)].view(-1, 1, 2, 2)


def test_same_mistakes_counts_wrong_classes_of_samples_that_were_right() -> None:
    y = torch.tensor([0, 1, 2, 3, 0])
    ends = {"A": seen(1, 2, 2, 3, 2), "B": seen(1, 3, 3, 0, 2), "C": seen(0, 1, 2, 3, 1)}
    table = attacks.same_mistakes(Brightest(), seen(0, 1, 2, 3, 1), y, ends, name="tab-x", caption="a caption")
    assert table.header == ("Attack", "makes wrong", "A", "B", "C")
    assert column(table.rows, 1) == ["2", "4", "0"]  # the last sample was wrong before
    shares = [[cell.split(" (")[0] for cell in row[2:]] for row in table.rows]
    assert shares == [["–", "50", "0"], ["25", "–", "0"], ["–", "–", "–"]]
    assert table.rows[0][3] == "50 (9 to 91)"  # Wilson's interval for one of two


def test_per_sample_shows_steps_only_where_something_was_iterated(
    network: nn.Module, samples: tuple[Tensor, Tensor]
) -> None:
    x, y = samples
    told = {
        "L2GRAD": l2_gradient.record(network, x, y, eps=0.1, bounds=None),
        "L2HESS": l2_hessian.record(network, x, y, eps=0.1, bounds=None, cg_steps=3),
    }
    table = attacks.per_sample(told, name="tab-x", caption="a caption")
    assert column(table.rows, 1) == ["2.800", "2.800"]  # 0.1 times 28
    assert table.rows[0][3:] == ("1.000", "–", "–", "0")
    assert float(table.rows[1][4]) == pytest.approx(3.0, abs=0.2)


def test_ways_compare_steps_and_classes(network: nn.Module, samples: tuple[Tensor, Tensor]) -> None:
    x, y = samples
    gradient, nearest = (f(network, x, y, eps=0.1, bounds=None) for f in (l2_gradient, nearest_class))
    ends = {"L2GRAD": gradient, "NEAREST": nearest, "nothing": x}
    table = attacks.ways(network, x, y, ends, gradient="L2GRAD", nearest="NEAREST", name="tab-x", caption="a caption")
    assert table.rows[0][2] == table.rows[1][3] == "1.00"
    assert table.rows[0][3] == table.rows[1][2]
    with torch.no_grad():
        right = 100 * float((network(x).argmax(1) == y).double().mean())
    assert table.rows[2][1].startswith(f"{right:.1f} (")
    assert table.rows[2][4] == "–"  # nobody is fooled by nothing


def test_classes_that_attacks_end_in_are_compared_with_the_second_most_probable() -> None:
    logits = torch.tensor([[3.0, 2, 1, 0], [3, 2, 1, 0], [3, 1, 2, 0], [3, 1, 2, 0], [0, 3, 1, 2]])
    x, y = logits.view(-1, 1, 2, 2), torch.tensor([0, 0, 0, 0, 2])
    ends = {"A": seen(1, 2, 2, 0, 3), "B": seen(1, 1, 1, 1, 2)}  # the last sample was wrong before
    table = attacks.ways(Brightest(), x, y, ends, gradient="A", nearest="B", name="tab-x", caption="a caption")
    assert [cell.split(" (")[0] for cell in column(table.rows, 1)] == ["20.0", "20.0"]
    assert [cell.split(" (")[0] for cell in column(table.rows, 4)] == ["66.7", "50.0"]


def test_damping_sweep_chooses_as_the_attack_does(network: nn.Module, samples: tuple[Tensor, Tensor]) -> None:
    x, y = samples
    grid_of_three = (0.0, math.inf, -1.1)
    sweep = attacks.damping_sweep(network, x, y, eps=0.05, dampings=grid_of_three)
    assert sum(sweep.chosen) == len(y)
    assert sweep.labels == ["Newton", "gradient", "−1.1"]
    alone = [damped_newton(network, x, y, eps=0.05, dampings=(d,), bounds=None) for d in grid_of_three]
    together = damped_newton(network, x, y, eps=0.05, dampings=grid_of_three, bounds=None)
    same = torch.stack([(end - together).flatten(1).abs().amax(1) < 1e-5 for end in alone])
    assert bool(same.any(0).all())
    assert all(n <= int(s) for n, s in zip(sweep.chosen, same.sum(1), strict=True))


def test_identities_hold_to_rounding(network: nn.Module, samples: tuple[Tensor, Tensor]) -> None:
    table = attacks.identities(network, *samples, name="tab-x", caption="a caption")
    found = {row[0]: row for row in table.rows}
    assert float(found["the wrong logits move alike"][3]) < 1e-6
    assert float(found["one CG step is the gradient"][4]) < 1e-12
    assert float(found["so is infinite damping"][4]) < 1e-9
    assert float(found["Newton's step ascends"][4]) > 0


def test_live_results_are_of_one_network(tmp_path: Path) -> None:
    live, record = live_and_recorded("section34", network="M1", profile="smoke", store=tmp_path / "store")
    assert [o.task.spec.model.name for o in live] == ["M1"]
    assert live[0].complete
    assert {o.task.spec.model.name for o in record} <= {"M1"}
