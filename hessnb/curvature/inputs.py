"""The Hessian of the loss with respect to the input of each sample (the paper's sections 2 and 3.2, Theorem 2.1).

For a piecewise linear network with logits s, p = softmax(s) and J = ds/dx, the Hessian of the cross-entropy is

    H = J^T (diag(p) - p p^T) J,

whatever the label. Take the differences to the most probable class r: K has the c - 1 rows J_i - J_r, q the square
roots of their probabilities. Then H = K^T C C^T K with C = diag(q) (I - q q^T / (1 + sqrt(p_r))): nothing cancels.
So the non-zero eigenvalues of H are those of the (c - 1) x (c - 1) matrix C^T K K^T C, and its inverses follow from
K K^T: one forward pass and c - 1 vector-Jacobian products for all samples at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hessnb.curvature.evaluation import PROBES, Forward, check_samples, differentiable, evaluation, in_float64
from hessnb.curvature.memory import held_bytes
from hessnb.curvature.precision import full_precision
from hessnb.errors import InputError, unknown
from hessnb.models import eval_mode

Method = Literal["auto", "closed_form", "lanczos"]

GIB = 1 << 30
# It counts as piecewise linear when its gradient changes, along a random unit direction, by at most this share.
_STRAIGHT = 1e-6


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


def input_curvature(model: nn.Module, x: Tensor, y: Tensor, *, memory: int = GIB) -> InputCurvature:
    """Return the norms of input Hessian and input gradient of each sample, float64 (section 3.2).

    ``x`` (N, ...) are inputs, ``y`` (N,) labels; about ``memory`` bytes are used at a time. Raises InputError as
    `input_hessian_eigenvalues` does.
    """
    check_samples(model, x, y)
    if is_piecewise_linear(model, x):
        lambda1 = input_hessian_eigenvalues(model, x, k=1, method="closed_form", memory=memory)[:, 0]
    else:
        lambda1 = _by_lanczos(model, x, y, 1, "LM", 1e-6, memory)[:, 0].abs()
    return InputCurvature(lambda1, input_gradient_norms(model, x, y, memory=memory))


def input_gradient_norms(model: nn.Module, x: Tensor, y: Tensor, *, memory: int = GIB) -> Tensor:
    """Return the L2 norm (N,), float64, of the gradient of each sample's cross-entropy with respect to its input.

    The gradient with respect to the logits is taken in float64 and scaled to norm one before it is propagated: the
    gradients of confident samples do not underflow in float32. Raises InputError as `input_hessian_eigenvalues` does.
    """
    check_samples(model, x, y)
    norms = [x.new_zeros(0, dtype=torch.float64)]
    with evaluation(model):
        for part, labels in _chunks(model, x, y, memory, 0):
            leaf, logits = differentiable(model, part)
            slope = _softmax(logits.detach())
            # p_y - 1 is minus the sum of the others, which does not cancel.
            slope.scatter_(1, labels[:, None], 0.0)
            slope.scatter_(1, labels[:, None], -slope.sum(1, keepdim=True))
            length = torch.linalg.vector_norm(slope, dim=1)
            direction = (slope / length.clamp_min(torch.finfo(torch.float64).tiny)[:, None]).to(logits.dtype)
            (pulled,) = torch.autograd.grad(logits, leaf, direction, materialize_grads=True)
            norms.append(length * torch.linalg.vector_norm(pulled.double().flatten(1), dim=1))
    return torch.cat(norms)


def input_hessian_eigenvalues(
    model: nn.Module,
    x: Tensor,
    y: Tensor | None = None,
    *,
    k: int | None = None,
    method: Method = "auto",
    tol: float = 1e-6,
    memory: int = GIB,
) -> Tensor:
    """Return the ``k`` largest eigenvalues (N, k), descending, float64, of each sample's input Hessian.

    ``x`` (N, ...) are inputs with d entries each, ``y`` (N,) labels, which matter only for networks that are not
    piecewise linear in eval mode. ``k`` is min(c - 1, d) unless given, with c classes; at most d. "closed_form" is
    exact and takes c - 1 vector-Jacobian products; "lanczos" iterates, all samples together, until each residual is at
    most ``tol`` times the sample's largest eigenvalue magnitude; "auto" takes the closed form where
    `is_piecewise_linear` allows it. About ``memory`` bytes are used at a time, beside the result.

    Raises InputError for a closed form asked of a network that is not piecewise linear, labels that are missing or out
    of range, a k outside 1..d, mixed devices or dtypes, NaN, or samples that depend on each other.
    """
    check_samples(model, x, y)
    d = x[0].numel()
    with evaluation(model), torch.no_grad():
        classes = model(x[:1].clone()).shape[1]
    k = min(classes - 1, d) if k is None else k
    if not 1 <= k <= d:
        raise InputError(f"k = {k}: an input Hessian of shape {(d, d)} has 1 to {d} eigenvalues")
    if _chosen(model, x, method) == "lanczos":
        return _by_lanczos(model, x, y, k, "LA", tol, memory)
    found = [x.new_zeros(0, min(k, classes - 1), dtype=torch.float64)]
    for form in _closed_forms(model, x, memory):
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
    memory: int = GIB,
) -> Tensor:
    """Return (H + damping I)^-1 g for each sample's input Hessian H, like ``x``; for damping 0, H^+ g (pseudo-inverse).

    ``g`` has the shape of ``x``. The closed form is exact, by Woodbury's identity; where rows of K are dependent, the
    pseudo-inverse drops eigenvalues at rounding level. "lanczos" (for networks that are not piecewise linear, with
    labels ``y``) iterates in the Krylov space of g until the residual is at most ``tol`` of g's part in it; if H is
    singular, damping 0 then solves within that space. Arguments and errors are otherwise those of
    `input_hessian_eigenvalues`; InputError also for a g of another shape, or a damping that is negative or not finite.
    """
    check_samples(model, x, y)
    if g.shape != x.shape or not bool(torch.isfinite(g).all()):
        raise InputError(f"g of shape {tuple(g.shape)} must be finite and have the shape of x, {tuple(x.shape)}")
    if not (damping >= 0 and math.isfinite(damping)):
        raise InputError(f"damping = {damping}: it must be 0 or positive, and finite")
    g = g.detach()
    if _chosen(model, x, method) == "lanczos":
        return _solve_by_lanczos(model, x, y, g, damping, tol, memory)
    parts, start = [], 0
    for form in _closed_forms(model, x, memory):
        right = g[start : start + len(form.rows)].flatten(1).double()
        start += len(form.rows)
        solved = form.pseudo_inverse(right) if damping == 0 else form.damped_inverse(right, damping)
        parts.append(solved.to(x.dtype))
    return torch.cat(parts).view_as(x)


def input_hessian(model: nn.Module, x: Tensor, y: Tensor, *, train_mode: bool = False) -> Tensor:
    """Return the dense Hessian of each sample's cross-entropy with respect to its own input, (N, d, d).

    ``x`` has shape (N, ...) with d entries a sample, ``y`` (N,) holds labels. Exact, by differentiating twice: d
    backward passes over the batch, in the dtype of ``x`` and the model. With ``train_mode`` batch normalisation uses
    the statistics of the batch, as in the counter-example of chapter 02; the samples then depend on each other, and
    what is returned are the diagonal blocks of the Hessian of the summed loss. The model's running statistics are
    left as they were.

    Raises InputError when the numbers of inputs and labels differ or are zero.
    """
    if len(x) != len(y) or len(x) == 0:
        raise InputError(f"{len(x)} inputs and {len(y)} labels: give as many labels as inputs, at least one")
    x = x.detach().clone().requires_grad_(True)
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    with eval_mode(model), full_precision(), torch.enable_grad():
        if train_mode:
            model.train()
        logits = torch.func.functional_call(model, buffers, (x,))
        loss = F.cross_entropy(logits, y, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
        columns = gradient.reshape(len(x), -1)
        d = columns.shape[1]
        hessian = torch.empty(len(x), d, d, dtype=x.dtype, device=x.device)
        if not gradient.requires_grad:  # the gradient does not depend on the input at all
            return hessian.zero_()
        for row in range(d):  # the same pixel of each sample: row by row of all N Hessians at once
            (products,) = torch.autograd.grad(columns[:, row].sum(), x, retain_graph=True, materialize_grads=True)
            hessian[:, row] = products.reshape(len(x), d)
    return hessian


def is_piecewise_linear(model: nn.Module, x: Tensor) -> bool:
    """Return whether the logits are piecewise linear in the input, in eval mode, as far as a probe of ``x`` can tell.

    For up to 16 of the samples a random combination of the logits is differentiated twice along a random direction:
    where it is not zero, Theorem 2.1 does not hold. ReLUs of any form, max- and average-pooling and eval-mode batch
    normalisation pass; softplus, tanh, layer normalisation and attention do not.

    Raises InputError for samples that depend on each other through batch statistics, or a random model.
    """
    check_samples(model, x, None)
    return _bend(model, x) <= _STRAIGHT


def require_piecewise_linear(model: nn.Module, x: Tensor, *, remedy: str) -> None:
    """Raise InputError, with the reason and what else to use, for a network that has no closed form."""
    bend = _bend(model, x)
    if bend > _STRAIGHT:
        raise InputError(
            f"the closed form needs logits that are piecewise linear in the input; along a random direction of length "
            f"one their gradient changes by {bend:.1e} of itself. Look for smooth activations or normalisation by the "
            f"sample's own statistics, or use {remedy}"
        )


def _bend(model: nn.Module, x: Tensor) -> float:
    """Return by which share the gradient of the logits changes along a random direction of length one."""
    generator = torch.Generator().manual_seed(0)
    some = x.detach()[:: max(1, len(x) // PROBES)][:PROBES]
    with evaluation(model):
        leaf, logits = differentiable(model, some)
        weights = torch.randn(logits.shape, dtype=logits.dtype, generator=generator).to(logits)
        (slope,) = torch.autograd.grad(logits, leaf, weights, create_graph=True, materialize_grads=True)
        if not slope.requires_grad:
            return 0.0
        direction = torch.randn(leaf.shape, dtype=leaf.dtype, generator=generator).to(leaf)
        direction = direction / torch.linalg.vector_norm(direction.flatten(1), dim=1).view(-1, *[1] * (x.ndim - 1))
        (change,) = torch.autograd.grad(slope, leaf, direction, materialize_grads=True)
    sizes = [torch.linalg.vector_norm(t.detach().flatten(1), dim=1) for t in (change, slope)]
    return float((sizes[0] / sizes[1].clamp_min(torch.finfo(x.dtype).tiny)).max())


# -- closed form ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ClosedForm:
    """H = K^T C C^T K of m samples: ``rows`` K (m, c - 1, d) in the model's dtype, ``factor`` C (m, c - 1, c - 1) and
    ``gram`` K K^T in float64, the class (m, c - 1) of each row, and the probabilities of the reference class (m,) and
    of the others (m, c - 1).
    """

    rows: Tensor
    factor: Tensor
    gram: Tensor
    classes: Tensor
    reference: Tensor
    others: Tensor

    @property
    def small(self) -> Tensor:
        """C^T K K^T C, with the non-zero eigenvalues of H."""
        return self.factor.mT @ self.gram @ self.factor

    def pseudo_inverse(self, g: Tensor) -> Tensor:
        """Return H^+ g (m, d) for g (m, d), in float64."""
        rows = self.rows.double()
        along = (rows @ g[:, :, None])[:, :, 0]
        values, vectors = torch.linalg.eigh(self.gram)
        eps = torch.finfo(self.rows.dtype).eps * rows.shape[1]
        independent = values[:, 0] > eps * values[:, -1]
        # With independent rows, H^+ = K^T (K K^T)^-1 A^-1 (K K^T)^-1 K, and A^-1 = diag(1 / p) + 1 1^T / p_r.
        safe = torch.where(independent[:, None], values, torch.ones_like(values))

        def gram_inverse(b: Tensor) -> Tensor:
            solved: Tensor = vectors @ ((vectors.mT @ b[:, :, None]) / safe[:, :, None])
            return solved[:, :, 0]

        b = gram_inverse(along)
        tiny = torch.finfo(torch.float64).tiny
        b = b / self.others.clamp_min(tiny) + (b.sum(1) / self.reference)[:, None]
        exact = gram_inverse(b)
        # Otherwise from the eigenvectors of C^T K K^T C, without those at rounding level.
        values, vectors = torch.linalg.eigh(self.small)
        kept = values > eps * values[:, -1:]
        squared = torch.where(kept, values, torch.ones_like(values)) ** -2 * kept
        b = self.factor.mT @ along[:, :, None]
        general = (self.factor @ (vectors @ (squared[:, :, None] * (vectors.mT @ b))))[:, :, 0]
        return (rows.mT @ torch.where(independent[:, None], exact, general)[:, :, None])[:, :, 0]

    def damped_inverse(self, g: Tensor, damping: float | Tensor) -> Tensor:
        """Return (H + damping I)^-1 g (m, d) for g (m, d), in float64; ``damping`` is positive, one or (m,)."""
        damping = torch.as_tensor(damping, dtype=torch.float64, device=g.device).expand(len(g))[:, None]
        rows = self.rows.double()
        b = self.factor.mT @ (rows @ g[:, :, None])
        small = self.small
        eye = torch.eye(small.shape[1], dtype=small.dtype, device=small.device)
        solved: Tensor = torch.linalg.solve(small + damping[:, :, None] * eye, b)
        return (g - (rows.mT @ (self.factor @ solved))[:, :, 0]) / damping


def _closed_forms(model: nn.Module, x: Tensor, memory: int) -> Iterator[ClosedForm]:
    """Go through the samples in chunks that take about ``memory`` bytes each."""
    with evaluation(model):
        with torch.no_grad():
            classes = model(x[:1].clone()).shape[1]
        size = x[0].numel() * (classes - 1) * (2 * x.element_size() + 8) + 8 * 6 * classes**2
        for part, _ in _chunks(model, x, None, memory, size):
            yield closed_form(*differentiable(model, part))


def closed_form(leaf: Tensor, logits: Tensor) -> ClosedForm:
    """Return the input Hessians of samples ``leaf`` (m, ...) from the graph of their piecewise linear logits (m, c)."""
    classes = logits.shape[1]
    p = _softmax(logits.detach())
    top = p.argmax(1)
    order = (top[:, None] + torch.arange(1, classes, device=leaf.device)) % classes
    reference, others = p.gather(1, top[:, None])[:, 0], p.gather(1, order)
    rows = leaf.new_empty(len(leaf), classes - 1, leaf[0].numel())
    for i in range(classes - 1):
        difference = torch.zeros_like(logits).scatter_(1, order[:, i : i + 1], 1.0)
        difference.scatter_(1, top[:, None], -1.0)
        last = i + 1 == classes - 1
        (row,) = torch.autograd.grad(logits, leaf, difference, retain_graph=not last, materialize_grads=True)
        rows[:, i] = row.flatten(1)
    q = others.sqrt()
    share = q / (1 + reference.sqrt())[:, None]
    eye = torch.eye(classes - 1, dtype=q.dtype, device=q.device)
    factor = q[:, :, None] * (eye - q[:, :, None] * share[:, None, :])
    return ClosedForm(rows, factor, (rows @ rows.mT).double(), order, reference, others)


# -- iteration -----------------------------------------------------------------------------------------------------


def _by_lanczos(
    model: nn.Module, x: Tensor, y: Tensor | None, k: int, which: Literal["LA", "LM"], tol: float, memory: int
) -> Tensor:
    """Return the k leading eigenvalues (N, k) of each sample by Lanczos iteration on all samples of a chunk at once.

    It starts from k random directions, so that it sees as many copies of a multiple eigenvalue as are asked for.
    """
    labels = _needed(y)
    generator = torch.Generator().manual_seed(0)
    found = [x.new_zeros(0, k, dtype=torch.float64)]
    d = x[0].numel()

    def leading(theta: Tensor) -> Tensor:
        return (theta if which == "LA" else theta.abs()).argsort(dim=1, descending=True)[:, :k]

    def finished(theta: Tensor, s: Tensor, rest: Tensor) -> bool:
        residuals = torch.linalg.vector_norm(rest @ s, dim=1)
        allowed = tol * theta.abs().amax(1, keepdim=True)
        return theta.shape[1] >= k and bool((residuals.gather(1, leading(theta)) <= allowed).all())

    with evaluation(model):
        forward, dtype = in_float64(model, x)
        for part, target in _chunks(model, x, labels, memory // 2, d * 8 * (4 * k + 40)):
            start = torch.randn(len(part), k, d, dtype=torch.float64, generator=generator).to(x.device)
            theta, _, _ = _lanczos_on_each(input_products(forward, part.to(dtype), target), start, generator, finished)
            found.append(theta.gather(1, leading(theta)))
    return torch.cat(found)


def _solve_by_lanczos(
    model: nn.Module, x: Tensor, y: Tensor | None, g: Tensor, damping: float, tol: float, memory: int
) -> Tensor:
    labels = _needed(y)
    generator = torch.Generator().manual_seed(0)
    solved, start = [], 0
    with evaluation(model):
        forward, dtype = in_float64(model, x)
        eps = x[0].numel() * torch.finfo(dtype).eps
        for part, target in _chunks(model, x, labels, memory // 2, x[0].numel() * 8 * 100):
            right = g[start : start + len(part)].flatten(1).double()
            start += len(part)
            length = torch.linalg.vector_norm(right, dim=1)

            def solution(theta: Tensor, s: Tensor, length: Tensor = length) -> Tensor:
                """Return the coordinates of the solution in the basis, nothing along directions at rounding level."""
                shifted = theta + damping
                floor = eps * shifted.abs().amax(1, keepdim=True)
                inverse = torch.where(shifted.abs() > floor, 1 / shifted, torch.zeros_like(shifted))
                return s @ (inverse * s[:, 0] * length[:, None])[:, :, None]

            def finished(theta: Tensor, s: Tensor, rest: Tensor, length: Tensor = length) -> bool:
                residuals = torch.linalg.vector_norm(rest @ solution(theta, s), dim=1)[:, 0]
                return bool((residuals <= tol * length).all())

            products = input_products(forward, part.to(dtype), target)
            theta, s, basis = _lanczos_on_each(products, right[:, None], generator, finished)
            solved.append((solution(theta, s).mT @ basis)[:, 0].to(x.dtype))
    return torch.cat(solved).view_as(x)


def _lanczos_on_each(
    product: Callable[[Tensor], Tensor],
    start: Tensor,
    generator: torch.Generator,
    finished: Callable[[Tensor, Tensor, Tensor], bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return Ritz values (N, m), coordinates (N, m, m) and bases (N, m, d) of N operators from their starts (N, b, d).

    Band Lanczos (Ruhe, 1979) with full reorthogonalisation in float64: the basis begins with the orthonormalised
    starts, and each of its rows in turn is multiplied and leaves one more row behind. Ends at m = d, or when
    ``finished(values, coordinates, rest)`` says so: ``rest`` (N, b, m) are the products' components outside the rows
    that were multiplied. Where a Krylov space is exhausted, its iteration goes on in a random direction.
    """
    n, b, d = start.shape
    basis = start.new_zeros(n, 0, d)

    def extended(w: Tensor, dependent: Tensor) -> Tensor:
        fresh = torch.randn(n, d, dtype=torch.float64, generator=generator).to(w.device)
        fresh, _ = _orthogonalise(fresh, basis)
        row = F.normalize(torch.where(dependent[:, None], fresh, w), dim=1, eps=0.0)
        return torch.cat([basis, row[:, None]], dim=1)

    for v in F.normalize(start, dim=2, eps=torch.finfo(torch.float64).tiny).unbind(1):
        w, _ = _orthogonalise(v, basis)
        basis = extended(w, torch.linalg.vector_norm(w, dim=1) <= 1e-13)
    T = start.new_zeros(n, b, 0)
    while True:
        m = T.shape[2]
        w = product(basis[:, m])
        if not bool(torch.isfinite(w).all()):
            raise InputError("a product with an input Hessian is not finite: look for overflow in the model's outputs")
        w, coefficients = _orthogonalise(w, basis)
        T = torch.cat([T, coefficients[:, :, None]], dim=2)
        if basis.shape[1] < d:
            left = torch.linalg.vector_norm(w, dim=1)
            dependent = left <= 1e-13 * T.flatten(1).abs().amax(1)
            basis = extended(w, dependent)
            T = F.pad(T, (0, 0, 0, 1))
            T[:, -1, -1] = left.masked_fill(dependent, 0.0)
        m += 1
        square, rest = T[:, :m], T[:, m:]
        theta, s = torch.linalg.eigh((square + square.mT) / 2)
        if m == d or finished(theta, s, rest):
            return theta, s, basis[:, :m]


