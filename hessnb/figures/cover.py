"""The figure of the README: the dominant eigenvalue against the batch size, the paper's and the record's."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from hessnb.experiments.files import write_whole
from hessnb.experiments.spec import SPLITS
from hessnb.figures import lambda1_against_batch
from hessnb.figures.style import style
from hessnb.paper.recorded import Recorded, from_record

# In the book's folder.
PLACE = Path("_static", "lambda1.svg")


def described(outcomes: Sequence[Recorded]) -> str:
    """Return the numbers in the figure as text: a batch size, a seed, and the eigenvalue on each set."""
    return "; ".join(
        f"batch size {o.task.spec.recipe.batch_size}, seed {o.task.spec.recipe.seed}: "
        + ", ".join(f"{split} {o.eigenvalues(split)[0]:.4g}" for split in SPLITS if o.eigenvalues(split))
        for o in sorted(outcomes, key=lambda o: (o.task.spec.recipe.batch_size, o.task.spec.recipe.seed))
        if o.eigenvalues("train")
    )


def draw(record: Path) -> bytes:
    """Return the figure as SVG, drawn from the numbers of Table 7 in the folder ``record`` and described by them."""
    outcomes = from_record("table7", folder=record)
    figure, target = lambda1_against_batch("table7", [], outcomes), io.BytesIO()
    with style():
        figure.savefig(target, format="svg", metadata={"Date": None, "Description": described(outcomes)})
    return target.getvalue()


def publish(record: Path) -> Path | None:
    """Draw the figure of the book that ``record`` belongs to, and return its path if that has changed it."""
    path, content = record.parent / PLACE, draw(record)
    if path.exists() and path.read_bytes() == content:
        return None
    write_whole(path, content)
    return path
