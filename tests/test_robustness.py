"""Accuracies under attack, transfer tables, and the checklist, on networks whose answers are known."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from networks import InPlace
from torch import Tensor, nn

from hessnb import landscape
from hessnb.attacks import fgsm, l2_gradient, pgd
from hessnb.data import Splits
from hessnb.errors import InputError
from hessnb.models import build
from hessnb.robustness import (
    accuracy,
    accuracy_curve,
    accuracy_under,
    agreement,
    checklist,
    predictions,
    transfer,
    worst_case,
)
from hessnb.training import Recipe, evaluate, train


def line() -> nn.Module:
    """Two classes of one pixel, divided at 0.5."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(1, 2))
    model.load_state_dict({"1.weight": torch.tensor([[-1.0], [1.0]]), "1.bias": torch.tensor([0.5, -0.5])})
    return model


X = torch.tensor([0.05, 0.2, 0.45, 0.6, 0.7, 0.95]).view(-1, 1, 1, 1)
Y = torch.tensor([0, 0, 0, 1, 1, 1])


def test_accuracy_falls_where_the_nearest_boundary_comes_into_reach() -> None:
    curve = accuracy_curve(line(), fgsm, X, Y, [0.01, 0.06, 0.15, 0.25, 0.35, 0.5])
    assert [round(6 * point.value) for point in curve] == [6, 5, 4, 3, 2, 0]
    assert all(point.low <= point.value <= point.high for point in curve)
    assert accuracy(line(), X, Y).value == 1.0


