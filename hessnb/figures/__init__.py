"""Figures in one style: colour-blind safe (Okabe and Ito, 2008), the paper's axes, SVG, readable at phone width."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Circle
from matplotlib.ticker import MaxNLocator
from scipy.ndimage import distance_transform_edt
from torch import Tensor

from hessnb.attacks import ATTACKS, Perturbation
from hessnb.curvature import InputCurvature
from hessnb.data import Splits
from hessnb.experiments.results import Outcome
from hessnb.experiments.spec import SECOND_ORDER
from hessnb.figures.large_batch import (
    accuracy_against_batch,
    accuracy_against_measures,
    lambda1_against_batch,
    layer_spectra,
    spectra,
    training_curves,
)
from hessnb.figures.style import COLOURS, HATCHES, MARKERS, grid, legend, look, name_axes, nothing, one_row, style
from hessnb.paper.adversarial import network_name
from hessnb.paper.attack_planes import AttackPlane
from hessnb.paper.attacks import DampingSweep, cg_settings
from hessnb.paper.outcomes import attacks, clean, under
from hessnb.paper.recorded import recorded_as

__all__ = [
    "accuracy_against_batch",
    "accuracy_against_cg_steps",
    "accuracy_against_measures",
    "accuracy_against_size",
    "attack_planes",
    "dampings",
    "inexact_steps",
    "input_curvature",
    "input_spectra",
    "lambda1_against_batch",
    "layer_spectra",
    "loss_on_line",
    "perturbed_pictures",
    "relative_spectra",
    "samples",
    "spectra",
    "training_curves",
    "transfer_and_white_box",
]


def samples(sets: Mapping[str, Splits], n: int = 10) -> Figure:
    """Show the first ``n`` training images of each set, one row a set."""
    with style():
        figure, axes = plt.subplots(len(sets), n, figsize=(6.4, 0.85 * len(sets)), layout="constrained", squeeze=False)
        plt.close(figure)
        for row, (name, splits) in zip(axes, sets.items(), strict=True):
            for axis, image, label in zip(row, splits.train.images, splits.train.labels, strict=False):
                axis.imshow(image.permute(1, 2, 0).squeeze().numpy(), cmap="gray", vmin=0, vmax=1)
                axis.set_title(splits.classes[int(label)], fontsize=9)
                axis.set(xticks=[], yticks=[])
                axis.spines[:].set_visible(False)
            row[0].set_ylabel(name, fontsize=9)
    return figure


def transfer_and_white_box(outcomes: Sequence[Outcome]) -> Figure:
    """Show accuracy (%) of each network on sets made from the original (open) and on itself (filled), by attack."""
    with style():
        if not any(o.measurements for o in outcomes):
            return nothing("all networks")
        figure, (axis,) = one_row(width=7.0)
        for column, outcome in enumerate(outcomes):
            for i, method in enumerate(ATTACKS):
                for white_box in (False, True):
                    for accuracy in under([outcome], method, transferred=not white_box):
                        axis.plot(
                            column + 0.13 * (i - 2), accuracy, marker=MARKERS[i], color=COLOURS[i], linestyle="",
                            markerfacecolor=COLOURS[i] if white_box else "none",
                            label=method if white_box and column == 0 else None,
                        )  # fmt: skip
        names = [network_name(outcome.task.spec) for outcome in outcomes]
        axis.set_xticks(range(len(names)), names)
        axis.set(xlabel="network, by its training", ylabel="accuracy under attack, %", ylim=(-3, 103))
        axis.grid(axis="x", visible=False)
        axis.legend(ncols=5, fontsize=9, loc="lower center", bbox_to_anchor=(0.5, 1.0), handletextpad=0.2)
    return figure


def input_spectra(cases: Mapping[str, Tensor], n: int = 20) -> Figure:
    """Show the ``n`` largest |eigenvalues| (of (d,) each) of input Hessians, relative to the first, one line a case."""
    with style():
        figure, (axis,) = one_row()
        for i, (label, eigenvalues) in enumerate(cases.items()):
            magnitudes = eigenvalues.abs().sort(descending=True).values[:n]
            shown = (magnitudes / magnitudes[0]).clamp_min(1e-20)
            index = torch.arange(1, len(shown) + 1)
            axis.semilogy(index, shown, marker=MARKERS[i % len(MARKERS)], color=COLOURS[i % len(COLOURS)], label=label)
        axis.set(xlabel="index of the eigenvalue", ylabel="|eigenvalue| / largest", ylim=(1e-20, 3))
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.legend(fontsize=10)
    return figure


def loss_on_line(positions: Tensor, losses: Tensor) -> Figure:
    """Show the loss (m,) at ``positions`` (m,) on a line between two inputs, and its slope, by differences."""
    slopes = losses.diff() / positions.diff()
    with style():
        figure, (left, right) = one_row(2, width=7.0)
        left.plot(positions, losses)
        left.set(xlabel="position between the images", ylabel="loss")
        right.plot(positions[1:], slopes, color=COLOURS[5])
        right.set(xlabel="position between the images", ylabel="slope of the loss")
    return figure


def input_curvature(curvature: InputCurvature) -> Figure:
    """Show each sample's largest input eigenvalue against its gradient norm, and the means of both (section 3.2)."""
    tiny = torch.finfo(torch.float64).tiny
    with style():
        figure, (axis,) = one_row()
        gradients, eigenvalues = curvature.gradient_norms.clamp_min(tiny), curvature.lambda1.clamp_min(tiny)
        axis.loglog(gradients, eigenvalues, ".", markersize=3, alpha=0.5, color=COLOURS[0], rasterized=True)
        axis.axvline(curvature.mean_gradient_norm, linestyle="--", linewidth=1.2, color=COLOURS[6])
        axis.axhline(curvature.mean_lambda1, linestyle="--", linewidth=1.2, color=COLOURS[6], label="means")
        axis.set(xlabel="norm of the input gradient", ylabel="largest input eigenvalue")
        axis.legend(fontsize=10)
    return figure


