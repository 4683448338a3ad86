"""The attacks: against foolbox, against dense Hessians, and against what must hold of any attack."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

import eagerpy
import foolbox
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import InPlace, network, samples
from torch import Tensor, nn

from hessnb.attacks import (
    ATTACKS,
    autoattack,
    damped_newton,
    fgsm,
    fgsm_iterated,
    fhsm,
    l2_gradient,
    l2_hessian,
    loop,
    nearest_class,
    pgd,
)
from hessnb.attacks.ball import Norm, unit_ball
from hessnb.attacks.loop import Attack, Perturbation, wrongness
from hessnb.attacks.second_order import Solver
from hessnb.checks import finite
from hessnb.curvature import input_gradient_norms, input_hessian, input_hessian_solve
from hessnb.curvature.evaluation import differentiable
from hessnb.data import Splits
from hessnb.errors import InputError
from hessnb.models import INPUT_SHAPES, build, eval_mode

Untouched = Callable[..., AbstractContextManager[None]]

# Every attack, with the options that make it another one.
ALL: dict[str, Callable[..., Tensor]] = {
    "fgsm": fgsm,
    "fgsm_iterated": partial(fgsm_iterated, steps=3),
    "l2_gradient": l2_gradient,
    "fhsm cg": fhsm,
    "fhsm exact": partial(fhsm, solver="exact"),
    "l2_hessian cg": l2_hessian,
    "l2_hessian exact": partial(l2_hessian, solver="exact"),
    "l2_hessian damped": partial(l2_hessian, solver="exact", damping=0.1),
    "pgd linf": partial(pgd, steps=3, restarts=2),
    "pgd l2": partial(pgd, norm="l2", steps=3, restarts=2),
    "damped_newton l2": damped_newton,
    "damped_newton linf": partial(damped_newton, norm="linf"),
    "nearest_class l2": nearest_class,
    "nearest_class linf": partial(nearest_class, norm="linf"),
    "nearest_class metric": partial(nearest_class, damping=1.0),
}
LINF = {"fgsm", "fgsm_iterated", "fhsm cg", "fhsm exact", "pgd linf", "damped_newton linf", "nearest_class linf"}


def gradient(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    with eval_mode(model):
        (g,) = torch.autograd.grad(F.cross_entropy(model(leaf), y, reduction="sum"), leaf)
    return g


def offset(x_adv: Tensor, x: Tensor) -> Tensor:
    return (x_adv.double() - x.double()).flatten(1)


def along(v: Tensor) -> Tensor:
    return F.normalize(v.flatten(1).double(), dim=1)


# -- against foolbox -----------------------------------------------------------------------------------------------

ORACLES: dict[str, tuple[Callable[..., Tensor], Callable[[], object], float]] = {
    "FGSM": (fgsm, foolbox.attacks.LinfFastGradientAttack, 1.0),
    "BIM": (
        partial(fgsm_iterated, steps=10),
        lambda: foolbox.attacks.LinfBasicIterativeAttack(rel_stepsize=0.1, steps=10),
        1.0,
    ),
    "L2": (l2_gradient, foolbox.attacks.L2FastGradientAttack, math.sqrt),  # type: ignore[dict-item]
}


@pytest.mark.parametrize("name", ["M1", "C1", "C3"])
@pytest.mark.parametrize("attack", ORACLES)
def test_the_gradient_attacks_are_those_of_foolbox(name: str, attack: str) -> None:
    model = build(name, width=0.1, seed=1).double().eval()
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(4, *INPUT_SHAPES[name], dtype=torch.float64, generator=generator)
    y = torch.randint(10, (4,), generator=generator)
    ours, theirs, factor = ORACLES[attack]
    oracle: foolbox.attacks.base.FixedEpsilonAttack = theirs()
    radius = 0.05 * (factor(x[0].numel()) if callable(factor) else factor)
    bounded = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
    expected = oracle.run(bounded, x, foolbox.criteria.Misclassification(y), epsilon=radius)
    expected = expected.raw if isinstance(expected, eagerpy.Tensor) else expected
    assert (ours(model, x, y, eps=0.05) - expected).abs().max() <= 1e-12
    assert not torch.equal(expected, x)


# -- identities ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["wide", "residual", "smooth", "others"])
def test_one_step_of_cg_is_the_gradient_attack(kind: str) -> None:
    model, (x, y) = network(kind), samples(8)
    assert torch.equal(fhsm(model, x, y, eps=0.1, cg_steps=1), fgsm(model, x, y, eps=0.1))
    found, expected = l2_hessian(model, x, y, eps=0.1, cg_steps=1), l2_gradient(model, x, y, eps=0.1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("kind", ["wide", "residual", "linear"])
def test_c_minus_1_steps_of_cg_are_the_pseudo_inverse(kind: str) -> None:
    """Rounding in CG is amplified by the condition number of H on its range, measured here, squared at the worst."""
    model, (x, y) = network(kind), samples(8)
    H = input_hessian(model, x, y)
    values = torch.linalg.eigvalsh(H)[:, -3:]
    condition = values[:, -1] / values[:, 0]
    expected = along(
        (torch.linalg.pinv(H, rtol=1e-11, hermitian=True) @ gradient(model, x, y).flatten(1)[:, :, None])[:, :, 0]
    )
    sound = condition < 1e5
    assert sound.sum() >= 4
    for found in (
        l2_hessian.record(model, x, y, eps=0.1, cg_steps=3, bounds=None),
        l2_hessian.record(model, x, y, eps=0.1, solver="exact", bounds=None),
    ):
        error = torch.linalg.vector_norm(along(offset(found.x_adv, x)) - expected, dim=1)
        assert (error[sound] <= 1e-15 * condition[sound] ** 2 + 1e-12).all()


def test_damped_cg_solves_the_damped_system() -> None:
    model, (x, y) = network("wide"), samples(8)
    H, g = input_hessian(model, x, y), gradient(model, x, y).flatten(1)
    damping = 0.01
    expected = along(torch.linalg.solve(H + damping * torch.eye(64, dtype=H.dtype), g))
    solvers: tuple[Solver, ...] = ("cg", "exact")
    for solver in solvers:
        found = l2_hessian.record(model, x, y, eps=0.1, solver=solver, cg_steps=10, damping=damping, bounds=None)
        torch.testing.assert_close(along(offset(found.x_adv, x)), expected, rtol=0, atol=1e-9)


def test_damped_cg_on_a_smooth_network_solves_the_damped_system() -> None:
    model, (x, y) = network("smooth"), samples(8)
    H, g = input_hessian(model, x, y), gradient(model, x, y).flatten(1)
    damping = 2 * float(-torch.linalg.eigvalsh(H).min()) + 0.1  # makes it positive definite
    expected = along(torch.linalg.solve(H + damping * torch.eye(64, dtype=H.dtype), g))
    found = l2_hessian(model, x, y, eps=0.1, damping=damping, bounds=None)
    torch.testing.assert_close(along(offset(found, x)), expected, rtol=0, atol=1e-9)


def test_the_newton_step_lowers_the_true_logit_against_all_others_alike() -> None:
    """J H^+ g = const - e_y / p_y: it does not see which class is near."""
    model, (x, y) = network("wide"), samples(8)
    s = input_hessian_solve(model, x, gradient(model, x, y))
    with eval_mode(model):
        logits, change = torch.func.jvp(model, (x,), (s,))  # type: ignore[misc]
    p = logits.softmax(1).gather(1, y[:, None])
    others = change.scatter(1, y[:, None], 0.0)
    const = others.sum(1, keepdim=True) / 3
    torch.testing.assert_close(others, const.expand(-1, 4).scatter(1, y[:, None], 0.0), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(change.gather(1, y[:, None]), const - 1 / p, rtol=1e-8, atol=1e-8)
    taken = l2_hessian(model, x, y, eps=0.1, solver="exact", bounds=None)
    torch.testing.assert_close(along(offset(taken, x)), along(s), rtol=0, atol=1e-9)


@pytest.mark.parametrize("solver", ["cg", "exact"])
def test_infinite_damping_is_the_gradient_attack(solver: Solver) -> None:
    model, (x, y) = network("wide"), samples(8)
    damped = partial(l2_hessian, model, x, y, eps=0.1, solver=solver, damping=1e12)
    torch.testing.assert_close(damped(), l2_gradient(model, x, y, eps=0.1), rtol=0, atol=1e-10)
    only = damped_newton(model, x, y, eps=0.1, dampings=(math.inf,))
    torch.testing.assert_close(only, l2_gradient(model, x, y, eps=0.1), rtol=0, atol=1e-13)


@pytest.mark.parametrize("kind", ["wide", "residual", "linear"])
@pytest.mark.parametrize("cg_steps", [1, 2, 3, 10])
def test_a_second_order_step_ascends(kind: str, cg_steps: int) -> None:
    model, (x, y) = network(kind), samples(23)
    g = gradient(model, x, y).flatten(1)
    for damping in (0.0, 0.1):
        solvers: tuple[Solver, ...] = ("cg", "exact")
        for solver in solvers:
            record = l2_hessian.record(
                model, x, y, eps=0.1, solver=solver, cg_steps=cg_steps, damping=damping, bounds=None
            )
            assert ((offset(record.x_adv, x) * g).sum(1) > 0).all()
            assert (record.cosine > 0).all()


# -- a linear model, whose nearest boundary points are known -------------------------------------------------------


def linear(classes: int = 4, d: int = 6) -> nn.Module:
    generator = torch.Generator().manual_seed(3)
    layer = nn.Linear(d, classes).double()
    with torch.no_grad():
        layer.weight.copy_(torch.randn(classes, d, dtype=torch.float64, generator=generator))
        layer.bias.copy_(torch.randn(classes, dtype=torch.float64, generator=generator))
    return nn.Sequential(nn.Flatten(), layer)


@pytest.mark.parametrize(("norm", "dual"), [("l2", 2), ("linf", 1)])
def test_nearest_class_reaches_the_boundary_of_a_linear_model_with_least_effort(norm: Norm, dual: int) -> None:
    model = linear()
    x = torch.rand(30, 1, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    s = model(x).detach()
    y = s.argmax(1)
    weight = model[1].weight.detach()  # type: ignore[index]
    distances = torch.full_like(s, math.inf)
    for other in range(4):
        w = torch.linalg.vector_norm(weight[other] - weight[y], ord=dual, dim=1)
        distances[:, other] = torch.where(y == other, math.inf, (s.gather(1, y[:, None])[:, 0] - s[:, other]) / w)
    least, j = distances.amin(1), distances.argmin(1)
    found = nearest_class(model, x, y, eps=least, norm=norm, scale="unit", bounds=None)
    reached = model(found).detach()
    torch.testing.assert_close(reached.gather(1, y[:, None]), reached.gather(1, j[:, None]), rtol=0, atol=1e-12)
    beyond = nearest_class(model, x, y, eps=1.001 * least, norm=norm, scale="unit", bounds=None)
    short = nearest_class(model, x, y, eps=0.999 * least, norm=norm, scale="unit", bounds=None)
    assert torch.equal(model(beyond).argmax(1), j)
    assert torch.equal(model(short).argmax(1), y)
    if norm == "l2":
        w = weight[j] - weight[y]
        point = x.flatten(1) + (least / torch.linalg.vector_norm(w, dim=1))[:, None] * w
        torch.testing.assert_close(found.flatten(1), point, rtol=0, atol=1e-12)


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_nearest_class_passes_over_a_class_that_no_step_leads_to(norm: Norm) -> None:
    model = nn.Linear(4, 3).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 0, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0]]))
        model.bias.copy_(torch.tensor([0.0, 0.1, 0.0]))  # the second logit is ahead of the first everywhere
    x, y = torch.tensor([[0.6, 0.4, 0.5, 0.5]], dtype=torch.float64), torch.tensor([0])
    moved = nearest_class(model, x, y, eps=0.01, norm=norm) - x
    assert moved[0, 0] < 0 < moved[0, 1], "towards the third"


def test_nearest_class_in_the_metric_of_the_curvature() -> None:
    model, (x, y) = network("wide"), samples(8)
    H = input_hessian(model, x, y)
    largest = torch.linalg.eigvalsh(H)[:, -1]
    M = H + largest[:, None, None] * torch.eye(64, dtype=H.dtype)
    with eval_mode(model):
        s = model(x).detach()
        J = torch.func.vmap(torch.func.jacrev(lambda z: model(z[None])[0]))(x).flatten(2).detach()
    w = J - J[torch.arange(8), y][:, None]
    steps = torch.linalg.solve(M, w.mT).mT
    margin = s.gather(1, y[:, None]) - s
    distance = (margin / (w * steps).sum(2).sqrt()).scatter(1, y[:, None], math.inf)
    expected = along(steps[torch.arange(8), distance.argmin(1)])
    found = nearest_class(model, x, y, eps=0.1, damping=1.0, bounds=None)
    torch.testing.assert_close(along(offset(found, x)), expected, rtol=0, atol=1e-9)


def test_damped_newton_takes_the_damping_of_largest_loss() -> None:
    model, (x, y) = network("wide"), samples(23)
    x_adv = damped_newton(model, x, y, eps=0.1)
    with eval_mode(model):
        loss = F.cross_entropy(model(x_adv), y, reduction="none")
        others = [
            F.cross_entropy(model(other(model, x, y, eps=0.1)), y, reduction="none")
            for other in (l2_gradient, partial(l2_hessian, solver="exact"))
        ]
    assert all((loss >= other - 1e-10).all() for other in others)
    assert any((loss > other + 1e-6).any() for other in others)


@pytest.mark.parametrize("multiple", [0.5, 10.0, -10.0, -1.1])
def test_damped_newton_solves_with_a_damping_of_either_sign(multiple: float) -> None:
    model, (x, y) = network("wide"), samples(8)
    H, g = input_hessian(model, x, y), gradient(model, x, y).flatten(1)
    largest = torch.linalg.eigvalsh(H)[:, -1]
    M = math.copysign(1.0, multiple) * (H + multiple * largest[:, None, None] * torch.eye(64, dtype=H.dtype))
    assert (torch.linalg.eigvalsh(M) > 0).all()
    found = damped_newton(model, x, y, eps=0.1, dampings=(multiple,), bounds=None)
    torch.testing.assert_close(along(offset(found, x)), along(torch.linalg.solve(M, g)), rtol=0, atol=1e-10)


def test_a_multiple_below_minus_1_maximises_the_quadratic_model_on_its_sphere() -> None:
    model, (x, y) = network("wide"), samples(1)
    H, g = input_hessian(model, x, y)[0], gradient(model, x, y).flatten()
    largest = torch.linalg.eigvalsh(H)[-1]
    length = torch.linalg.vector_norm(torch.linalg.solve(1.5 * largest * torch.eye(64, dtype=H.dtype) - H, g))
    unit = along(offset(damped_newton(model, x, y, eps=0.1, dampings=(-1.5,), bounds=None), x))[0]
    noise = torch.randn(1000, 64, dtype=H.dtype, generator=torch.Generator().manual_seed(0))
    best, others = length * unit, length * F.normalize(unit + 0.1 * noise, dim=1)
    assert (g @ best + best @ H @ best / 2 > others @ g + ((others @ H) * others).sum(1) / 2).all()


# -- samples go their own ways -------------------------------------------------------------------------------------


@pytest.mark.parametrize("attack", ALL)
@pytest.mark.parametrize("n", [1, 3, 8])
def test_neither_batch_nor_chunks_matter(attack: str, n: int) -> None:
    """Random starts are drawn per sample too, but are of the place in the batch: pgd has one start here."""
    run = ALL[attack]
    run = partial(run, restarts=1) if attack.startswith("pgd") else run
    model, (x, y) = network("wide"), samples(8)
    whole = run(model, x, y, eps=0.1)
    part = run(model, x[:n], y[:n], eps=0.1)
    chunked = run(model, x, y, eps=0.1, batch_size=n)
    flipped = run(model, x.flip(0), y.flip(0), eps=0.1).flip(0)
    assert part.shape == (n, 1, 8, 8)
    # A matrix product of another size rounds differently; CG and small eigenvalues amplify it.
    for found, expected in ((part, whole[:n]), (chunked, whole), (flipped, whole)):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)


def test_random_starts_do_not_depend_on_chunks() -> None:
    model, (x, y) = network("wide"), samples(8)
    run = partial(pgd, model, x, y, eps=0.1, steps=2, restarts=3)
    torch.testing.assert_close(run(batch_size=3), run(), rtol=0, atol=1e-9)
    again = run(generator=torch.Generator().manual_seed(0))
    assert torch.equal(again, run())
    # A longer search keeps what a shorter one found, or something worse.
    with eval_mode(model):
        losses = [wrongness(model(run(restarts=restarts)), y) for restarts in (1, 3)]
        wrong = [(model(run(restarts=restarts)).argmax(1) != y) for restarts in (1, 3)]
    assert (wrong[1] | ~wrong[0]).all()
    assert ((losses[1] >= losses[0] - 1e-9) | (wrong[1] & ~wrong[0])).all()


@pytest.mark.parametrize("d", [1, 2, 5])
def test_random_starts_are_uniform_in_the_ball(d: int) -> None:
    generator = torch.Generator().manual_seed(0)
    cube, ball = (unit_ball(4000, d, norm, generator) for norm in ("linf", "l2"))
    for coordinate in cube.T:
        assert scipy.stats.kstest(coordinate, scipy.stats.uniform(-1, 2).cdf).pvalue > 1e-3
    # The share of the volume within a radius is its d-th power.
    assert scipy.stats.kstest(torch.linalg.vector_norm(ball, dim=1) ** d, "uniform").pvalue > 1e-3
    assert ball.mean(0).abs().max() < 0.05


def test_of_two_ends_the_misclassified_one_is_kept_and_else_the_one_of_larger_loss() -> None:
    def ends(*logits: tuple[float, ...]) -> Perturbation:
        nothing = torch.zeros(len(logits), dtype=torch.float64)
        return Perturbation(torch.tensor(logits), *[nothing] * 6)

    # Of the first two pairs, the one that is right has the larger loss.
    one = ends((1.0, 0.9, 0.9), (0.0, 0.1, -9.0), (1.0, 0.0, 0.0), (0.0, 2.0, 0.0))
    other = ends((0.0, 0.1, -9.0), (1.0, 0.9, 0.9), (1.0, 0.5, 0.0), (0.0, 1.0, 0.0))
    found = loop._worse(lambda x: x, torch.zeros(4, dtype=torch.int64), one, other, torch.float32).x_adv
    assert torch.equal(found, torch.stack([other.x_adv[0], one.x_adv[1], other.x_adv[2], one.x_adv[3]]))


@pytest.mark.parametrize("attack", ALL)
def test_each_sample_has_its_own_eps(attack: str) -> None:
    model, (x, y) = network("wide"), samples(4)
    eps = torch.tensor([0.0, 0.05, 0.1, 0.1], dtype=torch.float64)
    run = partial(ALL[attack], model)
    found = run(x, y, eps=eps, bounds=None)
    assert torch.equal(found[0], x[0])
    if not attack.startswith("pgd"):
        for i in range(4):
            alone = run(x[i : i + 1], y[i : i + 1], eps=float(eps[i]), bounds=None)
            torch.testing.assert_close(found[i], alone[0], rtol=0, atol=1e-7)


@settings(max_examples=25, deadline=None)
@given(
    attack=st.sampled_from(sorted(ALL)),
    seed=st.integers(0, 1000),
    eps=st.floats(0, 1.5),
    clipped=st.booleans(),
    single=st.booleans(),
)
def test_no_attack_leaves_its_ball_or_the_bounds(
    attack: str, seed: int, eps: float, clipped: bool, single: bool
) -> None:
    dtype = torch.float32 if single else torch.float64
    model, (x, y) = network("wide").to(dtype), samples(5, seed)
    x = x.to(dtype)
    found = ALL[attack](model, x, y, eps=eps, bounds=(0.0, 1.0) if clipped else None)
    assert found.dtype == dtype
    assert found.shape == x.shape
    assert torch.isfinite(found).all()
    rounding = 4 * torch.finfo(dtype).eps * (1 + eps)
    change = offset(found, x)
    if attack in LINF:
        assert change.abs().max() <= eps + rounding
    else:
        assert torch.linalg.vector_norm(change, dim=1).max() <= 8 * eps + 8 * rounding  # of 64 pixels
    if clipped:
        assert found.min() >= 0
        assert found.max() <= 1


# -- the record ----------------------------------------------------------------------------------------------------


def test_the_record_says_what_happened() -> None:
    model, (x, y) = network("wide"), samples(8)
    record = l2_hessian.record(model, x, y, eps=0.1, cg_steps=2, scale="unit", bounds=None)
    assert torch.equal(record.x_adv, l2_hessian(model, x, y, eps=0.1, cg_steps=2, scale="unit", bounds=None))
    change, g = offset(record.x_adv, x), gradient(model, x, y).flatten(1)
    torch.testing.assert_close(record.l2, torch.full((8,), 0.1, dtype=torch.float64))
    torch.testing.assert_close(record.linf, change.abs().amax(1))
    torch.testing.assert_close(record.cosine, F.cosine_similarity(change, g))
    assert record.cg_steps.tolist() == [2] * 8
    assert record.zero_gradients.tolist() == [0] * 8
    # The residual of the best multiple of the direction is no larger than that of CG's own, and for CG they agree on
    # what two steps can do: |Hs - g| / |g| with s the step, whose length the residual's Galerkin condition fixes.
    H = input_hessian(model, x, y)
    hs = (H @ change[:, :, None])[:, :, 0]
    length = (g * change).sum(1) / (change * hs).sum(1)
    expected = torch.linalg.vector_norm(length[:, None] * hs - g, dim=1) / torch.linalg.vector_norm(g, dim=1)
    torch.testing.assert_close(record.residual, expected, rtol=1e-6, atol=1e-12)
    assert fgsm.record(model, x, y, eps=0.1).cosine.allclose(torch.ones(8, dtype=torch.float64))


def test_each_sample_stops_cg_at_the_forcing_term() -> None:
    model, (x, y) = network("wide"), samples(8)
    one = l2_hessian.record(model, x, y, eps=0.1, cg_steps=1).residual
    tol = float(one.sort().values[3:5].mean())
    record = l2_hessian.record(model, x, y, eps=0.1, cg_steps=10, tol=tol)
    assert torch.equal(record.cg_steps == 1, one <= tol)
    assert (record.residual <= tol).all()
    assert len(record.cg_steps.unique()) > 1


# -- zero gradients, breakdowns, confident samples -----------------------------------------------------------------


def dead() -> nn.Module:
    """Return a network that is constant where the pixels are small."""
    layer = nn.Linear(64, 3)
    with torch.no_grad():
        layer.weight.copy_(1.0 + 0.1 * torch.eye(3, 64))
        layer.bias.fill_(-10.0)
    return nn.Sequential(nn.Flatten(), layer, nn.ReLU(), nn.Linear(3, 4)).double()


@pytest.mark.parametrize("attack", ALL)
def test_samples_without_gradient_stay_and_are_counted(attack: str) -> None:
    model = dead()
    x, y = samples(4)
    x[::2] *= 0.01
    run = ALL[attack].func if isinstance(ALL[attack], partial) else ALL[attack]  # type: ignore[attr-defined]
    options = ALL[attack].keywords if isinstance(ALL[attack], partial) else {}  # type: ignore[attr-defined]
    assert isinstance(run, Attack)
    record = run.record(model, x, y, eps=0.05, **(options | ({"restarts": 1} if "restarts" in options else {})))
    assert torch.isfinite(record.x_adv).all()
    assert torch.equal(record.x_adv[::2], x[::2])
    assert (record.linf[1::2] > 0).all()
    assert record.zero_gradients.tolist() == [options.get("steps", 1) if i % 2 == 0 else 0 for i in range(4)]
    assert record.cosine[::2].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("attack", ALL)
@pytest.mark.parametrize("factor", [30.0, 1000.0])
def test_confident_samples_are_attacked(attack: str, factor: float) -> None:
    """Probabilities of 1e-300 and less: the gradient of the loss underflows, its direction does not."""
    model = network("wide")
    with torch.no_grad():
        model[-1].weight *= factor  # type: ignore[index]
    x, _ = samples(8)
    with eval_mode(model):
        y = model(x).argmax(1)
    found = ALL[attack](model, x, y, eps=0.1)
    assert torch.isfinite(found).all()
    assert (offset(found, x).abs().amax(1) > 0).all()


@pytest.mark.parametrize("factor", [1.0, 100.0, 1e5])
def test_inverse_is_exact_however_confident_the_network_is(factor: float) -> None:
    """J H^+ g is a constant but for the true class: logits of all others move alike, of whatever probability."""
    model = network("wide")
    with torch.no_grad():
        model[-1].weight *= factor  # type: ignore[index]
    x, y = samples(8)  # right and wrong ones
    with eval_mode(model):
        y[:4] = model(x[:4]).argmax(1)
    step = offset(l2_hessian(model, x, y, eps=1e-4, damping=0.0, solver="exact", bounds=None), x)
    with eval_mode(model):
        rows = [torch.func.jacrev(model)(one[None])[0].flatten(1) for one in x]
    moved = torch.stack([row @ one for row, one in zip(rows, step, strict=True)]).detach()
    others = torch.ones_like(moved, dtype=torch.bool).scatter(1, y[:, None], False)
    apart = [float(row[keep].max() - row[keep].min()) for row, keep in zip(moved, others, strict=True)]
    towards = [float(row[keep].mean() - row[~keep]) for row, keep in zip(moved, others, strict=True)]
    assert min(towards) > 0
    assert max(a / b for a, b in zip(apart, towards, strict=True)) < 1e-6


def test_restarts_stay_in_the_ball_on_networks_that_work_in_place() -> None:
    model = nn.Sequential(InPlace(), *network("wide"))  # type: ignore[misc]
    x, y = samples(4)
    for precision in ("float64", "own", "plain"):
        found = pgd(model, x, y, eps=0.1, steps=3, restarts=2, precision=precision)
        assert offset(found, x).abs().max() <= 0.1 + 1e-12
        assert 0 <= found.min() <= found.max() <= 1


def test_float32_gradients_do_not_underflow() -> None:
    model = network("wide").float()
    with torch.no_grad():
        model[-1].weight *= 1e5  # type: ignore[index]
    x, _ = samples(8)
    x = x.float()
    with eval_mode(model):
        y = model(x).argmax(1)
    assert (gradient(model, x, y).flatten(1).abs().amax(1) == 0).any()
    for precision in ("float64", "own"):
        record = fgsm.record(model, x, y, eps=0.1, precision=precision)
        assert record.zero_gradients.sum() == 0
        assert record.x_adv.dtype == torch.float32


def test_negative_curvature_ends_cg_with_what_it_has() -> None:
    model, (x, y) = network("smooth"), samples(23)
    H, g = input_hessian(model, x, y), gradient(model, x, y).flatten(1)
    convex = (g * (H @ g[:, :, None])[:, :, 0]).sum(1) > 0
    assert 0 < convex.sum() < 23
    record = l2_hessian.record(model, x, y, eps=0.1)
    assert torch.isfinite(record.x_adv).all()
    assert torch.equal(record.cg_steps > 0, convex)
    expected = l2_gradient(model, x, y, eps=0.1)
    torch.testing.assert_close(record.x_adv[~convex], expected[~convex], rtol=0, atol=1e-13)
    assert (record.cosine > 0).all()


# -- the model is left alone ---------------------------------------------------------------------------------------


class Fails(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.calls = network("wide"), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if len(x) == 7:  # in the middle of the attack, past all checks
            raise KeyError("no")
        return self.inner(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("attack", ALL)
def test_the_model_is_left_alone(attack: str, untouched: Untouched) -> None:
    model, (x, y) = network("wide"), samples(4)
    model[2].eval()  # type: ignore[index]
    next(model.parameters()).grad = torch.ones_like(next(model.parameters()))
    before = x.clone()
    with untouched(model):
        ALL[attack](model, x, y, eps=0.1)
    assert torch.equal(x, before)
    model, (x, y) = Fails(), samples(7)
    with untouched(model), pytest.raises((KeyError, RuntimeError)):
        ALL[attack](model, x, y, eps=0.1)


def test_batch_normalisation_is_that_of_eval_mode() -> None:
    model, (x, y) = network("wide"), samples(8)
    trained = [attack(model.train(), x, y, eps=0.1) for attack in ATTACKS.values()]
    evaluated = [attack(model.eval(), x, y, eps=0.1) for attack in ATTACKS.values()]
    assert all(map(torch.equal, trained, evaluated))


def test_attacks_under_no_grad_and_inference_mode() -> None:
    model, (x, y) = network("wide"), samples(4)
    expected = [attack(model, x, y, eps=0.1) for attack in ALL.values()]
    with torch.no_grad():
        assert all(map(torch.equal, expected, [attack(model, x, y, eps=0.1) for attack in ALL.values()]))
    with torch.inference_mode():
        assert all(map(torch.equal, expected, [attack(model, x, y, eps=0.1) for attack in ALL.values()]))
    assert not any(found.requires_grad for found in expected)


# -- bad input -----------------------------------------------------------------------------------------------------

BAD: dict[str, tuple[dict[str, object], str]] = {
    "negative eps": ({"eps": -0.1}, "eps = -0.1"),
    "NaN eps": ({"eps": math.nan}, "eps = nan"),
    "infinite eps": ({"eps": math.inf}, "eps = inf"),
    "eps of wrong shape": ({"eps": torch.zeros(3)}, r"shape \(3,\)"),
    "one bad eps": ({"eps": torch.tensor([0.1, -1.0, 0.1, 0.1])}, "eps = -1"),
    "reversed bounds": ({"bounds": (1.0, 0.0)}, "below the upper"),
    "bounds of channels": ({"bounds": (torch.zeros(3, 1, 1), torch.ones(3, 1, 1))}, "give two numbers"),
    "one bound": ({"bounds": 1.0}, "give two numbers"),
    "three bounds": ({"bounds": (0.0, 0.5, 1.0)}, "give two numbers"),
    "inputs outside": ({"bounds": (0.4, 0.6)}, "outside the bounds"),
    "no batch": ({"batch_size": 0}, "batch_size = 0"),
    "unknown precision": ({"precision": "half"}, "unknown precision 'half'"),
}


@pytest.mark.parametrize("attack", ALL)
@pytest.mark.parametrize("fault", BAD)
def test_bad_arguments_are_refused(attack: str, fault: str, untouched: Untouched) -> None:
    model, (x, y) = network("wide"), samples(4)
    options, message = BAD[fault]
    with untouched(model), pytest.raises(InputError, match=message):
        ALL[attack](model, x, y, **({"eps": 0.1} | options))


@pytest.mark.parametrize(
    ("run", "options", "message"),
    [
        (fgsm_iterated, {"steps": 0}, "steps = 0"),
        (fgsm_iterated, {"step_size": -1.0}, "step_size = -1"),
        (l2_gradient, {"scale": "d"}, "unknown scale"),
        (pgd, {"norm": "l1"}, "unknown norm"),
        (pgd, {"restarts": 0}, "restarts = 0"),
        (pgd, {"steps": 0}, "steps = 0"),
        (fhsm, {"solver": "newton"}, "unknown solver"),
        (fhsm, {"cg_steps": 0}, "cg_steps = 0"),
        (l2_hessian, {"damping": -1.0}, "damping = -1"),
        (l2_hessian, {"damping": math.nan}, "damping = nan"),
        (l2_hessian, {"tol": -1.0}, "tol = -1"),
        (damped_newton, {"dampings": ()}, "at least one"),
        (damped_newton, {"dampings": (-1.0,)}, "dampings"),
        (nearest_class, {"damping": 0.0}, "damping = 0"),
    ],
)
def test_bad_options_are_refused(run: Callable[..., Tensor], options: dict[str, object], message: str) -> None:
    model, (x, y) = network("wide"), samples(4)
    with pytest.raises(InputError, match=message):
        run(model, x, y, eps=0.1, **options)


@pytest.mark.parametrize(("mean", "deviation"), [(0.1307, 0.3081), (0.4914, 0.247), (0.406, 0.225)])
def test_bounds_of_inputs_that_were_normalised_in_float32_are_theirs(mean: float, deviation: float) -> None:
    model, (x, y) = network("wide").float(), samples(4)
    x = (x - x.amin()) / (x.amax() - x.amin())  # with pixels at both ends
    bounds = ((0 - mean) / deviation, (1 - mean) / deviation)
    found = fgsm(model, (x.float() - mean) / deviation, y, eps=0.1, bounds=bounds)
    assert bounds[0] - 1e-6 <= float(found.min()) <= float(found.max()) <= bounds[1] + 1e-6
    with pytest.raises(InputError, match="outside the bounds"):
        fgsm(model, (x.float() - mean) / deviation, y, eps=0.1, bounds=(bounds[0] + 1e-4, bounds[1]))


@pytest.mark.parametrize("attack", ALL)
def test_a_list_of_lengths_is_one_for_each_sample(attack: str) -> None:
    model, (x, y) = network("wide"), samples(4)
    sizes = [0.0, 0.05, 0.1, 0.2]
    assert torch.equal(
        ALL[attack](model, x, y, eps=sizes), ALL[attack](model, x, y, eps=torch.tensor(sizes, dtype=torch.float64))
    )


@pytest.mark.parametrize("attack", ["fhsm cg", "l2_hessian cg"])
@pytest.mark.parametrize("kind", ["wide", "smooth"])
def test_second_order_attacks_take_labels_made_under_inference_mode_and_of_any_integer_type(
    attack: str, kind: str
) -> None:
    model, (x, y) = network(kind), samples(4)
    expected = ALL[attack](model, x, y, eps=0.1)
    with torch.inference_mode():
        labels = y.clone()
    for other in (labels, y.to(torch.uint8), y.to(torch.int16)):
        assert torch.equal(ALL[attack](model, x, other, eps=0.1), expected)


@pytest.mark.parametrize("attack", ALL)
def test_bad_samples_are_refused(attack: str) -> None:
    model, (x, y) = network("wide"), samples(4)
    run = partial(ALL[attack], model, eps=0.1)
    with pytest.raises(InputError, match="labels from 0 to 4"):
        run(x, torch.tensor([0, 1, 2, 4]))
    with pytest.raises(InputError, match="labels from -1"):
        run(x, torch.tensor([0, 1, 2, -1]))
    with pytest.raises(InputError, match="outside the bounds"):
        run(x + 1, y)
    with pytest.raises(InputError, match="3 labels"):
        run(x, y[:3])
    with pytest.raises(InputError, match="no inputs"):
        run(x[:0], y[:0])
    with pytest.raises(InputError, match="NaN"):
        run(x / 0 * 0, y)


@pytest.mark.parametrize(
    "attack", [name for name in ALL if "exact" in name or name.split()[0] in ("damped_newton", "nearest_class")]
)
def test_the_closed_form_is_refused_for_smooth_networks_with_the_reason(attack: str, untouched: Untouched) -> None:
    model, (x, y) = network("smooth"), samples(4)
    with untouched(model), pytest.raises(InputError, match=r"piecewise linear.*smooth activations.*solver='cg'"):
        ALL[attack](model, x, y, eps=0.1)


def test_batch_statistics_in_eval_mode_are_refused() -> None:
    model = nn.Sequential(nn.BatchNorm2d(1, track_running_stats=False), nn.Flatten(), nn.Linear(64, 4)).double()
    x, y = samples(4)
    with pytest.raises(InputError, match="track_running_stats"):
        fgsm(model, x, y, eps=0.1)


@pytest.mark.parametrize("attack", ["fgsm", "l2_gradient", "l2_hessian cg", "pgd linf"])
def test_probabilities_instead_of_logits_are_warned_of(attack: str) -> None:
    x, y = samples(4)
    with pytest.warns(UserWarning, match="probabilities"):
        ALL[attack](nn.Sequential(network("wide"), nn.Softmax(1)), x, y, eps=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ALL[attack](network("wide"), x, y, eps=0.1)


# -- projected gradients, AutoAttack -------------------------------------------------------------------------------


def test_pgd_is_at_least_as_strong_as_one_step(digits: Splits, tiny_m1: nn.Module) -> None:
    x, y = digits.test.images[:20], digits.test.labels[:20]
    pairs = (
        (fgsm(tiny_m1, x, y, eps=0.05), pgd(tiny_m1, x, y, eps=0.05, steps=10)),
        (
            l2_gradient(tiny_m1, x, y, eps=0.05),
            pgd(tiny_m1, x, y, eps=0.05, norm="l2", scale="sqrt_dim", steps=10),
        ),
    )
    for pair in pairs:
        with eval_mode(tiny_m1):
            losses = [F.cross_entropy(tiny_m1(x_adv), y) for x_adv in pair]
        assert losses[1] > losses[0]


def test_steps_of_pgd_are_two_and_a_half_radii_together_unless_given() -> None:
    model, (x, y) = network("wide"), samples(4)
    run = partial(pgd, model, x, y, eps=0.1, steps=5)
    assert torch.equal(run(), run(step_size=0.05))
    assert not torch.equal(run(), run(step_size=0.04))


def boundaries(seed: int, bias: float = 0.0) -> tuple[nn.Module, Tensor, Tensor, Callable[[int], Tensor]]:
    """Return a linear float32 model of 5 classes, 12 images, its labels, and their distances to each other class.

    The distances (12, 5) are those of a norm whose dual has the given order, and infinite to the own class. The last
    class has much steeper logits: it is often the nearest without being the runner-up. No image meets the bounds
    [0, 1] within a radius of 0.3.
    """
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Linear(64, 5)
    with torch.no_grad():
        steep = torch.tensor([1.0, 1.0, 1.0, 1.0, 6.0])
        layer.weight.copy_(steep[:, None] * torch.randn(5, 64, generator=generator))
        layer.bias.copy_(torch.tensor([0.0, 0.0, 0.0, 0.0, bias]))
    model = nn.Sequential(nn.Flatten(), layer)
    x = 0.3 + 0.4 * torch.rand(12, 1, 8, 8, generator=generator)
    s = model(x).detach()
    y, weight = s.argmax(1), layer.weight.detach()

    def distances(dual: int) -> Tensor:
        gaps = s.gather(1, y[:, None]) - s
        slopes = torch.linalg.vector_norm(weight[y][:, None] - weight[None], ord=dual, dim=2)
        each: Tensor = gaps / slopes
        return each.scatter(1, y[:, None], math.inf)

    return model, x, y, distances


def is_fooled(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(x)
    return logits.argmax(1) != y


@pytest.mark.parametrize(("norm", "dual"), [("linf", 1), ("l2", 2)])
def test_autoattack_fools_those_who_are_nearer_to_the_boundary_than_eps_and_no_others(norm: Norm, dual: int) -> None:
    model, x, y, distances = boundaries(5)
    least = distances(dual).amin(1)
    ordered = least.sort().values
    i = 3 + int((ordered[4:9] / ordered[3:8]).argmax())  # between two samples that are well apart
    eps = float((ordered[i] * ordered[i + 1]).sqrt())
    found = autoattack(model, x, y, eps=eps, norm=norm, attacks=("apgd-ce", "apgd-t"))
    fooled = is_fooled(model, found, y)
    assert torch.equal(fooled, least < eps)
    assert torch.equal(found[~fooled], x[~fooled])
    sizes = torch.linalg.vector_norm(offset(found, x), ord=math.inf if norm == "linf" else 2, dim=1)
    assert (sizes[fooled] >= least[fooled]).all()
    assert sizes.max() <= eps * (1 + 1e-5)


def test_autoattack_aims_at_more_than_the_runner_up() -> None:
    model, x, y, distances = boundaries(47, bias=-4.0)
    each = distances(2)
    least, nearest = each.min(1)
    runner_up = model(x).scatter(1, y[:, None], -math.inf).argmax(1)
    further = each.gather(1, runner_up[:, None])[:, 0]
    worst = int((further / least).argmax())
    eps = float((least[worst] * further[worst]).sqrt())
    assert nearest[worst] != runner_up[worst]
    found = autoattack(model, x, y, eps=eps, norm="l2", attacks=("apgd-t",))
    assert torch.equal(is_fooled(model, found, y), least < eps)


def test_autoattack_is_another_with_another_seed_and_leaves_all_else_alone(untouched: Untouched) -> None:
    model, x, y, distances = boundaries(5)
    eps = float(2 * distances(1).amin(1).max())
    run = partial(autoattack, model, x, y, eps=eps, attacks=("apgd-ce",))
    trace = sys.gettrace()
    with untouched(model):
        found = run()
    assert sys.gettrace() is trace
    apart = torch.stack([x, x], dim=-1)[..., 0]  # no pixel beside the other in memory
    assert not apart.is_contiguous()
    with torch.random.fork_rng():
        torch.manual_seed(5)
        assert torch.equal(run(), found)
        assert torch.equal(autoattack(model, apart, y, eps=eps, attacks=("apgd-ce",)), found)
    assert not torch.equal(run(seed=1), found)


def test_autoattack_keeps_to_the_bounds_and_refuses_inputs_outside() -> None:
    model, x, y, _ = boundaries(5)
    found = autoattack(model, x, y, eps=0.9, attacks=("apgd-ce",))
    assert [float(found.amin()), float(found.amax())] == [0.0, 1.0]
    for outside in (x + 0.5, x - 0.5):
        with pytest.raises(InputError, match="outside the bounds"):
            autoattack(model, outside, y, eps=0.1)


def test_autoattack_without_its_package_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, digits: Splits, tiny_m1: nn.Module
) -> None:
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    with pytest.raises(InputError, match=r"pip install 'hessnb\[attacks\]'"):
        autoattack(tiny_m1, digits.test.images[:2], digits.test.labels[:2], eps=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps": -1.0}, "eps = -1"),
        ({"eps": torch.zeros(2)}, "one radius"),
        ({"norm": "l1"}, "unknown norm"),
        ({"attacks": ("pgd",)}, "unknown attack"),
        ({"batch_size": 0}, "batch_size = 0"),
        ({"attacks": ()}, "attacks is empty"),
    ],
)
def test_autoattack_refuses_bad_options(
    options: dict[str, object], message: str, digits: Splits, tiny_m1: nn.Module
) -> None:
    with pytest.raises(InputError, match=message):
        autoattack(tiny_m1, digits.test.images[:2], digits.test.labels[:2], **({"eps": 0.1} | options))  # type: ignore[arg-type]


def test_the_table_of_attacks_has_the_names_of_the_paper() -> None:
    assert list(ATTACKS) == ["FGSM", "FGSM-10", "L2GRAD", "FHSM", "L2HESS"]


# -- what float32 does to the gradient ------------------------------------------------------------------------------


class Confident(nn.Module):
    """Three logits of two pixels: a linear map, and a lead of the first, with which p_1 is 1 in float32."""

    def __init__(self, lead: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.25]]))
        self.lead = lead

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.weight.T + torch.tensor([self.lead, 0.0, 0.0], dtype=x.dtype)


def test_plain_precision_is_the_gradient_as_most_code_computes_it() -> None:
    model = build("M1", width=0.1, seed=0).eval()
    x = torch.rand(6, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    y = torch.arange(6)
    leaf = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(F.cross_entropy(model(leaf), y, reduction="sum"), leaf)
    found = fgsm(model, x, y, eps=0.1, bounds=None, precision="plain")
    assert ((found - (x + 0.1 * g.sign())).abs() <= 1e-7).all()


def test_rounding_hides_the_true_class_from_the_plain_gradient_of_a_confident_sample() -> None:
    x, y = torch.full((1, 1, 1, 2), 0.5), torch.zeros(1, dtype=torch.int64)
    model = Confident(20.0)
    exact = fgsm(model, x, y, eps=0.1) - x
    assert torch.equal(exact.sign().flatten(), torch.tensor([-1.0, 1.0]))
    assert torch.equal((fgsm(model, x, y, eps=0.1, precision="own") - x).sign(), exact.sign())
    plain = fgsm(model, x, y, eps=0.1, precision="plain") - x
    assert torch.equal(plain.sign().flatten(), torch.tensor([0.0, 1.0]))  # p_1 - 1 is zero: no way down the first logit
    less = fgsm(Confident(5.0), x, y, eps=0.1, precision="plain") - x
    assert torch.equal(less.sign(), exact.sign())


# -- layout and finiteness -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attack", ALL)
def test_the_strides_of_the_samples_are_of_no_account(attack: str) -> None:
    """Images of one channel that were once (N, H, W, C) are contiguous too, with a stride of 1 between channels."""
    model, (x, y) = network("wide"), samples(5)
    turned = torch.empty(5, 8, 8, 1, dtype=x.dtype).copy_(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    assert turned.stride() == (64, 1, 8, 1)
    assert turned.is_contiguous()
    torch.testing.assert_close(
        ALL[attack](model, turned, y, eps=0.1), ALL[attack](model, x, y, eps=0.1), rtol=0, atol=1e-9
    )
    leaf, _ = differentiable(model, turned)
    assert leaf.stride() == (64, 64, 8, 1)
    leaf, _ = differentiable(model.float(), turned.float())
    assert leaf.stride() == (64, 1, 8, 1)


class Rooted(nn.Module):
    """A network with the absolute value as a square root, which has no derivative at 0."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.model((x * x).sqrt())
        return result


