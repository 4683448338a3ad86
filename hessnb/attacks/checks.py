"""What must hold of an attack's arguments; each fault names a remedy. Of samples and networks: `hessnb.checks`."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from hessnb.attacks.ball import Bounds
from hessnb.errors import InputError, unknown


def per_sample(name: str, value: float | Tensor, x: Tensor) -> Tensor:
    """Return a length as (N,), float64; raise InputError unless it is finite, not negative, and one or N numbers."""
    try:
        given = torch.as_tensor(value, dtype=torch.float64, device=x.device).detach()
    except (TypeError, ValueError, RuntimeError) as error:  # a text, numbers that are not alike
        raise InputError(f"{name} = {value!r}: it must be a number, or one for each sample") from error
    if given.shape not in ((), (len(x),)):
        raise InputError(f"{name} has shape {tuple(given.shape)}: give one number, or one for each of {len(x)} samples")
    if not bool((torch.isfinite(given) & (given >= 0)).all()):
        bad = given[~(torch.isfinite(given) & (given >= 0))].flatten()[0]
        raise InputError(f"{name} = {bad:g}: it must be 0 or positive, and finite; inputs are pixels in [0, 1]")
    return given.expand(len(x))


def inside(bounds: Bounds, x: Tensor) -> None:
    """Raise InputError for bounds that are none, and for inputs outside them, which clipping would change at once."""
    if bounds is None:
        return
    try:
        low, high = map(float, bounds)
    except (TypeError, ValueError, RuntimeError):
        raise InputError(
            f"bounds = {bounds}: give two numbers, the same for all channels; where channels are normalised each by "
            "its own, put the normalisation into the network's first layer"
        ) from None
    if not low < high:
        raise InputError(f"bounds = {bounds}: the lower bound must be below the upper; None does not clip")
    least, most = map(float, torch.aminmax(x.detach()))
    slack = 4 * torch.finfo(x.dtype).eps * max(abs(low), abs(high))  # what normalising in this precision rounds
    if least < low - slack or most > high + slack:
        raise InputError(
            f"the inputs go from {least:g} to {most:g}, outside the bounds {bounds}: scale them, put normalisation "
            "into the network's first layer, or give their bounds (None does not clip)"
        )


def among(kind: str, name: str, known: list[str]) -> None:
    """Raise InputError unless a name is known."""
    if name not in known:
        raise unknown(kind, name, known)


def warn_of_probabilities(outputs: Tensor) -> None:
    """Warn when all outputs (n, c) look like probabilities: a softmax too many hides the gradient from an attack."""
    sums = outputs.sum(1)
    if bool((outputs >= 0).all()) and bool(((sums - 1).abs() < 1e-5).all()):
        warnings.warn(
            "the model's outputs are not negative and add up to 1, as probabilities do; attacks need logits: leave the "
            "network's last softmax out, or the result may look more robust than it is",
            stacklevel=2,
        )
