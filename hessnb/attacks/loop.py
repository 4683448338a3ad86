"""The loop that all attacks share: find a direction, step, project on the eps-ball, clip. They differ in the direction.

What a direction is found from is a `Position`: the network, where its samples stand, and where a step would end.
Reference: J. Rauber, W. Brendel, M. Bethge, Foolbox (2017), whose gradient attacks are one loop in the same way.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial, update_wrapper
from typing import Generic, Literal, ParamSpec

import torch
from torch import Tensor, nn

from hessnb.attacks import checks
from hessnb.attacks.ball import Ball, Bounds, Norm, normalised, unit_ball
from hessnb.checks import check_samples, finite_gradients
from hessnb.curvature.closed_form import require_piecewise_linear
from hessnb.curvature.evaluation import cheapened, in_float64
from hessnb.errors import whole_number
from hessnb.models import evaluation

Precision = Literal["float64", "own", "plain"]
Scale = Literal["sqrt_dim", "unit"]
Curvature = Literal["closed_form", "products"]
Forward = Callable[[Tensor], Tensor]
P = ParamSpec("P")


@dataclass(frozen=True)
class Perturbation:
    """What an attack did to each of N samples; every field but the first has shape (N,).

    ``x_adv`` (N, ...) are the perturbed samples, in the dtype of x, ``linf`` and ``l2`` the norms of x_adv - x in
    pixels. ``zero_gradients`` counts the steps at which the gradient was exactly zero and had no direction. Of the
    last step are ``cosine``, of direction and gradient (0 where one is zero), ``cg_steps``, products with the Hessian
    that were used, and ``residual``, |(H + damping I) s - g| / |g| as the iteration carries it along (both 0 where
    nothing was iterated).
    """

    x_adv: Tensor
    linf: Tensor
    l2: Tensor
    zero_gradients: Tensor
    cosine: Tensor
    cg_steps: Tensor
    residual: Tensor


class Attack(Generic[P]):
    """An attack: called, it returns the perturbed samples; ``record``, with the same arguments, a `Perturbation`."""

    def __init__(self, record: Callable[P, Perturbation]) -> None:
        self.record = record
        update_wrapper(self, record)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Tensor:
        """Return the perturbed samples (N, ...), in the dtype of x."""
        return self.record(*args, **kwargs).x_adv


@dataclass(frozen=True)
class Position:
    """Samples ``x`` (n, ...) with labels ``y`` (n,) on their way, the network ``forward`` in their precision, and
    ``move``, which tells where a step along directions (n, d) ends, projected and clipped. ``plain``: the gradient is
    taken of the loss as it stands, with its rounding.
    """

    forward: Forward
    x: Tensor
    y: Tensor
    move: Callable[[Tensor], Tensor]
    plain: bool = False


@dataclass(frozen=True)
class Step:
    """Directions ``along`` and gradients ``gradient`` (n, d) of any length, and per sample what CG did to find them."""

    along: Tensor
    gradient: Tensor
    cg_steps: Tensor | None = None
    residual: Tensor | None = None


Direction = Callable[[Position], Step]


def perturb(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    direction: Direction,
    *,
    eps: float | Tensor,
    norm: Norm,
    scale: Scale = "unit",
    bounds: Bounds,
    precision: Precision,
    batch_size: int | None,
    steps: int = 1,
    step_size: float | Tensor | None = None,
    restarts: int = 1,
    generator: torch.Generator | None = None,
    curvature: Curvature | None = None,
) -> Perturbation:
    """Attack ``x`` (N, ...) with labels ``y`` (N,) within ``eps`` in the ``norm``, times sqrt(d) for "sqrt_dim".

    ``step_size`` is in the units of eps, eps / steps unless given. The first start is x itself, the ``restarts`` - 1
    others are drawn from the ball; of each sample the worst end is kept, that is a misclassified one if there is one,
    and the one of largest loss among these. ``curvature``: what the direction needs of the input Hessians, their closed
    form, which piecewise linear networks have, or products with them. For the rest, and the errors, see
    `hessnb.attacks`.
    """
    check_samples(model, x, y, probes=2)  # one gradient of a small batch costs little more than many probes
    radius = checks.per_sample("eps", eps, x)
    length = radius / whole_number("steps", steps)
    length = length if step_size is None else checks.per_sample("step_size", step_size, x)
    whole_number("restarts", restarts)
    checks.inside(bounds, x)
    checks.among("norm", norm, ["linf", "l2"])
    checks.among("scale", scale, ["sqrt_dim", "unit"])
    checks.among("precision", precision, ["float64", "own", "plain"])
    if batch_size is None:  # chunks that stay in the processor's cache, or keep a GPU busy
        batch_size = 50 if x.device.type == "cpu" else 1000
    unit = math.sqrt(x[0].numel()) if scale == "sqrt_dim" else 1.0
    generator = generator or torch.Generator().manual_seed(0)
    whole_number("batch_size", batch_size)
    if curvature == "closed_form":
        require_piecewise_linear(model, x, remedy="solver='cg', as fhsm and l2_hessian have it")
    kept: list[Perturbation] = []
    with evaluation(model):
        with torch.no_grad():
            checks.warn_of_probabilities(model(x[:2].clone()))
        forward, dtype = in_float64(model, x) if precision == "float64" else (model, x.dtype)
        if curvature == "products" or (dtype == torch.float64 and x.device.type == "cpu"):
            forward = cheapened(forward, x[:2].to(dtype), 2 if curvature == "products" else 1)
        columns = [t.split(batch_size) for t in (x.detach(), y.long(), unit * radius, unit * length)]
        for restart in range(restarts):
            # For all samples at once, so that chunks are of no account.
            noise = unit_ball(len(x), x[0].numel(), norm, generator).split(batch_size) if restart else None
            for i, (given, labels, r, h) in enumerate(zip(*columns, strict=True)):
                ball = Ball(given.to(dtype), r.to(dtype), norm, bounds)
                start = ball.inside(noise[i]) if noise else ball.centre
                found = _walk(forward, labels, direction, ball, h.to(dtype), steps, given, start, precision == "plain")
                if restart:
                    kept[i] = _worse(forward, labels, kept[i], found, dtype)
                else:
                    kept.append(found)
    return _map(lambda *values: torch.cat(values), *kept)


def wrongness(logits: Tensor, y: Tensor) -> Tensor:
    """Return log((1 - p_y) / p_y) (n,), which grows with the cross-entropy and tells confident samples apart."""
    others = logits.scatter(1, y[:, None], -torch.inf)
    return torch.logsumexp(others, 1) - logits.gather(1, y[:, None])[:, 0]


def _walk(
    forward: Forward,
    y: Tensor,
    direction: Direction,
    ball: Ball,
    length: Tensor,
    steps: int,
    given: Tensor,
    x: Tensor,
    plain: bool,
) -> Perturbation:
    """Take all steps from x (n, ...), which lies in the ball, and record them."""
    zeros = given.new_zeros(len(given), dtype=torch.float64)
    zero_gradients = zeros.long()
    for _ in range(steps):
        step = direction(Position(forward, x, y, partial(ball.step, x, length=length), plain))
        gradient, along = step.gradient, step.along
        finite_gradients(gradient)
        some = gradient.any(1)
        if along is not gradient:  # a direction that overflowed is none
            largest = torch.linalg.vector_norm(along, ord=math.inf, dim=1, keepdim=True)
            along = torch.where(torch.isfinite(largest), along, gradient)
        zero_gradients += ~some
        x = ball.step(x, along, length)
    x_adv = x.to(given.dtype)  # rounding is monotone: what was clipped stays within the bounds of this dtype
    change = (x_adv.double() - ball.centre).flatten(1)
    return Perturbation(
        x_adv=x_adv,
        linf=torch.linalg.vector_norm(change, ord=math.inf, dim=1),
        l2=torch.linalg.vector_norm(change, dim=1),
        zero_gradients=zero_gradients,
        cosine=some.double() if along is gradient else _cosine(along, gradient),
        cg_steps=zeros.long() if step.cg_steps is None else step.cg_steps,
        residual=zeros if step.residual is None else step.residual.double(),
    )


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    return (normalised(a.double()) * normalised(b.double())).sum(1)


def _worse(forward: Forward, y: Tensor, a: Perturbation, b: Perturbation, dtype: torch.dtype) -> Perturbation:
    """Return of each sample the worse for the network of two perturbations."""
    with torch.no_grad():
        logits = [forward(p.x_adv.to(dtype, copy=True)) for p in (a, b)]  # a network may work in place
    wrong = [s.argmax(1) != y for s in logits]
    more = wrongness(logits[1], y) > wrongness(logits[0], y)
    second = torch.where(wrong[0] == wrong[1], more, wrong[1])
    return _map(lambda p, q: torch.where(second.view(-1, *[1] * (p.ndim - 1)), q, p), a, b)


def _map(function: Callable[..., Tensor], *records: Perturbation) -> Perturbation:
    return Perturbation(*(function(*(getattr(r, f.name) for r in records)) for f in fields(Perturbation)))
