"""The paper's landscapes (Figs 2, 3, 6 to 9) as numbers: curvature along a direction, and the noise of a batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hessnb.curvature import HessianOperator, trace
from hessnb.data import Split
from hessnb.experiments.measure import hessian_batch
from hessnb.experiments.results import Outcome
from hessnb.experiments.spec import LossLine, LossPlane
from hessnb.landscape import along, random_direction
from hessnb.models import inference
from hessnb.paper.origins import origins
from hessnb.paper.recorded import Recorded, profiles
from hessnb.paper.tables import PROFILE, Table, mean_and_spread
from hessnb.training import EVALUATION_BATCH

# The sets whose loss is drawn, as a table calls them.
SETS = {"train": "training", "test": "test", "batch": "batch"}


def line(outcome: Outcome) -> dict[str, Any] | None:
    """Return the positions and the losses by set on the longest line along an eigenvector, or None if not measured."""
    return _line(outcome, max)


def plane(outcome: Outcome) -> dict[str, Any] | None:
    """Return the positions and the losses by set on the plane of two eigenvectors, or None if not measured."""
    return next((m.values for measure, m in outcome.measurements.items() if isinstance(measure, LossPlane)), None)


def _line(outcome: Outcome, choose: Callable[[Iterable[float]], float]) -> dict[str, Any] | None:
    lines = {measure.reach: m.values for measure, m in outcome.measurements.items() if isinstance(measure, LossLine)}
    return lines[choose(lines)] if lines else None


def first_of_each(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Return one outcome a batch size, in ascending order: of the first seed that has measurements, if any has."""
    chosen: dict[int, Outcome] = {}
    for outcome in sorted(outcomes, key=lambda o: (not o.measurements, o.task.spec.recipe.seed)):
        chosen.setdefault(outcome.task.spec.recipe.batch_size, outcome)
    return [chosen[batch_size] for batch_size in sorted(chosen)]


