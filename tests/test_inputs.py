"""Input Hessians, in closed form and by iteration, against dense float64 truth and high-precision arithmetic."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache, partial
from typing import Any, NamedTuple

import mpmath  # type: ignore[import-untyped]
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from networks import Checkpointed, network, samples
from scipy.sparse.linalg import eigsh
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hessnb.curvature import (
    closed_form,
    input_curvature,
    input_gradient_norms,
    input_hessian,
    input_hessian_eigenvalues,
    input_hessian_solve,
    input_lanczos,
    inputs,
    is_piecewise_linear,
)
from hessnb.curvature.evaluation import cheapened, differentiable
from hessnb.data import Splits, load
from hessnb.errors import InputError
from hessnb.models import build, evaluation
from hessnb.training import Recipe, train

Untouched = Callable[..., AbstractContextManager[None]]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def seeded(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """Return a network in float64 with weights from a seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make().double()


def rectifier(d: int = 64, hidden: int = 32, classes: int = 4, seed: int = 0) -> nn.Module:
    """Return a piecewise linear network with many units that are alive."""
    return seeded(
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(d, hidden), nn.ReLU(), nn.Linear(hidden, classes)), seed
    )


def with_logits(kind: str) -> nn.Module:
    """Return a rectifier whose logits are linearly dependent or dead."""
    model = rectifier(classes=5)
    last = model.get_submodule("3")
    assert isinstance(last, nn.Linear)
    with torch.no_grad():
        if kind == "equal rows":
            last.weight[2] = last.weight[1]
        elif kind == "equal logits":
            last.weight[2], last.bias[2] = last.weight[1], last.bias[1]
        elif kind == "all but one equal":
            last.weight[1:] = last.weight[1].clone()
        elif kind == "a mixture":
            last.weight[2] = 0.25 * last.weight[0] + 0.5 * last.weight[1] + 0.25 * last.weight[4]
        elif kind == "a dead logit":
            last.weight[2], last.bias[2] = 0, -1
        elif kind == "two dead logits":
            last.weight[2:4], last.bias[2:4] = 0, -1
        elif kind == "all dead":
            last.weight.zero_()
    return model


DEPENDENT = [
    "equal rows", "equal logits", "all but one equal", "a mixture", "a dead logit", "two dead logits", "all dead",
]  # fmt: skip


class Mapped(nn.Module):
    """A linear layer after a function or a layer, of 64 inputs around zero; the layer before it keeps their number."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function, self.last = function, nn.LazyLinear(4)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(self.function(x.flatten(1) - 0.5).flatten(1))
        return result


def mapped(function: Callable[[], Callable[[Tensor], Tensor]]) -> nn.Module:
    def make() -> nn.Module:
        model = Mapped(function())
        model(torch.rand(2, 1, 8, 8))
        return model

    return seeded(make)


class Calibrated(nn.Module):
    """The logits of another network times a factor; the first logit is then shifted."""

    def __init__(self, model: nn.Module, factor: float = 1.0, shift: float = 0.0) -> None:
        super().__init__()
        self.model, self.factor, self.shift = model, factor, shift

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(x) * self.factor
        return logits + F.pad(torch.full_like(logits[:, :1], self.shift), (0, logits.shape[1] - 1))


def assert_each_near(found: Tensor, expected: Tensor, relative: float = 1e-10) -> None:
    """Assert that each sample's tensor is near the expected one, relative to that sample's norm."""
    assert found.shape == expected.shape
    errors = torch.linalg.vector_norm((found - expected).flatten(1), dim=1)
    assert (errors <= relative * torch.linalg.vector_norm(expected.flatten(1), dim=1)).all(), errors


def top(hessians: Tensor, k: int) -> Tensor:
    """Return the k largest eigenvalues (N, k) of dense Hessians, descending."""
    if hessians.shape[1] <= 1000:
        values: Tensor = torch.linalg.eigvalsh(hessians)
        return values.flip(1)[:, :k]
    return torch.stack([torch.from_numpy(eigsh(h.numpy(), k, which="LA")[0].copy()).flip(0) for h in hessians])


def pseudo_solved(hessians: Tensor, g: Tensor) -> Tensor:
    """Return H^+ g for dense Hessians, in the shape of g."""
    inverses = torch.linalg.pinv(hessians, hermitian=True, rtol=1e-9)
    return times(inverses, g)


def times(hessians: Tensor, z: Tensor) -> Tensor:
    """Return each matrix times its vector, in the shape of the vectors z (N, ...)."""
    result: Tensor = (hessians @ z.flatten(1)[:, :, None]).view_as(z)
    return result


def gradients(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Return each sample's input gradient J^T (p - e_y), without cancellation in p_y - 1."""
    leaf = x.clone().requires_grad_()
    logits = model.eval()(leaf)
    slope = F.softmax(logits.detach(), dim=1).scatter(1, y[:, None], 0.0)
    slope = slope.scatter(1, y[:, None], -slope.sum(1, keepdim=True))
    result: Tensor = torch.autograd.grad(logits, leaf, slope)[0]
    return result


def jacobians(model: nn.Module, x: Tensor) -> Tensor:
    """Return the derivatives (N, c, d) of each sample's logits by its input."""
    leaf = x.clone().requires_grad_()
    rows = [torch.autograd.grad(s.sum(), leaf, retain_graph=True)[0] for s in model.eval()(leaf).unbind(1)]
    return torch.stack([row.flatten(1) for row in rows], dim=1)


# -- the dense Hessian ----------------------------------------------------------------------------------------------


