"""Section 3.3 in numbers: the Hessian's spectrum after adversarial training, sub-sampled and over all samples.

Beside the paper's six networks stands a control: the original network trained on for as many epochs without an attack.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from hessnb import training
from hessnb.attacks import ATTACKS
from hessnb.data import Split
from hessnb.experiments.grid import Task, artefact
from hessnb.experiments.networks import drawn, load_split, trained_model
from hessnb.experiments.profile import load_profile
from hessnb.experiments.results import Measurement, Outcome
from hessnb.experiments.run import all_trained, compute, results
from hessnb.experiments.spec import Interpolation, LossLine, Measure, RunSpec, Spectrum
from hessnb.experiments.store import Store
from hessnb.paper.adversarial import CONTROL, ORIGINAL, network_name
from hessnb.paper.landscapes import second_derivative, second_difference
from hessnb.paper.origins import origins
from hessnb.paper.recorded import Recorded, from_record, profiles
from hessnb.paper.tables import NOT_MEASURED, PROFILE, Table, mean_and_spread

# -- networks --------------------------------------------------------------------------------------------------------


def results_with_control(
    name: str,
    *,
    profile: str = "quick",
    seeds: int | None = None,
    device: str = "cpu",
    store: str | Path | None = None,
) -> list[Outcome]:
    """Return what an artefact of original and robust networks shows, and the same of a control for each original.

    Computes what the store lacks. Raises InputError for an unknown name, and RunFailed when a training failed.
    """
    outcomes = results(name, profile=profile, seeds=seeds, device=device, store=store)
    tasks = [task for t in artefact("control").tasks(load_profile(profile), seeds) if (task := _shared(t, outcomes))]
    return [*outcomes, *all_trained(compute(Store(store), tasks, device=device))]


def recorded_with_control(name: str) -> list[Recorded]:
    """Return what the record holds of an artefact of original and robust networks, and the same of each control.

    See `from_record`.
    """
    outcomes = from_record(name)
    controls = [(o, task) for o in from_record("control") if (task := _shared(o.task, outcomes))]
    return [*outcomes, *(replace(o, task=task, measurements=_of(task, o)) for o, task in controls)]


def _of(task: Task, outcome: Outcome) -> dict[Measure, Measurement]:
    return {measure: found for measure, found in outcome.measurements.items() if measure in task.measures}


def _shared(control: Task, outcomes: Sequence[Outcome]) -> Task | None:
    """Return the task of a control with the measures of these outcomes; None: its original is not among them."""
    wanted = {measure for o in outcomes if o.task.spec == control.spec.parent for measure in o.task.measures}
    return Task(control.spec, tuple(m for m in control.measures if m in wanted)) if wanted else None


# -- spectra ---------------------------------------------------------------------------------------------------------


def spectra(outcomes: Sequence[Outcome]) -> list[Spectrum]:
    """Return the spectra that were planned, whether measured or not, the fewest samples first, all samples last."""
    found = dict.fromkeys(m for o in outcomes for m in o.task.measures if isinstance(m, Spectrum))
    return sorted(found, key=lambda m: (m.samples or math.inf, m.draw or 0))


def samples_label(measure: Spectrum) -> str:
    """Return the paper's B_H of a spectrum: "1 (a)", "1 (b)", "320", "all"."""
    if measure.samples is None:
        return "all"
    return f"1 ({'abcdefgh'[measure.draw or 0]})" if measure.samples == 1 else str(measure.samples)


def eigenvalues(outcome: Outcome, measure: Spectrum) -> list[float]:
    """Return measured eigenvalues, the largest first and the most negative last; empty when not measured."""
    found = outcome.measurements.get(measure)
    return sorted(found.values["eigenvalues"], reverse=True) if found else []


def picked(split: Split, samples: int, draw: int) -> Split:
    """Return the samples of a split that a spectrum of these ``samples`` and ``draw`` is taken of."""
    few = drawn(len(split), samples, draw).to(split.images.device)
    return Split(split.images[few], split.labels[few])


def drawn_losses(
    outcomes: Sequence[Outcome], *, device: str = "cpu", store: str | Path | None = None
) -> dict[tuple[RunSpec, Spectrum], float]:
    """Return the mean loss of each live network over the samples that each spectrum was taken of."""
    losses = {}
    for spec in (o.task.spec for o in outcomes):
        model = trained_model(Store(store), spec, device)
        for measure in spectra(outcomes):
            split = load_split(spec, measure.split, torch.device(device))
            if measure.samples is not None:
                split = picked(split, measure.samples, measure.draw or 0)
            losses[spec, measure] = training.evaluate(model, split)[0]
    return losses


