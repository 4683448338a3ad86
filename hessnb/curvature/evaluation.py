"""Networks as functions of their samples, by which input Hessians and attacks differentiate them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from hessnb.checks import finite_outputs
from hessnb.curvature.cheap_layers import cheap_layers, suits
from hessnb.curvature.memory import held_bytes
from hessnb.errors import InputError

Forward = Callable[[Tensor], Tensor]


def differentiable(forward: Forward, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the inputs as a leaf to differentiate by, and the logits (N, c).

    Raises InputError for logits that are not finite or not differentiable.
    """
    # PyTorch's float64 convolutions on a CPU take three times as long where the strides are not those of (N, C, H, W),
    # as of images of one channel that were once (N, H, W, C); those of float32 are at ease with both.
    layout = torch.contiguous_format if x.dtype == torch.float64 else torch.preserve_format
    leaf = x.detach().clone(memory_format=layout).requires_grad_()
    logits = forward(leaf.clone())  # a copy, since networks may work in place
    finite_outputs(logits.detach())
    if not logits.requires_grad:
        raise InputError("the model's outputs cannot be differentiated: look for detach() or no_grad() inside of it")
    return leaf, logits


def in_float64(model: nn.Module, x: Tensor) -> tuple[Forward, torch.dtype]:
    """Return the network with weights in float64 and this dtype; its own where it computes in no other."""
    tensors = (*model.named_parameters(), *model.named_buffers())
    if all(t.dtype == torch.float64 for _, t in tensors if t.is_floating_point()):
        return model, torch.float64
    double = {name: t.detach().double() if t.is_floating_point() else t for name, t in tensors}

    def forward(x: Tensor) -> Tensor:
        return torch.func.functional_call(model, double, (x,))  # type: ignore[no-any-return]

    try:
        forward(x[:1].double())
    except RuntimeError:
        return model, x.dtype
    return forward, torch.float64


def cheapened(forward: Forward, x: Tensor, derivatives: int) -> Forward:
    """Return the network with layers that are cheap to evaluate and differentiate, once or twice, if they suit it.

    They do not where it calls itself again in the backward pass, as checkpoints do, or is written with functional
    transforms, which cannot see through them: where the first or second ``derivatives`` at the samples x (N, ...), of
    which one or two are enough, are not those of the network as it stands, it is returned so.
    """

    def cheap(x: Tensor) -> Tensor:
        with cheap_layers():
            return forward(x)

    def probe(network: Forward) -> Tensor:
        leaf, logits = differentiable(network, x)
        generator = torch.Generator().manual_seed(0)
        weights, direction = (torch.randn(t.shape, generator=generator).to(t) for t in (logits, leaf))
        # Of a function that bends although its pieces may be straight.
        bending = (weights * logits).sum(1).sin().sum()
        (slope,) = torch.autograd.grad(bending, leaf, create_graph=derivatives == 2, materialize_grads=True)
        if not slope.requires_grad:
            return slope
        return torch.autograd.grad(slope, leaf, direction, materialize_grads=True)[0]

    return cheap if suits(lambda: probe(cheap), lambda: probe(forward)) else forward


def cross_entropy_in_differences(logits: Tensor, y: Tensor) -> Tensor:
    """Return the sum of the cross-entropies of logits (N, c) for labels ``y`` (N,), whose derivatives never cancel.

    However confident the network, the logits enter only by their differences to the largest: all curvature comes from
    the small probabilities of the other classes, not from one minus a probability that rounds to one.
    """
    y = y.to(torch.int64).clone()  # labels of any integer type, also made under inference_mode
    top = logits.detach().argmax(1, keepdim=True)
    others = (top + torch.arange(1, logits.shape[1], device=logits.device)) % logits.shape[1]
    best = logits.gather(1, top)
    excess = (logits.gather(1, others) - best).exp().sum(1).log1p()
    # Where y is the top, one plus and one minus one would swallow the small probabilities in the gradient of its logit.
    behind = torch.where(y[:, None] == top, 0.0, best - logits.gather(1, y[:, None]))
    return behind.sum() + excess.sum()


# More small matrices at once than this CUDA's batched eigensolver may refuse.
_LARGEST = 16_384


def in_chunks(
    model: nn.Module, x: Tensor, y: Tensor | None, memory: int, extra: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Go through samples and labels in chunks of about ``memory`` bytes: three graphs' worth and ``extra`` a sample."""
    labels = torch.zeros(len(x), dtype=torch.int64, device=x.device) if y is None else y
    graph = held_bytes(lambda: differentiable(model, x[:1]), [*model.parameters(), *model.buffers()])
    size = max(1, memory // max(1, 3 * graph + extra))  # a graph that is only views holds nothing
    size = min(size, _LARGEST)
    yield from zip(x.split(size), labels.split(size), strict=True)
