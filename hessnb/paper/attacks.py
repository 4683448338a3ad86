"""The attacks of Table 5 taken apart, and the second-order ones of section 3.4: accuracies beside the record."""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hessnb.attacks import ATTACKS, Perturbation, damped_newton, l2_hessian
from hessnb.attacks.loop import wrongness
from hessnb.attacks.second_order import DAMPINGS
from hessnb.experiments.results import Outcome
from hessnb.experiments.spec import SECOND_ORDER, AttackSpec
from hessnb.models import inference
from hessnb.paper.origins import origins
from hessnb.paper.outcomes import attacked, attacks, clean, interval, percentages, under
from hessnb.paper.published import published
from hessnb.paper.recorded import papers_own, recorded_as
from hessnb.paper.tables import Table, mean_and_spread
from hessnb.robustness import accuracy, agreement, predictions
from hessnb.statistics import Interval, proportion

# Where the paper has the original networks under attack: its table by network.
_PAPER = {"M1": "table3", "C3": "table4"}


def variations(outcomes: Sequence[Outcome], *, name: str, caption: str) -> Table:
    """Return accuracies (%) under the five attacks, each choice changed alone, and the paper's (``table5``).

    Recorded outcomes of the paper's scale also get the difference to it, as Tables 3 and 4 have the attacks.
    """
    usual: dict[str, Any] = {"clip": False, "precision": None, "scale": None}
    columns = {
        "not clipped": usual,
        "clipped": usual | {"clip": True},
        "own precision": usual | {"precision": "own"},
        "plain float32": usual | {"precision": "plain"},
        "radius ε": usual | {"scale": "unit"},
    }
    rows = []
    for method in ATTACKS:
        cells = [_shown(under(outcomes, method, **settings)) for settings in columns.values()]
        if not method.startswith("L2"):
            cells[-1] = "–"
        rows.append((method, *cells, _published("M1", method), *_difference("M1", method, outcomes, usual)))
    header = ("Attack", *columns, "paper", *(("difference",) if _comparable(outcomes) else ()))
    return Table(name, caption, header, tuple(rows), origins(outcomes))


def clipping(live: Sequence[Outcome], record: Sequence[Outcome], *, name: str, caption: str) -> Table:
    """Return accuracies (%) under FGSM and FGSM-10, clipped and not, live, recorded and the paper's (``table5``)."""
    rows = []
    for method in ("FGSM", "FGSM-10"):
        cells = [
            _shown(under(outcomes, method, clip=clip, precision=None, scale=None))
            for outcomes in (live, record)
            for clip in (False, True)
        ]
        rows.append((method, *cells, _published("M1", method)))
    sources = ("live", recorded_as(record))
    header = ("Attack", *(f"{source}, {how}" for source in sources for how in ("not clipped", "clipped")), "paper")
    return Table(name, caption, header, tuple(rows), origins(record))


def steps_of_cg(live: Sequence[Outcome], record: Sequence[Outcome], *, name: str, caption: str) -> Table:
    """Return accuracies (%) under the second-order attacks by conjugate gradient steps, and the paper's (``cg``).

    Without ``live`` outcomes the record alone.
    """
    network = (*live, *record)[0].task.spec.model.name
    sources = [*([("live", live)] if live else []), (recorded_as(record), record)]
    rows = []
    for label, settings in cg_settings(live or record).items():
        cells = [_shown(under(outcomes, method, **settings)) for method in SECOND_ORDER for _, outcomes in sources]
        rows.append((label, *cells))
    blank = [""] * (len(sources) - 1)
    paper = [cell for method in SECOND_ORDER for cell in (*blank, _published(network, method))]
    rows.append(("paper, steps not given", *paper))
    header = ("CG steps", *(f"{method}, {where}" for method in SECOND_ORDER for where, _ in sources))
    return Table(name, caption, header, tuple(rows), origins(record))


def cg_settings(outcomes: Sequence[Outcome]) -> dict[str, dict[str, Any]]:
    """Return the fields that tell the solvers of the sweep apart, by label: numbers of steps, then "exact"."""
    steps = {m.attack.cg_steps for m in attacks(outcomes) if m.attack.cg_steps and m.attack.solver is None}
    iterated: dict[str, dict[str, Any]] = {str(n): {"cg_steps": n, "solver": None} for n in sorted(steps)}
    return iterated | {"exact": {"solver": "exact"}}