def curvature_after(
    outcomes: Sequence[Outcome],
    *,
    measures: Sequence[Spectrum] | None = None,
    losses: Mapping[tuple[RunSpec, Spectrum], float] | None = None,
    name: str,
    caption: str,
) -> Table:
    """Return numbers of the spectra of Figs 5 and 11, or of some of them, one row a B_H and network.

    The largest eigenvalue and the sum of the top ones, both also as a multiple of the original network's of the same
    seed, the smallest, and how many are negative; with ``losses``, those of `drawn_losses`. Several seeds give mean and
    standard deviation.
    """
    from_record = any(isinstance(o, Recorded) for o in outcomes)
    rows = []
    for measure in measures or spectra(outcomes):
        for network in _networks(outcomes):
            runs = [o for o in outcomes if network_name(o.task.spec) == network]
            found = [values for o in runs if (values := eigenvalues(o, measure))]
            lost = [losses[o.task.spec, measure] for o in runs] if losses else []
            rows.append(
                (
                    samples_label(measure),
                    network,
                    *((mean_and_spread(lost, "{:.2g}"),) if losses else ()),
                    mean_and_spread([values[0] for values in found], "{:.3g}"),
                    _times(ratios(outcomes, network, measure, max)),
                    mean_and_spread([math.fsum(values) for values in found], "{:.3g}") if found else "–",
                    _times(ratios(outcomes, network, measure, math.fsum)),
                    mean_and_spread([min(values) for values in found], "{:.2g}") if found else "–",
                    mean_and_spread([sum(v < 0 for v in values) for values in found], "{:.0f}") if found else "–",
                    *((profiles(runs),) if from_record else ()),
                )
            )
    header = (
        "B_H",
        "Network",
        *(("Loss",) if losses else ()),
        "λ₁",
        "÷ ORI",
        "Sum",
        "÷ ORI",
        "Smallest",
        "Negative",
        *((PROFILE,) if from_record else ()),
    )
    if not any(o.measurements for o in outcomes):
        rows = [("all", "all", NOT_MEASURED, *["–"] * (len(header) - 3))]
    return Table(name, caption, header, tuple(rows), origins(outcomes))


def ratios(
    outcomes: Sequence[Outcome], network: str, measure: Spectrum, number: Callable[[list[float]], float]
) -> list[float]:
    """Return a number of a network's spectrum over that of the original network, one for each seed with both."""
    found = {
        (network_name(o.task.spec), o.task.spec.recipe.seed): number(values)
        for o in outcomes
        if (values := eigenvalues(o, measure))
    }
    return [value / found[ORIGINAL, seed] for (of, seed), value in found.items() if of == network != ORIGINAL
            and (ORIGINAL, seed) in found]  # fmt: skip


# -- lines -----------------------------------------------------------------------------------------------------------


def line_curvatures(outcomes: Sequence[Outcome], *, name: str, caption: str) -> Table:
    """Return the second derivatives of the losses along the eigenvector (Figs 12, 13) at the network, one row each."""
    rows = []
    for network in _networks(outcomes):
        runs = [o for o in outcomes if network_name(o.task.spec) == network]
        lines = [found for o in runs if (found := line(o, LossLine))]
        curvatures = (
            [second_derivative(found["positions"], found["losses"][of], 0.0) for found in lines]
            for of in ("train", "test", "batch")
        )
        cells = [mean_and_spread(values, "{:.3g}") for values in curvatures]
        rows.append((network, *cells))
    return Table(name, caption, ("Network", "training", "test", "batch"), tuple(rows), origins(outcomes))


def way_curvatures(outcomes: Sequence[Outcome], *, name: str, caption: str) -> Table:
    """Return the second differences of the losses at both ends of the way from original to robust (Figs 4, 10)."""
    rows = []
    for network in _networks(outcomes):
        runs = [o for o in outcomes if network_name(o.task.spec) == network]
        ways = [found for o in runs if (found := line(o, Interpolation))]
        cells = []
        for of in ("train", "test"):
            starts, ends = (
                [second_difference(found["positions"], found["losses"][of], at) for found in ways] for at in (0.0, 1.0)
            )
            cells += [mean_and_spread(starts, "{:.3g}"), mean_and_spread(ends, "{:.3g}")]
        rows.append((network, *cells))
    header = ("Network", "training, original end", "training, robust end", "test, original end", "test, robust end")
    return Table(name, caption, header, tuple(rows), origins(outcomes))


