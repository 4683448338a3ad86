"""Input Hessians against dense float64 truth."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from networks import network, samples
from torch import Tensor, nn

from hessnb.curvature import input_hessian
from hessnb.data import Splits


def dense_input_hessian(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    def of_sample(sample: Tensor, label: Tensor) -> Tensor:
        def loss(pixels: Tensor) -> Tensor:
            return F.cross_entropy(model(pixels.view(1, *x.shape[1:])), label)

        result: Tensor = torch.autograd.functional.hessian(loss, sample.flatten())
        return result

    return torch.stack([of_sample(sample, label) for sample, label in zip(x, y.split(1), strict=True)])


@pytest.mark.parametrize("kind", ["conv", "residual", "smooth"])
def test_input_hessian_equals_the_dense_one_of_each_sample(kind: str) -> None:
    x, y = samples(3)
    model = network(kind)
    found = input_hessian(model, x, y)
    torch.testing.assert_close(found, dense_input_hessian(model.eval(), x, y), rtol=1e-10, atol=1e-13)


def test_input_hessian_of_m1_is_dense_psd_of_rank_below_the_classes_and_without_label(
    tiny_m1: nn.Module, digits: Splits
) -> None:
    model, x, y = tiny_m1.double(), digits.train.images[:1].double(), digits.train.labels[:1]
    found = input_hessian(model, x, y)
    torch.testing.assert_close(found, dense_input_hessian(model.eval(), x, y), rtol=1e-10, atol=1e-15)
    torch.testing.assert_close(found, found.mT, rtol=1e-10, atol=1e-15)
    eigenvalues = torch.linalg.eigvalsh(found[0])
    assert eigenvalues[0] >= -1e-13 * eigenvalues[-1]
    assert 1 <= int((eigenvalues > 1e-10 * eigenvalues[-1]).sum()) <= 9
    torch.testing.assert_close(input_hessian(model, x, (y + 1) % 10), found, rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("kind", ["conv", "residual", "relu"])
def test_piecewise_linear_networks_have_input_hessians_psd_of_low_rank_and_without_label(kind: str) -> None:
    x, y = samples(4)
    found = input_hessian(network(kind), x, y)
    eigenvalues = torch.linalg.eigvalsh(found)
    largest = eigenvalues.amax(dim=1, keepdim=True)
    assert (eigenvalues >= -1e-13 * largest).all()
    ranks = (eigenvalues > 1e-10 * largest).sum(dim=1)
    assert ranks.max() <= 3
    assert ranks.max() > 0
    torch.testing.assert_close(input_hessian(network(kind), x, (y + 1) % 4), found, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize(("kind", "train_mode"), [("smooth", False), ("conv", True)])
def test_smooth_networks_and_train_mode_batch_norm_have_negative_curvature(kind: str, train_mode: bool) -> None:
    x, y = samples(4)
    eigenvalues = torch.linalg.eigvalsh(input_hessian(network(kind), x, y, train_mode=train_mode))
    assert (eigenvalues.amin(dim=1) < -1e-3 * eigenvalues.amax(dim=1)).any()


def test_linear_network_has_the_closed_form() -> None:
    x, y = samples(5)
    last = nn.Linear(64, 4)
    linear = nn.Sequential(nn.Flatten(), last).double()
    p = F.softmax(linear(x), dim=1)
    A = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    J = last.weight
    torch.testing.assert_close(input_hessian(linear, x, y), J.T @ A @ J, rtol=1e-12, atol=1e-14)


def test_gradient_without_dependence_on_the_input_gives_zero() -> None:
    class Constant(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1)[:, :4] * 0

    x, y = samples(2)
    assert not input_hessian(Constant(), x, y).any()
