"""The finished points of a landscape under way, kept in a text file; `hessnb.landscape` says what a point is."""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hessnb.errors import InputError

Point = tuple[float, ...]
Values = dict[str, tuple[float, float]]  # of each data set, its loss and its accuracy


class PointFile:
    """Finished points as lines of strict JSON, each with its checksum, behind a header; infinity and NaN are strings.

    Python writes the shortest decimal that reads back as the same float, so values return bit by bit.
    """

    def __init__(self, path: Path, fingerprint: str) -> None:
        self.path, self.intact = path, 0  # bytes of whole lines
        self.header = json.dumps({"what": "points of a hessnb landscape", "fingerprint": fingerprint}).encode() + b"\n"

    def read(self, names: list[str]) -> dict[Point, Values]:
        """Return the finished points; a last line without its end, from a kill in mid-write, does not count."""
        with self._usable():
            content = self.path.read_bytes() if self.path.exists() else b""
        if self.header.startswith(content) and content != self.header:  # nothing, or a part of the header
            return {}
        if not content.startswith(self.header):
            raise InputError(
                f"{self.path} does not hold points of this landscape, but of other weights, directions, data or loss, "
                "or something else; give another file, or remove this one"
            )
        self.intact = content.rindex(b"\n") + 1
        values = {}
        for record in _records(self.path, content):
            pairs = [(float(record["losses"][name]), float(record["accuracies"][name])) for name in names]
            values[tuple(map(float, record["at"]))] = dict(zip(names, pairs, strict=True))
        return values

    def prepare(self) -> None:
        """Cut off what is not a whole line, and begin a new file with the header."""
        with self._usable(), self.path.open("ab") as file:
            file.truncate(self.intact)
        if not self.intact:
            self._write(self.header)

    def append(self, point: Point, values: Values) -> None:
        """Put one point on the disk."""

        def column(i: int) -> dict[str, float | str]:
            return {name: pair[i] if math.isfinite(pair[i]) else str(pair[i]) for name, pair in values.items()}

        record: dict[str, Any] = {"at": point, "losses": column(0), "accuracies": column(1)}
        self._write(json.dumps(_sealed(record), allow_nan=False).encode() + b"\n")

    def _write(self, line: bytes) -> None:
        with self._usable(), self.path.open("ab") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())

    @contextmanager
    def _usable(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise InputError(
                f"points cannot be kept in {self.path} ({error.strerror}): give a file that can be read and written"
            ) from error


def _sealed(record: dict[str, Any]) -> dict[str, Any]:
    return record | {"crc32": zlib.crc32(json.dumps(record).encode())}


def _records(path: Path, content: bytes) -> Iterator[dict[str, Any]]:
    """Go through what `_sealed` sealed in the whole lines of a file behind its header; raise InputError for damage."""
    for number, line in enumerate(content.split(b"\n")[1:-1], start=2):
        try:
            record = json.loads(line)
            if record != _sealed({name: value for name, value in record.items() if name != "crc32"}):
                raise ValueError("the checksum does not match")
        except (ValueError, AttributeError) as error:
            raise InputError(f"{path} is damaged in line {number}: remove that line, or the file") from error
        yield record


def check(path: Path) -> None:
    """Raise InputError for a file of points in which a whole line is damaged."""
    for _ in _records(path, path.read_bytes()):
        pass
