"""The book's style of figures: colours, panels in rows, and how a figure says that something is missing."""

from __future__ import annotations

import math
import statistics
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib.pyplot as plt
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from hessnb.experiments.results import Outcome
from hessnb.paper.recorded import Recorded, papers_own, recorded_as
from hessnb.paper.tables import NOT_MEASURED

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
HATCHES = ("", "///", "...", "xxx")


# Losses over which samples, as the paper colours them: blue, red and green, in shades that the colour-blind tell apart;
# the lines differ as well.
SETS: dict[str, dict[str, str]] = {
    "train": {"color": COLOURS[0], "linestyle": "-", "label": "training set"},
    "test": {"color": COLOURS[5], "linestyle": "--", "label": "test set"},
    "batch": {"color": COLOURS[2], "linestyle": ":", "label": "training batch"},
}

# In inches; the text of a figure that is shrunk to a phone stays readable.
_WIDTH = 5.2


@contextmanager
def style() -> Iterator[None]:
    """Draw inside with the book's style."""
    settings: dict[Any, Any] = {
        "axes.prop_cycle": cycler(color=COLOURS),
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.3,
        "figure.dpi": 150,
        "font.size": 12,
        "legend.frameon": False,
        "lines.linewidth": 1.8,
        "lines.markersize": 5,
        "svg.fonttype": "path",
        "svg.hashsalt": "hessnb",  # the same figure gives the same bytes
    }
    with plt.rc_context(settings):
        yield


def one_row(
    columns: int = 1, *, height: float = 3.6, width: float = 6.0, share_y: bool = False
) -> tuple[Figure, list[Axes]]:
    """Return a figure of one row of panels, its size in inches."""
    figure, axes = plt.subplots(
        1, columns, figsize=(width, height), layout="constrained", squeeze=False, sharey=share_y
    )
    plt.close(figure)  # it is shown as the value of its cell, once
    return figure, list(axes[0])


def grid(n: int, *, height: float = 2.1, shared: bool = False) -> tuple[Figure, list[Axes]]:
    """Return a figure of at least ``n`` panels, two a row, so that they are wide enough on a phone.

    ``height`` of a row in inches; ``shared`` axes. The places after the n-th are empty.
    """
    rows = max(1, -(-n // 2))
    figure, axes = plt.subplots(
        rows, 2, figsize=(_WIDTH, height * rows + 0.7), layout="constrained", squeeze=False, sharex=shared,
        sharey=shared,
    )  # fmt: skip
    plt.close(figure)  # it is shown as the value of its cell, once
    panels = list(axes.flat)
    for axis in panels[n:]:
        axis.axis("off")
    for axis in panels[max(0, n - 2) : n]:
        axis.tick_params(labelbottom=True)  # also above an empty place
    for axis in panels:
        axis.tick_params(which="both", labelsize=10)
        axis.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    return figure, panels


def name_axes(figure: Figure, x: str, y: str) -> None:
    """Name the axes of all panels at once."""
    figure.supxlabel(x, fontsize=12)
    figure.supylabel(y, fontsize=12)


def titled(title: str, outcome: Outcome) -> str:
    """Return the title of a panel, with the profile where the outcome is not of the paper's scale but stands for it."""
    return title if not isinstance(outcome, Recorded) or outcome.papers_own else f"{title} ({outcome.profile})"


def ours(record: Sequence[Outcome]) -> str:
    """Return what a legend calls the numbers of the record beside the paper's: only the paper's own scale is that."""
    return "ours, paper's scale" if papers_own(record) else recorded_as(record)


def legend(figure: Figure, handles: Mapping[str, Line2D], *, columns: int) -> None:
    """Put one legend above all panels."""
    figure.legend(
        list(handles.values()), list(handles), loc="outside upper center", ncols=columns, fontsize=10,
        handlelength=2, columnspacing=1,
    )  # fmt: skip


def legend_of_sets(figure: Figure, names: Sequence[str]) -> None:
    """Put a legend of `SETS` above all panels."""
    legend(figure, {SETS[name]["label"]: Line2D([], [], **SETS[name]) for name in names}, columns=len(names))  # type: ignore[arg-type]


def look(i: int) -> dict[str, Any]:
    """Return colour and marker of the i-th curve: the colour alone does not tell it apart in grey."""
    return {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}


def bound(axis: Axes, height: float, i: int) -> None:
    """Draw a dashed line across a panel, at a height that belongs to the i-th curve, with its marker at the end."""
    axis.axhline(height, linestyle="--", linewidth=1.2, **look(i), markevery=[1], clip_on=False)


def over_seeds(axis: Axes, points: Sequence[tuple[float, float]], *, marker: str, color: str, label: str) -> None:
    """Draw a line through the mean at each x, and a short dash for each value (a seed's) where there are several."""
    if not points:
        return
    values: dict[float, list[float]] = {}
    for x, value in sorted(points):
        values.setdefault(x, []).append(value)
    axis.plot(
        list(values), [statistics.mean(some) for some in values.values()], marker=marker, color=color, label=label
    )
    several = [(x, value) for x, some in values.items() if len(some) > 1 for value in some]
    if several:
        axis.plot(*zip(*several, strict=True), linestyle="none", marker="_", markersize=9, color=color)


def plain_log_labels(axis: Axis) -> None:
    """Write 0.2, 0.5 and 1 on a logarithmic axis on which fewer than two whole powers of ten are in view."""
    powers = axis.get_major_formatter()

    def is_short() -> bool:
        low, high = (math.log10(end) for end in axis.get_view_interval())
        return math.floor(high) - math.ceil(low) < 1

    axis.set_major_formatter(FuncFormatter(lambda v, at: f"{v:g}" if is_short() else powers(v, at)))
    axis.set_minor_formatter(FuncFormatter(lambda v, _: f"{v:g}" if is_short() and f"{v:e}"[0] in "235" else ""))


def absent(axis: Axes) -> None:
    """Say in a panel that it has not been measured yet."""
    axis.text(0.5, 0.5, NOT_MEASURED, transform=axis.transAxes, ha="center", va="center", fontsize=11)
    axis.tick_params(bottom=False, left=False, labelbottom=False, labelleft=False)
    axis.grid(visible=False)


def missing(axis: Axes, names: Sequence[str]) -> None:
    """Say in a panel of falling curves, in the corner that they leave free, which have not been measured yet."""
    if names:
        whole = ", ".join(name.replace(" ", "\N{NO-BREAK SPACE}") for name in names)
        told = f"{NOT_MEASURED}:\n{textwrap.fill(whole, 18, break_on_hyphens=False)}"
        axis.text(0.03, 0.03, told, transform=axis.transAxes, fontsize=8, color="0.35")


def nothing(of: str) -> Figure:
    """Return a strip that says of all panels at once that nothing has been measured yet."""
    figure, axis = plt.subplots(figsize=(_WIDTH, 0.9), layout="constrained")
    plt.close(figure)
    axis.text(0.5, 0.5, f"{of}:\n{NOT_MEASURED}", ha="center", va="center", fontsize=11)
    axis.axis("off")
    return figure
