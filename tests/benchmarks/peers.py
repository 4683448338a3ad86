"""What hessnb's curvature is compared with, how runs are timed in turns, and what judges both, in float64.

The peers are three published packages, and a power iteration written for the purpose.

Each solver takes a network in eval mode, equal batches and a number k, and returns a `Solution`. The packages are
imported inside the functions, are seeded, and count their products by a wrapper that costs nothing beside a product.
"""

from __future__ import annotations

import copy
import gc
import importlib
import importlib.metadata
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Batches = list[tuple[Tensor, Tensor]]
T = TypeVar("T")


@dataclass(frozen=True)
class Solution:
    """Eigenvalues (k,) (NaN where only a vector is there), eigenvectors (k, n), products taken, a remark.

    ``iterations`` are the most that an eigenvalue took, where they are found one by one. ``finished`` is False when
    the time limit ended the solver; what it had by then is what is here.
    """

    eigenvalues: Tensor
    eigenvectors: Tensor
    products: int
    note: str
    finished: bool = True
    iterations: int = 0


class TimeIsUp(Exception):
    pass


def require(module: str) -> Any:
    """Import a peer's module; without it, say how to get it and exit with code 2."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise absent(module, error) from None


def absent(name: str, error: ImportError) -> SystemExit:
    print(f"{name} is not there ({error}); install the peers with: pip install -e '.[bench]'", file=sys.stderr)
    return SystemExit(2)


def check(rows: Iterable[str]) -> None:
    """Exit with code 2 unless all that the rows of these names compare with is there."""
    needs = {"pyhessian": ["pyhessian"], "pyhessian-equal": ["pyhessian"], "curvlinops": ["curvlinops", "scipy"]}
    needs |= {"eigenthings": ["hessian_eigenthings"], "product": ["pyhessian", "curvlinops", "hessian_eigenthings"]}
    for module in {module for row in rows for module in needs.get(row, [])}:
        require(module)


def version(distribution: str) -> str:
    try:
        return f"{distribution} {importlib.metadata.version(distribution)}"
    except importlib.metadata.PackageNotFoundError as error:
        raise absent(distribution, error) from None


def flat(tensors: Any) -> Tensor:
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def pyhessian_operator(model: nn.Module, batches: Batches) -> Any:
    module = require("pyhessian.hessian")
    warnings.filterwarnings("ignore", "Using backward.. with create_graph=True")
    return module.hessian(model, nn.CrossEntropyLoss(), dataloader=batches, cuda=False)


def pyhessian(model: nn.Module, batches: Batches, k: int, tol: float, max_iter: int, limit: float) -> Solution:
    """PyHessian's power iteration with deflation, an eigenvalue at a time, ended after ``limit`` seconds."""
    module = require("pyhessian.hessian")
    torch.manual_seed(0)
    operator = pyhessian_operator(model, batches)
    iterations = [0] * k
    last: list[Any] = []  # the vectors found, and the one at work
    original = module.orthnormal
    deadline = time.perf_counter() + limit

    def orthnormal(vector: Any, found: list[Any]) -> Any:  # called once before each product
        if time.perf_counter() > deadline:
            raise TimeIsUp
        iterations[len(found)] += 1
        last[:] = [*found, original(vector, found)]
        return last[-1]

    finished = True
    with patch.object(module, "orthnormal", orthnormal):
        try:
            eigenvalues, vectors = operator.eigenvalues(maxIter=max_iter, tol=tol, top_n=k)
        except TimeIsUp:
            eigenvalues, vectors, finished = [float("nan")] * len(last), last, False
    cut = sum(n == max_iter for n in iterations)
    note = f"tol={tol:g}, maxIter={max_iter}: {min(iterations)} to {max(iterations)} products an eigenvalue, "
    note += f"{cut} of {k} stopped by maxIter" if finished else f"time was up at eigenvalue {len(vectors)} of {k}"
    return Solution(
        torch.tensor(eigenvalues, dtype=torch.float64),
        torch.stack([flat(v) for v in vectors]),
        sum(iterations),
        note,
        finished,
        max(iterations),
    )


def curvlinops_operator(model: nn.Module, batches: Batches) -> Any:
    """curvlinops' operator as it comes: with its check that model and data are deterministic."""
    curvlinops = require("curvlinops")
    return curvlinops.HessianLinearOperator(model, nn.CrossEntropyLoss(), list(model.parameters()), batches)


