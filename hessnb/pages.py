"""The tables that are generated into the prose pages of the book: what ran, what is there, how fast it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nbformat

from hessnb.errors import InputError
from hessnb.experiments.record import BENCHMARKS
from hessnb.paper import scoreboard
from hessnb.paper.tables import NOT_MEASURED, markdown, markdown_line

Executed = list[tuple[str, nbformat.NotebookNode]]


def generated(executed: Executed, record: Path) -> dict[str, str]:
    """Return the generated files by name, from the metadata of the executed chapters and the record's folder."""
    return {
        "chapters.md": chapters_table(executed),
        "speed.md": speed_tables(record / BENCHMARKS),
        **scoreboard.generated(record, [stem for stem, _ in executed]),
    }


def chapters_table(told: Executed) -> str:
    """Return when, where and how long each chapter ran, as a Markdown table."""
    lines = ["| Chapter | Profile | Ran for | On | Machine | Code |", "| :--- | :--- | ---: | :--- | :--- | :--- |"]
    for stem, metadata in told:
        ours, papermill = metadata.get("hessnb", {}), metadata.get("papermill", {})
        parameters = papermill.get("parameters", {})
        seconds = papermill.get("duration")
        cells = (
            f"{{doc}}`/notebooks/{stem}`",
            str(parameters.get("profile", "as in the notebook")),
            "not recorded" if seconds is None else f"{seconds:.0f} s",
            str(papermill.get("start_time", "not recorded"))[:10],
            str(ours.get("machine", "not recorded")),
            f"Python {ours['python']}, torch {ours['torch']}" if ours else "not recorded",
        )
        lines.append(markdown_line(cells))
    return "\n".join(lines) + "\n"


def speed_tables(path: Path) -> str:
    """Return the benchmarks that ``path`` holds, measured by tests/benchmarks, as Markdown tables and a line on memory.

    Raises InputError for a file that cannot be read as such.
    """
    if not path.exists():
        return f"{NOT_MEASURED.capitalize()}.\n"
    try:
        rows: list[dict[str, Any]] = json.loads(path.read_bytes())["rows"]
        parts = [
            _ratios([row for row in rows if "ratio" in row and "gradients" not in row]),
            _products([row for row in rows if "gradients" in row]),
            *(_memory(row) for row in rows if "peak_gib" in row),
            _measured_on(rows),
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} cannot be read as benchmarks ({error!r}); measure again with: make bench") from error
    return "\n".join(part for part in parts if part)


def _ratios(rows: list[dict[str, Any]]) -> str:
    header = ("What", "Beside", "Times faster", "hessnb", "Other", "Products", "Largest residual")
    lines = []
    for row in rows:
        ratio = row["ratio"]
        spread = "" if row["rounds"] == 1 else f" ({ratio['min']:.3g} to {ratio['max']:.3g})"
        products, residuals = row.get("products", {}), row.get("residual_max", {})
        cells = (
            row["what"],
            row["peer"],
            f"{'more than ' if row.get('at_least') else ''}{ratio['median']:.3g}{spread}",
            _seconds(row["our_seconds"]),
            _seconds(row["peer_seconds"]),
            " / ".join(str(products[who]) for who in ("ours", "peer") if who in products),
            " / ".join(f"{residuals[who]:.0e}" for who in ("ours", "peer") if who in residuals),
        )
        lines.append(cells)
    return markdown(header, lines) + "\n" if rows else ""


def _seconds(seconds: float) -> str:
    return f"{seconds:,.0f} s" if seconds >= 100 else f"{seconds:.3g} s"


def _products(rows: list[dict[str, Any]]) -> str:
    """Return the cost of one product in gradients, one line a batch size, one column an implementation."""
    table: dict[str, dict[str, str]] = {}
    for row in rows:
        _, size, _ = row["name"].split("-", 2)
        cost = {who: f"{spread['median']:.2f}" for who, spread in row["gradients"].items()}
        line = table.setdefault(size, {"hessnb, graph kept": cost["ours"], "from scratch": cost["ours, no graph kept"]})
        line[row["peer"]] = cost["peer"]
    if not table:
        return ""
    names = list(dict.fromkeys(name for line in table.values() for name in line))
    lines = [
        (size, *(line.get(name, NOT_MEASURED) for name in names))
        for size, line in sorted(table.items(), key=lambda item: int(item[0]))
    ]
    shown = markdown(("Batch", *names), lines)
    return f"The cost of one product over the data set, in gradients over the same batches:\n\n{shown}\n"


def _memory(row: dict[str, Any]) -> str:
    what = row["what"][0].upper() + row["what"][1:]
    return (
        f"{what}: {row['peak_gib']:.3g} GiB, with {row['graph_memory_gib']:.3g} GiB allowed for "
        f"graphs, {row['basis_gib']:.3g} GiB for {row['basis_rows']} rows of the basis, and room for the eigenvectors; "
        f"{row['products']['ours']} products, largest residual {row['residual_max']['ours']:.0e}.\n"
    )


def _measured_on(rows: list[dict[str, Any]]) -> str:
    found = dict.fromkeys(
        f"{told['device']}, {told['threads']} thread{'s'[: told['threads'] > 1]}, torch {told['torch']}, "
        f"{told['date'][:10]}, commit {told['commit'][:12] if told['commit'] else 'unknown'}"
        for told in (row["provenance"] for row in rows)
    )
    return "Measured on: " + "; ".join(found) + ".\n"
