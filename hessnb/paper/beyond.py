"""Beyond the paper: densities, the edge of stability, rescaling, strong attacks, seeds, and sweeps of its silences."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hessnb.curvature import Estimate, HessianOperator, SpectralDensity, input_curvature, lanczos
from hessnb.data import Split
from hessnb.experiments.measure import hessian_batch
from hessnb.experiments.results import Outcome
from hessnb.experiments.spec import AUTOATTACK, AttackAccuracy, Density, RunSpec, Sharpness
from hessnb.landscape import random_direction
from hessnb.paper.adversarial import network_name
from hessnb.paper.large_batch import lambda1, seeds
from hessnb.paper.origins import origins
from hessnb.paper.outcomes import attacks, clean, interval, percentages, under
from hessnb.paper.published import published
from hessnb.paper.recorded import fullest, recorded_as
from hessnb.paper.tables import NOT_MEASURED, Table, mean_and_spread
from hessnb.sharpness import rescaled, stability_bound
from hessnb.statistics import geometric_mean

# Eigenvalues nearer to zero than this share of the largest one are not told apart from zero.
RESOLUTION = 1e-3


def spectral(outcome: Outcome) -> SpectralDensity | None:
    """Return the spectral density that was measured on a network; None where there is none."""
    for measure, found in outcome.measurements.items():
        if isinstance(measure, Density):
            nodes, weights = (torch.tensor(found.values[f], dtype=torch.float64) for f in ("nodes", "weights"))
            return SpectralDensity(nodes, weights, found.values["n"], found.values["n_matvecs"])
    return None


def densities(outcomes: Sequence[Outcome], top: Sequence[Outcome], classes: int, *, name: str, caption: str) -> Table:
    """Return what densities say of each network: trace, how much of it the first ``classes`` - 1 hold, negative part.

    ``top`` has the networks' leading eigenvalues, of which the largest relative drop is told. They are known exactly:
    the random probes estimate only what lies below them, and errors are standard errors over the probes.
    """
    leading = {o.task.spec: o.eigenvalues("train") for o in top}
    rows: list[tuple[str, ...]] = []
    for outcome in outcomes:
        found, exact = spectral(outcome), leading.get(outcome.task.spec, [])
        if found is None:
            continue
        known = [eigenvalue for eigenvalue in exact if eigenvalue > 0]
        rest, size = (_below(found, known, f) for f in (torch.clone, torch.abs))
        trace = replace(rest, value=sum(known) + rest.value)
        below = float(found.nodes.max()) * -RESOLUTION
        negative = found.share(-float("inf"), below)
        mass = found.trace_of(lambda t: (-t).clamp_min(0.0)).value / (sum(known) + size.value)
        share = f"{sum(exact[: classes - 1]) / trace.value:.0%}" if len(exact) >= classes else NOT_MEASURED
        cells = (_error(trace, "{:.3g}", "{:.2g}"), share, _drop(exact), _error(negative, "{:.1%}"), f"{mass:.1%}")
        rows.append((str(outcome.task.spec.recipe.batch_size), *cells))
    rows = rows or [(NOT_MEASURED, *["–"] * 5)]
    header = ("Batch", "trace", f"first {classes - 1}, of the trace", "largest drop", "negative", "negative part")
    return Table(name, caption, header, tuple(rows), origins([o for o in outcomes if spectral(o)]))


def _below(density: SpectralDensity, known: Sequence[float], f: Callable[[Tensor], Tensor]) -> Estimate:
    """Return an estimate of the trace of f(H) without the leading eigenvalues that are ``known``."""
    # Their nodes have converged to them from below.
    end = min(known, default=math.inf) * (1 - RESOLUTION)
    return density.trace_of(lambda t: f(t) * (t < end))


def _error(found: Estimate, form: str, of_error: str | None = None) -> str:
    """Return an estimate with its standard error, where it has one, which may have a form of its own."""
    told = form.format(found.value)
    return told if math.isnan(found.error) else f"{told} ± {(of_error or form).format(found.error)}"


def _drop(eigenvalues: Sequence[float]) -> str:
    """Return after which eigenvalue, of those with five more on either side, the next one is smallest by comparison."""
    ratios = {i: eigenvalues[i - 1] / eigenvalues[i] for i in range(5, len(eigenvalues) - 4) if eigenvalues[i] > 0}
    if not ratios:
        return NOT_MEASURED
    at = max(ratios, key=lambda i: ratios[i])
    return f"× {ratios[at]:.2f} after {at}"


def edges(live: Sequence[Outcome], record: Sequence[Outcome], *, name: str, caption: str) -> Table:
    """Return the largest eigenvalue at the end of training beside the bound of stability, one row a batch size."""
    paper = published("table7").loc["M1"]["lambda1_train"]
    rows = []
    for batch_size in sorted({o.task.spec.recipe.batch_size for o in (*live, *record)} | set(paper.index)):
        runs = [[o for o in some if o.task.spec.recipe.batch_size == batch_size] for some in (live, record)]
        recipes = [o.task.spec.recipe for some in runs for o in some]
        bounds = {f"{stability_bound(r.lr, r.momentum):.0f}" for r in recipes}
        cells = [mean_and_spread(lambda1(some, "train"), "{:.3g}") if some else "–" for some in runs]
        printed = f"{paper[batch_size]:g}" if batch_size in paper.index else "–"
        rows.append((str(batch_size), *cells, printed, ", ".join(sorted(bounds)) or "–"))
    header = ("Batch", "λ₁, live", f"λ₁, {recorded_as(record)}", "λ₁, paper", "2 (1 + β) / lr")
    return Table(name, caption, header, tuple(rows), origins(record))


def followed(outcome: Outcome) -> dict[str, list[float]] | None:
    """Return epochs, training losses and largest eigenvalues along a training, by name; None where there are none."""
    found = [m.values for measure, m in outcome.measurements.items() if isinstance(measure, Sharpness)]
    return found[0] if found else None


@dataclass(frozen=True)
class Rescaling:
    """A network with one layer multiplied by ``factor`` and the next divided: what changes, and what does not.

    ``change`` is the largest change of a logit, ``lambda1`` the largest eigenvalue of the Hessian, ``lambda1_x`` the
    mean of those of the input Hessian, ``along`` the curvature along a random direction that is filter-normalised.
    """

    factor: float
    change: float
    lambda1: float
    lambda1_x: float
    along: float


def rescalings(
    model: nn.Module, data: Split, factors: Sequence[float], *, first: str, second: str, tol: float = 1e-3
) -> list[Rescaling]:
    """Return what becomes of a network when the layer ``first`` is multiplied by each factor and ``second`` divided."""
    with torch.no_grad():
        outputs = model(data.images)
    found = []
    for factor in factors:
        scaled = rescaled(model, first, second, factor)
        hessian = HessianOperator(scaled, F.cross_entropy, data.batches(hessian_batch(scaled, data)))
        direction = random_direction(scaled, torch.Generator().manual_seed(0), filter_normalised=True)
        with torch.no_grad():
            change = float((scaled(data.images) - outputs).abs().max())
        found.append(
            Rescaling(
                factor,
                change,
                float(lanczos(hessian, 1, tol).eigenvalues[0]),
                input_curvature(scaled, data.images, data.labels).mean_lambda1,
                _curvature(hessian, direction),
            )
        )
    return found


def _curvature(hessian: HessianOperator, direction: Tensor) -> float:
    """Return the second derivative along a direction of this length."""
    return float(direction @ hessian.matvec(direction.float()).double())


def rescaling(found: Sequence[Rescaling], *, name: str, caption: str) -> Table:
    """Return rescaled networks, one row a factor."""
    rows = tuple(
        (f"{r.factor:g}", f"{r.change:.1g}", f"{r.lambda1:.4g}", f"{r.along:.5g}", f"{r.lambda1_x:.5g}") for r in found
    )
    header = ("Factor", "largest change of a logit", "λ₁", "curvature, filter-normalised", "λ₁ˣ, mean")
    return Table(name, caption, header, rows)


def strong(live: Sequence[Outcome], record: Sequence[Outcome], *, name: str, caption: str) -> Table:
    """Return accuracies (%) under FGSM, PGD and AutoAttack, one row a size and network, live and recorded.

    One network's have Wilson's 95 % interval, several their mean and standard deviation.
    """
    sources = [("live", live), (recorded_as(record), record)]
    methods = list(dict.fromkeys(m.attack.method for _, outcomes in sources for m in attacks(outcomes)))
    rows = []
    for source, outcomes in sources:
        names = dict.fromkeys(network_name(o.task.spec) for o in outcomes)
        # A record may be of other sizes than what is shown live.
        for eps, network in product(dict.fromkeys(m.attack.eps for m in attacks(outcomes)), names):
            runs = fullest([o for o in outcomes if network_name(o.task.spec) == network])
            accuracies = {m.attack.method: _under(runs, m) for m in attacks(runs) if m.attack.eps == eps}
            cells = [accuracies.get(method, "–") for method in methods]
            rows.append((source, f"{eps:g}", network, mean_and_spread(clean(runs), "{:.1f}"), *cells))
    if not record:
        rows.append(("record", "–", NOT_MEASURED, *["–"] * (1 + len(methods))))
    header = ("Run", "ε", "Training", "clean", *map(_words, methods))
    return Table(name, caption, header, tuple(rows), origins(record))


def _words(method: str) -> str:
    return "AutoAttack" if method == AUTOATTACK else method


def _under(outcomes: Sequence[Outcome], measure: AttackAccuracy) -> str:
    found = [o.measurements[measure] for o in outcomes if measure in o.measurements]
    if len(found) != 1:
        return mean_and_spread(percentages(found), "{:.1f}")
    one = interval(found[0].values["accuracy"], found[0].values["n_samples"])
    return f"{100 * one.value:.1f} ({100 * one.low:.1f}–{100 * one.high:.1f})"


def spread(live: Sequence[Outcome], record: Sequence[Outcome], *, name: str, caption: str) -> Table:
    """Return mean and standard deviation over seeds of each batch size, live and recorded, and the ratio of extremes.

    The ratio is that of the largest to the smallest batch of the same seed: its geometric mean, with a 95 % interval
    for three seeds or more.
    """
    eps = _middle(live)
    rows: list[tuple[str, ...]] = []
    for source, outcomes in (("live", live), (recorded_as(record), record)):
        sizes = sorted({o.task.spec.recipe.batch_size for o in outcomes})
        for size in sizes:
            runs = [o for o in outcomes if o.task.spec.recipe.batch_size == size]
            rows.append((str(size), source, seeds(_values(runs, eps), runs), *_compared(runs, eps)))
        if len(sizes) > 1:
            ratios = _ratios(outcomes, sizes[0], sizes[-1])
            rows.append((f"{sizes[-1]} : {sizes[0]}", source, str(len(ratios)), "–", _ratio(ratios), "–"))
    if not record:
        rows.append((NOT_MEASURED, "record", *["–"] * 4))
    header = ("Batch", "Run", "Seeds", "Test accuracy %", "λ₁", f"FGSM, {eps:g}")
    return Table(name, caption, header, tuple(rows), origins(record))


def _ratios(outcomes: Sequence[Outcome], small: int, large: int) -> list[float]:
    found: dict[int, dict[int, float]] = {}
    for o in outcomes:
        if values := lambda1([o], "train"):
            found.setdefault(o.task.spec.recipe.seed, {})[o.task.spec.recipe.batch_size] = values[0]
    return [of_seed[large] / of_seed[small] for of_seed in found.values() if {small, large} <= of_seed.keys()]


def _ratio(ratios: Sequence[float]) -> str:
    interval = geometric_mean(ratios) if ratios else None
    if interval is not None:
        return f"× {interval:.3g}"
    return f"× {statistics.geometric_mean(ratios):.3g}" if ratios else NOT_MEASURED


def sweep(
    live: Sequence[Outcome],
    record: Sequence[Outcome],
    choice: Callable[[RunSpec], str],
    title: str,
    *,
    name: str,
    caption: str,
) -> Table:
    """Return epochs, accuracies (%) and the largest eigenvalue for each ``choice``, live and recorded.

    ``choice`` gives a run's value of what is swept, ``title`` its column. A training that failed says how.
    """
    eps = _middle(live)
    rows: list[tuple[str, ...]] = []
    for source, outcomes in (("live", live), (recorded_as(record), record)):
        keys = dict.fromkeys((o.task.spec.recipe.batch_size, choice(o.task.spec)) for o in outcomes)
        for batch_size, chosen in keys:
            runs = [o for o in outcomes if (o.task.spec.recipe.batch_size, choice(o.task.spec)) == (batch_size, chosen)]
            epochs = [len(o.result.history) for o in runs if o.result and o.result.status == "done"]
            told = ", ".join(filter(None, (mean_and_spread(epochs, "{:.0f}") if epochs else "", _failures(runs))))
            rows.append((chosen, str(batch_size), source, told or NOT_MEASURED, *_compared(runs, eps)))
    if not record:
        rows.append((NOT_MEASURED, "–", "record", *["–"] * 4))
    header = (title, "Batch", "Run", "Epochs", "Test accuracy %", "λ₁", f"FGSM, {eps:g}")
    return Table(name, caption, header, tuple(rows), origins(record))


def _failures(runs: Sequence[Outcome]) -> str:
    """Return how trainings failed, and how many where it was not all: "1 diverged"."""
    reasons = [o.result.reason.partition(":")[0] for o in runs if o.result and o.result.status == "failed"]
    counted = Counter(reason.removeprefix("training ") for reason in reasons)
    return ", ".join(reason if n == len(runs) else f"{n} {reason}" for reason, n in counted.items())


def learning_rate(spec: RunSpec) -> str:
    """Return the learning rate of a run: the choice of `sweep` for the artefact silent_lr."""
    return f"{spec.recipe.lr:g}"


def variant(spec: RunSpec) -> str:
    """Return the variant of a run's network: the choice of `sweep` for silent_variant and silent_input."""
    return spec.model.variant or "as taken here"


def under_fgsm(outcomes: Sequence[Outcome], eps: float) -> list[float]:
    """Return the accuracies (%) on the test set under FGSM of this size, clipped, one a network."""
    return under(outcomes, "FGSM", eps=eps, clip=True, precision=None)


def _values(outcomes: Sequence[Outcome], eps: float) -> list[list[float]]:
    """Return accuracies, largest eigenvalues and accuracies under attack."""
    return [clean(outcomes), lambda1(outcomes, "train"), under_fgsm(outcomes, eps)]


def _compared(outcomes: Sequence[Outcome], eps: float) -> tuple[str, str, str]:
    """Return the cells of accuracy, largest eigenvalue and accuracy under attack."""
    ended = any(o.result and o.result.status == "done" for o in outcomes)
    cells = zip(_values(outcomes, eps), ("{:.2f}", "{:.3g}", "{:.1f}"), strict=True)
    first, second, third = (mean_and_spread(values, form) if ended else "–" for values, form in cells)
    return first, second, third


def _middle(outcomes: Sequence[Outcome]) -> float:
    """Return the size of the attack that seeds and sweeps compare."""
    return attacks(outcomes)[0].attack.eps
