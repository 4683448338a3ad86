"""The networks and data that a specification stands for."""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from hessnb import data, models
from hessnb.attacks import ATTACKS, BEYOND, autoattack
from hessnb.errors import InputError
from hessnb.experiments.spec import AUTOATTACK, AttackSpec, DataSpec, RunSpec, SplitName
from hessnb.experiments.store import Store
from hessnb.steps import Perturb

# The fields of an `AttackSpec` that are arguments of the attack where they are given.
_SETTINGS = ("cg_steps", "solver", "scale", "precision", "restarts")


@lru_cache(maxsize=2)
def load_data(spec: DataSpec, device: str) -> data.Splits:
    """Return the data of a specification on a device; the last two are kept in memory."""
    return data.load(spec.name, n_train=spec.n_train, n_test=spec.n_test, device=device)


def load_split(spec: RunSpec, name: SplitName, device: torch.device) -> data.Split:
    """Return the split of this name of the data that a run is trained on."""
    splits = load_data(spec.data, str(device))
    return splits.train if name == "train" else splits.test


def drawn(n: int, samples: int, draw: int) -> Tensor:
    """Return the indices (samples,) of a sub-sampled Hessian among ``n`` samples: the same for the same draw.

    Raises InputError for more samples than there are.
    """
    if samples > n:
        raise InputError(f"a sub-sampled Hessian of {samples} samples: the set has only {n:,}")
    return torch.randperm(n, generator=torch.Generator().manual_seed(draw))[:samples]


def new_model(spec: RunSpec, num_classes: int) -> nn.Module:
    """Return the untrained network of ``spec``, its initial weights drawn from the recipe's seed."""
    return models.build(
        spec.model.name,
        num_classes=num_classes,
        width=1.0 if spec.model.width is None else spec.model.width,
        variant=spec.model.variant,
        seed=spec.recipe.seed,
    )


def trained_model(store: Store, spec: RunSpec, device: torch.device | str = "cpu") -> nn.Module:
    """Return the trained network of ``spec`` in eval mode; raise InputError if the store does not have it."""
    weights = store.weights(spec)
    model = new_model(spec, len(load_data(spec.data, str(device)).classes))
    model.load_state_dict(weights)
    return model.to(device).eval()


def attack_function(attack: AttackSpec) -> Perturb:
    """Return the attack of a specification with its settings: a function of network, inputs and labels."""
    if attack.method == AUTOATTACK:  # which always clips to the pixels' range
        return partial(autoattack, eps=attack.eps)
    settings: dict[str, Any] = {"eps": attack.eps, "bounds": (0.0, 1.0) if attack.clip else None}
    settings |= {name: value for name in _SETTINGS if (value := getattr(attack, name)) is not None}
    return partial((ATTACKS | BEYOND)[attack.method], **settings)
