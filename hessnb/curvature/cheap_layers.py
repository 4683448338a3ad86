"""Layers whose gradient is cheap to differentiate once more.

PyTorch can differentiate the gradient of a convolution, a max-pooling, a ReLU and a batch normalisation, but pays more
than the arithmetic asks for: the weights' part of a convolution runs as a convolution whose kernel is as large as the
image, pooling and ReLU add tensors of zeros for derivatives that vanish, and eval-mode batch normalisation goes
through the formula for batch statistics. Inside `cheap_layers` these functions are replaced by ones with the same
values and first derivatives, whose second derivatives are the six convolutions of a convolution (Pearlmutter, 1994,
counts them), a gather, a mask, and an affine map. Float64 convolutions on a CPU are those of `hessnb.curvature.kernels`
besides. Anything else is left to PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from numbers import Integral
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.overrides import TorchFunctionMode

from hessnb.curvature.kernels import Geometry, convolution

_convolution_backward = torch.ops.aten.convolution_backward.default
_max_pool = torch.ops.aten.max_pool2d_with_indices.default
_max_pool_backward = torch.ops.aten.max_pool2d_with_indices_backward.default
_threshold_backward = torch.ops.aten.threshold_backward.default


def _apply(function: type[Function], *arguments: Any) -> Any:
    return function.apply(*arguments)


class _Convolution(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, fixed: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.geometry, ctx.fixed = geometry, fixed
        return convolution(x, weight, bias, geometry)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = (t.detach() if ctx.fixed else t for t in ctx.saved_tensors)
        needed = ctx.needs_input_grad
        of_bias = grad.sum((0, *range(2, grad.ndim))) if needed[2] else None
        return *_apply(_ConvolutionGradient, grad, x, weight, ctx.geometry, needed[0], needed[1]), of_bias, None, None


class _ConvolutionGradient(Function):
    """(gradient of the output, x, weight) -> (gradient of x, gradient of weight), bilinear in the first with each."""

    @staticmethod
    def forward(
        ctx: Any, grad: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, of_x: bool, of_weight: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        ctx.save_for_backward(grad, x, weight)
        ctx.set_materialize_grads(False)
        ctx.geometry = geometry
        found = _convolution_backward(grad, x, weight, None, *geometry, (of_x, of_weight, False))
        return found[0], found[1]

    @staticmethod
    def backward(ctx: Any, along_x: Tensor | None, along_weight: Tensor | None) -> tuple[Tensor | None, ...]:
        grad, x, weight = ctx.saved_tensors
        geometry = ctx.geometry
        of_grad = of_x = of_weight = None
        if ctx.needs_input_grad[0] and along_x is not None:
            of_grad = convolution(along_x, weight, None, geometry)
        if ctx.needs_input_grad[0] and along_weight is not None:
            through_weight = convolution(x, along_weight, None, geometry)
            of_grad = through_weight if of_grad is None else of_grad + through_weight
        if ctx.needs_input_grad[1] and along_weight is not None:
            of_x = _convolution_backward(grad, x, along_weight, None, *geometry, (True, False, False))[0]
        if ctx.needs_input_grad[2] and along_x is not None:
            of_weight = _convolution_backward(grad, along_x, weight, None, *geometry, (False, True, False))[1]
        return of_grad, of_x, of_weight, None, None, None


class _MaxPool(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, window: tuple[Any, ...]) -> Tensor:
        out, indices = _max_pool(x, *window)
        ctx.save_for_backward(indices)
        ctx.like, ctx.window = (x.shape, x.stride()), window
        return out  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (indices,) = ctx.saved_tensors
        return _apply(_Unpool, grad, indices, ctx.like, ctx.window), None


class _Unpool(Function):
    """Put each entry where the maximum of its window was; its derivative takes the entries from there again."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, indices: Tensor, like: tuple[Any, Any], window: tuple[Any, ...]) -> Tensor:
        ctx.save_for_backward(indices)
        only_its_shape_and_strides_matter = grad.new_empty_strided(*like)
        result: Tensor = _max_pool_backward(grad, only_its_shape_and_strides_matter, *window, indices)
        return result

    @staticmethod
    def backward(ctx: Any, along: Tensor) -> tuple[Tensor | None, ...]:
        (indices,) = ctx.saved_tensors
        if _is_channels_last(along) and _is_channels_last(indices):  # as convolutions leave it on a CPU: copy nothing
            taken = along.permute(0, 2, 3, 1).flatten(1, 2).gather(1, indices.permute(0, 2, 3, 1).flatten(1, 2))
            n, c, *pixels = indices.shape
            return taken.view(n, *pixels, c).permute(0, 3, 1, 2), None, None, None
        return along.flatten(-2).gather(-1, indices.flatten(-2)).view_as(indices), None, None, None


