"""The five networks of the paper's Table 6, as the appendix "where the paper is silent" reads them.

All return logits. All are piecewise linear in eval mode (ReLU, max- and average-pooling, batch normalisation with
fixed statistics), which is what Theorem 2.1 needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hessnb.errors import InputError, real_number, unknown, whole_number
from hessnb.precision import full_precision


def build(
    name: str,
    *,
    num_classes: int | None = None,
    width: float = 1.0,
    variant: str | None = None,
    seed: int | None = None,
) -> nn.Module:
    """Build a network of Table 6: logits (N, num_classes) from images (N, C, H, W).

    ``M1`` takes 1 x 28 x 28, the others 3 x 32 x 32. ``num_classes`` is 10, for CR 100, unless given. ``width``
    multiplies every number of channels and of hidden units, of which one stays at least. ``variant`` (M1 alone):
    "strided" is Table 6's text read literally, "normalised" begins with a layer that takes off MNIST's mean pixel and
    divides by its deviation. ``seed`` fixes the initial weights and leaves the global random state as it was.

    Raises InputError for an unknown name or variant, a width that is not positive, and fewer than two classes.
    """
    if name not in MODELS:
        raise unknown("model", name, list(MODELS))
    if variant not in (None, *VARIANTS.get(name, ())):
        raise unknown(f"variant of {name}", variant, [*VARIANTS.get(name, ()), "none"])
    classes = (100 if name == "CR" else 10) if num_classes is None else num_classes
    whole_number("num_classes", classes, 2)
    if not 0 < real_number("width", width) < float("inf"):
        raise InputError(f"width = {width}: the width factor must be positive and finite")

    def scaled(channels: int) -> int:
        return max(1, round(channels * width))

    if seed is not None:
        whole_number("seed", seed, 0)
    make = MODELS[name] if variant is None else VARIANTS[name][variant]
    if seed is None:
        return make(classes, scaled)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # of the CPU alone; torch.manual_seed seeds every device
        return make(classes, scaled)


def layers(name: str, *, variant: str | None = None) -> dict[str, str]:
    """Return what is readable of the layers with weights of a network of Table 6, by the name of their module.

    For M1: ``{"0": "convolution 1", "3": "convolution 2", "7": "fully connected 1", "9": "fully connected 2"}``. Raises
    InputError as `build` does.
    """
    words = {nn.Conv2d: "convolution", nn.Linear: "fully connected", nn.BatchNorm2d: "batch normalisation"}
    found: dict[str, str] = {}
    for path, module in build(name, variant=variant, width=0.01, seed=0).named_modules():
        if word := words.get(type(module)):
            found[path] = f"{word} {1 + sum(other.startswith(word) for other in found.values())}"
    return found


def parameter_count(model: nn.Module) -> int:
    """Return the number of trainable weights."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def cuda_devices(model: nn.Module) -> list[torch.device]:
    """Return the CUDA device that a model is on, or nothing where it is on the CPU."""
    return list({p.device for p in model.parameters() if p.device.type == "cuda"})


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put the model into eval mode and give each module its own mode back afterwards, also after an error."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def inference(model: nn.Module) -> Iterator[Callable[[Tensor], Tensor]]:
    """Evaluate the model inside: in eval mode, without gradients, in full precision also on CUDA.

    What is yielded calls it on a copy of the inputs, since a network may work in place. The random state is kept, also
    by models that draw although they are in eval mode.
    """
    with torch.no_grad(), eval_mode(model), full_precision(), torch.random.fork_rng(cuda_devices(model)):
        yield lambda x: model(x.clone())


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluate inside in eval mode, in full precision, and with gradients; give all back afterwards as it was."""
    # The random state is kept for models that draw although they are not in train mode.
    with (
        eval_mode(model),
        full_precision(),
        torch.random.fork_rng(cuda_devices(model)),
        torch.inference_mode(False),
        torch.enable_grad(),
    ):
        yield


Scale = Callable[[int], int]


def _m1(classes: int, scaled: Scale) -> nn.Module:
    """LeNet as section 3.3 names it. Pooling before the ReLU: the same function (both are monotone), fewer ReLUs."""
    a, b, hidden = scaled(20), scaled(50), scaled(500)
    return nn.Sequential(
        nn.Conv2d(1, a, 5), nn.MaxPool2d(2), nn.ReLU(),
        nn.Conv2d(a, b, 5), nn.MaxPool2d(2), nn.ReLU(),
        nn.Flatten(),
        nn.Linear(b * 4 * 4, hidden), nn.ReLU(),
        nn.Linear(hidden, classes),
    )  # fmt: skip


def _m1_strided(classes: int, scaled: Scale) -> nn.Module:
    """Table 6's text to the letter: 5 x 5 convolutions of stride 2, padding 2, no pooling."""
    a, b, hidden = scaled(20), scaled(50), scaled(500)
    return nn.Sequential(
        nn.Conv2d(1, a, 5, stride=2, padding=2), nn.ReLU(),
        nn.Conv2d(a, b, 5, stride=2, padding=2), nn.ReLU(),
        nn.Flatten(),
        nn.Linear(b * 7 * 7, hidden), nn.ReLU(),
        nn.Linear(hidden, classes),
    )  # fmt: skip


