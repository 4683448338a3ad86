"""The loss on the plane through a sample that two attacks span: what each step climbs, and which boundary it passes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hessnb.errors import InputError
from hessnb.models import inference
from hessnb.robustness import predictions

# How far the plane goes to each side, in lengths of the first step.
_REACH = 1.3


@dataclass(frozen=True)
class AttackPlane:
    """The ``losses`` (n, n) and ``classes`` (n, n) that a network gives at ``positions`` (n,) along two axes, the i-th
    of the first and the j-th of the second; the ``true`` class; and where two steps ``ends`` (2, 2) from the sample, at
    the origin. The unit is the length of the first step, which lies on the first axis.
    """

    positions: Tensor
    losses: Tensor
    classes: Tensor
    true: int
    ends: Tensor


def attack_plane(model: nn.Module, x: Tensor, y: Tensor, first: Tensor, second: Tensor, *, n: int = 81) -> AttackPlane:
    """Return the plane of one sample x (1, ...) with label y (1,) and of where two attacks lead it, shaped like x.

    Raises InputError where the two steps lie on one line.
    """
    a, b = ((end - x).flatten().double() for end in (first, second))
    unit = torch.linalg.vector_norm(a)
    along = F.normalize(a, dim=0, eps=0.0)
    across = b - (along @ b) * along
    if not float(torch.linalg.vector_norm(across)) > 1e-6 * float(unit) > 0:
        raise InputError("the two steps span no plane: one of them is zero, or they have the same direction")
    across = F.normalize(across, dim=0, eps=0.0)
    positions = torch.linspace(-_REACH, _REACH, n, dtype=torch.float64)
    i, j = torch.meshgrid(positions, positions, indexing="ij")
    places = unit * (i.reshape(-1, 1) * along + j.reshape(-1, 1) * across)
    points = (x.double().flatten() + places).to(x.dtype).view(-1, *x.shape[1:])
    with inference(model) as forward:
        logits = torch.cat([forward(part) for part in points.split(1000)])
    losses = F.cross_entropy(logits.double(), y.expand(len(logits)), reduction="none")
    ends = torch.tensor([[1.0, 0.0], [float(along @ b / unit), float(across @ b / unit)]], dtype=torch.float64)
    return AttackPlane(positions, losses.view(n, n), logits.argmax(1).view(n, n), int(y), ends)


def told_apart(model: nn.Module, x: Tensor, y: Tensor, first: Tensor, second: Tensor) -> int:
    """Return the number of the first sample that is right, still so at ``second`` (N, ...), and wrong at ``first``.

    Where there is none, the first sample that is right, or else 0.
    """
    right, kept, lost = predictions(model, x) == y, predictions(model, second) == y, predictions(model, first) != y
    for wanted in (right & kept & lost, right):
        if bool(wanted.any()):
            return int(wanted.nonzero()[0])
    return 0
