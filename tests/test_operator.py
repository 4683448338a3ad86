"""Products with Hessians and Gauss-Newton matrices against dense float64 truth."""

from __future__ import annotations

import gc
import importlib
import math
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import NETWORKS, Checkpointed, InPlace, LossFunction, batches, dense_ggn, dense_hessian, network, samples
from scipy.sparse.linalg import aslinearoperator, cg, eigsh
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, Dataset, TensorDataset

from hessnb.curvature import GGNOperator, HessianOperator, input_hessian, lanczos
from hessnb.curvature import memory as memory_of
from hessnb.data import Splits
from hessnb.errors import InputError
from hessnb.models import build

Batches = Iterable[tuple[Tensor, Tensor]]
Operator = HessianOperator | GGNOperator
Untouched = Callable[..., AbstractContextManager[None]]
OPERATORS: dict[str, type[Operator]] = {"Hessian": HessianOperator, "GGN": GGNOperator}
TRUTHS: dict[str, Callable[..., Tensor]] = {"Hessian": dense_hessian, "GGN": dense_ggn}


def squared(outputs: Tensor, y: Tensor) -> Tensor:
    return (outputs - F.one_hot(y, 4)).square().sum(1).mean() / 2


def mean_output(outputs: Tensor, y: Tensor) -> Tensor:
    return outputs.mean()


X, Y = samples()
LOSSES: dict[str, LossFunction] = {"cross-entropy": F.cross_entropy, "squared": squared}


@cache
def truth(operator: str, kind: str, loss: str = "cross-entropy") -> Tensor:
    return TRUTHS[operator](network(kind), *samples(), LOSSES[loss])


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def loader(x: Tensor, y: Tensor, **arguments: Any) -> Batches:
    result: Batches = DataLoader(TensorDataset(x, y), **{"batch_size": 5, "shuffle": True, **arguments})
    return result


def kept(H: Operator) -> int:
    return sum(batch.kept is not None for batch in H._batches)


def operators(make: Callable[[int], Operator]) -> tuple[Operator, Operator, Operator]:
    """Return an operator that keeps no graph, one that keeps some but not all, and one that keeps all."""
    none, low, high = make(0), 1e3, 1e7
    every = make(int(high))
    assert (kept(none), kept(every)) == (0, len(every._batches))
    for _ in range(20):
        middle = math.sqrt(low * high)
        some = make(int(middle))
        if 0 < kept(some) < len(some._batches):
            return none, some, every
        low, high = (middle, high) if kept(some) == 0 else (low, middle)
    pytest.fail("no memory was found that some but not all graphs fit")


def assert_near(found: Tensor, expected: Tensor, relative: float = 1e-10) -> None:
    assert found.shape == expected.shape
    assert float((found - expected).norm()) <= relative * float(expected.norm())


# -- products against dense matrices ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", NETWORKS)
def test_products_and_eigenvalues_equal_those_of_the_dense_hessian_however_many_graphs_are_kept(kind: str) -> None:
    model, pairs, expected = network(kind), batches(*samples(), 8), truth("Hessian", kind)
    none, some, every = operators(lambda memory: HessianOperator(model, F.cross_entropy, pairs, graph_memory=memory))
    block = normal(len(expected), 3)
    for H in (none, some, every):
        assert H.shape == tuple(expected.shape)
        assert H.n_samples == 23
        for _ in range(2):  # a kept graph is there for the second product, too
            assert_near(H.matvec(block[:, 0]), expected @ block[:, 0])
        assert_near(H @ block, expected @ block)
    dense = some.dense()
    assert_near(dense, expected)
    eigenvalues = torch.linalg.eigvalsh(expected)
    scale = float(eigenvalues.abs().max())
    torch.testing.assert_close(torch.linalg.eigvalsh(dense), eigenvalues, rtol=0, atol=1e-9 * scale)


@pytest.mark.parametrize(
    ("kind", "loss"), [*((kind, "cross-entropy") for kind in NETWORKS), ("conv", "squared"), ("smooth", "squared")]
)
def test_gauss_newton_products_equal_the_dense_matrix(kind: str, loss: str) -> None:
    expected = truth("GGN", kind, loss)
    block = normal(len(expected), 3)
    for memory in (0, 10**7):
        G = GGNOperator(network(kind), LOSSES[loss], batches(*samples(), 8), graph_memory=memory)
        assert kept(G) == (3 if memory else 0)
        for _ in range(2):
            assert_near(G.matvec(block[:, 0]), expected @ block[:, 0])
        assert_near(G @ block, expected @ block)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("kind", ["conv", "linear", "others"])
def test_gauss_newton_matrix_is_positive_semidefinite_and_the_hessian_alone_of_a_linear_model(
    kind: str, loss: str
) -> None:
    H, G = (operator(network(kind), LOSSES[loss], [samples()]).dense() for operator in (HessianOperator, GGNOperator))
    eigenvalues = torch.linalg.eigvalsh(G)
    assert eigenvalues[0] >= -1e-12 * eigenvalues[-1]
    assert (float((G - H).norm()) <= 1e-12 * float(H.norm())) == (kind == "linear")
    assert (torch.linalg.eigvalsh(H)[0] >= -1e-12 * eigenvalues[-1]) == (kind == "linear")


@pytest.mark.parametrize("memory", [0, 10**7])
@pytest.mark.parametrize("kind", ["smooth", "linear"])
def test_a_loss_that_is_linear_in_a_parameter_has_no_curvature_there(kind: str, memory: int) -> None:
    x, y = samples()
    expected = dense_hessian(network(kind), x, y, mean_output)
    v = normal(len(expected))
    product = HessianOperator(network(kind), mean_output, batches(x, y, 8), graph_memory=memory).matvec(v)
    torch.testing.assert_close(product, expected @ v, rtol=1e-10, atol=1e-15)
    assert not product[-4:].any()  # the last bias
    assert bool(product.any()) == (kind == "smooth")
    assert not GGNOperator(network(kind), mean_output, batches(x, y, 8), graph_memory=memory).matvec(v).any()


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("memory", [0, 10**7])
def test_a_block_product_is_the_single_products_and_counts_each_column(operator: str, memory: int) -> None:
    H = OPERATORS[operator](network("pool"), F.cross_entropy, batches(*samples(), 8), graph_memory=memory)
    assert H.n_matvecs == 0
    block = normal(72, 4)
    together = H @ block
    assert H.n_matvecs == 4
    for j, v in enumerate(block.unbind(1)):
        single = H.matvec(v)
        torch.testing.assert_close(together[:, j], single, rtol=1e-13, atol=1e-14)
        torch.testing.assert_close(H @ v, single, rtol=0, atol=0)
    assert H.n_matvecs == 12
    assert (H @ block[:, :0]).shape == (72, 0)
    assert (H @ block[:, :1]).shape == (72, 1)
    assert H.n_matvecs == 13
    H.dense()
    assert H.n_matvecs == 13 + 72


class Mapping(nn.Module):
    """Evaluates one sample at a time under vmap."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = network()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = torch.func.vmap(lambda sample: self.layers(sample[None])[0])(x)
        return result


class Recurrent(nn.Module):
    """Reads an image row by row."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.last = nn.LSTM(8, 2, batch_first=True), nn.Linear(2, 4)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(self.rows(x[:, 0])[0][:, -1])
        return result


