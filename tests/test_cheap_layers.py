"""Layers with a cheap second derivative against PyTorch's own, in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import NETWORKS, network, samples
from torch import Tensor, nn

from hessnb.curvature.cheap_layers import cheap_layers

CONVOLUTIONS: tuple[Callable[..., Tensor], ...] = (torch.conv1d, torch.conv2d, torch.conv3d)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def derivatives(function: Callable[..., Tensor], inputs: Sequence[Tensor], *, cheap: bool) -> list[Tensor]:
    """Return the value, and the derivatives of first to third order in fixed random directions.

    Inputs that are of no floating dtype, or do not require gradients in ``inputs``, are constants.
    """
    inputs = [t.detach().clone().requires_grad_(t.requires_grad) for t in inputs]
    with cheap_layers() if cheap else nullcontext():
        value = function(*inputs)
    variables = [t for t in inputs if t.requires_grad]
    grad = normal(*value.shape, seed=1).requires_grad_()
    first = torch.autograd.grad(value, variables, grad, create_graph=True, materialize_grads=True)
    variables.append(grad)
    along = [normal(*t.shape, seed=2 + i) for i, t in enumerate(first)]
    second = torch.autograd.grad(first, variables, along, create_graph=True, materialize_grads=True)
    squares = torch.stack([t.square().sum() for t in (*first, *second)]).sum()
    third = torch.autograd.grad(squares, variables, materialize_grads=True)
    return [t.detach() for t in (value, *first, *second, *third)]


def assert_derivatives_agree(
    function: Callable[..., Tensor], *inputs: Tensor, reference: Callable[..., Tensor] | None = None
) -> None:
    """Assert that value and derivatives are those of ``reference``, by default ``function`` outside the context."""
    found = derivatives(function, inputs, cheap=True)
    expected = derivatives(reference or function, inputs, cheap=False)
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert float((one - other).norm()) <= 1e-12 * (1 + float(other.norm()))


def variables(*tensors: Tensor) -> list[Tensor]:
    return [t.detach().clone().requires_grad_() for t in tensors]


def is_cheap(t: Tensor) -> bool:
    """Tell whether a tensor was made by one of the replacements that are autograd functions of their own."""
    return type(t.grad_fn).__module__ == "torch.autograd.function"


# -- convolutions -----------------------------------------------------------------------------------------------------


@dataclass
class Convolution:
    """The arguments of a convolution; ``needs`` tells which of x, weight, bias require gradients."""

    x: tuple[int, ...]
    weight: tuple[int, ...]
    bias: bool = True
    needs: tuple[bool, bool, bool] = (True, True, True)
    arguments: dict[str, Any] = field(default_factory=dict)

    def tensors(self) -> list[Tensor]:
        shapes = (self.x, self.weight, (self.weight[0],))[: 2 + self.bias]
        return [
            normal(*shape, seed=10 + i).requires_grad_(needs)
            for i, (shape, needs) in enumerate(zip(shapes, self.needs, strict=False))
        ]

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return CONVOLUTIONS[len(self.x) - 3](x, weight, bias, **self.arguments)


@st.composite
def convolutions(draw: st.DrawFn) -> Convolution:
    dims = draw(st.integers(1, 3))
    groups, wide, deep = (draw(st.integers(1, 3)) for _ in range(3))

    def sizes(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(dims))

    kernel, stride, padding, dilation = sizes(1, 3), sizes(1, 3), sizes(0, 2), sizes(1, 2)
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    extent = [draw(st.integers(max(1, r - 2 * p), r + 3)) for r, p in zip(reach, padding, strict=True)]
    needs = draw(st.sampled_from([(True,) * 3, (False, True, True), (True, False, False), (False, True, False)]))
    return Convolution(
        (draw(st.integers(1, 3)), groups * wide, *extent),
        (groups * deep, wide, *kernel),
        draw(st.booleans()),
        needs,
        {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups},
    )


@settings(deadline=None, max_examples=60)
@given(convolution=convolutions())
def test_convolutions_of_any_geometry_have_pytorchs_derivatives(convolution: Convolution) -> None:
    assert_derivatives_agree(convolution, *convolution.tensors())


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"stride": 2, "padding": 1, "dilation": 2},
        {"stride": [2], "padding": [1], "dilation": (2,)},
        {"stride": (2, 1), "padding": [0, 2], "dilation": torch.Size([1, 2])},
    ],
    ids=str,
)
def test_sizes_are_numbers_lists_or_tuples_as_pytorch_takes_them(arguments: dict[str, Any]) -> None:
    convolution = Convolution((2, 2, 7, 6), (3, 2, 3, 2), arguments=arguments)
    assert_derivatives_agree(convolution, *convolution.tensors())
    with cheap_layers():
        assert is_cheap(convolution(*convolution.tensors()))


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv1d(2, 2, 3), (2, 2, 6)),
        (nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2), (2, 2, 6, 6)),
        (nn.Conv3d(2, 2, 2, bias=False), (2, 2, 3, 3, 3)),
        (nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"), (2, 2, 6, 6)),
    ],
    ids=["1-D", "2-D", "3-D", "circular"],
)
def test_modules_use_the_replacement(layer: nn.Module, shape: tuple[int, ...]) -> None:
    with cheap_layers():
        assert is_cheap(layer.double()(normal(*shape)))
    names = [name for name, _ in layer.named_parameters()]
    assert_derivatives_agree(
        lambda x, *values: torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x.sin(),)),
        *variables(normal(*shape), *layer.parameters()),
    )


@pytest.mark.parametrize(
    "convolution",
    [
        Convolution((2, 2, 5), (2, 2, 3), arguments={"padding": 1}),
        Convolution((1, 2, 4, 5), (2, 1, 2, 3), arguments={"stride": (1, 2), "padding": 1, "groups": 2}),
        Convolution((1, 1, 5, 4), (2, 1, 2, 2), False, arguments={"dilation": 2}),
        Convolution((1, 1, 2, 3, 3), (1, 1, 1, 2, 2)),
    ],
    ids=["1-D", "grouped", "without bias", "3-D"],
)
def test_numerical_differentiation_confirms_convolutions(convolution: Convolution) -> None:
    def cheap(*inputs: Tensor) -> Tensor:
        with cheap_layers():
            return convolution(*inputs)

    inputs = tuple(convolution.tensors())
    assert torch.autograd.gradcheck(cheap, inputs)
    assert torch.autograd.gradgradcheck(cheap, inputs)


def test_a_batch_without_samples_and_inputs_of_any_strides_can_be_convolved() -> None:
    convolution = Convolution((3, 4, 6, 5), (4, 2, 3, 3), arguments={"groups": 2, "padding": 1})
    x, weight, bias = convolution.tensors()
    assert_derivatives_agree(convolution, x[:0].detach().requires_grad_(), weight, bias)
    assert_derivatives_agree(
        lambda *t: convolution(t[0].contiguous(memory_format=torch.channels_last), *t[1:]), x, weight
    )
    assert_derivatives_agree(lambda x, w: convolution(x.mT.flip(0).mT, w.flip(2)), x, weight)
    assert_derivatives_agree(lambda x, w: convolution(x[:1].expand(3, 4, 6, 5), w[:1].expand(4, 2, 3, 3)), x, weight)


# -- pooling ----------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_max_pooling_of_any_geometry_has_pytorchs_derivatives(data: st.DataObject) -> None:
    kernel = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 3)), label="kernel")
    padding = tuple(data.draw(st.integers(0, k // 2), label="padding") for k in kernel)
    dilation = data.draw(st.tuples(st.integers(1, 2), st.integers(1, 2)), label="dilation")
    stride = data.draw(st.none() | st.tuples(st.integers(1, 3), st.integers(1, 3)), label="stride")
    ceil_mode = data.draw(st.booleans(), label="ceil_mode")
    shape = [d * (k - 1) + 1 + data.draw(st.integers(0, 4)) for d, k in zip(dilation, kernel, strict=True)]
    leading = data.draw(st.sampled_from([(2, 2), (1, 3), (2,)]), label="leading")  # (2,) without a batch
    x = normal(*leading, *shape)
    if data.draw(st.booleans(), label="ties"):
        x = x.round()
    by_name = data.draw(st.booleans(), label="by name")

    def pool(x: Tensor) -> Tensor:
        if by_name:
            return F.max_pool2d(x, kernel, stride, padding, dilation, ceil_mode=ceil_mode)
        return torch.max_pool2d(x, kernel, stride or (), padding, dilation, ceil_mode)

    assert_derivatives_agree(lambda x: pool(x.sin()), *variables(x))


@pytest.mark.parametrize("pool", [nn.MaxPool2d(2), nn.MaxPool2d(3, 2, 1), nn.MaxPool2d((2, 3), ceil_mode=True)])
def test_pooling_modules_have_pytorchs_derivatives_for_any_strides(pool: nn.Module) -> None:
    x = variables(normal(2, 3, 7, 6))[0]
    assert_derivatives_agree(lambda x: pool(x.sin()), x)
    assert_derivatives_agree(lambda x: pool(x.sin().contiguous(memory_format=torch.channels_last)), x)
    assert_derivatives_agree(lambda x: pool(x.sin().mT), x)
    assert_derivatives_agree(lambda x: pool(x[:, :1].sin().expand(2, 3, 7, 6)), x)
    with cheap_layers():
        assert is_cheap(pool(x))


# -- ReLU -------------------------------------------------------------------------------------------------------------


RELUS: dict[str, Callable[[Tensor], Tensor]] = {
    "F.relu": F.relu,
    "torch.relu": torch.relu,
    "Tensor.relu": Tensor.relu,
    "x.relu()": lambda x: x.relu(),
    "nn.ReLU": nn.ReLU(),
}


@pytest.mark.parametrize("name", RELUS)
def test_relu_has_pytorchs_derivatives_at_zero_too(name: str) -> None:
    x = variables(torch.cat([normal(20), torch.zeros(3, dtype=torch.float64)]))[0]
    assert_derivatives_agree(lambda x: RELUS[name](x * (x + 1)), x)
    with cheap_layers():
        assert is_cheap(RELUS[name](x))


# -- batch normalisation ----------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(
    shape=st.sampled_from([(4, 3), (2, 3, 5), (2, 3, 4, 2), (2, 3, 2, 1, 3), (1, 3, 1, 1), (3, 1, 2)]),
    affine=st.sampled_from([(True, True), (True, False), (False, True), (False, False)]),
    frozen=st.booleans(),
    eps=st.sampled_from([1e-5, 0.1]),
)
def test_batch_normalisation_by_fixed_statistics_has_pytorchs_derivatives(
    shape: tuple[int, ...], affine: tuple[bool, bool], frozen: bool, eps: float
) -> None:
    mean, var = normal(shape[1], seed=5), normal(shape[1], seed=6).square()
    x, weight, bias = variables(normal(*shape), normal(shape[1], seed=3), normal(shape[1], seed=4))
    x.requires_grad_(not frozen or not any(affine))
    optional = [t for t, given in zip((weight, bias), affine, strict=True) if given]

    def split(optional: Sequence[Tensor]) -> list[Tensor | None]:
        rest = iter(optional)
        return [next(rest) if given else None for given in affine]

    def normalise(x: Tensor, *optional: Tensor) -> Tensor:
        weight, bias = split(optional)
        return F.batch_norm(x, mean, var, weight, bias, eps=eps)

    def formula(x: Tensor, *optional: Tensor) -> Tensor:
        weight, bias = (t if t is None else t.view(per_channel) for t in split(optional))
        result = (x - mean.view(per_channel)) / (var.view(per_channel) + eps).sqrt()
        result = result if weight is None else result * weight
        return result if bias is None else result + bias

    per_channel = (-1, *(1,) * (len(shape) - 2))
    assert_derivatives_agree(normalise, x, *optional, reference=formula)
    if affine != (False, True):  # PyTorch's own second derivative with a bias and no weight is wrong, or raises
        assert_derivatives_agree(normalise, x, *optional)


def test_numerical_differentiation_confirms_pooling_relu_and_normalisation() -> None:
    norm = nn.BatchNorm2d(2).double().eval()
    norm(normal(1, 2, 4, 4))

    def cheap(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        with cheap_layers():
            x = F.batch_norm(x.tanh(), norm.running_mean, norm.running_var, weight, bias)
            return F.relu(F.max_pool2d(x, 3, 2, 1)).square()

    inputs = tuple(variables(normal(1, 2, 5, 5), normal(2, seed=1), normal(2, seed=2)))
    assert torch.autograd.gradcheck(cheap, inputs)
    assert torch.autograd.gradgradcheck(cheap, inputs)


# -- networks, and Jacobians ------------------------------------------------------------------------------------------


def of_weights(model: nn.Module) -> Callable[..., Tensor]:
    """Return the outputs of three samples as a function of the weights."""
    x, _ = samples(3)
    names = [name for name, _ in model.named_parameters()]

    def outputs(*values: Tensor) -> Tensor:
        result: Tensor = torch.func.functional_call(model, dict(zip(names, values, strict=True)), (x,))
        return result

    return outputs


@pytest.mark.parametrize("kind", NETWORKS)
def test_networks_have_pytorchs_derivatives(kind: str) -> None:
    model = network(kind).eval()
    outputs = of_weights(model)
    assert_derivatives_agree(outputs, *model.parameters())


def pulled_back(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> tuple[Tensor, Sequence[Tensor]]:
    """Return u and J^T u, with the gradients of convolutions as functions of u alone."""
    with cheap_layers(fixed=True):
        value = function(*inputs)
    u = normal(*value.shape, seed=1).requires_grad_()
    return u, torch.autograd.grad(value, inputs, u, create_graph=True, materialize_grads=True)


@pytest.mark.parametrize("kind", NETWORKS)
def test_fixed_gives_the_jacobian_and_its_transpose(kind: str) -> None:
    model = network(kind).eval()
    outputs = of_weights(model)
    inputs = variables(*model.parameters())
    u, found = pulled_back(outputs, inputs)
    expected = torch.autograd.grad(outputs(*inputs), inputs, u.detach())
    along = tuple(normal(*t.shape, seed=20 + i) for i, t in enumerate(inputs))
    (pushed,) = torch.autograd.grad(found, u, along)
    torch.testing.assert_close(list(found), list(expected), rtol=1e-12, atol=1e-13)
    J = torch.func.jacrev(outputs, argnums=tuple(range(len(inputs))))(*(t.detach() for t in inputs))
    product = sum(torch.tensordot(j, v, v.ndim) for j, v in zip(J, along, strict=True))
    torch.testing.assert_close(pushed, product, rtol=1e-11, atol=1e-12)


@settings(deadline=None, max_examples=30)
@given(convolution=convolutions())
def test_fixed_gives_the_jacobian_of_convolutions_of_any_geometry(convolution: Convolution) -> None:
    inputs = convolution.tensors()
    chosen = [t for t in inputs if t.requires_grad]
    with cheap_layers(fixed=True):
        value = convolution(*inputs)
    u = torch.zeros_like(value, requires_grad=True)
    pulled = torch.autograd.grad(value, chosen, u, create_graph=True)
    along = [normal(*t.shape, seed=20 + i) if t.requires_grad else torch.zeros_like(t) for i, t in enumerate(inputs)]
    (pushed,) = torch.autograd.grad(
        pulled, u, [v for v, t in zip(along, inputs, strict=True) if t.requires_grad], retain_graph=True
    )
    # a convolution is bilinear: its derivative along (a, b, c) at (x, w) is a * w + x * b + c
    x, weight = (t.detach() for t in inputs[:2])
    expected = convolution(along[0], weight) + convolution(x, along[1], *along[2:])
    torch.testing.assert_close(pushed, expected, rtol=1e-12, atol=1e-12)
    (nothing,) = torch.autograd.grad(pulled, chosen[0], [normal(*t.shape) for t in chosen], allow_unused=True)
    assert nothing is None


@pytest.mark.parametrize("function", [F.relu, lambda x: F.max_pool2d(x, 2), lambda x: F.max_pool2d(x, 3, 2, 1)])
def test_derivatives_that_vanish_are_left_out(function: Callable[[Tensor], Tensor]) -> None:
    (x,) = variables(normal(2, 1, 5, 5))
    with cheap_layers():
        value = function(x)
    grad = torch.ones_like(value, requires_grad=True)
    (first,) = torch.autograd.grad(value, x, grad, create_graph=True)
    (none,) = torch.autograd.grad(first, x, torch.ones_like(x), allow_unused=True, retain_graph=True)
    assert none is None
    (mask,) = torch.autograd.grad(first, grad, x.detach())
    assert torch.equal(mask, value.detach())  # linear in pieces


# -- what is left to PyTorch ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "relu", [lambda x: F.relu(x, inplace=True), lambda x: F.relu(x, True), nn.ReLU(inplace=True), torch.relu_, F.relu_]
)
def test_relu_in_place_changes_its_input(relu: Callable[[Tensor], Tensor]) -> None:
    x = normal(6)
    expected = x.clamp(min=0)
    with cheap_layers():
        result = relu(x)
    assert result is x
    assert torch.equal(x, expected)
    assert_derivatives_agree(lambda x: relu(x.sin()), *variables(normal(6)))
    convolution = Convolution((2, 1, 5, 5), (2, 1, 3, 3))
    assert_derivatives_agree(lambda *t: relu(convolution(*t)).square(), *convolution.tensors())


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_padding_by_name_is_pytorchs(padding: str, dims: int) -> None:
    convolution = Convolution((2, 2, *(5,) * dims), (2, 2, *(3,) * dims), arguments={"padding": padding})
    assert_derivatives_agree(convolution, *convolution.tensors())
    with cheap_layers():
        assert not is_cheap(convolution(*convolution.tensors()))


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_inputs_without_a_batch_are_pytorchs(dims: int) -> None:
    convolution = Convolution((1, 2, *(5,) * dims), (4, 2, *(3,) * dims))
    x, weight, bias = convolution.tensors()
    with cheap_layers():
        found = convolution(x[0], weight, bias)
    assert not is_cheap(found)
    torch.testing.assert_close(found, convolution(x, weight, bias)[0], rtol=1e-13, atol=1e-13)
    assert_derivatives_agree(lambda x, *rest: convolution(x[0], *rest), x, weight, bias)


@pytest.mark.parametrize("function", [F.max_pool2d, nn.MaxPool2d(3, 2, 1, return_indices=True)])
def test_pooling_with_indices_is_pytorchs(function: Callable[..., Any]) -> None:
    arguments: dict[str, Any] = {} if isinstance(function, nn.Module) else {"kernel_size": 2, "return_indices": True}
    x = variables(normal(2, 2, 6, 6))[0]
    with cheap_layers():
        values, indices = function(x, **arguments)
    expected = function(x, **arguments)
    assert torch.equal(values, expected[0])
    assert torch.equal(indices, expected[1])
    assert_derivatives_agree(lambda x: function(x.sin(), **arguments)[0], x)


def test_batch_normalisation_by_batch_statistics_is_pytorchs_and_updates_the_running_ones() -> None:
    x = normal(4, 3, 2)
    cheap, plain = nn.BatchNorm1d(3).double(), nn.BatchNorm1d(3).double()
    with cheap_layers():
        found = cheap(x)
    torch.testing.assert_close(found, plain(x), rtol=1e-13, atol=1e-13)
    assert float(plain.get_buffer("running_mean").norm()) > 0
    for name, buffer in plain.named_buffers():
        assert torch.equal(cheap.get_buffer(name), buffer)
    assert_derivatives_agree(lambda x: F.batch_norm(x, None, None, training=True), *variables(x))
    untracked = nn.BatchNorm1d(3, track_running_stats=False).double().eval()
    assert_derivatives_agree(untracked, *variables(x))


def test_other_functions_are_pytorchs() -> None:
    x, weight = variables(normal(2, 2, 5, 5), normal(2, 2, 3, 3, seed=1))
    with cheap_layers():
        for t in (
            F.conv_transpose2d(x, weight),
            F.avg_pool2d(x, 2),
            F.max_pool3d(x, 2),
            F.max_pool1d(x[0], 2),
            F.adaptive_max_pool2d(x, 2),
            F.leaky_relu(x),
            F.group_norm(x, 2),
            x @ weight[0, 0, 0, 0].expand(5, 5),
        ):
            assert not is_cheap(t)


# -- calling conventions ----------------------------------------------------------------------------------------------


CALLS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "conv1d": lambda x, w: torch.conv1d(input=x[:, :, 0], weight=w[:, :, 0], padding=1),
    "conv2d": lambda x, w: F.conv2d(input=x, weight=w, bias=None, stride=2),
    "conv3d": lambda x, w: F.conv3d(weight=w[:, None], input=x[:, None]),
    "relu": lambda x, w: F.relu(input=x),
    "torch.relu": lambda x, w: torch.relu(input=x),
    "max_pool2d": lambda x, w: F.max_pool2d(input=x, kernel_size=2),
    "torch.max_pool2d": lambda x, w: torch.max_pool2d(input=x, kernel_size=2, stride=1),
    "batch_norm": lambda x, w: F.batch_norm(
        input=x, running_mean=w[0, 0, 0].detach()[:2], running_var=w[0, 0, 0, :2].detach() ** 2
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_arguments_may_be_given_by_name(name: str) -> None:
    x, weight = variables(normal(2, 2, 5, 5), normal(2, 2, 3, 3, seed=1))
    assert_derivatives_agree(lambda x, w: CALLS[name](x.sin(), w), x, weight)


def test_dtypes_and_constants_stay_as_they_are() -> None:
    x, weight = normal(2, 2, 5, 5), normal(2, 2, 3, 3, seed=1)
    for dtype in (torch.float32, torch.float64):
        with cheap_layers():
            out = F.relu(F.max_pool2d(F.conv2d(x.to(dtype), weight.to(dtype)), 2))
        assert out.dtype == dtype
        assert not out.requires_grad
    with cheap_layers():
        assert torch.equal(torch.relu(torch.arange(-2, 3)), torch.tensor([0, 0, 0, 1, 2]))
    with pytest.raises(RuntimeError), cheap_layers():
        F.conv2d(x, weight.float())
    with pytest.raises(RuntimeError), cheap_layers():
        F.conv2d(x, weight[:, :1])


# -- the context ------------------------------------------------------------------------------------------------------


def test_the_mode_is_off_outside_and_after_an_error_and_gradients_may_be_taken_inside() -> None:
    x = variables(normal(1, 1, 4, 4))[0]
    assert not is_cheap(F.relu(x))
    with cheap_layers():
        assert is_cheap(F.relu(x))
        with cheap_layers(fixed=True):
            assert is_cheap(F.relu(x))
        assert is_cheap(F.relu(x))
        (inside,) = torch.autograd.grad(F.relu(x.square() - 1).sum(), x, create_graph=True)
        (inside,) = torch.autograd.grad(inside.sum(), x)
    assert not is_cheap(F.relu(x))
    (outside,) = torch.autograd.grad(F.relu(x.square() - 1).sum(), x, create_graph=True)
    (outside,) = torch.autograd.grad(outside.sum(), x)
    assert torch.equal(inside, outside)
    with pytest.raises(ZeroDivisionError), cheap_layers():
        raise ZeroDivisionError
    with pytest.raises(RuntimeError), cheap_layers():
        F.conv2d(x, x[:, :, :0])
    assert not is_cheap(F.relu(x))


def test_pooling_takes_sizes_of_numpy() -> None:
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    with cheap_layers():
        found = nn.MaxPool2d(np.int64(2))(x)  # type: ignore[arg-type]
    assert torch.equal(found, F.max_pool2d(x, 2))
