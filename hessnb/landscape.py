"""The loss of a network along a direction, on a plane, and between two networks (Figs 2 to 4, 6 to 10, 12, 13).

At each point the network, in eval mode, is evaluated over one or several whole data sets: ``loss_fn(model(x), y)`` is
a batch mean, batches are weighted by their size, sums are taken in float64. Weights are placed in float64 and rounded
once to the network's precision; TF32 is off. The work is done on a copy: the model that was given keeps its parameters,
buffers, ``.grad`` and modes, and no global random state is used.

With ``keep`` every finished point is a line of a text file, and a rerun computes only the points that are not in it.
The first line holds a SHA-256 of all that determines a point: networks with the settings of their layers, directions,
data and their batches, and the loss: the settings of a module or of a partial function, else its name. What a function
closes over is not seen, so give each variant a file of its own. The positions are not part of it: a finer grid finds
the points of a coarser one. One process at a time writes to a file.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from hessnb.checks import each_batch, independent_samples, is_mean, loss_of, varied
from hessnb.errors import InputError, unknown
from hessnb.identity import digest, of_loss, of_network, tensors
from hessnb.models import cuda_devices, inference
from hessnb.points import Point, PointFile, Values
from hessnb.precision import full_precision

LossFunction = Callable[[Tensor, Tensor], Tensor]
Sets = Mapping[str, Iterable[tuple[Tensor, Tensor]]]
Axis = Tensor | Sequence[float]
Keep = str | os.PathLike[str] | None
Progress = Callable[[int, int], None] | None


@dataclass(frozen=True)
class Landscape:
    """Losses at the points of a line or of a grid, all float64 on the CPU.

    ``axes``: the coordinates, one vector (p,) for a line and two, (p,) and (q,), for a plane; ``losses``: the mean loss
    over each data set, (p,) or (p, q); ``accuracies``: likewise the fraction of its samples classified correctly, NaN
    where the labels are not an int64 vector (N,) or the output is not (N, c) with c > 1. A loss may be infinite or
    NaN: far from a minimum that is its value.
    """

    axes: tuple[Tensor, ...]
    losses: dict[str, Tensor]
    accuracies: dict[str, Tensor]


def along(
    model: nn.Module,
    loss_fn: LossFunction,
    sets: Sets,
    direction: Tensor,
    positions: Axis,
    *,
    keep: Keep = None,
    progress: Progress = None,
) -> Landscape:
    """Return the losses at the weights theta + t d for each t of ``positions``.

    ``sets`` maps names to iterables of (x, y), each read once and held. ``direction`` d is a flat vector (n,) in the
    order of torch.nn.utils.parameters_to_vector, used at the length it has; buffers stay as they are. ``progress`` is
    called with the number of finished points and of all, at first with what ``keep`` already held.

    Raises InputError for a direction of another size or not finite, positions that are none or not finite, sets that
    are empty or do not fit the model (device, dtype, labels out of range), a loss that is not a scalar, and a ``keep``
    that cannot be read or written or holds the points of another landscape.
    """
    return _survey(*_span(model, (direction,)), loss_fn, _read(model, sets), (positions,), keep, progress)


def on_plane(
    model: nn.Module,
    loss_fn: LossFunction,
    sets: Sets,
    directions: tuple[Tensor, Tensor],
    xs: Axis,
    ys: Axis,
    *,
    keep: Keep = None,
    progress: Progress = None,
) -> Landscape:
    """Return the losses at the weights theta + x d + y e for all x of ``xs`` and y of ``ys``, of shape (p, q).

    ``directions`` are d and e, which need be neither orthogonal nor of length one. All else is as in `along`.
    """
    if len(directions) != 2:
        raise InputError(f"{len(directions)} direction(s): a plane has two")
    return _survey(*_span(model, directions), loss_fn, _read(model, sets), (xs, ys), keep, progress)


def between(
    first: nn.Module,
    second: nn.Module,
    loss_fn: LossFunction,
    sets: Sets,
    positions: Axis,
    *,
    batch_norm: Literal["interpolate", "estimate"] = "interpolate",
    statistics: Iterable[Tensor | tuple[Tensor, Tensor]] | None = None,
    keep: Keep = None,
    progress: Progress = None,
) -> Landscape:
    """Return the losses on the straight line through two networks: ``first`` at position 0 and ``second`` at 1.

    Positions outside [0, 1] extrapolate. Floating-point buffers are interpolated as the weights are, with running
    variances held positive; other buffers are those of ``first``. With ``batch_norm="estimate"`` the running
    statistics of batch normalisation are instead estimated at each point from ``statistics``, batches x or (x, y).
    Each batch passes through the network with batch normalisation in train mode, that is, normalised by the batch
    itself, and all other layers in eval mode. A layer gets the mean and the variance (divided by one less than their
    number, as PyTorch keeps it) of the values that arrive at it, over all batches together. At the first such layer
    this is exact however the samples are batched; behind it the arriving values depend on the batches.

    Raises InputError for networks whose parameters or buffers differ in name, shape, dtype or device, or that are
    different functions of these (another activation, another buffer of whole numbers), an unknown ``batch_norm``,
    ``statistics`` that are missing, empty, not asked for or have one value per channel in a batch, and where `along`
    does.
    """
    if batch_norm not in ("interpolate", "estimate"):
        raise unknown("batch_norm", batch_norm, ["interpolate", "estimate"])
    given = () if statistics is None else statistics
    batches = [batch if isinstance(batch, Tensor) else batch[0] for batch in given]
    if (batch_norm == "estimate") != any(map(len, batches)):
        raise InputError(
            f"batch_norm = {batch_norm!r} with {len(batches)} batches of statistics: give 'estimate' and batches of "
            "samples to estimate from, or neither"
        )
    _check_same_architecture(first, second)
    for x in batches:
        _check_fits(first, "statistics", x)
    network, ends = deepcopy(first).eval(), tensors(second)
    lines = [
        (name, here, here.clone(), ends[name])
        for name, here in tensors(network).items()
        # What is equal stays: between two infinite entries, say of a mask, there is only NaN.
        if here.is_floating_point() and not torch.equal(here, ends[name])
    ]

    data = _read(first, sets)
    with torch.no_grad():
        for _, here, _, end in lines:
            here.copy_(end)
    _check_same_function(network, second, data)

    def move(t: float) -> None:
        for name, here, start, end in lines:
            here.copy_(torch.lerp(start.double(), end.double(), t))  # exact at both ends, as start + t (...) is not
            if name.endswith("running_var"):
                here.clamp_(min=torch.finfo(here.dtype).tiny)
        if batches:
            _estimate_statistics(network, batches)

    identity = [*of_network(first), *of_network(second), batch_norm, *batches]
    return _survey(network, move, identity, loss_fn, data, (positions,), keep, progress)


def random_direction(model: nn.Module, generator: torch.Generator, *, filter_normalised: bool = False) -> Tensor:
    """Return a direction (n,) of standard normal entries, float64 on the model's device, or its `filter_normalise`."""
    n = sum(p.numel() for p in model.parameters())
    direction = torch.randn(n, dtype=torch.float64, generator=generator, device=generator.device)
    return filter_normalise(model, direction) if filter_normalised else direction.to(_weight(model).device)


