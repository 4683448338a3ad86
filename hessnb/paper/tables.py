"""Tables for the reader: results as the paper lays them out, the paper's own number beside each."""

from __future__ import annotations

import html
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from hessnb import data, models
from hessnb.experiments.results import Outcome
from hessnb.experiments.spec import PowerIteration, Spectrum
from hessnb.paper.origins import HEADER, Origin

NOT_MEASURED = "not measured yet"
TOO_FEW = "too few"

# What stands where a number is missing.
STAND_INS = NOT_MEASURED, TOO_FEW

# The title of a last column that names the scale at which each row was recorded.
PROFILE = "Profile"

# The hyphen of a negative number or exponent.
_MINUS = re.compile(r"(?<![^\s(÷×±])-(?=\.?\d)|(?<=\de)-(?=\d)")

_NUMBER = re.compile(r"[-−+×<>≤≥~(\s]*[.\d]")

# Cells up to this many characters are numbers or names, longer ones text, which wraps and stands on the left.
_SHORT = 24

# Between a mean and its standard deviation: such cells are numbers, however long.
_SPREAD = " ± "


@dataclass(frozen=True)
class Table:
    """A captioned table that shows itself: numbered Markdown in the book, HTML in Jupyter.

    A profile that all rows share is told by the caption. Below the table, folded, stands where recorded numbers come
    from (``origins``, see `hessnb.paper.origins`).
    """

    name: str
    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    origins: tuple[Origin, ...] = ()

    def _repr_markdown_(self) -> str:
        caption, header, rows = self._shown()
        body = markdown(header, rows)
        table = f"```{{table}} {caption}\n:name: {self.name}\n:align: center\n\n{body}\n```\n"
        if not self.origins:
            return table
        told = [(f"[{o.cells[0]}]({o.address})" if o.address else o.cells[0], *o.cells[1:]) for o in self.origins]
        return f"{table}\n```{{dropdown}} {_FOLDED}\n{markdown(HEADER, told)}\n```\n"

    def _repr_html_(self) -> str:
        caption, header, rows = self._shown()
        table = _html(header, [[html.escape(cell) for cell in row] for row in rows], caption)
        if not self.origins:
            return table
        told = [[html.escape(cell) for cell in o.cells] for o in self.origins]
        for cells, origin in zip(told, self.origins, strict=True):
            cells[0] = f'<a href="{origin.address}">{cells[0]}</a>' if origin.address else cells[0]
        return f"{table}<details><summary>{_FOLDED}</summary>{_html(HEADER, told)}</details>"

    def _shown(self) -> tuple[str, tuple[str, ...], list[tuple[str, ...]]]:
        """Return caption, header and rows as the reader sees them."""
        caption, header = self.caption, self.header
        rows = [tuple(_MINUS.sub("−", cell) for cell in row) for row in self.rows]
        if header[-1] == PROFILE and len(told := {row[-1] for row in rows} - {"–"}) <= 1:
            caption = " ".join((caption, *(f"Profile {profile}." for profile in told)))
            header, rows = header[:-1], [row[:-1] for row in rows]
        return caption, header, rows


_FOLDED = "Where these numbers come from"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table: short cells on one line, columns of text on the left, of numbers on the right."""
    text = [_is_text(column) for column in zip(*rows, strict=True)] or [False] * len(header)
    rule = [":---" if i == 0 or text[i] else "---:" for i in range(len(header))]
    return "\n".join(map(markdown_line, [header, rule, *(tuple(map(_cell, row)) for row in rows)]))


def markdown_line(cells: Sequence[str]) -> str:
    """Return one line of a Markdown table."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _html(header: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "") -> str:
    def line(tag: str, cells: Sequence[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in cells) + "</tr>"

    head, body = line("th", [html.escape(cell) for cell in header]), "".join(line("td", row) for row in rows)
    told = f"<caption>{html.escape(caption)}</caption>" if caption else ""
    return f"<table>{told}<thead>{head}</thead><tbody>{body}</tbody></table>"


def _is_text(column: Sequence[str]) -> bool:
    """Whether a column has cells, and among them no number and none that stands for one; or a long cell."""
    filled = [cell for cell in column if not cell.startswith(("–", *STAND_INS))]
    return any(map(_is_prose, column)) or (any(filled) and not any(map(_NUMBER.match, filled)))


def _is_prose(cell: str) -> bool:
    return len(cell) > _SHORT and _SPREAD not in cell


def _cell(text: str) -> str:
    """Return a cell that is parted nowhere, or before a bracket alone, where the table is too wide; a text anywhere."""
    return text if _is_prose(text) else text.replace(" ", "\u00a0").replace("\u00a0(", " (")


def mean_and_spread(values: Sequence[float], form: str) -> str:
    """Return one value, or the mean and the sample standard deviation of several; "not measured yet" for none."""
    if not values:
        return NOT_MEASURED
    if len(values) == 1:
        return _shown(values[0], form)
    return f"{_shown(statistics.mean(values), form)}{_SPREAD}{_shown(statistics.stdev(values), form)}"


def _shown(value: float, form: str) -> str:
    """Return a number in a form; a large one written out: 5,830 for 5.83e+03."""
    text = form.format(value)
    return f"{float(text):,.0f}" if "e+" in text and abs(value) < 1e6 else text


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


def stopping(outcome: Outcome, *, name: str, caption: str) -> Table:
    """Return the eigenvalues of a network by power and by Lanczos iteration, with residuals and products."""
    power = next(m for measure, m in outcome.measurements.items() if isinstance(measure, PowerIteration)).values
    spectra = {
        measure.k: m.values
        for measure, m in outcome.measurements.items()
        if isinstance(measure, Spectrum)
        and (measure.split, measure.parameters, measure.samples) == ("train", None, None)
    }
    certified = spectra[max(spectra)]
    rows = []
    for i, value in enumerate(power["eigenvalues"]):
        exact = certified["eigenvalues"][i]
        rows.append(
            (
                f"λ{i + 1}".translate(SUBSCRIPTS),
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


SUBSCRIPTS = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")

_LAYERS = {
    "M1": "5 × 5, 20 – max-pool 2 – 5 × 5, 50 – max-pool 2 – 500 – 10",
    "C1": "5 × 5, 64 – BN – max-pool 3/2 – 5 × 5, 64 – BN – max-pool 3/2 – 384 – 192 – 10",
    "C2": "(3 × 3, 64 – BN) twice – max-pool 2 – (3 × 3, 128 – BN) twice – max-pool 2 – 256 – 256 – 10",
    "C3": "(3 × 3, 64) twice – max-pool 2 – (3 × 3, 128) twice – max-pool 2 – 256 – 256 – 10",
    "CR": "3 × 3, 16 – BN – three stages of three residual blocks, 16, 32, 64 – average-pool – 100",
}
