"""Hessian products, eigenvalues and input Hessians against dense float64 truth."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hessnb.curvature import HessianOperator, input_hessian, lanczos
from hessnb.data import Splits
from hessnb.errors import InputError
from hessnb.models import ResidualBlock, build
from hessnb.training import Recipe, train


def network(kind: str = "conv") -> nn.Module:
    """Return a small float64 network for 1 x 8 x 8 inputs and 4 classes, in train mode, with used statistics."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "conv":
            layers = [nn.Conv2d(1, 2, 3), nn.ReLU(), nn.BatchNorm2d(2), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(18, 4)]
        elif kind == "residual":
            layers = [
                ResidualBlock(1, 2, 2),
                ResidualBlock(2, 2, 1),
                nn.AdaptiveAvgPool2d(2),
                nn.Flatten(),
                nn.Linear(8, 4),
            ]
        elif kind == "smooth":
            layers = [nn.Flatten(), nn.Linear(64, 3), nn.Tanh(), nn.Linear(3, 4)]
        else:
            layers = [nn.Flatten(), nn.Linear(64, 3), nn.ReLU(), nn.Linear(3, 4)]
        model = nn.Sequential(*layers).double()
        model(torch.rand(32, 1, 8, 8, dtype=torch.float64))  # gives batch normalisation some statistics
    return model


def samples(n: int = 23, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, 1, 8, 8, dtype=torch.float64, generator=generator), torch.randint(4, (n,), generator=generator)


def batches(x: Tensor, y: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(x.split(size), y.split(size), strict=True))


def dense_hessian(
    model: nn.Module, x: Tensor, y: Tensor, loss_fn: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy
) -> Tensor:
    """Return the Hessian of the mean loss over all samples at once, by PyTorch's own dense routine, in eval mode."""
    model = model.eval()
    shapes = [(name, p.shape, p.numel()) for name, p in model.named_parameters()]

    def loss(theta: Tensor) -> Tensor:
        parts = theta.split([size for _, _, size in shapes])
        values = {name: part.view(shape) for (name, shape, _), part in zip(shapes, parts, strict=True)}
        return loss_fn(torch.func.functional_call(model, values, (x,)), y)

    theta = nn.utils.parameters_to_vector(model.parameters()).detach()
    result: Tensor = torch.autograd.functional.hessian(loss, theta)
    return result


@pytest.mark.parametrize("kind", ["conv", "residual", "smooth", "relu"])
@pytest.mark.parametrize("kept", [0, 2, 5])
def test_products_equal_the_dense_hessian_however_many_graphs_are_kept(kind: str, kept: int) -> None:
    x, y = samples()
    model = network(kind)
    H = HessianOperator(model, F.cross_entropy, batches(x, y, 5), graph_memory=0)
    one_graph = H._graph_bytes(H._batches[0])
    H = HessianOperator(model, F.cross_entropy, batches(x, y, 5), graph_memory=kept * one_graph)
    assert sum(batch.gradient is not None for batch in H._batches) == kept
    truth = dense_hessian(network(kind), x, y)
    assert (H.dense() - truth).norm() <= 1e-10 * truth.norm()
    block = torch.randn(H.shape[0], 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert (H @ block - truth @ block).norm() <= 1e-10 * (truth @ block).norm()
    assert H.n_samples == 23
    eigenvalues = torch.linalg.eigvalsh(truth)
    found = lanczos(H, k=5, tol=1e-9, which="LM")
    expected = eigenvalues[eigenvalues.abs().argsort(descending=True)[:5]]
    assert found.converged
    torch.testing.assert_close(found.eigenvalues, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["smooth", "linear"])
def test_a_loss_that_is_linear_in_a_parameter_has_no_curvature_there(kind: str) -> None:
    def mean(logits: Tensor, labels: Tensor) -> Tensor:
        return logits.mean()

    x, y = samples()
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4)).double() if kind == "linear" else network(kind)
    dense = HessianOperator(model, mean, batches(x, y, 5)).dense()
    torch.testing.assert_close(dense, dense_hessian(model, x, y, mean), rtol=1e-10, atol=1e-15)
    assert not dense[-4:].any()  # the last bias
    assert bool(dense.any()) == (kind == "smooth")