def perturbed_pictures(x: Tensor, ends: Mapping[str, Tensor], verdicts: Mapping[str, str]) -> Figure:
    """Show a picture (1, 1, H, W), what attacks add to it (upper row) and what comes out, by attack, with verdicts.

    ``ends`` are the perturbed pictures, ``verdicts`` what the network takes each for, under "none" the picture itself.
    """
    pictures = {"none": x, **ends}
    largest = max(float((end - x).abs().max()) for end in ends.values())
    with style():
        figure, axes = plt.subplots(2, len(pictures), figsize=(7.0, 2.9), layout="constrained", squeeze=False)
        plt.close(figure)
        for (upper, lower), (label, picture) in zip(axes.T, pictures.items(), strict=True):
            change = upper.imshow((picture - x)[0, 0].numpy(), cmap="RdBu_r", vmin=-largest, vmax=largest)
            lower.imshow(picture[0, 0].numpy(), cmap="gray", vmin=0, vmax=1)
            upper.set_title(label, fontsize=11)
            lower.set_xlabel(verdicts[label].replace(" (", "\n("), fontsize=10)
            for axis in (upper, lower):
                axis.set(xticks=[], yticks=[])
                axis.spines[:].set_visible(False)
        axes[0, 0].set_ylabel("change", fontsize=10)
        axes[1, 0].set_ylabel("picture", fontsize=10)
        figure.colorbar(change, ax=axes[0, :], shrink=0.9, pad=0.01).ax.tick_params(labelsize=9)
    return figure


