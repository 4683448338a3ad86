"""Section 2 and appendix A.1 checked on networks: definiteness and rank of the input Hessian of each sample."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import lru_cache

import pandas as pd
import torch
from torch import Tensor, nn

from hessnb import data
from hessnb.curvature import input_hessian
from hessnb.models import build
from hessnb.paper.tables import Table
from hessnb.training import Recipe, train

# An eigenvalue counts when it is above this share of the largest: a hundred times float64 rounding.
RANK_THRESHOLD = 1e-13

# The fewest of which "none" has an upper bound below one in ten (Wilson), rounded up.
_SAMPLES = 36


def input_eigenvalues(model: nn.Module, x: Tensor, y: Tensor, *, train_mode: bool = False) -> Tensor:
    """Return all eigenvalues (N, d), descending, of the input Hessian of each sample, from dense float64 matrices."""
    double = copy.deepcopy(model).double()
    hessian = input_hessian(double, x.double(), y, train_mode=train_mode)
    eigenvalues: Tensor = torch.linalg.eigvalsh((hessian + hessian.mT) / 2)
    return eigenvalues.flip(-1)


def numerical_ranks(eigenvalues: Tensor) -> Tensor:
    """Return of each sample's eigenvalues (N, d) how many (N,) are not zero, beside its largest."""
    largest = eigenvalues.abs().amax(dim=1)
    return (eigenvalues.abs() > RANK_THRESHOLD * largest[:, None]).sum(dim=1)


def saddle_free(cases: Mapping[str, tuple[Tensor, int]], *, name: str, caption: str) -> Table:
    """Return, for eigenvalues (N, d) and a number of classes by case, the extremes and the ranks over the N samples.

    The smallest eigenvalue is given relative to the largest of its own sample, so that rounding stands at 1e-16.
    """
    rows = []
    for label, (eigenvalues, classes) in cases.items():
        largest = eigenvalues.abs().amax(dim=1)
        # Of a Hessian that is zero, as where no ReLU is active, all eigenvalues are.
        smallest = (eigenvalues.amin(dim=1) / torch.where(largest > 0, largest, 1.0)).min().item()
        ranks = numerical_ranks(eigenvalues)
        verdict = "yes" if smallest > -RANK_THRESHOLD else "no"
        low, high = int(ranks.min()), int(ranks.max())
        rows.append(
            (
                label,
                str(len(eigenvalues)),
                str(eigenvalues.shape[1]),
                f"{smallest:.1e}",
                verdict,
                f"{low}" if low == high else f"{low} to {high}",
                str(classes),
            )
        )
    header = ("Network", "Samples", "d", "min λ / max |λ|", "PSD", "Rank", "Classes c")
    return Table(name, caption, header, tuple(rows))


def bend_of_logits(model: nn.Module, x: Tensor, *, step: float = 1e-7) -> Tensor:
    """Return (N,) by how much the logits bend within ``step`` of each sample, as a share of how much they change.

    Their second difference over their first, along a random direction of length ``step``, in float64: zero up to
    rounding inside a linear piece, of the order of one on a kink, where the logits have no derivative.
    """
    double, x = copy.deepcopy(model).double().eval(), x.detach().double()
    direction = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(0)).to(x.device)
    direction *= step / torch.linalg.vector_norm(direction.flatten(1), dim=1).view(-1, *[1] * (x.ndim - 1))
    with torch.no_grad():
        behind, here, ahead = (double(point) for point in (x - direction, x, x + direction))
    second, first = ahead - 2 * here + behind, (ahead - behind) / 2
    share: Tensor = torch.linalg.vector_norm(second, dim=1) / torch.linalg.vector_norm(first, dim=1)
    return share


def with_activation(model: nn.Module, activation: nn.Module) -> nn.Module:
    """Return a copy of ``model`` with the same weights in which every ReLU module is ``activation``."""
    changed = copy.deepcopy(model)
    for module in list(changed.modules()):
        for name, child in module._modules.items():  # also where the same one is used twice
            if isinstance(child, nn.ReLU):
                setattr(module, name, copy.deepcopy(activation))
    return changed


@lru_cache
def checked_samples() -> pd.DataFrame:
    """Return one row a test digit: whether its input Hessian has a negative eigenvalue, and a rank above c - 1.

    All eigenvalues of the dense 784 x 784 matrix in float64, for a narrow M1 that is trained here for three epochs.
    """
    digits = data.load("mnist5k", n_train=600, n_test=_SAMPLES)
    model = build("M1", width=0.2, seed=0)
    train(model, digits, Recipe(batch_size=20, lr=0.05, momentum=0.9, max_epochs=3, seed=0))
    eigenvalues = torch.cat([input_eigenvalues(model.eval(), x, y) for x, y in digits.test.batches(18)])
    return violations(eigenvalues, len(digits.classes)).assign(network="M1", profile="computed for this page")


def violations(eigenvalues: Tensor, classes: int) -> pd.DataFrame:
    """Return for each sample's eigenvalues (N, d) whether one is negative, and whether more than c - 1 are not zero."""
    largest = eigenvalues.abs().amax(dim=1)
    ranks = numerical_ranks(eigenvalues)
    indefinite = eigenvalues.amin(dim=1) < -RANK_THRESHOLD * largest
    return pd.DataFrame({"indefinite": indefinite.int().tolist(), "rank_above": (ranks > classes - 1).int().tolist()})