def equal_size(live: Sequence[Outcome], record: Sequence[Outcome], *, name: str, caption: str) -> Table:
    """Return accuracies (%) under all attacks of ``section34`` with 95 % intervals, and the paper's.

    Of one network the interval is Wilson's, over its test samples; of several it is mean and standard deviation. A
    record of the paper's scale also gets the difference to the paper.
    """
    network = live[0].task.spec.model.name
    rows: list[tuple[str, ...]] = []
    for attack in (None, *(measure.attack for measure in attacks(live))):
        method = attack.method if attack else "clean"
        label = "none" if attack is None else f"{method}, exact" if attack.solver == "exact" else method
        paper = _published(network, method) if method in ("clean", *ATTACKS) else "–"
        cells = (*(_interval(outcomes, attack) for outcomes in (live, record)), paper)
        rows.append((label, *cells, *_difference(network, method, record, _fields(attack))))
    header = ("Attack", "live", recorded_as(record), "paper", *(("difference",) if _comparable(record) else ()))
    return Table(name, caption, header, tuple(rows), origins(record))


def per_sample(records: Mapping[str, Perturbation], *, name: str, caption: str) -> Table:
    """Return what attacks did to samples, by attack: norms, cosine to the gradient, CG steps, residual, zeros."""
    rows = []
    for label, told in records.items():
        iterated = bool(told.cg_steps.any())
        rows.append(
            (
                label,
                f"{told.l2.mean():.3f}",
                f"{told.linf.mean():.3f}",
                f"{told.cosine.median():.3f}",
                f"{told.cg_steps.double().mean():.1f}" if iterated else "–",
                f"{told.residual.median():.0e}" if iterated else "–",
                str(int(told.zero_gradients.sum())),
            )
        )
    header = ("Attack", "L2 norm", "L∞ norm", "cosine to g", "CG steps", "residual", "zero gradients")
    return Table(name, caption, header, tuple(rows))


def same_mistakes(
    model: nn.Module, x: Tensor, y: Tensor, ends: Mapping[str, Tensor], *, name: str, caption: str
) -> Table:
    """Return whether attacks that lead samples x (N, ...) to ``ends`` make the same ones wrong, and in the same way.

    Each row is about the samples that were right and that its attack makes wrong; the cells say how many of them (%)
    the column's attack takes to the same wrong class.
    """
    right = predictions(model, x) == y
    found = {label: predictions(model, end) for label, end in ends.items()}
    rows = []
    for label, classes in found.items():
        fooled = right & (classes != y)
        cells = [
            _percent(agreement(classes[fooled], others[fooled]), digits=0) if other != label and fooled.any() else "–"
            for other, others in found.items()
        ]
        rows.append((label, str(int(fooled.sum())), *cells))
    return Table(name, caption, ("Attack", "makes wrong", *found), tuple(rows))


def ways(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    ends: Mapping[str, Tensor],
    *,
    gradient: str,
    nearest: str,
    name: str,
    caption: str,
) -> Table:
    """Return where attacks lead: median cosines of their steps with two of them, and the classes that they end in.

    ``ends`` are perturbed samples (N, ...) by attack, ``gradient`` and ``nearest`` the names of the two. The last
    column counts only samples that were right and became wrong: the share whose new class was the second most probable.
    """
    with inference(model) as forward:
        logits = forward(x)
    runner_up = logits.scatter(1, y[:, None], -torch.inf).argmax(1)
    right = logits.argmax(1) == y
    moves = {label: (end - x).flatten(1).double() for label, end in ends.items()}
    rows = []
    for label, end in ends.items():
        found = predictions(model, end)
        fooled = right & (found != y)
        hit = proportion(int((found == runner_up)[fooled].sum()), int(fooled.sum())) if bool(fooled.any()) else None
        cosines = [torch.cosine_similarity(moves[label], moves[other], dim=1) for other in (gradient, nearest)]
        rows.append(
            (
                label,
                _percent(proportion(int((found == y).sum()), len(y))),
                *(f"{cosine.median():.2f}" for cosine in cosines),
                _percent(hit) if hit else "–",
            )
        )
    header = ("Attack", "accuracy %", f"cosine to {gradient}", f"cosine to {nearest}", "ends in the runner-up %")
    return Table(name, caption, header, tuple(rows))


@dataclass(frozen=True)
class DampingSweep:
    """The ``accuracies`` under (H + gamma I)^-1 g for each of ``dampings``, taken for all samples alike, and for how
    many samples each is ``chosen``, since it gives the largest loss.
    """

    dampings: tuple[float, ...]
    accuracies: list[Interval]
    chosen: list[int]

    @property
    def labels(self) -> list[str]:
        """The dampings in words: 0 is Newton's step, infinity the gradient."""
        words = {0.0: "Newton", math.inf: "gradient"}
        return [words.get(damping, f"{damping:g}".replace("-", "−")) for damping in self.dampings]


