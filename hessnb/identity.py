"""What makes a network, or a loss, what it is: its layers, their settings and its tensors, and the digest of these."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

# The attributes that PyTorch itself gives every layer.
_EVERY_LAYERS = vars(nn.Module()).keys()


def of_network(model: nn.Module) -> list[object]:
    """Return what makes a network what it is: its layers, their settings, and parameters and buffers with names."""
    return [*architecture(model), *itertools.chain.from_iterable(tensors(model).items())]


def of_loss(loss_fn: Callable[[Tensor, Tensor], Tensor]) -> list[object]:
    """Return what can be seen of a loss function."""
    if isinstance(loss_fn, nn.Module):
        return [type(loss_fn).__qualname__, *of_network(loss_fn)]
    if isinstance(loss_fn, partial):
        return [*of_loss(loss_fn.func), *_settings("", (loss_fn.args, loss_fn.keywords))]
    return [getattr(loss_fn, "__qualname__", type(loss_fn).__qualname__)]


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return all parameters and buffers by name, detached: what is written to them is written to the model."""
    return {name: tensor.detach() for name, tensor in (*model.named_parameters(), *model.named_buffers())}


def architecture(model: nn.Module) -> list[object]:
    """Return what a network is beside its parameters and buffers: its layers and the settings that they hold.

    Settings are the numbers, texts, tensors and functions (by their names) among a layer's attributes, also in lists,
    tuples and dictionaries. What `digest` makes of it is alike for networks that are alike.
    """
    found: list[object] = [repr(model)]
    for place, module in model.named_modules():
        own = {name: value for name, value in sorted(vars(module).items()) if name not in _EVERY_LAYERS}
        found += _settings(place, own)
    return found


def digest(parts: Iterable[object]) -> str:
    """Return the SHA-256 of the parts in their order: tensors by dtype, shape and bits, all else by its repr."""
    digest = hashlib.sha256()
    for part in parts:
        label = f"{part.dtype} {tuple(part.shape)}" if isinstance(part, Tensor) else repr(part)
        digest.update(f"{len(label)} {label}".encode())
        if isinstance(part, Tensor):
            digest.update(part.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _settings(place: str, value: object) -> list[object]:
    """Return the places and values of all settings in an attribute; see `architecture`."""
    if isinstance(value, Mapping):
        return [part for name, item in value.items() for part in _settings(f"{place}.{name}", item)]
    if isinstance(value, list | tuple):
        return [part for i, item in enumerate(value) for part in _settings(f"{place}.{i}", item)]
    told = getattr(value, "__qualname__", value)
    return [place, told] if isinstance(told, bool | int | float | complex | str | torch.dtype | Tensor | None) else []
