"""Adversarial training in the grid: what is trained on what, resumed to the bit, and what the tables say of it."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from hessnb import training
from hessnb.attacks import ATTACKS, fgsm
from hessnb.data import Split, Splits
from hessnb.errors import RunFailed
from hessnb.experiments import grid, networks, run
from hessnb.experiments.measure import adversarial_examples
from hessnb.experiments.profile import load_profile
from hessnb.experiments.results import Measurement, Outcome, RunResult
from hessnb.experiments.spec import AttackAccuracy, AttackSpec, InputCurvature, Measure, RunSpec
from hessnb.experiments.store import Store
from hessnb.models import build
from hessnb.paper import adversarial, large_batch
from hessnb.paper.outcomes import under
from hessnb.paper.published import published
from hessnb.paper.tables import NOT_MEASURED
from hessnb.training import Recipe, State, train

RECIPE = Recipe(batch_size=50, lr=0.05, momentum=0.9, max_epochs=3, seed=0)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("adversarial") / "store")


@pytest.fixture(scope="module")
def outcomes(store: Store) -> list[Outcome]:
    """What table3 needs under the smoke profile, computed."""
    return run.compute(store, grid.artefact("table3").tasks(load_profile("smoke"), 1))


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def test_each_step_is_taken_on_inputs_perturbed_for_the_network_as_it_is_then(digits: Splits) -> None:
    seen: list[tuple[list[Tensor], Tensor]] = []

    def perturbation(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        seen.append((weights(model), x))
        return torch.zeros_like(x)  # the inputs say nothing: only the last bias can learn

    model = build("M1", width=0.2, seed=0)
    before = weights(model)
    train(model, digits, Recipe(50, 0.05, 0.0, 1, 0), perturbation=perturbation)
    assert len(seen) == -(-len(digits.train) // 50)
    assert all(torch.equal(a, b) for a, b in zip(seen[0][0], before, strict=True))
    assert not torch.equal(seen[1][0][-1], before[-1])
    assert torch.equal(weights(model)[0], before[0])  # the first kernel never had an input
    assert sum(len(x) for _, x in seen) == len(digits.train)


def test_adversarial_training_goes_on_in_the_same_bits(digits: Splits) -> None:
    perturbation = partial(fgsm, eps=0.1)
    whole, parts = build("M1", width=0.2, seed=0), build("M1", width=0.2, seed=0)
    train(whole, digits, RECIPE, perturbation=perturbation)
    kept: list[State] = []

    def stop(state: State) -> None:
        kept.append(State(state.epoch, {k: v.clone() for k, v in state.model.items()},
                          [m.clone() for m in state.momentum], state.history))  # fmt: skip
        if state.epoch == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(parts, digits, RECIPE, perturbation=perturbation, on_epoch=stop)
    train(parts, digits, RECIPE, perturbation=perturbation, state=kept[-1])
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(parts), strict=True))
    plain = build("M1", width=0.2, seed=0)
    train(plain, digits, RECIPE)
    assert not torch.equal(weights(plain)[0], weights(whole)[0])


def test_robust_networks_begin_where_the_original_ended(store: Store, outcomes: list[Outcome]) -> None:
    original, *robust = outcomes
    assert [adversarial.network_name(o.task.spec) for o in outcomes] == ["ORI", *ATTACKS]
    settings = load_profile("smoke").adversarial["M1"]
    splits = networks.load_data(settings.data, "cpu")
    first = networks.trained_model(store, original.task.spec)
    spec = robust[0].task.spec
    assert spec.attack is not None
    again = train(first.train(), splits, spec.recipe, perturbation=partial(fgsm, eps=settings.eps, bounds=None))
    found = networks.trained_model(store, spec).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in again.model.items())
    assert robust[0].result is not None
    assert len(robust[0].result.history) == settings.adversarial_epochs


def test_accuracies_are_those_of_the_attacks_on_the_network_or_on_its_parent(
    store: Store, outcomes: list[Outcome]
) -> None:
    settings = load_profile("smoke").adversarial["M1"]
    test = networks.load_data(settings.data, "cpu").test
    original, robust = outcomes[0], outcomes[1]
    source = networks.trained_model(store, original.task.spec)
    target = networks.trained_model(store, robust.task.spec)
    for method, attack in ATTACKS.items():
        options = {"cg_steps": settings.cg_steps} if method in ("FHSM", "L2HESS") else {}
        for made_on, white_box in ((source, False), (target, True)):
            x = attack(made_on, test.images, test.labels, eps=settings.eps, bounds=None, **options)
            expected = training.evaluate(target, Split(x, test.labels))[1]
            assert under([robust], method, transferred=not white_box) == [pytest.approx(100 * expected)]
        both = [under([original], method, transferred=flag) for flag in (False, True)]
        assert both[0] == both[1] != []
    values = robust.measurements[AttackAccuracy(split="test", attack=settings.attack("FGSM"))].values
    assert values["linf_norm"] == pytest.approx(settings.eps, rel=1e-6)
    assert values["n_samples"] == len(test)
    assert values["unmoved"] == 0


def test_attacked_sets_are_made_once_for_all_networks(
    store: Store, outcomes: list[Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = outcomes[0].task.spec
    attack = AttackSpec(method="FGSM", eps=0.07, clip=True)
    first = adversarial_examples(store, spec, attack, "test", torch.device("cpu"))
    monkeypatch.setattr(
        "hessnb.experiments.measure.attack_function", lambda attack: pytest.fail("the set was made again")
    )
    assert torch.equal(adversarial_examples(store, spec, attack, "test", torch.device("cpu")), first)


def test_table_has_the_papers_layout_and_numbers_beside_ours(outcomes: list[Outcome]) -> None:
    table = adversarial.transfer("table3", outcomes, name="tab-x", caption="a caption")
    assert table.header == ("Network", "clean", *ATTACKS, "mean of attacks")
    assert [row[0] for row in table.rows] == ["ORI", *ATTACKS]
    (fgsm_on_original,) = under(outcomes[:1], "FGSM")
    assert table.rows[0][2] == f"{fgsm_on_original:.1f} (60.4)"
    assert table.rows[5][7].endswith("(91.3)")
    values = [float(cell.split()[0]) for cell in table.rows[3][2:]]
    assert values[-1] == pytest.approx(sum(values[:-1]) / 5, abs=0.11)
    white = adversarial.white_box("table3", outcomes, name="tab-y", caption="a caption")
    assert "(" not in "".join(cell for row in white.rows for cell in row)
    empty = adversarial.transfer("table4", [], name="tab-z", caption="a caption")
    assert {cell for row in empty.rows for cell in row[1:]} == {NOT_MEASURED}


def test_published_tables_of_adversarial_training_are_the_papers() -> None:
    third, fourth = published("table3"), published("table4")
    for table in (third, fourth):
        means = table[list(ATTACKS)].mean(axis=1)
        assert ((means - table["mean"]).abs() <= 0.011).all()  # the paper's own means, to its two digits
    assert (third["FGSM"]["ORI"], fourth["clean"]["ORI"]) == (60.37, 79.46)


def test_a_network_whose_parent_failed_says_so(store: Store) -> None:
    settings = load_profile("smoke").adversarial["M1"]
    wild = settings.model_copy(update={"lr": 1e30})
    with pytest.raises(RunFailed, match="parent failed"):
        run.train_run(store, wild.robust("FGSM", 0))


def test_tables_of_batch_sizes_show_robustness_and_input_curvature(store: Store) -> None:
    tasks = grid.artefact("table1").tasks(load_profile("smoke"), 1)[:2]
    found = run.compute(store, tasks)
    table = large_batch.robustness("table1", found, name="tab-x", caption="a caption")
    assert table.header == ("ε", "Batch", "exact", "float32, ours", "paper", "Seeds")
    sizes = [str(task.spec.recipe.batch_size) for task in tasks]
    assert [row[:2] for row in table.rows] == [(eps, size) for eps in ("0.02", "0.01", "0.005") for size in sizes]
    measured = large_batch.attacked(0.01)([found[0]], "test")
    assert measured == [
        100 * found[0].measurements[AttackAccuracy(split="test", attack=_fgsm(0.01))].values["accuracy"]
    ]
    inputs = large_batch.input_curvature("table1", found, name="tab-y", caption="a caption")
    values = found[1].measurements[InputCurvature(split="train")].values
    assert inputs.rows[1][1].startswith(f"{values['lambda1']:.3g} (")
    shown = large_batch.correlations(found, 0.01, name="tab-z", caption="a caption")
    assert {cell for row in shown.rows for cell in row[3:]} == {"too few"}
    iterated = large_batch.iterated(found, 0.01, name="tab-i", caption="a caption")
    ten = AttackSpec(method="FGSM-10", eps=0.01, clip=True)
    fgsm10 = [100 * o.measurements[AttackAccuracy(split="test", attack=ten)].values["accuracy"] for o in found]
    column = iterated.header.index("FGSM-10")
    assert [row[column] for row in iterated.rows] == [*(f"{accuracy:.1f}" for accuracy in fgsm10), "too few"]
    assert iterated.rows[0][2] == f"{measured[0]:.1f}"


def _fgsm(eps: float) -> AttackSpec:
    return AttackSpec(method="FGSM", eps=eps, clip=True)


def test_correlations_are_those_of_the_measured_pairs(outcomes: list[Outcome]) -> None:
    spec = outcomes[0].task.spec
    result = outcomes[0].result
    made = [_invented(spec, result, i, 90.0 - 10 * i) for i in range(6)]
    table = large_batch.correlations(made, 0.01, name="tab-z", caption="a caption")
    assert table.rows[1][3].startswith("too few")  # no spectrum
    assert table.rows[1][4].startswith("-1.00")
    assert table.rows[1][5].startswith("-1.00")


def test_correlations_within_a_batch_size_leave_out_what_it_explains(outcomes: list[Outcome]) -> None:
    spec, result = outcomes[0].task.spec, outcomes[0].result

    def network(size: int, seed: int, curvature: int, accuracy: float) -> Outcome:
        recipe = replace(spec.recipe, batch_size=size, seed=seed)
        return _invented(spec.model_copy(update={"recipe": recipe}), result, curvature, accuracy)

    made = [network(8, seed, 1 + seed, 80.0 + seed) for seed in range(3)]
    made += [network(16, seed, 7 + seed, 50.0 + seed) for seed in range(3)]
    assert large_batch.correlations(made, 0.01, name="tab-z", caption="c").rows[1][4].startswith("-0.54")
    alone = network(32, 0, 20, 10.0)
    rows = large_batch.correlations_within([*made, alone], 0.01, name="tab-z", caption="c").rows
    assert rows[1] == ("M1", "test", "3 + 3", "too few", "1.00 (p = 0.056)", "1.00 (p = 0.056)")
    without = [*made[:5], replace(made[5], measurements={})]
    rows = large_batch.correlations_within(without, 0.01, name="tab-z", caption="c").rows
    assert rows[1][2] == "3", "a group of two has no order to speak of"
    assert large_batch.correlations(without, 0.01, name="tab-z", caption="c").rows[1][2] == "5"
    (_, few) = large_batch.correlations_within([alone], 0.01, name="tab-z", caption="c").rows
    assert few == ("M1", "test", "too few", "too few", "too few", "too few")


def _invented(spec: RunSpec, result: RunResult | None, i: int, accuracy: float) -> Outcome:
    inputs, attack = InputCurvature(split="test"), AttackAccuracy(split="test", attack=_fgsm(0.01))
    values: dict[Measure, dict[str, float]] = {
        inputs: {"lambda1": float(i), "gradient_norm": 2.0 * i},
        attack: {"accuracy": accuracy / 100},
    }
    return Outcome(grid.Task(spec, tuple(values)), result, {m: Measurement(m, v, {}) for m, v in values.items()})