def dense_input_hessian(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    def of_sample(sample: Tensor, label: Tensor) -> Tensor:
        def loss(pixels: Tensor) -> Tensor:
            return F.cross_entropy(model(pixels.view(1, *x.shape[1:])), label)

        result: Tensor = torch.autograd.functional.hessian(loss, sample.flatten())
        return result

    return torch.stack([of_sample(sample, label) for sample, label in zip(x, y.split(1), strict=True)])


@pytest.mark.parametrize("kind", ["conv", "residual", "smooth"])
def test_input_hessian_equals_the_dense_one_of_each_sample(kind: str) -> None:
    x, y = samples(3)
    model = network(kind)
    found = input_hessian(model, x, y)
    torch.testing.assert_close(found, dense_input_hessian(model.eval(), x, y), rtol=1e-10, atol=1e-13)


def test_input_hessian_of_m1_is_dense_psd_of_rank_below_the_classes_and_without_label(
    tiny_m1: nn.Module, digits: Splits
) -> None:
    model, x, y = tiny_m1.double(), digits.train.images[:1].double(), digits.train.labels[:1]
    found = input_hessian(model, x, y)
    torch.testing.assert_close(found, dense_input_hessian(model.eval(), x, y), rtol=1e-10, atol=1e-15)
    torch.testing.assert_close(found, found.mT, rtol=1e-10, atol=1e-15)
    eigenvalues = torch.linalg.eigvalsh(found[0])
    assert eigenvalues[0] >= -1e-13 * eigenvalues[-1]
    assert 1 <= int((eigenvalues > 1e-10 * eigenvalues[-1]).sum()) <= 9
    torch.testing.assert_close(input_hessian(model, x, (y + 1) % 10), found, rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("kind", ["conv", "residual", "relu"])
def test_piecewise_linear_networks_have_input_hessians_psd_of_low_rank_and_without_label(kind: str) -> None:
    x, y = samples(4)
    found = input_hessian(network(kind), x, y)
    eigenvalues = torch.linalg.eigvalsh(found)
    largest = eigenvalues.amax(dim=1, keepdim=True)
    assert (eigenvalues >= -1e-13 * largest).all()
    ranks = (eigenvalues > 1e-10 * largest).sum(dim=1)
    assert ranks.max() <= 3
    assert ranks.max() > 0
    torch.testing.assert_close(input_hessian(network(kind), x, (y + 1) % 4), found, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize(("kind", "train_mode"), [("smooth", False), ("conv", True)])
def test_smooth_networks_and_train_mode_batch_norm_have_negative_curvature(kind: str, train_mode: bool) -> None:
    x, y = samples(4)
    eigenvalues = torch.linalg.eigvalsh(input_hessian(network(kind), x, y, train_mode=train_mode))
    assert (eigenvalues.amin(dim=1) < -1e-3 * eigenvalues.amax(dim=1)).any()


def test_linear_network_has_the_closed_form() -> None:
    x, y = samples(5)
    last = nn.Linear(64, 4)
    linear = nn.Sequential(nn.Flatten(), last).double()
    p = F.softmax(linear(x), dim=1)
    A = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    J = last.weight
    torch.testing.assert_close(input_hessian(linear, x, y), J.T @ A @ J, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("factor", [1.0, 30.0, 100.0])
def test_dense_hessian_equals_the_closed_form_however_confident_the_network(factor: float) -> None:
    x, y = samples(4)
    model = Calibrated(network("relu"), factor)
    hessians = input_hessian(model, x, y)
    assert factor == 1.0 or hessians.flatten(1).abs().amax(1).amin() < 1e-9  # one probability is one up to rounding
    assert_each_near(top(hessians, 3), input_hessian_eigenvalues(model, x), 1e-12)


def test_dense_hessian_and_closed_form_take_the_same_side_of_kinks_in_any_memory_layout(digits: Splits) -> None:
    # The flat background of a digit puts it on kinks of max-pooling; of which piece, the rounding of a kernel decides.
    model = build("M1", width=0.25, seed=2).double()
    x, y = digits.train.images[:6].double(), digits.train.labels[:6]
    strided = x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    for images in (x.contiguous(), strided):
        assert_each_near(top(input_hessian(model, images, y), 9), input_hessian_eigenvalues(model, images), 1e-12)


def test_gradient_without_dependence_on_the_input_gives_zero() -> None:
    class Constant(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1)[:, :4] * 0

    x, y = samples(2)
    assert not input_hessian(Constant(), x, y).any()


# -- closed form ------------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    """A network, samples, and their dense Hessians."""

    model: nn.Module
    x: Tensor
    y: Tensor
    hessians: Tensor


# name, classes, width, variant, input shape, samples
TABLE6: dict[str, tuple[str, int, float, str | None, tuple[int, ...], int]] = {
    "M1": ("M1", 10, 0.1, None, (1, 28, 28), 2),
    "M1 strided": ("M1", 10, 0.1, "strided", (1, 28, 28), 2),
    "C1": ("C1", 10, 0.05, None, (3, 32, 32), 1),
    "C2": ("C2", 10, 0.05, None, (3, 32, 32), 1),
    "C3": ("C3", 10, 0.05, None, (3, 32, 32), 1),
    "CR": ("CR", 10, 0.25, None, (3, 16, 16), 1),
    "CR with 100 classes": ("CR", 100, 0.25, None, (3, 8, 8), 2),
}


def table6(name: str) -> nn.Module:
    """Return a narrow network in float64 with used batch statistics and logits that are spread out, in train mode."""
    kind, classes, width, variant, shape, _ = TABLE6[name]
    model = build(kind, num_classes=classes, width=width, variant=variant, seed=0).double()
    with torch.no_grad():
        model(torch.rand(16, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))
        [*model.parameters()][-2].mul_(4)
    return model


@cache
def case(name: str) -> Case:
    _, classes, _, _, shape, n = TABLE6[name]
    model = table6(name)
    x = torch.rand(n, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    y = torch.arange(n) % classes
    return Case(model, x, y, torch.stack([whole_hessian(model, *sample) for sample in zip(x, y, strict=True)]))


def whole_hessian(model: nn.Module, sample: Tensor, label: Tensor, rows: int = 32) -> Tensor:
    """Return one sample's dense Hessian, several rows at a time from copies of the sample in one batch."""
    model.eval()
    parts = []
    for directions in torch.eye(sample.numel(), dtype=sample.dtype).split(rows):
        leaf = sample.repeat(len(directions), *[1] * sample.ndim).requires_grad_()
        loss = F.cross_entropy(model(leaf), label.repeat(len(directions)), reduction="sum")
        (slope,) = torch.autograd.grad(loss, leaf, create_graph=True)
        (products,) = torch.autograd.grad(slope, leaf, directions.view_as(leaf))
        parts.append(products.flatten(1))
    return torch.cat(parts)


@cache
def trained() -> Case:
    """Return a narrow M1 after a training on digits, with two of them."""
    digits = load("mnist5k", n_train=300, n_test=100)
    model = build("M1", width=0.12, seed=1)
    history = train(model, digits, Recipe(batch_size=20, lr=0.02, momentum=0.9, max_epochs=6, seed=0)).history
    assert history[-1].train_accuracy > 0.7
    model, x, y = model.double(), digits.train.images[:2].double(), digits.train.labels[:2]
    return Case(model, x, y, torch.stack([whole_hessian(model, *sample) for sample in zip(x, y, strict=True)]))


def test_rows_of_the_dense_hessian_do_not_depend_on_how_many_are_taken_at_once() -> None:
    x, y = samples(2)
    found = torch.stack([whole_hessian(rectifier(), *sample, rows=10) for sample in zip(x, y, strict=True)])
    torch.testing.assert_close(found, input_hessian(rectifier(), x, y), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", [*TABLE6, "trained"])
def test_eigenvalues_in_closed_form_are_all_that_the_dense_hessian_has(name: str) -> None:
    model, x, y, hessians = trained() if name == "trained" else case(name)
    classes = 100 if "100" in name else 10
    found = input_hessian_eigenvalues(model, x, method="closed_form")
    assert found.shape == (len(x), classes - 1)
    assert found.dtype == torch.float64
    assert (found[:, :-1] >= found[:, 1:]).all()
    expected = top(hessians, classes - 1)
    assert (expected[:, 0] > 0).all()
    assert ((found - expected).abs() <= 1e-10 * expected[:, :1]).all()
    torch.testing.assert_close(found.norm(dim=1), hessians.flatten(1).norm(dim=1), rtol=1e-10, atol=0)
    for labels in (y, (y + 1) % classes):  # they do not matter
        assert torch.equal(input_hessian_eigenvalues(model, x, labels), found)
    beyond = input_hessian_eigenvalues(model, x, k=classes + 3)
    torch.testing.assert_close(beyond[:, : classes - 1], found, rtol=1e-14, atol=0)
    assert not beyond[:, classes - 1 :].any()
    assert torch.equal(input_hessian_eigenvalues(model, x, k=2), found[:, :2])


@settings(deadline=None, max_examples=60)
@given(
    classes=st.integers(2, 12),
    d=st.integers(1, 8),
    hidden=st.integers(1, 12),
    n=st.integers(1, 4),
    share=st.floats(0, 1),
    spread=st.floats(0.1, 30),
    seed=st.integers(0, 1000),
)
def test_eigenvalues_of_random_rectifiers_are_those_of_the_dense_hessian(
    classes: int, d: int, hidden: int, n: int, share: float, spread: float, seed: int
) -> None:
    model, x = Calibrated(rectifier(d, hidden, classes, seed), spread), normal(n, d, seed=seed)
    k = 1 + round(share * (d - 1))
    expected = top(input_hessian(model, x, torch.zeros(n, dtype=torch.int64)), d)
    assume(bool((expected[:, 0] > 1e-12).all()))  # double differentiation of a confident sample cancels
    found = input_hessian_eigenvalues(model, x, k=k, method="closed_form")
    assert found.shape == (n, k)
    floor = 1e-14 * spread**2  # the rounding of probabilities near one in what it is compared to
    assert ((found - expected[:, :k]).abs() <= 1e-10 * expected[:, :1] + floor).all()
    default = input_hessian_eigenvalues(model, x)
    assert default.shape == (n, min(classes - 1, d))
    assert ((default - expected[:, : classes - 1]).abs() <= 1e-10 * expected[:, :1] + floor).all()


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_the_hessian_of_logits_that_are_the_inputs_is_that_of_the_softmax(classes: int) -> None:
    x = normal(5, classes)
    p = F.softmax(x, dim=1)
    expected = top(torch.diag_embed(p) - p[:, :, None] * p[:, None, :], classes)
    found = input_hessian_eigenvalues(nn.Identity(), x, k=classes)
    assert ((found - expected).abs() <= 1e-14).all()
    assert not found[:, -1].any()
    assert input_hessian_eigenvalues(nn.Identity(), x).shape == (5, classes - 1)
    if classes == 2:
        torch.testing.assert_close(found[:, 0], 2 * p.prod(1), rtol=1e-14, atol=0)


def test_logits_that_do_not_depend_on_the_input_have_no_curvature() -> None:
    model = mapped(lambda: lambda x: x * 0)
    x, y = samples(3)
    assert not input_hessian_eigenvalues(model, x).any()
    assert not input_gradient_norms(model, x, y).any()
    assert not input_hessian_solve(model, x, x).any()
    torch.testing.assert_close(input_hessian_solve(model, x, x, damping=4.0), x / 4)


@pytest.mark.parametrize("kind", DEPENDENT)
def test_no_eigenvalue_in_closed_form_is_negative(kind: str) -> None:
    x, _ = samples(5)
    assert (input_hessian_eigenvalues(with_logits(kind), x, method="closed_form") >= 0).all()


# -- confident samples ------------------------------------------------------------------------------------------------


def precisely(weight: Tensor, logits: Tensor, label: int) -> tuple[list[float], float]:
    """Return eigenvalues, descending, and gradient norm of a linear model at one sample, by 1,000-digit arithmetic."""
    with mpmath.workdps(1000):
        W = mpmath.matrix(weight.tolist())
        shares = [mpmath.exp(mpmath.mpf(s)) for s in logits.tolist()]
        p = mpmath.matrix([share / mpmath.fsum(shares) for share in shares])
        eigenvalues = mpmath.eigsy(W.T * (mpmath.diag(list(p)) - p * p.T) * W, eigvals_only=True)
        p[label] -= 1
        norm = mpmath.norm(W.T * p)
        return sorted((float(value) for value in eigenvalues), reverse=True), float(norm)


@pytest.mark.parametrize("gap", [1.0, 30.0, 100.0, 300.0])
@pytest.mark.parametrize("seed", range(3))
def test_confident_samples_of_a_linear_model_keep_their_eigenvalues_and_gradients(gap: float, seed: int) -> None:
    linear = nn.Linear(5, 4).double()
    linear.load_state_dict({"weight": normal(4, 5, seed=seed), "bias": normal(4, seed=seed + 10)})
    x = normal(1, 5, seed=seed + 20)
    first, second = linear(x)[0].topk(2).values.tolist()
    model = Calibrated(linear, gap / (first - second))  # p_y is about 1 - exp(-gap)
    logits = model(x)[0].detach()
    for label in range(4):
        eigenvalues, norm = precisely(linear.weight.detach() * model.factor, logits, label)
        found = input_hessian_eigenvalues(model, x, k=5)[0].tolist()
        assert found == pytest.approx(eigenvalues, rel=0, abs=1e-10 * eigenvalues[0])
        assert float(input_gradient_norms(model, x, torch.tensor([label]))) == pytest.approx(norm, rel=1e-10, abs=0)
    assert gap < 690 or eigenvalues[0] < 1e-290


@pytest.mark.parametrize("span", [1.0, 30.0, 100.0, 500.0])
@pytest.mark.parametrize("seed", range(3))
def test_independent_logits_of_very_different_probabilities_are_inverted_exactly(span: float, seed: int) -> None:
    linear = nn.Linear(5, 4).double()
    weight = normal(4, 5, seed=seed) * torch.tensor([1, 1, 1e-2, 1e-2, 1e-2], dtype=torch.float64)
    linear.load_state_dict({"weight": weight, "bias": torch.zeros(4)})
    x, g = normal(1, 5, seed=seed + 10), normal(1, 5, seed=seed + 20)
    logits = linear(x).detach()
    model = Calibrated(linear, span / float(logits.max() - logits.min()))
    with mpmath.workdps(1000):
        shares = [mpmath.exp(mpmath.mpf(s)) for s in model(x)[0].tolist()]
        p = mpmath.matrix([share / mpmath.fsum(shares) for share in shares])
        W = mpmath.matrix((weight * model.factor).tolist())
        K = mpmath.matrix([[W[i, j] - W[0, j] for j in range(5)] for i in range(1, 4)])
        A = mpmath.diag(list(p)[1:]) - p[1:4] * p[1:4].T
        inner = mpmath.lu_solve(A, mpmath.lu_solve(K * K.T, K * mpmath.matrix(g[0].tolist())))
        expected = [float(value) for value in K.T * mpmath.lu_solve(K * K.T, inner)]
    found = input_hessian_solve(model, x, g)
    assert_each_near(found, torch.tensor([expected], dtype=torch.float64), 1e-8)


@pytest.mark.parametrize("margin", [1.0, 20.0, 300.0])
def test_float32_does_not_underflow_where_float64_does_not(margin: float, digits: Splits, tiny_m1: nn.Module) -> None:
    x, y = digits.train.images[:20], digits.train.labels[:20]
    exact = build("M1", width=0.05, seed=0).double()
    first, second = exact(x.double()).topk(2).values.T
    factor = margin / float((first - second).max())
    model, exact = Calibrated(tiny_m1, factor), Calibrated(exact, factor)
    found, expected = input_hessian_eigenvalues(model, x, k=1), input_hessian_eigenvalues(exact, x.double(), k=1)
    assert (expected > 0).all()
    assert (expected.min() < 1e-45) == (margin >= 300.0), "beyond the smallest number of float32"
    torch.testing.assert_close(found, expected, rtol=1e-5 * factor, atol=0)
    for labels in (y, exact(x.double()).argmax(1)):
        found, expected = input_gradient_norms(model, x, labels), input_gradient_norms(exact, x.double(), labels)
        assert (expected > 0).all()
        torch.testing.assert_close(found, expected, rtol=1e-5 * factor, atol=0)


# -- iteration --------------------------------------------------------------------------------------------------------

PIECEWISE = ["conv", "residual", "relu", "linear", "functional", "in place", "pool", "sequence"]
SMOOTH = ["smooth", "norm", "tied", "grouped", "same", "others"]


@cache
def small(kind: str, n: int = 5) -> Case:
    model = rectifier() if kind == "rectifier" else network(kind)
    x, y = samples(n)
    return Case(model, x, y, input_hessian(model, x, y))


@pytest.mark.parametrize("kind", [*PIECEWISE, "rectifier"])
def test_iteration_and_closed_form_agree_on_piecewise_linear_networks(kind: str) -> None:
    model, x, y, hessians = small(kind)
    expected = top(hessians, 3)
    for method in ("closed_form", "lanczos"):
        found = input_hessian_eigenvalues(model, x, y, method=method, tol=1e-10)
        assert ((found - expected).abs() <= 1e-10 * expected[:, :1]).all()


@pytest.mark.parametrize("k", [1, 3, 8])
@pytest.mark.parametrize("kind", SMOOTH)
def test_iteration_finds_the_largest_eigenvalues_of_smooth_networks_and_labels_matter(kind: str, k: int) -> None:
    model, x, y, hessians = small(kind)
    found = input_hessian_eigenvalues(model, x, y, k=k, tol=1e-9)
    assert found.shape == (5, k)
    assert found.dtype == torch.float64
    magnitude = torch.linalg.matrix_norm(hessians, 2)[:, None]
    assert ((found - top(hessians, k)).abs() <= 1e-9 * magnitude).all()
    other = (y + 1) % 4
    again = input_hessian_eigenvalues(model, x, other, k=k, tol=1e-9)
    assert ((again - found).abs() > 1e-6 * magnitude).any()
    assert ((again - top(input_hessian(model, x, other), k)).abs() <= 1e-9 * magnitude).all()


class Loud(nn.Module):
    """A smooth network, which is steep and of one direction on samples whose first pixel is above one."""

    def __init__(self) -> None:
        super().__init__()
        self.quiet = network("same")

    def forward(self, x: Tensor) -> Tensor:
        pixels = x.flatten(1)
        steep = F.pad(1e4 * (pixels[:, 1:2] - 0.5), (0, 3))
        result: Tensor = torch.where(pixels[:, :1] > 1, steep, self.quiet(x))
        return result


def test_a_sample_of_large_curvature_does_not_end_the_iteration_of_the_others() -> None:
    model, (x, y) = Loud().eval(), samples(5)
    x[0, 0, 0, :2] = torch.tensor([2.0, 0.5])
    hessians = input_hessian(model, x, y)
    magnitude = torch.linalg.matrix_norm(hessians, 2)[:, None]
    assert magnitude[0] > 1e6 * magnitude[1:].max()
    found = input_hessian_eigenvalues(model, x, y, k=1, tol=1e-9)
    assert ((found - top(hessians, 1)).abs() <= 1e-9 * magnitude).all()


class Sure(nn.Module):
    """A smooth network, which is sure of the first class where the first pixel is above one."""

    def __init__(self) -> None:
        super().__init__()
        self.quiet = network("same")

    def forward(self, x: Tensor) -> Tensor:
        lead = 60.0 * (x.flatten(1)[:, :1] > 1).to(x.dtype)
        result: Tensor = self.quiet(x) + F.pad(lead, (0, 3))
        return result


@pytest.mark.parametrize("k", [1, 2])
def test_a_confident_sample_is_iterated_as_far_as_the_ordinary_ones_beside_it(k: int) -> None:
    model, (x, _) = Sure().eval(), samples(5)
    y = torch.zeros(5, dtype=torch.int64)
    x[0, 0, 0, 0] = 2.0
    hessians = input_hessian(model, x, y)
    magnitude = torch.linalg.matrix_norm(hessians, 2)[:, None]
    assert magnitude[0] < 1e-20 * magnitude[1:].min()
    found = input_hessian_eigenvalues(model, x, y, k=k, method="lanczos", tol=1e-9)
    assert ((found - top(hessians, k)).abs() <= 1e-9 * magnitude).all()
    torch.testing.assert_close(input_curvature(model, x, y).lambda1[:, None], magnitude, rtol=1e-9, atol=0.0)


def test_iteration_goes_on_to_negative_eigenvalues() -> None:
    model, x, y, hessians = small("same")
    found = input_hessian_eigenvalues(model, x, y, k=64)
    torch.testing.assert_close(found, top(hessians, 64), rtol=1e-9, atol=1e-15)
    assert (found[:, -1] < 0).all()


@pytest.mark.parametrize("gap", [5.0, 30.0, 200.0])
def test_iteration_keeps_the_curvature_of_confident_samples(gap: float) -> None:
    x, _ = samples(5)
    model = Calibrated(rectifier(), shift=gap)
    expected = input_hessian_eigenvalues(model, x, k=2, method="closed_form")
    for label in (0, 1):
        y = torch.full((5,), label)
        found = input_hessian_eigenvalues(model, x, y, k=2, method="lanczos")
        assert ((found - expected).abs() <= 1e-6 * expected[:, :1]).all()


@pytest.mark.parametrize("gap", [5.0, 20.0, 40.0, 60.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_smooth_networks_keep_the_curvature_of_confident_samples(gap: float, dtype: torch.dtype) -> None:
    x, y = normal(4, 5), torch.zeros(4, dtype=torch.int64)
    last = nn.Linear(16, 3)
    smooth = seeded(lambda: nn.Sequential(nn.Linear(5, 16), nn.Tanh(), last))
    with torch.no_grad():
        last.bias.add_(torch.tensor([gap, 0.0, 0.0]))

    def loss(point: Tensor) -> Tensor:  # of class 0, by the differences: nothing cancels
        logits: Tensor = smooth(point[None])[0]
        return (logits[1:] - logits[0]).exp().sum().log1p()

    expected = torch.stack([torch.autograd.functional.hessian(loss, point) for point in x])
    scale = torch.linalg.matrix_norm(expected)[:, None, None]
    found = input_hessian(smooth.to(dtype), x.to(dtype), y).double()
    assert ((found - expected) / scale).abs().max() <= 50 * torch.finfo(dtype).eps


@pytest.mark.parametrize("unit", [1e-8, 1.0, 1e8])
def test_no_unit_of_the_inputs_makes_a_smooth_network_piecewise_linear(unit: float) -> None:
    for activation, straight in (nn.Tanh(), False), (nn.ReLU(), True):
        first = nn.Linear(5, 16)
        model = nn.Sequential(first, activation, nn.Linear(16, 3)).double()
        with torch.no_grad():
            first.weight /= unit
        assert is_piecewise_linear(model, unit * normal(7, 5)) == straight


@pytest.mark.parametrize("unit", [1e-20, 1e20])
def test_float32_closed_forms_keep_curvature_whose_square_leaves_its_range(unit: float) -> None:
    last = nn.Linear(64, 4)
    model = nn.Sequential(nn.Flatten(), last).double()
    x, _ = samples(3)
    expected = input_hessian_eigenvalues(model, x, k=1, method="closed_form")
    with torch.no_grad():
        last.weight *= unit
    found = input_hessian_eigenvalues(model.float(), x.float() / unit, k=1, method="closed_form")
    torch.testing.assert_close(found / unit**2, expected, rtol=1e-4, atol=0.0)


def test_gradients_whose_squares_underflow_keep_their_norms() -> None:
    x, _ = samples(3)
    y = torch.zeros(3, dtype=torch.int64)
    weight = normal(4, 64)
    last = nn.Linear(64, 4)
    model = nn.Sequential(nn.Flatten(), last).double()
    with torch.no_grad():
        last.weight.copy_(weight)
        last.bias.copy_(torch.tensor([400.0, 0.0, 0.0, 0.0]))
    others = (model(x)[:, 1:] - model(x)[:, :1]).exp().detach()  # p_y is one to rounding
    expected = torch.stack([1e150 * torch.linalg.vector_norm(1e150 * p @ (weight[1:] - weight[0])) for p in others])
    torch.testing.assert_close(1e300 * input_gradient_norms(model, x, y), expected, rtol=1e-10, atol=0.0)


def test_train_mode_of_the_dense_hessian_leaves_dropout_off() -> None:
    x, y = samples(8)
    layers = [nn.Flatten(), nn.Linear(64, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Dropout(0.5), nn.Linear(9, 4)]
    model = seeded(lambda: nn.Sequential(*layers))
    without = nn.Sequential(*(layer for layer in layers if not isinstance(layer, nn.Dropout)))
    found = [input_hessian(network, x, y, train_mode=True) for network in (model, without)]
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-14)


def has_cheap_layers(logits: Tensor) -> bool:
    """Return whether the graph of the logits goes through layers that are cheap to differentiate again."""
    seen, left = set[Any](), [logits.grad_fn]
    while left:
        node = left.pop()
        if node is not None and node not in seen:
            seen.add(node)
            left.extend(parent for parent, _ in node.next_functions)
    return any("_Convolution" in node.name() for node in seen)


@pytest.mark.parametrize("kind", ["conv", "pool", "norm", "residual", "same"])
def test_products_go_through_cheap_layers_where_these_suit_the_network(kind: str) -> None:
    x, y = samples(5)
    v = normal(5, 64)
    for model, suited in (network(kind), kind != "same"), (Checkpointed(kind), False):
        with evaluation(model):  # which what is called again in the backward pass needs as well
            leaf, logits = differentiable(cheapened(model, x, 2), x)
            torch.testing.assert_close(logits, model(x), rtol=1e-13, atol=1e-13)
            assert has_cheap_layers(logits) == suited
            product = input_lanczos.input_products(leaf, logits, y)(v)
        hessians = input_hessian(model, x, y)
        assert_each_near(product, times(hessians, v))
        found = input_hessian_eigenvalues(model, x, y, k=1, method="lanczos", tol=1e-9)
        magnitude = torch.linalg.matrix_norm(hessians, 2)[:, None]
        assert ((found - top(hessians, 1)).abs() <= 1e-9 * magnitude).all()


class Quadratic(nn.Module):
    """Two logits, a weighted sum of squares and zero: the Hessian is known."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.tensor([3.0, 2.0, 1.0, 0.5], dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([x.square() @ self.weights, torch.zeros_like(x[:, 0])], dim=1)

    def hessians(self, x: Tensor, y: Tensor) -> Tensor:
        p = F.softmax(self(x), dim=1)
        slope = 2 * self.weights.detach() * x
        bend = (p[:, 0] - (y == 0).double())[:, None] * 2 * self.weights.detach()
        return torch.diag_embed(bend) + (p[:, 0] * p[:, 1])[:, None, None] * slope[:, :, None] * slope[:, None, :]


def test_the_negative_end_counts_for_the_curvature_where_it_is_larger() -> None:
    model, x, y = Quadratic(), 0.3 * normal(8, 4), torch.tensor([0, 1] * 4)
    hessians = model.hessians(x, y).detach()
    torch.testing.assert_close(input_hessian(model, x, y), hessians, rtol=1e-12, atol=1e-15)
    eigenvalues = torch.linalg.eigvalsh(hessians)
    negative = -eigenvalues[:, 0] > 1.1 * eigenvalues[:, -1]
    assert negative.any()
    assert not negative.all()
    found = input_curvature(model, x, y).lambda1
    torch.testing.assert_close(found, torch.linalg.matrix_norm(hessians, 2), rtol=1e-6, atol=0)
    largest = input_hessian_eigenvalues(model, x, y, k=1)[:, 0]
    torch.testing.assert_close(largest, eigenvalues[:, -1], rtol=0, atol=1e-6 * float(found.max()))
    assert (found[negative] > 1.1 * largest[negative]).all()


# -- which of the two -------------------------------------------------------------------------------------------------

STRAIGHT: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {
    "identity": lambda: lambda x: x,
    "ReLU": nn.ReLU,
    "relu": lambda: torch.relu,
    "where": lambda: lambda x: torch.where(x > 0.1, 2 * x, 0.1 * x),
    "clamp": lambda: lambda x: x.clamp(-0.2, 0.3),
    "maximum": lambda: lambda x: torch.maximum(x, x.flip(1)),
    "LeakyReLU": lambda: nn.LeakyReLU(0.2),
    "PReLU": nn.PReLU,
    "RReLU": nn.RReLU,
    "abs": lambda: torch.abs,
    "maxout": lambda: lambda x: x.view(-1, 32, 2).amax(2),
    "hardtanh": lambda: lambda x: F.hardtanh(x, -0.2, 0.2),
    "relu6": nn.ReLU6,
    "hardshrink": lambda: lambda x: F.hardshrink(x, 0.1),
    "masked": lambda: lambda x: x * (x > 0),
    "sorted": lambda: lambda x: x.sort(1).values,
    "average pooling": lambda: lambda x: F.avg_pool1d(x.relu(), 2),
    "max pooling": lambda: lambda x: F.max_pool1d(x, 3),
    "batch normalisation": lambda: nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.BatchNorm1d(8), nn.ReLU()),
    "dropout": lambda: nn.Dropout(0.5),
}
BENT: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {
    "softplus": lambda: F.softplus,
    "steep softplus": lambda: lambda x: F.softplus(x, beta=100),
    "gelu": nn.GELU,
    "tanh": lambda: torch.tanh,
    "sigmoid": lambda: torch.sigmoid,
    "silu": lambda: F.silu,
    "elu": nn.ELU,
    "hardswish": nn.Hardswish,
    "square": lambda: torch.square,
    "layer normalisation": lambda: nn.LayerNorm(64),
    "group normalisation": lambda: nn.GroupNorm(4, 64),
    "unit length": lambda: lambda x: F.normalize(x, dim=1),
    "softmax": lambda: lambda x: x.softmax(1),
    "attention": lambda: lambda x: attention(x.view(-1, 1, 8, 8)),
    "transformer": lambda: nn.Sequential(
        nn.Unflatten(1, (8, 8)), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    ),
    "product of two linear maps": lambda: Product(),
}


def attention(x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x, x, x)


class Product(nn.Module):
    """The product of two linear maps: neither of them bends."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 8), nn.Linear(64, 8)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.first(x) * self.second(x)
        return result


@pytest.mark.parametrize("n", [1, 2, 23, 40])
@pytest.mark.parametrize("kind", STRAIGHT)
def test_piecewise_linear_functions_take_the_closed_form_without_labels(kind: str, n: int) -> None:
    model, (x, y) = mapped(STRAIGHT[kind]), samples(n)
    assert is_piecewise_linear(model, x)
    assert is_piecewise_linear(model.float(), x.float())
    found = input_hessian_eigenvalues(model.double(), x)
    assert torch.equal(found, input_hessian_eigenvalues(model, x, method="closed_form"))
    assert torch.equal(input_hessian_solve(model, x, x), input_hessian_solve(model, x, x, method="closed_form"))
    if n == 2:
        expected = top(input_hessian(model, x, y), 3)
        assert ((found - expected).abs() <= 1e-10 * expected[:, :1]).all()


@pytest.mark.parametrize("kind", BENT)
def test_smooth_functions_are_iterated_and_need_labels(kind: str) -> None:
    model, (x, y) = mapped(BENT[kind]), samples(3)
    assert not is_piecewise_linear(model, x)
    assert not is_piecewise_linear(model, x[:1])
    found = input_hessian_eigenvalues(model, x, y)
    assert torch.equal(found, input_hessian_eigenvalues(model, x, y, method="lanczos"))
    with sdpa_kernel(SDPBackend.MATH):  # attention's other implementations cannot be differentiated twice
        hessians = input_hessian(model, x, y)
    assert ((found - top(hessians, 3)).abs() <= 1e-6 * torch.linalg.matrix_norm(hessians, 2)[:, None]).all()
    for call in (input_hessian_eigenvalues, lambda model, x: input_hessian_solve(model, x, x, damping=1.0)):
        with pytest.raises(InputError, match="not piecewise linear.*depend on the labels: give y"):
            call(model, x)
    with pytest.raises(InputError, match="gradient changes by .* smooth activations.*method='lanczos' with labels"):
        input_hessian_eigenvalues(model, x, y, method="closed_form")
    with pytest.raises(InputError, match="gradient changes by .* smooth activations.*method='lanczos' with labels"):
        input_hessian_solve(model, x, x, y=y, method="closed_form")


@pytest.mark.parametrize("kind", [*PIECEWISE, *SMOOTH])
def test_small_networks_are_piecewise_linear_or_not(kind: str) -> None:
    x, _ = samples()
    for training in (True, False):
        assert is_piecewise_linear(network(kind).train(training), x) == (kind in PIECEWISE)
        assert is_piecewise_linear(network(kind).float().train(training), x.float()) == (kind in PIECEWISE)


@pytest.mark.parametrize(("curvature", "straight"), [(1e-8, True), (3e-7, True), (3e-6, False), (1e-5, False)])
def test_a_gradient_that_changes_by_a_millionth_is_that_of_a_smooth_function(curvature: float, straight: bool) -> None:
    model, (x, _) = mapped(lambda: lambda t: t + curvature * t.square()).eval(), samples(7)
    assert is_piecewise_linear(model, x) == straight


class Late(nn.Module):
    """Linear, but on samples whose first pixel is above one."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        pixels = x.flatten(1)
        result: Tensor = self.last(torch.where(pixels[:, :1] > 1, pixels.square(), pixels))
        return result


def test_a_bend_is_found_among_the_last_of_many_samples() -> None:
    model, (x, _) = seeded(Late), samples(40)
    assert is_piecewise_linear(model, x)
    x[20:, 0, 0, 0] = 2.0
    assert not is_piecewise_linear(model, x)


@pytest.mark.parametrize("name", TABLE6)
def test_the_networks_of_table_6_are_piecewise_linear_in_both_precisions(name: str) -> None:
    model, shape = table6(name), TABLE6[name][4]
    x = torch.rand(3, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    assert is_piecewise_linear(model, x)
    assert is_piecewise_linear(model.float(), x.float())


# -- solving ----------------------------------------------------------------------------------------------------------


@cache
def solved(kind: str) -> Case:
    """Return a case that is cheap to solve densely."""
    if kind in TABLE6:
        return case(kind)
    if kind == "trained":
        return trained()
    if kind not in (*DEPENDENT, "narrow", "few inputs"):
        return small(kind)
    x, y = samples(5)
    if kind == "narrow":  # logits of three hidden units
        model = rectifier(hidden=3, classes=10)
    elif kind == "few inputs":
        model, x = rectifier(d=4, classes=10), normal(5, 4)
    else:
        model = with_logits(kind)
    return Case(model, x, y, input_hessian(model, x, y))


@pytest.mark.parametrize("share", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize(
    "kind", [*PIECEWISE, "rectifier", "narrow", "few inputs", *DEPENDENT, "M1", "CR", "CR with 100 classes", "trained"]
)
def test_damped_solutions_are_those_of_the_dense_system(kind: str, share: float) -> None:
    model, x, y, hessians = solved(kind)
    damping = share * max(1e-3, float(top(hessians, 1).max()))
    shifted = hessians + damping * torch.eye(hessians.shape[1], dtype=torch.float64)
    for g in (normal(*x.shape), gradients(model, x, y)):
        found = input_hessian_solve(model, x, g, damping=damping, method="closed_form")
        assert found.shape == x.shape
        expected = torch.linalg.solve(shifted, g.flatten(1)[:, :, None]).view_as(x)
        assert_each_near(found, expected, 1e-14 * (1e3 + 1 / share))


@pytest.mark.parametrize("kind", ["C1", "C2", "C3"])
@pytest.mark.parametrize("damping", [0.0, 1e-4, 1.0])
def test_solutions_solve_the_dense_system_of_large_inputs(kind: str, damping: float) -> None:
    model, x, y, hessians = case(kind)
    g = gradients(model, x, y)
    assert_each_near(times(hessians, z := input_hessian_solve(model, x, g, damping=damping)) + damping * z, g, 1e-9)


@settings(deadline=None, max_examples=40)
@given(
    classes=st.integers(2, 10),
    d=st.integers(1, 8),
    hidden=st.integers(1, 12),
    n=st.integers(1, 4),
    exponent=st.floats(-3, 3),
    spread=st.floats(0.1, 5),
    seed=st.integers(0, 1000),
)
def test_damped_solutions_of_random_rectifiers_solve_the_dense_system(
    classes: int, d: int, hidden: int, n: int, exponent: float, spread: float, seed: int
) -> None:
    model, x, g = Calibrated(rectifier(d, hidden, classes, seed), spread), normal(n, d, seed=seed), normal(n, d)
    hessians, damping = input_hessian(model, x, torch.zeros(n, dtype=torch.int64)), 10**exponent
    z = input_hessian_solve(model, x, g, damping=damping)
    sizes = (hessians.flatten(1).norm(dim=1) + damping) * z.norm(dim=1) + g.norm(dim=1)
    # Of g, what lies in the range of H is divided by the damping before it cancels.
    rounding = 1e-13 + 1e-15 * hessians.flatten(1).norm(dim=1) / damping
    assert ((times(hessians, z) + damping * z - g).norm(dim=1) <= rounding * sizes).all()


@pytest.mark.parametrize(
    "kind", [*PIECEWISE, "rectifier", "narrow", "few inputs", *DEPENDENT, "M1", "CR", "CR with 100 classes"]
)
def test_without_damping_the_solution_is_that_of_the_pseudo_inverse(kind: str) -> None:
    model, x, y, hessians = solved(kind)
    for g in (normal(*x.shape), gradients(model, x, y)):
        found = input_hessian_solve(model, x, g, method="closed_form")
        assert_each_near(found, pseudo_solved(hessians, g), 1e-9)
    nothing = input_hessian_solve(model, x, torch.zeros_like(x))
    assert not nothing.any()


@settings(deadline=None, max_examples=60)
@given(
    classes=st.integers(2, 10),
    d=st.integers(1, 8),
    hidden=st.integers(1, 12),
    spread=st.floats(0.1, 5),
    seed=st.integers(0, 1000),
)
def test_pseudo_inverses_of_random_rectifiers_are_those_of_the_dense_hessian(
    classes: int, d: int, hidden: int, spread: float, seed: int
) -> None:
    model, x, g = Calibrated(rectifier(d, hidden, classes, seed), spread), normal(2, d, seed=seed), normal(2, d)
    hessians = input_hessian(model, x, torch.zeros(2, dtype=torch.int64))
    shares = torch.linalg.eigvalsh(hessians).abs()
    shares = shares / shares.amax(1, keepdim=True).clamp_min(1e-300)
    assume(not bool(((shares > 1e-12) & (shares < 1e-6)).any()))  # else the rank is a matter of taste
    assert_each_near(input_hessian_solve(model, x, g), pseudo_solved(hessians, g), 1e-8)


@pytest.mark.parametrize("shift", [0.0, 10.0, 30.0, 100.0, 640.0])
@pytest.mark.parametrize("kind", ["rectifier", "linear", "M1"])
def test_the_newton_step_moves_the_logits_by_minus_one_over_p_y(kind: str, shift: float) -> None:
    case = solved(kind)
    model, x = Calibrated(case.model, shift=shift), case.x
    # towards the first class, so that the others stay comparable with each other
    others = F.softmax(model(x), dim=1)[:, 1:].sum(1)
    assert shift == 0 or bool((others < 1e3 * math.exp(-shift)).all())
    for label in (0, 1):
        y = torch.full((len(x),), label)
        if label and shift > 300:
            continue  # 1 / p_y, squared, would overflow
        g, J = gradients(model, x, y), jacobians(model, x)
        z = input_hessian_solve(model, x, g)
        p_y = F.softmax(model.eval()(x), dim=1)[:, label].detach()
        moved = (J @ z.flatten(1)[:, :, None])[:, :, 0]
        rest = torch.cat([moved[:, :label], moved[:, label + 1 :]], dim=1)
        torch.testing.assert_close(
            rest - moved[:, label : label + 1], (1 / p_y)[:, None].expand_as(rest), rtol=1e-8, atol=0
        )
        decrement = (g * z).flatten(1).sum(1)
        assert (decrement > 0).all()
        if label == 0:
            expected = F.softmax(model(x), dim=1)[:, 1:].sum(1).detach() / p_y
            torch.testing.assert_close(decrement, expected, rtol=1e-8, atol=0)


@pytest.mark.parametrize("shift", [100.0, 300.0])
def test_dependent_logits_of_confident_samples_keep_the_newton_step(shift: float) -> None:
    x, _ = samples(5)
    model = Calibrated(with_logits("equal logits"), shift=shift)
    y = torch.zeros(5, dtype=torch.int64)
    z = input_hessian_solve(model, x, gradients(model, x, y))
    moved = (jacobians(model, x) @ z.flatten(1)[:, :, None])[:, :, 0]
    torch.testing.assert_close(moved[:, 1:] - moved[:, :1], torch.ones(5, 4).double(), rtol=1e-8, atol=0)


@pytest.mark.parametrize("kind", ["rectifier", "conv", "few inputs", "two dead logits", "M1", "smooth"])
def test_a_large_damping_leaves_the_scaled_gradient(kind: str) -> None:
    model, x, y, _ = solved(kind)
    g = normal(*x.shape)
    assert_each_near(input_hessian_solve(model, x, g, damping=1e12, y=y), g / 1e12, 1e-10)


@pytest.mark.parametrize("share", [2.0, 0.5, 1e-3])
@pytest.mark.parametrize("kind", [*SMOOTH, "rectifier", "conv"])
def test_iterated_damped_solutions_are_those_of_the_dense_system(kind: str, share: float) -> None:
    model, x, y, hessians = solved(kind)
    eigenvalues = torch.linalg.eigvalsh(hessians)
    damping = share * float(eigenvalues.abs().max())
    while (eigenvalues + damping).abs().min() < 1e-2 * damping:  # stay away from a singular system
        damping *= 1.1
    shifted = hessians + damping * torch.eye(64, dtype=torch.float64)
    for g in (normal(*x.shape), gradients(model, x, y)):
        found = input_hessian_solve(model, x, g, damping=damping, y=y, method="lanczos", tol=1e-10)
        left = (times(shifted, found) - g).flatten(1).norm(dim=1)
        assert (left <= 1e-9 * g.flatten(1).norm(dim=1)).all()
        assert_each_near(found, torch.linalg.solve(shifted, g.flatten(1)[:, :, None]).view_as(x), 1e-6)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", [*SMOOTH, "rectifier", "conv"])
def test_iterated_solutions_without_damping_are_those_of_the_pseudo_inverse(kind: str, seed: int) -> None:
    model, x, y, hessians = solved(kind)
    for g in (normal(*x.shape, seed=seed), times(hessians, normal(*x.shape, seed=seed)), gradients(model, x, y)):
        found = input_hessian_solve(model, x, g, y=y, method="lanczos", tol=1e-12)
        assert_each_near(found, pseudo_solved(hessians, g), 1e-6)


@pytest.mark.parametrize("damping", [0.0, 1.0])
@pytest.mark.parametrize("kind", ["same", "others", "grouped"])
def test_samples_that_converge_at_different_speeds_are_solved_together(kind: str, damping: float) -> None:
    model, x, y, hessians = small(kind)
    damping *= 3 * float(torch.linalg.matrix_norm(hessians, 2).max())
    vectors = torch.linalg.eigh(hessians).eigenvectors
    g = normal(5, 64)
    g[0] = 0.0
    g[1] = vectors[1, :, -1]
    g[2] = 1e-6 * vectors[2, :, -2:].sum(1)
    g[3] *= 1e6
    g = g.view_as(x)
    found = input_hessian_solve(model, x, g, damping=damping, y=y, tol=1e-12)
    assert not found[0].any()
    inverse = torch.linalg.pinv(hessians + damping * torch.eye(64, dtype=torch.float64), hermitian=True, rtol=1e-9)
    assert_each_near(found, times(inverse, g), 1e-7)
    for i in range(5):
        one = slice(i, i + 1)
        alone = input_hessian_solve(model, x[one], g[one], damping=damping, y=y[one], tol=1e-12)
        assert_each_near(alone, found[one], 1e-7)


def test_a_large_right_hand_side_does_not_end_the_iteration_of_the_others() -> None:
    model, x, y, hessians = small("same")
    damping, g = 3 * float(torch.linalg.matrix_norm(hessians, 2).max()), normal(5, 64)
    g[0] = 1e9 * torch.linalg.eigh(hessians).eigenvectors[0, :, -1]  # solved in one step
    found = input_hessian_solve(model, x, g.view_as(x), damping=damping, y=y, tol=1e-6).flatten(1)
    left = times(hessians, found) + damping * found - g
    assert (left.norm(dim=1) <= 1.01e-6 * g.norm(dim=1)).all()


@settings(deadline=None, max_examples=15)
@given(kind=st.sampled_from(["rectifier", "same", "few inputs"]), a=st.floats(-5, 5), seed=st.integers(0, 100))
def test_solving_is_linear_and_symmetric(kind: str, a: float, seed: int) -> None:
    model, x, y, hessians = solved(kind)
    u, v = normal(2, *x.shape, seed=seed)
    damping = 3 * float(torch.linalg.matrix_norm(hessians, 2).max())

    def solve(g: Tensor) -> Tensor:
        return input_hessian_solve(model, x, g, damping=damping, y=y, tol=1e-13).flatten(1)

    scale = float((u.norm() + abs(a) * v.norm()) / damping)
    assert float((solve(u + a * v) - solve(u) - a * solve(v)).norm()) <= 1e-10 * scale
    skew = (u.flatten(1) * solve(v) - v.flatten(1) * solve(u)).sum(1)
    assert float(skew.abs().max()) <= 1e-10 * float(u.norm() * v.norm()) / damping


# -- means of section 3.2 ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*PIECEWISE, "rectifier", *SMOOTH, "M1"])
def test_means_of_spectral_and_gradient_norms(kind: str) -> None:
    model, x, y, hessians = solved(kind)
    found = input_curvature(model, x, y)
    norms = top(hessians, 1)[:, 0] if kind == "M1" else torch.linalg.matrix_norm(hessians, 2)
    torch.testing.assert_close(found.lambda1, norms, rtol=1e-6 if kind in SMOOTH else 1e-10, atol=1e-18)
    slopes = gradients(model, x, y).flatten(1).norm(dim=1)
    torch.testing.assert_close(found.gradient_norms, slopes, rtol=1e-10, atol=1e-18)
    torch.testing.assert_close(input_gradient_norms(model, x, y), slopes, rtol=1e-10, atol=1e-18)
    leaf = x.clone().requires_grad_()
    F.cross_entropy(model.eval()(leaf), y, reduction="sum").backward()
    assert leaf.grad is not None
    torch.testing.assert_close(found.gradient_norms, leaf.grad.flatten(1).norm(dim=1), rtol=1e-8, atol=1e-14)
    assert found.mean_lambda1 == pytest.approx(float(norms.mean()), rel=1e-6)
    assert found.mean_gradient_norm == pytest.approx(float(slopes.mean()), rel=1e-10)
    assert found.lambda1.dtype == found.gradient_norms.dtype == torch.float64
    assert found.lambda1.shape == found.gradient_norms.shape == (len(x),)


@pytest.mark.parametrize(
    "model", [nn.Flatten(), nn.Sequential(nn.Flatten(), nn.Linear(64, 4)).requires_grad_(False)], ids=["none", "frozen"]
)
def test_a_network_without_trainable_weights_has_gradient_norms(model: nn.Module) -> None:
    x, y = samples(5)
    leaf = x.clone().requires_grad_()
    F.cross_entropy(model.double()(leaf), y, reduction="sum").backward()
    assert leaf.grad is not None
    found = input_curvature(model, x, y)
    torch.testing.assert_close(found.gradient_norms, leaf.grad.flatten(1).norm(dim=1), rtol=1e-10, atol=0)


# -- memory -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def chunks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list to which the number of samples of each forward pass for derivatives is appended."""
    sizes: list[int] = []
    forward = differentiable

    def noted(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        sizes.append(len(x))
        return forward(model, x)

    for module in (closed_form, input_lanczos, inputs):
        monkeypatch.setattr(module, "differentiable", noted)
    return sizes


@pytest.mark.parametrize("kind", ["rectifier", "conv", "few inputs", "two dead logits", "smooth"])
def test_the_memory_decides_how_many_samples_are_taken_at_once_and_nothing_else(kind: str, chunks: list[int]) -> None:
    model = solved(kind).model
    d = solved(kind).x.shape[1:]
    x, y = torch.rand(12, *d, dtype=torch.float64, generator=torch.Generator().manual_seed(5)), torch.arange(12) % 4
    g = normal(*x.shape)
    calls: list[Callable[[int], Tensor]] = [
        lambda memory: input_hessian_eigenvalues(model, x, y, tol=1e-12, memory=memory),
        lambda memory: input_hessian_solve(model, x, g, damping=1.0, y=y, tol=1e-12, memory=memory),
        lambda memory: input_hessian_solve(model, x, g, y=y, tol=1e-12, memory=memory),
        lambda memory: input_gradient_norms(model, x, y, memory=memory),
        lambda memory: input_curvature(model, x, y, memory=memory).lambda1,
    ]
    for call in calls:
        chunks.clear()
        expected = call(1 << 30)
        assert chunks[-1] == 12
        counts = []
        for memory in (0, 1, 60_000, 150_000, 400_000):
            chunks.clear()
            assert_each_near(call(memory)[:, None], expected[:, None], 1e-6 if kind in SMOOTH else 1e-11)
            counts.append(len(chunks))
            assert memory > 1 or chunks[-12:] == [1] * 12
        assert counts == sorted(counts, reverse=True)
        assert counts[-1] < counts[0]


@settings(deadline=None, max_examples=8)
@given(
    kind=st.sampled_from(["rectifier", "conv", "smooth"]),
    order=st.permutations(range(23)),
    cuts=st.lists(st.integers(1, 22), max_size=4),
    memory=st.sampled_from([0, 100_000, 1 << 30]),
)
def test_results_do_not_depend_on_batches_or_order(kind: str, order: list[int], cuts: list[int], memory: int) -> None:
    model = solved(kind).model
    x, y = samples()
    g = normal(*x.shape)
    together = results(model, x, y, g)
    sizes = [b - a for a, b in zip([0, *sorted(set(cuts))], [*sorted(set(cuts)), 23], strict=True)]
    batches = zip(x[order].split(sizes), y[order].split(sizes), g[order].split(sizes), strict=True)
    parts = [results(model, some, labels, right, memory) for some, labels, right in batches]
    for all_at_once, *pieces in zip(together, *parts, strict=True):
        assert_each_near(torch.cat(pieces), all_at_once[order], 1e-6 if kind == "smooth" else 1e-11)


def results(model: nn.Module, x: Tensor, y: Tensor, g: Tensor, memory: int = 1 << 30) -> list[Tensor]:
    return [
        input_hessian_eigenvalues(model, x, y, tol=1e-12, memory=memory),
        input_hessian_solve(model, x, g, damping=1.0, y=y, tol=1e-12, memory=memory),
        input_gradient_norms(model, x, y, memory=memory)[:, None],
        input_curvature(model, x, y, memory=memory).lambda1[:, None],
    ]


def test_a_hundred_classes_stay_within_the_memory() -> None:
    """In an interpreter of its own, where the largest resident size is that of the calls."""
    at_once = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}  # freed memory is given back
    done = subprocess.run(
        [sys.executable, "-c", MEMORY_CHECK], capture_output=True, text=True, env={**os.environ, **at_once}
    )
    assert done.returncode == 0, done.stderr


MEMORY_CHECK = """
import pathlib, resource, torch
from torch import nn
from hessnb.curvature import input_hessian_eigenvalues, input_hessian_solve
torch.set_num_threads(1)
torch.manual_seed(0)
model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 120), nn.ReLU(), nn.Linear(120, 100))
x = torch.rand(28, 3, 32, 32)
status = pathlib.Path("/proc/self/status")

def peak():
    if status.exists():  # on Linux ru_maxrss begins with the size of the process that started this one
        return int(status.read_text().split("VmHWM:")[1].split()[0]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

def calls(n, dtype, memory):
    model.to(dtype)
    some = x[:n].to(dtype)
    input_hessian_eigenvalues(model, some, memory=memory)
    input_hessian_solve(model, some, some, memory=memory)
    input_hessian_solve(model, some, some, damping=0.1, memory=memory)

calls(1, torch.float64, 0)  # loads what is loaded once
before = peak()
for dtype in (torch.float32, torch.float64):
    calls(28, dtype, 32 << 20)
    grown = peak() - before
    assert grown < 32, f"{grown} MiB were taken for {dtype}, 32 allowed"
calls(28, torch.float64, 10 << 30)
assert peak() - before > 64, f"{peak() - before} MiB without a limit: it did not matter"
"""


# -- nothing is changed on the side -----------------------------------------------------------------------------------


@pytest.fixture
def unchanged(untouched: Untouched) -> Untouched:
    """Like ``untouched``, and neither a requires_grad flag nor the gradient mode nor given tensors have changed."""

    def state(model: nn.Module, tensors: tuple[Tensor, ...]) -> tuple[Any, ...]:
        flags = [(p.requires_grad, p._version) for p in model.parameters()]
        given = [(t.requires_grad, t._version, t.grad is None) for t in tensors]
        return flags, given, torch.is_grad_enabled(), torch.is_inference_mode_enabled()

    @contextmanager
    def context(model: nn.Module, *tensors: Tensor) -> Iterator[None]:
        before, values = state(model, tensors), [t.detach().clone() for t in tensors]
        with untouched(model):
            yield
        assert state(model, tensors) == before
        assert all(torch.equal(t, value) for t, value in zip(tensors, values, strict=True))

    return context


def with_gradients(kind: str = "conv") -> nn.Module:
    model = network(kind)
    model.get_submodule("1").eval()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    return model


Call = Callable[[nn.Module, Tensor, Tensor], Any]
CALLS: dict[str, Call] = {
    "curvature": lambda model, x, y: input_curvature(model, x, y),
    "gradient norms": lambda model, x, y: input_gradient_norms(model, x, y),
    "eigenvalues": lambda model, x, y: input_hessian_eigenvalues(model, x, y),
    "iterated eigenvalues": lambda model, x, y: input_hessian_eigenvalues(model, x, y, method="lanczos"),
    "solution": lambda model, x, y: input_hessian_solve(model, x, torch.ones_like(x), y=y),
    "damped solution": lambda model, x, y: input_hessian_solve(model, x, torch.ones_like(x), damping=1.0, y=y),
    "iterated solution": lambda model, x, y: input_hessian_solve(
        model, x, torch.ones_like(x), damping=1.0, y=y, method="lanczos"
    ),
    "piecewise linear": lambda model, x, y: is_piecewise_linear(model, x),
}


@pytest.mark.parametrize("kind", ["conv", "norm"])
@pytest.mark.parametrize("call", CALLS)
def test_model_and_inputs_are_untouched(call: str, kind: str, unchanged: Untouched) -> None:
    model, (x, y) = with_gradients(kind), samples(5)
    model.get_parameter("0.weight").requires_grad_(False)
    with unchanged(model, x, y):
        CALLS[call](model, x, y)


@pytest.mark.parametrize("kind", ["conv", "norm"])
def test_inputs_and_right_hand_sides_may_need_gradients(kind: str, unchanged: Untouched) -> None:
    model, (x, y) = with_gradients(kind), samples(5)
    expected = results(model, x, y, x)
    g = x.clone().requires_grad_()
    x.requires_grad_()
    x.grad = torch.ones_like(x)
    with unchanged(model, x, y, g):
        found = results(model, x, y, g)
    for tensor, value in zip(found, expected, strict=True):
        assert torch.equal(tensor, value)
        assert not tensor.requires_grad
    assert not input_hessian_solve(model, x, g, y=y).requires_grad


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("kind", ["rectifier", "smooth"])
def test_results_are_the_same_where_gradients_are_switched_off(
    kind: str, context: Callable[[], AbstractContextManager[None]]
) -> None:
    model, x, y, _ = small(kind)
    expected = results(model, x, y, x)
    with context():
        for tensor, value in zip(results(model, x, y, x), expected, strict=True):
            assert torch.equal(tensor, value)
        assert is_piecewise_linear(model, x) == (kind == "rectifier")


@pytest.mark.parametrize("kind", ["rectifier", "smooth"])
def test_autocast_outside_does_not_lower_the_precision_inside(kind: str) -> None:
    model = rectifier() if kind == "rectifier" else network(kind)
    x, y = samples(5)
    expected = results(model, x, y, x)
    model, x = model.float(), x.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = results(model, x, y, x)
    for tensor, value in zip(found, expected, strict=True):
        assert_each_near(tensor.double(), value, 1e-5)


def test_a_network_that_works_in_place_leaves_the_inputs_as_they_were() -> None:
    x, y = samples(5)
    x = x - 0.5
    in_place = seeded(lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(64, 4)))
    plain = seeded(lambda: nn.Sequential(nn.ReLU(), nn.Flatten(), nn.Linear(64, 4)))
    before = x.clone()
    expected = results(plain, before, y, before)
    for tensor, value in zip(results(in_place, x, y, before), expected, strict=True):
        torch.testing.assert_close(tensor, value)
    assert torch.equal(x, before)


class Fuse(nn.Module):
    """A network that raises from a given forward pass on."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.left = model, 10**6

    def forward(self, x: Tensor) -> Tensor:
        self.left -= 1
        if self.left < 0:
            raise RuntimeError("broken network")
        result: Tensor = self.model(x)
        return result


@pytest.mark.parametrize("kind", ["conv", "norm"])
@pytest.mark.parametrize("call", CALLS)
def test_model_is_untouched_whenever_it_raises(call: str, kind: str, unchanged: Untouched) -> None:
    model, (x, y) = Fuse(with_gradients(kind)), samples(5)
    CALLS[call](model, x, y)
    passes = 10**6 - model.left
    assert passes > 1
    for i in range(passes):
        model.left = i
        with unchanged(model, x, y), pytest.raises(RuntimeError, match="broken network"):
            CALLS[call](model, x, y)


# -- bad input --------------------------------------------------------------------------------------------------------


class Returns(nn.Module):
    """Passes the logits of a linear layer through a function."""

    def __init__(self, function: Callable[[Tensor], object], classes: int = 4) -> None:
        super().__init__()
        self.function, self.last = function, nn.Linear(64, classes).double()

    def forward(self, x: Tensor) -> object:
        return self.function(self.last(x.flatten(1)))


def of_two_dtypes() -> nn.Module:
    model = rectifier()
    model.get_submodule("3").float()
    return model


def batch_statistics() -> nn.Module:
    norm = nn.BatchNorm2d(1, track_running_stats=False)
    return nn.Sequential(nn.Conv2d(1, 1, 3), norm, nn.Flatten(), nn.Linear(36, 4)).double()


X, Y = samples()


def replaced(value: float, sample: int) -> Tensor:
    x = X.clone()
    x[sample, 0, 3, 3] = value
    return x


def label(value: int) -> Tensor:
    y = Y.clone()
    y[13] = value
    return y


# faults of the model and the data, with what the message must tell: the cause and the remedy
Fault = tuple[Callable[[], nn.Module], Tensor, Tensor, str, str]
FAULTS: dict[str, Fault] = {
    "one output": (lambda: Returns(lambda s: s, 1), X, Y * 0, "(1, 1)", "c at least 2"),
    "tuple of outputs": (lambda: Returns(lambda s: (s, 0)), X, Y, "returns tuple", "must return logits"),
    "outputs of three dimensions": (lambda: Returns(lambda s: s[:, :, None]), X, Y, "(1, 4, 1)", "logits (N, c)"),
    "infinite outputs": (lambda: Returns(lambda s: s * torch.inf), X, Y, "not finite", "look for"),
    "parameters of two dtypes": (of_two_dtypes, X, Y, "dtype", "model.to("),
    "batch statistics": (batch_statistics, X, Y, "1 normalises by", "track_running_stats=True"),
    "samples centred by their batch": (
        lambda: mapped(lambda: lambda x: x - x.mean(0)), X, Y, "depend on the others", "look for",
    ),
    "random model": (lambda: mapped(lambda: F.dropout), X, Y, "random in eval mode", "dropout"),
    **{
        f"{fault}, {kind}": (partial(network, kind), x, y, cause, remedy)
        for kind in ("relu", "smooth")
        for fault, x, y, cause, remedy in (
            ("no input", X[:0], Y[:0], "there are no inputs", "at least one sample"),
            ("no label", X, Y[:0], "23 inputs and 0 labels", "as many labels as inputs"),
            ("fewer labels", X, Y[:-1], "23 inputs and 22 labels", "as many labels as inputs"),
            ("more labels", X[:-1], Y, "22 inputs and 23 labels", "as many labels as inputs"),
            ("label too large", X, label(4), "labels from 0 to 4, the model 4 outputs", "from 0 to 3"),
            ("label negative", X, label(-1), "labels from -1 to", "from 0 to 3"),
            ("column of labels", X, Y[:, None], "labels", "(N,)"),
            ("labels as floats", X, Y.double(), "labels", "int"),
            ("input is NaN", replaced(torch.nan, 0), Y, "NaN or infinity", "clean the data"),
            ("last input is infinite", replaced(torch.inf, 22), Y, "NaN or infinity", "clean the data"),
            ("inputs of another dtype", X.float(), Y, "torch.float32, the parameters torch.float64", "convert"),
            ("inputs are integers", (X * 255).long(), Y, "inputs are torch.int64", "convert them to the model's"),
            ("inputs on another device", X.to("meta"), Y.to("meta"), "is on meta and meta, the model on cpu", "move"),
        )
    },
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("call", CALLS)
def test_a_fault_is_refused_with_cause_and_remedy_and_nothing_is_changed(
    fault: str, call: str, unchanged: Untouched
) -> None:
    make, x, y, cause, remedy = FAULTS[fault]
    if call == "piecewise linear" and ("label" in fault or fault in ("one output", "outputs of three dimensions")):
        return  # it takes no labels, and outputs of any shape may be piecewise linear
    model = make()
    with unchanged(model), pytest.raises(InputError) as caught:
        CALLS[call](model, x, y)
    assert cause in str(caught.value)
    assert remedy in str(caught.value)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("kind", ["relu", "smooth"])
@pytest.mark.parametrize("call", CALLS)
def test_weights_that_are_not_finite_are_refused(call: str, kind: str, value: float) -> None:
    model = network(kind)
    model.get_parameter("3.bias").data[0] = value
    with pytest.raises(InputError, match="3.bias of the model holds NaN or infinity"):
        CALLS[call](model, X, Y)


class Overflowing(nn.Module):
    """A rectifier whose logits are infinite at bright images."""

    def __init__(self) -> None:
        super().__init__()
        self.model = rectifier()

    def forward(self, x: Tensor) -> Tensor:
        bright = torch.where(x.flatten(1).sum(1) > 1000, torch.inf, 1.0)
        result: Tensor = self.model(x) * bright[:, None]
        return result


@pytest.mark.parametrize("call", [call for call in CALLS if call != "piecewise linear"])
@pytest.mark.parametrize("sample", [0, 5, 39])
def test_outputs_of_any_sample_that_are_not_finite_are_refused(call: str, sample: int, unchanged: Untouched) -> None:
    model, (x, y) = Overflowing(), samples(40)
    x[sample] *= 1000
    with unchanged(model, x, y), pytest.raises(InputError, match="not finite.*look for"):
        CALLS[call](model, x, y)


@pytest.mark.parametrize("kind", ["relu", "smooth"])
@pytest.mark.parametrize(
    ("arguments", "cause", "remedy"),
    [
        pytest.param({"k": 0}, "k = 0", "1 to 64 eigenvalues", id="k = 0"),
        pytest.param({"k": -1}, "k = -1", "1 to 64 eigenvalues", id="k < 0"),
        pytest.param({"k": 65}, "k = 65", "1 to 64 eigenvalues", id="k > d"),
        pytest.param({"method": "power"}, "unknown method 'power'", "auto, closed_form, lanczos", id="method"),
    ],
)
def test_arguments_of_the_eigenvalues_are_checked(
    kind: str, arguments: dict[str, Any], cause: str, remedy: str, unchanged: Untouched
) -> None:
    model = network(kind)
    with unchanged(model), pytest.raises(InputError) as caught:
        input_hessian_eigenvalues(model, X, Y, **arguments)
    assert cause in str(caught.value)
    assert remedy in str(caught.value)


@pytest.mark.parametrize("kind", ["relu", "smooth"])
@pytest.mark.parametrize(
    ("g", "arguments", "cause", "remedy"),
    [
        pytest.param(X[:-1], {}, "g of shape (22, 1, 8, 8)", "shape of x, (23, 1, 8, 8)", id="fewer"),
        pytest.param(X.flatten(1), {}, "g of shape (23, 64)", "shape of x, (23, 1, 8, 8)", id="flat"),
        pytest.param(X[0], {}, "g of shape (1, 8, 8)", "shape of x, (23, 1, 8, 8)", id="of one sample"),
        pytest.param(replaced(torch.nan, 22), {}, "g of shape", "must be finite", id="NaN"),
        pytest.param(replaced(-torch.inf, 0), {}, "g of shape", "must be finite", id="infinite"),
        pytest.param(X, {"damping": -1e-3}, "damping = -0.001", "0 or positive", id="negative damping"),
        pytest.param(X, {"damping": float("nan")}, "damping = nan", "0 or positive, and finite", id="damping NaN"),
        pytest.param(X, {"damping": float("inf")}, "damping = inf", "0 or positive, and finite", id="damping inf"),
        pytest.param(X, {"method": "cg"}, "unknown method 'cg'", "auto, closed_form, lanczos", id="method"),
    ],
)
def test_arguments_of_the_solution_are_checked(
    kind: str, g: Tensor, arguments: dict[str, Any], cause: str, remedy: str, unchanged: Untouched
) -> None:
    model = network(kind)
    with unchanged(model), pytest.raises(InputError) as caught:
        input_hessian_solve(model, X, g, y=Y, **arguments)
    assert cause in str(caught.value)
    assert remedy in str(caught.value)


@pytest.mark.parametrize(("x", "y", "told"), [(X[:3], Y[:2], "as many labels as inputs"), (X[:0], Y[:0], "no inputs")])
@pytest.mark.parametrize("train_mode", [False, True])
def test_the_dense_hessian_wants_as_many_labels_as_inputs(x: Tensor, y: Tensor, told: str, train_mode: bool) -> None:
    with pytest.raises(InputError, match=told):
        input_hessian(network(), x, y, train_mode=train_mode)


def test_the_dense_hessian_checks_labels_and_inputs_and_works_under_inference_mode() -> None:
    with pytest.raises(InputError, match="labels from 0 to 4"):
        input_hessian(network(), X[:2], torch.tensor([0, 4]))
    with pytest.raises(InputError, match="convert one of them"):
        input_hessian(network().float(), X[:2], Y[:2])
    model = network()
    expected = input_hessian(model, X[:2], Y[:2])
    with torch.inference_mode():
        assert torch.equal(input_hessian(model, X[:2], Y[:2].clone()), expected)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_labels_may_be_of_any_integer_type(dtype: torch.dtype) -> None:
    model, y = network("smooth"), Y[:3].to(dtype)
    assert torch.equal(input_hessian(model, X[:3], y), input_hessian(model, X[:3], Y[:3]))
    for k in ({"k": 2}, {"k": 2, "method": "lanczos"}):
        found, expected = (input_hessian_eigenvalues(model, X[:3], labels, **k) for labels in (y, Y[:3]))
        assert torch.equal(found, expected)
    assert torch.equal(input_gradient_norms(model, X[:3], y), input_gradient_norms(model, X[:3], Y[:3]))


# -- dtypes and shapes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["rectifier", "linear", "smooth"])
def test_float32_networks_give_eigenvalues_in_float64_and_solutions_like_the_inputs(kind: str) -> None:
    model, x, y, hessians = small(kind)
    single = (rectifier() if kind == "rectifier" else network(kind)).float()
    damping = 2 * float(torch.linalg.matrix_norm(hessians, 2).max())
    g = normal(*x.shape).float()
    eigenvalues = input_hessian_eigenvalues(single, x.float(), y)
    assert eigenvalues.dtype == torch.float64
    magnitude = torch.linalg.matrix_norm(hessians, 2)[:, None]
    assert ((eigenvalues - top(hessians, 3)).abs() <= 2e-6 * magnitude).all()
    for right in (g, g.double()):
        solution = input_hessian_solve(single, x.float(), right, damping=damping, y=y)
        assert solution.dtype == torch.float32
        assert solution.shape == x.shape
        expected = input_hessian_solve(model, x, right, damping=damping, y=y)
        assert expected.dtype == torch.float64
        assert_each_near(solution.double(), expected, 2e-6)
    for measure in (input_curvature(single, x.float(), y).lambda1, input_gradient_norms(single, x.float(), y)):
        assert measure.dtype == torch.float64


def test_float32_pseudo_inverses_hold_against_float64(digits: Splits) -> None:
    x, y = digits.train.images[:10], digits.train.labels[:10]
    model, exact = build("M1", width=0.1, seed=0), build("M1", width=0.1, seed=0).double()
    g = gradients(exact, x.double(), y)
    found = input_hessian_solve(model, x, g.float())
    assert_each_near(found.double(), input_hessian_solve(exact, x.double(), g), 1e-3)


@pytest.mark.parametrize("kind", DEPENDENT[:-1])
def test_float32_pseudo_inverses_of_dependent_logits_hold_against_float64(kind: str) -> None:
    model, (x, _) = with_logits(kind), samples(5)
    g = normal(*x.shape)
    found = input_hessian_solve(with_logits(kind).float(), x.float(), g.float())
    assert_each_near(found.double(), input_hessian_solve(model, x, g), 1e-2)


@pytest.mark.parametrize("kind", ["rectifier", "conv", "smooth", "others"])
def test_one_sample_and_any_strides_are_taken(kind: str) -> None:
    model, x, y, _ = small(kind)
    g = normal(*x.shape)
    together = results(model, x, y, g)
    for i in (0, 4):
        one = slice(i, i + 1)
        for alone, every in zip(results(model, x[one], y[one], g[one]), together, strict=True):
            assert_each_near(alone, every[one], 1e-8)
    turned, right = (t.transpose(2, 3).contiguous().transpose(2, 3) for t in (x, g))
    for tensor, value in zip(results(model, turned, y, right), together, strict=True):
        assert_each_near(tensor, value, 1e-8)


def test_inputs_may_have_any_number_of_dimensions() -> None:
    x, y = normal(5, 6), torch.arange(5) % 3
    for shape in ((6,), (2, 3), (1, 2, 3), (1, 1, 2, 3)):
        model = rectifier(6, 8, 3)
        for tensor, value in zip(
            results(model, x.view(5, *shape), y, x.view(5, *shape)),
            results(model, x, y, x),
            strict=True,
        ):
            assert torch.equal(tensor.flatten(1), value)
