"""Adversarial attacks: pure functions of a network, samples and labels, on one loop (the paper's section 2, Table 5).

``attack(model, x, y, *, eps, ...)`` returns perturbed samples (N, ...) in the dtype of x; ``attack.record(...)``, with
the same arguments, a `Perturbation` that also says what happened to each. `autoattack`, which calls another package, is
a function without a record, bounds or a precision. The others have all these arguments in common:

    model       a classifier that returns logits (N, c)
    x, y        samples (N, ...) of d entries each, and integer labels (N,)
    eps         the radius in pixel values, one or (N,); L2 attacks take it times sqrt(d) unless ``scale="unit"``;
                `autoattack` takes one, as it is
    bounds      what samples are clipped to, (0, 1) unless given; None does not clip
    precision   "float64"; "own" for the network's: faster, and a few signs of the gradient differ; "plain" for the
                network's and the loss as it stands, where a confident sample loses the true class's part of the
                gradient to rounding (p_y - 1 is 0): what most code computes, and a weaker attack
    batch_size  how many samples are worked on at a time; the result does not depend on it

The network is evaluated in eval mode and left as it was: parameters, buffers, ``.grad``, each module's mode and the
global random state. A sample whose direction is zero is returned unchanged.

All raise InputError for an eps that is negative, NaN or of another shape, inputs outside the bounds, bounds in the
wrong order, labels that are no class, mixed devices or dtypes, NaN, and samples that depend on each other, and warn of
outputs that are probabilities.
"""

from collections.abc import Callable

from torch import Tensor

from hessnb.attacks.auto import autoattack
from hessnb.attacks.first_order import fgsm, fgsm_iterated, l2_gradient, pgd
from hessnb.attacks.loop import Attack, Perturbation
from hessnb.attacks.second_order import damped_newton, fhsm, l2_hessian, nearest_class

# The paper's names, as its Table 5 has them.
ATTACKS: dict[str, Callable[..., Tensor]] = {
    "FGSM": fgsm,
    "FGSM-10": fgsm_iterated,
    "L2GRAD": l2_gradient,
    "FHSM": fhsm,
    "L2HESS": l2_hessian,
}

# Further attacks of equal size: iterated, and the two that section 3.4 leaves as future work.
BEYOND: dict[str, Callable[..., Tensor]] = {
    "PGD": pgd,
    "DAMPED": damped_newton,
    "NEAREST": nearest_class,
}

__all__ = [
    "ATTACKS",
    "BEYOND",
    "Attack",
    "Perturbation",
    "autoattack",
    "damped_newton",
    "fgsm",
    "fgsm_iterated",
    "fhsm",
    "l2_gradient",
    "l2_hessian",
    "nearest_class",
    "pgd",
]