def displaced(model: nn.Module, direction: Tensor, position: float) -> nn.Module:
    """Return a copy of the network, in eval mode, with the weights theta + t d at ``position`` t.

    Raises InputError for a direction or a position that `along` refuses.
    """
    network, move, _ = _span(model, (direction,))
    with torch.no_grad():
        move(*_check_positions([position]).tolist())
    return network


def filter_normalise(model: nn.Module, direction: Tensor) -> Tensor:
    """Return ``direction`` (n,) with each filter scaled to the norm of the model's, float64 on the model's device.

    A filter is what belongs to one first index of a weight of two or more dimensions; one that is zero stays zero.
    Parameters of one dimension (biases, batch normalisation) get zero. Source: Li et al. (2018), section 4.

    Raises InputError for a direction of another size or not finite.
    """
    direction = _check_direction(model, direction)
    for weight, part in _paired(model, direction):  # the parts are views
        if weight.ndim > 1:
            norms = torch.linalg.vector_norm(weight.detach().double().flatten(1), dim=1, keepdim=True)
            unit = F.normalize(part.flatten(1), dim=1, eps=torch.finfo(torch.float64).tiny)
            part.copy_((norms * unit).view_as(part))
        else:
            part.zero_()
    return direction


Move = Callable[..., None]


def _span(model: nn.Module, directions: Sequence[Tensor]) -> tuple[nn.Module, Move, list[object]]:
    """Return a copy of the model, what moves it in the span of the directions, and what identifies the span."""
    spans = [_check_direction(model, direction) for direction in directions]
    base = torch.cat([p.detach().double().reshape(-1) for p in model.parameters()])
    network = deepcopy(model).eval()

    def move(*point: float) -> None:
        theta = base.clone()
        for coordinate, span in zip(point, spans, strict=True):
            theta.add_(span, alpha=coordinate)
        for parameter, part in _paired(network, theta):
            parameter.copy_(part)

    return network, move, [*of_network(model), *spans]


