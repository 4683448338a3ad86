"""What must hold of model, loss and data before a second derivative means anything; each fault names a remedy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from hessnb.errors import InputError, unknown

Pairs = list[tuple[Tensor, Tensor]]


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


def sound_model(model: nn.Module) -> None:
    """Raise InputError for parameters of different devices or dtypes, and tensors that are not finite."""
    for what in ("device", "dtype"):
        found = {str(getattr(p, what)) for p in model.parameters()}
        if len(found) > 1:
            raise InputError(f"the parameters have different {what}s ({', '.join(sorted(found))}); use model.to(...)")
    for name, module in model.named_modules():
        if any(isinstance(p, nn.UninitializedParameter) for p in module.parameters(recurse=False)):
            raise InputError(f"{name} has no weights yet: call the model once, which gives lazy layers their shapes")
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse:
            raise InputError(f"{name} has sparse gradients, which cannot be differentiated again: make it sparse=False")
    running_statistics(model)
    for name, tensor in _named(model):
        _check_differentiable(name, tensor)
        if tensor.is_floating_point() and not finite(tensor):
            raise InputError(f"{name} holds NaN or infinity: did its training diverge?")


def running_statistics(model: nn.Module) -> None:
    """Raise InputError for batch normalisation that has none: samples depend on each other, and one alone fails."""
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.running_mean is None:
            raise InputError(
                f"{name} normalises by batch statistics even in eval mode: make it with track_running_stats=True"
            )


def finite(tensor: Tensor) -> bool:
    """Return whether all entries of a tensor are finite: its extremes are, in one pass and without a mask."""
    return tensor.numel() == 0 or all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(tensor))


def finite_outputs(outputs: Tensor) -> None:
    """Raise InputError unless the outputs of a model are finite."""
    if not finite(outputs):
        raise InputError("the model's outputs are not finite for some inputs: look for overflow")


def finite_gradients(gradients: Tensor) -> None:
    """Raise InputError unless gradients in the input, or what is made of them, are finite."""
    if not finite(gradients):
        raise InputError(
            "the gradient in the input is not finite for some samples: look for functions without a derivative there, "
            "as the square root has none at 0"
        )


def read_twice(batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[Pairs, Pairs | None]:
    """Return the batches of two passes; None for the second if it is identical, or if an iterator allows only one."""
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


def data(pairs: Pairs, device: torch.device, dtype: torch.dtype) -> None:
    """Raise InputError for inputs on another device, of another dtype, or not finite."""
    for i, (x, y) in enumerate(pairs):
        if x.device != device or y.device != device:
            raise InputError(f"batch {i} is on {x.device} and {y.device}, the model on {device}; move one of them")
        if x.is_floating_point() and x.dtype != dtype:
            raise InputError(f"the inputs of batch {i} are {x.dtype}, the parameters {dtype}; convert one of them")
        if not finite(x) or not finite(y):
            raise InputError(f"batch {i} holds NaN or infinity; clean the data")


def one_tensor(outputs: object) -> None:
    """Raise InputError for a model that returns something else than a tensor."""
    if not isinstance(outputs, Tensor):
        raise InputError(f"the model returns a {type(outputs).__name__}; wrap it so that it returns one tensor")


def labels(outputs: Tensor, pairs: Pairs) -> None:
    """Raise InputError for class labels outside the range of the outputs (N, c), which CUDA answers with an abort."""
    one_tensor(outputs)
    if outputs.ndim != 2:
        return
    classes = outputs.shape[1]
    for i, (_, y) in enumerate(pairs):
        if y.ndim == 1 and not y.is_floating_point() and not 0 <= int(y.min()) <= int(y.max()) < classes:
            raise InputError(
                f"batch {i} has labels from {int(y.min())} to {int(y.max())}, the model {classes} outputs: labels run "
                f"from 0 to {classes - 1}"
            )


def model_and_loss(
    model: nn.Module,
    forward: Callable[[Tensor], Tensor],
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    y: Tensor,
) -> None:
    """Raise InputError unless the outputs of one batch are a fixed function of each sample, and the loss their mean.

    `varied` gives a batch on which faults show that those of a data set may hide.
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
        if abs(loss - loss_fn(outputs, y)) > _rounding(outputs) * abs(loss):
            raise InputError("the loss is random: it differs when it is computed twice from the same outputs")
        is_mean(loss_fn, outputs, y, loss)


def loss_of(loss_fn: Callable[[Tensor, Tensor], Tensor], outputs: Tensor, y: Tensor) -> Tensor:
    """Return the loss of outputs; raise InputError where it does not take labels of their dtype."""
    try:
        return loss_fn(outputs, y)
    except RuntimeError as error:
        if y.is_floating_point() or y.dtype == torch.int64:
            raise  # its own affair
        told = str(error).splitlines()[0]
        raise InputError(f"the loss does not take labels of {y.dtype} ({told}); make them int64: y.long()") from error