def line(outcome: Outcome, kind: type[LossLine] | type[Interpolation]) -> dict[str, Any] | None:
    """Return what was measured on a line of this kind, or None."""
    return next((found.values for measure, found in outcome.measurements.items() if isinstance(measure, kind)), None)


# -- claims ----------------------------------------------------------------------------------------------------------

# As the scoreboard has it: a negative eigenvalue counts as significant below this part of the largest.
_SIGNIFICANT = 0.01


def answers(networks: Mapping[str, Sequence[Outcome]], *, name: str, caption: str) -> Table:
    """Return what the paper's claims of section 3.3 come to in numbers, one column a network of Table 6.

    ``networks`` are the outcomes of Figs 5 and 11, with or without a control.
    """
    rows = [
        (claim, counted, *(answer(outcomes) for outcomes in networks.values())) for claim, counted, answer in _QUESTIONS
    ]
    return Table(name, caption, ("The paper's claim", "In numbers", *networks), tuple(rows))


def _shrunk(control: bool, samples: bool) -> Callable[[Sequence[Outcome]], str]:
    def answer(outcomes: Sequence[Outcome]) -> str:
        wanted = [m for m in spectra(outcomes) if (m.samples or 0) != 1 and (m.samples is not None) == samples]
        names = [CONTROL] if control else list(ATTACKS)
        found = [r for m in wanted for network in names for r in ratios(outcomes, network, m, max)]
        if not found or control:
            return _span(found)
        return f"{_span(found)}; below 1: {sum(r < 1 for r in found)} of {len(found)}"

    return answer


def _negative(single: bool, below: float) -> Callable[[Sequence[Outcome]], str]:
    def answer(outcomes: Sequence[Outcome]) -> str:
        wanted = [m for m in spectra(outcomes) if m.samples == (1 if single else None)]
        six = [o for o in outcomes if network_name(o.task.spec) != CONTROL]
        found = [values for m in wanted for o in six if (values := eigenvalues(o, m))]
        hits = sum(min(values) < -below * max(values) for values in found)
        return f"{hits} of {len(found)}" if found else NOT_MEASURED

    return answer


def _close(outcomes: Sequence[Outcome]) -> str:
    drawn_few = next(m for m in spectra(outcomes) if m.samples and m.samples > 1)
    found = []
    for outcome in outcomes:
        few, every = eigenvalues(outcome, drawn_few), outcome.eigenvalues("train")
        if few and every and network_name(outcome.task.spec) != CONTROL:
            found.append(few[0] / max(every))
    return _span(found)


def _saddle(outcomes: Sequence[Outcome]) -> str:
    found = [o.eigenvalues("train") for o in outcomes if network_name(o.task.spec) == ORIGINAL]
    counts = [f"{sum(v < 0 for v in values)} of {len(values)}" for values in found if values]
    return "; ".join(counts) or NOT_MEASURED


_QUESTIONS: tuple[tuple[str, str, Callable[[Sequence[Outcome]], str]], ...] = (
    ("Adversarial training shrinks the spectrum", "λ₁ over all samples ÷ ORI", _shrunk(False, False)),
    ("", "λ₁ over few samples ÷ ORI", _shrunk(False, True)),
    ("(the control, without an attack)", "λ₁ over all samples ÷ ORI", _shrunk(True, False)),
    ("Single samples have negative eigenvalues", "spectra with one in the top", _negative(True, 0.0)),
    ("", "with one below −1 % of λ₁", _negative(True, _SIGNIFICANT)),
    ("the full Hessian has none in its top", "spectra with one in the top", _negative(False, 0.0)),
    ("Few samples and all are close", "λ₁ over few ÷ λ₁ over all", _close),
    ("The original network is at a saddle (MNIST)", "negative ones in ORI's top", _saddle),
)


# -- cells -----------------------------------------------------------------------------------------------------------


def _networks(outcomes: Sequence[Outcome]) -> list[str]:
    there = {network_name(o.task.spec) for o in outcomes}
    return [name for name in (ORIGINAL, *ATTACKS, CONTROL) if name in there]


def _times(values: Sequence[float]) -> str:
    return mean_and_spread(values, "{:.2f}" if max(values) < 100 else "{:.0f}") if values else "–"


def _span(values: Sequence[float]) -> str:
    """Return the range of some values; one value as it is."""
    if not values:
        return NOT_MEASURED
    low, high = (f"{v:.2g}" for v in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"