def attentive() -> nn.Module:
    attention = nn.TransformerEncoderLayer(8, 2, 3, batch_first=True)
    return nn.Sequential(nn.Flatten(1, 2), attention, nn.Flatten(), nn.Linear(64, 4))


@pytest.mark.parametrize("make", [Recurrent, attentive])
def test_recurrent_and_attentive_networks_have_products_too(make: Callable[[], nn.Module]) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make().double()
    for name, operator in OPERATORS.items():
        H = operator(model, F.cross_entropy, batches(X, Y, 8))
        block = normal(H.shape[0], 2)
        with sdpa_kernel(SDPBackend.MATH):  # PyTorch's other kernels of attention have one derivative only
            expected = TRUTHS[name](model, X, Y) @ block
        assert_near(H @ block, expected)


@pytest.mark.parametrize("operator", OPERATORS)
def test_the_cheap_layers_are_in_use_wherever_they_are_right(operator: str) -> None:
    for kind in NETWORKS:
        assert OPERATORS[operator](network(kind), F.cross_entropy, batches(X, Y, 12), graph_memory=0)._cheap


@pytest.mark.parametrize("make", [Checkpointed, Mapping])
@pytest.mark.parametrize("memory", [0, 10**7])
def test_models_may_use_checkpoints_and_vmap(make: Callable[[], nn.Module], memory: int) -> None:
    v = normal(100)
    for name, operator in OPERATORS.items():
        H = operator(make(), F.cross_entropy, batches(X, Y, 8), graph_memory=memory)
        assert_near(H.matvec(v), truth(name, "conv") @ v)


def test_vectors_may_have_any_strides_and_may_need_gradients() -> None:
    H = HessianOperator(network(), F.cross_entropy, batches(*samples(), 8))
    block = normal(4, H.shape[0])
    expected = truth("Hessian", "conv") @ block.T
    assert_near(H @ block.T, expected)
    assert_near(H.matvec(block.T[:, 1]), expected[:, 1])
    product = H.matvec(block[2].clone().requires_grad_())
    assert_near(product, expected[:, 2])
    assert not product.requires_grad


@pytest.mark.parametrize("operator", OPERATORS)
def test_products_come_in_the_dtype_of_the_vector(operator: str) -> None:
    x, y = samples()
    H = OPERATORS[operator](network("pool").float(), F.cross_entropy, batches(x.float(), y, 12))
    v = normal(72, 2)
    assert H.dtype == H.dense().dtype == torch.float32
    assert H.matvec(v[:, 0]).dtype == (H @ v).dtype == torch.float64
    assert H.matvec(v[:, 0].float()).dtype == (H @ v.float()).dtype == torch.float32
    assert_near(H @ v, truth(operator, "pool") @ v, 1e-5)
    exact = OPERATORS[operator](network("pool"), F.cross_entropy, batches(x, y, 12))
    assert exact.matvec(v[:, 0].float()).dtype == torch.float32
    assert exact.dense().dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_products_with_integers_are_not_rounded_to_integers(dtype: torch.dtype) -> None:
    H = HessianOperator(network("pool"), F.cross_entropy, batches(X, Y, 12))
    v = torch.ones(72, dtype=dtype)
    assert_near(H.matvec(v), truth("Hessian", "pool") @ v.double())
    assert_near(H @ v[:, None], truth("Hessian", "pool") @ v.double()[:, None])


def test_float32_products_are_summed_in_float64(digits: Splits) -> None:
    model = build("M1", width=0.1, seed=0)
    double = build("M1", width=0.1, seed=0).double()
    pairs = digits.train.batches(50)
    single = HessianOperator(model, F.cross_entropy, pairs)
    exact = HessianOperator(double, F.cross_entropy, [(x.double(), y) for x, y in pairs])
    v = normal(single.shape[0])
    assert_near(single.matvec(v), exact.matvec(v), 1e-5)
    once, seven_times = (HessianOperator(model, F.cross_entropy, pairs[:1] * copies).matvec(v) for copies in (1, 7))
    torch.testing.assert_close(seven_times, once, rtol=1e-14, atol=1e-14)


# -- how graphs are kept --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operator", OPERATORS)
def test_kept_graphs_stay_within_their_memory_and_leave_room_for_others(operator: str) -> None:
    model, pairs = network().eval(), batches(*samples(24), 3)
    counts = []
    for memory in range(0, 100_000, 4_000):
        H = OPERATORS[operator](model, F.cross_entropy, pairs, graph_memory=memory)
        others = 2 if 0 < kept(H) < len(pairs) else 0  # the one that is made anew, and temporaries
        assert (kept(H) + others) * H._graph_bytes(H._batches[0]) <= memory
        counts.append(kept(H))
    assert counts == sorted(counts)
    assert set(counts) >= {0, 1, len(pairs)}


