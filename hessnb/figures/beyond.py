"""Figures of what goes beyond the paper: densities, curvature along training, rescaling, sweeps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from hessnb.curvature import SpectralDensity
from hessnb.experiments.results import Outcome
from hessnb.figures.style import COLOURS, MARKERS, bound, look, nothing, over_seeds, style
from hessnb.paper.beyond import RESOLUTION, Rescaling, followed, spectral, under_fgsm
from hessnb.paper.large_batch import lambda1
from hessnb.paper.recorded import recorded_as
from hessnb.sharpness import stability_bound

# Bins of a density: so many for each factor of ten.
_PER_DECADE = 4


def densities(outcomes: Sequence[Outcome], top: Sequence[Outcome]) -> Figure:
    """Show how many eigenvalues of the training Hessian lie in each bin of a symmetric log axis, a panel a batch size.

    Bars are means over random probes with their standard errors, ticks above them the leading eigenvalues of ``top``.
    """
    shown = [(o, density) for o in outcomes if (density := spectral(o))]
    exact = {o.task.spec: o.eigenvalues("train") for o in top}
    with style():
        if not shown:
            return nothing("all batch sizes")
        largest = max(float(density.nodes.max()) for _, density in shown)
        lowest = min(float(density.nodes.min()) for _, density in shown)
        inner = 10.0 ** round(torch.tensor(RESOLUTION * largest).log10().item())
        figure, axes = plt.subplots(
            len(shown), 1, figsize=(6.4, 1.35 * len(shown) + 0.6), layout="constrained", sharex=True, squeeze=False
        )
        plt.close(figure)
        for i, (axis, (outcome, density)) in enumerate(zip(axes[:, 0], shown, strict=True)):
            edges = _edges(inner, 2 * largest)
            counts, errors = _counts(density, edges)
            colour = COLOURS[i % len(COLOURS)]
            axis.stairs(counts, edges, fill=True, color=colour, alpha=0.5, baseline=1e-3)
            middles = [(low + high) / 2 for low, high in pairwise(edges)]
            axis.errorbar(middles, counts, yerr=errors, fmt="none", color=colour, capsize=2, linewidth=1)
            leading = exact.get(outcome.task.spec, [])
            axis.plot(leading, [0.3] * len(leading), "|", color=COLOURS[6], markersize=9, markeredgewidth=1.2)
            axis.set_yscale("log")
            axis.set_xscale("symlog", linthresh=inner, linscale=0.5)
            axis.set(ylim=(0.1, 3 * density.n), yticks=[1, 1e2, 1e4], xlim=(min(2 * lowest, -3 * inner), 2 * largest))
            axis.set_title(f"B = {outcome.task.spec.recipe.batch_size}", loc="left", fontsize=11)
        axes[-1, 0].set_xlabel("eigenvalue of the training Hessian")
        figure.supylabel("eigenvalues in the bin", fontsize=12)
    return figure


def _edges(inner: float, outer: float) -> list[float]:
    """Return the edges of bins: equal ones in the logarithm beyond ``inner`` on either side, and one about zero."""
    positive = [inner]
    while positive[-1] < outer:
        positive.append(inner * 10 ** (len(positive) / _PER_DECADE))
    return [*(-edge for edge in reversed(positive)), *positive]


def _counts(density: SpectralDensity, edges: Sequence[float]) -> tuple[list[float], list[float]]:
    """Return how many eigenvalues lie between edges and the standard errors; zero where there is a single probe."""
    n, found = density.n, []
    for low, high in pairwise(edges):
        inside = (density.nodes >= low) & (density.nodes < high)
        found.append(n * (density.weights * inside).sum(1))
    counts: Tensor = torch.stack(found)
    probes = counts.shape[1]
    errors = counts.std(1) / probes**0.5 if probes > 1 else torch.zeros(len(found))
    return counts.mean(1).tolist(), errors.tolist()


def edge(outcomes: Sequence[Outcome]) -> Figure:
    """Show the largest eigenvalue (above) and the training loss (below) along gradient descent, a curve a rate.

    Dashed is the bound of stability of each learning rate, with the mark of its curve at the end.
    """
    shown = [(o.task.spec.recipe, found) for o in outcomes if (found := followed(o))]
    with style():
        if not shown:
            return nothing("all learning rates")
        figure, (upper, lower) = plt.subplots(2, 1, figsize=(6.4, 5.2), layout="constrained", sharex=True)
        plt.close(figure)
        for i, (recipe, found) in enumerate(shown):
            line = {**look(i), "markersize": 4, "label": f"learning rate {recipe.lr:g}"}
            upper.plot(found["epoch"], found["lambda1"], **line)
            bound(upper, stability_bound(recipe.lr, recipe.momentum), i)
            lower.semilogy(found["epoch"], found["train_loss"], **line)
        upper.set(ylabel="largest eigenvalue", ylim=(0, None))
        upper.legend(fontsize=10)
        lower.set(xlabel="step of gradient descent", ylabel="training loss")
    return figure


def sharpening(outcomes: Sequence[Outcome]) -> Figure:
    """Show the largest eigenvalue along training against the share of it that is done, a curve a batch size."""
    shown = [(o.task.spec.recipe, found) for o in outcomes if (found := followed(o))]
    with style():
        if not shown:
            return nothing("all batch sizes")
        figure, axis = plt.subplots(figsize=(6.0, 3.8), layout="constrained")
        plt.close(figure)
        for i, (recipe, found) in enumerate(shown):
            shares = [100 * epoch / found["epoch"][-1] for epoch in found["epoch"]]
            heights = [max(value, 1e-3) for value in found["lambda1"]]
            label = f"B = {recipe.batch_size}, {found['epoch'][-1]} epochs"
            axis.semilogy(shares, heights, **look(i), markersize=4, label=label)
        recipe, _ = shown[0]
        limit = stability_bound(recipe.lr, recipe.momentum)
        axis.axhline(limit, linestyle="--", color=COLOURS[6], label=f"2 (1 + β) / lr = {limit:.0f}")
        axis.set(xlabel="epochs, % of the training", ylabel="largest eigenvalue")
        axis.legend(fontsize=10)
    return figure


def rescaling(found: Sequence[Rescaling]) -> Figure:
    """Show what depends on the factor by which a layer is rescaled and what does not, relative to factor 1."""
    usual = next(r for r in found if r.factor == 1)
    factors = [r.factor for r in found]
    curves = {
        "largest eigenvalue": [r.lambda1 / usual.lambda1 for r in found],
        "curvature, filter-normalised": [r.along / usual.along for r in found],
        "input curvature, mean": [r.lambda1_x / usual.lambda1_x for r in found],
    }
    with style():
        figure, axis = plt.subplots(figsize=(6.0, 3.8), layout="constrained")
        plt.close(figure)
        for i, (label, heights) in enumerate(curves.items()):
            size = {"markersize": 9, "fillstyle": "none"} if i == 1 else {}
            axis.loglog(factors, heights, marker=MARKERS[i], color=COLOURS[i], label=label, **size)
        axis.set(xlabel="factor of the layer", ylabel="relative to factor 1")
        axis.set_xscale("log", base=2)
        axis.legend(fontsize=10)
    return figure


def learning_rates(live: Sequence[Outcome], record: Sequence[Outcome], eps: float) -> Figure:
    """Show the largest eigenvalue (left) and the accuracy (%) under FGSM (right) against the learning rate.

    Dotted on the left is the bound of stability.
    """
    recipes = [o.task.spec.recipe for outcomes in (live, record) for o in outcomes if o.result]
    with style():
        if not recipes:
            return nothing("all learning rates")
        figure, (left, right) = plt.subplots(1, 2, figsize=(7.0, 3.6), layout="constrained")
        plt.close(figure)
        shown: tuple[tuple[Axes, Callable[[Sequence[Outcome]], list[float]]], ...] = (
            (left, lambda some: lambda1(some, "train")),
            (right, lambda some: under_fgsm(some, eps)),
        )
        for i, (label, outcomes) in enumerate((("live", live), (recorded_as(record), record))):
            for axis, of in shown:
                points = [(o.task.spec.recipe.lr, of([o])[0]) for o in outcomes if of([o])]
                over_seeds(axis, points, marker=MARKERS[i], color=COLOURS[i], label=label)
        bounds = sorted({(r.lr, stability_bound(r.lr, r.momentum)) for r in recipes})
        left.plot(*zip(*bounds, strict=True), ":", color=COLOURS[6], label="2 (1 + β) / lr")
        left.set(yscale="log", ylabel="largest eigenvalue")
        right.set(ylabel=f"accuracy under FGSM, {eps:g}, %")
        for axis in (left, right):
            axis.set(xscale="log", xlabel="learning rate")
            rates = [lr for lr, _ in bounds]
            axis.set_xticks(rates, [f"{lr:g}" for lr in rates], fontsize=9)
            axis.minorticks_off()
        figure.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=3, fontsize=10)
    return figure
