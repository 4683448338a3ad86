"""Alternative texts: the pictures in HTML and in Markdown that say nothing to those who do not see them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from html.parser import HTMLParser

_IMG = "an <img> without an alternative text (alt)"
_SVG = "an <svg> without a label (aria-label, or a <title> that comes first in it; aria-hidden where it only adorns)"
_UNREADABLE = 'HTML that cannot be read to its end (it holds "<![")'
_MARKDOWN = "a Markdown picture without an alternative text (between its square brackets)"


def missing_in_html(text: str) -> list[str]:
    """Return one phrase for each ``<img>`` and ``<svg>`` without a description, also in what a script holds as JSON."""
    reader = _Reader()
    try:
        reader.feed(text)
        reader.close()
    except AssertionError:  # how Python 3.11's parser meets a "<![" that begins nothing it knows
        reader.missing.append(_UNREADABLE)
    return reader.missing


def missing_in_markdown(text: str) -> list[str]:
    """Return one phrase for each picture without a description, in Markdown's own notation or as HTML."""
    # Read from each picture on: before it a "<" is a formula's as well as a tag's.
    pieces = re.split(r"(?i)(?=<(?:img|svg)\b)", text)
    own = [_MARKDOWN] * len(re.findall(r"!\[\s*\][(\[]", text))
    return own + [phrase for piece in pieces for phrase in missing_in_html(piece)]


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.missing: list[str] = []
        self._before = ""  # the start tag before this one
        self._svgs = 0  # that are open: one inside another is a part of its picture
        self._silent = False  # whether nothing has been said of the open picture yet
        self._in_title = False
        self._script: list[str] | None = None  # what was read of the open one

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        told = {name: (value or "").strip() for name, value in reversed(attrs)}  # of one name the first counts
        if tag == "img" and not told.get("alt"):
            self.missing.append(_IMG)
        if tag == "svg":
            self._svgs += 1
            if self._svgs == 1:
                labelled = told.get("aria-label") or told.get("aria-labelledby")
                self._silent = not labelled and told.get("aria-hidden") != "true"
        self._in_title = tag == "title" and self._before == "svg" and self._svgs == 1
        self._before = tag
        if tag == "script":
            self._script = []

    def handle_data(self, data: str) -> None:
        if self._script is not None:
            self._script.append(data)
        elif self._in_title and data.strip():
            self._silent = False

    def handle_endtag(self, tag: str) -> None:
        self._in_title = False
        if tag == "svg":
            self._svgs = max(0, self._svgs - 1)
            if self._svgs == 0:
                self._end_picture()
        if tag == "script" and self._script is not None:
            with suppress(ValueError):  # code, and what it draws is not written in it
                held = json.loads("".join(self._script))
                self.missing += [phrase for text in _texts(held) for phrase in missing_in_html(text)]
            self._script = None

    def close(self) -> None:
        super().close()
        self._end_picture()

    def _end_picture(self) -> None:
        if self._silent:
            self.missing.append(_SVG)
        self._silent = False


def _texts(value: object) -> Iterator[str]:
    """Yield the strings in what JSON holds."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts(part)
