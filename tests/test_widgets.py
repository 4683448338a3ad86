"""The explorers: live callbacks and the page's own states say what the package computes when called directly."""

from __future__ import annotations

import base64
import html
import io
import json
import re
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from hessnb.alternatives import missing_in_html
from hessnb.attacks import ATTACKS, BEYOND, fgsm
from hessnb.data import Split, Splits, load
from hessnb.errors import InputError
from hessnb.landscape import along, displaced
from hessnb.models import build
from hessnb.widgets import Choice, Explorer, attack_explorer, landscape_explorer, leading_directions, pixels


@pytest.fixture(scope="module")
def models() -> dict[str, nn.Module]:
    return {"16": build("M1", width=0.1, seed=0).eval(), "256": build("M1", width=0.1, seed=1).eval()}


@pytest.fixture(scope="module")
def directions(models: dict[str, nn.Module], digits: Splits) -> dict[str, dict[str, Tensor]]:
    return {name: leading_directions(model, digits.train.head(50)) for name, model in models.items()}


@pytest.fixture(scope="module")
def landscape(models: dict[str, nn.Module], directions: dict[str, dict[str, Tensor]], digits: Splits) -> Explorer:
    return landscape_explorer(models, directions, digits, positions=[-1.0, 0.0, 0.5], finer=2, n_samples=80)


@pytest.fixture(scope="module")
def attack(models: dict[str, nn.Module], digits: Splits) -> Explorer:
    return attack_explorer(models["16"], digits.test.head(2), digits.classes, eps=(0.1, 0.3), finer=2)


def data_of(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json">(.*?)</script>', page, re.S)
    assert found
    data: dict[str, Any] = json.loads(found[1])
    return data


def pixels_of(uri: str) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))).convert("RGB"))


# -- the landscape -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chosen", [(0, 0, 0), (1, 2, 4), (0, 1, 1)], ids=["curve", "other network", "between"])
def test_landscape_state_is_what_direct_calls_give(
    landscape: Explorer,
    models: dict[str, nn.Module],
    directions: dict[str, dict[str, Tensor]],
    digits: Splits,
    chosen: tuple[int, ...],
) -> None:
    t = [-1.0, -0.5, 0.0, 0.25, 0.5][chosen[2]]
    name = ["16", "256"][chosen[0]]
    direction = list(directions[name].values())[chosen[1]]
    state = landscape.state(chosen)
    for key, split in (("train", digits.train.head(80)), ("test", digits.test.head(80))):
        direct = along(models[name], F.cross_entropy, {key: [(split.images, split.labels)]}, direction, [t])
        assert state[f"loss_{key}"] == f"{direct.losses[key].item():.3g}"
        assert state[f"accuracy_{key}"] == f"{100 * direct.accuracies[key].item():.1f} %"
    probabilities = displaced(models[name], direction, t)(digits.test.images[:6]).double().softmax(1)
    for i, (p, label) in enumerate(zip(probabilities, digits.test.labels, strict=False)):
        right = "✓" if p.argmax() == label else "✗"
        assert state[f"answer{i}"] == f"{right} {int(p.argmax())} ({100 * p.max().item():.0f} %)"
    assert f"t = {t:g}:".replace("-", "−") in state["said"]


def test_landscape_mark_lies_on_its_curve(landscape: Explorer) -> None:
    for position, chosen in enumerate((0, 2, 4)):
        state = landscape.state((0, 0, chosen))
        for key in ("train", "test"):
            points = re.findall(r"[ML](\S+) ([\d.]+)", state[f"path_{key}"])
            assert points[position] == (state["x"], state[f"y_{key}"])


def test_landscape_axis_is_logarithmic_and_the_same_for_all(models: dict[str, nn.Module], digits: Splits) -> None:
    model = models["16"]
    straight = {"up": torch.ones(sum(p.numel() for p in model.parameters()))}
    explorer = landscape_explorer({"a": model}, {"a": straight}, digits, positions=[0, 1, 5], finer=1, n_samples=20)
    heights = [
        (float(explorer.state((0, 0, i))["y_train"]), float(explorer.state((0, 0, i))["loss_train"])) for i in range(3)
    ]
    ratios = np.polyfit(np.log10([loss for _, loss in heights]), [y for y, _ in heights], 1)
    for y, loss in heights:
        assert y == pytest.approx(np.polyval(ratios, np.log10(loss)), abs=0.3)
    assert ratios[0] < 0, "a larger loss stands higher"


