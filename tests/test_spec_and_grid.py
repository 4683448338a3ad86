"""Specifications, their keys, profiles, and what the grid asks for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hessnb.attacks import ATTACKS
from hessnb.errors import InputError
from hessnb.experiments import grid
from hessnb.experiments.profile import load_profile, profile_names
from hessnb.experiments.spec import (
    SPLITS,
    AttackAccuracy,
    AttackSpec,
    DataSpec,
    InputCurvature,
    LossLine,
    LossPlane,
    Measure,
    ModelSpec,
    PowerIteration,
    RunSpec,
    Sharpness,
    Spectrum,
    parse_measure,
)
from hessnb.paper.published import published
from hessnb.training import Recipe

RECIPE = Recipe(batch_size=64, lr=0.01, momentum=0.9, max_epochs=10, seed=0, loss_target=0.001)
SPEC = RunSpec(data=DataSpec(name="mnist"), model=ModelSpec(name="M1"), recipe=RECIPE)


def test_key_depends_on_content_alone() -> None:
    again = RunSpec.parse(SPEC.model_dump(mode="json"), "here")
    assert again == SPEC
    assert again.key == SPEC.key


def test_key_differs_when_any_field_differs() -> None:
    others = [
        SPEC.model_copy(update={"data": DataSpec(name="mnist", n_train=100)}),
        SPEC.model_copy(update={"model": ModelSpec(name="M1", variant="strided")}),
        SPEC.model_copy(update={"recipe": Recipe(64, 0.01, 0.9, 10, 1, 0.001)}),
    ]
    assert len({SPEC.key, *(other.key for other in others)}) == 4


def test_absent_fields_do_not_enter_the_key() -> None:
    assert "n_train" not in SPEC.canonical()
    assert "null" not in SPEC.canonical()


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({"data": {"name": "imagenet"}}, "imagenet"),
        ({"model": {"name": "VGG"}}, "VGG"),
        ({"model": {"name": "M1", "variant": "wide"}}, "wide"),
        ({"data": {"name": "cifar10"}}, "colour channels"),
        ({"data": {"name": "mnist", "n_train": "100"}}, "n_train"),
        ({"recipe": {"batch_size": 0, "lr": 0.1, "momentum": 0.9, "max_epochs": 1, "seed": 0}}, "batch_size"),
        ({"recipe": {"batch_size": 8, "speed": 1}}, "speed"),
        ({"attack": {"method": "FGSM", "eps": 0.1, "clip": False}}, "parent"),
        ({"attack": {"method": "CW", "eps": 0.1, "clip": False}}, "CW"),
        ({"attack": {"method": "FGSM", "eps": 0.1, "clip": False, "cg_steps": 3}}, "cg_steps"),
        ({"colour": "blue"}, "colour"),
    ],
)
def test_wrong_specification_is_one_line_that_names_the_fault(content: dict[str, object], named: str) -> None:
    with pytest.raises(InputError, match=named) as error:
        RunSpec.parse(SPEC.model_dump(mode="json") | content, "the file")
    assert str(error.value).startswith("the file: ")
    assert "\n" not in str(error.value)


def test_parent_is_the_same_network() -> None:
    robust = grid.artefact("table3").tasks(load_profile("smoke"))[1].spec
    content = robust.model_dump(mode="json", exclude_none=True)
    assert RunSpec.parse(content, "here") == robust
    content["parent"]["model"]["width"] = 0.123
    with pytest.raises(InputError, match="here: .*the parent is M1.*it must be the same network, M1"):
        RunSpec.parse(content, "here")


@pytest.mark.parametrize("name", profile_names())
def test_every_profile_and_artefact_resolves(name: str) -> None:
    profile = load_profile(name)
    assert profile.name == name
    for artefact in grid.ARTEFACTS.values():
        tasks = artefact.tasks(profile, 2)
        assert {task.spec.recipe.seed for task in tasks} == {0, 1}
        assert len({task.spec.key for task in tasks}) == len(tasks)


def test_paper_profile_is_the_papers_table_seven() -> None:
    profile = load_profile("paper")
    specs = [task.spec for task in grid.artefact("table7").tasks(profile, 1)]
    assert [spec.recipe.batch_size for spec in specs] == [64, 128, 256, 512, 1024, 2048]
    assert {(s.data, s.model, s.recipe.loss_target) for s in specs} == {
        (DataSpec(name="mnist"), ModelSpec(name="M1"), 0.001)
    }
    measures = grid.artefact("table7").tasks(profile, 1)[0].measures
    assert measures[:2] == (Spectrum(split="train", k=2, tol=1e-4), Spectrum(split="test", k=1, tol=1e-4))
    assert measures[2:4] == (InputCurvature(split="train"), InputCurvature(split="test"))
    attacks = [m for m in measures if isinstance(m, AttackAccuracy)]
    assert [(m.split, m.attack) for m in attacks] == [
        (split, AttackSpec(method="FGSM", eps=eps, clip=True, precision=precision))
        for precision in (None, "plain")
        for eps in (0.2, 0.1, 0.05)
        for split in SPLITS
    ] + [("test", AttackSpec(method="FGSM-10", eps=0.1, clip=True))]  # of which section 3.2 gives no number
    assert measures[4:] == (*attacks, Spectrum(split="train", k=20, tol=1e-4))


@pytest.mark.parametrize(
    ("name", "networks", "sizes", "target"),
    [
        ("table1", ["C1"] * 8 + ["C2"] * 4, [16, 32, 64, 128, 256, 512, 1024, 2048, 256, 512, 1024, 2048], 0.001),
        ("table2", ["CR"] * 4, [64, 128, 256, 512], 0.02),
    ],
)
def test_paper_profile_is_the_papers_other_tables_of_batch_sizes(
    name: str, networks: list[str], sizes: list[int], target: float
) -> None:
    tasks = grid.artefact(name).tasks(load_profile("paper"), 1)
    assert [task.spec.model.name for task in tasks] == networks
    assert [task.spec.recipe.batch_size for task in tasks] == sizes
    assert {task.spec.recipe.loss_target for task in tasks} == {target}
    assert list(published(name).index) == list(zip(networks, sizes, strict=True))
    eps = {m.attack.eps for task in tasks for m in task.measures if isinstance(m, AttackAccuracy)}
    assert eps == {0.02, 0.01, 0.005}


@pytest.mark.parametrize(("name", "eps", "epochs"), [("table3", 0.1, 5), ("table4", 0.02, 10)])
def test_paper_profile_trains_against_each_attack_and_tests_all_on_all(name: str, eps: float, epochs: int) -> None:
    original, *robust = grid.artefact(name).tasks(load_profile("paper"), 1)
    assert original.spec.parent is None
    assert (original.spec.recipe.max_epochs, original.spec.recipe.lr, original.spec.recipe.decay_every) == (
        100,
        0.01,
        5,
    )
    assert [task.spec.attack.method for task in robust if task.spec.attack] == list(ATTACKS)
    for task in robust:
        assert task.spec.parent == original.spec
        assert task.spec.recipe.max_epochs == epochs
        attacks = [m for m in task.measures if isinstance(m, AttackAccuracy)]
        assert {(m.attack.method, m.source) for m in attacks} == {
            (method, source) for method in ATTACKS for source in (None, original.spec)
        }
        assert {(m.attack.eps, m.attack.clip, m.split) for m in attacks} == {(eps, False, "test")}
        assert {m.attack.cg_steps for m in attacks if m.attack.method in ("FHSM", "L2HESS")} == {3}


def attacks_of(name: str, place: int) -> list[AttackSpec]:
    """Return the attacks on the network at a place of an artefact under the profile paper, in their order."""
    measures = grid.artefact(name).tasks(load_profile("paper"), 1)[place].measures
    assert all(isinstance(m, AttackAccuracy) and (m.split, m.source) == ("test", None) for m in measures)
    return [m.attack for m in measures if isinstance(m, AttackAccuracy)]


@pytest.mark.parametrize(("place", "eps"), [(0, 0.1), (1, 0.02)])
def test_section_34_compares_attacks_of_one_size_that_are_not_clipped(place: int, eps: float) -> None:
    assert attacks_of("section34", place) == [
        AttackSpec(method=method, eps=eps, clip=False, solver="exact" if method in ("FHSM", "L2HESS") else None)
        for method in ("FGSM", "L2GRAD", "FHSM", "L2HESS", "PGD", "DAMPED", "NEAREST")
    ]


@pytest.mark.parametrize(("place", "eps"), [(0, 0.1), (1, 0.02)])
def test_curves_are_of_clipped_attacks_from_a_quarter_of_the_papers_size_to_three_times(place: int, eps: float) -> None:
    steps = {"FHSM": 3, "L2HESS": 3}
    assert attacks_of("eps", place) == [
        AttackSpec(method=method, eps=round(multiple * eps, 6), clip=True, cg_steps=steps.get(method))
        for method in ATTACKS
        for multiple in (0.25, 0.5, 1.0, 1.5, 2.0, 3.0)
    ]


def test_choices_of_the_five_attacks_are_changed_one_at_a_time() -> None:
    found = attacks_of("table5", 0)
    assert [attack.method for attack in found] == [*list(ATTACKS) * 4, "L2GRAD", "L2HESS"]
    assert {attack.eps for attack in found} == {0.1}
    assert [(attack.clip, attack.precision, attack.scale) for attack in found] == [
        *[(False, None, None)] * 5,
        *[(True, None, None)] * 5,
        *[(False, "own", None)] * 5,
        *[(False, "plain", None)] * 5,
        *[(False, None, "unit")] * 2,
    ]


def test_strong_attacks_are_clipped_restarted_and_on_a_thousand_samples() -> None:
    tasks = grid.artefact("strong").tasks(load_profile("paper"), 1)
    assert [task.spec.attack and task.spec.attack.method for task in tasks] == [None, *ATTACKS]
    for task in tasks:
        assert task.measures == tuple(
            AttackAccuracy(
                split="test", attack=AttackSpec(method=method, eps=eps, clip=True, restarts=restarts), n=1000
            )
            for eps in (0.1, 0.3)
            for method, restarts in (("FGSM", None), ("PGD", 5), ("AUTOATTACK", None))
        )


def test_lines_are_drawn_once_more_a_hundred_times_closer_to_the_network() -> None:
    along, *lines = grid.artefact("fig6").tasks(load_profile("paper"), 1)[0].measures
    assert [(m.along, m.points, m.reach) for m in lines if isinstance(m, LossLine)] == [
        (along, 41, 0.5),
        (along, 5, 0.005),
    ]


@pytest.mark.parametrize(
    ("name", "measures"),
    [
        ("sharpening", (Sharpness(points=41, tol=1e-2, samples=5000),)),
        (
            "stopping",
            (Spectrum(split="train", k=20, tol=1e-4), PowerIteration(split="train", k=5, tol=1e-4)),
        ),
        (
            "seeds",
            (
                Spectrum(split="train", k=2, tol=1e-4),
                AttackAccuracy(split="test", attack=AttackSpec(method="FGSM", eps=0.1, clip=True)),
            ),
        ),
    ],
)
def test_paper_profile_measures_beyond_the_papers_tables(name: str, measures: tuple[Measure, ...]) -> None:
    for task in grid.artefact(name).tasks(load_profile("paper"), 1):
        assert task.measures == measures


@pytest.mark.parametrize("profile", profile_names())
def test_controls_are_robust_runs_without_attack_and_measured_as_these(profile: str) -> None:
    settings = load_profile(profile)
    controls = {task.spec.model.name: task for task in grid.artefact("control").tasks(settings, 1)}
    figures = {"M1": ("fig11", "fig12"), "C3": ("fig5", "fig13")}
    assert controls.keys() == figures.keys()
    for network, control in controls.items():
        robust = settings.adversarial[network].robust("L2GRAD", 0)
        assert control.spec.attack is None
        assert robust.model_copy(update={"attack": None}) == control.spec
        assert control.spec.label == robust.label.replace("L2GRAD", "control")
        theirs = {
            measure for name in figures[network] for measure in grid.artefact(name).tasks(settings, 1)[0].measures
        }
        assert set(control.measures) == theirs


@pytest.mark.parametrize("profile", profile_names())
def test_every_artefact_has_tasks_under_every_profile_and_parents_come_first(profile: str) -> None:
    plan = grid.plan(list(grid.ARTEFACTS.values()), load_profile(profile), 1)
    specs = [task.spec for task in plan]
    assert len(set(specs)) == len(specs)
    for place, task in enumerate(plan):
        assert task.measures
        if task.spec.parent is not None:
            assert task.spec.parent in specs[:place]


def test_figures_share_the_runs_of_the_tables_and_the_eigenvectors_of_their_spectra() -> None:
    profile = load_profile("quick")
    table, figure, lines, planes = (
        grid.artefact(name).tasks(profile, 1) for name in ("table7", "fig1", "fig6", "fig7")
    )
    runs = [task.spec for task in table]
    assert [task.spec for task in figure if task.spec.model.name == "M1"] == [task.spec for task in lines] == runs
    assert [task.spec for task in planes] == [runs[0], runs[-1]]
    for drawn in (*lines, *planes):
        there = next(task for task in table if task.spec == drawn.spec).measures
        for measure in drawn.measures:
            assert (measure.along if isinstance(measure, LossLine | LossPlane) else measure) in there
    for drawn in lines:  # with its eigenvalue, and once more close to the network
        eigenvalue, far, close = drawn.measures
        assert isinstance(far, LossLine)
        assert isinstance(close, LossLine)
        assert far.along == close.along == eigenvalue
        assert (far.reach, close.reach) == (profile.landscape.reach, profile.landscape.reach / 100)


def _with(tmp_path: Path, old: str, new: str) -> Path:
    text = (Path(grid.__file__).parent / "profiles" / "smoke.toml").read_text()
    assert old in text
    path = tmp_path / "mine.toml"
    path.write_text(text.replace(old, new))
    return path


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("seeds = 1", "seeds = 1\nspeed = 3", "speed"),
        ("seeds = 1", 'seeds = "one"', "seeds"),
        ("seeds = 1", "seeds = 0", "seeds"),
        ("lr = 0.05", "lr = -0.05", "lr"),
        ("batch_sizes = [20, 100]", 'batch_sizes = ["20"]', "batch_sizes"),
        ("batch_sizes = [20, 100]", "batch_sizes = []", "batch_sizes"),
        ("batch_sizes = [20, 100]", "batch_sizes = [20, 100000]", r"large_batch.M1.*100,000 samples"),
        ("[large_batch.M1]", "[large_batch.M2]", "M1"),
        ("[adversarial.C3]", "[adversarial.C4]", "C3"),
        ("seeds = 1", "seeds = = 1", "TOML"),
        ("batch = ", "batch = 4000 # ", r"landscape\.batch = 4,000, but n_train of"),
        ("samples = ", "samples = 4000 # ", r"edge\.samples = 4,000, but n_train of M1"),
        ("n = 4", "n = 5000", r"strong\.n = 5,000, but n_test of adversarial M1 is 100"),
        ("batch_sizes = [20]", "batch_sizes = [20, 301]", r"sweep\.batch_sizes = 301, but n_train of M1 is 300"),
        ('{ name = "M1", width = 0.1 }', '{ name = "C1" }', "edge: .*C1 takes 3 colour channels, mnist5k has 1"),
        ('"mnist5k", n_train = 100, n_test = 50', '"mnist5k"', "mine.toml: edge: data needs n_train"),
        ("tol = 1e-3", "tol = inf", "finite"),
        ('trainings = ["L2GRAD"]', 'trainings = ["NOPE"]', "unknown attack 'NOPE'"),
        ("seeds = 1", 'seeds = 1\nname = "../up"', "name"),
    ],
)
def test_wrong_profile_is_one_line_that_names_the_fault(tmp_path: Path, old: str, new: str, named: str) -> None:
    with pytest.raises(InputError, match=named) as error:
        load_profile(_with(tmp_path, old, new))
    assert "\n" not in str(error.value)


def test_own_profile_is_read_from_its_path(tmp_path: Path) -> None:
    profile = load_profile(_with(tmp_path, "seeds = 1", "seeds = 4"))
    assert (profile.name, profile.seeds) == ("mine", 4)


@pytest.mark.parametrize("name", ["huge", "no/such/file.toml"])
def test_unknown_profile_is_an_input_error(name: str) -> None:
    with pytest.raises(InputError, match=name):
        load_profile(name)


def test_unknown_artefact_lists_what_there_is() -> None:
    with pytest.raises(InputError, match=r"table9.*table7"):
        grid.artefact("table9")


@pytest.mark.parametrize("file", ["my own.toml", "-mine.toml", ".toml"])
def test_file_whose_name_cannot_name_a_profile_is_an_input_error(tmp_path: Path, file: str) -> None:
    path = _with(tmp_path, "seeds = 1", "seeds = 4").rename(tmp_path / file)
    with pytest.raises(InputError, match="name, where it gives none\\) may hold letters, digits, _ . - only") as error:
        load_profile(path)
    assert f"{path}: name: {path.stem!r}" in str(error.value)
    path.write_text(f'name = "mine"\n{path.read_text()}')
    assert load_profile(path).name == "mine"


@pytest.mark.parametrize("seeds", ["abc", 1.5, True, 0, 1001])
def test_seeds_that_cannot_be_counted_are_an_input_error(seeds: Any) -> None:
    with pytest.raises(InputError, match=f"seeds = {seeds!r}: it must be"):
        grid.artefact("fig1").tasks(load_profile("smoke"), seeds)


def test_measures_are_told_apart_by_their_kind_and_a_new_field_changes_no_key() -> None:
    whole = Spectrum(split="train", k=20, tol=1e-4)
    block = Spectrum(split="train", k=20, tol=1e-4, parameters="3")
    power = PowerIteration(split="train", k=20, tol=1e-4)
    assert whole.canonical() == '{"k":20,"kind":"spectrum","split":"train","tol":0.0001}'
    assert len({whole.key, block.key, power.key}) == 3
    assert len({whole.slug, block.slug, power.slug}) == 3
    for measure in (whole, block, power):
        assert parse_measure(json.loads(measure.canonical()), "here") == measure


@pytest.mark.parametrize("content", [{"kind": "guess"}, {}, "spectrum", {"kind": "spectrum", "k": 0}])
def test_unknown_or_wrong_measure_names_where_it_was_found(content: object) -> None:
    with pytest.raises(InputError, match="this file"):
        parse_measure(content, "this file")


def test_layers_artefact_measures_each_layer_of_the_smallest_and_largest_batch() -> None:
    profile = load_profile("quick")
    found = grid.artefact("layers").tasks(profile, 1)
    assert [task.spec.recipe.batch_size for task in found] == [16, 256]
    assert [m.parameters for m in found[0].measures if isinstance(m, Spectrum)] == ["0", "3", "7", "9"]
