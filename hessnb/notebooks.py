"""The notebooks: MyST text files are the source, and the ``.ipynb`` beside each is generated from it, without outputs.

Generation is deterministic, so that a check can compare bytes: time stamps decide nothing. Each notebook begins with a
cell that installs the package where it is missing (on Colab), which no source file has to repeat.
"""

from __future__ import annotations

import ast
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import jupytext
import nbformat
import yaml

from hessnb.alternatives import missing_in_html, missing_in_markdown
from hessnb.errors import InputError, unknown

PARAMETERS = ("profile", "seeds", "device", "store")
MAX_CELL_LINES = 25

# An alternative text says what is to be seen; a word or two does not.
MIN_ALT = 20

_INSTALL = """\
# Where hessnb is missing, as on Colab, this gets it with its notebooks and record; elsewhere it does nothing.
from importlib.util import find_spec

if find_spec("hessnb") is None:
    !git clone --quiet --depth 1 --branch {branch} {url} hessnb-book
    %pip install --quiet "./hessnb-book[attacks]"
    %cd -q hessnb-book/notebooks"""


@dataclass(frozen=True)
class Repository:
    """Where the sources are published: ``repository`` of ``_config.yml``, the one place that says so."""

    url: str
    branch: str

    @property
    def files(self) -> str:
        """The address below which a file of the repository is shown by its path."""
        return f"{self.url}/blob/{self.branch}"


def repository(root: Path) -> Repository:
    """Return the repository that the ``_config.yml`` of the project at ``root`` names; raise InputError for none."""
    path = root / "_config.yml"
    try:
        told = yaml.safe_load(path.read_text())["repository"]
        return Repository(str(told["url"]).rstrip("/"), str(told["branch"]))
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise InputError(f"{path} must have repository: {{url, branch}} ({error!r})") from error


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
    where = repository(source.parent.parent)
    install = nbformat.v4.new_code_cell(_INSTALL.format(url=where.url, branch=where.branch))
    install.metadata["tags"] = ["install", "remove-cell"]
    notebook.cells.insert(0, install)
    seen: dict[str, int] = {}
    for cell in notebook.cells:
        digest = hashlib.sha256(cell.source.encode()).hexdigest()[:8]
        seen[digest] = seen.get(digest, 0) + 1
        cell.id = digest if seen[digest] == 1 else f"{digest}-{seen[digest]}"
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    return notebook


def comes_from(executed: nbformat.NotebookNode, source: Path) -> bool:
    """Whether a notebook that was executed says what its source says now: code, prose and captions.

    The cell that installs the package is nobody's to compare, nor are the parameters that papermill has injected.
    """
    return _content(executed) == _content(to_notebook(source))


def _content(notebook: nbformat.NotebookNode) -> list[tuple[str, str, object]]:
    added = {"install", "injected-parameters"}
    own = [cell for cell in notebook.cells if not added & set(cell.metadata.get("tags", []))]
    return [(cell.cell_type, cell.source, cell.metadata.get("mystnb", {})) for cell in own]


def sync(root: Path) -> list[Path]:
    """Write the ``.ipynb`` of each source whose content would change, and return what was written."""
    written = []
    for source in sources(root):
        target, content = source.with_suffix(".ipynb"), text(source)
        if not target.exists() or target.read_text() != content:
            target.write_text(content)
            written.append(target)
    return written