def damping_sweep(
    model: nn.Module, x: Tensor, y: Tensor, *, eps: float, dampings: tuple[float, ...] = DAMPINGS
) -> DampingSweep:
    """Attack samples with each damping alone, in the L2 ball of radius eps sqrt(d), not clipped."""
    accuracies, losses = [], []
    for damping in dampings:
        end = damped_newton(model, x, y, eps=eps, dampings=(damping,), bounds=None)
        accuracies.append(accuracy(model, end, y))
        with inference(model) as forward:
            losses.append(wrongness(forward(end).double(), y))
    chosen = torch.stack(losses).argmax(0)
    return DampingSweep(dampings, accuracies, chosen.bincount(minlength=len(dampings)).tolist())


def verdict(model: nn.Module, x: Tensor, classes: Sequence[str]) -> str:
    """Return the most probable class of one sample (1, ...) and its probability."""
    with inference(model) as forward:
        p = forward(x).softmax(1)[0]
    return f"{classes[int(p.argmax())]} ({p.max():.1%})"


def _shown(values: Sequence[float]) -> str:
    return mean_and_spread(values, "{:.1f}")


def _papers_number(network: str, method: str) -> float:
    return float(published(_PAPER[network])[method]["ORI"])


def _published(network: str, method: str) -> str:
    return f"{_papers_number(network, method):.1f}"


def _interval(outcomes: Sequence[Outcome], attack: AttackSpec | None) -> str:
    """Return the accuracy (%) of one network with its interval, or mean and spread of several; None: unattacked."""
    if attack is None:
        values = clean(outcomes)
        # On the same test set as what was measured of that network under an attack.
        ended = [o for o in outcomes if clean([o])]
        tested = [found for m in attacks(ended) for found in attacked(ended, m.attack.method)]
    else:
        tested = attacked(outcomes, attack.method, **_fields(attack))
        values = percentages(tested)
    if len(values) != 1 or not tested:
        return _shown(values)
    return _percent(interval(values[0] / 100, tested[0].values["n_samples"]))


def _fields(attack: AttackSpec | None) -> dict[str, Any]:
    return {field: getattr(attack, field) for field in ("clip", "solver", "scale", "precision")} if attack else {}


def _comparable(outcomes: Sequence[Outcome]) -> bool:
    return bool(outcomes) and papers_own(outcomes)


def _difference(network: str, method: str, record: Sequence[Outcome], settings: dict[str, Any]) -> tuple[str, ...]:
    """Return the cell with ours - paper of a recorded row, or no cell where the scales differ."""
    if not _comparable(record):
        return ()
    found = clean(record) if method == "clean" else under(record, method, **settings)
    if not found or method not in ("clean", *ATTACKS):
        return ("–",)
    return (f"{statistics.mean(found) - _papers_number(network, method):+.1f}",)


def _percent(interval: Interval, digits: int = 1) -> str:
    value, low, high = (f"{100 * share:.{digits}f}" for share in (interval.value, interval.low, interval.high))
    return f"{value} ({low} to {high})"


def identities(model: nn.Module, x: Tensor, y: Tensor, *, name: str, caption: str) -> Table:
    """Return what theory says of the second-order step and what is found, in float64: median and worst of samples."""
    double, x = copy.deepcopy(model).double().eval(), x.double()

    def solved(**settings: Any) -> Perturbation:
        return l2_hessian.record(double, x, y, eps=1e-3, bounds=None, **settings)

    exact = solved(solver="exact")
    change: Tensor = torch.func.jvp(double, (x,), (exact.x_adv - x,))[1]
    true = change.gather(1, y[:, None])
    wrong = change[F.one_hot(y, change.shape[1]) == 0].view(len(y), -1)
    spread = (wrong.amax(1) - wrong.amin(1)) / (wrong.mean(1) - true[:, 0])
    iterated = torch.cosine_similarity((solved(cg_steps=9).x_adv - x).flatten(1), (exact.x_adv - x).flatten(1), dim=1)
    cases = (
        ("the wrong logits move alike", "their spread, by the true one's move", spread.abs()),
        ("one CG step is the gradient", "1 − cosine to g", (1 - solved(cg_steps=1).cosine).abs()),
        ("so is infinite damping", "1 − cosine to g, γ = 10⁶", (1 - solved(damping=1e6, solver="exact").cosine).abs()),
        ("nine CG steps are exact", "1 − cosine to the exact step", (1 - iterated).abs()),
    )
    rows = [(claim, what, "0", f"{found.median():.0e}", f"{found.max():.0e}") for claim, what, found in cases]
    ascent = f"{exact.cosine.median():.2f}", f"{exact.cosine.min():.2f}"
    rows.append(("Newton's step ascends", "cosine to g", "> 0", *ascent))
    return Table(name, caption, ("Identity", "Measured", "Theory", "median", "worst"), tuple(rows))