@pytest.mark.parametrize("attack", ALL)
def test_gradients_that_are_not_finite_are_refused(attack: str) -> None:
    x, y = samples()
    model = Rooted(network("relu"))
    x = x.abs().clamp(0.3, 0.7)
    ALL[attack](model, x, y, eps=0.01)
    x[3].view(-1)[5] = 0.0
    with pytest.raises(InputError, match="not finite for some samples.*look for"):
        ALL[attack](model, x, y, eps=0.1)
    with pytest.raises(InputError, match="gradient in the input is not finite"):
        input_gradient_norms(model, x, y)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_entry_that_is_not_finite_is_seen_wherever_it_is(value: float, dtype: torch.dtype) -> None:
    x = torch.zeros(3, 5, dtype=dtype)
    assert finite(x)
    for i in (0, 7, 14):
        assert not finite(torch.where(torch.arange(15).view(3, 5) == i, value, x))
    assert finite(x[:0])
    assert finite(x.long())


@pytest.mark.parametrize("attack", [fgsm, l2_gradient, pgd])
def test_a_network_that_hides_its_input_from_autograd_is_refused(
    attack: Callable[..., Tensor], digits: Splits, tiny_m1: nn.Module
) -> None:
    class Rounds(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.round().detach()

    model = nn.Sequential(Rounds(), tiny_m1).requires_grad_(False)
    with pytest.raises(InputError, match="outputs cannot be differentiated: look for detach"):
        attack(model, digits.test.images[:2], digits.test.labels[:2], eps=0.1)
