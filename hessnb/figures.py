"""Figures in one style: colour-blind safe (Okabe and Ito, 2008), the paper's axes, SVG, readable at phone width."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib.pyplot as plt
import torch
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from hessnb.attacks import ATTACKS
from hessnb.curvature import InputCurvature
from hessnb.data import Splits
from hessnb.experiments.networks import load_data
from hessnb.experiments.run import Outcome
from hessnb.models import layers
from hessnb.paper.adversarial import accuracy_under, network_name
from hessnb.paper.large_batch import attacked, input_gradient, input_lambda1, lambda1
from hessnb.paper.published import published

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


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


def _new(
    columns: int = 1, *, height: float = 3.6, width: float = 6.0, share_y: bool = False
) -> tuple[Figure, list[Axes]]:
    figure, axes = plt.subplots(
        1, columns, figsize=(width, height), layout="constrained", squeeze=False, sharey=share_y
    )
    plt.close(figure)  # it is shown as the value of its cell, once
    return figure, list(axes[0])


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


def training_curves(outcomes: Sequence[Outcome]) -> Figure:
    """Show training loss against epochs (left) and against optimiser steps (right), one line a run."""
    with style():
        figure, (left, right) = _new(2, width=7.0)
        for i, outcome in enumerate(o for o in outcomes if o.result):
            recipe, history = outcome.task.spec.recipe, outcome.result.history if outcome.result else []
            n_train = len(load_data(outcome.task.spec.data, "cpu").train)
            losses = [epoch.train_loss for epoch in history]
            epochs = [epoch.epoch for epoch in history]
            steps = [epoch * -(-n_train // recipe.batch_size) for epoch in epochs]
            line = {"color": COLOURS[i % len(COLOURS)], "label": f"B = {recipe.batch_size}"}
            left.loglog(epochs, losses, **line)
            right.loglog(steps, losses, **line)
        left.set(xlabel="epoch", ylabel="training loss")
        right.set(xlabel="optimiser step")
        right.legend(fontsize=10)
    return figure


def spectra(outcomes: Sequence[Outcome]) -> Figure:
    """Show the top eigenvalues of the training loss against their index, one line a batch size (the paper's Fig. 1)."""
    with style():
        figure, (axis,) = _new()
        for i, outcome in enumerate(outcomes):
            if eigenvalues := outcome.eigenvalues("train"):
                axis.semilogy(
                    range(1, len(eigenvalues) + 1),
                    eigenvalues,
                    marker=MARKERS[i % len(MARKERS)],
                    color=COLOURS[i % len(COLOURS)],
                    label=f"B = {outcome.task.spec.recipe.batch_size}",
                )
        axis.set(xlabel="index of the eigenvalue", ylabel="eigenvalue of the training Hessian")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.legend(ncols=2, fontsize=10)
    return figure


def lambda1_against_batch(table: str, live: Sequence[Outcome], record: Sequence[Outcome]) -> Figure:
    """Show the dominant eigenvalue on training and test set against batch size: live, recorded, and the paper's.

    The paper's are those of ``table`` for the network of ``live``.
    """
    paper = published(table).loc[live[0].task.spec.model.name]
    with style():
        figure, axes = _new(2, width=7.0, share_y=True)
        for axis, split in zip(axes, ("train", "test"), strict=True):
            axis.loglog(paper.index, paper[f"lambda1_{split}"], "--", marker="x", color=COLOURS[6], label="paper")
            for label, outcomes, i in (("ours, paper's scale", record, 0), ("ours, live", live, 1)):
                points = sorted(
                    (o.task.spec.recipe.batch_size, o.eigenvalues(split)[0]) for o in outcomes if o.eigenvalues(split)
                )
                if points:
                    axis.loglog(*zip(*points, strict=True), marker=MARKERS[i], color=COLOURS[i], label=label)
            axis.set(title=f"{'training' if split == 'train' else 'test'} set", xlabel="batch size")
        axes[0].set_ylabel("dominant eigenvalue")
        axes[0].legend(fontsize=10)
    return figure


def accuracy_against_batch(table: str, live: Sequence[Outcome], record: Sequence[Outcome]) -> Figure:
    """Show accuracy (%) under FGSM on the test set against batch size, one panel a size: live, recorded, the paper's.

    The paper's are those of ``table`` for the network of ``live``.
    """
    paper = published(table).loc[live[0].task.spec.model.name]
    sizes = [column.split("_")[1] for column in paper.columns if column.startswith("adversarial") and "test" in column]
    with style():
        figure, axes = _new(len(sizes), width=7.0, share_y=True)
        for axis, eps in zip(axes, sizes, strict=True):
            axis.plot(paper.index, paper[f"adversarial_{eps}_test"], "--", marker="x", color=COLOURS[6], label="paper")
            for label, outcomes, i in (("ours, paper's scale", record, 0), ("ours, live", live, 1)):
                points = sorted(
                    (o.task.spec.recipe.batch_size, accuracy[0])
                    for o in outcomes
                    if (accuracy := attacked(float(eps))([o], "test"))
                )
                if points:
                    axis.plot(*zip(*points, strict=True), marker=MARKERS[i], color=COLOURS[i], label=label)
            axis.set(title=f"ε = {eps}", xlabel="batch size", xscale="log", ylim=(0, 100))
        axes[0].set_ylabel("accuracy under attack, %")
        axes[0].legend(fontsize=9)
    return figure


def accuracy_against_measures(outcomes: Sequence[Outcome], eps: float) -> Figure:
    """Show accuracy (%) under FGSM of size ``eps`` on the test set against curvature and slope, a point a network."""
    measures = {
        "λ₁ of the weights": lambda1,
        "λ₁ of the input, mean": input_lambda1,
        "norm of the input gradient, mean": input_gradient,
    }
    with style():
        figure, axes = _new(len(measures), width=7.0, share_y=True)
        for axis, (label, measure) in zip(axes, measures.items(), strict=True):
            for outcome in outcomes:
                position, height = measure([outcome], "test"), attacked(eps)([outcome], "test")
                if position and height:
                    axis.plot(position[0], height[0], "o", color=COLOURS[0])
                    batch = str(outcome.task.spec.recipe.batch_size)
                    axis.annotate(batch, (position[0], height[0]), (4, 4), textcoords="offset points", fontsize=9)
            axis.set(xlabel=label.replace(", ", ",\n"), xscale="log")
        axes[0].set_ylabel("accuracy under attack, %")
    return figure


def transfer_and_white_box(outcomes: Sequence[Outcome]) -> Figure:
    """Show accuracy (%) of each network on sets made from the original (open) and on itself (filled), by attack."""
    with style():
        figure, (axis,) = _new(width=7.0)
        for column, outcome in enumerate(outcomes):
            for i, method in enumerate(ATTACKS):
                for white_box in (False, True):
                    accuracy = accuracy_under(outcome, method, white_box=white_box)
                    if accuracy is not None:
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
        figure, (axis,) = _new()
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
        figure, (left, right) = _new(2, width=7.0)
        left.plot(positions, losses)
        left.set(xlabel="position between the images", ylabel="loss")
        right.plot(positions[1:], slopes, color=COLOURS[5])
        right.set(xlabel="position between the images", ylabel="slope of the loss")
    return figure


def input_curvature(curvature: InputCurvature) -> Figure:
    """Show each sample's largest input eigenvalue against its gradient norm, and the means of both (section 3.2)."""
    tiny = torch.finfo(torch.float64).tiny
    with style():
        figure, (axis,) = _new()
        gradients, eigenvalues = curvature.gradient_norms.clamp_min(tiny), curvature.lambda1.clamp_min(tiny)
        axis.loglog(gradients, eigenvalues, ".", markersize=3, alpha=0.5, color=COLOURS[0], rasterized=True)
        axis.axvline(curvature.mean_gradient_norm, linestyle="--", linewidth=1.2, color=COLOURS[6])
        axis.axhline(curvature.mean_lambda1, linestyle="--", linewidth=1.2, color=COLOURS[6], label="means")
        axis.set(xlabel="norm of the input gradient", ylabel="largest input eigenvalue")
        axis.legend(fontsize=10)
    return figure


def layer_spectra(blocks: Sequence[Outcome], whole: Sequence[Outcome]) -> Figure:
    """Show the leading eigenvalues of each layer's block of the training Hessian, one colour a batch size."""
    with style():
        figure, (axis,) = _new()
        names: dict[str, str] = {}
        for i, block in enumerate(blocks):
            spec = block.task.spec
            names = layers(spec.model.name, variant=spec.model.variant)
            line = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)], "linestyle": ""}
            for column, layer in enumerate(names):
                values = block.eigenvalues("train", layer)
                label = {"label": f"B = {spec.recipe.batch_size}"} if column == 0 else {}
                axis.semilogy([column + 0.12 * (2 * i - len(blocks) + 1)] * len(values), values, **line, **label)
            for outcome in whole:
                if outcome.task.spec == spec and outcome.eigenvalues("train"):
                    axis.axhline(outcome.eigenvalues("train")[0], linestyle="--", linewidth=1.2, color=line["color"])
        axis.set_xticks(range(len(names)), [name.replace(" ", "\n") for name in names.values()])
        axis.set(ylabel="eigenvalue of the layer's block")
        axis.grid(axis="x", visible=False)
        axis.legend(fontsize=10)
    return figure
