"""What must hold besides `hessnb.checks` before a second derivative over a data set means anything, with remedies."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from hessnb.checks import (
    Pairs,
    check_differentiable,
    each_batch,
    independent_samples,
    is_mean,
    loss_of,
    named_tensors,
    rounding,
    sound_model,
)
from hessnb.errors import InputError, unknown


def chosen_parameters(model: nn.Module, names: Sequence[str] | None) -> dict[str, nn.Parameter]:
    """Return the parameters by name, in the model's order: all, or those named or below a named module.

    Raises InputError for a model without parameters, an unknown name, a frozen parameter, mixed devices or dtypes,
    or weights that are not finite.
    """
    every = dict(model.named_parameters())  # one that is tied has its first name
    if not every:
        raise InputError("the model has no trainable parameter, so its Hessian has no rows")
    if names is not None:
        names = [names] if isinstance(names, str) else list(names)
        aliases = dict(model.named_parameters(remove_duplicate=False))
        meant = set()
        for name in names:
            below = [id(value) for alias, value in aliases.items() if alias == name or alias.startswith(f"{name}.")]
            if not below:
                raise unknown("parameter or module", name, list(every))
            meant.update(below)
        every = {name: value for name, value in every.items() if id(value) in meant}
        if not every:
            raise InputError("parameters = []: name at least one parameter or module")
    frozen = [name for name, p in every.items() if not p.requires_grad]
    if frozen:
        raise InputError(
            f"{', '.join(frozen)}: requires_grad is False; unfreeze with .requires_grad_(), or leave out with "
            "parameters=[name for name, p in model.named_parameters() if p.requires_grad]"
        )
    sound_model(model)
    return every


def read_twice(batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[Pairs, Pairs | None]:
    """Return the batches of two passes; None for the second if it is identical, or if an iterator allows only one.

    Empty batches are left out. Raises InputError for data without a sample, that cannot be gone through, or whose
    batches are not pairs of tensors x (n, ...) and y (n, ...).
    """
    pairs = _pairs(batches)
    if not pairs:
        raise InputError("the data set is empty: a Hessian needs at least one sample")
    if iter(batches) is batches:
        return pairs, None
    again = _pairs(batches)
    same = len(again) == len(pairs) and all(map(_same, pairs, again))
    return pairs, None if same else again


def same_samples(pairs: Pairs, again: Pairs, mean_loss: Callable[[Pairs], tuple[float, float]]) -> None:
    """Raise InputError unless two passes hold the same samples; in another order is no fault, since means stay.

    Counts, sums of the data, and the mean loss tell.
    """
    counts = [sum(len(x) for x, _ in part) for part in (pairs, again)]
    told = f"{counts[0]} samples, then {counts[1]}"
    same = counts[0] == counts[1]
    if same:
        sums = [_sums(part) for part in (pairs, again)]
        told = "other inputs or labels"
        same = bool(((sums[0] - sums[1]).abs() <= 1e-9 * sums[0].abs().amax()).all())
    if same:
        (first, scale), (second, _) = mean_loss(pairs), mean_loss(again)
        told = f"the mean loss is {first:.6g}, then {second:.6g}"
        eps = torch.finfo(pairs[0][0].dtype if pairs[0][0].is_floating_point() else torch.float32).eps
        same = abs(first - second) <= 1e2 * eps * scale
    if not same:
        raise InputError(
            f"the batches change between passes ({told}): switch random augmentation and drop_last off, or pass "
            "list(batches) to fix one draw"
        )


def _sums(pairs: Pairs) -> Tensor:
    """Return sums over all samples that do not depend on their order."""
    terms = [torch.stack([t.double().sum(), t.double().square().sum()]) for pair in pairs for t in pair]
    xs, ys = terms[::2], terms[1::2]
    return torch.cat([torch.stack(xs).sum(0), torch.stack(ys).sum(0)])


def model_and_loss(
    model: nn.Module,
    forward: Callable[[Tensor], Tensor],
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    y: Tensor,
) -> None:
    """Raise InputError unless the outputs of one batch are a fixed function of each sample, and the loss their mean.

    `hessnb.checks.varied` gives a batch on which faults show that those of a data set may hide.
    """
    independent_samples(model, forward, x)
    with torch.no_grad():
        outputs = forward(x)
        loss = loss_of(loss_fn, outputs, y)
        if not isinstance(loss, Tensor) or loss.ndim != 0:
            shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise InputError(f"the loss is not a scalar ({shape}); use a batch mean: reduction='mean'")
        if not torch.isfinite(loss):
            raise InputError(
                f"the loss of the first batch is {loss.item()}; look for overflow in the outputs, or class weights"
            )
        if abs(loss - loss_fn(outputs, y)) > rounding(outputs) * abs(loss):
            raise InputError("the loss is random: it differs when it is computed twice from the same outputs")
        is_mean(loss_fn, outputs, y, loss)


def symmetric(product: Callable[[list[Tensor], bool], Sequence[Tensor]], parameters: Sequence[Tensor]) -> None:
    """Raise InputError unless a second derivative by the parameters is symmetric, as far as two random vectors tell.

    ``product`` maps a vector, in the parameters' shapes, to its product, and takes whether it will be called again. All
    that is done with a Hessian rests on it, and not every layer's derivative can be differentiated again: that of
    weight normalisation is wrong in PyTorch, and a gradient written by hand may be that of no function.
    """
    generator = torch.Generator().manual_seed(0)
    u, v = ([torch.randn(p.shape, generator=generator).to(p) for p in parameters] for _ in range(2))
    Hu, Hv = product(u, True), product(v, False)

    def dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
        return sum(float((s.double() * t.double()).sum()) for s, t in zip(a, b, strict=True))

    # Of random vectors, so that this is the size of either side where n is large.
    scale = (dot(u, u) * dot(Hv, Hv) / sum(p.numel() for p in parameters)) ** 0.5
    if abs(dot(u, Hv) - dot(v, Hu)) > 10 * torch.finfo(parameters[0].dtype).eps ** 0.5 * scale:
        raise InputError(
            f"the second derivative of the model is not symmetric: u H v = {dot(u, Hv):.6g} and v H u = "
            f"{dot(v, Hu):.6g}. PyTorch's weight normalisation is known for it "
            "(torch.nn.utils.parametrize.remove_parametrizations makes it a plain layer); otherwise look for a "
            "gradient that is written by hand"
        )


# Name, tensor, PyTorch's count of its changes in place, and where its data lie; for the model's tensors and the data.
Noted = tuple[list[tuple[str, Tensor, int, int]], list[tuple[str, Tensor, int, int]]]


def note(model: nn.Module, pairs: Pairs) -> Noted:
    """Return what `unchanged` compares; raise InputError for tensors that cannot be differentiated."""
    groups = named_tensors(model), [(f"batch {i}", t) for i, pair in enumerate(pairs) for t in pair]
    for name, tensor in (*groups[0], *groups[1]):
        check_differentiable(name, tensor)
    first, second = ([(name, t, t._version, t.data_ptr()) for name, t in group] for group in groups)
    return first, second


def unchanged(model: nn.Module, noted: Noted) -> None:
    """Raise InputError if a tensor of the model or of the data was changed or replaced since `note`."""
    now = dict(named_tensors(model))
    for of_model, group in zip((True, False), noted, strict=True):
        for name, tensor, version, place in group:
            same = tensor._version == version and tensor.data_ptr() == place
            if not same or (of_model and now.get(name) is not tensor):
                raise InputError(f"{name} was changed after the operator was made: make a new operator")


def _pairs(batches: Iterable[tuple[Tensor, Tensor]]) -> Pairs:
    pairs = []
    for i, pair in enumerate(each_batch(batches)):
        if not (isinstance(pair, tuple | list) and len(pair) == 2 and all(isinstance(t, Tensor) for t in pair)):
            raise InputError(f"batch {i} is not a pair of tensors (x, y)")
        x, y = pair
        if x.ndim == 0 or y.ndim == 0 or len(x) != len(y):
            raise InputError(f"batch {i} has inputs of shape {tuple(x.shape)} and labels of shape {tuple(y.shape)}")
        if len(x):
            pairs.append((x, y))
    return pairs


def _same(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> bool:
    # Tensors without data are refused later, for their device.
    return all(a is b or a.is_meta or torch.equal(a, b) for a, b in zip(first, second, strict=True))