@pytest.mark.parametrize(("free", "keeps"), [(0, 0), (2**40, 3)])
def test_kept_graphs_take_a_share_of_the_free_memory(free: int, keeps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hessnb.curvature.operator.available_memory", lambda device: free)
    assert kept(HessianOperator(network(), F.cross_entropy, batches(*samples(), 8))) == keeps


@pytest.mark.parametrize("operator", OPERATORS)
def test_graphs_go_with_their_operator(operator: str) -> None:
    H = OPERATORS[operator](network(), F.cross_entropy, batches(*samples(), 8), graph_memory=2**30)
    assert kept(H) > 0
    H.matvec(normal(H.shape[0]))
    gone = weakref.ref(H)
    gc.disable()  # no circle has to be looked for
    try:
        del H
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("operator", OPERATORS)
def test_labels_that_the_loss_does_not_take_are_named(operator: str) -> None:
    x, y = samples()
    with pytest.raises(InputError, match=r"torch.int32 .*y\.long\(\)"):
        OPERATORS[operator](network(), F.cross_entropy, [(x, y.int())])


@pytest.mark.parametrize(
    ("limit", "used", "expected"),
    [("max", "5", 1024 * 1024), ("2000", "1500", 800), ("2000", "9000", 0), (str(2**40), "5", 1024 * 1024)],
)
def test_free_memory_is_what_the_container_leaves(
    limit: str, used: str, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "meminfo").write_text("MemTotal:       2048 kB\nMemAvailable:   1024 kB\n")
    monkeypatch.setattr(memory_of, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory_of, "_CONTAINER", tmp_path)
    assert memory_of.available_memory(torch.device("cpu")) == 1024 * 1024, "no container"
    for name, text in (("max", limit), ("current", used), ("stat", "anon 7\ninactive_file 300\n")):
        (tmp_path / f"memory.{name}").write_text(text + "\n")
    assert memory_of.available_memory(torch.device("cpu")) == expected


def test_graph_of_a_gradient_grows_with_the_samples() -> None:
    x, y = samples()
    few, many = (
        HessianOperator(network(), F.cross_entropy, [(x[:n], y[:n])], graph_memory=0).graph_bytes for n in (2, 8)
    )
    assert 0 < few < many < 4 * few + 1


def test_a_dense_matrix_that_does_not_fit_into_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    H = HessianOperator(network(), F.cross_entropy, batches(*samples(), 8))
    monkeypatch.setattr("hessnb.curvature.operator.available_memory", lambda device: 8 * H.shape[0] ** 2)
    with pytest.raises(InputError, match=r"\(100, 100\) does not fit into memory; use products"):
        H.dense()
    assert H.n_matvecs == 0


# -- restriction to parameters and to samples ---------------------------------------------------------------------


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("memory", [0, 10**7])
@pytest.mark.parametrize(
    ("parameters", "names"),
    [
        (["0.weight"], ["0.weight"]),
        (["5"], ["5.weight", "5.bias"]),
        (["5.bias", "2", "0.bias"], ["0.bias", "2.weight", "2.bias", "5.bias"]),
        (["5", "5.bias", "5"], ["5.weight", "5.bias"]),
        (("0", "2", "5"), ["0.weight", "0.bias", "2.weight", "2.bias", "5.weight", "5.bias"]),
    ],
)
def test_restriction_to_parameters_is_a_diagonal_block_in_the_models_order(
    operator: str, memory: int, parameters: list[str], names: list[str]
) -> None:
    model = network()
    H = OPERATORS[operator](model, F.cross_entropy, batches(*samples(), 8), parameters=parameters, graph_memory=memory)
    assert list(H.names) == names
    mask = torch.cat([torch.full((p.numel(),), name in names) for name, p in model.named_parameters()])
    block = normal(H.shape[0], 2)
    assert_near(H @ block, truth(operator, "conv")[mask][:, mask] @ block)


def test_names_of_all_parameters_are_the_models() -> None:
    model = network("residual")
    H = HessianOperator(model, F.cross_entropy, batches(*samples(), 8))
    assert list(H.names) == [name for name, _ in model.named_parameters()]


def test_a_module_name_stands_for_the_modules_below_it_but_not_for_names_that_begin_alike() -> None:
    model = nn.Sequential(*[nn.Flatten(), nn.Linear(64, 2), *[nn.Tanh()] * 8, nn.Linear(2, 4), nn.ReLU()]).double()
    pairs = [samples()]
    assert HessianOperator(model, F.cross_entropy, pairs, parameters=["1"]).names == ("1.weight", "1.bias")
    residual = HessianOperator(network("residual"), F.cross_entropy, pairs, parameters=["0.residual"])
    assert len(residual.names) == 6
    assert all(name.startswith("0.residual.") for name in residual.names)


def test_tied_weights_belong_to_each_module_that_has_them() -> None:
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 4, bias=False), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 4)
    ).double()
    model[4].weight = model[3].weight
    H = HessianOperator(model, F.cross_entropy, [samples()], parameters=["4"])
    assert H.names == ("3.weight", "4.bias")
    whole = HessianOperator(model, F.cross_entropy, [samples()])
    assert whole.names == ("1.weight", "3.weight", "3.bias", "4.bias")
    rows = torch.cat([torch.arange(256, 272), torch.arange(276, 280)])
    assert_near(H.dense(), whole.dense()[rows][:, rows])
    by_name = HessianOperator(model, F.cross_entropy, [samples()], parameters=["4.weight"])
    assert by_name.names == ("3.weight",)