def test_loss_that_is_not_finite_breaks_the_curve(digits: Splits) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 10)).eval()
    blows_up = torch.full((7850,), 1e38)
    explorer = landscape_explorer({"a": model}, {"a": {"d": blows_up}}, digits, positions=[0, 1, 2], n_samples=10)
    state = explorer.state((0, 0, 10))
    assert state["loss_train"] in ("nan", "inf")
    assert state["y_train"] == "-99", "no mark"
    assert state["path_train"].count("M") == 1
    assert "nan" not in state["path_train"] + state["path_test"]


def test_leading_directions_are_eigenvectors_and_a_random_one(digits: Splits) -> None:
    model, split = build("M1", width=0.1, seed=0).eval(), digits.train.head(50)
    first, second, chance = leading_directions(model, split).values()
    assert float(first.norm()) == pytest.approx(1)
    assert abs(float(first @ second)) < 1e-6
    again = leading_directions(model, split)["random, filter-normalised"]
    assert torch.equal(chance, again)
    assert not torch.equal(chance, leading_directions(model, split, seed=1)["random, filter-normalised"])


def test_displaced_network_has_the_moved_weights_and_the_given_one_its_own() -> None:
    model = build("M1", width=0.1, seed=0).train()
    weights = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    direction = torch.linspace(-1, 1, len(weights), dtype=torch.float64)
    moved = displaced(model, direction, 0.5)
    assert torch.equal(
        nn.utils.parameters_to_vector(moved.parameters()), (weights.double() + 0.5 * direction).to(weights.dtype)
    )
    assert not moved.training
    assert model.training
    assert torch.equal(nn.utils.parameters_to_vector(model.parameters()), weights)


# -- the attacks -------------------------------------------------------------------------------------------------------


def test_every_attack_of_the_package_is_there_and_says_what_it_does(
    attack: Explorer, models: dict[str, nn.Module], digits: Splits
) -> None:
    assert attack.choices[1].options == (*ATTACKS, *BEYOND)
    model, x, y = models["16"], digits.test.images[:2], digits.test.labels[:2]
    with torch.no_grad():
        before = model(x).double().softmax(1)
    for n, function in enumerate((ATTACKS | BEYOND).values()):
        end = function(model, x, y, eps=0.1)
        with torch.no_grad():
            after = model(end).double().softmax(1)
        state = attack.state((1, n, 2))
        assert [state[f"b{c}"] for c in range(10)] == [f"{100 * p:.1f}" for p in before[1].tolist()]
        assert [state[f"a{c}"] for c in range(10)] == [f"{100 * p:.1f}" for p in after[1].tolist()]
        assert state["most"] == f"{(end - x)[1].abs().max().item():.2g}"
        shown = pixels_of(state["after"])[:, :, 0] / 255
        assert np.abs(shown - end[1, 0].numpy()).max() < 1 / 255


def test_no_change_at_size_zero_live(attack: Explorer) -> None:
    state = attack.state((0, 0, 0))
    assert state["after"] == state["clean"]
    assert [state[f"a{c}"] for c in range(10)] == [state[f"b{c}"] for c in range(10)]


def test_change_is_red_where_brighter_blue_where_darker_white_where_the_same() -> None:
    difference = torch.zeros(3, 2, 2)
    difference[:, 0, 0], difference[:, 1, 1] = 0.1, -0.1
    shown = pixels_of(pixels.change(difference)).astype(int)
    assert shown[0, 0, 0] > shown[0, 0, 2] + 50
    assert shown[1, 1, 2] > shown[1, 1, 0] + 50
    assert shown[0, 1].min() > 240


def test_colour_pictures_keep_their_colours() -> None:
    splits = load("mnistm5k", n_train=1, n_test=2)
    explorer = attack_explorer(
        build("C1", width=0.05, seed=0), splits.test, splits.classes, attacks={"FGSM": fgsm}, eps=(0.02,)
    )
    shown = pixels_of(explorer.state((1, 0, 0))["clean"]) / 255
    assert np.abs(shown - splits.test.images[1].permute(1, 2, 0).numpy()).max() < 1 / 255


