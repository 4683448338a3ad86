"""Imports follow the layers that the package's docstring draws: none goes upward, and there are no circles."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import hessnb

PACKAGE = Path(hessnb.__file__).parent

# The numerics, each before those that may import it; all other parts stand above them.
NUMERICS = (
    "errors", "identity", "pace", "points", "precision", "statistics",
    "data", "models", "steps", "checks", "training", "together",
    "curvature", "landscape", "attacks", "robustness", "sharpness",
)  # fmt: skip


def modules() -> dict[str, set[str]]:
    """Return the modules of the package by name, each with those that its import statements name."""
    names = {".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
    names = {name.removesuffix(".__init__"): path for name, path in names.items()}
    found = {}
    for name, path in names.items():
        imported = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                below = (f"{node.module}.{alias.name}" for alias in node.names)
                imported |= {child if child in names else node.module for child in below}
            elif isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
        found[name] = imported & names.keys() - {name, "hessnb"}
    return found


def part(module: str) -> str:
    return module.split(".")[1]


def test_numerics_import_what_is_below_them_alone() -> None:
    order = {name: place for place, name in enumerate(NUMERICS)}
    upward = [
        f"{name} imports {other}"
        for name, imported in modules().items()
        if name != "hessnb" and part(name) in order
        for other in imported
        if part(other) != part(name) and order.get(part(other), len(order)) > order[part(name)]
    ]
    assert not upward


def test_no_module_imports_itself_by_way_of_others() -> None:
    assert list(TopologicalSorter(modules()).static_order())


def test_training_knows_nothing_of_curvature() -> None:
    imported, seen, left = modules(), set[str](), {"hessnb.training"}
    while left:
        name = left.pop()
        seen.add(name)
        left |= imported[name] - seen
    assert "hessnb.models" in seen
    assert not {name for name in seen if part(name) in ("curvature", "attacks", "landscape")}
