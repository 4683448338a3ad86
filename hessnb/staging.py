"""The staging folder: what Jupyter Book sees, made from the project and its executed notebooks."""

from __future__ import annotations

import ast
import shutil
from pathlib import Path

import nbformat

from hessnb import notebooks, pages, record_pages, reference

_PACKAGE = Path(__file__).parent

HIDDEN = {"install", "parameters", "injected-parameters"}


def stage(root: Path, executed: list[Path], site: Path) -> None:
    """Lay out configuration, prose, generated pages and executed notebooks in the new folder ``site``."""
    (site / "notebooks").mkdir(parents=True)
    for name in ("_config.yml", "_toc.yml"):
        shutil.copy(root / name, site / name)
    leave_out = shutil.ignore_patterns("_build", "record", ".*")
    shutil.copytree(root / "book", site / "book", ignore=leave_out)
    told = []
    for path in executed:
        notebook = nbformat.read(path, as_version=4)
        notebook.metadata.pop("widgets", None)  # or MyST-NB fetches a widget manager; the pages' own HTML is shown
        for cell in notebook.cells:
            _tag(cell)
        nbformat.write(notebook, site / "notebooks" / path.name)
        told.append((path.stem, notebook.metadata))
    files, record = notebooks.repository(root).files, root / "book" / "record"
    tables = pages.generated(told, record) | record_pages.generated(record, f"{files}/book/record")
    _write(site / "book" / "_generated", tables)
    _write(site / "book" / "api", {f"{name}.md": text for name, text in reference.pages(_PACKAGE, files).items()})


def offer_sources(root: Path, html: Path) -> None:
    """Let each chapter's page offer the notebook as it is committed, without this build's parameters and outputs."""
    for source in notebooks.sources(root):
        target = html / "_sources" / "notebooks" / f"{source.stem}.ipynb"
        if target.exists():
            target.write_text(notebooks.text(source))


def _write(folder: Path, files: dict[str, str]) -> None:
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)


def _tag(cell: nbformat.NotebookNode) -> None:
    """Hide what only papermill and Colab need, and fold code that imports or draws, unless it is tagged show-input."""
    tags = cell.metadata.get("tags", [])
    if HIDDEN & set(tags):
        cell.metadata["tags"] = list(dict.fromkeys([*tags, "remove-cell"]))
    elif cell.cell_type == "code" and "show-input" not in tags and (_draws(cell) or _begins_with_import(cell)):
        cell.metadata["tags"] = list(dict.fromkeys([*tags, "hide-input"]))


def _draws(cell: nbformat.NotebookNode) -> bool:
    return "figure" in cell.metadata.get("mystnb", {})


def _begins_with_import(cell: nbformat.NotebookNode) -> bool:
    body = notebooks.parsed(cell.source).body
    return bool(body) and isinstance(body[0], ast.Import | ast.ImportFrom)
