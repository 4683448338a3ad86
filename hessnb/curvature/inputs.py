"""The Hessian of the loss with respect to the input of each sample (the paper's sections 2 and 3.2, Theorem 2.1).

Piecewise linear networks have them in closed form, for others they are iterated: `hessnb.curvature.closed_form` and
`hessnb.curvature.input_lanczos`.
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from hessnb.checks import PROBES, check_samples, finite_gradients
from hessnb.curvature.closed_form import closed_forms, piecewise_linear, require_piecewise_linear
from hessnb.curvature.evaluation import cross_entropy_in_differences, differentiable, in_chunks
from hessnb.curvature.input_lanczos import eigenvalues_by_lanczos, solve_by_lanczos
from hessnb.curvature.memory import at_a_time
from hessnb.errors import InputError, not_negative, tolerance, unknown
from hessnb.models import evaluation

Method = Literal["auto", "closed_form", "lanczos"]


@dataclass(frozen=True)
class InputCurvature:
    """The two measures of section 3.2, for each sample: ``lambda1`` (N,), the largest eigenvalue magnitude of the input
    Hessian, and ``gradient_norms`` (N,), the L2 norm of the input gradient. The paper's are the means.
    """

    lambda1: Tensor
    gradient_norms: Tensor

    @property
    def mean_lambda1(self) -> float:
        """The mean over samples: the paper's lambda_1^x."""
        return float(self.lambda1.mean())

    @property
    def mean_gradient_norm(self) -> float:
        """The mean over samples: the paper's gradient norm."""
        return float(self.gradient_norms.mean())


def input_curvature(model: nn.Module, x: Tensor, y: Tensor, *, memory: int | None = None) -> InputCurvature:
    """Return the norms of input Hessian and input gradient of each sample, float64 (section 3.2).

    ``x`` (N, ...) are inputs, ``y`` (N,) labels; ``memory`` and errors are those of `input_hessian_eigenvalues`.
    """
    check_samples(model, x, y)
    memory = at_a_time(memory, x.device)
    if is_piecewise_linear(model, x):
        lambda1 = input_hessian_eigenvalues(model, x, k=1, method="closed_form", memory=memory)[:, 0]
    else:
        lambda1 = eigenvalues_by_lanczos(model, x, y, 1, "LM", 1e-6, memory)[:, 0].abs()
    return InputCurvature(lambda1, input_gradient_norms(model, x, y, memory=memory))


def input_gradient_norms(model: nn.Module, x: Tensor, y: Tensor, *, memory: int | None = None) -> Tensor:
    """Return the L2 norm (N,), float64, of the gradient of each sample's cross-entropy with respect to its input.

    The gradient with respect to the logits is taken in float64 and scaled to norm one before it is propagated: the
    gradients of confident samples do not underflow in float32. Raises InputError as `input_hessian_eigenvalues` does.
    """
    check_samples(model, x, y)
    memory = at_a_time(memory, x.device)
    norms = [x.new_zeros(0, dtype=torch.float64)]
    with evaluation(model):
        for part, labels in in_chunks(model, x, y, memory, 0):
            own = labels.to(torch.int64)[:, None]
            leaf, logits = differentiable(model, part)
            slope = F.softmax(logits.detach().double(), dim=1)
            # p_y - 1 is minus the sum of the others, which does not cancel.
            slope.scatter_(1, own, 0.0)
            slope.scatter_(1, own, -slope.sum(1, keepdim=True))
            # By the largest entry first, whose square may underflow.
            largest = slope.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
            length = largest[:, 0] * torch.linalg.vector_norm(slope / largest, dim=1)
            direction = (slope / length.clamp_min(torch.finfo(torch.float64).tiny)[:, None]).to(logits.dtype)
            (pulled,) = torch.autograd.grad(logits, leaf, direction, materialize_grads=True)
            norms.append(length * torch.linalg.vector_norm(pulled.double().flatten(1), dim=1))
    found = torch.cat(norms)
    finite_gradients(found)
    return found


def input_hessian_eigenvalues(
    model: nn.Module,
    x: Tensor,
    y: Tensor | None = None,
    *,
    k: int | None = None,
    method: Method = "auto",
    tol: float = 1e-6,
    memory: int | None = None,
) -> Tensor:
    """Return the ``k`` largest eigenvalues (N, k), descending, float64, of each sample's input Hessian.

    ``x`` (N, ...) are inputs with d entries each, ``y`` (N,) labels, which matter only for networks that are not
    piecewise linear in eval mode. ``k`` is min(c - 1, d) unless given, with c classes; at most d. "closed_form" is
    exact and takes c - 1 vector-Jacobian products; "lanczos" iterates, all samples together, until each residual is at
    most ``tol`` times the sample's largest eigenvalue magnitude; "auto" takes the closed form where
    `is_piecewise_linear` allows it. About ``memory`` bytes are used at a time, beside the result: 1 GiB unless given,
    or on CUDA an eighth of what is free.

    Raises InputError for a closed form asked of a network that is not piecewise linear, labels that are missing or out
    of range, a k outside 1..d, a ``tol`` that is not between 0 and 1, mixed devices or dtypes, NaN, or samples that
    depend on each other.
    """
    check_samples(model, x, y, labelled=False)
    memory = at_a_time(memory, x.device)
    d = x[0].numel()
    with evaluation(model), torch.no_grad():
        classes = model(x[:1].clone()).shape[1]
    k = min(classes - 1, d) if k is None else k
    tolerance(tol)
    whole = isinstance(k, Integral)
    if not (whole and 1 <= k <= d):
        raise InputError(f"k = {k!r}: an input Hessian of shape {(d, d)} has 1 to {d} eigenvalues")
    if _chosen(model, x, method) == "lanczos":
        return eigenvalues_by_lanczos(model, x, y, k, "LA", tol, memory)
    found = [x.new_zeros(0, min(k, classes - 1), dtype=torch.float64)]
    for form in closed_forms(model, x, memory):
        small = form.small
        scale = small.abs().amax((1, 2)).clamp_min(torch.finfo(torch.float64).tiny)  # or tiny ones would underflow
        found.append(scale[:, None] * torch.linalg.eigvalsh(small / scale[:, None, None]).flip(1)[:, :k])
    # Beyond the rank, at most c - 1, all eigenvalues are zero.
    return F.pad(torch.cat(found).clamp_min(0.0), (0, max(0, k - (classes - 1))))