def _survey(
    network: nn.Module,
    move: Move,
    identity: list[object],
    loss_fn: LossFunction,
    data: dict[str, _Set],
    axes: Sequence[Axis],
    keep: Keep,
    progress: Progress,
) -> Landscape:
    """Evaluate ``network`` wherever ``move`` puts it, at each point of the product of ``axes``."""
    checked = tuple(_check_positions(axis) for axis in axes)
    points = list(itertools.product(*(axis.tolist() for axis in checked)))
    file, values = None, dict[Point, Values]()
    if keep is not None:
        contents = [part for name, a in data.items() for part in (name, *itertools.chain.from_iterable(a.batches))]
        file = PointFile(Path(keep), digest([*identity, *of_loss(loss_fn), *contents]))
        values = file.read(list(data))
    missing = [point for point in dict.fromkeys(points) if point not in values]
    total = len(set(points))
    if file and missing:
        file.prepare()  # before the work: a file that cannot be written must not cost a point
    if progress:
        progress(total - len(missing), total)
    with torch.no_grad(), full_precision():
        for done, point in enumerate(missing, total - len(missing) + 1):
            move(*point)
            if point == missing[0]:
                _check_samples(network, data)
            values[point] = _evaluate(network, loss_fn, data)
            if point == missing[0]:
                _check_means(network, loss_fn, data)
            if file:
                file.append(point, values[point])
            if progress:
                progress(done, total)
    table = torch.tensor([[values[point][name] for name in data] for point in points], dtype=torch.float64)
    losses, accuracies = (
        {name: table[:, i, column].clone().reshape([len(axis) for axis in checked]) for i, name in enumerate(data)}
        for column in (0, 1)
    )
    return Landscape(checked, losses, accuracies)


@dataclass(frozen=True)
class _Set:
    batches: list[tuple[Tensor, Tensor]]
    n: int
    labels: tuple[int, int] | None  # the smallest and the largest, if they are an int64 vector


def _read(model: nn.Module, sets: Sets) -> dict[str, _Set]:
    """Materialise the data sets and check that they fit the model."""
    if not sets or not isinstance(sets, Mapping):
        raise InputError("no data sets: give at least one, for example {'train': batches}")
    data = {}
    for name, batches in sets.items():
        pairs = list(each_batch(batches))
        for pair in pairs:
            if isinstance(pair, Tensor) or len(pair) != 2 or len(pair[0]) != len(pair[1]):
                raise InputError(
                    f"set {name!r}: a batch is not a pair (x, y) with as many labels as inputs; give an iterable of "
                    "such pairs, also for a single one: [(x, y)]"
                )
            _check_fits(model, f"set {name!r}", *pair)
        pairs = [(x, y) for x, y in pairs if len(y)]  # the mean of an empty batch is NaN
        if not pairs:
            raise InputError(f"set {name!r} is empty: a mean loss needs at least one sample")
        labels = None
        if all(y.dtype == torch.int64 and y.ndim == 1 for _, y in pairs):
            every = torch.cat([y for _, y in pairs])
            labels = int(every.min()), int(every.max())
        data[name] = _Set(pairs, sum(len(y) for _, y in pairs), labels)
    return data


def _evaluate(network: nn.Module, loss_fn: LossFunction, data: dict[str, _Set]) -> Values:
    """Return the loss and accuracy over each set, summed on the device and fetched together at the end."""
    means = []
    for name, part in data.items():
        sums = torch.zeros(2, dtype=torch.float64, device=part.batches[0][1].device)
        for x, y in part.batches:
            output = network(x.clone())  # which may work in place
            classes = output.shape[1] if part.labels and output.ndim == 2 else 1
            low, high = part.labels or (0, 0)
            # Before the loss sees them: a label out of range leaves a CUDA device unusable for the process.
            if classes > 1 and not 0 <= low <= high < classes:
                raise InputError(
                    f"set {name!r}: labels from {low} to {high} for {classes} classes; give 0 to {classes - 1}"
                )
            loss = loss_of(loss_fn, output, y)
            if not isinstance(loss, Tensor) or loss.ndim != 0:
                found = f"of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
                raise InputError(f"the loss of a batch is {found}: it must be a scalar tensor, the mean over the batch")
            sums[0] += loss.double() * len(y)
            sums[1] += (output.argmax(1) == y).sum() if classes > 1 else math.nan
        means.append(sums / part.n)
    return {name: (loss, accuracy) for name, (loss, accuracy) in zip(data, torch.stack(means).tolist(), strict=True)}


def _check_samples(network: nn.Module, data: dict[str, _Set]) -> None:
    """Raise InputError for a network that is random, or whose samples depend on the others in their batch."""
    with torch.random.fork_rng(cuda_devices(network)):
        for part in data.values():
            x, _ = varied(part.batches)
            independent_samples(network, lambda x: network(x.clone()), x)


def _check_same_function(network: nn.Module, second: nn.Module, data: dict[str, _Set]) -> None:
    """Raise InputError if a network with the weights and buffers of ``second`` has other outputs than this."""
    for part in data.values():
        x, _ = varied(part.batches)
        with inference(network) as found, inference(second) as expected:
            ours, theirs = found(x), expected(x)
        if not torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().amax()), equal_nan=True):
            raise InputError(
                "the networks are different functions: the first with the weights of the second has other outputs than "
                "the second; give two of the same layers, settings and buffers of whole numbers"
            )


