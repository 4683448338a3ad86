"""Figures of large batches in the book's style: training, curvature and accuracy against the batch size."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from hessnb.experiments.networks import load_data
from hessnb.experiments.results import Outcome
from hessnb.experiments.spec import SPLITS, SplitName
from hessnb.figures.style import (
    COLOURS,
    MARKERS,
    absent,
    bound,
    look,
    missing,
    nothing,
    one_row,
    ours,
    over_seeds,
    plain_log_labels,
    style,
    titled,
)
from hessnb.models import layers
from hessnb.paper.adversarial import of_first_seed
from hessnb.paper.large_batch import Column, attacked, input_gradient, input_lambda1, lambda1
from hessnb.paper.published import published


def training_curves(outcomes: Sequence[Outcome]) -> Figure:
    """Show training loss against epochs (left) and against optimiser steps (right), one line a run."""
    trained = [(o, o.result.history) for o in outcomes if o.result and o.result.history]
    with style():
        if not trained:
            return nothing("all batch sizes")
        figure, (left, right) = one_row(2, width=7.0)
        for i, (outcome, history) in enumerate(trained):
            recipe = outcome.task.spec.recipe
            n_train = len(load_data(outcome.task.spec.data, "cpu").train)
            losses = [epoch.train_loss for epoch in history]
            epochs = [epoch.epoch for epoch in history]
            steps = [epoch * -(-n_train // recipe.batch_size) for epoch in epochs]
            # A few marks, equally far apart on the logarithmic axes.
            marked = sorted({round(n) - 1 for n in np.geomspace(1, len(epochs), 8)})
            line = {**look(i), "markevery": marked, "label": f"B = {recipe.batch_size}"}
            left.loglog(epochs, losses, **line)
            right.loglog(steps, losses, **line)
        left.set(xlabel="epoch", ylabel="training loss")
        right.set(xlabel="optimiser step")
        right.legend(fontsize=10)
    return figure


def spectra(outcomes: Sequence[Outcome]) -> Figure:
    """Show the top eigenvalues of the training loss against their index, one line a batch size (the paper's Fig. 1).

    One panel a network; of several seeds the first. What has not been measured says so.
    """
    first = of_first_seed(outcomes)
    networks = list(dict.fromkeys(outcome.task.spec.model.name for outcome in first))
    with style():
        if not networks:
            return nothing("all batch sizes")
        figure, axes = one_row(len(networks), width=6.0 if len(networks) == 1 else 7.0)
        for axis, network in zip(axes, networks, strict=True):
            trained = [o for o in first if o.task.spec.model.name == network]
            axis.set(title=titled(network, trained[0]), xlabel="index of the eigenvalue")
            lines = {f"B = {o.task.spec.recipe.batch_size}": o.eigenvalues("train") for o in trained}
            if not any(lines.values()):
                absent(axis)
                continue
            for i, (label, eigenvalues) in enumerate(lines.items()):
                if eigenvalues:
                    axis.semilogy(range(1, len(eigenvalues) + 1), eigenvalues, **look(i), label=label)
            missing(axis, [label for label, eigenvalues in lines.items() if not eigenvalues])
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            low, high = axis.get_ylim()
            axis.set_ylim(low, high * (high / low) ** 0.3)  # room for the legend
            plain_log_labels(axis.yaxis)
            axis.legend(ncols=2, fontsize=9)
        axes[0].set_ylabel("eigenvalue of the training Hessian")
    return figure


def lambda1_against_batch(table: str, live: Sequence[Outcome], record: Sequence[Outcome]) -> Figure:
    """Show the dominant eigenvalue on training and test set against batch size: live, recorded, and the paper's.

    The paper's are those of ``table`` for the same network. One of ``live`` and ``record`` may be empty.
    """
    with style():
        if not any(o.measurements for o in (*live, *record)):
            return nothing("all batch sizes")
        paper = published(table).loc[(*live, *record)[0].task.spec.model.name]
        figure, axes = one_row(2, width=7.0, share_y=True)
        for axis, split in zip(axes, SPLITS, strict=True):
            axis.loglog(paper.index, paper[f"lambda1_{split}"], "--", marker="x", color=COLOURS[6], label="paper")
            for label, outcomes, i in ((ours(record), record, 0), ("ours, live", live, 1)):
                over_seeds(axis, _points(outcomes, lambda1, split), marker=MARKERS[i], color=COLOURS[i], label=label)
            axis.set(title=f"{'training' if split == 'train' else 'test'} set", xlabel="batch size")
        axes[0].set_ylabel("dominant eigenvalue")
        axes[0].legend(fontsize=10)
    return figure


def accuracy_against_batch(table: str, live: Sequence[Outcome], record: Sequence[Outcome]) -> Figure:
    """Show accuracy (%) under FGSM on the test set against batch size, one panel a size: live, recorded, the paper's.

    The paper's are those of ``table`` for the same network. One of ``live`` and ``record`` may be empty.
    """
    with style():
        if not any(o.measurements for o in (*live, *record)):
            return nothing("all batch sizes")
        paper = published(table).loc[(*live, *record)[0].task.spec.model.name]
        attacks = [column for column in paper.columns if column.startswith("adversarial") and "test" in column]
        sizes = [column.split("_")[1] for column in attacks]
        figure, axes = one_row(len(sizes), width=7.0, share_y=True)
        for axis, eps in zip(axes, sizes, strict=True):
            axis.plot(paper.index, paper[f"adversarial_{eps}_test"], "--", marker="x", color=COLOURS[6], label="paper")
            for label, outcomes, plain, i in (
                (f"{ours(record)}, float32", record, True, 0),
                (f"{ours(record)}, exact", record, False, 2),
                ("live, float32", live, True, 1),
                ("live, exact", live, False, 5),
            ):
                points = _points(outcomes, attacked(float(eps), plain=plain), "test")
                over_seeds(axis, points, marker=MARKERS[i], color=COLOURS[i], label=label)
            axis.set(title=f"ε = {eps}", xlabel="batch size", xscale="log", ylim=(0, 100))
        axes[0].set_ylabel("accuracy under attack, %")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=2, fontsize=10)
    return figure


def _points(outcomes: Sequence[Outcome], column: Column, split: SplitName) -> list[tuple[int, float]]:
    """Return batch size and value for each run that has one."""
    return [(o.task.spec.recipe.batch_size, values[0]) for o in outcomes if (values := column([o], split))]


def accuracy_against_measures(outcomes: Sequence[Outcome], eps: float) -> Figure:
    """Show accuracy (%) under FGSM of size ``eps`` on the test set against curvature and slope, a point a network."""
    measures = {
        "λ₁ of the weights": lambda1,
        "λ₁ of the input, mean": input_lambda1,
        "norm of the input gradient, mean": input_gradient,
    }
    with style():
        if not any(o.measurements for o in outcomes):
            return nothing("all networks")
        figure, axes = one_row(len(measures), width=7.0, share_y=True)
        for axis, (label, measure) in zip(axes, measures.items(), strict=True):
            for outcome in outcomes:
                position, height = measure([outcome], "test"), attacked(eps)([outcome], "test")
                if position and height:
                    axis.plot(position[0], height[0], "o", color=COLOURS[0])
                    batch = str(outcome.task.spec.recipe.batch_size)
                    axis.annotate(batch, (position[0], height[0]), (4, 4), textcoords="offset points", fontsize=9)
            axis.set(xlabel=label.replace(", ", ",\n"))
            axis.margins(x=0.15)
            axis.xaxis.set_major_locator(MaxNLocator(3))
        axes[0].set_ylabel("accuracy under attack, %")
    return figure


def layer_spectra(blocks: Sequence[Outcome], whole: Sequence[Outcome]) -> Figure:
    """Show the leading eigenvalues of each layer's block of the training Hessian, one colour and mark a batch size.

    Dashed are the largest of the ``whole`` Hessians, with the mark of the batch size at their end.
    """
    with style():
        if not any(o.measurements for o in blocks):
            return nothing("all layers")
        figure, (axis,) = one_row()
        names: dict[str, str] = {}
        for i, block in enumerate(blocks):
            spec = block.task.spec
            names = layers(spec.model.name, variant=spec.model.variant)
            for column, layer in enumerate(names):
                values = block.eigenvalues("train", layer)
                label = {"label": f"B = {spec.recipe.batch_size}"} if column == 0 else {}
                places = [column + 0.12 * (2 * i - len(blocks) + 1)] * len(values)
                axis.semilogy(places, values, linestyle="", **look(i), **label)
            for outcome in whole:
                if outcome.task.spec == spec and outcome.eigenvalues("train"):
                    bound(axis, outcome.eigenvalues("train")[0], i)
        axis.set_xticks(range(len(names)), [name.replace(" ", "\n") for name in names.values()])
        axis.set(ylabel="eigenvalue of the layer's block")
        axis.grid(axis="x", visible=False)
        axis.legend(fontsize=10)
    return figure
