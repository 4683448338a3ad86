"""What must hold of networks, samples and losses before anything is computed of them; each fault names a remedy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from hessnb.errors import InputError
from hessnb.models import evaluation

Pairs = list[tuple[Tensor, Tensor]]

# How many samples are probed for randomness and for dependence on each other.
PROBES = 16


def check_samples(
    model: nn.Module, x: Tensor, y: Tensor | None, probes: int = PROBES, *, labelled: bool = True
) -> None:
    """Raise InputError unless samples x (N, ...), labels y (N,) and model fit together, and samples are independent.

    ``probes`` is how many samples are looked at for the latter; with 0 they may depend on each other. Unless they are
    to be ``labelled``, y may be None.
    """
    given = {"inputs": x, "labels": y} if labelled or y is not None else {"inputs": x}
    for what, tensor in given.items():
        if not isinstance(tensor, Tensor):
            kind = "missing" if tensor is None else f"a {type(tensor).__name__}"
            raise InputError(f"the {what} are {kind}: give a tensor; torch.as_tensor(...) makes one")
    if len(x) == 0:
        raise InputError("there are no inputs: give at least one sample")
    if y is not None and (y.ndim != 1 or y.is_floating_point() or y.dtype == torch.bool):
        raise InputError(f"the labels are {y.dtype} of shape {tuple(y.shape)}: they must be integers of shape (N,)")
    if y is not None and len(x) != len(y):
        raise InputError(f"{len(x)} inputs and {len(y)} labels: give as many labels as inputs, at least one")
    sound_model(model)
    like = next((p for p in model.parameters()), x)
    if not x.is_floating_point():
        raise InputError(f"the inputs are {x.dtype}: convert them to the model's {like.dtype}")
    pairs = [(x, torch.zeros(len(x), device=x.device) if y is None else y)]
    check_data(pairs, like.device, like.dtype)
    with evaluation(model), torch.no_grad():
        outputs = model(x[:1].clone())
    if not isinstance(outputs, Tensor) or outputs.ndim != 2 or outputs.shape[1] < 2:
        told = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise InputError(f"the model returns {told} for one sample; it must return logits (N, c), c at least 2")
    finite_outputs(outputs)
    if y is not None:
        check_labels(outputs, pairs)
    if probes:
        with evaluation(model):
            independent_samples(model, lambda part: model(part.clone()), x[:probes])


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
    for name, tensor in named_tensors(model):
        check_differentiable(name, tensor)
        if tensor.is_floating_point() and not finite(tensor):
            raise InputError(f"{name} holds NaN or infinity: did its training diverge?")


def running_statistics(model: nn.Module) -> None:
    """Raise InputError for batch normalisation that has none: samples depend on each other, and one alone fails."""
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.running_mean is None:
            raise InputError(
                f"{name} normalises by batch statistics even in eval mode: make it with track_running_stats=True"
            )


def check_differentiable(name: str, tensor: Tensor) -> None:
    """Raise InputError, with its name, for a tensor that autograd cannot save."""
    if tensor.is_inference():
        raise InputError(f"{name} was made under torch.inference_mode and cannot be differentiated: clone it outside")


def named_tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Return all parameters and buffers, each with a name for messages."""
    return [(f"{name} of the model", t) for name, t in (*model.named_parameters(), *model.named_buffers())]


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


def check_data(pairs: Pairs, device: torch.device, dtype: torch.dtype) -> None:
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


def check_labels(outputs: Tensor, pairs: Pairs) -> None:
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


def independent_samples(model: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """Raise InputError if the outputs are random, or if those of a sample depend on the others in its batch."""
    running_statistics(model)
    with torch.no_grad():
        outputs = forward(x)
        one_tensor(outputs)
        scale = outputs.abs().amax() if outputs.numel() else 0.0
        if (outputs - forward(x)).abs().amax() > rounding(outputs) * scale:
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
    if abs(loss - expected) > rounding(outputs) * scale + torch.finfo(outputs.dtype).eps:
        raise InputError(
            f"the loss is not a batch mean: {loss.item():.6g} over a batch, {float(expected):.6g} as the mean over its "
            "parts; use reduction='mean', without class weights or ignored labels"
        )


def rounding(outputs: Tensor) -> float:
    """Return how far two computations of a loss or of outputs may be apart, relatively, by rounding alone."""
    eps = float(torch.finfo(outputs.dtype).eps)
    return min(1e3 * eps, math.sqrt(eps))  # the latter for half precision


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


def each_batch(batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Go through batches; raise InputError for what cannot be gone through, as a split of a data set."""
    try:
        return iter(batches)
    except TypeError as error:
        remedy = ", as .batches(250) does" if hasattr(batches, "batches") else ""
        told = f"the data are a {type(batches).__name__}: give an iterable of batches (x, y){remedy}"
        raise InputError(told) from error
