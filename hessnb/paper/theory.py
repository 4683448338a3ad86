"""Section 2 checked on a trained network: definiteness and rank of the input Hessian, sample by sample."""

from __future__ import annotations

from functools import lru_cache

import pandas as pd
import torch
from torch import Tensor

from hessnb import data
from hessnb.models import build
from hessnb.paper.checks import RANK_THRESHOLD, input_eigenvalues
from hessnb.training import Recipe, train

# The fewest of which "none" has an upper bound below one in ten (Wilson), rounded up.
_SAMPLES = 36


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
    ranks = (eigenvalues.abs() > RANK_THRESHOLD * largest[:, None]).sum(dim=1)
    indefinite = eigenvalues.amin(dim=1) < -RANK_THRESHOLD * largest
    return pd.DataFrame({"indefinite": indefinite.int().tolist(), "rank_above": (ranks > classes - 1).int().tolist()})
