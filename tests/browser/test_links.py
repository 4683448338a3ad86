"""The links of the built pages, read without a browser: each leads somewhere, and the paper is all there."""

from __future__ import annotations

import tomllib
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

# Where each table, figure, theorem and equation of the paper stands in the book: its chapters, and the labels there.
PLACES: dict[str, dict[str, list[str]]] = tomllib.loads((Path(__file__).parent / "places.toml").read_text())


class Reader(HTMLParser):
    """The targets that a page has, and the addresses that it names."""

    def __init__(self) -> None:
        super().__init__()
        self.targets: set[str] = set()
        self.addresses: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        told = dict(attrs)
        self.targets |= {value for name in ("id", "name") if (value := told.get(name))}
        self.addresses |= {value for name in ("href", "src") if (value := told.get(name))}


@cache
def read(page: Path) -> Reader:
    reader = Reader()
    reader.feed(page.read_text())
    return reader


def test_every_internal_link_and_anchor_leads_somewhere(html: Path) -> None:
    broken = []
    for page in sorted(path for path in html.rglob("*.html") if "_static" not in path.parts):
        for address in read(page).addresses:
            parts = urlsplit(address)
            if parts.scheme or parts.netloc:
                continue
            target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            anchor = unquote(parts.fragment)
            if not target.is_file():
                broken.append(f"{page.relative_to(html)}: {address}")
            elif anchor and target.suffix == ".html" and anchor not in read(target).targets:
                broken.append(f"{page.relative_to(html)}: {address} has no such anchor")
    assert broken == []


@pytest.mark.parametrize("artefact", PLACES)
def test_the_book_holds_what_the_paper_has(html: Path, artefact: str) -> None:
    for chapter, labels in PLACES[artefact].items():
        found = list(html.glob(f"notebooks/{chapter}_*.html"))
        assert found, f"there is no chapter {chapter}"
        targets = read(found[0]).targets
        missing = [label for label in labels if not {label, f"equation-{label}"} & targets]
        assert missing == [], f"chapter {chapter} lacks {missing}"


def test_places_name_every_table_and_figure_of_the_paper() -> None:
    expected = {*(f"table{n}" for n in range(1, 8)), *(f"fig{n}" for n in range(1, 14))}
    assert expected <= PLACES.keys()
