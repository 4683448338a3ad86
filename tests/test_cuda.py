"""On a CUDA device all is what it is on the CPU: products, eigenvalues, attacks, trainings, landscapes, a campaign."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

from hessnb import landscape
from hessnb.attacks import ATTACKS, BEYOND, fgsm, l2_gradient
from hessnb.curvature import (
    GGNOperator,
    HessianOperator,
    input_curvature,
    input_hessian_eigenvalues,
    input_hessian_solve,
    lanczos,
)
from hessnb.data import Split, Splits
from hessnb.experiments import campaign, grid
from hessnb.experiments.profile import load_profile
from hessnb.experiments.provenance import device_name
from hessnb.experiments.store import Store
from hessnb.models import INPUT_SHAPES, build
from hessnb.sharpness import sharpness_along
from hessnb.training import Recipe, evaluate, train

DEVICE = "cuda"
WIDTHS = {"M1": 0.5, "C1": 0.25, "C2": 0.25, "C3": 0.25, "CR": 0.5}
RECIPE = Recipe(batch_size=16, lr=0.02, momentum=0.9, max_epochs=3, seed=3)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


def network(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor, Tensor]:
    """Return a network in eval mode and 30 samples, on the CPU."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(30, *INPUT_SHAPES[name], dtype=dtype, generator=generator)
    return build(name, width=WIDTHS[name], seed=0).to(dtype).eval(), x, torch.randint(10, (30,), generator=generator)


def there(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).to(DEVICE)


def close(found: Tensor, expected: Tensor, rtol: float) -> None:
    """Compare by the length of the difference: single entries may be next to nothing."""
    assert found.device.type == DEVICE
    off = torch.linalg.vector_norm(found.cpu().double() - expected.double())
    assert off <= rtol * torch.linalg.vector_norm(expected.double())


@pytest.mark.parametrize("kind", [HessianOperator, GGNOperator])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
@pytest.mark.parametrize("name", ["M1", "C1", "C2", "CR"])
def test_products_are_those_of_the_cpu(
    name: str, dtype: torch.dtype, rtol: float, kind: Callable[..., HessianOperator]
) -> None:
    """With TF32 those in float32 would be right to three digits at best."""
    model, x, y = network(name)
    v = torch.randn(sum(p.numel() for p in model.parameters()), dtype=dtype, generator=torch.Generator().manual_seed(1))
    expected = kind(model, F.cross_entropy, [(x, y)]) @ v.double()
    batches = [
        (part.to(DEVICE, dtype), labels.to(DEVICE)) for part, labels in zip(x.split(16), y.split(16), strict=True)
    ]
    close(kind(there(model).to(dtype), F.cross_entropy, batches) @ v.to(DEVICE), expected, rtol)


def test_eigenvalues_are_those_of_the_cpu() -> None:
    model, x, y = network("M1")
    expected = lanczos(HessianOperator(model, F.cross_entropy, [(x, y)]), k=3, tol=1e-8)
    operator = HessianOperator(there(model), F.cross_entropy, [(x.to(DEVICE), y.to(DEVICE))])
    found = lanczos(operator, k=3, tol=1e-8)
    assert found.eigenvalues.tolist() == pytest.approx(expected.eigenvalues.tolist(), rel=1e-7)
    cosines = (found.eigenvectors.cpu() * expected.eigenvectors).sum(1).abs()
    assert cosines.min() > 1 - 1e-6


@pytest.mark.parametrize("name", [*ATTACKS, *BEYOND])
def test_attacks_are_those_of_the_cpu(name: str) -> None:
    model, x, y = network("M1")
    attack = partial((ATTACKS | BEYOND)[name], eps=0.1)
    found = attack(there(model), x.to(DEVICE), y.to(DEVICE))
    assert found.device.type == DEVICE
    # A sign can turn where a gradient is next to nothing.
    assert ((found.cpu() - attack(model, x, y)).abs() > 1e-8).double().mean() < 1e-3