class Normalise(nn.Module):
    """Subtracts a number and divides by another: inputs stay in [0, 1], and eps stays in pixel values."""

    def __init__(self, mean: float, deviation: float) -> None:
        super().__init__()
        self.mean, self.deviation = mean, deviation

    def extra_repr(self) -> str:
        """Return what the text of a network says of this layer."""
        return f"mean={self.mean:g}, deviation={self.deviation:g}"

    def forward(self, x: Tensor) -> Tensor:
        """Return (x - mean) / deviation, for x (N, C, H, W)."""
        return (x - self.mean) / self.deviation


def _m1_normalised(classes: int, scaled: Scale) -> nn.Module:
    """M1 on the inputs that most code for MNIST feeds it: of mean 0 and deviation 1 over the training set."""
    return nn.Sequential(Normalise(0.1307, 0.3081), *_m1(classes, scaled).children())


def _c1(classes: int, scaled: Scale) -> nn.Module:
    """ReLU, then batch normalisation, then pooling, as in the authors' later published code (HessianFlow)."""
    c, d, e = scaled(64), scaled(384), scaled(192)
    return nn.Sequential(
        nn.Conv2d(3, c, 5, padding=2), nn.ReLU(), nn.BatchNorm2d(c), nn.MaxPool2d(3, stride=2, padding=1),
        nn.Conv2d(c, c, 5, padding=2), nn.ReLU(), nn.BatchNorm2d(c), nn.MaxPool2d(3, stride=2, padding=1),
        nn.Flatten(),
        nn.Linear(c * 8 * 8, d), nn.ReLU(),
        nn.Linear(d, e), nn.ReLU(),
        nn.Linear(e, classes),
    )  # fmt: skip


def _c2_c3(classes: int, scaled: Scale, *, batch_norm: bool) -> nn.Module:
    """The network of Carlini and Wagner (2017) for CIFAR-10; C2 adds batch normalisation after each ReLU."""
    a, b, hidden = scaled(64), scaled(128), scaled(256)
    layers: list[nn.Module] = []
    for channels_in, channels_out, pooled in ((3, a, False), (a, a, True), (a, b, False), (b, b, True)):
        layers += [nn.Conv2d(channels_in, channels_out, 3), nn.ReLU()]
        layers += [nn.BatchNorm2d(channels_out)] if batch_norm else []
        layers += [nn.MaxPool2d(2)] if pooled else []
    return nn.Sequential(
        *layers,
        nn.Flatten(),
        nn.Linear(b * 5 * 5, hidden), nn.ReLU(),
        nn.Linear(hidden, hidden), nn.ReLU(),
        nn.Linear(hidden, classes),
    )  # fmt: skip


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut (He et al., 2016), projected by a 1 x 1 convolution where shapes differ."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(channels_out),
            nn.ReLU(),
            nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels_out),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels_out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels_out, 1, stride=stride, bias=False), nn.BatchNorm2d(channels_out)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output, (N, channels_out, H / stride, W / stride)."""
        return torch.relu(self.residual(x) + self.shortcut(x))


def _cr(classes: int, scaled: Scale) -> nn.Module:
    """ResNet-20: three stages of three blocks, 16, 32 and 64 channels times the width factor, He initialisation."""
    stages = [scaled(16), scaled(32), scaled(64)]
    layers: list[nn.Module] = [
        nn.Conv2d(3, stages[0], 3, padding=1, bias=False), nn.BatchNorm2d(stages[0]), nn.ReLU(),
    ]  # fmt: skip
    channels_in = stages[0]
    for stage, channels in enumerate(stages):
        for block in range(3):
            layers.append(ResidualBlock(channels_in, channels, stride=2 if stage and not block else 1))
            channels_in = channels
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(stages[-1], classes))
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model


MODELS: dict[str, Callable[[int, Scale], nn.Module]] = {
    "M1": _m1,
    "C1": _c1,
    "C2": lambda classes, scaled: _c2_c3(classes, scaled, batch_norm=True),
    "C3": lambda classes, scaled: _c2_c3(classes, scaled, batch_norm=False),
    "CR": _cr,
}
VARIANTS: dict[str, dict[str, Callable[[int, Scale], nn.Module]]] = {
    "M1": {"strided": _m1_strided, "normalised": _m1_normalised}
}
INPUT_SHAPES = {name: (1, 28, 28) if name == "M1" else (3, 32, 32) for name in MODELS}