@settings(deadline=None, max_examples=20)
@given(size=st.integers(1, 30), order=st.permutations(range(23)), seed=st.integers(0, 100), a=st.floats(-3, 3))
def test_operator_is_symmetric_linear_and_does_not_know_how_the_data_are_batched(
    size: int, order: list[int], seed: int, a: float
) -> None:
    x, y = samples()
    model = network()
    H = HessianOperator(model, F.cross_entropy, batches(x[order], y[order], size))
    whole = HessianOperator(model, F.cross_entropy, [(x, y)], graph_memory=0)
    u, v = torch.randn(2, H.shape[0], dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    Hu, Hv = H.matvec(u), H.matvec(v)
    scale = float(Hu.norm() + Hv.norm())
    assert abs(float(u @ Hv - v @ Hu)) <= 1e-12 * scale * float(u.norm())
    assert float((H.matvec(u + a * v) - Hu - a * Hv).norm()) <= 1e-12 * (1 + abs(a)) * scale
    assert float((whole.matvec(v) - Hv).norm()) <= 1e-12 * scale


def test_float32_products_are_summed_in_float64(digits: Splits) -> None:
    model = build("M1", width=0.1, seed=0)
    double = build("M1", width=0.1, seed=0).double()
    pairs = digits.train.batches(50)
    single = HessianOperator(model, F.cross_entropy, pairs)
    exact = HessianOperator(double, F.cross_entropy, [(x.double(), y) for x, y in pairs])
    v = torch.randn(single.shape[0], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    product = single.matvec(v)
    assert product.dtype == torch.float64
    assert single.matvec(v.float()).dtype == torch.float32
    assert (product - exact.matvec(v)).norm() <= 1e-5 * exact.matvec(v).norm()
    once, seven_times = (HessianOperator(model, F.cross_entropy, pairs[:1] * copies).matvec(v) for copies in (1, 7))
    torch.testing.assert_close(seven_times, once, rtol=1e-14, atol=1e-14)


def test_model_is_untouched(untouched: Callable[..., AbstractContextManager[None]]) -> None:
    model = network()
    model[1].eval()  # type: ignore[index]
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    x, y = samples()
    with untouched(model):
        H = HessianOperator(model, F.cross_entropy, batches(x, y, 5))
        lanczos(H, k=2)
        input_hessian(model, x[:2], y[:2])
        input_hessian(model, x[:2], y[:2], train_mode=True)

    def broken(logits: Tensor, labels: Tensor) -> Tensor:
        raise RuntimeError("broken loss")

    with untouched(model), pytest.raises(RuntimeError, match="broken loss"):
        HessianOperator(model, broken, batches(x, y, 5))


def test_parameters_without_influence_and_frozen_ones() -> None:
    class WithSpare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.spare = nn.Linear(64, 4).double(), nn.Linear(2, 2).double()

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.used(x.flatten(1))
            return result

    model = WithSpare()
    H = HessianOperator(model, F.cross_entropy, [samples()])
    dense = H.dense()
    assert not dense[-6:].any()
    assert dense[:-6, :-6].any()
    model.spare.requires_grad_(False)
    assert HessianOperator(model, F.cross_entropy, [samples()]).shape == (260, 260)


# Each is run in an interpreter of its own: PyTorch has two sets of switches, and one spoils the other for good.
@pytest.mark.parametrize(
    "setting",
    [
        "pass",
        "torch.set_float32_matmul_precision('medium')",
        "torch.backends.fp32_precision = 'tf32'",
    ],
)
def test_tf32_is_off_inside_and_as_before_outside(setting: str) -> None:
    subprocess.run([sys.executable, "-c", TF32_CHECK.format(setting=setting)], check=True)


TF32_CHECK = """
import torch
from hessnb.curvature.operator import full_precision
b = torch.backends
NEWER = (b.cuda.matmul, b.cudnn.conv, b.cudnn.rnn, b.mkldnn.matmul, b.mkldnn.conv, b.mkldnn.rnn)
OLDER = (torch.get_float32_matmul_precision, lambda: b.cudnn.allow_tf32, lambda: b.cuda.matmul.allow_tf32)

def state():
    values = [switch.fp32_precision for switch in NEWER]
    for read in OLDER:
        try:
            values.append(read())
        except RuntimeError:
            values.append("unreadable")
    return values

{setting}
before = state()
try:
    with full_precision():
        assert {{switch.fp32_precision for switch in NEWER}} == {{"ieee"}}
        assert "unreadable" in before or state()[6:] == ["highest", False, False]
        raise RuntimeError("stop")
except RuntimeError as error:
    assert str(error) == "stop"
assert state() == before, (before, state())
"""


def nan_weight() -> nn.Module:
    model = network()
    with torch.no_grad():
        next(model.parameters())[0] = torch.nan
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: HessianOperator(network(), F.cross_entropy, []), "empty"),
        (lambda: HessianOperator(nn.Flatten(), F.cross_entropy, [samples()]), "no trainable parameter"),
        (lambda: HessianOperator(network(), lambda s, y: s.sum(1), [samples()]), "scalar"),
        (lambda: HessianOperator(nan_weight(), F.cross_entropy, [samples()]), "NaN"),
        (lambda: HessianOperator(network(), F.cross_entropy, [(samples()[0] * torch.nan, samples()[1])]), "NaN"),
        (lambda: HessianOperator(network(), F.cross_entropy, [samples()]).matvec(torch.ones(3)), "does not fit"),
        (lambda: HessianOperator(network(), F.cross_entropy, [samples()]) @ torch.ones(3, 2), "does not fit"),
        (lambda: input_hessian(network(), samples()[0], samples()[1][:-1]), "as many labels"),
        (lambda: input_hessian(network(), samples()[0][:0], samples()[1][:0]), "at least one"),
    ],
)
def test_bad_input_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


