"""Where an attack may go: within a radius of each sample, and within the bounds of a pixel."""

from __future__ import annotations

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
        return self.project(x + (length[:, None] * unit).view_as(x))

    def project(self, x: Tensor) -> Tensor:
        """Return the nearest points of the ball, clipped."""
        offset = (x - self.centre).flatten(1)
        radius = self.radius[:, None]
        if self.norm == "linf":
            offset = offset.clamp(-radius, radius)
        else:
            norm = torch.linalg.vector_norm(offset, dim=1, keepdim=True)
            offset = torch.where(norm > radius, offset * (radius / norm), offset)
        x = self.centre + offset.view_as(x)
        return x if self.bounds is None else x.clamp(*self.bounds)

    def random(self, generator: torch.Generator) -> Tensor:
        """Return points drawn uniformly from the ball, then clipped; one generator of the CPU for any device."""
        n, d = self.centre.flatten(1).shape
        draw = {"dtype": torch.float64, "generator": generator}
        if self.norm == "linf":
            offset = 2 * torch.rand(n, d, **draw) - 1  # type: ignore[call-overload]
        else:
            offset = normalised(torch.randn(n, d, **draw))  # type: ignore[call-overload]
            offset = offset * torch.rand(n, 1, **draw) ** (1 / d)  # type: ignore[call-overload]
        return self.project(self.centre + (self.radius[:, None] * offset.to(self.centre)).view_as(self.centre))


def normalised(v: Tensor) -> Tensor:
    """Return vectors (n, d) of length one in the same directions, however short they are; zero stays zero."""
    largest = v.abs().amax(1, keepdim=True)
    v = torch.where(largest > 0, v / largest, 0.0)
    length = torch.linalg.vector_norm(v, dim=1, keepdim=True)
    return torch.where(length > 0, v / length, 0.0)