def test_given_attacks_are_used_with_their_settings(models: dict[str, nn.Module], digits: Splits) -> None:
    steps: dict[str, Callable[..., Tensor]] = {"one": partial(ATTACKS["FGSM-10"], steps=1), "plain": fgsm}
    explorer = attack_explorer(models["16"], digits.test.head(1), digits.classes, attacks=steps, eps=(0.1,), finer=1)
    one, plain = (explorer.state((0, n, 1)) for n in range(2))
    assert {name: text for name, text in one.items() if name != "said"} == {
        name: text for name, text in plain.items() if name != "said"
    }


def test_networks_are_left_as_they_were(
    tiny_m1: nn.Module, digits: Splits, untouched: Callable[..., AbstractContextManager[None]]
) -> None:
    with untouched(tiny_m1):
        attack_explorer(tiny_m1, digits.test.head(2), digits.classes).page()
        directions = {"a": leading_directions(tiny_m1, digits.train.head(20))}
        landscape_explorer({"a": tiny_m1}, directions, digits, positions=[0, 1], n_samples=10).page()


# -- live, and on a page -----------------------------------------------------------------------------------------------


@pytest.fixture(params=["landscape", "attack"])
def explorer(request: pytest.FixtureRequest) -> Explorer:
    found: Explorer = request.getfixturevalue(request.param)
    return found


def test_live_controls_show_the_state_that_is_computed_directly(explorer: Explorer) -> None:
    pytest.importorskip("ipywidgets")
    controls, picture = explorer.live.children
    for chosen in (explorer.start, (1, 1, 1), (1, 1, 2), (0, 1, 3)):
        for control, i in zip(controls.children, chosen, strict=True):
            control.value = i
        assert explorer.picture(chosen) in picture.value
        assert explorer.state(chosen)["said"] in picture.value
    assert [control.description for control in controls.children] == [choice.label for choice in explorer.choices]


def test_each_change_is_computed_once() -> None:
    asked: list[tuple[int, ...]] = []

    def fields(chosen: tuple[int, ...]) -> dict[str, str]:
        asked.append(chosen)
        return {"said": f"now {chosen}"}

    explorer = Explorer("test", [Choice("a", ("x", "y")), Choice("b", ("u", "v"))], "<p>{said}</p>", fields)
    explorer.page()
    explorer.page()
    explorer.state((1, 1))
    assert len(asked) == len(set(asked)) == 1 + 2 + 4


def test_page_holds_the_states_that_are_live(explorer: Explorer) -> None:
    ready = list(explorer.ready_made())
    sizes = [len(choice.ready) for choice in explorer.choices]
    assert len(ready) == sizes[0] * sizes[1] * sizes[2] > 5
    fields = data_of(explorer.page())["fields"]
    for chosen in ready:
        positions = [choice.ready.index(i) for choice, i in zip(explorer.choices, chosen, strict=True)]
        keys = [",".join(map(str, positions[:n])) for n in range(4)]
        assert {k: v for key in keys for k, v in fields.get(key, {}).items()} == explorer.state(chosen)
        assert not re.search(r"\{\w+\}", explorer.picture(chosen)), "every field is filled in"


def test_page_needs_nothing_from_elsewhere_and_starts_drawn(explorer: Explorer) -> None:
    page = explorer.page()
    assert not re.search(r"https?:|src=\"(?!data:|\{)|import\(|fetch\(|url\(", page)
    assert explorer.picture(explorer.start) in page
    assert missing_in_html(page) == [], "every picture is described"
    assert len(page) < 500_000
    first, second = (set(re.findall(r'\bid="([^"]+)"', explorer.page())) for _ in range(2))
    assert len(first) == 4
    assert not first & second, "two on one page keep apart"


