"""Attacks with the input Hessian: FHSM and L2HESS of the paper's Table 5, and two that section 3.4 leaves open.

g = J^T (p - e_y) lies in the range of H, and J H^+ g = const - e_y / p_y: the Newton step lowers the true logit
against all other classes alike and does not see which one is near. `damped_newton` chooses for each sample how much
of the curvature to heed, and of which sign; `nearest_class` asks the same Jacobian for the way to one class.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Literal

from torch import Tensor, nn

from hessnb.attacks import checks
from hessnb.attacks.ball import Bounds, Norm
from hessnb.attacks.directions import best_damping, conjugate_gradients, nearest, newton
from hessnb.attacks.loop import Attack, Direction, Perturbation, Precision, Scale, perturb
from hessnb.errors import InputError, not_negative, real_number, whole_number

Solver = Literal["cg", "exact"]

# From the Newton step through the gradient to the step that follows the steepest curvature.
DAMPINGS = (0.0, 0.01, 0.1, 1.0, 10.0, math.inf, -10.0, -2.0, -1.1, -1.01)


@Attack
def fhsm(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float | Tensor,
    solver: Solver = "cg",
    cg_steps: int = 10,
    damping: float = 0.0,
    tol: float = 0.0,
    bounds: Bounds = (0.0, 1.0),
    precision: Precision = "float64",
    batch_size: int | None = None,
) -> Perturbation:
    """Step by eps sign(s), (H + damping I) s = g: FHSM of Table 5. Linf radius eps. The solvers are `l2_hessian`'s."""
    return perturb(
        model, x, y, _solved(solver, cg_steps, damping, tol), eps=eps, norm="linf", bounds=bounds,
        precision=precision, batch_size=batch_size, curvature="closed_form" if solver == "exact" else "products",
    )  # fmt: skip


@Attack
def l2_hessian(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float | Tensor,
    scale: Scale = "sqrt_dim",
    solver: Solver = "cg",
    cg_steps: int = 10,
    damping: float = 0.0,
    tol: float = 0.0,
    bounds: Bounds = (0.0, 1.0),
    precision: Precision = "float64",
    batch_size: int | None = None,
) -> Perturbation:
    """Step along s / |s|, (H + damping I) s = g: L2HESS of Table 5. L2 radius eps sqrt(d), with ``scale="unit"`` eps.

    ``solver="cg"``, as section 3.4 has it, takes at most ``cg_steps`` conjugate gradients from zero (one step gives
    the gradient), fewer where a residual of ``tol`` |g| is reached first, on any network. "exact" solves in closed
    form, with the pseudo-inverse for damping 0, on piecewise linear networks; others are an InputError, as are a
    damping or a tol that is negative or not finite.
    """
    return perturb(
        model, x, y, _solved(solver, cg_steps, damping, tol), eps=eps, norm="l2", scale=scale, bounds=bounds,
        precision=precision, batch_size=batch_size, curvature="closed_form" if solver == "exact" else "products",
    )  # fmt: skip


@Attack
def damped_newton(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float | Tensor,
    norm: Norm = "l2",
    scale: Scale = "sqrt_dim",
    dampings: tuple[float, ...] = DAMPINGS,
    bounds: Bounds = (0.0, 1.0),
    precision: Precision = "float64",
    batch_size: int | None = None,
) -> Perturbation:
    """Step along (H + gamma I)^-1 g with the gamma, of a grid, that gives a sample the largest loss (section 3.4).

    ``dampings`` are multiples of each sample's largest eigenvalue: 0 is the pseudo-inverse, infinity the gradient. The
    loss is convex where the logits are linear, so Newton's step seeks its minimum; its maximum on a sphere lies along
    (nu I - H)^-1 g with nu above all eigenvalues (Conn et al., Trust-Region Methods, 2000, section 7.2), and a multiple
    below -1 stands for this nu. All follow from one closed form and cost a forward pass each. For "l2" the radius is
    that of `l2_hessian`, for "linf" that of `fhsm`. For piecewise linear networks; others are an InputError.
    """
    if not isinstance(dampings, Sequence):
        raise InputError(f"dampings = {dampings}: give a tuple of numbers, also for a single one")
    numbers = [real_number("dampings", gamma) for gamma in dampings]
    if not numbers or not all(gamma >= 0 or -math.inf < gamma < -1 for gamma in numbers):
        raise InputError(f"dampings = {dampings}: give at least one, each 0, positive, infinite, or below -1")
    return perturb(
        model, x, y, partial(best_damping, dampings=dampings), eps=eps, norm=norm,
        scale=scale if norm == "l2" else "unit", bounds=bounds, precision=precision, batch_size=batch_size,
        curvature="closed_form",
    )  # fmt: skip


@Attack
def nearest_class(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float | Tensor,
    norm: Norm = "l2",
    scale: Scale = "sqrt_dim",
    damping: float = math.inf,
    bounds: Bounds = (0.0, 1.0),
    precision: Precision = "float64",
    batch_size: int | None = None,
) -> Perturbation:
    """Step towards the class j whose boundary is the nearest for linear logits (section 3.4; DeepFool's first step,
    Moosavi-Dezfooli et al., 2016): along w = grad s_j - grad s_y, with j of least (s_y - s_j) / |w| in the dual norm.

    With a finite ``damping``, a multiple of each sample's largest eigenvalue, along (H + damping I)^-1 w, with j the
    nearest in that metric. Radius and errors are those of `damped_newton`.
    """
    if not real_number("damping", damping) > 0:
        raise InputError(f"damping = {damping}: it must be positive; infinity is the Euclidean distance")
    return perturb(
        model, x, y, partial(nearest, norm=norm, damping=damping), eps=eps, norm=norm,
        scale=scale if norm == "l2" else "unit", bounds=bounds, precision=precision, batch_size=batch_size,
        curvature="closed_form",
    )  # fmt: skip


def _solved(solver: Solver, cg_steps: int, damping: float, tol: float) -> Direction:
    not_negative("damping", damping)
    checks.among("solver", solver, ["cg", "exact"])
    if solver == "cg":
        steps = whole_number("cg_steps", cg_steps)
        return partial(conjugate_gradients, steps=steps, damping=damping, tol=not_negative("tol", tol))
    return partial(newton, damping=damping)