def test_transferred_attacks_are_those_made_on_the_source() -> None:
    mirrored = nn.Sequential(nn.Flatten(), nn.Linear(1, 2))
    mirrored.load_state_dict({"1.weight": torch.tensor([[1.0], [-1.0]]), "1.bias": torch.tensor([-0.5, 0.5])})

    def attack(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return fgsm(model, x, y, eps=0.35)

    assert accuracy_under(line(), attack, X, Y).value == pytest.approx(2 / 6)
    assert accuracy_under(line(), attack, X, Y, source=mirrored).value == 1.0  # it moves them the other way
    sets = {"clean": X, "attacked": attack(line(), X, Y)}
    table = transfer({"line": line(), "mirrored": mirrored}, sets, Y)
    assert {(a, b): round(6 * cell.value) for a, row in table.items() for b, cell in row.items()} == {
        ("line", "clean"): 6,
        ("line", "attacked"): 2,
        ("mirrored", "clean"): 0,
        ("mirrored", "attacked"): 4,
    }


def test_worst_case_counts_a_sample_that_any_attack_fools() -> None:
    up, down = (X + 0.25).clamp(0, 1), (X - 0.25).clamp(0, 1)
    assert worst_case(line(), [X], Y).value == 1.0
    assert worst_case(line(), [up], Y).value == pytest.approx(5 / 6)
    assert worst_case(line(), [up, down], Y).value == pytest.approx(3 / 6)


@pytest.mark.parametrize(
    ("x", "y", "fault"),
    [
        (X, Y[:, None], "must be integers of shape"),
        (X, Y[:1], "6 inputs and 1 labels"),
        (X, Y.double(), "must be integers of shape"),
        (X, Y.bool(), "must be integers of shape"),
        (X, Y + 1, "labels from 1 to 2, the model 2 outputs"),
        (X * torch.nan, Y, "holds NaN or infinity"),
    ],
)
def test_samples_and_labels_that_do_not_fit_are_refused(x: Tensor, y: Tensor, fault: str) -> None:
    with pytest.raises(InputError, match=fault):
        accuracy(line(), x, y)
    with pytest.raises(InputError, match=fault):
        worst_case(line(), [x], y)


def test_outputs_that_are_not_finite_are_no_predictions() -> None:
    class Overflow(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([x.flatten(), 1 / (x.flatten() - X[4].item())], dim=1)

    with pytest.raises(InputError, match="outputs are not finite"):
        accuracy(Overflow(), X, Y)


def test_no_attack_has_no_worst_case() -> None:
    with pytest.raises(InputError, match="at least one attack"):
        worst_case(line(), [], Y)


def test_agreement_compares_predictions_of_the_same_samples() -> None:
    first = predictions(line(), X)
    assert torch.equal(first, Y)
    assert agreement(first, 1 - first).value == 0.0
    assert agreement(first, torch.tensor([0, 0, 1, 1, 1, 1])).value == pytest.approx(5 / 6)
    with pytest.raises(InputError, match=r"\(6,\) and \(5,\)"):
        agreement(first, first[:5])


@pytest.fixture(scope="module")
def trained(digits: Splits) -> nn.Module:
    model = build("M1", width=0.2, seed=0)
    train(model, digits, Recipe(batch_size=20, lr=0.05, momentum=0.9, max_epochs=12, seed=0))
    return model


def test_checklist_passes_a_strong_attack_and_tells_a_weak_one(trained: nn.Module, digits: Splits) -> None:
    x, y = digits.test.images[:100], digits.test.labels[:100]

    def strong(model: nn.Module, x: Tensor, y: Tensor, *, eps: float) -> Tensor:
        return pgd(model, x, y, eps=eps, steps=20)

    def weak(model: nn.Module, x: Tensor, y: Tensor, *, eps: float) -> Tensor:
        return (x + 0.01 * eps * torch.ones_like(x)).clamp(0, 1)

    other = build("M1", width=0.2, seed=1)
    passed = checklist(trained, strong, x, y, eps=0.1, surrogate=other)
    assert all(check.passed for check in passed), [c for c in passed if not c.passed]
    assert len(passed) == 10
    failed = {check.question: check for check in checklist(trained, weak, x, y, eps=0.1)}
    assert len(failed) == 9
    for question in ("The attack lowers the accuracy", "It is as strong as 20 iterated steps"):
        assert not failed[question].passed
        assert "(" in failed[question].evidence
    assert failed["The network is accurate without an attack"].passed


@pytest.mark.parametrize(
    "beyond",
    [
        lambda model, x, y, eps: l2_gradient(model, x, y, eps=eps),
        lambda model, x, y, eps: fgsm(model, x, y, eps=eps, bounds=None),
    ],
    ids=["another norm", "no bounds"],
)
def test_checklist_tells_an_attack_that_leaves_the_threat_model(
    trained: nn.Module, digits: Splits, beyond: Callable[..., Tensor]
) -> None:
    few = digits.test.images[:20], digits.test.labels[:20]
    checks = {check.question: check for check in checklist(trained, beyond, *few, eps=0.1)}
    assert not checks["The attack keeps to its size and to [0, 1]"].passed
    checks = {check.question: check for check in checklist(trained, fgsm, *few, eps=0.1)}
    assert checks["The attack keeps to its size and to [0, 1]"].passed


def test_checklist_refuses_an_attack_that_returns_no_numbers(trained: nn.Module, digits: Splits) -> None:
    few = digits.test.images[:20], digits.test.labels[:20]
    with pytest.raises(InputError, match="holds NaN or infinity"):
        checklist(trained, lambda model, x, y, eps: torch.full_like(x, math.nan), *few, eps=0.1)


def test_networks_that_work_in_place_change_no_data_of_others(digits: Splits) -> None:
    model = nn.Sequential(InPlace(), build("M1", width=0.2, seed=0))
    split = digits.test.head(20)
    before = split.images.clone()
    first = accuracy(model, split.images, split.labels)
    assert accuracy(model, split.images, split.labels) == first
    assert evaluate(model, split) == evaluate(model, split)
    nowhere = torch.zeros(sum(p.numel() for p in model.parameters()))
    sets = {"test": [(split.images, split.labels)]}
    losses = landscape.along(model, nn.functional.cross_entropy, sets, nowhere, [0.0, 1.0]).losses["test"]
    assert losses[0] == losses[1]
    assert torch.equal(split.images, before)


def test_checklist_tells_each_weakness(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.tensor([0.45, 0.55]).repeat(50).view(-1, 1, 1, 1)
    y, attacked, other = torch.tensor([0, 1]).repeat(50), line(), line()

    def only_on_others(model: nn.Module, x: Tensor, y: Tensor, *, eps: float) -> Tensor:
        return x if model is attacked else fgsm(model, x, y, eps=eps)

    def only_in_forty_steps(model: nn.Module, x: Tensor, y: Tensor, *, eps: float, steps: int) -> Tensor:
        return fgsm(model, x, y, eps=eps) if steps == 40 else x

    weak = checklist(attacked, only_on_others, x, y, eps=0.1, surrogate=other)
    assert [check.question for check in weak if not check.passed] == [
        "The attack lowers the accuracy",
        "It is at least as strong as random signs of the same size",
        "It is as strong as 20 iterated steps",
        "It is the worst case over all attacks tried",
        "White-box is at least as strong as transfer",
    ]
    monkeypatch.setattr("hessnb.robustness.pgd", only_in_forty_steps)
    masked = checklist(attacked, fgsm, x, y, eps=0.1)
    assert [check.question for check in masked if not check.passed] == [
        "Iterating is at least as strong as one step",
        "Twice the steps find no more",
        "An unbounded attack succeeds on nearly all samples",
    ]


@pytest.mark.parametrize(("strength", "passed"), [(35, False), (45, True)])
def test_checklist_allows_for_the_interval_of_the_attack_and_not_for_that_of_noise_or_transfer(
    strength: int, passed: bool
) -> None:
    x = torch.tensor([0.45, 0.55]).repeat(50).view(-1, 1, 1, 1)
    y, attacked, other = torch.tensor([0, 1]).repeat(50), line(), line()

    def fools(model: nn.Module, x: Tensor, y: Tensor, *, eps: float) -> Tensor:
        n = strength if model is attacked else 50
        return torch.cat([fgsm(model, x[:n], y[:n], eps=eps), x[n:]])

    # Noise leaves half the accuracy, as transfer does: 65 % are above it, 55 % are not, to 95 % of a hundred samples.
    found = {check.question: check for check in checklist(attacked, fools, x, y, eps=0.1, surrogate=other)}
    against = "It is at least as strong as random signs of the same size", "White-box is at least as strong as transfer"
    assert [found[question].passed for question in against] == [passed, passed], [found[q].evidence for q in against]


def test_checklist_notices_a_network_that_guesses(digits: Splits) -> None:
    untrained = build("M1", width=0.2, seed=0)
    first = checklist(untrained, fgsm, digits.test.images[:50], digits.test.labels[:50], eps=0.1)[0]
    assert not first.passed
