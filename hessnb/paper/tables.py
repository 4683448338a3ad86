"""Tables for the reader: results as the paper lays them out, the paper's own number beside each."""

from __future__ import annotations

import html
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from hessnb.paper.origins import HEADER, Origin

NOT_MEASURED = "not measured yet"
TOO_FEW = "too few"

# What stands where a number is missing.
STAND_INS = NOT_MEASURED, TOO_FEW

# For the numbers of eigenvalues.
SUBSCRIPTS = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")

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
