"""Tables for the reader: results as the paper lays them out, the paper's own number beside each."""

from __future__ import annotations

import html
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from hessnb import data, models
from hessnb.experiments.run import Outcome
from hessnb.experiments.spec import PowerIteration, Spectrum

NOT_MEASURED = "not measured yet"

# Cells up to this many characters stay on one line; longer ones are text, which wraps and stands on the left.
_SHORT = 24


@dataclass(frozen=True)
class Table:
    """A captioned table that shows itself: numbered Markdown in the book, HTML in Jupyter."""

    name: str
    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def _repr_markdown_(self) -> str:
        wide = [max(map(len, column)) > _SHORT for column in zip(*self.rows, strict=True)]
        rule = [":---" if i == 0 or wide[i] else "---:" for i in range(len(self.header))]
        lines = [self.header, rule, *(tuple(map(_cell, row)) for row in self.rows)]
        body = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for cells in lines)
        return f"```{{table}} {self.caption}\n:name: {self.name}\n:align: center\n\n{body}\n```\n"

    def _repr_html_(self) -> str:
        def line(tag: str, cells: tuple[str, ...]) -> str:
            return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

        head, body = line("th", self.header), "".join(line("td", row) for row in self.rows)
        caption = f"<caption>{html.escape(self.caption)}</caption>"
        return f"<table>{caption}<thead>{head}</thead><tbody>{body}</tbody></table>"


def _cell(text: str) -> str:
    return text.replace(" ", "\u00a0") if len(text) <= _SHORT else text


def mean_and_spread(values: Sequence[float], form: str) -> str:
    """Return one value, or the mean and the sample standard deviation of several; "not measured yet" for none."""
    if not values:
        return NOT_MEASURED
    if len(values) == 1:
        return form.format(values[0])
    return f"{form.format(statistics.mean(values))} ± {form.format(statistics.stdev(values))}"


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
        "convolution with c channels; all activations are ReLU.",
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


def stopping(outcome: Outcome, *, name: str, caption: str) -> Table:
    """Return the eigenvalues of a network by power and by Lanczos iteration, with residuals and products."""
    power = next(m for measure, m in outcome.measurements.items() if isinstance(measure, PowerIteration)).values
    spectra = {measure.k: m.values for measure, m in outcome.measurements.items() if isinstance(measure, Spectrum)}
    certified = spectra[max(spectra)]
    rows = []
    for i, value in enumerate(power["eigenvalues"]):
        exact = certified["eigenvalues"][i]
        rows.append(
            (
                f"λ{i + 1}".translate(_SUBSCRIPTS),
                f"{value:.5g}",
                f"{power['residuals'][i]:.0e}",
                f"{exact:.5g}",
                f"{certified['residuals'][i]:.0e}",
                f"{abs(value - exact) / abs(exact):.0e}",
            )
        )
    pairs = f"{len(power['eigenvalues'])} pairs", f"{len(certified['eigenvalues'])} pairs"
    rows.append(("Products", str(power["n_matvecs"]), pairs[0], str(certified["n_matvecs"]), pairs[1], ""))
    header = ("", "Power iteration", "Residual", "Lanczos", "Residual", "Error of the first")
    return Table(name, caption, header, tuple(rows))


def layer_shares(blocks: Sequence[Outcome], whole: Sequence[Outcome], *, name: str, caption: str) -> Table:
    """Return the dominant eigenvalue of each layer's block in parts of the whole Hessian's, one row a network."""
    largest = {o.task.spec: o.eigenvalues("train")[0] for o in whole if o.eigenvalues("train")}
    names: dict[str, str] = {}
    rows = []
    for block in blocks:
        spec = block.task.spec
        names = models.layers(spec.model.name, variant=spec.model.variant)
        shares = [f"{block.eigenvalues('train', layer)[0] / largest[spec]:.0%}" for layer in names]
        rows.append((str(spec.recipe.batch_size), f"{largest[spec]:.3g}", *shares))
    return Table(name, caption, ("Batch", "λ₁, whole", *names.values()), tuple(rows))


def provenance(outcomes: Sequence[Outcome], *, name: str, caption: str) -> Table:
    """Return where the numbers of a table come from: one row a run, with its key, machine, date and time."""
    rows = []
    for outcome in outcomes:
        if outcome.result is None:
            continue
        told = outcome.result.provenance
        seconds = told["seconds"] + sum(m.provenance["seconds"] for m in outcome.measurements.values())
        commit = told["commit"] or "not in a repository"
        rows.append(
            (
                outcome.task.spec.label,
                outcome.task.spec.key,
                outcome.result.reason,
                f"{told['device']}, {told['threads']} thread{'s'[: told['threads'] > 1]}",
                f"torch {told['torch']}, {commit[:12]}{'+changes' if commit.endswith('+changes') else ''}",
                told["date"][:10],
                f"{seconds:,.0f} s",
            )
        )
    header = ("Run", "Key", "Ended", "Machine", "Code", "Date", "Time")
    return Table(name, caption, header, tuple(rows) or ((NOT_MEASURED, *[""] * 6),))


_SUBSCRIPTS = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")

_LAYERS = {
    "M1": "5 × 5, 20 – max-pool 2 – 5 × 5, 50 – max-pool 2 – 500 – 10",
    "C1": "5 × 5, 64 – BN – max-pool 3/2 – 5 × 5, 64 – BN – max-pool 3/2 – 384 – 192 – 10",
    "C2": "(3 × 3, 64 – BN) twice – max-pool 2 – (3 × 3, 128 – BN) twice – max-pool 2 – 256 – 256 – 10",
    "C3": "(3 × 3, 64) twice – max-pool 2 – (3 × 3, 128) twice – max-pool 2 – 256 – 256 – 10",
    "CR": "3 × 3, 16 – BN – three stages of three residual blocks, 16, 32, 64 – average-pool – 100",
}