def test_samples_may_be_chosen_from_batches_of_different_shapes() -> None:
    model = nn.Sequential(nn.AdaptiveAvgPool1d(4), nn.Flatten(), nn.Linear(4, 4)).double()
    pairs = [(normal(3, 1, length, seed=length), torch.arange(3) % 4) for length in (5, 9, 5)]
    chosen = [0, 4, 8, 4]
    alone = [(pairs[i // 3][0][i % 3][None], pairs[i // 3][1][i % 3][None]) for i in chosen]
    H = HessianOperator(model, F.cross_entropy, pairs, samples=chosen)
    assert_near(H.dense(), HessianOperator(model, F.cross_entropy, alone).dense())


def test_frozen_parameters_are_constants_when_the_others_are_named() -> None:
    model = network()
    model.get_submodule("5").requires_grad_(False)
    H = HessianOperator(model, F.cross_entropy, batches(*samples(), 8), parameters=["0", "2"])
    assert_near(H.dense(), truth("Hessian", "conv")[:24, :24])
    with pytest.raises(InputError, match=r"5.weight, 5.bias: requires_grad is False; unfreeze .* or leave out"):
        HessianOperator(model, F.cross_entropy, batches(*samples(), 8))


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("memory", [0, 10**7])
@pytest.mark.parametrize(
    "indices",
    [
        [0],
        [22],
        [4, 5],
        [7, 7, 7, 0],
        [22, 0, 4, 5, 9, 10, 20, 22, 1, 1, 13],
        torch.arange(23),
        torch.tensor([3, 1, 2], dtype=torch.int32),
        range(0, 23, 2),
        np.array([5, 19, 6]),
    ],
    ids=str,
)
def test_restriction_to_samples_is_the_matrix_of_exactly_these(operator: str, memory: int, indices: Any) -> None:
    x, y = samples()
    H = OPERATORS[operator](network("relu"), F.cross_entropy, batches(x, y, 5), samples=indices, graph_memory=memory)
    picked = torch.as_tensor(list(indices), dtype=torch.int64)
    v = normal(H.shape[0])
    assert H.n_samples == len(picked)
    assert_near(H.matvec(v), TRUTHS[operator](network("relu"), x[picked], y[picked]) @ v)


@pytest.mark.parametrize("indices", [[0, 23], [-1], torch.tensor([5, 40])], ids=str)
def test_an_index_without_sample_is_refused(indices: Any) -> None:
    with pytest.raises(InputError, match="there are 23 samples, from 0 on"):
        HessianOperator(network(), F.cross_entropy, batches(*samples(), 5), samples=indices)


@pytest.mark.parametrize(
    "indices", [[], samples()[1] == 1, [True, False], [0.5, 1.7]], ids=["none", "mask", "booleans", "fractions"]
)
def test_samples_that_are_no_indices_are_refused(indices: Any) -> None:
    with pytest.raises(InputError, match="samples"):
        HessianOperator(network(), F.cross_entropy, batches(*samples(), 5), samples=indices)


# -- SciPy --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operator", OPERATORS)
def test_scipy_solvers_take_it(operator: str) -> None:
    H, expected = OPERATORS[operator](network(), F.cross_entropy, batches(*samples(), 8)), truth(operator, "conv")
    view = H.to_scipy()
    assert (view.shape, view.dtype) == ((100, 100), np.float64)
    block = normal(100, 6).numpy()
    np.testing.assert_allclose(view.matmat(block), expected.numpy() @ block, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(view @ block[:, 0], expected.numpy() @ block[:, 0], rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(view.H @ block, view @ block, rtol=1e-14)
    np.testing.assert_allclose(view.T @ block[:, 1], view @ block[:, 1], rtol=1e-14)
    eigenvalues = torch.linalg.eigvalsh(expected)
    for which, few in (("LA", eigenvalues[-4:]), ("SA", eigenvalues[:4])):
        if operator == "GGN" and which == "SA":
            continue  # a kernel of many dimensions
        found, vectors = eigsh(view, k=4, which=which, v0=np.ones(100))
        np.testing.assert_allclose(found, few, rtol=1e-9)
        np.testing.assert_allclose(expected.numpy() @ vectors, vectors * found, atol=1e-9)
    if operator == "GGN":  # positive definite after a shift
        solution, failed = cg(view + aslinearoperator(np.eye(100)), block[:, 0], rtol=1e-10)
        assert not failed
        np.testing.assert_allclose(expected.numpy() @ solution + solution, block[:, 0], atol=1e-8)


@pytest.mark.parametrize(
    "view",
    [
        pytest.param(lambda v: np.repeat(v, 2, axis=0)[::2], id="every other entry"),
        pytest.param(np.asfortranarray, id="column major"),
        pytest.param(lambda v: v[::-1].copy()[::-1], id="backwards"),
        pytest.param(lambda v: v.astype(np.float32), id="float32"),
        pytest.param(lambda v: np.broadcast_to(v, v.shape), id="read-only"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_scipy_arrays_may_lie_in_memory_in_any_way(view: Callable[[Any], Any]) -> None:
    H, expected = HessianOperator(network(), F.cross_entropy, batches(*samples(), 8)), truth("Hessian", "conv").numpy()
    block = normal(100, 4).numpy()
    for v in (view(block), view(block[:, 0]), view(block[:, :1])):
        found = H.to_scipy() @ v
        assert found.dtype == np.float64
        np.testing.assert_allclose(found, expected @ v, rtol=1e-6, atol=1e-12)


def test_scipy_view_of_a_float32_model_is_in_float64() -> None:
    x, y = samples()
    H = HessianOperator(network().float(), F.cross_entropy, batches(x.float(), y, 8))
    found = eigsh(H.to_scipy(), k=2, which="LA", v0=np.ones(100), return_eigenvectors=False)
    assert found.dtype == np.float64
    np.testing.assert_allclose(np.sort(found), torch.linalg.eigvalsh(truth("Hessian", "conv"))[-2:], rtol=1e-5)


# -- against published packages -------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
@pytest.mark.parametrize("kind", ["conv", "smooth", "residual", "norm"])
@pytest.mark.parametrize(("operator", "peer"), [("Hessian", "HessianLinearOperator"), ("GGN", "GGNLinearOperator")])
def test_products_equal_those_of_curvlinops(operator: str, peer: str, kind: str) -> None:
    pairs, model = batches(*samples(), 5), network(kind).eval()
    make = getattr(importlib.import_module("curvlinops"), peer)
    theirs = make(model, nn.CrossEntropyLoss(), list(model.parameters()), pairs)
    ours = OPERATORS[operator](network(kind), F.cross_entropy, pairs)
    block = normal(ours.shape[0], 3)
    assert_near(ours @ block, theirs @ block)


@pytest.mark.parametrize("kind", ["conv", "smooth", "residual"])
@pytest.mark.parametrize(("n", "exact"), [(20, True), (23, False)])
def test_products_equal_those_of_hessian_eigenthings_where_these_are_exact(kind: str, n: int, exact: bool) -> None:
    """hessian-eigenthings averages the batches without weights: the last of 23 samples in fives counts too much."""
    eigenthings = importlib.import_module("hessian_eigenthings")
    x, y = samples(n)
    pairs, model = batches(x, y, 5), network(kind).eval()
    theirs = eigenthings.HessianOperator(model, pairs, eigenthings.supervised_loss(nn.CrossEntropyLoss()))
    ours = HessianOperator(network(kind), F.cross_entropy, pairs)
    v = normal(ours.shape[0])
    expected = dense_hessian(network(kind), x, y) @ v
    assert_near(ours.matvec(v), expected)
    difference = float((theirs.matvec(v) - expected).norm() / expected.norm())
    assert difference <= 1e-10 if exact else difference > 1e-2


# -- properties -----------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=15)
@given(
    operator=st.sampled_from(list(OPERATORS)),
    size=st.integers(1, 30),
    order=st.permutations(range(23)),
    memory=st.sampled_from([0, 20_000, 10**7]),
    seed=st.integers(0, 100),
    a=st.floats(-3, 3),
)
def test_operator_is_symmetric_linear_and_does_not_know_how_the_data_are_batched_or_ordered(
    operator: str, size: int, order: list[int], memory: int, seed: int, a: float
) -> None:
    x, y = samples()
    H = OPERATORS[operator](network(), F.cross_entropy, batches(x[order], y[order], size), graph_memory=memory)
    u, v = normal(2, H.shape[0], seed=seed)
    Hu, Hv = (H @ torch.stack([u, v], dim=1)).unbind(1)
    scale = float(Hu.norm() + Hv.norm())
    assert abs(float(u @ Hv - v @ Hu)) <= 1e-12 * scale * float(u.norm() + v.norm())
    assert float((H.matvec(u + a * v) - Hu - a * Hv).norm()) <= 1e-12 * (1 + abs(a)) * scale
    assert_near(Hv, truth(operator, "conv") @ v, 1e-12)


@settings(deadline=None, max_examples=15)
@given(
    kind=st.sampled_from(["conv", "smooth", "linear"]),
    c=st.floats(-5, 5),
    size=st.integers(1, 23),
    restricted=st.booleans(),
)
def test_weight_decay_in_the_loss_shifts_the_hessian(kind: str, c: float, size: int, restricted: bool) -> None:
    model = network(kind)

    def decayed(outputs: Tensor, y: Tensor) -> Tensor:
        penalty = sum((p.square().sum() for p in model.parameters()), torch.zeros((), dtype=torch.float64))
        return F.cross_entropy(outputs, y) + c / 2 * penalty

    last = [name for name, _ in model.named_parameters()][-2:]
    parameters = last if restricted else None
    pairs = batches(*samples(), size)
    plain = HessianOperator(model, F.cross_entropy, pairs, parameters=parameters)
    v = normal(plain.shape[0])
    found = HessianOperator(model, decayed, pairs, parameters=parameters).matvec(v)
    torch.testing.assert_close(found, plain.matvec(v) + c * v, rtol=1e-11, atol=1e-11)
    # the Gauss-Newton matrix is that of the loss as a function of the outputs, which the penalty is not
    G = [GGNOperator(model, loss, pairs, parameters=parameters).matvec(v) for loss in (F.cross_entropy, decayed)]
    torch.testing.assert_close(G[0], G[1], rtol=1e-12, atol=1e-14)


@settings(deadline=None, max_examples=15)
@given(
    kind=st.sampled_from(["conv", "smooth", "residual", "functional", "others"]),
    loss=st.sampled_from(sorted(LOSSES)),
    size=st.integers(1, 23),
    seed=st.integers(0, 100),
)
def test_gauss_newton_equals_the_hessian_where_the_outputs_are_linear_in_the_parameters(
    kind: str, loss: str, size: int, seed: int
) -> None:
    last = [name for name, _ in network(kind).named_parameters()][-2:]
    pairs = batches(*samples(seed=seed), size)
    H, G = (
        operator(network(kind), LOSSES[loss], pairs, parameters=last) for operator in (HessianOperator, GGNOperator)
    )
    v = normal(H.shape[0], seed=seed)
    assert_near(G.matvec(v), H.matvec(v), 1e-12)


# -- nothing is changed on the side -----------------------------------------------------------------------------------


@pytest.fixture
def unchanged(untouched: Untouched) -> Untouched:
    """Like ``untouched``, and no requires_grad flag, hook, or gradient mode has changed either."""

    def state(model: nn.Module) -> tuple[Any, ...]:
        flags = [(p.requires_grad, id(p.grad), p._version, p._backward_hooks) for p in model.parameters()]
        hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
        return flags, hooks, torch.is_grad_enabled(), torch.is_inference_mode_enabled()

    @contextmanager
    def context(model: nn.Module) -> Iterator[None]:
        before = state(model)
        with untouched(model):
            yield
        assert state(model) == before

    return context


def with_gradients(kind: str = "conv") -> nn.Module:
    model = network(kind)
    model.get_submodule("1").eval()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    return model


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("memory", [0, 10**7])
def test_model_is_untouched(operator: str, memory: int, unchanged: Untouched) -> None:
    model = with_gradients()
    x, y = samples()
    with unchanged(model):
        H = OPERATORS[operator](model, F.cross_entropy, batches(x, y, 12), graph_memory=memory)
    with unchanged(model):
        H.matvec(normal(100))
        H @ normal(100, 2)
    with unchanged(model):
        lanczos(H, k=1, tol=1e-2)
        H.to_scipy() @ np.ones(100)
    with unchanged(model):
        OPERATORS[operator](model, F.cross_entropy, batches(x, y, 5), parameters=["5.bias"], samples=[3, 7]).dense()
        input_hessian(model, x[:2], y[:2])
        input_hessian(model, x[:2], y[:2], train_mode=True)
    assert all(bool((p.grad == 1).all()) for p in model.parameters() if p.grad is not None)


class Fuse:
    """A cross-entropy that raises when it is armed, or from a given call on."""

    def __init__(self, calls: float = math.inf) -> None:
        self.calls = calls

    def __call__(self, outputs: Tensor, y: Tensor) -> Tensor:
        self.calls -= 1
        if self.calls < 0:
            raise RuntimeError("broken loss")
        return F.cross_entropy(outputs, y)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("calls", [0, 1, 3, 4, 5])
def test_model_is_untouched_when_the_loss_raises_in_the_constructor(
    operator: str, calls: int, unchanged: Untouched
) -> None:
    model = with_gradients()
    with unchanged(model), pytest.raises(RuntimeError, match="broken loss"):
        OPERATORS[operator](model, Fuse(calls), loader(*samples()))


@pytest.mark.parametrize("operator", OPERATORS)
def test_model_is_untouched_when_the_loss_raises_in_a_product_and_the_next_product_is_right(
    operator: str, unchanged: Untouched
) -> None:
    model, loss, v = with_gradients(), Fuse(), normal(100)
    H = OPERATORS[operator](model, loss, batches(*samples(), 5), graph_memory=0)
    loss.calls = 2
    with unchanged(model), pytest.raises(RuntimeError, match="broken loss"):
        H.matvec(v)
    assert H.n_matvecs == 0
    loss.calls = math.inf
    assert_near(H.matvec(v), truth(operator, "conv") @ v)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_that_shuffles_is_taken_because_the_mean_does_not_depend_on_the_order(
    operator: str, workers: int, unchanged: Untouched
) -> None:
    model, v = network(), normal(100)
    with unchanged(model):
        H = OPERATORS[operator](model, F.cross_entropy, loader(*samples(), num_workers=workers))
        found = H.matvec(v)
    assert_near(found, truth(operator, "conv") @ v)
    x, y = samples()
    single = OPERATORS[operator](network().float(), F.cross_entropy, loader(x.float(), y))
    assert_near(single.matvec(v), found, 1e-5)


def test_a_shuffled_loader_whose_mean_loss_is_zero_up_to_rounding_is_taken() -> None:
    level = mean_output(network("linear").eval()(X), Y).item()
    for seed in range(5):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            H = HessianOperator(network("linear"), lambda s, y: (s - level).mean(), loader(X, Y))
        assert not H.matvec(normal(68)).any()


def test_training_mode_between_products_changes_neither_them_nor_the_mode() -> None:
    model = network()
    H = HessianOperator(model, F.cross_entropy, batches(*samples(), 5), graph_memory=0)
    v = normal(100)
    for training in (False, True):
        model.train(training)
        assert_near(H.matvec(v), truth("Hessian", "conv") @ v)
        assert all(module.training == training for module in model.modules())


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("memory", [0, 10**7])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_products_are_the_same_where_gradients_are_switched_off(
    operator: str, memory: int, context: Callable[[], AbstractContextManager[None]]
) -> None:
    model, pairs, v = network(), batches(*samples(), 5), normal(100)
    outside = OPERATORS[operator](model, F.cross_entropy, pairs, graph_memory=memory)
    with context():
        assert_near(outside.matvec(v), truth(operator, "conv") @ v)
        inside = OPERATORS[operator](model, F.cross_entropy, pairs, graph_memory=memory)
        assert_near(inside.matvec(v), truth(operator, "conv") @ v)
        assert_near(inside.matvec(v.clone()), truth(operator, "conv") @ v)  # made under inference_mode itself
        assert_near(inside @ v.clone()[:, None], truth(operator, "conv") @ v[:, None])


# -- precision --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("memory", [0, 10**7])
def test_autocast_outside_does_not_lower_the_precision_inside(operator: str, memory: int) -> None:
    x, y = samples()
    model, pairs, v = network().float(), batches(x.float(), y, 5), normal(100)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = OPERATORS[operator](model, F.cross_entropy, pairs, graph_memory=memory).matvec(v)
    assert_near(found, truth(operator, "conv") @ v, 1e-5)


# -- bad input --------------------------------------------------------------------------------------------------------


def refused(make: Callable[[], object], cause: str, remedy: str) -> None:
    """Assert that ``make`` raises an InputError that tells cause and remedy."""
    with pytest.raises(InputError) as caught:
        make()
    assert cause in str(caught.value)
    assert remedy in str(caught.value)


class Spare(nn.Module):
    """Has a layer that it does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.spare = nn.Linear(64, 4).double(), nn.Linear(2, 2).double()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.used(x.flatten(1))
        return result


class Mapped(nn.Module):
    """A linear model of a function of its inputs."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function, self.last = function, nn.Linear(64, 4).double()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(self.function(x.flatten(1)))
        return result


class Apply(nn.Module):
    """A function as a layer."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.function.apply(x)
        return result


class Pair(nn.Module):
    """Returns its outputs and something else."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(64, 4).double()

    def forward(self, x: Tensor) -> tuple[Tensor, int]:
        return self.last(x.flatten(1)), 0


def spoilt(name: str, value: float) -> nn.Module:
    """Return a network with one entry of one of its tensors replaced."""
    model = network()
    model.state_dict()[name].view(-1)[0] = value
    return model


def last_layer_to(**where: Any) -> nn.Module:
    model = network()
    model.get_submodule("5").to(**where)
    return model


def frozen() -> nn.Module:
    model = network()
    model.get_parameter("0.bias").requires_grad_(False)
    return model


def batch_statistics() -> nn.Module:
    norm = nn.BatchNorm2d(1, track_running_stats=False)
    return nn.Sequential(nn.Conv2d(1, 1, 3), norm, nn.Flatten(), nn.Linear(36, 4)).double()


def weighted(outputs: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(outputs, y, weight=torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=outputs.dtype))


def without_class_3(outputs: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(outputs, y, ignore_index=3)


def inputs(value: float, sample: int) -> tuple[Tensor, Tensor]:
    """Return the samples with one entry of one input replaced."""
    x = X.clone()
    x[sample, 0, 3, 3] = value
    return x, Y


def label(value: int) -> tuple[Tensor, Tensor]:
    """Return the samples with one label replaced."""
    y = Y.clone()
    y[13] = value
    return X, y


# faults of the model, the loss and the data, with what the message must tell: the cause and the remedy
FAULTS: dict[str, tuple[Callable[[], nn.Module], Any, tuple[Tensor, Tensor], str, str]] = {
    "no parameter": (nn.Flatten, F.cross_entropy, (X, Y), "no trainable parameter", "no rows"),
    "frozen parameter": (frozen, F.cross_entropy, (X, Y), "0.bias: requires_grad is False", "unfreeze"),
    "unused parameter": (Spare, F.cross_entropy, (X, Y), "not depend on spare.weight, spare.bias", "parameters=["),
    "parameter is NaN": (
        lambda: spoilt("5.weight", torch.nan), F.cross_entropy, (X, Y), "5.weight of the model", "training diverge",
    ),
    "parameter is infinite": (
        lambda: spoilt("0.bias", torch.inf), F.cross_entropy, (X, Y), "0.bias of the model", "training diverge",
    ),
    "buffer is NaN": (
        lambda: spoilt("2.running_var", torch.nan), F.cross_entropy, (X, Y), "2.running_var of", "training diverge",
    ),
    "parameters on two devices": (
        lambda: last_layer_to(device="meta"), F.cross_entropy, (X, Y), "different devices (cpu, meta)", "model.to(",
    ),
    "parameters of two dtypes": (
        lambda: last_layer_to(dtype=torch.float32), F.cross_entropy, (X, Y),
        "different dtypes (torch.float32, torch.float64)", "model.to(",
    ),
    "random model": (lambda: Mapped(F.dropout), F.cross_entropy, (X, Y), "model is random in eval", "dropout"),
    "batch statistics": (batch_statistics, F.cross_entropy, (X, Y), "1 normalises by", "track_running_stats=True"),
    "samples centred by their batch": (
        lambda: Mapped(lambda x: x - x.mean(0)), F.cross_entropy, (X, Y), "depend on the others", "look for",
    ),
    "samples that depend on those before": (
        lambda: Mapped(lambda x: x.cumsum(0)), F.cross_entropy, (X, Y), "depend on the others", "look for",
    ),
    "samples that depend on those behind": (
        lambda: Mapped(lambda x: x.flip(0).cumsum(0).flip(0)), F.cross_entropy, (X, Y), "depend on the others",
        "look for",
    ),
    "tuple of outputs": (Pair, F.cross_entropy, (X, Y), "returns a tuple", "wrap it"),
    "summed loss": (network, nn.CrossEntropyLoss(reduction="sum"), (X, Y), "not a batch mean", "reduction='mean'"),
    "class weights": (network, weighted, (X, Y), "not a batch mean", "without class weights"),
    "ignored labels": (network, without_class_3, (X, Y), "not a batch mean", "ignored labels"),
    "loss of each sample": (
        network, nn.CrossEntropyLoss(reduction="none"), (X, Y), "not a scalar ((5,))", "reduction='mean'",
    ),
    "loss of shape (1,)": (
        network, lambda s, y: s.mean().view(1), (X, Y), "not a scalar ((1,))", "reduction='mean'",
    ),
    "loss is a float": (network, lambda s, y: 1.0, (X, Y), "not a scalar (float)", "reduction='mean'"),
    "infinite loss": (
        network, lambda s, y: F.cross_entropy(s, y) + torch.inf, (X, Y), "loss of the first batch is inf", "overflow",
    ),
    "loss is NaN": (
        network, lambda s, y: F.cross_entropy(s, y) * torch.nan, (X, Y), "loss of the first batch is nan", "overflow",
    ),
    "random loss": (
        network, lambda s, y: F.cross_entropy(s, y) * (1 + torch.rand(())), (X, Y), "the loss is random", "twice",
    ),
    "input is NaN": (network, F.cross_entropy, inputs(torch.nan, 0), "NaN or infinity", "clean the data"),
    "last input is infinite": (network, F.cross_entropy, inputs(torch.inf, 22), "NaN or infinity", "clean the data"),
    "target is NaN": (
        network, nn.MSELoss(), (X, torch.full((23, 4), torch.nan).double()), "NaN or infinity", "clean the data",
    ),
    "label too large": (network, F.cross_entropy, label(4), "to 4, the model 4 outputs", "from 0 to 3"),
    "label negative": (network, F.cross_entropy, label(-1), "labels from -1 to", "from 0 to 3"),
    "data on another device": (
        network, F.cross_entropy, (X.to("meta"), Y.to("meta")), "is on meta and meta, the model on cpu", "move",
    ),
    "labels on another device": (
        network, F.cross_entropy, (X, Y.to("meta")), "is on cpu and meta, the model on cpu", "move",
    ),
    "data of another dtype": (
        network, F.cross_entropy, (X.float(), Y), "torch.float32, the parameters torch.float64", "convert",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("shuffle", [False, True], ids=["in order", "shuffled"])
def test_a_fault_is_refused_with_cause_and_remedy(fault: str, shuffle: bool) -> None:
    make, loss, (x, y), cause, remedy = FAULTS[fault]
    for operator in OPERATORS.values():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model, data = make(), loader(x, y) if shuffle else batches(x, y, 5)
            refused(lambda: operator(model, loss, data), cause, remedy)  # noqa: B023


@pytest.mark.parametrize(
    "fault", ["random model", "random loss", "samples centred by their batch", "summed loss", "unused parameter"]
)
@pytest.mark.parametrize("shuffle", [False, True], ids=["in order", "shuffled"])
def test_a_refusal_leaves_the_model_and_the_random_state_as_they_were(
    fault: str, shuffle: bool, unchanged: Untouched
) -> None:
    make, loss, (x, y), _, _ = FAULTS[fault]
    model, data = make(), loader(x, y) if shuffle else batches(x, y, 5)
    with unchanged(model), pytest.raises(InputError):
        HessianOperator(model, loss, data)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param([], id="no batch"),
        pytest.param(iter([]), id="exhausted"),
        pytest.param([(X[:0], Y[:0])], id="batch of no sample"),
        pytest.param(loader(X[:0], Y[:0], shuffle=False), id="empty loader"),
    ],
)
def test_an_empty_data_set_is_refused(data: Batches) -> None:
    refused(lambda: HessianOperator(network(), F.cross_entropy, data), "data set is empty", "at least one sample")


def test_a_batch_without_samples_does_not_count() -> None:
    pairs = [(X[:0], Y[:0]), *batches(X, Y, 8), (X[:0], Y[:0])]
    H, v = HessianOperator(network(), F.cross_entropy, pairs), normal(100)
    assert H.n_samples == 23
    assert_near(H.matvec(v), truth("Hessian", "conv") @ v)


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        pytest.param([X], "batch 0 is not a pair of tensors (x, y)", id="inputs alone"),
        pytest.param((X, Y), "batch 0 is not a pair of tensors (x, y)", id="one pair instead of a list"),
        pytest.param([(X, Y), (X, Y, Y)], "batch 1 is not a pair of tensors (x, y)", id="triple"),
        pytest.param([(X, Y), {"x": X, "y": Y}], "batch 1 is not a pair of tensors (x, y)", id="dictionary"),
        pytest.param([(X.numpy(), Y.numpy())], "batch 0 is not a pair of tensors (x, y)", id="arrays"),
        pytest.param([(X, Y), (X, Y[:-1])], "(23, 1, 8, 8) and labels of shape (22,)", id="of different lengths"),
        pytest.param([(X[0], Y[0])], "batch 0 has inputs of shape (1, 8, 8) and labels of shape ()", id="a sample"),
        pytest.param(TensorDataset(X, Y), "inputs of shape (1, 8, 8) and labels of shape ()", id="a data set"),
    ],
)
def test_batches_that_are_no_pairs_are_refused(data: Any, cause: str) -> None:
    refused(lambda: HessianOperator(network(), F.cross_entropy, data), cause, "batch")


class Draws(Dataset[tuple[Tensor, Tensor]]):
    """Adds noise to each sample, anew in each pass."""

    def __len__(self) -> int:
        return 23

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return X[i] + 0.1 * torch.rand_like(X[i]), Y[i]


class Passes(list[tuple[Tensor, Tensor]]):
    """A list whose passes yield what ``of_pass`` tells."""

    def __init__(self, of_pass: Callable[[int], list[tuple[Tensor, Tensor]]]) -> None:
        super().__init__()
        self.of_pass, self.passes = of_pass, 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.passes += 1
        return iter(self.of_pass(self.passes))


@pytest.mark.parametrize(
    ("make", "cause"),
    [
        pytest.param(lambda: DataLoader(Draws(), batch_size=5), "", id="augmentation"),
        pytest.param(lambda: loader(X, Y, drop_last=True), "", id="drop_last and shuffle"),
        pytest.param(lambda: Passes(lambda i: batches(*samples(seed=i), 5)), "", id="other data"),
        pytest.param(lambda: Passes(lambda i: batches(X, (Y + i) % 4, 5)), "", id="other labels"),
        pytest.param(
            lambda: Passes(lambda i: batches(X, Y, 5)[: 5 if i == 1 else 3]), "23 samples, then 15", id="fewer batches"
        ),
        pytest.param(
            lambda: Passes(lambda i: batches(X, Y, 5) if i == 1 else []), "23 samples, then 0", id="only one pass"
        ),
    ],
)
def test_batches_that_change_between_passes_are_refused(make: Callable[[], Batches], cause: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        refused(
            lambda: HessianOperator(network(), F.cross_entropy, make()),
            f"the batches change between passes ({cause}",
            "pass list(batches) to fix one draw",
        )


def test_a_change_of_the_batches_is_found_even_if_the_loss_does_not_feel_it() -> None:
    model = network()
    nn.init.zeros_(model.get_parameter("5.weight"))  # the outputs are the last bias, whatever the inputs
    refused(
        lambda: HessianOperator(model, F.cross_entropy, DataLoader(Draws(), batch_size=5)),
        "the batches change between passes",
        "pass list(batches) to fix one draw",
    )


def test_other_batches_with_the_same_samples_and_drop_last_without_shuffle_are_taken() -> None:
    v = normal(100)
    regrouped = Passes(lambda i: batches(X, Y, 3 + i))
    assert_near(HessianOperator(network(), F.cross_entropy, regrouped).matvec(v), truth("Hessian", "conv") @ v)
    fewer = HessianOperator(network(), F.cross_entropy, loader(X, Y, shuffle=False, drop_last=True))
    assert_near(fewer.matvec(v), dense_hessian(network(), X[:20], Y[:20]) @ v)


def test_a_generator_is_read_once_and_believed() -> None:
    read = []
    H = HessianOperator(network(), F.cross_entropy, (read.append(1) or pair for pair in batches(X, Y, 5)))  # type: ignore[func-returns-value]
    assert len(read) == 5
    v = normal(100)
    assert_near(H.matvec(v), truth("Hessian", "conv") @ v)
    fixed = list(DataLoader(Draws(), batch_size=5))
    assert HessianOperator(network(), F.cross_entropy, fixed).n_samples == 23


@pytest.mark.parametrize("loss", [weighted, without_class_3])
@pytest.mark.parametrize(
    "pairs",
    [
        pytest.param(batches(X[Y.argsort()], Y.sort().values, 3), id="sorted by class"),
        pytest.param([(X[:1], Y[:1]), (X[1:], Y[1:])], id="first of one sample"),
        pytest.param([(X[c == Y], Y[c == Y]) for c in range(4)], id="one class each"),
        pytest.param(batches(X, Y, 1), id="one sample each"),
    ],
)
def test_weights_of_classes_are_found_even_if_the_first_batch_does_not_show_them(
    pairs: list[tuple[Tensor, Tensor]], loss: LossFunction
) -> None:
    refused(lambda: HessianOperator(network(), loss, pairs), "not a batch mean", "without class weights")


def test_samples_that_depend_on_each_other_are_found_even_if_the_first_batch_is_a_single_one() -> None:
    model = Mapped(lambda x: x - x.mean(0))
    for pairs in ([(X[:1], Y[:1]), (X[1:], Y[1:])], batches(X, Y, 1)):
        refused(lambda: HessianOperator(model, F.cross_entropy, pairs), "depend on the others", "look for")  # noqa: B023


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_sum_is_not_taken_for_a_mean_in_any_precision(dtype: torch.dtype) -> None:
    model, summed = nn.Sequential(nn.Flatten(), nn.Linear(64, 4)).to(dtype), nn.CrossEntropyLoss(reduction="sum")
    refused(lambda: HessianOperator(model, summed, [(X.to(dtype), Y)]), "not a batch mean", "reduction='mean'")
    assert HessianOperator(model, F.cross_entropy, [(X.to(dtype), Y)]).n_samples == 23


class NoFunction(torch.autograd.Function):
    """The identity, whose gradient is claimed to be one of no function at all."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        result: Tensor = slope * x.roll(1, 1)
        return result


def weight_normalised() -> nn.Module:
    norm = nn.utils.parametrizations.weight_norm
    return nn.Sequential(nn.Flatten(), norm(nn.Linear(64, 5)), nn.Tanh(), nn.Linear(5, 4)).double()


@pytest.mark.parametrize(
    "make", [weight_normalised, lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 4), Apply(NoFunction)).double()]
)
def test_second_derivatives_that_are_not_symmetric_are_refused(make: Callable[[], nn.Module]) -> None:
    refused(lambda: HessianOperator(make(), F.cross_entropy, [(X, Y)]), "not symmetric", "remove_parametrizations")
    assert GGNOperator(make(), F.cross_entropy, [(X, Y)]).n_samples == 23


def test_without_its_parametrisation_a_normalised_layer_has_the_dense_hessian() -> None:
    model = weight_normalised()
    nn.utils.parametrize.remove_parametrizations(model.get_submodule("1"), "weight")
    assert_near(HessianOperator(model, F.cross_entropy, [(X, Y)]).dense(), dense_hessian(model, X, Y, F.cross_entropy))


def test_sparse_gradients_are_refused() -> None:
    model = nn.Sequential(nn.Embedding(10, 4, sparse=True), nn.Flatten(), nn.Linear(12, 4))
    pairs = [(torch.randint(10, (6, 3)), torch.arange(6) % 4)]
    refused(lambda: HessianOperator(model, F.cross_entropy, pairs), "0 has sparse gradients", "sparse=False")


@pytest.mark.parametrize("operator", OPERATORS)
def test_an_infinite_loss_of_a_later_batch_is_refused_by_constructor_or_product(operator: str) -> None:
    def overflows(outputs: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(outputs, y) + (torch.inf if len(y) == 3 else 0.0)

    def product(memory: int) -> None:
        H = OPERATORS[operator](network(), overflows, batches(X, Y, 5), graph_memory=memory)
        H.matvec(normal(100))

    for memory in (0, 10**7):
        refused(lambda: product(memory), "the loss of a batch is inf", "look for overflow")  # noqa: B023


def inference(tensor: Tensor) -> Tensor:
    with torch.inference_mode():
        return tensor.clone()


def made_under_inference_mode() -> nn.Module:
    with torch.inference_mode():
        return network()


def with_inference_buffer() -> nn.Module:
    model = network()
    model.get_submodule("2").running_mean = inference(model.get_buffer("2.running_mean"))
    return model


@pytest.mark.parametrize(
    ("make", "data", "what"),
    [
        pytest.param(made_under_inference_mode, (X, Y), "0.weight of the model", id="weights"),
        pytest.param(with_inference_buffer, (X, Y), "2.running_mean of the model", id="buffer"),
        pytest.param(network, (inference(X), Y), "batch 0", id="inputs"),
        pytest.param(network, (X, inference(Y)), "batch 0", id="labels"),
    ],
)
def test_tensors_made_under_inference_mode_are_refused(
    make: Callable[[], nn.Module], data: tuple[Tensor, Tensor], what: str
) -> None:
    for operator in OPERATORS.values():
        refused(
            lambda: operator(make(), F.cross_entropy, [data]),  # noqa: B023
            f"{what} was made under torch.inference_mode",
            "clone it",
        )


def step(model: nn.Module, x: Tensor, y: Tensor) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


def replace(model: nn.Module, name: str) -> None:
    """Put a new tensor of twice the value in the place of a parameter or buffer."""
    module, _, attribute = name.rpartition(".")
    old = getattr(model.get_submodule(module), attribute)
    new = 2 * old.detach()
    setattr(model.get_submodule(module), attribute, nn.Parameter(new) if isinstance(old, nn.Parameter) else new)


def reassign_data(model: nn.Module) -> None:
    model.get_parameter("5.weight").data = 2 * model.get_parameter("5.weight").data


CHANGES: dict[str, tuple[Callable[[nn.Module, Tensor, Tensor], object], str]] = {
    "weight in place": (lambda m, x, y: nn.init.ones_(m.get_parameter("5.bias")), "5.bias of the model"),
    "step of training": (step, "of the model"),
    "weights loaded": (lambda m, x, y: m.load_state_dict(network("conv").state_dict()), "0.weight of the model"),
    "buffer in place": (lambda m, x, y: m.get_buffer("2.running_var").mul_(2), "2.running_var of the model"),
    "statistics of a forward pass": (lambda m, x, y: m.train()(x), "2."),
    "inputs in place": (lambda m, x, y: x[-1].mul_(2), "batch "),
    "labels in place": (lambda m, x, y: y.fill_(0), "batch "),
    "parameter replaced": (lambda m, x, y: replace(m, "5.weight"), "5.weight"),
    "buffer replaced": (lambda m, x, y: replace(m, "2.running_mean"), "2.running_mean"),
    "module replaced": (lambda m, x, y: m.__setitem__(5, nn.Linear(18, 4).double()), "5.weight"),  # type: ignore[operator]
    "data of a parameter assigned": (lambda m, x, y: reassign_data(m), "5.weight"),
    "dtype": (lambda m, x, y: m.float(), "0.weight"),
}


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("memory", [0, 10**7])
@pytest.mark.parametrize("change", CHANGES)
def test_a_product_after_a_change_is_refused(operator: str, memory: int, change: str) -> None:
    model, (x, y) = network(), samples()
    H = OPERATORS[operator](model, F.cross_entropy, batches(x, y, 5), graph_memory=memory)
    H.matvec(normal(100))
    make, what = CHANGES[change]
    make(model, x, y)
    refused(lambda: H.matvec(normal(100)), what, "make a new operator")
    refused(lambda: H.dense(), what, "was changed after the operator was made")
    assert H.n_matvecs == 1


def test_a_change_of_samples_that_were_not_chosen_does_not_matter() -> None:
    x, y = samples()
    H = HessianOperator(network(), F.cross_entropy, batches(x, y, 5), samples=[0, 1, 2])
    x[7:].mul_(2)
    assert_near(H.dense(), dense_hessian(network(), X[:3], Y[:3]))


@pytest.mark.parametrize("shape", [(99,), (101,), (), (1, 100), (99, 2), (100, 2, 1)], ids=str)
def test_a_vector_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    H = HessianOperator(network(), F.cross_entropy, [samples()])
    refused(lambda: H @ torch.ones(shape).double(), f"{shape}", "does not fit an operator of shape (100, 100)")
    refused(lambda: H.matvec(torch.ones(shape).double()), f"{shape}", "does not fit an operator of shape (100, 100)")
    assert H.n_matvecs == 0


def test_matvec_refuses_a_block() -> None:
    H = HessianOperator(network(), F.cross_entropy, [samples()])
    refused(lambda: H.matvec(normal(100, 1)), "(100, 1)", "does not fit")


@pytest.mark.parametrize("name", ["7", "0.weigh", "0.", "", "weight"])
def test_an_unknown_name_is_refused_with_those_there_are(name: str) -> None:
    refused(
        lambda: HessianOperator(network(), F.cross_entropy, [samples()], parameters=["5", name]),
        f"unknown parameter or module {name!r}",
        "0.weight, 0.bias, 2.weight, 2.bias, 5.weight, 5.bias",
    )


def test_no_name_is_refused_and_one_name_needs_no_list() -> None:
    make = cache(lambda names: HessianOperator(network(), F.cross_entropy, [samples()], parameters=names))
    refused(lambda: make(()), "parameters = []", "at least one parameter or module")
    assert make("5.bias").names == ("5.bias",)


@pytest.mark.parametrize("shift", [0.0, 5.0])
@pytest.mark.parametrize("make", [HessianOperator, GGNOperator])
def test_networks_that_write_on_their_input_get_a_copy(make: type[HessianOperator], shift: float) -> None:
    x, y = samples()
    x = x + shift
    given = x.clone()
    for first in (InPlace(), nn.ReLU(inplace=True)):
        plain = network("wide")
        model = nn.Sequential(first, plain)
        operator = make(model, F.cross_entropy, batches(x, y, 7))
        inputs = first(given.clone())
        expected = make(plain, F.cross_entropy, batches(inputs, y, 7))
        v = torch.randn(operator.shape[0], dtype=torch.float64)
        torch.testing.assert_close(operator @ v, expected @ v, rtol=1e-12, atol=1e-14)
        assert torch.equal(x, given)


@pytest.mark.parametrize("scale", [1e-200, 1e-50, 1e50, 1e200])
def test_products_in_float32_take_vectors_of_any_length(scale: float) -> None:
    x, y = samples()
    operator = HessianOperator(network("wide").float(), F.cross_entropy, batches(x.float(), y, 7))
    block = torch.randn(operator.shape[0], 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    block[:, 1] = 0.0
    torch.testing.assert_close(operator @ (scale * block) / scale, operator @ block, rtol=1e-4, atol=1e-5)
    power = 2.0**-600  # exact
    assert torch.equal(operator @ (power * block) / power, operator @ block)
