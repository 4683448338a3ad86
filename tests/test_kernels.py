"""The float64 convolution on a CPU against PyTorch's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hessnb import models
from hessnb.attacks import fgsm, l2_hessian
from hessnb.curvature import kernels
from hessnb.curvature.kernels import Geometry, convolution


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def geometry(
    stride: int = 1, padding: int = 0, dilation: int = 1, *, transposed: bool = False, groups: int = 1
) -> Geometry:
    return (stride,) * 2, (padding,) * 2, (dilation,) * 2, transposed, (0, 0), groups


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("stride", "padding", "dilation"), [(1, 0, 1), (2, 1, 1), (1, 2, 2), (3, 0, 2)])
@pytest.mark.parametrize("at_a_time", [1, 2**12, 2**30], ids=["one image", "a few", "all"])
def test_convolution_is_pytorchs_however_many_images_are_unrolled_at_once(
    monkeypatch: pytest.MonkeyPatch, at_a_time: int, stride: int, padding: int, dilation: int, bias: bool
) -> None:
    monkeypatch.setattr(kernels, "_AT_A_TIME", at_a_time)
    x, weight, b = normal(7, 3, 11, 9), normal(5, 3, 3, 2, seed=1), normal(5, seed=2) if bias else None
    how = geometry(stride, padding, dilation)
    found, expected = convolution(x, weight, b, how), torch.convolution(x, weight, b, *how)
    assert torch.allclose(found, expected, rtol=1e-13, atol=1e-13)
    assert found.is_contiguous()


@pytest.mark.parametrize("name", ["strided", "expanded", "channels last"])
def test_images_may_lie_in_memory_in_any_order(name: str) -> None:
    x = {
        "strided": normal(4, 3, 8, 14)[:, :, :, ::2],
        "expanded": normal(1, 3, 8, 7).expand(4, -1, -1, -1),
        "channels last": normal(4, 3, 8, 7).contiguous(memory_format=torch.channels_last),
    }[name]
    weight = normal(2, 3, 3, 3, seed=1)
    assert torch.allclose(convolution(x, weight, None, geometry()), F.conv2d(x.contiguous(), weight), atol=1e-13)


@pytest.mark.parametrize(
    ("x", "weight", "how"),
    [
        (normal(2, 4, 6, 6), normal(4, 2, 3, 3), geometry(groups=2)),
        (normal(2, 4, 6, 6), normal(4, 3, 3, 3), geometry(transposed=True)),
        (normal(2, 4, 6, 6).float(), normal(3, 4, 3, 3).float(), geometry()),
        (normal(0, 4, 6, 6), normal(3, 4, 3, 3), geometry()),
    ],
    ids=["groups", "transposed", "float32", "no images"],
)
def test_what_is_no_ordinary_convolution_goes_to_pytorch(x: Tensor, weight: Tensor, how: Geometry) -> None:
    assert not kernels._is_ordinary(x, weight, how)
    assert torch.equal(convolution(x, weight, None, how), torch.convolution(x, weight, None, *how))


@pytest.mark.parametrize(
    ("x", "weight"),
    [(normal(2, 3, 2, 2), normal(4, 3, 3, 3)), (normal(2, 3, 6, 6), normal(4, 2, 3, 3))],
    ids=["kernel larger than the image", "other channels"],
)
def test_what_has_no_result_has_pytorchs_error(x: Tensor, weight: Tensor) -> None:
    with pytest.raises(RuntimeError, match=r"Kernel size|expected input"):
        convolution(x, weight, None, geometry())


def test_autograd_sees_through_it() -> None:
    x, weight = normal(2, 3, 6, 6).requires_grad_(), normal(4, 3, 3, 3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: convolution(a, b, None, geometry(padding=1)), (x, weight))
    with torch.no_grad():
        assert kernels._is_ordinary(x, weight, geometry())


@pytest.mark.parametrize("name", ["M1", "C1", "C3"])
def test_attacks_in_float64_are_those_of_the_plain_network(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    model = models.build(name, width=0.1, seed=0)
    x = torch.rand(5, *models.INPUT_SHAPES[name], generator=torch.Generator().manual_seed(1))
    y = torch.arange(5)
    calls = []
    ordinary = kernels._is_ordinary

    def counted(x: Tensor, weight: Tensor, how: Geometry) -> bool:
        calls.append(ordinary(x, weight, how))
        return calls[-1]

    monkeypatch.setattr(kernels, "_is_ordinary", counted)
    quick = fgsm(model, x, y, eps=0.1), l2_hessian(model, x, y, eps=0.1, solver="exact")
    assert any(calls), "the attack does not go through the kernel"
    monkeypatch.setattr(kernels, "_is_ordinary", lambda *_: False)
    plain = fgsm(model, x, y, eps=0.1), l2_hessian(model, x, y, eps=0.1, solver="exact")
    for one, other in zip(quick, plain, strict=True):
        assert torch.allclose(one, other, atol=1e-6)