# -- Lanczos on matrices whose eigenvalues are known -----------------------------------------------------------------


class Matrix:
    def __init__(self, matrix: Tensor) -> None:
        self.matrix, self.shape, self.device = matrix, (len(matrix), len(matrix)), torch.device("cpu")

    def matvec(self, v: Tensor) -> Tensor:
        return self.matrix @ v


def symmetric(eigenvalues: Tensor, seed: int = 0) -> Matrix:
    n = len(eigenvalues)
    q, _ = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))
    return Matrix(q * eigenvalues @ q.T)


ORDERS: dict[str, Callable[[Tensor], Tensor]] = {
    "LM": lambda e: e[e.abs().argsort(descending=True)],
    "LA": lambda e: e.sort(descending=True).values,
    "SA": lambda e: e.sort().values,
}


@settings(deadline=None, max_examples=25)
@given(
    n=st.integers(1, 40), share=st.floats(0, 1), which=st.sampled_from(["LM", "LA", "SA"]), seed=st.integers(0, 1000)
)
def test_lanczos_finds_the_eigenvalues_of_random_matrices(n: int, share: float, which: str, seed: int) -> None:
    eigenvalues = 5 * torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    k = 1 + round(share * (n - 1))
    H = symmetric(eigenvalues, seed)
    found = lanczos(H, k, tol=1e-8, which=which)  # type: ignore[arg-type]
    torch.testing.assert_close(found.eigenvalues, ORDERS[which](eigenvalues)[:k], rtol=1e-7, atol=1e-9)
    identity = torch.eye(k, dtype=torch.float64)
    torch.testing.assert_close(found.eigenvectors @ found.eigenvectors.T, identity, rtol=0, atol=1e-10)
    assert found.n_matvecs <= n


def test_residuals_are_what_a_fresh_product_gives() -> None:
    H = symmetric(torch.linspace(-3, 10, 200, dtype=torch.float64) ** 3)
    found = lanczos(H, 6, tol=1e-3)
    defects = H.matrix @ found.eigenvectors.T - found.eigenvectors.T * found.eigenvalues
    fresh = defects.norm(dim=0) / found.eigenvalues.abs()
    torch.testing.assert_close(found.residuals, fresh, rtol=1e-6, atol=1e-13)
    assert 1e-6 < found.residuals.max() <= 1e-3, "stopped because of the tolerance, not by luck"


def test_eigenvectors_are_orthonormal_over_many_orders_of_magnitude() -> None:
    eigenvalues = 10 ** torch.linspace(0, -12, 100, dtype=torch.float64)
    found = lanczos(symmetric(eigenvalues), 60)
    identity = torch.eye(60, dtype=torch.float64)
    torch.testing.assert_close(found.eigenvectors @ found.eigenvectors.T, identity, rtol=0, atol=1e-13)


def test_residual_shows_an_asymmetry_of_the_products() -> None:
    H = symmetric(torch.arange(1.0, 31.0, dtype=torch.float64))
    H.matrix[0, 1:] += 1e-3
    found = lanczos(H, 3, tol=1e-10)
    assert not found.converged
    assert 1e-6 < found.residuals.max() < 1e-2


@pytest.mark.parametrize("distinct", [1, 2, 3])
def test_invariant_subspaces_do_not_stop_it_and_multiple_eigenvalues_are_found(distinct: int) -> None:
    eigenvalues = torch.tensor([7.0, -4.0, 2.0], dtype=torch.float64)[:distinct].repeat(5)
    found = lanczos(symmetric(eigenvalues), len(eigenvalues), tol=1e-9)
    torch.testing.assert_close(found.eigenvalues, ORDERS["LM"](eigenvalues), rtol=1e-9, atol=0)


