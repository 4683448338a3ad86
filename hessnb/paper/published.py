"""What the paper published: its numbers as tables, accuracies in per cent."""

from __future__ import annotations

from importlib import resources

import pandas as pd

from hessnb.errors import unknown

LARGE_BATCH = ("table1", "table2", "table7")
ADVERSARIAL = ("table3", "table4")


def published(name: str) -> pd.DataFrame:
    """Return a table of the paper by name: a row for each network and batch size, or for each adversarial training.

    Raises InputError for one that is not there.
    """
    if name not in (*LARGE_BATCH, *ADVERSARIAL):
        raise unknown("table of the paper", name, [*LARGE_BATCH, *ADVERSARIAL])
    with (resources.files("hessnb.paper") / f"{name}.csv").open() as file:
        return pd.read_csv(file, index_col=["network", "batch_size"] if name in LARGE_BATCH else "network")
