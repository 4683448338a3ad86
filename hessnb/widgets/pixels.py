"""Pictures as data URIs of small PNG files."""

from __future__ import annotations

import base64
import io

import matplotlib
import numpy as np
from PIL import Image
from torch import Tensor

_LEVELS = 33  # of the diverging colours: odd, so that no change is white


def picture(image: Tensor) -> str:
    """Return an image (C, H, W) in [0, 1], of one channel or three, as a data URI."""
    values = (image.detach().cpu().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    return _uri(Image.fromarray(values.squeeze(2) if values.shape[2] == 1 else values))


def change(difference: Tensor) -> str:
    """Return a difference of images (C, H, W), averaged over the channels, as a data URI: red is more, blue less.

    The colours are scaled to the largest entry.
    """
    flat = difference.detach().cpu().double().mean(0).numpy()
    scaled = flat / max(float(np.abs(flat).max()), np.finfo(float).tiny)
    levels = np.round((scaled + 1) / 2 * (_LEVELS - 1)).astype(np.uint8)
    image = Image.fromarray(levels, mode="P")
    colours = matplotlib.colormaps["RdBu_r"](np.linspace(0, 1, _LEVELS))[:, :3]
    image.putpalette((colours * 255).round().astype(np.uint8).tobytes())
    return _uri(image)


def _uri(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