def test_input_curvature_is_that_of_the_cpu() -> None:
    model, x, y = network("M1")
    device, x_there, y_there = there(model), x.to(DEVICE), y.to(DEVICE)
    close(input_hessian_eigenvalues(device, x_there), input_hessian_eigenvalues(model, x), 1e-9)
    expected, found = input_curvature(model, x, y), input_curvature(device, x_there, y_there)
    close(found.gradient_norms, expected.gradient_norms, 1e-9)
    close(
        input_hessian_solve(device, x_there, x_there, damping=0.1), input_hessian_solve(model, x, x, damping=0.1), 1e-8
    )


def test_losses_on_a_line_are_those_of_the_cpu() -> None:
    model, x, y = network("C1")
    direction = parameters_to_vector(model.parameters()).detach()
    losses = landscape.along(model, F.cross_entropy, {"train": [(x, y)]}, direction, [-0.5, 0.0, 0.5]).losses["train"]
    sets = {"train": [(x.to(DEVICE), y.to(DEVICE))]}
    found = landscape.along(there(model), F.cross_entropy, sets, direction.to(DEVICE), [-0.5, 0.0, 0.5]).losses["train"]
    assert found.tolist() == pytest.approx(losses.tolist(), rel=1e-10)


def on_device(data: Splits, dtype: torch.dtype = torch.float32) -> Splits:
    train_set, test_set = (
        Split(split.images.to(DEVICE, dtype), split.labels.to(DEVICE)) for split in (data.train, data.test)
    )
    return Splits(train_set, test_set, data.classes)


def test_fast_trainings_one_after_the_other_learn_as_on_the_cpu(digits: Splits) -> None:
    """TF32 changes the digits of a loss and not what it comes to; and nothing stays switched or allocated."""
    switches = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    for width in (0.5, 0.25):
        models = [build("M1", width=width, seed=0) for _ in range(2)]
        train(models[0], digits, RECIPE)
        train(models[1].to(DEVICE), on_device(digits), RECIPE)
        expected, found = (evaluate(m, s.train)[0] for m, s in zip(models, (digits, on_device(digits)), strict=True))
        assert found == pytest.approx(expected, rel=0.1)
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == switches


@pytest.mark.parametrize("attack", [l2_gradient, fgsm])
def test_adversarial_training_is_that_of_the_cpu(
    in_float64: Callable[[str], Splits], attack: Callable[..., Tensor]
) -> None:
    data, perturbation = in_float64("mnist5k"), partial(attack, eps=0.02)
    models = [network("M1")[0] for _ in range(2)]
    recipe = replace(RECIPE, max_epochs=1)
    train(models[0], data, recipe, perturbation=perturbation)
    train(models[1].to(DEVICE), on_device(data, torch.float64), recipe, perturbation=perturbation)
    weights = [parameters_to_vector(m.parameters()).detach() for m in models]
    close(weights[1], weights[0], 1e-4)


def test_curvature_between_captured_steps_is_that_of_the_cpu(in_float64: Callable[[str], Splits]) -> None:
    data = in_float64("mnist5k")
    models = [network("M1")[0] for _ in range(2)]
    expected = sharpness_along(models[0], data, RECIPE, [0, 1, 3], tol=1e-4)
    found = sharpness_along(models[1].to(DEVICE), on_device(data, torch.float64), RECIPE, [0, 1, 3], tol=1e-4)
    assert [point.lambda1 for point in found] == pytest.approx([point.lambda1 for point in expected], rel=1e-3)


def test_campaign_computes_all_that_a_table_needs(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    tasks = grid.plan([grid.artefact(name) for name in ("table7", "table3", "fig11", "fig6")], load_profile("smoke"), 2)
    assert campaign.carry_out(store, tasks, device=DEVICE) == []
    for task in tasks:
        result = store.result(task.spec)
        assert result is not None
        assert result.provenance["device"] == device_name(torch.device(DEVICE))
        assert all(store.measurement(task.spec, measure) for measure in task.measures)
