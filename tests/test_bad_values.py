"""Values that cannot be meant: each is refused with a sentence that says what is wrong and what to do."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hessnb import data, landscape, models, robustness, sharpness, statistics, training
from hessnb.attacks import damped_newton, fgsm, l2_gradient, l2_hessian, nearest_class, pgd
from hessnb.curvature import (
    HessianOperator,
    SpectralDensity,
    input_curvature,
    input_hessian,
    lanczos,
    power_iteration,
)
from hessnb.curvature.inputs import input_gradient_norms, input_hessian_eigenvalues, input_hessian_solve
from hessnb.data import Splits
from hessnb.errors import InputError
from hessnb.training import Recipe, State

X, Y = torch.rand(4, 6, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 1])
WRONG = cast(Any, None)


def network(*between: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), *between, nn.ReLU(), nn.Linear(5, 3))


def overflowing() -> nn.Module:
    layer = nn.Linear(6, 3)
    nn.init.constant_(layer.weight, 3e38)
    return layer


class InADict(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = network()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.inner(x)}


def along(model: nn.Module, direction: Any = None, batches: Any = ((X, Y),)) -> object:
    direction = torch.zeros(models.parameter_count(model)) if direction is None else direction
    return landscape.along(model, F.cross_entropy, {"a": batches}, direction, [0.0, 1.0])


def operator(**settings: Any) -> HessianOperator:
    return HessianOperator(network(), F.cross_entropy, [(X, Y)], **settings)


def recipe(**settings: Any) -> Recipe:
    return Recipe(10, 0.1, 0.0, 1, 0, **settings)


NAMELESS = nn.BatchNorm1d(5, track_running_stats=False)
TEN: Any = "10"  # the text of a number, as of a command line that was not read
RULES = SpectralDensity(torch.zeros(1, 1), torch.ones(1, 1), 1, 1)


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda: fgsm(overflowing(), X, Y, eps=0.1), "look for overflow"),
        (lambda: input_gradient_norms(network(), X, WRONG), "labels are missing"),
        (lambda: input_curvature(network(), X, WRONG), "labels are missing"),
        (lambda: input_hessian(network(), X, WRONG), "labels are missing"),
        (lambda: fgsm(network(), X, WRONG, eps=0.1), "labels are missing"),
        (lambda: robustness.accuracy(network(), X, WRONG), "labels are missing"),
        (lambda: fgsm(network(), cast(Any, X.numpy()), Y, eps=0.1), "inputs are a ndarray"),
        (lambda: fgsm(network(), X, Y, eps=cast(Any, "8/255")), "eps = '8/255'"),
        (lambda: pgd(network(), X, Y, eps=cast(Any, "8/255")), "eps = '8/255'"),
        (lambda: HessianOperator(network(NAMELESS), F.cross_entropy, [(X, Y)]), "track_running_stats=True"),
        (lambda: fgsm(network(NAMELESS), X, Y, eps=0.1), "track_running_stats=True"),
        (lambda: input_curvature(network(NAMELESS), X, Y), "track_running_stats=True"),
        (lambda: HessianOperator(nn.Sequential(nn.LazyLinear(3)), F.cross_entropy, [(X, Y)]), "no weights yet"),
        (lambda: along(InADict()), "returns a dict"),
        (lambda: along(network(), batches=[(X, Y.int())]), r"y\.long\(\)"),
        (lambda: along(network(), direction=np.zeros(53)), "direction is a ndarray"),
        (lambda: input_hessian_eigenvalues(network(), X, k=cast(Any, 1.5)), "k = 1.5"),
        (lambda: input_hessian_eigenvalues(network(), X, tol=0), "tol = 0"),
        (lambda: input_hessian_solve(network(), X, X, tol=math.nan), "tol = nan"),
        (lambda: input_hessian_solve(network(), X, cast(Any, X.numpy())), "g is a ndarray"),
        (lambda: input_curvature(network(), X, Y, memory=cast(Any, "1GB")), "memory = '1GB'"),
        (lambda: input_curvature(network(), X, Y, memory=-1), "memory = -1"),
        (lambda: lanczos(operator(), 1, cast(Any, "a")), "tol = 'a'"),
        (lambda: lanczos(operator(), 1, max_matvecs=TEN), "max_matvecs = '10'"),
        (lambda: lanczos(operator(), 1, max_matvecs=cast(Any, 10.5)), "max_matvecs = 10.5"),
        (lambda: lanczos(operator(), 1, max_basis=TEN), "max_basis = '10'"),
        (lambda: power_iteration(operator(), 1, max_matvecs=TEN), "max_matvecs = '10'"),
        (lambda: operator(graph_memory=TEN), "graph_memory = '10'"),
        (lambda: operator(graph_memory=-1), "graph_memory = -1"),
        (lambda: RULES.grid(TEN), "size = '10'"),
        (lambda: RULES.grid(sigma=TEN), "sigma = '10'"),
        (lambda: RULES.share(0.0, TEN), "high = '10'"),
        (lambda: l2_hessian(network(), X, Y, eps=0.1, damping=TEN), "damping = '10'"),
        (lambda: l2_hessian(network(), X, Y, eps=0.1, tol=TEN), "tol = '10'"),
        (lambda: damped_newton(network(), X, Y, eps=0.1, dampings=(0.0, TEN)), "dampings = '10'"),
        (lambda: damped_newton(network(), X, Y, eps=0.1, dampings=cast(Any, 0.1)), "dampings = 0.1: give a tuple"),
        (lambda: nearest_class(network(), X, Y, eps=0.1, damping=TEN), "damping = '10'"),
        (lambda: input_hessian_solve(network(), X, X, damping=TEN), "damping = '10'"),
        (lambda: data.load("mnist5k", n_train=TEN), "n_train = '10'"),
        (lambda: data.load("mnist5k", n_test=TEN), "n_test = '10'"),
        (lambda: Recipe(10, cast(Any, "0.1"), 0.0, 1, 0), "lr = '0.1'"),
        (lambda: recipe(loss_target=TEN), "loss_target = '10'"),
        (lambda: recipe(decay_every=1, decay_factor=TEN), "decay_factor = '10'"),
        (lambda: models.build("M1", seed=cast(Any, 1.5)), "seed = 1.5"),
        (lambda: models.build("M1", width=cast(Any, "a")), "width = 'a'"),
        (lambda: sharpness.stability_bound(0), "lr = 0"),
        (lambda: sharpness.stability_bound(0.1, TEN), "momentum = '10'"),
        (lambda: sharpness.stability_bound(0.1, 1.0), "momentum = 1.0"),
        (lambda: sharpness.rescaled(network(), "0", "2", TEN), "factor = '10'"),
        (lambda: statistics.proportion(cast(Any, 0.5), 2), "successes = 0.5"),
        (lambda: statistics.proportion(1, TEN), "n = '10'"),
        (lambda: statistics.difference(0.5, TEN, 10), "second = '10'"),
        (lambda: robustness.predictions(nn.Flatten(0), X), r"logits have \(N, c\)"),
    ],
)
def test_what_cannot_be_meant_is_refused(use: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        use()


@pytest.mark.parametrize("use", [lambda m, d: HessianOperator(m, F.cross_entropy, d), lambda m, d: along(m, batches=d)])
def test_data_set_in_place_of_its_batches_names_them(use: Callable[..., object], digits: Splits) -> None:
    with pytest.raises(InputError, match=r"data are a Split: .* as \.batches\(250\) does"):
        use(models.build("M1", width=0.1, seed=0), digits.train)


def test_epochs_that_a_training_does_not_have_are_refused(digits: Splits) -> None:
    model = models.build("M1", width=0.1, seed=0)
    with pytest.raises(InputError, match=r"epochs \[7\]: the training has those from 0 to 2"):
        sharpness.sharpness_along(model, digits, Recipe(100, 0.1, 0.0, 2, 0), [0, 7])


def test_state_of_another_network_is_refused_in_one_line(digits: Splits) -> None:
    state = State(1, models.build("M1", width=0.2, seed=0).state_dict(), [], [])
    with pytest.raises(InputError, match="does not fit the network") as told:
        training.train(models.build("M1", width=0.1, seed=0), digits, Recipe(100, 0.1, 0.0, 2, 0), state=state)
    assert "\n" not in str(told.value)


def test_labels_are_not_needed_where_they_do_not_count() -> None:
    assert torch.equal(input_hessian_eigenvalues(network().eval(), X, None).isfinite(), torch.ones(4, 2).bool())


def test_radius_of_l2_attacks_is_in_the_same_units() -> None:
    model = nn.Sequential(nn.Linear(6, 3))  # whose gradient leads to the edge of the ball
    for scale, radius in (("sqrt_dim", 0.01 * math.sqrt(6)), ("unit", 0.01)):
        how: dict[str, Any] = {"eps": 0.01, "bounds": None, "scale": scale}
        for found in (l2_gradient.record(model, X, Y, **how), pgd.record(model, X, Y, norm="l2", **how)):
            assert found.l2.tolist() == pytest.approx([radius] * 4, rel=1e-5)
        assert float(pgd.record(model, X, Y, **how).linf.max()) == pytest.approx(0.01, rel=1e-5)