@pytest.mark.parametrize("which", ["LM", "LA", "SA"])
@pytest.mark.parametrize(
    "eigenvalues",
    [
        pytest.param([4.0] + [1.0] * 29, id="identity plus rank one"),
        pytest.param([-3.0] * 3 + [2.0] * 10 + [3.5] * 2, id="three distinct values"),
        pytest.param([1.0] * 12, id="identity"),
    ],
)
def test_the_first_eigenvalues_are_found_as_often_as_they_occur(eigenvalues: list[float], which: str) -> None:
    spectrum = torch.tensor(eigenvalues, dtype=torch.float64)
    for k in (1, 2, 3, 5):
        found = lanczos(Matrix(torch.diag(spectrum)), k, tol=1e-9, which=which)  # type: ignore[arg-type]
        torch.testing.assert_close(found.eigenvalues, ORDERS[which](spectrum)[:k], rtol=1e-9, atol=0)
        assert found.converged
        assert found.n_matvecs < len(spectrum)


@pytest.mark.parametrize("rank", [1, 4])
def test_the_eigenvalues_of_a_matrix_of_low_rank_take_few_products(rank: int) -> None:
    eigenvalues = torch.cat([torch.arange(1.0, rank + 1), torch.zeros(200)]).double()
    found = lanczos(symmetric(eigenvalues), rank, tol=1e-9)
    torch.testing.assert_close(found.eigenvalues, ORDERS["LM"](eigenvalues)[:rank], rtol=1e-9, atol=0)
    assert found.converged
    assert found.n_matvecs <= rank + 3


def test_zero_operator_has_zero_eigenvalues() -> None:
    found = lanczos(Matrix(torch.zeros(6, 6, dtype=torch.float64)), 2)
    assert not found.eigenvalues.any()
    assert not found.residuals.any()
    assert found.converged


def test_start_vector_is_the_generators_and_the_default_is_fixed() -> None:
    H = symmetric(torch.randn(60, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    runs = [lanczos(H, 2, generator=torch.Generator().manual_seed(s)).residuals for s in (1, 1, 2)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    assert torch.equal(lanczos(H, 2).eigenvectors, lanczos(H, 2).eigenvectors)


def test_limit_on_products_is_kept_and_said() -> None:
    H = symmetric(torch.linspace(0, 1, 300, dtype=torch.float64))
    seen: list[tuple[int, float]] = []
    found = lanczos(H, 5, tol=1e-12, max_matvecs=20, progress=lambda n, worst: seen.append((n, worst)))
    assert (found.n_matvecs, found.converged) == (20, False)
    assert [n for n, _ in seen] == list(range(5, 21))
    assert seen[-1][1] == pytest.approx(float(found.residuals.max()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, "k = 0"),
        ({"k": 7}, "1 to 6 eigenvalues"),
        ({"k": 1, "tol": 0.0}, "tol"),
        ({"k": 1, "which": "SM"}, "which"),
        ({"k": 1, "tol": float("nan")}, "tol"),
        ({"k": 3, "max_matvecs": 2}, "max_matvecs"),
        ({"k": 3, "max_matvecs": 0}, "max_matvecs"),
    ],
)
def test_lanczos_refuses(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        lanczos(symmetric(torch.arange(6.0, dtype=torch.float64)), **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_product_that_is_not_finite_is_refused(value: float) -> None:
    with pytest.raises(InputError, match="not finite"):
        lanczos(Matrix(torch.full((3, 3), value, dtype=torch.float64)), 1)


def test_progress_is_printed_on_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    found = lanczos(symmetric(torch.arange(1.0, 31.0, dtype=torch.float64)), 2, progress=True)
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert f"{found.n_matvecs} products" in out.split("\r")[-1]


def test_top_of_a_trained_network_in_float32_holds_against_dense_float64(digits: Splits) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.MaxPool2d(2), nn.Conv2d(1, 2, 5), nn.MaxPool2d(2), nn.ReLU(),
            nn.Flatten(), nn.Linear(50, 8), nn.ReLU(), nn.Linear(8, 10),
        )  # fmt: skip
    history = train(model, digits, Recipe(batch_size=20, lr=0.05, momentum=0.9, max_epochs=15, seed=0)).history
    assert history[-1].train_accuracy > 0.7
    pairs = digits.train.head(100).batches(64)
    found = lanczos(HessianOperator(model, F.cross_entropy, pairs), 10, tol=1e-4)
    assert found.converged
    truth = HessianOperator(model.double(), F.cross_entropy, [(x.double(), y) for x, y in pairs]).dense()
    eigenvalues = ORDERS["LM"](torch.linalg.eigvalsh(truth))[:10]
    torch.testing.assert_close(found.eigenvalues, eigenvalues, rtol=1e-4, atol=0)
    fresh = (truth @ found.eigenvectors.T - found.eigenvectors.T * found.eigenvalues).norm(dim=0)
    assert (fresh / found.eigenvalues.abs()).max() <= 1.5e-4


# -- input Hessians --------------------------------------------------------------------------------------------------


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