def extremes(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Return the outcomes of the smallest and the largest batch size; see `first_of_each`."""
    every = first_of_each(outcomes)
    return every if len(every) < 2 else [every[0], every[-1]]


def rise(outcome: Outcome) -> tuple[list[float], list[float]]:
    """Return distances t > 0 and the mean rise of the training loss from 0 to t and to -t, without their common slope.

    From all lines that were measured: (L(t) - 2 L(0) + L(-t)) / 2, which is lambda t^2 / 2 close to 0. Without a line
    both are empty.
    """
    found: dict[float, float] = {}
    for values in filter(None, (_line(outcome, max), _line(outcome, min))):
        losses, middle = values["losses"]["train"], len(values["positions"]) // 2
        for i in range(1, middle + 1):
            both = losses[middle - i] - 2 * losses[middle] + losses[middle + i]
            found[values["positions"][middle + i]] = both / 2
    return sorted(found), [found[t] for t in sorted(found)]


def second_difference(places: Sequence[float], losses: Sequence[float], at: float, *, stride: int = 1) -> float:
    """Return the second difference of ``losses`` over equally spaced ``places``, about the one nearest to ``at``.

    Its step is ``stride`` places; NaN where it leaves the line.
    """
    i = min(range(len(places)), key=lambda j: abs(places[j] - at))
    if not stride <= i < len(places) - stride:
        return math.nan
    step = places[i + stride] - places[i]
    return (losses[i - stride] - 2 * losses[i] + losses[i + stride]) / step**2


def second_derivative(places: Sequence[float], losses: Sequence[float], at: float) -> float:
    """Return the second derivative of ``losses`` over equally spaced ``places`` at the one nearest to ``at``.

    From five places; for a smooth loss the error falls with the fourth power of their spacing.
    """
    near, far = (second_difference(places, losses, at, stride=stride) for stride in (1, 2))
    return (4 * near - far) / 3


def curvature(outcome: Outcome, key: str) -> float | None:
    """Return the second derivative at 0 of a set's loss along the dominant eigenvector, or None if not measured.

    From the five losses next to 0 on the shortest line; see `second_derivative`.
    """
    values = _line(outcome, min)
    return second_derivative(values["positions"], values["losses"][key], 0.0) if values else None


def curvatures(outcomes: Sequence[Outcome], *, name: str, caption: str) -> Table:
    """Return the curvature of each loss along the dominant eigenvector, as `curvature`, beside the eigenvalue itself.

    One row a batch size; several seeds give mean and standard deviation. Where only some of the networks of a row have
    been drawn, the eigenvalue is that of these. Recorded ones tell their profile.
    """
    rows, recorded = [], any(isinstance(o, Recorded) for o in outcomes)
    for batch_size in sorted({o.task.spec.recipe.batch_size for o in outcomes}):
        trained = [o for o in outcomes if o.task.spec.recipe.batch_size == batch_size]
        runs = [o for o in trained if curvature(o, "train") is not None] or trained
        eigenvalues = [o.eigenvalues("train")[0] for o in runs if o.eigenvalues("train")]
        found = {key: [value for o in runs if (value := curvature(o, key)) is not None] for key in SETS}
        ratios = [test / train for test, train in zip(found["test"], found["train"], strict=True)]
        cells = [mean_and_spread(values, "{:.3g}") for values in (eigenvalues, *found.values())]
        scale = (profiles(runs),) if recorded else ()
        rows.append((str(batch_size), *cells, mean_and_spread(ratios, "{:.1f}"), *scale))
    titles = [f"{title} loss" for title in SETS.values()]
    header = ("Batch", "λ₁, certified", *titles, "test / training", *((PROFILE,) if recorded else ()))
    return Table(name, caption, header, tuple(rows), origins(outcomes))


# Steps of a second difference, down to where float64 still has digits to spare.
STEPS = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6)


def second_differences(
    networks: Sequence[tuple[Outcome, nn.Module, Tensor]], split: Split, *, name: str, caption: str
) -> Table:
    """Return (L(h) - 2 L(0) + L(-h)) / h^2 for ever smaller steps h, in parts of the dominant eigenvalue.

    ``networks``: outcomes that hold the eigenvalue, their networks, and the eigenvectors (n,). All is done in float64.
    """
    batches = [(x.double(), y) for x, y in split.batches(EVALUATION_BATCH)]
    places = sorted({sign * step for step in STEPS for sign in (-1, 0, 1)})
    rows = []
    for outcome, model, vector in networks:
        direction = vector.double() / torch.linalg.vector_norm(vector.double())
        found = along(deepcopy(model).double(), F.cross_entropy, {"train": batches}, direction, places)
        loss = dict(zip(places, found.losses["train"].tolist(), strict=True))
        differences = [(loss[step] - 2 * loss[0] + loss[-step]) / step**2 for step in STEPS]
        largest = outcome.eigenvalues("train")[0]
        cells = [f"{difference / largest:.5f}" for difference in differences]
        rows.append((str(outcome.task.spec.recipe.batch_size), f"{largest:.4g}", *cells))
    return Table(name, caption, ("Batch", "λ₁, certified", *(f"h = {step:g}" for step in STEPS)), tuple(rows))


def sample_losses(model: nn.Module, split: Split) -> Tensor:
    """Return the cross-entropy (N,) of each sample of a split, in eval mode, float64."""
    with inference(model) as forward:
        parts = [F.cross_entropy(forward(x).double(), y, reduction="none") for x, y in split.batches(EVALUATION_BATCH)]
    return torch.cat(parts)


def batch_noise(networks: Sequence[tuple[Outcome, Tensor]], *, name: str, caption: str) -> Table:
    """Return by how much the drawn batch's loss is off the training loss, and by how much the mean of a batch may be.

    ``networks``: measured lines, and of each network the losses (N,) of all training samples. The standard deviation of
    the mean of b of them, drawn without replacement, is sigma / sqrt(b) sqrt((N - b) / (N - 1)); sigma divides by N.
    """
    rows = []
    for outcome, losses in networks:
        found = line(outcome)
        if found is None:
            continue
        middle = len(found["positions"]) // 2
        train, batch = (found["losses"][key][middle] for key in ("train", "batch"))
        drawn = next(measure.batch for measure in outcome.measurements if isinstance(measure, LossLine))
        own = outcome.task.spec.recipe.batch_size
        few = losses.sort(descending=True).values[: max(1, len(losses) // 100)]
        rows.append(
            (
                str(own),
                f"{train:.3g}",
                f"{batch:.3g}",
                f"{batch / train - 1:+.0%}",
                *(f"± {deviation_of_mean(losses, size) / train:.0%}" for size in (drawn, own)),
                f"{float(few.sum() / losses.sum()):.0%}",
            )
        )
    header = ("Batch", "training loss", "batch loss", "shift", "deviation", "of B samples", "in the worst 1 %")
    return Table(name, caption, header, tuple(rows))


def deviation_of_mean(losses: Tensor, size: int) -> float:
    """Return the standard deviation of the mean of ``size`` of the losses (N,), drawn without replacement."""
    n = len(losses)
    return float(losses.std(correction=0)) * math.sqrt(max(0, n - size) / (size * (n - 1)))


def directional(
    networks: Mapping[str, nn.Module],
    split: Split,
    eigenvalues: Sequence[float],
    *,
    n_matvecs: int = 30,
    name: str,
    caption: str,
) -> Table:
    """Return the curvature of the loss over ``split`` along random directions beside the dominant eigenvalues.

    Averaged over all directions it is trace / n; the trace is estimated from ``n_matvecs`` products, with its standard
    error. The last column is the curvature along one filter-normalised direction (Li et al., 2018), at length one.
    """
    rows = []
    for (label, model), largest in zip(networks.items(), eigenvalues, strict=True):
        operator = HessianOperator(model, F.cross_entropy, split.batches(hessian_batch(model, split)))
        n, found = operator.shape[0], trace(operator, n_matvecs=n_matvecs)
        chance = random_direction(model, torch.Generator().manual_seed(0), filter_normalised=True)
        chance = chance / torch.linalg.vector_norm(chance)
        curved = float(chance @ operator.matvec(chance))
        rows.append(
            (
                label,
                f"{n:,}",
                f"{largest:.3g}",
                f"{found.value:.3g} ± {found.error:.1g}",
                f"{found.value / n:.1e}",
                f"1 / {largest * n / found.value:,.0f}",
                f"{curved:.1e}",
            )
        )
    header = ("Batch", "weights n", "λ₁", "trace", "trace / n", "in parts of λ₁", "filter-normalised")
    return Table(name, caption, header, tuple(rows))