def is_mean(loss_fn: Callable[[Tensor, Tensor], Tensor], outputs: Tensor, y: Tensor, loss: Tensor) -> None:
    """Raise InputError unless the loss of a batch is the mean of those of its parts."""
    n = len(outputs)
    if n == 1:
        parts = [(torch.cat([outputs, outputs]), torch.cat([y, y]))]
    else:
        cut = max(1, n // 3)
        parts = [(outputs[:cut], y[:cut]), (outputs[cut:], y[cut:])]
    losses = [(len(s), loss_fn(s, labels)) for s, labels in parts]
    total = sum(size for size, _ in losses)
    expected = sum(size * part for size, part in losses) / total
    scale = sum(size * abs(part) for size, part in losses) / total
    if abs(loss - expected) > _rounding(outputs) * scale + torch.finfo(outputs.dtype).eps:
        raise InputError(
            f"the loss is not a batch mean: {loss.item():.6g} over a batch, {float(expected):.6g} as the mean over its "
            "parts; use reduction='mean', without class weights or ignored labels"
        )


def varied(pairs: Pairs) -> tuple[Tensor, Tensor]:
    """Return a few samples that differ as much as they can: one of each label, or one of each batch; at most 64.

    Within a batch of one sample or one label, class weights and dependence on the other samples do not show.
    """
    alike = [(x, y) for x, y in pairs if (x.shape[1:], y.shape[1:]) == (pairs[0][0].shape[1:], pairs[0][1].shape[1:])]
    if all(y.ndim == 1 and not y.is_floating_point() for _, y in alike):
        of_label: dict[int, tuple[Tensor, Tensor]] = {}
        for x, y in alike:
            for label in sorted(set(y.unique().tolist()) - of_label.keys())[: 64 - len(of_label)]:
                first = int((y == label).nonzero()[0])
                of_label[label] = x[first : first + 1], y[first : first + 1]
        picked = list(of_label.values())
    else:
        picked = []
    picked += [(x[:1], y[:1]) for x, y in alike[: 64 - len(picked)]]
    return torch.cat([x for x, _ in picked]), torch.cat([y for _, y in picked])


def _rounding(outputs: Tensor) -> float:
    """Return how far two computations of a loss or of outputs may be apart, relatively, by rounding alone."""
    eps = float(torch.finfo(outputs.dtype).eps)
    return min(1e3 * eps, math.sqrt(eps))  # the latter for half precision


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


def independent_samples(model: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """Raise InputError if the outputs are random, or if those of a sample depend on the others in its batch."""
    running_statistics(model)
    with torch.no_grad():
        outputs = forward(x)
        one_tensor(outputs)
        scale = outputs.abs().amax() if outputs.numel() else 0.0
        if (outputs - forward(x)).abs().amax() > _rounding(outputs) * scale:
            raise InputError(
                "the model is random in eval mode too: look for dropout that is always on, such as "
                "F.dropout(x) without training=self.training"
            )
        half = len(x) // 2
        parts = [(outputs[:half], x[:half]), (outputs[half:], x[half:])] if half else []
        allowed = torch.finfo(outputs.dtype).eps ** 0.5 * scale
        if any((expected - forward(part)).abs().amax() > allowed for expected, part in parts):
            raise InputError(
                "the outputs of a sample depend on the others in its batch: look for normalisation by batch statistics"
            )


# Name, tensor, PyTorch's count of its changes in place, and where its data lie; for the model's tensors and the data.
Noted = tuple[list[tuple[str, Tensor, int, int]], list[tuple[str, Tensor, int, int]]]


def note(model: nn.Module, pairs: Pairs) -> Noted:
    """Return what `unchanged` compares; raise InputError for tensors that cannot be differentiated."""
    groups = _named(model), [(f"batch {i}", t) for i, pair in enumerate(pairs) for t in pair]
    for name, tensor in (*groups[0], *groups[1]):
        _check_differentiable(name, tensor)
    first, second = ([(name, t, t._version, t.data_ptr()) for name, t in group] for group in groups)
    return first, second


def unchanged(model: nn.Module, noted: Noted) -> None:
    """Raise InputError if a tensor of the model or of the data was changed or replaced since `note`."""
    now = dict(_named(model))
    for of_model, group in zip((True, False), noted, strict=True):
        for name, tensor, version, place in group:
            same = tensor._version == version and tensor.data_ptr() == place
            if not same or (of_model and now.get(name) is not tensor):
                raise InputError(f"{name} was changed after the operator was made: make a new operator")


def _check_differentiable(name: str, tensor: Tensor) -> None:
    if tensor.is_inference():
        raise InputError(f"{name} was made under torch.inference_mode and cannot be differentiated: clone it outside")


def _named(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [(f"{name} of the model", t) for name, t in (*model.named_parameters(), *model.named_buffers())]


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


def each_batch(batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Go through batches; raise InputError for what cannot be gone through, as a split of a data set."""
    try:
        return iter(batches)
    except TypeError as error:
        remedy = ", as .batches(250) does" if hasattr(batches, "batches") else ""
        told = f"the data are a {type(batches).__name__}: give an iterable of batches (x, y){remedy}"
        raise InputError(told) from error


def _same(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> bool:
    # Tensors without data are refused later, for their device.
    return all(a is b or a.is_meta or torch.equal(a, b) for a, b in zip(first, second, strict=True))
