"""Loss landscapes against closed forms, dense float64 truth, and uninterrupted runs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hessnb import points
from hessnb.data import Splits
from hessnb.errors import InputError
from hessnb.landscape import (
    Landscape,
    along,
    between,
    filter_normalise,
    on_plane,
    random_direction,
)
from hessnb.models import build
from hessnb.points import PointFile
from hessnb.training import evaluate

Batches = list[tuple[Tensor, Tensor]]
LINE = torch.linspace(-1, 1, 9, dtype=torch.float64)


def network(kind: str = "deep", seed: int = 0) -> nn.Module:
    """Return a small float64 network for 1 x 6 x 6 inputs and 3 classes, in train mode, with used statistics."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if kind == "linear":
            layers: list[nn.Module] = [nn.Flatten(), nn.Linear(36, 1), nn.Flatten(0)]
        elif kind == "smooth":
            layers = [nn.Flatten(), nn.Linear(36, 2), nn.Tanh(), nn.Linear(2, 3)]
        elif kind == "one norm":
            layers = [nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3)]
        elif kind == "flat norm":
            layers = [nn.Flatten(), nn.Linear(36, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)]
        else:
            layers = [nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Dropout(), nn.Conv2d(2, 2, 3)]
            layers += [nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3)]
        model = nn.Sequential(*layers).double()
        for _ in range(3):
            model(1 + torch.rand(16, 1, 6, 6, dtype=torch.float64))  # gives batch normalisation some statistics
        return model


def samples(n: int = 23, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, 1, 6, 6, dtype=torch.float64, generator=generator), torch.randint(3, (n,), generator=generator)


def batched(x: Tensor, y: Tensor, size: int) -> Batches:
    return list(zip(x.split(size), y.split(size), strict=True))


def drawn(model: nn.Module, seed: int = 0) -> Tensor:
    return random_direction(model, torch.Generator().manual_seed(seed))


def moved(model: nn.Module, step: Tensor) -> nn.Module:
    copy = deepcopy(model).eval()
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(copy.parameters()) + step, copy.parameters())
    return copy


