"""The notebooks: MyST text files are the source, and the ``.ipynb`` beside each is generated from it, without outputs.

Generation is deterministic, so that a check can compare bytes: time stamps decide nothing.
"""

from __future__ import annotations

import ast
import hashlib
from pathlib import Path

import jupytext
import nbformat

from hessnb.errors import InputError, unknown

PARAMETERS = ("profile", "seeds", "device", "store")
MAX_CELL_LINES = 25


def sources(root: Path) -> list[Path]:
    """Return the chapters' source files ``notebooks/NN_slug.md``, in order; raise InputError when there are none."""
    found = sorted((root / "notebooks").glob("[0-9][0-9]_*.md"))
    if not found:
        raise InputError(f"there is no notebook source (notebooks/NN_slug.md) in {root}")
    return found


def select(root: Path, chapters: tuple[str, ...]) -> list[Path]:
    """Return the sources of the chapters given by number ("03") or name; all of them for none given."""
    every = sources(root)
    chosen = []
    for chapter in chapters:
        matching = [path for path in every if chapter in (path.stem, path.stem[:2], path.stem[:2].lstrip("0"))]
        if not matching:
            raise unknown("chapter", chapter, [path.stem for path in every])
        chosen += matching
    return chosen or every


def to_notebook(source: Path) -> nbformat.NotebookNode:
    """Return the notebook that a source file stands for: no outputs, identifiers made from the cells' text."""
    try:
        notebook: nbformat.NotebookNode = jupytext.read(source, fmt="md:myst")
    except Exception as error:  # jupytext raises what its parsers raise
        raise InputError(f"{source} cannot be read as a MyST notebook: {error}") from error
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        }
    )
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    seen: dict[str, int] = {}
    for cell in notebook.cells:
        digest = hashlib.sha256(cell.source.encode()).hexdigest()[:8]
        seen[digest] = seen.get(digest, 0) + 1
        cell.id = digest if seen[digest] == 1 else f"{digest}-{seen[digest]}"
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    return notebook


def sync(root: Path) -> list[Path]:
    """Write the ``.ipynb`` of each source whose content would change, and return what was written."""
    written = []
    for source in sources(root):
        target, content = source.with_suffix(".ipynb"), _text(source)
        if not target.exists() or target.read_text() != content:
            target.write_text(content)
            written.append(target)
    return written


def check(root: Path) -> list[str]:
    """Return one line for each fault: a pair that differs, a cell too long, an algorithm in a cell, odd parameters."""
    faults = []
    for source in sources(root):
        target = source.with_suffix(".ipynb")
        if not target.exists() or target.read_text() != _text(source):
            faults.append(f"{target.name} differs from {source.name}; run: hessnb notebooks sync")
        cells = [cell for cell in to_notebook(source).cells if cell.cell_type == "code"]
        for cell in cells:
            if len(cell.source.splitlines()) > MAX_CELL_LINES:
                faults.append(f"{source.name}: cell {cell.id} has more than {MAX_CELL_LINES} lines")
            if any(isinstance(node, ast.FunctionDef | ast.ClassDef) for node in ast.walk(ast.parse(cell.source))):
                faults.append(f"{source.name}: cell {cell.id} defines a function or class; it belongs into the package")
        tagged = [cell for cell in cells if "parameters" in cell.metadata.get("tags", [])]
        if len(tagged) != 1 or _assigned(tagged[0].source) != PARAMETERS:
            faults.append(
                f"{source.name}: one cell tagged 'parameters' must set {', '.join(PARAMETERS)}, in this order"
            )
    return faults


def _text(source: Path) -> str:
    return str(nbformat.writes(to_notebook(source))) + "\n"


def _assigned(code: str) -> tuple[str, ...]:
    targets = [node.targets[0] for node in ast.parse(code).body if isinstance(node, ast.Assign)]
    return tuple(target.id for target in targets if isinstance(target, ast.Name))