def input_hessian_solve(
    model: nn.Module,
    x: Tensor,
    g: Tensor,
    *,
    damping: float = 0.0,
    y: Tensor | None = None,
    method: Method = "auto",
    tol: float = 1e-8,
    memory: int | None = None,
) -> Tensor:
    """Return (H + damping I)^-1 g for each sample's input Hessian H, like ``x``; for damping 0, H^+ g (pseudo-inverse).

    ``g`` has the shape of ``x``. The closed form is exact, by Woodbury's identity; where rows of K are dependent, the
    pseudo-inverse drops eigenvalues at rounding level. "lanczos" (for networks that are not piecewise linear, with
    labels ``y``) iterates in the Krylov space of g until the residual is at most ``tol`` of g's part in it; if H is
    singular, damping 0 then solves within that space. Arguments and errors are otherwise those of
    `input_hessian_eigenvalues`; InputError also for a g of another shape, or a damping that is negative or not finite.
    """
    check_samples(model, x, y, labelled=False)
    tolerance(tol)
    if not isinstance(g, Tensor):
        raise InputError(f"g is a {type(g).__name__}: give a tensor like x")
    if g.shape != x.shape or not bool(torch.isfinite(g).all()):
        raise InputError(f"g of shape {tuple(g.shape)} must be finite and have the shape of x, {tuple(x.shape)}")
    not_negative("damping", damping)
    g, memory = g.detach(), at_a_time(memory, x.device)
    if _chosen(model, x, method) == "lanczos":
        return solve_by_lanczos(model, x, y, g, damping, tol, memory)
    parts, start = [], 0
    for form in closed_forms(model, x, memory):
        right = g[start : start + len(form.rows)].flatten(1).double()
        start += len(form.rows)
        solved = form.pseudo_inverse(form.along(right)) if damping == 0 else form.damped_inverse(right, damping)
        parts.append(solved.to(x.dtype))
    return torch.cat(parts).view_as(x)


def input_hessian(model: nn.Module, x: Tensor, y: Tensor, *, train_mode: bool = False) -> Tensor:
    """Return the dense Hessian of each sample's cross-entropy with respect to its own input, (N, d, d).

    ``x`` has shape (N, ...) with d entries a sample, ``y`` (N,) holds labels. Exact, by differentiating twice,
    without cancellation however confident the network: d backward passes over the batch, in the dtype of ``x`` and the
    model. With ``train_mode`` batch normalisation uses the statistics of the batch, as in the counter-example of
    chapter 02; the samples then depend on each other, and what is returned are the diagonal blocks of the Hessian of
    the summed loss. The model's running statistics are left as they were.

    Raises InputError for samples, labels and a model that do not fit together, outputs that are not finite, and, but
    for ``train_mode``, samples that depend on each other.
    """
    check_samples(model, x, y, probes=0 if train_mode else PROBES)
    with evaluation(model):
        buffers = {name: b.clone() for name, b in model.named_buffers()}
        if train_mode:
            for module in model.modules():
                module.train(isinstance(module, _BatchNorm))
        # In the memory layout of the closed form: other kernels round otherwise, and take the other side of a kink.
        leaf, logits = differentiable(lambda inputs: torch.func.functional_call(model, buffers, (inputs,)), x)
        loss = cross_entropy_in_differences(logits, y)
        (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
        columns = gradient.reshape(len(x), -1)
        d = columns.shape[1]
        hessian = torch.empty(len(x), d, d, dtype=x.dtype, device=x.device)
        if not gradient.requires_grad:  # the gradient does not depend on the input at all
            return hessian.zero_()
        for row in range(d):  # the same pixel of each sample: row by row of all N Hessians at once
            (products,) = torch.autograd.grad(columns[:, row].sum(), leaf, retain_graph=True, materialize_grads=True)
            hessian[:, row] = products.reshape(len(x), d)
    return hessian


def is_piecewise_linear(model: nn.Module, x: Tensor) -> bool:
    """Return whether the logits are piecewise linear in the input, in eval mode, as far as a probe of ``x`` can tell.

    For up to 16 of the samples a random combination of the logits is differentiated twice along a random direction:
    where it is not zero, Theorem 2.1 does not apply. ReLUs of any form, max- and average-pooling and eval-mode batch
    normalisation pass; softplus, tanh, layer normalisation and attention do not.

    Raises InputError for samples that depend on each other through batch statistics, or a random model.
    """
    check_samples(model, x, None, labelled=False)
    return piecewise_linear(model, x)


def _chosen(model: nn.Module, x: Tensor, method: str) -> Literal["closed_form", "lanczos"]:
    if method not in ("auto", "closed_form", "lanczos"):
        raise unknown("method", method, ["auto", "closed_form", "lanczos"])
    if method == "lanczos":
        return "lanczos"
    if method == "closed_form":
        require_piecewise_linear(model, x, remedy="method='lanczos' with labels")
        return "closed_form"
    return "closed_form" if piecewise_linear(model, x) else "lanczos"
