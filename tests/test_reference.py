"""The API reference says of every public name what the source says."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path

import pytest

import hessnb
from hessnb.reference import PAGES, entries, pages

PACKAGE = Path(hessnb.__file__).parent


@pytest.fixture(scope="module")
def texts() -> dict[str, str]:
    return pages(PACKAGE, "https://example.org/blob/main")


def section(text: str, name: str) -> str:
    """The part of a page on one name."""
    (found,) = re.findall(rf"^##+ `{name}`\n(.*?)(?=^##+ `|\Z)", text, re.MULTILINE | re.DOTALL)
    return str(found)


def test_operators_show_how_they_are_made_and_where_their_products_stand(texts: dict[str, str]) -> None:
    for name in ("HessianOperator", "GGNOperator"):
        told = section(texts["curvature"], name)
        assert "batches: Iterable[tuple[Tensor, Tensor]]," in told
        assert "graph_memory: int | None = None," in told
        assert "[`CurvatureOperator`](#class-hessnb.curvature.CurvatureOperator)" in told
    shared = section(texts["curvature"], "CurvatureOperator")
    for method in ("matvec", "__matmul__", "dense", "to_scipy"):
        assert f"def {method}(self" in shared
    assert "_products" not in shared


def test_fields_of_a_base_without_an_entry_are_those_of_the_class(texts: dict[str, str]) -> None:
    told = section(texts["experiments"], "Spectrum")
    assert "    split: SplitName\n" in told
    assert told.count("def label(self)") == 1


@pytest.mark.parametrize("module", [module for modules in PAGES.values() for module in modules])
def test_every_public_name_has_an_entry_with_its_signature(texts: dict[str, str], module: str) -> None:
    page = next(page for page, modules in PAGES.items() if module in modules)
    imported = importlib.import_module(module)
    for entry in entries(PACKAGE, module):
        told = section(texts[page], entry.name)
        value = getattr(imported, entry.name)
        assert told.count("](https://example.org/blob/main/hessnb/") == 1
        if inspect.isfunction(value):
            assert all(re.search(rf"\b{parameter}\b", told) for parameter in inspect.signature(value).parameters)
            assert inspect.getdoc(value).split(maxsplit=1)[0] in told  # type: ignore[union-attr]