def _check_means(network: nn.Module, loss_fn: LossFunction, data: dict[str, _Set]) -> None:
    """Raise InputError for a loss that is not a batch mean, of which no mean over all samples can be made."""
    for part in data.values():
        x, y = varied(part.batches)
        output = network(x.clone())
        is_mean(loss_fn, output, y, loss_fn(output, y))


def _estimate_statistics(network: nn.Module, batches: list[Tensor]) -> None:
    """Set the running statistics of each batch normalisation to those of all values that arrive at it."""
    layers = [m for m in network.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    moments: dict[nn.Module, tuple[int, Tensor, Tensor]] = {}  # number, mean, and sum of squared deviations

    def note(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0]
        n = x.numel() // x.shape[1]
        if n < 2:
            raise InputError("a batch of statistics has one value per channel, so no variance: give larger batches")
        variance, mean = (a.double() for a in torch.var_mean(x, [d for d in range(x.ndim) if d != 1], correction=0))
        squares = n * variance
        if layer in moments:  # the law of total variance, one batch at a time (Chan et al., 1979)
            before, old_mean, old_squares = moments[layer]
            shift, total = mean - old_mean, before + n
            squares += old_squares + shift**2 * (before * n / total)
            mean, n = old_mean + shift * (n / total), total
        moments[layer] = n, mean, squares

    with ExitStack() as hooks:
        for layer in layers:
            hooks.enter_context(layer.register_forward_pre_hook(note))
            layer.train()
        for x in batches if layers else []:
            network(x.clone())
    network.eval()
    for reached, (n, mean, squares) in moments.items():
        reached.get_buffer("running_mean").copy_(mean)
        reached.get_buffer("running_var").copy_(squares / (n - 1))


def _paired(model: nn.Module, flat: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield each parameter with its part of a flat vector (n,), a view of its shape."""
    parameters = list(model.parameters())
    for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        yield parameter, part.view_as(parameter)


def _weight(model: nn.Module) -> Tensor:
    """Return the first parameter, which stands for the device and the dtype of all."""
    for parameter in model.parameters():
        return parameter
    raise InputError("the model has no parameters, so there is nothing to move: give one with weights")


def _check_positions(positions: Axis) -> Tensor:
    axis = torch.as_tensor(positions, dtype=torch.float64).detach().cpu().clone()
    if axis.ndim != 1 or len(axis) == 0 or not bool(torch.isfinite(axis).all()):
        problem = f"have shape {tuple(axis.shape)}" if axis.ndim != 1 or len(axis) == 0 else "are not all finite"
        raise InputError(f"the positions {problem}: give a vector of at least one number, all finite")
    return axis


def _check_direction(model: nn.Module, direction: Tensor) -> Tensor:
    """Return a copy of the direction, float64 on the model's device."""
    n, device = sum(p.numel() for p in model.parameters()), _weight(model).device
    if not isinstance(direction, Tensor):
        raise InputError(f"the direction is a {type(direction).__name__}: give a tensor ({n},)")
    if direction.shape != (n,):
        raise InputError(
            f"a direction of shape {tuple(direction.shape)} does not fit a model of {n:,} parameters: give a vector "
            f"({n},) in the order of torch.nn.utils.parameters_to_vector, parameters without gradient included"
        )
    if not bool(torch.isfinite(direction).all()):
        raise InputError("the direction is not finite: look for NaN or infinity where it comes from")
    return direction.detach().to(device, torch.float64, copy=True)


def _check_fits(model: nn.Module, what: str, x: Tensor, y: Tensor | None = None) -> None:
    """Raise InputError for data on another device than the model's, or inputs of another floating-point dtype."""
    weight = _weight(model)
    strange = x.is_floating_point() and x.dtype != weight.dtype
    if strange or any(data is not None and data.device != weight.device for data in (x, y)):
        labels = "" if y is None else f" (labels on {y.device})"
        raise InputError(
            f"{what}: inputs are {x.dtype} on {x.device}{labels}, the model is {weight.dtype} on {weight.device}; "
            "bring the data to the model with .to(device, dtype)"
        )


def _check_same_architecture(first: nn.Module, second: nn.Module) -> None:
    one, other = (
        {name: f"{tuple(a.shape)} {a.dtype} on {a.device}" for name, a in tensors(model).items()}
        for model in (first, second)
    )
    for name in one | other:
        if one.get(name) != other.get(name):
            raise InputError(
                f"the networks differ in {name}: {one.get(name, 'absent')} in the first, {other.get(name, 'absent')} "
                "in the second; give two of the same architecture, dtype and device"
            )
