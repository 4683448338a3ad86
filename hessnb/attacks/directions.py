"""The directions in which the attacks step: the gradient, and the gradient preconditioned by the input Hessian.

Gradients are taken of p - e_y scaled to length one, with p_y - 1 as minus the sum of the others: neither cancels nor
underflows for a confident sample; a `Position` that is plain leaves the gradient as rounding makes it. Directions have
no length, so their scale is of no account.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from hessnb.attacks.ball import Norm, normalised
from hessnb.attacks.loop import Position, Step, wrongness
from hessnb.curvature.closed_form import ClosedForm, closed_form
from hessnb.curvature.evaluation import differentiable
from hessnb.curvature.input_lanczos import input_products

_EPS = torch.finfo(torch.float64).eps


def gradient(position: Position) -> Step:
    """The gradient g of the loss (Goodfellow et al., 2015; the paper's equation 2.2)."""
    g = _gradient(position, *differentiable(position.forward, position.x))
    return Step(along=g, gradient=g)


def conjugate_gradients(position: Position, *, steps: int, damping: float, tol: float) -> Step:
    """(H + damping I)^-1 g by at most ``steps`` steps of conjugate gradients from zero, all samples side by side.

    A sample stops at a residual of ``tol`` |g|, the forcing term of an inexact Newton method (Dembo et al., 1982), or
    of rounding, since H is singular and noise would be solved for; and where the curvature along the next search
    direction is negative or rounding: with what it has, at the first step the gradient (as Steihaug, 1983).
    """
    leaf, logits = differentiable(position.forward, position.x)
    g = _gradient(position, leaf, logits, retain_graph=True)
    product = input_products(leaf, logits, position.y)
    r = p = normalised(g.double())
    s = torch.zeros_like(r)
    left = _dot(r, r)
    active, used = left > 0, torch.zeros_like(left, dtype=torch.int64)
    largest = torch.zeros_like(left)
    rounding = g.shape[1] * _EPS
    for _ in range(steps):
        hp = product(p) + damping * p
        # Rayleigh's quotient, by the unit direction: an underflow would pass for no curvature.
        length = _dot(p, p)
        quotient = _dot(p, hp) / length.clamp_min(torch.finfo(torch.float64).tiny)
        largest = torch.maximum(largest, quotient)
        alpha = left / (quotient * length)
        broken = ~((quotient > rounding * largest) & torch.isfinite(alpha))
        s = torch.where((active & broken & (used == 0))[:, None], r, s)
        active = active & ~broken
        alpha = torch.where(active, alpha, 0.0)[:, None]
        s, r = s + alpha * p, r - alpha * torch.where(active[:, None], hp, 0.0)
        used += active
        before, left = left, _dot(r, r)
        active = active & (left > max(tol, rounding) ** 2)
        p = torch.where(active[:, None], r + (left / before.clamp_min(torch.finfo(torch.float64).tiny))[:, None] * p, p)
        if not bool(active.any()):
            break
    return Step(along=s.to(g.dtype), gradient=g, cg_steps=used, residual=left.sqrt())


def newton(position: Position, *, damping: float) -> Step:
    """(H + damping I)^-1 g in closed form; for damping 0, H^+ g. For piecewise linear networks."""
    form, slope, _ = _factorised(position)
    w = _of_rows(form, slope)
    g = form.combined(w)
    solved = _pseudo_inverse(form, w, position.y) if damping == 0 else form.damped_inverse(g.double(), damping)
    return Step(along=solved.to(g.dtype), gradient=g)


def best_damping(position: Position, *, dampings: tuple[float, ...]) -> Step:
    """Of (H + gamma I)^-1 g, with gamma these multiples of each sample's largest eigenvalue, that of largest loss.

    Below -1 it is -(H + gamma I)^-1 g, which ascends too.
    """
    form, slope, _ = _factorised(position)
    w = _of_rows(form, slope)
    g = form.combined(w)
    largest = torch.linalg.eigvalsh(form.small)[:, -1]
    found, most = g, torch.full_like(largest, -math.inf)
    for multiple in dampings:
        along = g
        if math.isfinite(multiple):
            gamma = torch.where(largest > 0, multiple * largest, 1.0)
            along = form.damped_inverse(g.double(), gamma) if multiple else _pseudo_inverse(form, w, position.y)
            # Where nothing is curved, the gradient is all that there is.
            along = torch.where((largest > 0)[:, None], math.copysign(1.0, multiple) * along.to(g.dtype), g)
            along = torch.where(torch.isfinite(along).all(1, keepdim=True), along, g)
        with torch.no_grad():
            loss = wrongness(position.forward(position.move(along)), position.y)
        better = loss > most
        found, most = torch.where(better[:, None], along, found), torch.where(better, loss, most)
    return Step(along=found, gradient=g)


def nearest(position: Position, *, norm: Norm, damping: float) -> Step:
    """Towards the class whose boundary is the nearest if the logits were linear, as a distance or by H + gamma I.

    The way to class j is w_j = grad s_j - grad s_y, its boundary lies (s_y - s_j) / |w_j| away, in the dual norm
    (Moosavi-Dezfooli et al., 2016). With a finite ``damping``, gamma is this multiple of each sample's largest
    eigenvalue, the way (H + gamma I)^-1 w_j, and the distance that of the metric H + gamma I.
    """
    form, slope, logits = _factorised(position)
    g = form.combined(_of_rows(form, slope))
    n, c = logits.shape
    s = logits.double()
    largest = torch.linalg.eigvalsh(form.small)[:, -1]
    found, least = g, torch.full((n,), math.inf, dtype=torch.float64, device=g.device)
    for shift in range(1, c):
        j = (position.y + shift) % c
        choice = torch.zeros_like(s).scatter_(1, j[:, None], 1.0).scatter_(1, position.y[:, None], -1.0)
        w = form.combined(_of_rows(form, choice))
        along = w
        if math.isfinite(damping):
            along = form.damped_inverse(w.double(), torch.where(largest > 0, damping * largest, 1.0)).to(w.dtype)
            size = (w * along).sum(1).clamp_min(0).sqrt()
        else:
            size = torch.linalg.vector_norm(w, ord=1 if norm == "linf" else 2, dim=1)
        distance = (s.gather(1, position.y[:, None]) - s.gather(1, j[:, None]))[:, 0] / size.double()
        nearer = (size > 0) & (distance < least)
        found, least = torch.where(nearer[:, None], along, found), torch.where(nearer, distance, least)
    return Step(along=found, gradient=g)


def _gradient(position: Position, leaf: Tensor, logits: Tensor, *, retain_graph: bool = False) -> Tensor:
    """Return the gradient (n, d) of the loss by the samples, of any length, from the graph of their logits (n, c)."""
    slope = (_plain_slope if position.plain else _slope)(logits, position.y).to(logits.dtype)
    (g,) = torch.autograd.grad(logits, leaf, slope, retain_graph=retain_graph, materialize_grads=True)
    return g.flatten(1)


def _slope(logits: Tensor, y: Tensor) -> Tensor:
    """Return the gradient p - e_y (n, c) of the loss by the logits, float64, scaled to length one."""
    others = logits.detach().double().scatter(1, y[:, None], -torch.inf).softmax(1)
    # p without p_y is (1 - p_y) times the softmax of the others, and p_y - 1 minus their sum.
    return normalised(others.scatter(1, y[:, None], -1.0))


def _plain_slope(logits: Tensor, y: Tensor) -> Tensor:
    """Return p - e_y (n, c) as PyTorch computes it: p_y - 1 is zero where p_y rounds to one."""
    leaf = logits.detach().requires_grad_()
    (slope,) = torch.autograd.grad(F.cross_entropy(leaf, y, reduction="sum"), leaf)
    return slope


def _factorised(position: Position) -> tuple[ClosedForm, Tensor, Tensor]:
    leaf, logits = differentiable(position.forward, position.x)
    return closed_form(leaf, logits), _slope(logits, position.y), logits.detach()


def _of_rows(form: ClosedForm, weights: Tensor) -> Tensor:
    """Return weights (n, c) of the logits that add up to zero as those of the rows: the reference class drops out."""
    return weights.gather(1, form.classes)


def _pseudo_inverse(form: ClosedForm, weights: Tensor, y: Tensor) -> Tensor:
    """Return the direction of H^+ g (n, d) for the gradient g = K^T w of cross-entropy; zero where g is.

    J H^+ g is a constant less e_y / p_y whatever the other probabilities are, which are lost to rounding where the
    network is sure of a class.
    """
    true = form.classes == y[:, None]
    step = torch.where(true.any(1, keepdim=True), -true.double(), 1.0) * weights.any(1, keepdim=True)
    return form.pseudo_inverse(_along(form, weights), step)


def _along(form: ClosedForm, weights: Tensor) -> Tensor:
    """Return K g (n, c - 1) for g = K^T w, which the Gram matrix knows without the rows."""
    return (form.gram @ weights[:, :, None])[:, :, 0]


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(1)
