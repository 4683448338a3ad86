"""Numerical checks of the paper's theory (section 2, appendix A.1), laid out for the reader."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from hessnb.curvature import input_hessian
from hessnb.paper.tables import Table

# An eigenvalue counts when it is above this share of the largest: far above float64 rounding, far below a signal.
RANK_THRESHOLD = 1e-10


def input_eigenvalues(model: nn.Module, x: Tensor, y: Tensor, *, train_mode: bool = False) -> Tensor:
    """Return all eigenvalues (N, d), descending, of the input Hessian of each sample, from dense float64 matrices."""
    double = copy.deepcopy(model).double()
    hessian = input_hessian(double, x.double(), y, train_mode=train_mode)
    eigenvalues: Tensor = torch.linalg.eigvalsh((hessian + hessian.mT) / 2)
    return eigenvalues.flip(-1)


def saddle_free(cases: Mapping[str, tuple[Tensor, int]], *, name: str, caption: str) -> Table:
    """Return, for eigenvalues (N, d) and a number of classes by case, the extremes and the ranks over the N samples.

    The smallest eigenvalue is given relative to the largest of its own sample, so that rounding stands at 1e-16.
    """
    rows = []
    for label, (eigenvalues, classes) in cases.items():
        largest = eigenvalues.abs().amax(dim=1)
        smallest = (eigenvalues.amin(dim=1) / largest).min().item()
        ranks = (eigenvalues.abs() > RANK_THRESHOLD * largest[:, None]).sum(dim=1)
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


def with_activation(model: nn.Module, activation: nn.Module) -> nn.Module:
    """Return a copy of ``model`` with the same weights in which every ReLU module is ``activation``."""
    changed = copy.deepcopy(model)
    for module in list(changed.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU):
                setattr(module, name, copy.deepcopy(activation))
    return changed
