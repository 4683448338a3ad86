"""hessnb.models: the networks of Table 6, their sizes, their seeds, and that they are piecewise linear."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hessnb.errors import InputError
from hessnb.models import INPUT_SHAPES, MODELS, build, eval_mode, layers, parameter_count

Untouched = Callable[..., AbstractContextManager[None]]


def images(name: str, n: int = 2) -> Tensor:
    return torch.rand(n, *INPUT_SHAPES[name], generator=torch.Generator().manual_seed(1))


def small(name: str, **options: Any) -> nn.Module:
    return build(name, width=0.1, seed=0, **options)


def conv(channels_in: int, channels_out: int, kernel: int) -> int:
    return channels_out * (channels_in * kernel**2 + 1)


def linear(*sizes: int) -> int:
    return sum((n_in + 1) * n_out for n_in, n_out in itertools.pairwise(sizes))


def c2_c3_convolutions() -> int:
    return conv(3, 64, 3) + conv(64, 64, 3) + conv(64, 128, 3) + conv(128, 128, 3)


def cr() -> int:
    """The first convolution, then 6 convolutions and batch norms a stage; a projection where channels double."""
    total = 3 * 16 * 9 + 2 * 16
    channels_in = 16
    for channels in (16, 32, 64):
        total += 9 * channels * (channels_in + 5 * channels) + 6 * 2 * channels
        total += channels_in * channels + 2 * channels if channels != channels_in else 0
        channels_in = channels
    return total + linear(64, 100)


@pytest.mark.parametrize(
    ("name", "variant", "formula", "count"),
    [
        ("M1", None, conv(1, 20, 5) + conv(20, 50, 5) + linear(50 * 4 * 4, 500, 10), 431_080),
        ("M1", "strided", conv(1, 20, 5) + conv(20, 50, 5) + linear(50 * 7 * 7, 500, 10), 1_256_080),
        ("C1", None, conv(3, 64, 5) + conv(64, 64, 5) + 2 * 128 + linear(64 * 8 * 8, 384, 192, 10), 1_756_682),
        ("C2", None, c2_c3_convolutions() + 2 * (128 + 256) + linear(128 * 5 * 5, 256, 256, 10), 1_148_746),
        ("C3", None, c2_c3_convolutions() + linear(128 * 5 * 5, 256, 256, 10), 1_147_978),
        ("CR", None, cr(), 278_324),
    ],
)
def test_a_network_has_the_weights_of_table_6(name: str, variant: str | None, formula: int, count: int) -> None:
    assert parameter_count(build(name, variant=variant)) == formula == count


def test_parameter_count_leaves_out_frozen_weights() -> None:
    model = nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    assert parameter_count(model) == 6


@pytest.mark.parametrize("name", MODELS)
def test_a_network_returns_one_logit_per_class(name: str) -> None:
    assert small(name)(images(name)).shape == (2, 100 if name == "CR" else 10)
    logits = small(name, num_classes=3)(images(name))
    assert logits.shape == (2, 3)
    assert (logits.softmax(1).sum(1) - 1).abs().max() < 1e-6 < logits.sum(1).abs().max()


def test_the_stages_of_cr_halve_the_resolution() -> None:
    features = nn.Sequential(*list(build("CR").children())[:-3])
    assert features(images("CR")).shape == (2, 64, 8, 8)


def test_the_strided_m1_takes_the_same_images() -> None:
    assert small("M1", variant="strided")(images("M1")).shape == (2, 10)


def test_the_normalised_m1_is_m1_on_normalised_images() -> None:
    plain, normalised = (build("M1", variant=variant, seed=3) for variant in (None, "normalised"))
    assert torch.equal(normalised(images("M1")), plain((images("M1") - 0.1307) / 0.3081))
    assert parameter_count(normalised) == parameter_count(plain)


@pytest.mark.parametrize("name", MODELS)
def test_width_scales_every_layer(name: str) -> None:
    def sizes(width: float) -> list[int]:
        layers = [m for m in build(name, width=width).modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        return [layer.weight.shape[0] for layer in layers[:-1]]  # the last layer has the classes

    assert sizes(2.0) == [2 * n for n in sizes(1.0)]
    assert sizes(0.5) == [n // 2 for n in sizes(1.0)]
    assert set(sizes(1e-9)) == {1}


@pytest.mark.parametrize("name", MODELS)
def test_a_seed_fixes_the_weights_and_leaves_the_global_random_state(name: str, untouched: Untouched) -> None:
    with untouched():
        first, again, other = (build(name, width=0.1, seed=seed) for seed in (3, 3, 4))
    states = [list(model.state_dict().values()) for model in (first, again, other)]
    assert all(torch.equal(a, b) for a, b in zip(states[0], states[1], strict=True))
    assert not torch.equal(states[0][0], states[2][0])


def test_a_seed_leaves_the_random_states_of_other_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(seed: int) -> None:
        raise AssertionError(f"the CUDA generators were seeded with {seed}")

    monkeypatch.setattr(torch.cuda, "manual_seed_all", fail)
    build("M1", width=0.1, seed=0)


def test_without_a_seed_the_weights_come_from_the_global_random_state() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        drawn = build("M1", width=0.1)
        assert not torch.equal(drawn[0].weight, build("M1", width=0.1)[0].weight)  # type: ignore[index]
    seeded = build("M1", width=0.1, seed=5)
    assert all(torch.equal(a, b) for a, b in zip(drawn.parameters(), seeded.parameters(), strict=True))


def test_pooling_before_the_relu_is_the_same_function() -> None:
    m1 = small("M1").eval()
    layers = list(m1.children())
    assert isinstance(layers[1], nn.MaxPool2d)
    assert isinstance(layers[2], nn.ReLU)
    for pool in (1, 4):
        layers[pool], layers[pool + 1] = layers[pool + 1], layers[pool]
    assert torch.equal(nn.Sequential(*layers)(images("M1")), m1(images("M1")))


@pytest.mark.parametrize(
    ("name", "variant"), [*((name, None) for name in MODELS), ("M1", "strided"), ("M1", "normalised")]
)
def test_logits_are_piecewise_linear_in_the_input_in_eval_mode(name: str, variant: str | None) -> None:
    model = small(name, variant=variant).double()
    model(images(name, 8).double())  # in train mode: gives batch norm statistics of its own
    model.eval()
    first, second = slopes(model, images(name, 3).double())
    assert first.abs().min() > 0
    assert (second == 0).all()
    model.train()
    if any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        assert slopes(model, images(name, 3).double())[1].abs().min() > 1e-6


def slopes(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first and second derivatives of a random mean of the logits along a random direction, per sample."""
    generator = torch.Generator().manual_seed(2)
    direction = torch.randn(x.shape, dtype=x.dtype, generator=generator)
    t = torch.zeros(len(x), 1, 1, 1, dtype=x.dtype, requires_grad=True)
    logits = model(x + t * direction)
    mean = (logits * torch.randn(logits.shape, dtype=x.dtype, generator=generator)).sum()
    (first,) = torch.autograd.grad(mean, t, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), t, materialize_grads=True)
    return first.detach(), second


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "M2"}, "unknown model 'M2'; there is: M1, C1, C2, C3, CR"),
        ({"name": "C1", "variant": "strided"}, "unknown variant of C1 'strided'"),
        ({"name": "M1", "variant": "dilated"}, "unknown variant of M1 'dilated'; there is: strided, normalised, none"),
        ({"name": "M1", "num_classes": 1}, "num_classes = 1"),
        ({"name": "M1", "num_classes": 0}, "num_classes = 0"),
        ({"name": "M1", "num_classes": 2.5}, "num_classes = 2.5"),
        ({"name": "M1", "width": 0.0}, "width = 0.0"),
        ({"name": "M1", "width": -1.0}, "width = -1.0"),
        ({"name": "M1", "width": float("nan")}, "width = nan"),
        ({"name": "M1", "width": float("inf")}, "width = inf"),
    ],
)
def test_a_network_that_cannot_be_built_is_an_error(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build(**options)


@pytest.mark.parametrize("error", [None, RuntimeError("inside")])
def test_eval_mode_gives_each_module_its_own_mode_back(error: Exception | None, untouched: Untouched) -> None:
    model = small("C1").train()
    frozen = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert frozen
    for module in frozen:
        module.eval()
    with untouched(model):
        try:
            with eval_mode(model):
                assert not any(module.training for module in model.modules())
                if error:
                    raise error
        except RuntimeError as caught:
            assert caught is error
    assert model.training
    assert not frozen[0].training


@pytest.mark.parametrize("name", MODELS)
def test_layers_name_every_module_with_weights_of_its_own(name: str) -> None:
    network = build(name, width=0.1)
    own = {path for path, module in network.named_modules() if list(module.parameters(recurse=False))}
    named = layers(name)
    assert set(named) == own
    assert len(set(named.values())) == len(named)


def test_layers_of_m1_are_readable() -> None:
    expected = {"0": "convolution 1", "3": "convolution 2", "7": "fully connected 1", "9": "fully connected 2"}
    assert layers("M1") == expected
