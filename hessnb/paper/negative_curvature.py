"""Where the negative curvature of section 3.3 comes from: extreme eigenvalues, and their Gauss-Newton part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hessnb import training
from hessnb.curvature import GGNOperator, HessianOperator, lanczos
from hessnb.data import Split
from hessnb.experiments.measure import hessian_batch
from hessnb.experiments.networks import load_split, trained_model
from hessnb.experiments.results import Outcome
from hessnb.experiments.spec import RunSpec
from hessnb.experiments.store import Store
from hessnb.models import layers
from hessnb.paper.adversarial import network_name
from hessnb.paper.landscapes import sample_losses
from hessnb.paper.tables import Table
from hessnb.precision import full_precision


@dataclass(frozen=True)
class Extreme:
    """An extreme eigenvalue of a Hessian H = G + R, and its two parts v^T G v and v^T R v; v is its eigenvector."""

    eigenvalue: float
    gauss_newton: float
    rest: float


def extremes(model: nn.Module, samples: Split) -> tuple[Extreme, Extreme]:
    """Return the largest and the smallest eigenvalue of the Hessian of the mean loss over some samples, in parts.

    G is the Gauss-Newton matrix, R = sum_k (p_k - y_k) d^2 s_k / d theta^2 the rest, s_k being the logits. The model
    decides the precision.
    """
    batches = samples.batches(hessian_batch(model, samples))
    hessian, gauss_newton = (operator(model, F.cross_entropy, batches) for operator in (HessianOperator, GGNOperator))
    found = []
    for which in ("LA", "SA"):
        solved = lanczos(hessian, 1, 1e-3, which)
        value, v = float(solved.eigenvalues[0]), solved.eigenvectors[0]
        part = float(v @ gauss_newton.matvec(v))
        found.append(Extreme(value, part, value - part))
    return found[0], found[1]


def within_layers(model: nn.Module, samples: Split, names: Sequence[str]) -> float:
    """Return the largest |(H - G) v| among the diagonal blocks of these layers over the largest |G v|, v being random.

    Zero but for rounding if the logits are linear in the parameters of each one layer, as in a ReLU network.
    """
    batches, rests, products = samples.batches(hessian_batch(model, samples)), [], []
    for layer in names:
        hessian, gauss_newton = (
            operator(model, F.cross_entropy, batches, parameters=[layer]) for operator in (HessianOperator, GGNOperator)
        )
        v = torch.randn(hessian.shape[0], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        product = gauss_newton.matvec(v)
        rests.append(float(torch.linalg.vector_norm(hessian.matvec(v) - product)))
        products.append(float(torch.linalg.vector_norm(product)))
    return max(rests) / max(products)


def parts_of_curvature(spec: RunSpec, cases: Mapping[str, Split], *, store: Store, name: str, caption: str) -> Table:
    """Return the extreme eigenvalues over each case's samples, in the two parts of `extremes`; all in float64."""
    model = trained_model(store, spec).double()
    rows = []
    for label, samples in cases.items():
        samples = Split(samples.images.double(), samples.labels)
        cells = [f"{training.evaluate(model, samples)[0]:.2g}"]
        for extreme in extremes(model, samples):
            cells += [f"{v:.3g}" for v in (extreme.eigenvalue, extreme.gauss_newton, extreme.rest)]
        within = within_layers(model, samples, list(layers(spec.model.name, variant=spec.model.variant)))
        rows.append((label, *cells, f"{within:.0e}" if within else "0"))
    header = ("Samples", "Loss", "Largest", "from G", "from R", "Smallest", "from G", "from R", "R within layers")
    return Table(name, caption, header, tuple(rows))


def hardest(model: nn.Module, split: Split) -> Split:
    """Return the one sample of a split with the largest loss."""
    worst = sample_losses(model, split).argmax().reshape(1)
    return Split(split.images[worst], split.labels[worst])


def lowest_curvature(
    outcomes: Sequence[Outcome], *, device: str = "cpu", store: str | Path | None = None, name: str, caption: str
) -> Table:
    """Return the smallest eigenvalue of each network's full training Hessian, to one per cent, and the gradient's norm.

    Found by asking for the smallest, which the top 20 by magnitude need not hold.
    """
    rows = []
    for outcome in outcomes:
        spec = outcome.task.spec
        model = trained_model(Store(store), spec, device)
        split = load_split(spec, "train", torch.device(device))
        hessian = HessianOperator(model, F.cross_entropy, split.batches(hessian_batch(model, split)))
        found = lanczos(hessian, 1, 1e-2, "SA")
        top = outcome.eigenvalues("train")
        rows.append(
            (
                network_name(spec),
                f"{found.eigenvalues[0]:.3g}",
                f"{found.residuals[0]:.0e}",
                f"{top[0]:.3g}",
                f"{min(map(abs, top)):.3g}",
                f"{float(torch.linalg.vector_norm(_gradient(model, split))):.2g}",
            )
        )
    ranks = ", ".join(dict.fromkeys(str(len(outcome.eigenvalues("train"))) for outcome in outcomes)) or "–"
    header = ("Network", "Smallest of all", "Residual", "λ₁", f"|λ| of rank {ranks}", "Norm of the gradient")
    return Table(name, caption, header, tuple(rows))


def _gradient(model: nn.Module, split: Split) -> Tensor:
    """Return the gradient (n,) of the mean loss, float64."""
    parameters = list(model.parameters())
    total = torch.zeros(sum(p.numel() for p in parameters), dtype=torch.float64, device=parameters[0].device)
    with full_precision():
        for x, y in split.batches(hessian_batch(model, split)):
            parts = torch.autograd.grad(F.cross_entropy(model(x), y, reduction="sum"), parameters)
            total += torch.cat([part.flatten() for part in parts]).double()
    return total / len(split)