def whole_loss(model: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return float(F.cross_entropy(model.eval()(x), y))


def assert_same(one: Landscape, other: Landscape) -> None:
    """Fail unless two landscapes are equal bit by bit."""
    assert all(torch.equal(a, b) for a, b in zip(one.axes, other.axes, strict=True))
    for mine, theirs in ((one.losses, other.losses), (one.accuracies, other.accuracies)):
        assert list(mine) == list(theirs)
        for name in mine:
            torch.testing.assert_close(mine[name], theirs[name], rtol=0, atol=0, equal_nan=True)


class Counted:
    """A loss function that counts its calls and may fail at one of them."""

    def __init__(self, loss_fn: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy, fail_at: int = -1) -> None:
        self.loss_fn, self.fail_at, self.calls = loss_fn, fail_at, 0

    def __call__(self, output: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.fail_at:
            raise RuntimeError("stopped")
        return self.loss_fn(output, y)


def test_squared_loss_of_a_linear_model_is_a_parabola_along_a_line_and_a_paraboloid_on_a_plane() -> None:
    model, (x, _) = network("linear"), samples()
    y = x.mean((1, 2, 3))
    d, e = drawn(model, 1), drawn(model, 2)
    columns = torch.cat([x.flatten(1), torch.ones(len(x), 1, dtype=torch.float64)], dim=1)
    residual = model(x).detach() - y
    line = along(model, F.mse_loss, {"ragged": batched(x, y, 5)}, d, LINE)
    expected = torch.stack([(residual + t * (columns @ d)).square().mean() for t in LINE])
    torch.testing.assert_close(line.losses["ragged"], expected, rtol=1e-13, atol=1e-14)
    xs, ys = [0.5, -2.0], [0.0, 1.5, 3.0]
    plane = on_plane(model, F.mse_loss, {"ragged": batched(x, y, 5)}, (d, e), xs, ys)
    expected = torch.stack([(residual + s * (columns @ d) + t * (columns @ e)).square().mean() for s in xs for t in ys])
    torch.testing.assert_close(plane.losses["ragged"], expected.view(2, 3), rtol=1e-13, atol=1e-14)
    assert plane.losses["ragged"].shape == plane.accuracies["ragged"].shape == (2, 3)
    assert plane.accuracies["ragged"].isnan().all()  # a regression has none
    assert [axis.tolist() for axis in plane.axes] == [xs, ys]


@pytest.mark.parametrize("which", [0, -1])
def test_second_difference_along_an_eigenvector_is_its_eigenvalue(which: int) -> None:
    model, (x, y) = network("smooth"), samples()
    names = [name for name, _ in model.named_parameters()]

    def loss(theta: Tensor) -> Tensor:
        parts = theta.split([p.numel() for p in model.parameters()])
        shaped = [part.view_as(p) for part, p in zip(parts, model.parameters(), strict=True)]
        return F.cross_entropy(torch.func.functional_call(model, dict(zip(names, shaped, strict=True)), (x,)), y)

    hessian: Any = torch.autograd.functional.hessian(loss, nn.utils.parameters_to_vector(model.parameters()).detach())
    eigenvalues, vectors = torch.linalg.eigh(hessian)
    h = 1e-3
    below, here, above = along(model, F.cross_entropy, {"all": batched(x, y, 7)}, vectors[:, which], [-h, 0, h]).losses[
        "all"
    ]
    assert float(above - 2 * here + below) / h**2 == pytest.approx(float(eigenvalues[which]), rel=1e-5)


@settings(deadline=None, max_examples=20)
@given(size=st.integers(1, 30), order=st.permutations(range(23)))
def test_result_does_not_know_how_the_data_are_batched(size: int, order: list[int]) -> None:
    model, (x, y) = network(), samples()
    d = drawn(model)
    parts = [(x[:0], y[:0]), *batched(x[order], y[order], size)]  # an empty batch counts for nothing
    found = along(model, F.cross_entropy, {"parts": parts, "whole": [(x, y)]}, d, [-0.3, 0.0, 0.3])
    torch.testing.assert_close(found.losses["parts"], found.losses["whole"], rtol=1e-13, atol=0)
    assert torch.equal(found.accuracies["parts"], found.accuracies["whole"])
    assert float(found.losses["whole"][2]) == pytest.approx(whole_loss(moved(model, 0.3 * d), x, y), rel=1e-13)


def test_several_sets_at_once_have_the_losses_and_accuracies_of_the_network(digits: Splits, tiny_m1: nn.Module) -> None:
    read = iter(digits.train.batches(70))  # can be read only once
    sets = {"train": read, "test": digits.test.batches(30), "batch": digits.train.batches(16)[:1]}
    found = along(tiny_m1, F.cross_entropy, sets, drawn(tiny_m1), [0.0, 0.01])
    assert list(found.losses) == ["train", "test", "batch"]
    for name, part in (("train", digits.train), ("test", digits.test), ("batch", digits.train.head(16))):
        loss, accuracy = evaluate(tiny_m1, part)
        assert float(found.losses[name][0]) == pytest.approx(loss, rel=1e-6)
        assert float(found.accuracies[name][0]) == pytest.approx(accuracy, abs=1e-12)
        assert found.losses[name].dtype == found.accuracies[name].dtype == torch.float64


@pytest.mark.parametrize(
    "loss", [nn.CrossEntropyLoss(reduction="sum"), nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2, 3]).double())]
)
def test_a_loss_that_is_no_mean_is_refused_before_anything_is_kept(loss: nn.Module, tmp_path: Path) -> None:
    x, y = samples()
    for name, batches in {"mixed": batched(x, y, 5), "by class": [(x[c == y], y[c == y]) for c in range(3)]}.items():
        with pytest.raises(InputError, match="not a batch mean"):
            along(network(), loss, {"all": batches}, drawn(network()), LINE, keep=tmp_path / name)
    assert not any(path.read_text().count("\n") > 1 for path in tmp_path.iterdir())


def test_losses_of_a_float32_network_are_weighted_in_float64() -> None:
    x, y = samples()
    a_tenth = torch.tensor(0.1)  # whose multiples float32 rounds
    sets = {"all": batched(x.float(), y, 7)}
    found = along(network().float(), lambda *_: a_tenth, sets, drawn(network()), [0.0])
    assert float(found.losses["all"]) == pytest.approx(float(a_tenth), rel=1e-15)


def test_autocast_outside_does_not_lower_the_precision_inside() -> None:
    model, (x, y) = network().float(), samples()
    sets = {"all": batched(x.float(), y, 7)}
    expected = along(model, F.cross_entropy, sets, drawn(model), LINE)
    with torch.autocast("cpu"):
        assert_same(along(model, F.cross_entropy, sets, drawn(model), LINE), expected)


def test_plane_agrees_with_the_line_on_its_axes() -> None:
    model, sets = network(), {"all": batched(*samples(), 5)}
    d, e = drawn(model, 1), drawn(model, 2)
    plane = on_plane(model, F.cross_entropy, sets, (d, e), LINE, LINE[::2])
    assert torch.equal(plane.losses["all"][:, 2], along(model, F.cross_entropy, sets, d, LINE).losses["all"])
    assert torch.equal(plane.losses["all"][4], along(model, F.cross_entropy, sets, e, LINE[::2]).losses["all"])