def _orthogonalise(w: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Return w (N, d) without its components along the bases (N, m, d), and these components (N, m)."""
    total = w.new_zeros(basis.shape[:2])
    for _ in range(2):
        along = (basis @ w[:, :, None])[:, :, 0]
        w = w - (along[:, None] @ basis)[:, 0]
        total += along
    return w, total


def input_products(forward: Forward, x: Tensor, y: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the map from vectors (N, d), float64, to the products with each sample's input Hessian."""
    leaf, logits = differentiable(forward, x)
    # The cross-entropy in differences to the most probable class: its derivatives do not cancel for confident samples.
    classes = logits.shape[1]
    top = logits.detach().argmax(1, keepdim=True)
    others = (top + torch.arange(1, classes, device=x.device)) % classes
    best = logits.gather(1, top)
    loss = (best - logits.gather(1, y[:, None])).sum() + (logits.gather(1, others) - best).exp().sum(1).log1p().sum()
    (slope,) = torch.autograd.grad(loss, leaf, create_graph=True, materialize_grads=True)

    def product(v: Tensor) -> Tensor:
        if not slope.requires_grad:
            return torch.zeros_like(v)
        direction = v.to(x.dtype).view_as(x)
        (found,) = torch.autograd.grad(slope, leaf, direction, retain_graph=True, materialize_grads=True)
        return found.flatten(1).double()

    return product


# -- evaluation ----------------------------------------------------------------------------------------------------


def _softmax(logits: Tensor) -> Tensor:
    return F.softmax(logits.double(), dim=1)


def _chunks(model: nn.Module, x: Tensor, y: Tensor | None, memory: int, extra: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Go through samples and labels in chunks of about ``memory`` bytes: three graphs' worth and ``extra`` a sample."""
    labels = torch.zeros(len(x), dtype=torch.int64, device=x.device) if y is None else y
    graph = held_bytes(lambda: differentiable(model, x[:1]), [*model.parameters(), *model.buffers()])
    size = max(1, memory // (3 * graph + extra))
    yield from zip(x.split(size), labels.split(size), strict=True)


def _needed(y: Tensor | None) -> Tensor:
    if y is None:
        raise InputError("the network is not piecewise linear, so its input Hessians depend on the labels: give y")
    return y


def _chosen(model: nn.Module, x: Tensor, method: str) -> Literal["closed_form", "lanczos"]:
    if method not in ("auto", "closed_form", "lanczos"):
        raise unknown("method", method, ["auto", "closed_form", "lanczos"])
    if method == "lanczos":
        return "lanczos"
    if method == "closed_form":
        require_piecewise_linear(model, x, remedy="method='lanczos' with labels")
        return "closed_form"
    return "closed_form" if _bend(model, x) <= _STRAIGHT else "lanczos"
