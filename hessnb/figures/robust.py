"""Figures of section 3.3 in the book's style: what adversarial training does to the loss and its Hessian (Figs 4, 5,
10 to 13 of the paper).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from hessnb.experiments.results import Outcome
from hessnb.experiments.spec import Interpolation, LossLine
from hessnb.figures.style import (
    SETS,
    absent,
    grid,
    legend,
    legend_of_sets,
    look,
    missing,
    name_axes,
    nothing,
    plain_log_labels,
    style,
    titled,
)
from hessnb.paper.adversarial import network_name, of_first_seed
from hessnb.paper.robust_curvature import eigenvalues, line, samples_label, spectra

# Decades of a log axis to each side of zero.
_DECADES = 4


def interpolations(outcomes: Sequence[Outcome]) -> Figure:
    """Show the losses from the original network, at 0, to each robust one, at 1, on a log axis (Figs 4 and 10).

    A panel a training. Of several seeds the first; what has not been measured says so.
    """
    return _lines(outcomes, Interpolation, ("train", "test"), "position between original (0) and robust (1)")


def robust_lines(outcomes: Sequence[Outcome]) -> Figure:
    """Show the losses along the dominant eigenvector of a sub-sampled Hessian, a panel a network (Figs 12 and 13).

    On a log axis. Of several seeds the first; what has not been measured says so.
    """
    return _lines(outcomes, LossLine, ("train", "test", "batch"), "position t along the eigenvector")


def robust_spectra(outcomes: Sequence[Outcome]) -> Figure:
    """Show the top eigenvalues of sub-sampled and full Hessians, a panel a B_H, a line a network (Figs 5 and 11).

    From the largest to the most negative, on a log axis; where there are negative ones it goes to both sides of zero
    and is linear between the dotted lines. Of several seeds the first; what has not been measured says so.
    """
    shown = of_first_seed(outcomes)
    with style():
        if not any(o.measurements for o in shown):
            return nothing("all networks")
        figure, axes = grid(len(spectra(shown)), height=2.7)
        for axis, measure in zip(axes, spectra(shown), strict=False):
            axis.set_title(titled(f"$B_H$ = {samples_label(measure)}", shown[0]), fontsize=11)
            lines = {network_name(o.task.spec): eigenvalues(o, measure) for o in shown}
            if not any(lines.values()):
                absent(axis)
                continue
            for i, values in enumerate(lines.values()):
                axis.plot(range(1, len(values) + 1), values, **look(i), markersize=3.5, linewidth=1.1)
            missing(axis, [name for name, values in lines.items() if not values])
            _signed_log(axis, [v for values in lines.values() for v in values])
            axis.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        legend(figure, {network_name(o.task.spec): _mark(i) for i, o in enumerate(shown)}, columns=4)
        name_axes(figure, "index of the eigenvalue", "eigenvalue")
    return figure


def few_against_all(networks: Mapping[str, Sequence[Outcome]]) -> Figure:
    """Show each top eigenvalue over few samples against that of the same rank over all, a panel a network of Table 6.

    Log-log, with the line on which both are equal; eigenvalues that are not positive are left out.
    """
    with style():
        figure, axes = grid(len(networks), height=2.7)
        labels: dict[str, Line2D] = {}
        for axis, (title, outcomes) in zip(axes, networks.items(), strict=False):
            axis.set_title(title, fontsize=11)
            shown, every = of_first_seed(outcomes), [0.0]
            for i, outcome in enumerate(shown):
                *_, few, full = spectra(shown)  # of no outcome at all there are none
                pairs = zip(eigenvalues(outcome, full), eigenvalues(outcome, few), strict=False)
                points = [(x, y) for x, y in pairs if x > 0 and y > 0]
                if points:
                    every += [v for point in points for v in point]
                    axis.loglog(*zip(*points, strict=True), linestyle="", **look(i), markersize=4, alpha=0.7)
                    labels[network_name(outcome.task.spec)] = _mark(i)
            if len(every) == 1:
                absent(axis)
                continue
            ends = min(v for v in every if v > 0), max(every)
            axis.loglog(ends, ends, color="#777777", linewidth=1, zorder=0)
            for side in (axis.xaxis, axis.yaxis):
                plain_log_labels(side)
        legend(figure, labels, columns=4)
        name_axes(figure, "eigenvalue over all samples", "over few samples")
    return figure


def _lines(
    outcomes: Sequence[Outcome], kind: type[LossLine] | type[Interpolation], sets: Sequence[str], x: str
) -> Figure:
    shown = of_first_seed(outcomes)
    with style():
        if not any(line(o, kind) for o in shown):
            return nothing("all networks")
        figure, axes = grid(len(shown), height=1.9, shared=True)
        for axis, outcome in zip(axes, shown, strict=False):
            axis.set_title(titled(network_name(outcome.task.spec), outcome), fontsize=11)
            values = line(outcome, kind)
            if values is None:
                absent(axis)
                continue
            for name in sets:
                axis.semilogy(values["positions"], values["losses"][name], **SETS[name])
            if kind is Interpolation:
                for place in (0, 1):
                    axis.axvline(place, color="#777777", linewidth=0.8, zorder=0)
            axis.margins(x=0)
            plain_log_labels(axis.yaxis)
        legend_of_sets(figure, sets)
        name_axes(figure, x, "loss")
    return figure


def _signed_log(axis: Axes, values: Sequence[float]) -> None:
    """Set a logarithmic axis; with values of both signs, one to both sides of zero, and linear close to it."""
    if min(values) > 0:
        axis.set_yscale("log")
        plain_log_labels(axis.yaxis)
        return
    magnitudes = [abs(v) for v in values if v]
    top = math.ceil(math.log10(max(magnitudes)))
    bottom = max(math.floor(math.log10(min(magnitudes))), top - _DECADES)
    axis.set_yscale("symlog", linthresh=10.0**bottom, linscale=0.8)
    decades = [10.0**e for e in range(top, bottom - 1, -1 if top - bottom <= 3 else -2)]
    negative = [-d for d in decades if d <= 10 * abs(min(values))]
    axis.yaxis.set_major_locator(FixedLocator([*negative, 0, *reversed(decades)]))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.axhline(0, color="black", linewidth=0.8, zorder=0)
    for threshold in (-(10.0**bottom), 10.0**bottom):
        axis.axhline(threshold, color="#777777", linewidth=0.8, linestyle=":", zorder=0)


def _mark(i: int) -> Line2D:
    return Line2D([], [], **look(i), markersize=4, linewidth=1)