def test_points_far_out_on_a_plane_are_reached_in_float64_also_by_a_float32_network() -> None:
    model, (x, y) = network("smooth").float(), samples()
    d = drawn(model)
    far = [0.0, 1e4]
    losses = on_plane(model, F.cross_entropy, {"all": [(x.float(), y)]}, (d, -d), far, far).losses["all"]
    assert losses[1, 1] == losses[0, 0], "there and back again"
    assert losses[0, 1] != losses[0, 0]


def test_between_ends_at_the_networks_themselves(digits: Splits) -> None:
    first, second = (build("C2", width=0.03, seed=seed) for seed in (0, 1))
    images = digits.train.images[:32].repeat(1, 3, 1, 1)
    data = batched(F.pad(images, (2, 2, 2, 2)), digits.train.labels[:32], 20)
    for model, scale in ((first, 1), (second, 3)):
        for x, _ in data:
            model(scale * x)
    found = between(first, second, F.cross_entropy, {"all": data}, [0, 0.5, 1])
    for model, position in ((first, 0), (second, 2)):
        nowhere = torch.zeros(sum(p.numel() for p in model.parameters()))
        own = along(model, F.cross_entropy, {"all": data}, nowhere, [0.0])
        assert found.losses["all"][position] == own.losses["all"][0]  # to the bit: weights and statistics
        assert found.accuracies["all"][position] == own.accuracies["all"][0]


def test_ends_are_exact_however_far_apart() -> None:
    first, second, (x, y) = network("linear"), network("linear"), samples()
    for model, weight in ((first, 1e17), (second, 1.0)):
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(weight)
    found = between(first, second, F.mse_loss, {"all": [(x, 1.0 * y)]}, [0, 1]).losses["all"]
    for model, loss in zip((first, second), found, strict=True):
        assert loss == F.mse_loss(model(x), 1.0 * y)  # 1e17 + (1 - 1e17) would be 0


@pytest.mark.parametrize("t", [0.0, 1.0, 0.25, -0.5, 2.0])
def test_between_interpolates_weights_and_running_statistics(t: float) -> None:
    first, second, (x, y) = network(seed=0), network(seed=1), samples()
    expected = deepcopy(first)
    ends = second.state_dict()
    for name, tensor in expected.state_dict().items():
        if tensor.is_floating_point():
            tensor.lerp_(ends[name], t)
            if "running_var" in name:
                assert tensor.min() > 0
    found = float(between(first, second, F.cross_entropy, {"all": [(x, y)]}, [t]).losses["all"])
    assert found == pytest.approx(whole_loss(expected, x, y), rel=0 if t in (0, 1) else 1e-12)


def test_extrapolated_variances_stay_positive() -> None:
    first, second = network("one norm", 0), network("one norm", 1)
    first.get_buffer("1.running_var").fill_(1)
    second.get_buffer("1.running_var").fill_(5)
    found = between(first, second, F.cross_entropy, {"all": [samples()]}, [-3.0, -1.0, 2.0])
    assert found.losses["all"].isfinite().all()  # 1 - 3 * 4 is no variance: its root would be NaN