def test_bundle_offers_both_and_the_page_without_ipywidgets(
    explorer: Explorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    view = "application/vnd.jupyter.widget-view+json"
    if find_spec("ipywidgets"):
        bundle = explorer._repr_mimebundle_()
        assert bundle[view]["model_id"] == explorer.live.model_id
        assert bundle["text/html"].startswith("<style>")
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    monkeypatch.delitem(explorer.__dict__, "live", raising=False)
    bare = explorer._repr_mimebundle_()
    assert set(bare) == {"text/plain", "text/html"}


def test_names_are_text_not_markup(digits: Splits) -> None:
    names = ["<b>&amp;", *digits.classes[1:]]
    explorer = attack_explorer(
        build("M1", width=0.1, seed=0), Split(digits.test.images[:1], torch.tensor([0])), names,
        attacks={"<i>": fgsm}, eps=(0.1,),
    )  # fmt: skip
    page = explorer.page()
    assert "<b>&amp;" not in page.split('<script type="application/json">')[0]
    assert "&lt;b&gt;&amp;amp;" in page
    assert html.unescape(explorer.choices[0].options[0]) == "1: <b>&amp;"


def test_names_with_braces_are_no_fields(models: dict[str, nn.Module], digits: Splits) -> None:
    classes = ["{x}", *digits.classes[1:]]
    zero = Split(digits.test.images[:1], torch.tensor([0]))
    attacked = attack_explorer(models["16"], zero, classes, attacks={"{said}": fgsm}, eps=(0.1,))
    direction = {"{t}": torch.zeros(sum(p.numel() for p in models["16"].parameters()))}
    moved = landscape_explorer(
        {"{x}": models["16"]}, {"{x}": direction}, Splits(zero, zero, tuple(classes)), positions=[0, 1], by="{y}"
    )
    for explorer in (attacked, moved):
        assert "{x}" in html.unescape(explorer.page().split('<script type="application/json">')[0])
        # Python and the page's script both take what is in braces for a field.
        assert set(re.findall(r"\{(\w+)\}", explorer.template)) <= set(explorer.state(explorer.start))


def test_live_labels_are_text(models: dict[str, nn.Module], digits: Splits) -> None:
    pytest.importorskip("ipywidgets")
    direction = {"d": torch.zeros(sum(p.numel() for p in models["16"].parameters()))}
    explorer = landscape_explorer({"a": models["16"]}, {"a": direction}, digits, positions=[0, 1], by="a & b")
    controls, _ = explorer.live.children
    assert controls.children[0].description == "a & b"
    assert ">a &amp; b</label>" in explorer.page()


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"eps": (0.2, 0.1)}, "ascending"),
        ({"eps": (0.0, 0.1)}, "above 0"),
        ({"eps": ()}, "above 0"),
        ({"classes": ("a", "b")}, "2 classes"),
        ({"images": Split(torch.zeros(0, 1, 28, 28), torch.zeros(0, dtype=torch.int64))}, "no images"),
        ({"attacks": {}}, "nothing to choose"),
        ({"finer": 0}, "finer = 0"),
        ({"finer": 2.0}, "finer = 2.0"),
    ],
)
def test_attack_explorer_refuses(
    models: dict[str, nn.Module], digits: Splits, changes: dict[str, Any], told: str
) -> None:
    given: dict[str, Any] = {"images": digits.test.head(1), "classes": digits.classes} | changes
    with pytest.raises(InputError, match=told):
        attack_explorer(models["16"], **given)


@pytest.mark.parametrize("positions", [[0.0], [0.0, 0.0], [1.0, 0.0], [0.0, float("nan")]])
def test_landscape_explorer_refuses_positions_that_do_not_ascend(
    models: dict[str, nn.Module], directions: dict[str, dict[str, Tensor]], digits: Splits, positions: list[float]
) -> None:
    with pytest.raises(InputError, match="ascend"):
        landscape_explorer(models, directions, digits, positions=positions)


@pytest.mark.parametrize("finer", [0, -1])
def test_landscape_explorer_refuses_to_be_finer_by_less_than_one(
    models: dict[str, nn.Module], directions: dict[str, dict[str, Tensor]], digits: Splits, finer: int
) -> None:
    with pytest.raises(InputError, match=f"finer = {finer}"):
        landscape_explorer(models, directions, digits, finer=finer)


def test_landscape_explorer_refuses_directions_that_differ(
    models: dict[str, nn.Module], directions: dict[str, dict[str, Tensor]], digits: Splits
) -> None:
    for wrong in (
        {},
        {"16": directions["16"]},
        directions | {"256": {"other": directions["256"]["first eigenvector"]}},
    ):
        with pytest.raises(InputError, match="same names"):
            landscape_explorer(models, wrong, digits)
    with pytest.raises(InputError, match="same names"):
        landscape_explorer({}, directions, digits)


def test_a_choice_starts_with_what_is_ready() -> None:
    with pytest.raises(InputError, match="ready-made"):
        Choice("a", ("x", "y", "z"), ready=(0, 2), start=1)
