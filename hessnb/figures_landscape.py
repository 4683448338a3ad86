"""Figures of loss landscapes in the book's style: lines along an eigenvector, planes of two (the paper's Figs 2-9)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from scipy.interpolate import RectBivariateSpline

from hessnb.experiments.run import Outcome
from hessnb.figures import COLOURS, style
from hessnb.landscape import Landscape
from hessnb.paper.landscapes import extremes, first_of_each, line, plane, rise
from hessnb.paper.recorded import Recorded
from hessnb.paper.tables import NOT_MEASURED

# The paper's blue, red and green, in shades that the colour-blind tell apart; the lines differ as well.
_LINES = {
    "train": {"color": COLOURS[0], "linestyle": "-", "label": "training set"},
    "test": {"color": COLOURS[5], "linestyle": "--", "label": "test set"},
    "batch": {"color": COLOURS[2], "linestyle": ":", "label": "training batch"},
}

# In inches; the text of a figure that is shrunk to a phone stays readable.
_WIDTH = 5.2


def loss_lines(outcomes: Sequence[Outcome]) -> Figure:
    """Show the losses along the dominant eigenvector on a log axis, a panel a batch size (the paper's Figs 2, 6, 8).

    Of several seeds the first. A panel that has not been measured says so.
    """
    shown = first_of_each(outcomes)
    with style():
        if not any(map(line, shown)):
            return _nothing(shown)
        figure, axes = _grid(len(shown), shared=True, height=1.9)
        for axis, outcome in zip(axes, shown, strict=False):
            axis.set_title(_title(outcome), fontsize=11)
            values = line(outcome)
            if values is None:
                _absent(axis)
                continue
            for name, losses in values["losses"].items():
                axis.semilogy(values["positions"], losses, **_LINES[name])
            axis.margins(x=0)
        _name_axes(figure, "position t along the eigenvector", "loss")
        _legend(figure, list(_LINES))
    return figure


def parabolas(outcomes: Sequence[Outcome]) -> Figure:
    """Show how much the training loss rises with the distance along the dominant eigenvector, and what lambda_1 says.

    The mean rise to either side, log-log, one panel each for the smallest and the largest batch size.
    """
    shown = [o for o in extremes(outcomes) if line(o) and o.eigenvalues("train")]
    with style():
        figure, axes = _grid(len(shown), shared=True, height=2.6)
        for axis, outcome in zip(axes, shown, strict=False):
            distances, rises = rise(outcome)
            eigenvalue = outcome.eigenvalues("train")[0]
            parabola = [eigenvalue / 2 * t**2 for t in distances]
            axis.loglog(distances, parabola, color=COLOURS[1], label="λ₁ t² / 2")
            axis.loglog(distances, rises, "o", color=COLOURS[0], markersize=4, label="training loss")
            axis.set_title(_title(outcome), fontsize=11)
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=2, fontsize=10)
        _name_axes(figure, "distance t along the eigenvector", "rise of the loss")
    return figure


def loss_planes(outcomes: Sequence[Outcome]) -> Figure:
    """Show contours of the losses on the plane of two eigenvectors, a panel a batch size (the paper's Figs 3, 7, 9).

    Of several seeds the first. Neighbouring contours are half a decade apart, at the same losses in all panels. A
    panel that has not been measured says so.
    """
    shown = first_of_each(outcomes)
    with style():
        if not any(map(plane, shown)):
            return _nothing(shown)
        figure, axes = _grid(len(shown), shared=True, height=2.5)
        for axis, outcome in zip(axes, shown, strict=False):
            axis.set_title(_title(outcome), fontsize=11)
            values = plane(outcome)
            if values is None:
                _absent(axis)
                continue
            for name, losses in values["losses"].items():
                _contours(axis, values["positions"], losses, name)
            axis.plot(0, 0, "+", color="black", markersize=9)
            axis.set_aspect("equal")
            axis.grid(visible=False)
        _name_axes(figure, "position along the first eigenvector", "along the second")
        _legend(figure, ["train", "test"])
    return figure


def directions(steps: Mapping[str, Mapping[str, Landscape]]) -> Figure:
    """Show the training loss along directions: a panel for each length of the step, a line for each direction."""
    with style():
        figure, axes = _grid(len(steps), shared=False)
        for axis, (title, lines) in zip(axes, steps.items(), strict=False):
            for i, (label, found) in enumerate(lines.items()):
                colour, dash = COLOURS[(0, 1)[i % 2]], ("-", "--")[i % 2]
                axis.semilogy(found.axes[0], found.losses["train"], dash, color=colour, label=label)
            axis.set_title(title, fontsize=11)
            axis.margins(x=0)
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=2, fontsize=10)
        _name_axes(figure, "position t", "training loss")
    return figure


def _grid(n: int, *, shared: bool = False, height: float = 2.1) -> tuple[Figure, list[Axes]]:
    """Return a figure of at least ``n`` panels, two a row, so that they are wide enough on a phone."""
    rows = max(1, -(-n // 2))
    figure, axes = plt.subplots(
        rows,
        2,
        figsize=(_WIDTH, height * rows + 0.7),
        layout="constrained",
        squeeze=False,
        sharex=shared,
        sharey=shared,
    )
    plt.close(figure)  # it is shown as the value of its cell, once
    panels = list(axes.flat)
    for axis in panels[n:]:
        axis.axis("off")
    for axis in panels[max(0, n - 2) : n]:
        axis.tick_params(labelbottom=True)  # also above an empty place
    for axis in panels:
        axis.tick_params(labelsize=10)
        axis.xaxis.set_major_locator(MaxNLocator(3, steps=[1, 2, 5, 10]))
    return figure, panels


def _title(outcome: Outcome) -> str:
    """Return the batch size, and the profile where it is not the scale that the figure is of."""
    title = f"B = {outcome.task.spec.recipe.batch_size}"
    return title if not isinstance(outcome, Recorded) or outcome.papers_own else f"{title} ({outcome.profile})"


def _absent(axis: Axes) -> None:
    axis.text(0.5, 0.5, NOT_MEASURED, transform=axis.transAxes, ha="center", va="center", fontsize=11)
    axis.tick_params(bottom=False, left=False, labelbottom=False, labelleft=False)
    axis.grid(visible=False)


def _nothing(outcomes: Sequence[Outcome]) -> Figure:
    """Return a strip that says of all batch sizes at once that nothing has been measured."""
    figure, axis = plt.subplots(figsize=(_WIDTH, 0.9), layout="constrained")
    plt.close(figure)
    sizes = ", ".join(str(outcome.task.spec.recipe.batch_size) for outcome in outcomes)
    axis.text(0.5, 0.5, f"B = {sizes}:\n{NOT_MEASURED}", ha="center", va="center", fontsize=11)
    axis.axis("off")
    return figure


def _name_axes(figure: Figure, x: str, y: str) -> None:
    figure.supxlabel(x, fontsize=12)
    figure.supylabel(y, fontsize=12)


def _legend(figure: Figure, names: Sequence[str]) -> None:
    handles = [Line2D([], [], **_LINES[name]) for name in names]  # type: ignore[arg-type]
    figure.legend(
        handles=handles, loc="outside upper center", ncols=len(handles), fontsize=10, handlelength=2, columnspacing=1
    )


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
        places, places, heights.T, levels=levels, colors=[_LINES[name]["color"]],
        linestyles=_LINES[name]["linestyle"], linewidths=1.3,
    )  # fmt: skip
    wide = 0.3 * (places[-1] - places[0])  # there is no room for a number in a smaller ring
    named = [
        level
        for level, rings in zip(levels, drawn.allsegs, strict=True)
        if level == round(level) and any(len(ring) and np.ptp(ring, axis=0).max() > wide for ring in rings)
    ]
    axis.clabel(drawn, levels=named, fmt=lambda level: f"{10.0**level:g}", fontsize=9)