def curvlinops(model: nn.Module, batches: Batches, k: int, tol: float) -> Solution:
    """curvlinops' operator in SciPy's eigsh: ARPACK's restarted Lanczos in float64 over float32 products."""
    linalg, numpy = require("scipy.sparse.linalg"), require("numpy")
    started = time.perf_counter()
    operator = curvlinops_operator(model, batches)
    construction = time.perf_counter() - started
    exported, products = operator.to_scipy(), 0

    def matvec(vector: Any) -> Any:
        nonlocal products
        products += 1
        return exported.matvec(vector)

    counted = linalg.LinearOperator(exported.shape, matvec=matvec, dtype=exported.dtype)
    start = numpy.random.default_rng(0).standard_normal(exported.shape[0])
    eigenvalues, vectors = linalg.eigsh(counted, k=k, which="LM", tol=tol, v0=start)
    order = abs(eigenvalues).argsort()[::-1].copy()
    note = f"eigsh(tol={tol:g}, default ncv), the operator and its default check made in {construction:.2g} s"
    return Solution(torch.from_numpy(eigenvalues[order]), torch.from_numpy(vectors.T[order]), products, note)


def eigenthings_operator(model: nn.Module, batches: Batches) -> Any:
    """hessian-eigenthings' operator; it averages the batches without weights, so they must be of one size."""
    eigenthings = require("hessian_eigenthings")
    return eigenthings.HessianOperator(model, batches, eigenthings.supervised_loss(nn.CrossEntropyLoss()))


def eigenthings(model: nn.Module, batches: Batches, k: int, steps: int) -> Solution:
    """hessian-eigenthings' Lanczos: a given number of steps, in float32, with reorthogonalisation switched on."""
    result = require("hessian_eigenthings").lanczos(
        eigenthings_operator(model, batches), k=k, max_iter=steps, reorthogonalize=True, seed=0
    )
    note = f"lanczos(max_iter={steps}, reorthogonalize=True)"
    return Solution(result.eigenvalues.double(), result.eigenvectors, result.iterations, note)


def gradient(model: nn.Module, batches: Batches) -> list[Tensor]:
    """Return the gradient of the mean loss over all samples."""
    parameters = list(model.parameters())
    total = [torch.zeros_like(p) for p in parameters]
    for x, y in batches:
        for part, g in zip(total, torch.autograd.grad(F.cross_entropy(model(x), y), parameters), strict=True):
            part.add_(g, alpha=len(y))
    n_samples = sum(len(y) for _, y in batches)
    return [part.div_(n_samples) for part in total]


def products(model: nn.Module, batches: Batches, vector: Tensor) -> dict[str, Callable[[], Any]]:
    """Return each package's product of the Hessian with a vector (n,)."""
    parameters = list(model.parameters())
    pieces = [v.view_as(p) for v, p in zip(vector.split([p.numel() for p in parameters]), parameters, strict=True)]
    return {
        "PyHessian": partial(pyhessian_operator(model, batches).dataloader_hv_product, pieces),
        "curvlinops-for-pytorch": partial(curvlinops_operator(model, batches).__matmul__, vector),
        "hessian-eigenthings": partial(eigenthings_operator(model, batches).matvec, vector),
    }


@dataclass(frozen=True)
class InputEigenvalues:
    """Largest eigenvalues (N,), how many samples did not converge, and the seconds since the last one that did."""

    eigenvalues: Tensor
    unconverged: int = 0
    seconds_in_vain: float = 0.0


