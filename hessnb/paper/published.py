"""The numbers that the paper published, as tables; accuracies in per cent."""

from __future__ import annotations

from importlib import resources

import pandas as pd

from hessnb.errors import unknown

TABLES = ("table7",)


def published(name: str) -> pd.DataFrame:
    """Return a table of the paper by name, one row a batch size; raise InputError for one that is not there."""
    if name not in TABLES:
        raise unknown("table of the paper", name, list(TABLES))
    with (resources.files("hessnb.paper") / f"{name}.csv").open() as file:
        return pd.read_csv(file, index_col="batch_size")
