"""Sharpness along a training and under rescaling: against the Hessian itself, and against what theory says."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parameters_to_vector

from hessnb.attacks import fgsm
from hessnb.curvature import HessianOperator, lanczos
from hessnb.data import Splits
from hessnb.errors import InputError
from hessnb.models import build
from hessnb.sharpness import Followed, rescaled, sharpness_along, stability_bound
from hessnb.training import Recipe, evaluate, train

RECIPE = Recipe(batch_size=50, lr=0.05, momentum=0.9, max_epochs=3, seed=0)


def largest(model: nn.Module, data: Splits, samples: torch.Tensor | None = None) -> float:
    operator = HessianOperator(model, F.cross_entropy, data.train.batches(100), samples=samples)
    return float(lanczos(operator, 1, 1e-6, which="LA").eigenvalues[0])


@pytest.mark.parametrize(("momentum", "lr"), [(0.0, 0.1), (0.9, 0.1), (0.5, 2.0)])
@pytest.mark.parametrize(("share", "grows"), [(0.98, False), (1.02, True)])
def test_descent_grows_beyond_the_bound_and_not_below(momentum: float, lr: float, share: float, grows: bool) -> None:
    curvature = share * stability_bound(lr, momentum)
    w = torch.ones(1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([w], lr=lr, momentum=momentum)
    for _ in range(3000):
        optimizer.zero_grad()
        (curvature / 2 * w.square().sum()).backward()
        optimizer.step()
        if abs(float(w.detach())) > 1e6:
            break
    assert (abs(float(w.detach())) > 1e6) is grows
    assert grows or abs(float(w.detach())) < 1e-6


def test_points_are_the_eigenvalues_of_the_training_and_leave_it_as_it_is(digits: Splits, tiny_m1: nn.Module) -> None:
    alone, start = copy.deepcopy(tiny_m1), copy.deepcopy(tiny_m1)
    seen: list[int] = []
    points = sharpness_along(tiny_m1, digits, RECIPE, {0, 1, 3}, tol=1e-4, progress=seen.append)
    state = train(alone, digits, RECIPE)
    assert torch.equal(parameters_to_vector(tiny_m1.parameters()), parameters_to_vector(alone.parameters()))
    assert [point.epoch for point in points] == [0, 1, 3]
    assert seen == [1, 2, 3]
    assert points[0].train_loss == evaluate(start, digits.train)[0]
    assert [point.train_loss for point in points[1:]] == [state.history[i].train_loss for i in (0, 2)]
    assert points[0].lambda1 == pytest.approx(largest(start, digits), rel=1e-3)
    assert points[-1].lambda1 == pytest.approx(largest(alone, digits), rel=1e-3)
    assert all(point.residual <= 1e-4 for point in points)


class Cap(nn.Module):
    """Ten logits, of which the first is four times the square of one weight plus another; both are zero."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.pad((4 * self.weight.square() + self.bias).expand(len(x), 1), (0, 9))


def test_the_largest_eigenvalue_is_followed_also_where_a_negative_one_is_larger_in_magnitude(digits: Splits) -> None:
    zeros = (digits.train.labels == 0).nonzero().flatten()
    (point,) = sharpness_along(Cap(), digits, RECIPE, {0}, tol=1e-4, samples=zeros)
    # Of p = 1/10 each: the Hessian is diagonal, -8 (1 - p) for the weight and p (1 - p) for the bias.
    assert point.lambda1 == pytest.approx(0.09, rel=1e-3)


def test_followed_training_goes_on_to_the_same_points(digits: Splits, tiny_m1: nn.Module) -> None:
    again, kept = copy.deepcopy(tiny_m1), list[Followed]()

    def keep(followed: Followed) -> None:
        kept.append(copy.deepcopy(followed))

    points = sharpness_along(tiny_m1, digits, RECIPE, {0, 1, 3}, save=keep, save_seconds=-1.0)
    assert [(f.state.epoch, [point.epoch for point in f.points]) for f in kept] == [
        (1, [0, 1]),
        (2, [0, 1]),
        (3, [0, 1, 3]),
    ]
    seen: list[int] = []
    assert sharpness_along(again, digits, RECIPE, {0, 1, 3}, followed=kept[1], progress=seen.append) == points
    assert seen == [3], "it trained one epoch more"
    assert [point.epoch for point in kept[1].points] == [0, 1], "what was kept is as it was"
    assert torch.equal(parameters_to_vector(tiny_m1.parameters()), parameters_to_vector(again.parameters()))


def test_points_over_some_samples_and_under_an_attack(digits: Splits, tiny_m1: nn.Module) -> None:
    def attack(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return fgsm(model, x, y, eps=0.1)

    alone, few = copy.deepcopy(tiny_m1), torch.arange(20, 60)
    (point,) = sharpness_along(tiny_m1, digits, RECIPE, {3}, tol=1e-4, samples=few, perturbation=attack)
    train(alone, digits, RECIPE, perturbation=attack)
    assert point.lambda1 == pytest.approx(largest(alone, digits, few), rel=1e-3)


def test_a_layer_is_not_rescaled_against_itself() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    with pytest.raises(InputError, match="have the same weight"):
        rescaled(model, "0", "0", 2.0)
    model[2].weight = model[0].weight
    with pytest.raises(InputError, match="have the same weight"):
        rescaled(model, "0", "2", 2.0)


@pytest.mark.parametrize(("first", "second"), [("0", "3"), ("3", "7"), ("7", "9")])
def test_rescaled_network_computes_the_same_to_the_bit_and_has_another_hessian(
    first: str, second: str, digits: Splits, tiny_m1: nn.Module
) -> None:
    train(tiny_m1, digits, RECIPE)
    before = copy.deepcopy(tiny_m1.state_dict())
    again = rescaled(tiny_m1, first, second, 8.0)
    x = digits.test.images
    assert torch.equal(again(x), tiny_m1(x))
    assert all(torch.equal(value, before[name]) for name, value in tiny_m1.state_dict().items())

    def block(model: nn.Module, layer: str) -> float:
        names = [f"{layer}.weight"]
        operator = HessianOperator(model, F.cross_entropy, digits.train.batches(100), parameters=names)
        return float(lanczos(operator, 1, 1e-5, which="LA").eigenvalues[0])

    assert block(again, first) == pytest.approx(block(tiny_m1, first) / 64, rel=1e-4)
    assert block(again, second) == pytest.approx(block(tiny_m1, second) * 64, rel=1e-4)


def test_third_of_a_layer_is_the_same_up_to_rounding(tiny_m1: nn.Module, digits: Splits) -> None:
    x = digits.test.images
    torch.testing.assert_close(rescaled(tiny_m1, "7", "9", 1 / 3)(x), tiny_m1(x), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("factor", [0.0, -2.0, float("nan"), float("inf")])
def test_factor_that_is_not_positive_and_finite_is_an_input_error(factor: float, tiny_m1: nn.Module) -> None:
    with pytest.raises(InputError, match="factor"):
        rescaled(tiny_m1, "7", "9", factor)


@pytest.mark.parametrize("layer", ["8", "eleven"])
def test_layer_without_a_weight_is_named_with_those_there_are(layer: str) -> None:
    with pytest.raises(InputError, match=f"'{layer}'.*0, 3, 7, 9"):
        rescaled(build("M1", width=0.05, seed=0), layer, "9", 2.0)