def input_power_iteration(
    model: nn.Module, x: Tensor, y: Tensor, rule: str, tol: float = 1e-4, max_iter: int = 1000
) -> InputEigenvalues:
    """Largest eigenvalue of each sample's input Hessian by power iteration on all samples at once.

    The graph of the first gradient is kept. A sample stops by its relative residual (``rule="residual"``) or by the
    relative change of its eigenvalue (``"change"``). Whenever a tenth of the samples have stopped the graph is made
    anew without them, which saves more than it costs. Weights need no gradient here and get none.
    """
    model = copy.deepcopy(model).requires_grad_(False)
    eigenvalues = torch.full((len(x),), float("inf"), dtype=x.dtype)
    stopped = torch.zeros(len(x), dtype=torch.bool)
    samples = torch.arange(len(x))  # those whose products are taken
    leaf, gradient = _input_gradient(model, x, y)
    v = torch.randn(len(x), x[0].numel(), generator=torch.Generator().manual_seed(0))
    v = F.normalize(v, eps=0.0)
    iterations, progress = 0, time.process_time()
    while iterations < max_iter and not bool(stopped.all()):
        iterations += 1
        (product,) = torch.autograd.grad(gradient, leaf, v.view_as(leaf), retain_graph=True)
        product = product.flatten(1)
        value = (v * product).sum(1)
        if rule == "residual":
            error = torch.linalg.vector_norm(product - value[:, None] * v, dim=1)
        else:
            error = (value - eigenvalues[samples]).abs()
        v = F.normalize(product, eps=torch.finfo(x.dtype).tiny)
        before = stopped[samples]
        eigenvalues[samples] = torch.where(before, eigenvalues[samples], value)
        now = before | (error <= tol * value.abs())  # a product of zero stops, too
        stopped[samples] = now
        if bool((now & ~before).any()):
            progress = time.process_time()
        if len(samples) > int(now.sum()) >= len(samples) / 10:
            v, samples = v[~now], samples[~now]
            leaf, gradient = _input_gradient(model, x[samples], y[samples])
    return InputEigenvalues(eigenvalues, int((~stopped).sum()), time.process_time() - progress)


def _input_gradient(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.detach().clone().requires_grad_(True)
    loss = F.cross_entropy(model(leaf), y, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
    return leaf, gradient


def alternate(rounds: int, subjects: Mapping[str, Callable[[], T]]) -> tuple[dict[str, list[float]], dict[str, T]]:
    """Run the subjects in turns; return the processor seconds of each, and what each returned last."""
    seconds: dict[str, list[float]] = {name: [] for name in subjects}
    returned: dict[str, T] = {}
    for _ in range(rounds):
        for name, run in subjects.items():
            gc.collect()
            started = time.process_time()
            returned[name] = run()
            seconds[name].append(time.process_time() - started)
    return seconds, returned


def short(x: float) -> float:
    return float(f"{x:.4g}")


def spread(values: Iterable[float]) -> dict[str, float]:
    values = list(values)
    return {"median": short(statistics.median(values)), "min": short(min(values)), "max": short(max(values))}


@dataclass(frozen=True)
class Judged:
    """A solution's eigenvalues (k,), in order, and its relative residuals (k,), measured by `judge`."""

    eigenvalues: Tensor
    residuals: Tensor


def judge(model: nn.Module, batches: Batches, solution: Solution) -> Judged:
    """Return |Hv - lambda v| / |lambda|, v scaled to length 1, with the exact Hessian in float64.

    Where a solver had no time to say an eigenvalue, the vector's Rayleigh quotient is taken for it.
    """
    model = copy.deepcopy(model).double()
    parameters = list(model.parameters())
    n_samples = sum(len(y) for _, y in batches)
    vectors = F.normalize(solution.eigenvectors.double(), eps=0.0)
    products = torch.zeros_like(vectors)
    for x, y in batches:
        loss = F.cross_entropy(model(x.double()), y, reduction="sum") / n_samples
        gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, parameters, create_graph=True)])
        for product, vector in zip(products, vectors, strict=True):
            product += flat(torch.autograd.grad(gradient, parameters, vector, retain_graph=True))
    values = solution.eigenvalues
    values = torch.where(values.isfinite(), values, (vectors * products).sum(1))
    residuals = torch.linalg.vector_norm(products - values[:, None] * vectors, dim=1) / values.abs()
    return Judged(values.sort().values, residuals)


def input_eigenvalues_float64(model: nn.Module, x: Tensor) -> Tensor:
    """Return the largest eigenvalue (N,) of J' (diag p - p p') J, the input Hessian of a piecewise linear network."""
    model = copy.deepcopy(model).double()
    leaf = x.double().requires_grad_(True)
    logits = model(leaf)
    rows = [torch.autograd.grad(column.sum(), leaf, retain_graph=True)[0].flatten(1) for column in logits.unbind(1)]
    jacobian, p = torch.stack(rows, dim=1), logits.detach().softmax(1)
    root = torch.diag_embed(p.sqrt()) - p[:, :, None] * p.sqrt()[:, None, :]  # root root' = diag p - p p'
    singular: Tensor = torch.linalg.svdvals(root.mT @ jacobian)
    return singular[:, 0].square()