def accuracy_against_cg_steps(live: Sequence[Outcome], record: Sequence[Outcome]) -> Figure:
    """Show accuracy (%) under the second-order attacks against conjugate gradient steps, from one to exact."""
    solvers = cg_settings(live or record)
    with style():
        if not any(o.measurements for o in (*live, *record)):
            return nothing("all steps")
        figure, (axis,) = one_row()
        for i, method in enumerate(SECOND_ORDER):
            for outcomes, line, told in ((live, "-", "live"), (record, "--", recorded_as(record))):
                found = [under(outcomes, method, **settings) for settings in solvers.values()]
                points = [(column, sum(values) / len(values)) for column, values in enumerate(found) if values]
                if points:
                    axis.plot(
                        *zip(*points, strict=True), line, marker=MARKERS[i], color=COLOURS[i], label=f"{method}, {told}"
                    )
        axis.set_xticks(range(len(solvers)), list(solvers))
        axis.set(xlabel="steps of conjugate gradients", ylabel="accuracy under attack, %", ylim=(0, 100))
        axis.legend(fontsize=10)
    return figure


def accuracy_against_size(live: Sequence[Outcome], record: Sequence[Outcome]) -> Figure:
    """Show accuracy (%) under the five attacks against their size eps, live and, where there is one, recorded."""
    shown = [(outcomes, title) for outcomes, title in ((live, "live"), (record, recorded_as(record)))]
    shown = [(outcomes, title) for outcomes, title in shown if any(o.measurements for o in outcomes)]
    with style():
        if not shown:
            return nothing("all sizes")
        figure, axes = one_row(len(shown), width=6.0 if len(shown) == 1 else 7.0, share_y=True)
        for axis, (outcomes, title) in zip(axes, shown, strict=True):
            planned = [m.attack for m in attacks(outcomes)]
            start = sum(clean(outcomes)) / len(clean(outcomes))
            for i, method in enumerate(ATTACKS):
                sizes = sorted({attack.eps for attack in planned if attack.method == method})
                found = {eps: values for eps in sizes if (values := under(outcomes, method, eps=eps))}
                heights = [start, *(sum(values) / len(values) for values in found.values())]
                axis.plot([0, *found], heights, marker=MARKERS[i], color=COLOURS[i], label=method)
            axis.set(title=title, xlabel="ε, pixels", ylim=(-3, 103))
        axes[0].set_ylabel("accuracy under attack, %")
        axes[0].legend(fontsize=10)
    return figure


def inexact_steps(records: Mapping[int, Perturbation]) -> Figure:
    """Show, by conjugate gradient steps, the cosine of step and gradient and the residual: medians and quartiles."""
    levels = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    with style():
        figure, (left, right) = one_row(2, width=7.0)
        for i, (axis, field) in enumerate(((left, "cosine"), (right, "residual"))):
            low, middle, high = torch.stack([getattr(r, field).quantile(levels) for r in records.values()]).T
            axis.fill_between(list(records), low, high, alpha=0.25, color=COLOURS[i])
            axis.plot(list(records), middle, marker=MARKERS[i], color=COLOURS[i])
            axis.set(xlabel="steps of conjugate gradients")
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        left.set(ylabel="cosine of step and gradient", ylim=(0, 1.03))
        right.set(ylabel="residual, relative to |g|", yscale="log")
    return figure


def relative_spectra(eigenvalues: Mapping[str, Tensor]) -> Figure:
    """Show input eigenvalues (N, k), relative to each sample's largest: medians and quartiles, one colour a network."""
    levels = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    with style():
        figure, (axis,) = one_row()
        for i, (label, found) in enumerate(eigenvalues.items()):
            shares = found[found[:, 0] > 0]
            shares = (shares / shares[:, :1]).clamp_min(1e-12)
            low, middle, high = shares.quantile(levels, dim=0)
            index = range(1, found.shape[1] + 1)
            axis.fill_between(index, low, high, alpha=0.25, color=COLOURS[i])
            axis.semilogy(index, middle, marker=MARKERS[i], color=COLOURS[i], label=label)
        axis.set(xlabel="index of the eigenvalue", ylabel="eigenvalue / largest")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.legend(fontsize=10)
    return figure


# Classes on a smaller share of the plane stay without a name.
_NAMED = 0.03


