"""Small float64 networks and samples, and their dense Hessians by PyTorch's own routines."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hessnb.models import ResidualBlock

LossFunction = Callable[[Tensor, Tensor], Tensor]


class Functional(nn.Module):
    """Calls functions where the other networks hold modules."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 2, bias=False), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.first(x)), 2, stride=1)
        x = torch.max_pool2d(torch.conv2d(x, self.second.weight, stride=1).relu(), 2)
        result: Tensor = self.last(torch.relu(x + 0.3).flatten(1))
        return result


class Tied(nn.Module):
    """Uses one matrix twice."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.last = nn.Linear(8, 8), nn.Linear(8, 4)
        self.decode = nn.Linear(8, 8)
        self.decode.weight = self.encode.weight

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(self.decode(torch.tanh(self.encode(x.mean((1, 2))))))
        return result


NETWORKS: dict[str, Callable[[], list[nn.Module]]] = {
    "conv": lambda: [
        nn.Conv2d(1, 2, 3), nn.ReLU(), nn.BatchNorm2d(2), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(18, 4),
    ],
    "wide": lambda: [  # whose Jacobians have full rank
        nn.Conv2d(1, 6, 3), nn.ReLU(), nn.BatchNorm2d(6), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(54, 4),
    ],
    "residual": lambda: [
        ResidualBlock(1, 2, 2), ResidualBlock(2, 2, 1), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(8, 4),
    ],
    "smooth": lambda: [nn.Flatten(), nn.Linear(64, 3), nn.Tanh(), nn.Linear(3, 4)],
    "relu": lambda: [nn.Flatten(), nn.Linear(64, 3), nn.ReLU(), nn.Linear(3, 4)],
    "linear": lambda: [nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 4)],
    "grouped": lambda: [
        nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(4, 4, (3, 2), stride=(1, 2), padding=(2, 1), dilation=2, groups=2), nn.Softplus(),
        nn.AdaptiveAvgPool2d((2, 1)), nn.Flatten(), nn.Linear(8, 4),
    ],
    "same": lambda: [
        nn.Conv2d(1, 2, (4, 3), padding="same", dilation=(2, 1)), nn.Softplus(),
        nn.Conv2d(2, 2, 3, padding="same", dilation=2), nn.ReLU(),
        nn.AvgPool2d(4), nn.Flatten(), nn.Linear(8, 4),
    ],
    "norm": lambda: [
        nn.Conv2d(1, 2, 3, stride=2, bias=False), nn.BatchNorm2d(2, affine=False), nn.ReLU(),
        nn.Flatten(), nn.Linear(18, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 4),
    ],
    "pool": lambda: [
        nn.Conv2d(1, 2, 3, padding=1), nn.MaxPool2d(3, stride=2, padding=1, ceil_mode=True), nn.ReLU(),
        nn.MaxPool2d((2, 3), stride=(2, 1)), nn.Flatten(), nn.Linear(12, 4),
    ],
    "in place": lambda: [
        nn.Conv2d(1, 2, 3), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.BatchNorm2d(2), nn.ReLU(inplace=True),
        nn.Flatten(), nn.Linear(18, 4),
    ],
    "functional": lambda: [Functional()],
    "sequence": lambda: [
        nn.Flatten(1, 2), nn.Conv1d(8, 2, 3, padding=1), nn.BatchNorm1d(2), nn.ReLU(), nn.MaxPool1d(2),
        nn.Flatten(), nn.Linear(8, 4),
    ],
    "volume": lambda: [
        nn.Unflatten(2, (2, 4)), nn.Conv3d(1, 2, (1, 3, 3), stride=(1, 1, 2)), nn.BatchNorm3d(2), nn.ReLU(),
        nn.MaxPool3d((2, 1, 1)), nn.Flatten(), nn.Linear(12, 4),
    ],
    "others": lambda: [
        nn.Conv2d(1, 2, 3, stride=2, padding=1, padding_mode="circular"), nn.GELU(), nn.GroupNorm(2, 2),
        nn.Dropout(0.5), nn.ConvTranspose2d(2, 1, 3, stride=2), nn.AvgPool2d(3), nn.Flatten(), nn.LayerNorm(9),
        nn.Linear(9, 4),
    ],
    "tied": lambda: [Tied()],
}  # fmt: skip


def network(kind: str = "conv") -> nn.Module:
    """Return a small float64 network for 1 x 8 x 8 inputs and 4 classes, in train mode, with used statistics."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(*NETWORKS[kind]()).double()
        model(torch.rand(32, 1, 8, 8, dtype=torch.float64))  # gives batch normalisation some statistics
    return model


class Checkpointed(nn.Module):
    """Makes part of its graph anew in the backward pass."""

    def __init__(self, kind: str = "conv") -> None:
        super().__init__()
        self.layers = network(kind)

    def forward(self, x: Tensor) -> Tensor:
        first, last = self.layers[:4], self.layers[4:]  # type: ignore[index]
        result: Tensor = last(checkpoint(first, x, use_reentrant=False))
        return result


class InPlace(nn.Module):
    """Normalises its input where it lies."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sub_(0.1307).div_(0.3081)


def samples(n: int = 23, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, 1, 8, 8, dtype=torch.float64, generator=generator), torch.randint(4, (n,), generator=generator)


def batches(x: Tensor, y: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(x.split(size), y.split(size), strict=True))


def dense_hessian(model: nn.Module, x: Tensor, y: Tensor, loss_fn: LossFunction = F.cross_entropy) -> Tensor:
    """Return the Hessian of the mean loss over all samples at once, by PyTorch's own dense routine, in eval mode."""
    outputs = _outputs_of(model, x)

    def loss(theta: Tensor) -> Tensor:
        return loss_fn(outputs(theta), y)

    result: Tensor = torch.autograd.functional.hessian(loss, _flat(model))
    return result


def dense_ggn(model: nn.Module, x: Tensor, y: Tensor, loss_fn: LossFunction = F.cross_entropy) -> Tensor:
    """Return J^T A J of the mean loss over all samples at once, from J and A by torch.func, in eval mode."""
    outputs = _outputs_of(model, x)
    theta = _flat(model)
    J = torch.func.jacrev(outputs)(theta).flatten(0, -2)
    A = torch.func.jacrev(torch.func.jacrev(lambda s: loss_fn(s, y)))(outputs(theta)).view(len(J), len(J))
    result: Tensor = J.T @ A @ J
    return result


def _outputs_of(model: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the outputs as a function of all parameters in one vector."""
    model = model.eval()
    shapes = [(name, p.shape, p.numel()) for name, p in model.named_parameters()]

    def outputs(theta: Tensor) -> Tensor:
        parts = theta.split([size for _, _, size in shapes])
        values = {name: part.view(shape) for (name, shape, _), part in zip(shapes, parts, strict=True)}
        result: Tensor = torch.func.functional_call(model, values, (x,))
        return result

    return outputs


def _flat(model: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach()