def check(root: Path) -> list[str]:
    """Return one line for each fault.

    A pair that differs, a notebook without a source, odd parameters; a cell too long or not plain Python, an algorithm
    in a cell, a figure without a description.
    """
    chapters = sources(root)
    faults = [
        f"{path.name} has no source {path.stem}.md; remove it, or write its source"
        for path in sorted((root / "notebooks").glob("[0-9][0-9]_*.ipynb"))
        if path.with_suffix(".md") not in chapters
    ]
    for source in chapters:
        target = source.with_suffix(".ipynb")
        if not target.exists() or target.read_text() != text(source):
            faults.append(f"{target.name} differs from {source.name}; run: hessnb notebooks sync")
        cells = [cell for cell in to_notebook(source).cells[1:] if cell.cell_type == "code"]  # without the install cell
        faults += [f"{source.name}: {fault}" for cell in cells for fault in _faults(cell)]
        tagged = [cell for cell in cells if "parameters" in cell.metadata.get("tags", [])]
        if len(tagged) != 1 or _assigned(tagged[0].source) != PARAMETERS:
            faults.append(
                f"{source.name}: one cell tagged 'parameters' must set {', '.join(PARAMETERS)}, in this order"
            )
    return faults


def _faults(cell: nbformat.NotebookNode) -> Iterator[str]:
    """Yield what is wrong with a code cell by itself."""
    if "figure" in cell.metadata.get("mystnb", {}) and (missing := _undescribed(cell)):
        yield f"the figure of cell {cell.id} has no {missing}"
    if len(cell.source.splitlines()) > MAX_CELL_LINES:
        yield f"cell {cell.id} has more than {MAX_CELL_LINES} lines"
    try:
        ast.parse(cell.source)
    except SyntaxError as error:
        line = f"line {error.lineno}: {(error.text or '').strip()}"
        remedy = "mend it, and leave magics (%) and shell commands (!) out"
        yield f"cell {cell.id} is not plain Python ({error.msg} in its {line}); {remedy}"
    if any(_defines(node) for node in ast.walk(parsed(cell.source))):
        yield f"cell {cell.id} defines a function or class; it belongs into the package"
    if re.search(r"\{[\w:]+\}`", cell.source):  # a table whose caption holds a reference cannot be referred to
        yield f"cell {cell.id} refers to another place; that belongs into the prose"


def _defines(node: ast.AST) -> bool:
    """Whether a part of a cell defines a class or a function, also a lambda that gets a name."""
    if isinstance(node, ast.Assign | ast.AnnAssign | ast.NamedExpr):
        return isinstance(node.value, ast.Lambda)
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)


def undescribed(notebook: nbformat.NotebookNode) -> list[str]:
    """Return one line for each picture in the outputs that has no number, caption or alternative text of its own."""
    faults = []
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if any(mime.startswith("image/") for mime in data) and (missing := _undescribed(cell)):
                faults.append(f"the picture of cell {cell.id} has no {missing}")
            in_html = missing_in_html("".join(data.get("text/html", "")))
            in_markdown = missing_in_markdown("".join(data.get("text/markdown", "")))
            faults += [f"cell {cell.id} shows {picture}" for picture in in_html + in_markdown]
    return faults


def _undescribed(cell: nbformat.NotebookNode) -> str | None:
    """Return what a cell's ``mystnb`` metadata lacks for its figure, or None when name, caption and alt are there."""
    told = cell.metadata.get("mystnb", {})
    figure, alt = told.get("figure", {}), str(told.get("image", {}).get("alt", ""))
    if not figure.get("name") or not figure.get("caption"):
        return "name and caption (mystnb: figure: {name, caption})"
    if len(alt) < MIN_ALT:
        return f"alternative text of at least {MIN_ALT} characters (mystnb: image: {{alt}})"
    return None


def text(source: Path) -> str:
    """Return the content of the ``.ipynb`` of a source file."""
    return str(nbformat.writes(to_notebook(source))) + "\n"


def parsed(code: str) -> ast.Module:
    """Return a cell's code as a tree: an empty one for what is not plain Python, such as a magic."""
    try:
        return ast.parse(code)
    except SyntaxError:
        return ast.Module([], [])


def _assigned(code: str) -> tuple[str, ...]:
    targets = [node.targets[0] for node in parsed(code).body if isinstance(node, ast.Assign)]
    return tuple(target.id for target in targets if isinstance(target, ast.Name))