def _is_channels_last(x: Tensor) -> bool:
    return x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)


class _ReLU(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out = x.relu()
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (out,) = ctx.saved_tensors
        # The mask is locally constant, so the derivative of this does not go through it.
        result: Tensor = _threshold_backward(grad, out.detach(), 0)
        return result


# The arguments have the names that PyTorch gives them, since callers may.


def _convolve(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    *,
    fixed: bool = False,
) -> Any:
    dims = weight.ndim - 2
    if isinstance(padding, str) or input.ndim != weight.ndim:
        return NotImplemented
    geometry = (_tuple(stride, dims), _tuple(padding, dims), _tuple(dilation, dims), False, (0,) * dims, groups)
    return _apply(_Convolution, input, weight, bias, geometry, fixed)


def _pool(
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    if return_indices:
        return NotImplemented
    unset = stride is None or (isinstance(stride, list | tuple) and not stride)
    sizes = (kernel_size, kernel_size if unset else stride, padding, dilation)
    return _apply(_MaxPool, input, (*(_tuple(size, 2) for size in sizes), ceil_mode))


def _relu(input: Tensor, inplace: bool = False) -> Any:
    if inplace:
        return NotImplemented
    return _apply(_ReLU, input)


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    if training or running_mean is None or running_var is None:
        return NotImplemented
    scale = torch.rsqrt(running_var + eps)
    scale = scale if weight is None else weight * scale
    shift = -running_mean * scale if bias is None else bias - running_mean * scale
    per_channel = (-1, *(1 for _ in range(input.ndim - 2)))
    return input * scale.view(per_channel) + shift.view(per_channel)


_REPLACEMENTS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.conv1d: _convolve,
    torch.conv2d: _convolve,
    torch.conv3d: _convolve,
    torch.max_pool2d: _pool,
    F.max_pool2d: _pool,
    torch.relu: _relu,
    Tensor.relu: _relu,
    F.relu: _relu,
    F.batch_norm: _batch_norm,
}


class cheap_layers(TorchFunctionMode):  # noqa: N801 - a context manager, used as one
    """Within this context, networks are evaluated by functions that are cheap, and whose gradients are too.

    Values and first derivatives are PyTorch's own up to rounding; derivatives of any order are right. Arguments that
    the replacements do not handle (in-place ReLU, padding by name, train-mode batch normalisation) go to PyTorch.

    With ``fixed`` the gradient of a convolution is taken as a function of the gradient that comes in alone, with its
    input and its weights fixed: what Jacobian-vector products need, at half the cost.
    """

    def __init__(self, *, fixed: bool = False) -> None:
        super().__init__()
        self._fixed = fixed

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call the replacement of ``func``, if there is one that handles the arguments, else ``func``."""
        kwargs = kwargs or {}
        replacement = _REPLACEMENTS.get(func)
        if replacement is not None:
            if replacement is _convolve:
                replacement = partial(_convolve, fixed=self._fixed)
            result = replacement(*args, **kwargs)
            if result is not NotImplemented:
                return result
        return func(*args, **kwargs)


def suits(cheap: Callable[[], Tensor], plain: Callable[[], Tensor]) -> bool:
    """Return whether a second derivative is the same with cheap layers and without, to half of its digits.

    A RuntimeError says that layers fail: cheap ones do not suit then, and if the others fail they are all there is.
    """
    try:
        found = cheap()
    except RuntimeError:
        return False
    try:
        expected = plain()
    except RuntimeError:  # a device without a kernel for it
        return True
    allowed = torch.finfo(expected.dtype).eps ** 0.5 * torch.linalg.vector_norm(expected)
    return bool(torch.linalg.vector_norm(found - expected) <= allowed)


def _tuple(size: Any, dims: int) -> tuple[int, ...]:
    return (int(size),) * dims if isinstance(size, Integral) else tuple(size) * (dims if len(size) == 1 else 1)
