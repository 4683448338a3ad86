"""The checks of section 2: signs and ranks of input Hessians, and where a network has no derivative at all."""

from __future__ import annotations

import torch
from torch import nn

from hessnb import models
from hessnb.data import Splits
from hessnb.paper.theory import bend_of_logits, input_eigenvalues, saddle_free, violations, with_activation


def diagonal(*rows: list[float]) -> torch.Tensor:
    """Return eigenvalues (N, d) as given, of one sample each."""
    return torch.tensor(rows, dtype=torch.float64)


def test_signs_and_ranks_are_relative_to_each_sample_s_own_largest_eigenvalue() -> None:
    sound = diagonal([1e6, 1e3, 0.0, -1e-9], [1e-9, 1e-20, 1e-24, -1e-24])
    saddles = diagonal([1e-9, 1e-12, 1e-14, -1e-21], [1.0, 0.5, 0.1, 0.01])
    table = saddle_free({"sound": (sound, 3), "saddles": (saddles, 3)}, name="t", caption="")
    assert [row[4:6] for row in table.rows] == [("yes", "2"), ("no", "4")]
    assert violations(sound, 3).to_dict("list") == {"indefinite": [0, 0], "rank_above": [0, 0]}
    assert violations(saddles, 3).to_dict("list") == {"indefinite": [1, 0], "rank_above": [1, 1]}


def test_the_scale_of_a_sample_is_its_largest_magnitude_of_either_sign() -> None:
    found = violations(diagonal([1e-20, -1e-16, -1.0], [1.0, 1e-16, -1e-20]), 2)
    assert found.to_dict("list") == {"indefinite": [1, 0], "rank_above": [0, 0]}


def test_a_rank_of_as_many_as_there_are_classes_is_one_too_many() -> None:
    assert violations(diagonal([1.0, 0.5, 0.0], [1.0, 0.0, 0.0]), 2)["rank_above"].tolist() == [1, 0]


def test_a_hessian_that_is_zero_is_no_saddle() -> None:
    table = saddle_free({"dead": (diagonal([0.0, 0.0], [1.0, 0.0]), 2)}, name="t", caption="")
    assert table.rows[0][3:6] == ("0.0e+00", "yes", "0 to 1")


def test_every_activation_is_exchanged_also_one_that_is_used_twice() -> None:
    relu = nn.ReLU()
    changed = with_activation(nn.Sequential(nn.Linear(2, 2), relu, nn.Linear(2, 2), relu), nn.Tanh())
    assert isinstance(changed, nn.Sequential)
    assert [type(layer) for layer in changed] == [nn.Linear, nn.Tanh, nn.Linear, nn.Tanh]


def test_confident_networks_have_no_negative_eigenvalue_beyond_rounding(digits: Splits) -> None:
    model = models.build("M1", width=0.25, seed=1).eval()
    with torch.no_grad():  # so sure of itself that one minus the probability has few digits left
        next(module for module in reversed(list(model.modules())) if isinstance(module, nn.Linear)).weight *= 2000
    some = digits.train.head(6)
    eigenvalues = input_eigenvalues(model, some.images, some.labels)
    assert eigenvalues[:, 0].min() < 1e-6 * eigenvalues[:, 0].max()
    assert not violations(eigenvalues, 10).any(axis=None)
    smooth = input_eigenvalues(with_activation(model, nn.Softplus()), some.images, some.labels)
    assert violations(smooth, 10)["indefinite"].any()


def test_digits_lie_on_kinks_and_noise_takes_them_off(digits: Splits) -> None:
    model, images = models.build("M1", width=0.25, seed=1), digits.train.images[:8]
    noise = 1e-3 * torch.rand(images.shape, generator=torch.Generator().manual_seed(1))
    assert (bend_of_logits(model, images) > 0.01).all()
    assert (bend_of_logits(model, images + noise) < 1e-5).all()
    assert (bend_of_logits(nn.Sequential(nn.Flatten(), nn.Linear(784, 10)), images) < 1e-5).all()
