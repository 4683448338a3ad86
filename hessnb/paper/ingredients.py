"""What everything is made of, as tables: the networks of Table 6 and the data sets that are at hand."""

from __future__ import annotations

from collections.abc import Sequence

from hessnb import data, models
from hessnb.paper.tables import Table

_LAYERS = {
    "M1": "5 × 5, 20 – max-pool 2 – 5 × 5, 50 – max-pool 2 – 500 – 10",
    "C1": "5 × 5, 64 – BN – max-pool 3/2 – 5 × 5, 64 – BN – max-pool 3/2 – 384 – 192 – 10",
    "C2": "(3 × 3, 64 – BN) twice – max-pool 2 – (3 × 3, 128 – BN) twice – max-pool 2 – 256 – 256 – 10",
    "C3": "(3 × 3, 64) twice – max-pool 2 – (3 × 3, 128) twice – max-pool 2 – 256 – 256 – 10",
    "CR": "3 × 3, 16 – BN – three stages of three residual blocks, 16, 32, 64 – average-pool – 100",
}


def table6() -> Table:
    """Return Table 6 as it is built here: each network's input, layers, and weights as counted in the built network."""
    rows = []
    for name in models.MODELS:
        model = models.build(name)
        shape = " × ".join(map(str, models.INPUT_SHAPES[name]))
        rows.append((name, shape, _LAYERS[name], f"{models.parameter_count(model):,}"))
    return Table(
        "tab-models",
        "The networks of the paper's Table 6 as they are built here, with the weights counted. k × k, c is a "
        "convolution with c channels, max-pool 3/2 has a window of 3 and a stride of 2, a number alone is a fully "
        "connected layer of so many units, BN is batch normalisation; all activations are ReLU.",
        ("Network", "Input", "Layers", "Weights"),
        tuple(rows),
    )


def data_sets(names: Sequence[str]) -> Table:
    """Return what each data set holds, counted in the loaded tensors; one that is not on this machine says so."""
    rows = []
    for name in names:
        if data.where(name) is None:
            rows.append((name, "not on this machine", *["–"] * 4))
            continue
        splits = data.load(name)
        shape = " × ".join(map(str, splits.train.images.shape[1:]))
        mean = splits.train.images.mean().item()
        counts = (f"{len(splits.train):,}", f"{len(splits.test):,}")
        rows.append((name, shape, *counts, f"{len(splits.classes)}", f"{mean:.3f}"))
    return Table(
        "tab-data",
        "The data sets that were at hand when this page was made. Pixels are in [0, 1]; their mean says how "
        "dark a set is.",
        ("Set", "Image", "Training", "Test", "Classes", "Mean pixel"),
        tuple(rows),
    )
