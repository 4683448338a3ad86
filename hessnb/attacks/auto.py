"""AutoAttack (Croce and Hein, 2020), by the package pyautoattack, which is imported when it is needed."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hessnb.attacks import checks
from hessnb.attacks.ball import Norm
from hessnb.checks import check_samples
from hessnb.errors import InputError, whole_number
from hessnb.models import evaluation

# What is said where the package is not installed.
MISSING = "autoattack needs the package pyautoattack: pip install 'hessnb[attacks]'"

_STANDARD = ("apgd-ce", "apgd-t", "fab-t", "square")
_NORMS = {"linf": "Linf", "l2": "L2"}


def autoattack(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    norm: Norm = "linf",
    attacks: Sequence[str] = _STANDARD,
    seed: int = 0,
    batch_size: int = 250,
) -> Tensor:
    """Return x (N, ...), but samples that AutoAttack gets misclassified within ``eps`` as it changed them.

    The four attacks of the standard version run in turn, each on the samples that withstood the ones before it. Inputs
    (N, C, H, W) in [0, 1], ``eps`` one radius in pixel values (L2: not scaled), in the network's precision, float32.
    Needs the extra: pip install 'hessnb[attacks]'. Raises InputError where it is not installed, for fewer classes than
    an attack needs, and for what the other attacks refuse.
    """
    try:
        from pyautoattack import AutoAttack
    except ImportError as error:
        raise InputError(MISSING) from error
    check_samples(model, x, y)
    checks.inside((0.0, 1.0), x)
    if isinstance(eps, Tensor):
        raise InputError(f"eps has shape {tuple(eps.shape)}: AutoAttack takes one radius for all samples, a float")
    if x.ndim != 4:
        raise InputError(f"inputs of shape {tuple(x.shape)}: AutoAttack takes images (N, C, H, W)")
    whole_number("batch_size", batch_size)
    checks.per_sample("eps", eps, x)
    checks.among("norm", norm, list(_NORMS))
    if not attacks:
        raise InputError(f"attacks is empty: name one at least of {', '.join(_STANDARD)}")
    for name in attacks:
        checks.among("attack", name, [*_STANDARD, "apgd-dlr", "fab"])
    if x.dtype != torch.float32:
        raise InputError(f"the network and the inputs are {x.dtype}: AutoAttack computes in float32, use .float()")
    trace = sys.gettrace()  # which the package's check for dynamic defences takes away
    try:
        with evaluation(model):
            with torch.no_grad():
                logits = model(x[:2].clone())
            checks.warn_of_probabilities(logits)
            classes = logits.shape[1]
            if classes < 4 and {"apgd-t", "apgd-dlr"} & set(attacks):
                raise InputError(
                    f"{classes} classes: AutoAttack's DLR loss needs four; use attacks=('apgd-ce', 'fab', 'square')"
                )
            auto = AutoAttack(
                lambda part: model(part.clone()),  # which may work in place
                attacks=list(attacks), device=x.device, eps=eps, norm=_NORMS[norm], seed=seed, version="custom",
            )  # fmt: skip
            # What version="standard" sets, and not more targets than there are other classes.
            for attack in (auto.apgd, auto.fab, auto.apgd_targeted):
                attack.n_restarts = 1
            auto.fab.n_target_classes = auto.apgd_targeted.n_target_classes = min(9, classes - 1)
            images = x.detach().clone(memory_format=torch.contiguous_format)  # it takes no other layout
            found, _ = auto.run_standard_evaluation(images, y.long(), batch_size=batch_size)
    finally:
        sys.settrace(trace)
    result: Tensor = found.detach()
    return result
