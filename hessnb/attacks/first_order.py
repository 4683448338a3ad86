"""Attacks along the gradient: FGSM, FGSM-10 and L2GRAD of the paper's Table 5, and PGD with restarts."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hessnb.attacks import checks
from hessnb.attacks.ball import Bounds, Norm
from hessnb.attacks.directions import gradient
from hessnb.attacks.loop import Attack, Perturbation, Precision, Scale, perturb
from hessnb.errors import whole_number


@Attack
def fgsm(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float | Tensor,
    bounds: Bounds = (0.0, 1.0),
    precision: Precision = "float64",
    batch_size: int | None = None,
) -> Perturbation:
    """Step by eps sign(g): FGSM of Table 5, equation 2.2 (Goodfellow et al., 2015). Linf radius eps, pixel values."""
    return perturb(
        model, x, y, gradient, eps=eps, norm="linf", bounds=bounds, precision=precision, batch_size=batch_size
    )


@Attack
def fgsm_iterated(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float | Tensor,
    steps: int = 10,
    step_size: float | Tensor | None = None,
    bounds: Bounds = (0.0, 1.0),
    precision: Precision = "float64",
    batch_size: int | None = None,
) -> Perturbation:
    """Step ``steps`` times by ``step_size`` sign(g) within the Linf ball of radius eps: FGSM-10 of Table 5, the basic
    iterative method of Kurakin et al. (2017). ``step_size`` in pixel values, one or (N,), is eps / steps unless given.
    """
    return perturb(
        model, x, y, gradient, eps=eps, norm="linf", bounds=bounds, precision=precision, batch_size=batch_size,
        steps=steps, step_size=step_size,
    )  # fmt: skip


@Attack
def l2_gradient(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float | Tensor,
    scale: Scale = "sqrt_dim",
    bounds: Bounds = (0.0, 1.0),
    precision: Precision = "float64",
    batch_size: int | None = None,
) -> Perturbation:
    """Step along g / |g|: L2GRAD of Table 5. The L2 radius is eps sqrt(d), with ``scale="unit"`` eps."""
    return perturb(
        model, x, y, gradient, eps=eps, norm="l2", scale=scale, bounds=bounds, precision=precision,
        batch_size=batch_size,
    )  # fmt: skip


@Attack
def pgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float | Tensor,
    norm: Norm = "linf",
    scale: Scale = "sqrt_dim",
    steps: int = 40,
    step_size: float | Tensor | None = None,
    restarts: int = 1,
    generator: torch.Generator | None = None,
    bounds: Bounds = (0.0, 1.0),
    precision: Precision = "float64",
    batch_size: int | None = None,
) -> Perturbation:
    """Projected gradient ascent in the ball of the ``norm`` ("linf" or "l2"), the worst of ``restarts`` kept for each
    sample (Madry et al., 2018): a misclassified end before others, then the one of largest loss. The L2 radius is eps
    sqrt(d), with ``scale="unit"`` eps.

    The first start is x, the others are drawn from the ball with ``generator`` (of the CPU; seed 0 unless given), for
    all samples before the first step. ``step_size``, in the units of eps, is 2.5 eps / steps unless given.
    """
    whole_number("steps", steps)
    if step_size is None:
        step_size = 2.5 / steps * checks.per_sample("eps", eps, x)
    return perturb(
        model, x, y, gradient, eps=eps, norm=norm, scale=scale if norm == "l2" else "unit", bounds=bounds,
        precision=precision, batch_size=batch_size, steps=steps, step_size=step_size, restarts=restarts,
        generator=generator,
    )  # fmt: skip
