"""Where an attack may go: within a radius of each sample, and within the bounds of a pixel."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Norm = Literal["linf", "l2"]
Bounds = tuple[float, float] | None


@dataclass(frozen=True)
class Ball:
    """The points within ``radius`` (n,) of ``centre`` (n, ...) in the ``norm``, and within ``bounds`` if there are any.

    The centre lies within the bounds, so clipping leaves no ball.
    """

    centre: Tensor
    radius: Tensor
    norm: Norm
    bounds: Bounds

    def step(self, x: Tensor, along: Tensor, length: Tensor) -> Tensor:
        """Return where steps of ``length`` (n,) from x (n, ...) along directions (n, d) of any length end."""
        unit = along.sign() if self.norm == "linf" else normalised(along)
        return self.project(torch.addcmul(x.flatten(1), length[:, None], unit).view_as(x))

    def project(self, x: Tensor) -> Tensor:
        """Return the nearest points of the ball, clipped."""
        offset = (x - self.centre).flatten(1)
        radius = self.radius[:, None]
        if self.norm == "linf":
            offset.clamp_(-radius, radius)
        else:
            norm = torch.linalg.vector_norm(offset, dim=1, keepdim=True)
            offset *= torch.where(norm > radius, radius / norm, 1.0)
        x = offset.view_as(x).add_(self.centre)
        return x if self.bounds is None else x.clamp_(*self.bounds)

    def inside(self, noise: Tensor) -> Tensor:
        """Return the points of the ball that belong to points (n, d) of the unit ball, clipped."""
        return self.project(self.centre + (self.radius[:, None] * noise.to(self.centre)).view_as(self.centre))


def unit_ball(n: int, d: int, norm: Norm, generator: torch.Generator) -> Tensor:
    """Return n points (n, d) drawn uniformly from the unit ball, float64; a generator of the CPU for any device."""
    if norm == "linf":
        return 2 * torch.rand(n, d, dtype=torch.float64, generator=generator) - 1
    way = normalised(torch.randn(n, d, dtype=torch.float64, generator=generator))
    distance: Tensor = torch.rand(n, 1, dtype=torch.float64, generator=generator) ** (1 / d)
    return distance * way


def normalised(v: Tensor) -> Tensor:
    """Return vectors (n, d) of length one in the same directions, however short they are; zero stays zero."""
    largest = torch.linalg.vector_norm(v, ord=math.inf, dim=1, keepdim=True)
    v = torch.where(largest > 0, v / largest, 0.0)
    length = torch.linalg.vector_norm(v, dim=1, keepdim=True)
    return torch.where(length > 0, v / length, 0.0)