class Masked(nn.Linear):
    """A linear layer whose last output is masked, by an infinite buffer as attention has it."""

    def __init__(self) -> None:
        super().__init__(36, 3, dtype=torch.float64)
        self.register_buffer("mask", torch.tensor([0, 0, -math.inf], dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(1)) + self.get_buffer("mask")


def test_infinite_buffers_that_both_networks_share_stay() -> None:
    x, y = samples()
    found = between(Masked(), Masked(), F.cross_entropy, {"all": [(x, y % 2)]}, [-1.0, 0.0, 0.5, 1.0])
    assert found.losses["all"].isfinite().all()


@settings(deadline=None, max_examples=15)
@given(kind=st.sampled_from(["one norm", "flat norm"]), size=st.integers(2, 30), t=st.floats(-0.5, 1.5))
def test_estimated_statistics_of_one_layer_are_those_of_the_whole_set(kind: str, size: int, t: float) -> None:
    first, second, (x, y) = network(kind, 0), network(kind, 1), samples(24)
    statistics = batched(x, y, size)
    if len(statistics[-1][1]) == 1:
        statistics[-2:] = [(x[-size - 1 :], y[-size - 1 :])]  # one vector has no variance
    found = between(
        first, second, F.cross_entropy, {"all": [(x, y)]}, [t], batch_norm="estimate", statistics=statistics
    )
    expected = deepcopy(first).eval()
    for p, a, b in zip(expected.parameters(), first.parameters(), second.parameters(), strict=True):
        p.data = torch.lerp(a.detach(), b.detach(), t)
    before: nn.Sequential = expected[: 2 if kind == "flat norm" else 1]  # type: ignore[index]
    arriving = before(x).detach()
    dims = [0] if kind == "flat norm" else [0, 2, 3]
    for name, buffer in expected.named_buffers():
        if "running" in name:
            buffer.copy_(arriving.mean(dims) if "mean" in name else arriving.var(dims, correction=1))
    assert float(found.losses["all"][0]) == pytest.approx(whole_loss(expected, x, y), rel=1e-12)


def test_estimated_statistics_of_a_deep_network_are_those_of_pytorch_in_train_mode() -> None:
    first, second, (x, y) = network(seed=0), network(seed=1), samples()
    expected = deepcopy(first)
    for module in expected.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0  # the running statistics become those of the one batch
        module.training = isinstance(module, nn.BatchNorm2d)
    expected(x)
    sets = {"all": [(x, y)]}
    found = between(first, second, F.cross_entropy, sets, [0.0], batch_norm="estimate", statistics=[x])
    assert float(found.losses["all"][0]) == pytest.approx(whole_loss(expected, x, y), rel=1e-12)
    without = network("smooth"), network("smooth", 1)
    assert_same(
        between(*without, F.cross_entropy, sets, LINE, batch_norm="estimate", statistics=[x]),
        between(*without, F.cross_entropy, sets, LINE),
    )


def test_filter_normalisation_equals_a_loop_over_filters() -> None:
    model = network()
    with torch.no_grad():
        next(model.parameters())[1] = 0  # a filter that is zero asks for a direction that is zero
    direction = drawn(model)
    direction[:9] = 0  # and a direction that is zero stays it
    found, start = filter_normalise(model, direction), 0
    for weight in model.parameters():
        part = direction[start : start + weight.numel()].view_as(weight)
        for i, filter_ in enumerate(weight.detach()):
            if weight.ndim == 1:
                expected = torch.zeros_like(part[i])
            else:
                expected = part[i] * (filter_.norm() / part[i].norm()).nan_to_num(posinf=0)
            torch.testing.assert_close(found[start : start + weight.numel()].view_as(weight)[i], expected)
        start += weight.numel()
    assert start == len(found)
    assert found.dtype == torch.float64


def test_random_directions_are_the_generators_own(
    tiny_m1: nn.Module, untouched: Callable[..., AbstractContextManager[None]]
) -> None:
    for parameter in list(tiny_m1.parameters())[:2]:
        parameter.requires_grad_(False)  # frozen weights are parameters too
    with untouched(tiny_m1):
        plain, again, other = drawn(tiny_m1, 0), drawn(tiny_m1, 0), drawn(tiny_m1, 1)
        normalised = random_direction(tiny_m1, torch.Generator().manual_seed(0), filter_normalised=True)
    assert plain.shape == nn.utils.parameters_to_vector(tiny_m1.parameters()).shape
    assert torch.equal(plain, again)
    assert not torch.equal(plain, other)
    assert torch.equal(normalised, filter_normalise(tiny_m1, plain))
    assert float(plain.std()) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("fail_at", [-1, 3])
@pytest.mark.parametrize("kind", ["along", "on_plane", "between", "estimate"])
def test_models_are_untouched(kind: str, fail_at: int, untouched: Callable[..., AbstractContextManager[None]]) -> None:
    first, second, (x, y) = network(seed=0), network(seed=1), samples()
    F.cross_entropy(first(x), y).backward()
    first[1].eval()  # type: ignore[index]
    sets, loss_fn, d = {"all": batched(x, y, 9)}, Counted(fail_at=fail_at), drawn(first)
    direction = d.clone()
    with untouched(first), untouched(second):
        try:
            if kind == "along":
                along(first, loss_fn, sets, d, LINE)
            elif kind == "on_plane":
                on_plane(first, loss_fn, sets, (d, d), LINE, LINE[:2])
            elif kind == "between":
                between(first, second, loss_fn, sets, LINE)
            else:
                between(first, second, loss_fn, sets, LINE, batch_norm="estimate", statistics=[x])
        except RuntimeError as error:
            assert str(error) == "stopped"
        else:
            assert fail_at == -1
    assert torch.equal(d, direction)


@pytest.mark.parametrize("kind", ["along", "on_plane", "between"])
def test_rerun_computes_only_the_missing_points(kind: str, tmp_path: Path) -> None:
    first, second, sets = network(seed=0), network(seed=1), {"a": batched(*samples(), 9), "b": [samples(7, 1)]}
    calls_a_point, check = 3 + 1, 2 * 3  # once, after the first point: that the loss is a mean

    def survey(keep: Path | None, fail_at: int = -1) -> tuple[Landscape, int, list[tuple[int, int]]]:
        loss_fn, seen = Counted(fail_at=fail_at), list[tuple[int, int]]()

        def progress(done: int, total: int) -> None:
            seen.append((done, total))

        options: dict[str, Any] = {"keep": keep, "progress": progress}
        if kind == "along":
            found = along(first, loss_fn, sets, drawn(first), LINE[:6], **options)
        elif kind == "on_plane":
            found = on_plane(first, loss_fn, sets, (drawn(first), drawn(first, 1)), LINE[:3], LINE[:2], **options)
        else:
            found = between(first, second, loss_fn, sets, LINE[:6], **options)
        return found, loss_fn.calls, seen

    fresh, calls, seen = survey(None)
    assert calls == check + 6 * calls_a_point
    assert seen == [(done, 6) for done in range(7)]
    path = tmp_path / "points.jsonl"
    with pytest.raises(RuntimeError, match="stopped"):
        survey(path, fail_at=check + 3 * calls_a_point)
    found, calls, seen = survey(path)
    assert calls == check + 4 * calls_a_point
    assert seen == [(done, 6) for done in range(2, 7)]
    assert_same(found, fresh)
    content = path.read_bytes()
    lines = content.splitlines(keepends=True)
    assert len(lines) == 1 + 6
    path.write_bytes(b"".join(lines[:4]) + lines[4][: len(lines[4]) // 2])  # a kill in the middle of the fourth point
    found, calls, _ = survey(path)
    assert calls == check + 3 * calls_a_point
    assert_same(found, fresh)
    assert path.read_bytes() == content
    found, calls, seen = survey(path)
    assert calls == 0
    assert seen == [(6, 6)]
    assert_same(found, fresh)


def test_finer_grid_reuses_the_points_of_the_coarser_one(tmp_path: Path) -> None:
    model, sets = network(), {"all": [samples()]}
    coarse, fine, path = Counted(), Counted(), tmp_path / "points.jsonl"
    along(model, coarse, sets, drawn(model), LINE[::2], keep=path)
    positions = [*LINE.tolist(), *LINE.tolist()]  # each twice
    found = along(model, fine, sets, drawn(model), positions, keep=str(path))
    assert (coarse.calls, fine.calls) == (3 + 5, 3 + 4)  # three for the check that the loss is a mean
    assert_same(found, along(model, Counted(), sets, drawn(model), positions))


def test_each_point_is_on_the_disk_before_the_next_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, path, synced = network(), tmp_path / "points.jsonl", list[int]()
    monkeypatch.setattr("os.fsync", lambda _: synced.append(len(path.read_bytes().splitlines())))
    seen: list[tuple[int, int]] = []
    along(
        model,
        F.cross_entropy,
        {"all": [samples()]},
        drawn(model),
        LINE[:3],
        keep=path,
        progress=lambda done, _: seen.append((done, len(synced))),
    )
    assert synced == [1, 2, 3, 4]  # the header, then one line a point
    assert seen == [(0, 1), (1, 2), (2, 3), (3, 4)]


@settings(deadline=None, max_examples=50)
@given(at=st.floats(allow_nan=False, allow_infinity=False), loss=st.floats(), accuracy=st.floats())
def test_every_float_returns_from_the_file_bit_by_bit(
    at: float, loss: float, accuracy: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("points") / "points.jsonl"
    file = PointFile(path, "0")
    file.prepare()
    file.append((at,), {"größe \n": (loss, accuracy)})
    ((point, values),) = PointFile(path, "0").read(["größe \n"]).items()
    for found, given_ in zip((*point, *values["größe \n"]), (at, loss, accuracy), strict=True):
        assert found.hex() == given_.hex()


def test_losses_that_are_not_finite_are_values(tmp_path: Path) -> None:
    def loss_fn(output: Tensor, y: Tensor) -> Tensor:
        return output.exp().mean() - (0 * output.square()).mean()

    model, sets, path = network("linear"), {"all": [samples()]}, tmp_path / "points.jsonl"
    d = torch.ones(37, dtype=torch.float64)
    found = along(model, loss_fn, sets, d, [0.0, 1e3, 1e200], keep=path)
    assert found.losses["all"].isfinite().tolist() == [True, False, False]
    assert found.losses["all"].isnan().tolist() == [False, False, True]
    counted = Counted(loss_fn)
    counted.__qualname__ = loss_fn.__qualname__  # type: ignore[attr-defined]
    assert_same(along(model, counted, sets, d, [0.0, 1e3, 1e200], keep=path), found)
    assert counted.calls == 0

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    for line in path.read_text().splitlines():
        json.loads(line, parse_constant=refuse)


def test_another_landscape_is_refused_and_its_file_left_alone(tmp_path: Path) -> None:
    model, (x, y) = network(), samples()
    d, path = drawn(model), tmp_path / "points.jsonl"
    along(model, F.cross_entropy, {"all": [(x, y)]}, d, LINE[:2], keep=path)
    content = path.read_bytes()
    other = deepcopy(model)
    other.get_buffer("1.running_mean").add_(1e-9)
    sets = {"all": [(x, y)]}
    calls: list[Callable[[], Landscape]] = [
        lambda: along(moved(model, 1e-9 * d).train(), F.cross_entropy, sets, d, LINE[:2], keep=path),
        lambda: along(other, F.cross_entropy, sets, d, LINE[:2], keep=path),
        lambda: along(model, F.cross_entropy, sets, 2 * d, LINE[:2], keep=path),
        lambda: along(model, F.cross_entropy, {"some": [(x, y)]}, d, LINE[:2], keep=path),
        lambda: along(model, F.cross_entropy, {"all": [(x[:9], y[:9])]}, d, LINE[:2], keep=path),
        lambda: along(model, F.cross_entropy, {"all": [(x, y.flip(0))]}, d, LINE[:2], keep=path),
        lambda: along(model, F.multi_margin_loss, sets, d, LINE[:2], keep=path),
        lambda: on_plane(model, F.cross_entropy, sets, (d, d), LINE[:2], [0.0], keep=path),
        lambda: between(model, other, F.cross_entropy, sets, LINE[:2], keep=path),
    ]
    for call in calls:
        with pytest.raises(InputError, match=r"points\.jsonl does not hold points of this landscape.*another file"):
            call()
        assert path.read_bytes() == content


def test_another_network_at_the_end_or_another_estimate_is_another_landscape(tmp_path: Path) -> None:
    first, second, other, (x, y) = network(seed=0), network(seed=1), network(seed=2), samples()
    activated, activated_too = deepcopy(first), deepcopy(second)
    for model in (activated, activated_too):
        model.set_submodule("2", nn.Sigmoid())  # the same weights, another function
    keep = tmp_path / "points.jsonl"

    def survey(first: nn.Module, second: nn.Module, **options: Any) -> Landscape:
        return between(first, second, F.cross_entropy, {"all": [(x, y)]}, [0.5], keep=keep, **options)

    survey(first, second, batch_norm="estimate", statistics=[x])
    calls: list[Callable[[], Landscape]] = [
        lambda: survey(first, other, batch_norm="estimate", statistics=[x]),
        lambda: survey(activated, activated_too, batch_norm="estimate", statistics=[x]),
        lambda: survey(first, second, batch_norm="estimate", statistics=[x[:20]]),
        lambda: survey(first, second, batch_norm="estimate", statistics=[x[:11], x[11:]]),
        lambda: survey(first, second),
    ]
    for call in calls:
        with pytest.raises(InputError, match="does not hold points of this landscape"):
            call()


def test_files_of_points_that_cannot_be_used(tmp_path: Path) -> None:
    model, sets = network(), {"all": [samples()]}
    d, path = drawn(model), tmp_path / "points.jsonl"

    def survey(keep: Path) -> Landscape:
        return along(model, F.cross_entropy, sets, d, LINE[:3], keep=keep)

    fresh = survey(path)
    lines = path.read_bytes().splitlines(keepends=True)
    for start in (b"", lines[0][:-20], lines[0]):  # a kill in the middle of the header or right behind it
        path.write_bytes(start)
        assert_same(survey(path), fresh)
        assert path.read_bytes() == b"".join(lines)
    for damage in (b"{}\n", b"3\n", b"[]\n", b"\xff\n", b'{"at": [1.0], "losses": {}, "accuracies": {}}\n'):
        path.write_bytes(lines[0] + lines[1] + damage + lines[2])
        with pytest.raises(InputError, match=r"points\.jsonl is damaged in line 3: remove"):
            survey(path)
        with pytest.raises(InputError, match="damaged in line 3"):
            points.check(path)
    path.write_bytes(b"".join(lines))
    points.check(path)
    digit = lines[2].rindex(b".") + 1  # of a number that reads as well with another digit
    changed = lines[2][:digit] + (b"1" if lines[2][digit : digit + 1] != b"1" else b"2") + lines[2][digit + 1 :]
    path.write_bytes(lines[0] + lines[1] + changed)
    with pytest.raises(InputError, match="damaged in line 3"):
        survey(path)
    for foreign in (b"notes", b"one\ntwo\n"):
        path.write_bytes(foreign)
        with pytest.raises(InputError, match="does not hold points of this landscape"):
            survey(path)
        assert path.read_bytes() == foreign
    loss_fn = Counted()
    for nowhere in (tmp_path, tmp_path / "no" / "folder"):
        with pytest.raises(InputError, match=r"cannot be kept in .*: give a file that can be read and written"):
            along(model, loss_fn, sets, d, LINE[:3], keep=nowhere)
    assert loss_fn.calls == 0


def none(output: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(output, y, reduction="none")


def number(output: Tensor, y: Tensor) -> Any:
    return float(F.cross_entropy(output, y))


X, Y = samples()
BAD_ALONG: dict[str, tuple[dict[str, Any], str]] = {
    "size": ({"direction": torch.ones(7)}, r"direction of shape \(7,\).*parameters_to_vector"),
    "matrix": ({"direction": torch.ones(79, 1)}, r"direction of shape \(79, 1\)"),
    "nan": ({"direction": torch.full((93,), math.nan)}, "direction is not finite"),
    "no sets": ({"sets": {}}, "no data sets: give at least one"),
    "sets without names": ({"sets": [samples()]}, "no data sets: give at least one, for example"),
    "empty set": ({"sets": {"test": []}}, "set 'test' is empty"),
    "empty batches": ({"sets": {"test": [(X[:0], Y[:0])]}}, "set 'test' is empty"),
    "not batches": ({"sets": {"test": (X, Y)}}, r"set 'test': a batch is not a pair .*\[\(x, y\)\]"),
    "lengths": ({"sets": {"test": [(X, Y[:5])]}}, "set 'test': a batch is not a pair"),
    "dtype": ({"sets": {"test": [(X.float(), Y)]}}, r"set 'test': inputs are torch.float32 .*torch.float64.*\.to\("),
    "inputs elsewhere": ({"sets": {"test": [(X.to("meta"), Y)]}}, r"inputs are torch.float64 on meta.*\.to\("),
    "labels elsewhere": ({"sets": {"test": [(X, Y.to("meta"))]}}, "labels on meta.*the model is .* on cpu"),
    "label too large": ({"sets": {"test": [(X, Y + 1)]}}, "set 'test': labels from 1 to 3 for 3 classes; give 0 to 2"),
    "label negative": ({"sets": {"test": [(X, Y - 1)]}}, "labels from -1 to 1 for 3 classes"),
    "no positions": ({"positions": []}, r"positions have shape \(0,\): give"),
    "many positions": ({"positions": torch.ones(2, 2)}, r"positions have shape \(2, 2\)"),
    "infinite position": ({"positions": [0.0, math.inf]}, "positions are not all finite"),
    "loss of each sample": ({"loss_fn": none}, r"loss of a batch is of shape \(23,\): it must be a scalar"),
    "loss without a tensor": ({"loss_fn": number}, "loss of a batch is a float: it must be a scalar"),
    "no parameters": ({"model": nn.Flatten(), "direction": torch.ones(0)}, "model has no parameters"),
}


@pytest.mark.parametrize("case", BAD_ALONG)
def test_bad_input_to_along(case: str) -> None:
    model = network()
    change, message = BAD_ALONG[case]
    good = {
        "model": model,
        "loss_fn": F.cross_entropy,
        "sets": {"all": [samples()]},
        "direction": drawn(model),
        "positions": [0.0],
    }
    with pytest.raises(InputError, match=message):
        along(**{**good, **change})


def test_bad_input_to_on_plane() -> None:
    model, sets = network(), {"all": [samples()]}
    for directions, xs, ys, message in (
        ((drawn(model), torch.ones(7)), LINE, LINE, r"direction of shape \(7,\)"),
        ((drawn(model), drawn(model)), LINE, [], "positions have shape"),
        ((drawn(model),), LINE, LINE, r"1 direction\(s\): a plane has two"),
        ((drawn(model), drawn(model)), [math.nan], LINE, "positions are not all finite"),
    ):
        with pytest.raises(InputError, match=message):
            on_plane(model, F.cross_entropy, sets, directions, xs, ys)  # type: ignore[arg-type]


def test_bad_input_to_filter_normalise() -> None:
    for direction, message in ((torch.ones(7), "direction of shape"), (torch.full((93,), math.inf), "not finite")):
        with pytest.raises(InputError, match=message):
            filter_normalise(network(), direction)


BAD_BETWEEN: dict[str, tuple[dict[str, Any], str]] = {
    "names": ({"second": network("smooth")}, r"networks differ in 0\.weight: \(2, 1, 3, 3\).*absent.*architecture"),
    "shapes": ({"second": nn.Sequential(nn.Conv2d(1, 3, 3))}, r"differ in 0\.weight: .* \(3, 1, 3, 3\)"),
    "dtype": ({"second": network().float()}, "differ in 0.weight: .*float64 on cpu in the first, .*float32"),
    "device": ({"second": network().to("meta")}, "differ in 0.weight: .*on meta in the second"),
    "batch_norm": ({"batch_norm": "recompute"}, "unknown batch_norm 'recompute'; there is: interpolate, estimate"),
    "no statistics": ({"batch_norm": "estimate"}, "'estimate' with 0 batches of statistics: give"),
    "empty": ({"batch_norm": "estimate", "statistics": [(X[:0], Y[:0])]}, "'estimate' with 1 batches of statistics"),
    "not asked for": ({"statistics": [X]}, "'interpolate' with 1 batches of statistics"),
    "dtype of statistics": ({"batch_norm": "estimate", "statistics": [X.float()]}, "statistics: inputs are .*float32"),
    "one value": (
        {
            "first": network("flat norm"),
            "second": network("flat norm", 1),
            "batch_norm": "estimate",
            "statistics": X.split(11),
        },
        "one value per channel.*larger batches",
    ),
}


@pytest.mark.parametrize("case", BAD_BETWEEN)
def test_bad_input_to_between(case: str) -> None:
    change, message = BAD_BETWEEN[case]
    good = {
        "first": network(),
        "second": network(seed=1),
        "loss_fn": F.cross_entropy,
        "sets": {"all": [samples()]},
        "positions": [0.5],
    }
    with pytest.raises(InputError, match=message):
        between(**{**good, **change})


class Shift(nn.Module):
    """Has a setting that is neither in its text nor a tensor."""

    def __init__(self, by: float) -> None:
        super().__init__()
        self.by = by

    def forward(self, x: Tensor) -> Tensor:
        return x + self.by


def test_a_file_of_points_belongs_to_the_settings_of_the_layers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    last = nn.Linear(3, 2)
    x, y = torch.randn(5, 3), torch.tensor([0, 1, 0, 1, 1])
    direction = torch.ones(8)
    along(nn.Sequential(Shift(0.0), last), F.cross_entropy, {"all": [(x, y)]}, direction, [0.0], keep=tmp_path / "a")
    with pytest.raises(InputError, match="other"):
        along(
            nn.Sequential(Shift(1.0), last), F.cross_entropy, {"all": [(x, y)]}, direction, [0.0], keep=tmp_path / "a"
        )


class AlwaysDropping(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5)


@pytest.mark.parametrize(
    ("layer", "told"),
    [(AlwaysDropping(), "random in eval mode"), (nn.BatchNorm1d(6, track_running_stats=False), "batch statistics")],
)
def test_networks_that_are_no_function_of_each_sample_are_refused(layer: nn.Module, told: str) -> None:
    model = nn.Sequential(nn.Linear(3, 6), layer, nn.Linear(6, 2))
    pairs = [(torch.randn(8, 3), torch.tensor([0, 1] * 4))]
    state = torch.get_rng_state()
    with pytest.raises(InputError, match=told):
        along(model, F.cross_entropy, {"all": pairs}, torch.ones(sum(p.numel() for p in model.parameters())), [0.0])
    assert torch.equal(torch.get_rng_state(), state)


def test_statistics_may_be_any_iterable_of_batches() -> None:
    model = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))
    x, y = torch.randn(8, 3), torch.tensor([0, 1] * 4)
    losses = [
        between(model, model, F.cross_entropy, {"a": [(x, y)]}, [0.0], batch_norm="estimate", statistics=given).losses[
            "a"
        ]
        for given in ([x[:4], x[4:]], torch.stack([x[:4], x[4:]]), iter([x[:4], x[4:]]))
    ]
    assert losses[0] == losses[1] == losses[2]


def test_networks_that_are_different_functions_of_their_weights_have_no_line() -> None:
    first, second, (x, y) = network(seed=0), network(seed=1), samples()
    second.set_submodule("2", nn.Sigmoid())
    with pytest.raises(InputError, match="the networks are different functions"):
        between(first, second, F.cross_entropy, {"all": [(x, y)]}, LINE)


class Scaled(nn.Module):
    """A network whose scale is a plain tensor, which no state holds."""

    def __init__(self, scale: Tensor, **settings: object) -> None:
        super().__init__()
        self.inner, self.scale, self.settings = network("smooth"), scale, settings

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x * self.scale)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("model", "loss_fn"),
    [
        (Scaled(torch.tensor(2.0)), nn.CrossEntropyLoss()),
        (Scaled(torch.tensor(1.0), sizes=[1, 2]), nn.CrossEntropyLoss()),
        (Scaled(torch.tensor(1.0), act=torch.tanh), nn.CrossEntropyLoss()),
        (Scaled(torch.tensor(1.0)), nn.CrossEntropyLoss(label_smoothing=0.5)),
        (Scaled(torch.tensor(1.0)), partial(F.cross_entropy, label_smoothing=0.5)),
        (Scaled(torch.tensor(1.0)), partial(F.cross_entropy, label_smoothing=0.1)),
    ],
)
def test_a_file_of_points_belongs_to_plain_tensors_lists_and_the_settings_of_the_loss(
    tmp_path: Path, model: nn.Module, loss_fn: Callable[[Tensor, Tensor], Tensor]
) -> None:
    plain, keep, sets = Scaled(torch.tensor(1.0)), tmp_path / "points.jsonl", {"all": [samples()]}
    first = along(plain, nn.CrossEntropyLoss(), sets, drawn(plain), [0.0], keep=keep)
    again = along(deepcopy(plain), nn.CrossEntropyLoss(), sets, drawn(plain), [0.0], keep=keep)
    assert torch.equal(again.losses["all"], first.losses["all"])
    with pytest.raises(InputError, match="does not hold points of this landscape"):
        along(model, loss_fn, sets, drawn(plain), [0.0], keep=keep)
