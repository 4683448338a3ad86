"""Figures of loss landscapes in the book's style: lines along an eigenvector, planes of two (the paper's Figs 2-9)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.interpolate import RectBivariateSpline

from hessnb.experiments.results import Outcome
from hessnb.figures.style import COLOURS, SETS, absent, grid, legend_of_sets, name_axes, nothing, style, titled
from hessnb.landscape import Landscape
from hessnb.paper.landscapes import extremes, first_of_each, line, plane, rise


def loss_lines(outcomes: Sequence[Outcome]) -> Figure:
    """Show the losses along the dominant eigenvector on a log axis, a panel a batch size (the paper's Figs 2, 6, 8).

    Of several seeds the first. A panel that has not been measured says so.
    """
    shown = first_of_each(outcomes)
    with style():
        if not any(map(line, shown)):
            return nothing(_sizes(shown))
        figure, axes = grid(len(shown), shared=True, height=1.9)
        for axis, outcome in zip(axes, shown, strict=False):
            axis.set_title(_title(outcome), fontsize=11)
            values = line(outcome)
            if values is None:
                absent(axis)
                continue
            for name, losses in values["losses"].items():
                axis.semilogy(values["positions"], losses, **SETS[name])
            axis.margins(x=0)
        name_axes(figure, "position t along the eigenvector", "loss")
        legend_of_sets(figure, list(SETS))
    return figure


def parabolas(outcomes: Sequence[Outcome]) -> Figure:
    """Show how much the training loss rises with the distance along the dominant eigenvector, and what lambda_1 says.

    The mean rise to either side, log-log, one panel each for the smallest and the largest batch size.
    """
    shown = [o for o in extremes(outcomes) if line(o) and o.eigenvalues("train")]
    with style():
        if not shown:
            return nothing("all batch sizes")
        figure, axes = grid(len(shown), shared=True, height=2.6)
        for axis, outcome in zip(axes, shown, strict=False):
            distances, rises = rise(outcome)
            eigenvalue = outcome.eigenvalues("train")[0]
            parabola = [eigenvalue / 2 * t**2 for t in distances]
            axis.loglog(distances, parabola, color=COLOURS[1], label="λ₁ t² / 2")
            axis.loglog(distances, rises, "o", color=COLOURS[0], markersize=4, label="training loss")
            axis.set_title(_title(outcome), fontsize=11)
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=2, fontsize=10)
        name_axes(figure, "distance t along the eigenvector", "rise of the loss")
    return figure


def loss_planes(outcomes: Sequence[Outcome]) -> Figure:
    """Show contours of the losses on the plane of two eigenvectors, a panel a batch size (the paper's Figs 3, 7, 9).

    Of several seeds the first. Neighbouring contours are half a decade apart, at the same losses in all panels. A
    panel that has not been measured says so.
    """
    shown = first_of_each(outcomes)
    with style():
        if not any(map(plane, shown)):
            return nothing(_sizes(shown))
        figure, axes = grid(len(shown), shared=True, height=2.5)
        for axis, outcome in zip(axes, shown, strict=False):
            axis.set_title(_title(outcome), fontsize=11)
            values = plane(outcome)
            if values is None:
                absent(axis)
                continue
            for name, losses in values["losses"].items():
                _contours(axis, values["positions"], losses, name)
            axis.plot(0, 0, "+", color="black", markersize=9)
            axis.set_aspect("equal")
            axis.grid(visible=False)
        name_axes(figure, "position along the first eigenvector", "along the second")
        legend_of_sets(figure, ["train", "test"])
    return figure


def directions(steps: Mapping[str, Mapping[str, Landscape]]) -> Figure:
    """Show the training loss along directions: a panel for each length of the step, a line for each direction."""
    with style():
        figure, axes = grid(len(steps), shared=False)
        for axis, (title, lines) in zip(axes, steps.items(), strict=False):
            for i, (label, found) in enumerate(lines.items()):
                colour, dash = COLOURS[(0, 1)[i % 2]], ("-", "--")[i % 2]
                axis.semilogy(found.axes[0], found.losses["train"], dash, color=colour, label=label)
            axis.set_title(title, fontsize=11)
            axis.margins(x=0)
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=2, fontsize=10)
        name_axes(figure, "position t", "training loss")
    return figure


def _title(outcome: Outcome) -> str:
    return titled(f"B = {outcome.task.spec.recipe.batch_size}", outcome)


def _sizes(outcomes: Sequence[Outcome]) -> str:
    return "B = " + ", ".join(str(outcome.task.spec.recipe.batch_size) for outcome in outcomes)


def _contours(axis: Axes, positions: Sequence[float], losses: Sequence[Sequence[float]], name: str) -> None:
    """Draw the lines of equal loss of one set; ``losses[i][j]`` is at the i-th place of the first axis.

    Between the places the logarithm of the loss is interpolated by cubic splines.
    """
    heights = np.log10(np.array(losses))
    places = np.array(positions)
    if np.isfinite(heights).all():
        degree, fine = min(3, len(places) - 1), np.linspace(places[0], places[-1], 12 * (len(places) - 1) + 1)
        heights, places = RectBivariateSpline(places, places, heights, kx=degree, ky=degree)(fine, fine), fine
    finite = heights[np.isfinite(heights)]
    levels = [half / 2 for half in range(math.floor(2 * finite.min()), math.ceil(2 * finite.max()) + 1)]
    drawn = axis.contour(
        places, places, heights.T, levels=levels, colors=[SETS[name]["color"]],
        linestyles=SETS[name]["linestyle"], linewidths=1.3,
    )  # fmt: skip
    wide = 0.3 * (places[-1] - places[0])  # there is no room for a number in a smaller ring
    named = [
        level
        for level, rings in zip(levels, drawn.allsegs, strict=True)
        if level == round(level) and any(len(ring) and np.ptp(ring, axis=0).max() > wide for ring in rings)
    ]
    axis.clabel(drawn, levels=named, fmt=lambda level: f"{10.0**level:g}", fontsize=9)
