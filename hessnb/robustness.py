"""Is a network robust, and was it attacked well enough to say so? Accuracies with intervals, and a checklist.

References: N. Carlini and others, On evaluating adversarial robustness (2019); A. Athalye, N. Carlini, D. Wagner,
Obfuscated gradients give a false sense of security (2018).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hessnb.attacks import fgsm, pgd
from hessnb.checks import check_samples, finite_outputs
from hessnb.errors import InputError
from hessnb.models import inference
from hessnb.statistics import Interval, proportion
from hessnb.steps import Perturb

_BATCH = 1000
# By how much rounding may carry a sample out of its ball.
_SLACK = 1e-6


def predictions(model: nn.Module, x: Tensor) -> Tensor:
    """Return the most probable class (N,) of each sample, in eval mode.

    Raises InputError for outputs that are no logits (N, c), or not finite.
    """
    with inference(model) as forward:
        outputs = [forward(part) for part in x.split(_BATCH)]
    for part in outputs:
        if part.ndim != 2:
            raise InputError(f"the model's outputs have shape {tuple(part.shape)}: logits have (N, c)")
        finite_outputs(part)
    return torch.cat([part.argmax(1) for part in outputs])


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> Interval:
    """Return the share of samples (N, ...) whose label (N,) is predicted.

    Raises InputError for samples and labels that do not fit the network or each other, or are not finite.
    """
    check_samples(model, x, y, probes=0)
    return proportion(int((predictions(model, x) == y).sum()), len(y))


def agreement(first: Tensor, second: Tensor) -> Interval:
    """Return the share of samples on which two predictions (N,) agree; raise InputError for different shapes."""
    if first.shape != second.shape:
        raise InputError(f"predictions of {tuple(first.shape)} and {tuple(second.shape)}: compare the same samples")
    return proportion(int((first == second).sum()), len(first))


def accuracy_under(
    model: nn.Module, attack: Perturb, x: Tensor, y: Tensor, *, source: nn.Module | None = None
) -> Interval:
    """Return the accuracy on samples that are attacked on the network itself, or on ``source`` (transfer)."""
    return accuracy(model, attack(source or model, x, y), y)


def accuracy_curve(
    model: nn.Module, attack: Callable[..., Tensor], x: Tensor, y: Tensor, sizes: Sequence[float]
) -> list[Interval]:
    """Return the accuracy under ``attack(model, x, y, eps=size)`` for each size in pixel values."""
    return [accuracy(model, attack(model, x, y, eps=size), y) for size in sizes]


def transfer(models: Mapping[str, nn.Module], sets: Mapping[str, Tensor], y: Tensor) -> dict[str, dict[str, Interval]]:
    """Return the accuracy of each network on each set of perturbed samples, as in the paper's Tables 3 and 4."""
    return {network: {name: accuracy(model, x, y) for name, x in sets.items()} for network, model in models.items()}


def worst_case(model: nn.Module, attacked: Sequence[Tensor], y: Tensor) -> Interval:
    """Return the share of samples that are right under each one of several attacks: the per-sample worst case.

    ``attacked`` are the samples (N, ...) as each attack has perturbed them, ``y`` (N,) their labels. Raises InputError
    for no attack at all, and where `accuracy` does.
    """
    if not attacked:
        raise InputError("there are no attacked samples: give those of at least one attack")
    for x in attacked:
        check_samples(model, x, y, probes=0)
    right = torch.stack([predictions(model, x) == y for x in attacked]).all(0)
    return proportion(int(right.sum()), len(y))


@dataclass(frozen=True)
class Check:
    """One line of the checklist: what is asked, whether it holds, and the numbers that say so."""

    question: str
    passed: bool
    evidence: str


def checklist(
    model: nn.Module,
    attack: Callable[..., Tensor],
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    surrogate: nn.Module | None = None,
    generator: torch.Generator | None = None,
) -> list[Check]:
    """Return the checks of Carlini et al. (2019) for a network and an attack ``attack(model, x, y, eps=...)``.

    ``x`` (N, ...) are samples with pixels in [0, 1], ``y`` (N,) their labels, ``eps`` one radius in pixel values. The
    threat model is white-box, each pixel moved by at most ``eps`` and kept in [0, 1]. ``surrogate`` is another network
    of the same task, for the check that white-box attacks are at least as strong as transferred ones; without it that
    check is left out. ``generator`` draws the noise (seed 0 unless given). A check that fails says that the attack is
    weak here, not that the network is robust. Comparisons allow for the 95 % interval of the stronger side.

    Raises InputError for samples, labels and networks that do not fit together, and for what `hessnb.attacks.fgsm`
    refuses, such as pixels outside of [0, 1].
    """
    generator = generator or torch.Generator().manual_seed(0)
    clean = accuracy(model, x, y)
    own, step, walk = attack(model, x, y, eps=eps), fgsm(model, x, y, eps=eps), pgd(model, x, y, eps=eps, steps=20)
    farthest, lowest, highest = (float(v) for v in ((own - x).abs().max(), own.min(), own.max()))
    under, one_step, iterated = (accuracy(model, attacked, y) for attacked in (own, step, walk))
    doubled = accuracy(model, pgd(model, x, y, eps=eps, steps=40), y)
    sign = 2 * torch.randint(0, 2, x.shape, generator=generator).to(x) - 1
    noise = accuracy(model, (x + eps * sign).clamp(0, 1), y)
    far = accuracy(model, pgd(model, x, y, eps=0.5, steps=20), y)
    worst = worst_case(model, [own, step, walk], y)
    chance = float(y.bincount().max()) / len(y)
    checks = [
        Check("The network is accurate without an attack", clean.low > chance, f"clean {clean:.3f}"),
        Check(
            "The attack keeps to its size and to [0, 1]",
            farthest <= eps + _SLACK and lowest >= 0 and highest <= 1,
            f"moved by up to {farthest:.3g} of {eps:g}, values from {lowest:.3g} to {highest:.3g}",
        ),
        Check("The attack lowers the accuracy", under.high < clean.value, f"clean {clean:.3f}, attacked {under:.3f}"),
        Check(
            "It is at least as strong as random signs of the same size",
            under.low <= noise.value,
            f"noise {noise:.3f}, attack {under:.3f}",
        ),
        Check(
            "Iterating is at least as strong as one step",
            iterated.low <= one_step.value,
            f"FGSM {one_step:.3f}, 20 steps {iterated:.3f}",
        ),
        Check(
            "It is as strong as 20 iterated steps",
            under.low <= iterated.high,
            f"attack {under:.3f}, 20 steps {iterated:.3f}",
        ),
        Check(
            "Twice the steps find no more",
            doubled.high >= iterated.low,
            f"20 steps {iterated:.3f}, 40 steps {doubled:.3f}",
        ),
        Check("An unbounded attack succeeds on nearly all samples", far.value < 0.05, f"eps 0.5: {far:.3f}"),
        Check(
            "It is the worst case over all attacks tried",
            under.low <= worst.high,
            f"attack {under:.3f}, worst case {worst:.3f}",
        ),
    ]
    if surrogate is not None:
        moved = attack(surrogate, x, y, eps=eps)
        other = accuracy(model, moved, y)
        told = f"transferred {other:.3f}, white-box {under:.3f}"
        checks.append(Check("White-box is at least as strong as transfer", under.low <= other.value, told))
    return checks
