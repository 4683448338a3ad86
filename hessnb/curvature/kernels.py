"""The convolution in float64 on a CPU, in about half of the time that PyTorch's takes; the same up to rounding.

PyTorch unrolls all images at once, which leaves the processor's cache. What is not an ordinary convolution of images
goes to PyTorch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# stride, padding, dilation, transposed, output padding, groups: as torch.convolution takes them
Geometry = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], bool, tuple[int, ...], int]

# Bytes of unrolled images at a time, which the product is to find in the cache.
_AT_A_TIME = 2**20


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """Return ``torch.convolution(x, weight, bias, *geometry)``."""
    stride, padding, dilation, *_ = geometry
    if not _is_ordinary(x, weight, geometry):
        return torch.convolution(x, weight, bias, *geometry)
    padded = F.pad(x, (padding[1], padding[1], padding[0], padding[0])) if any(padding) else x
    height, width = (
        (size - d * (k - 1) - 1) // s + 1
        for size, k, s, d in zip(padded.shape[2:], weight.shape[2:], stride, dilation, strict=True)
    )
    n, channels, down, right = padded.stride()
    patches = padded.as_strided(
        (len(x), *weight.shape[1:], height, width),
        (n, channels, down * dilation[0], right * dilation[1], down * stride[0], right * stride[1]),
    )
    rows = weight.flatten(1)
    out = x.new_empty(len(x), len(rows), height, width)
    images = max(1, _AT_A_TIME // (8 * rows.shape[1] * height * width))
    for part, result in zip(patches.split(images), out.flatten(2).split(images), strict=True):
        torch.matmul(rows, part.reshape(len(part), rows.shape[1], height * width), out=result)
    return out if bias is None else out.add_(bias[:, None, None])


def _is_ordinary(x: Tensor, weight: Tensor, geometry: Geometry) -> bool:
    """Return whether this is a convolution of float64 images on a CPU without groups, that has a result.

    Nor may autograd look on, as it does for third derivatives: it cannot see through what is done in place.
    """
    if x.device.type != "cpu" or x.dtype != torch.float64 or weight.dtype != torch.float64 or x.ndim != 4:
        return False
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return False
    stride, padding, dilation, transposed, _, groups = geometry
    if transposed or groups != 1 or x.shape[1] != weight.shape[1] or min(x.numel(), weight.numel()) == 0:
        return False
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, weight.shape[2:], strict=True)]
    room = (size + 2 * p >= r for size, p, r in zip(x.shape[2:], padding, reach, strict=True))
    return all(room) and min(padding) >= 0 and min(*stride, *dilation) > 0