def attack_planes(
    planes: Mapping[str, AttackPlane], steps: tuple[str, str], classes: Mapping[str, Sequence[str]]
) -> Figure:
    """Show planes that two attacks span, a panel each: the class that the network gives, the loss, and both steps.

    ``classes`` names those of each panel. Neighbouring lines of equal loss are a decade apart.
    """
    with style():
        figure, axes = grid(len(planes), height=2.4)
        handles: dict[str, Line2D] = {}
        for axis, (title, plane) in zip(axes, planes.items(), strict=False):
            places = plane.positions.numpy()
            right = (plane.classes == plane.true).T.double().numpy()
            # In grey the one is darker than the other.
            axis.contourf(places, places, right, levels=[-0.5, 0.5, 1.5], colors=["#F0C27B", "#DCECF6"])
            heights = plane.losses.clamp_min(torch.finfo(torch.float64).tiny).log10().T.numpy()
            levels = range(math.floor(heights.min()), math.ceil(heights.max()) + 1)
            axis.contour(places, places, heights, levels=levels, colors="0.45", linestyles="-", linewidths=0.8)
            axis.add_patch(Circle((0, 0), 1, fill=False, linestyle=":"))
            arrow = {"arrowstyle": "->", "linewidth": 2, "shrinkA": 0, "shrinkB": 0}
            for i, (u, v) in enumerate(plane.ends.tolist()):
                line: dict[str, Any] = {"color": COLOURS[(0, 5)[i]], "linestyle": ("-", "--")[i]}
                axis.annotate("", (u, v), (0, 0), arrowprops=arrow | line)
                handles[steps[i]] = Line2D([], [], **line)
            for found in plane.classes.unique().tolist():
                region = plane.classes == found
                if float(region.double().mean()) >= _NAMED:
                    u, v = _roomiest(region, plane)
                    axis.text(u, v, classes[title][found], fontsize=9, ha="center", va="center", color="0.2")
            axis.set(title=title, aspect="equal")
            axis.grid(visible=False)
        legend(figure, handles, columns=2)
        name_axes(figure, f"along {steps[0]}, in step lengths", "across it")
    return figure


def _roomiest(region: Tensor, plane: AttackPlane) -> tuple[float, float]:
    """Return the place in a region (n, n) that is the farthest from its border and from the steps."""
    free = np.pad(region.numpy(), 1)
    for share in np.linspace(0, 1, 2 * len(plane.positions)):
        nearest = (share * plane.ends[:, :, None] - plane.positions).abs().argmin(2) + 1
        free[nearest[:, 0], nearest[:, 1]] = False
    i, j = np.unravel_index(distance_transform_edt(free).argmax(), free.shape)
    return float(plane.positions[i - 1]), float(plane.positions[j - 1])


def dampings(sweeps: Mapping[str, DampingSweep]) -> Figure:
    """Show accuracy (%) under each damping taken for all samples, and for which share each gives the largest loss."""
    with style():
        figure, axes = plt.subplots(2, 1, figsize=(6.4, 5.0), layout="constrained", sharex=True)
        plt.close(figure)
        upper, lower = axes
        for i, (label, sweep) in enumerate(sweeps.items()):
            positions = range(len(sweep.dampings))
            heights = [100 * a.value for a in sweep.accuracies]
            bars = [
                [100 * (a.value - a.low) for a in sweep.accuracies],
                [100 * (a.high - a.value) for a in sweep.accuracies],
            ]
            upper.errorbar(positions, heights, yerr=bars, capsize=3, label=label, **look(i))
            width = 0.8 / len(sweeps)
            left = [p + width * (i - (len(sweeps) - 1) / 2) for p in positions]
            shares = [100 * n / sum(sweep.chosen) for n in sweep.chosen]
            lower.bar(
                left, shares, width, color=COLOURS[i], hatch=HATCHES[i % len(HATCHES)], edgecolor="white", label=label
            )
            lower.set_xticks(positions, sweep.labels, rotation=45, ha="right")
        upper.set(ylabel="accuracy, %, all alike")
        lower.set(ylabel="chosen for, %", xlabel="damping, in multiples of the largest eigenvalue")
        upper.legend(fontsize=10)
        lower.legend(fontsize=10)
    return figure
