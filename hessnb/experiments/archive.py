"""Moving finished runs between machines: archives of a bounded size that a store exports and another one imports.

An archive is a zip file of the store's own files, ``<run>/run.json``, ``<run>/<measure>.json`` and, where asked for,
``<run>/weights.safetensors``, with a sealed ``manifest.json``: schema, and size and SHA-256 of each member. A file that
is too large for one archive lies in several, as ``<name>.1of3``. Nothing in it depends on when or where it was written:
the same results give the same bytes (of the same zlib).
"""

from __future__ import annotations

import hashlib
import io
import lzma
import re
import tempfile
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hessnb.errors import InputError
from hessnb.experiments.files import clear_errors, read_tensors, seal, unseal, write_whole
from hessnb.experiments.provenance import line
from hessnb.experiments.results import Outcome, measurement_from_json, run_result_from_json, without_origin
from hessnb.experiments.spec import RunSpec
from hessnb.experiments.store import Store

SCHEMA = 1
MANIFEST = "manifest.json"
WEIGHTS = "weights.safetensors"

# Bytes that a member takes beside its content and twice its name: its two zip headers and its line of the manifest.
_OVERHEAD = 400
_SMALLEST = 10_000

# What zipfile raises for damaged bytes: a flipped one may ask for a compression, a version or a password that it lacks
# (RuntimeError and a subclass of it), or point before the beginning of the file (ValueError).
_DAMAGE = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, RuntimeError, ValueError)


@dataclass(frozen=True)
class _Piece:
    """A member to be: the bytes of a file from ``start`` to ``stop``."""

    name: str
    path: Path
    start: int
    stop: int

    def content(self) -> bytes:
        with self.path.open("rb") as file:
            file.seek(self.start)
            return file.read(self.stop - self.start)


def export(
    store: Store, folder: Path, name: str, outcomes: Sequence[Outcome], *, weights: bool, max_size: int
) -> list[Path]:
    """Write finished runs as archives ``<name>-1of2.zip``, ..., of at most ``max_size`` bytes, and return their paths.

    Raises InputError for a size that is too small, and for a folder that holds archives of another export.
    """
    if max_size < _SMALLEST:
        raise InputError(f"archives of at most {max_size} bytes: at least {_SMALLEST} are needed")
    groups = list(_groups(_pieces(store, outcomes, weights, max_size), max_size))
    paths = [folder / f"{name}-{i + 1}of{len(groups)}.zip" for i in range(len(groups))]
    with clear_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    ours = re.compile(re.escape(name) + r"-\d+of\d+\.zip")
    if others := sorted(path for path in folder.iterdir() if ours.fullmatch(path.name) and path not in paths):
        raise InputError(f"{others[0]} is of another export: remove those of {name}, or choose another folder")
    for path, group in zip(paths, groups, strict=True):
        content = _packed({piece.name: piece.content() for piece in group})
        if len(content) > max_size:
            raise InputError(f"{path} would be too large: the store has changed meanwhile, export it again")
        if not path.exists() or path.read_bytes() != content:
            write_whole(path, content)
    return paths


def _pieces(store: Store, outcomes: Sequence[Outcome], weights: bool, max_size: int) -> Iterator[_Piece]:
    for outcome in outcomes:
        spec, names = outcome.task.spec, ["run.json", *sorted(f"{m.slug}.json" for m in outcome.measurements)]
        if weights and "weights" in store.names(spec):
            store.weights(spec)  # for its checksum
            names.append(WEIGHTS)
        for name in names:
            path = store.file(spec, name)
            whole = f"{spec.slug}/{name}"
            size, room = path.stat().st_size, max_size - _OVERHEAD - 2 * len(whole) - 1000
            n = -(-size // room)
            for i in range(n):
                piece = whole if n == 1 else f"{whole}.{i + 1}of{n}"
                yield _Piece(piece, path, i * room, min(size, (i + 1) * room))


def _groups(pieces: Iterator[_Piece], max_size: int) -> Iterator[list[_Piece]]:
    """Put pieces together, in order, as long as they fit into one archive."""
    group: list[_Piece] = []
    full = 0
    for piece in pieces:
        content = piece.content()
        stored = len(content) if WEIGHTS in piece.name else len(zlib.compress(content, 9))
        size = min(stored + 100, len(content) + 100) + _OVERHEAD + 2 * len(piece.name)
        if group and full + size > max_size - 500:
            yield group
            group, full = [], 0
        group.append(piece)
        full += size
    if group:
        yield group


def _packed(members: Mapping[str, bytes]) -> bytes:
    manifest = {
        "schema": SCHEMA,
        "members": {
            name: {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
            for name, content in members.items()
        },
    }
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in ((MANIFEST, seal(manifest)), *members.items()):
            info = zipfile.ZipInfo(name)  # of the date 1980-01-01
            info.create_system, info.external_attr = 3, 0o644 << 16
            method = zipfile.ZIP_STORED if WEIGHTS in name else zipfile.ZIP_DEFLATED
            archive.writestr(info, content, compress_type=method, compresslevel=9)
    return buffer.getvalue()


# -- the way in ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Imported:
    """What an import did: the files that it wrote, as ``<run>/<file>``, and how many were there already."""

    written: list[str]
    there: int


@dataclass(frozen=True)
class _Incoming:
    """What comes in of one run: its new files, the conflicts with what is there, and whether all must be replaced."""

    spec: RunSpec
    new: list[str]
    there: int
    conflicts: list[str]
    anew: bool


def import_(store: Store, files: Sequence[Path], *, replace: bool = False) -> Imported:
    """Merge archives into a store: all is verified, compared and locked, then whole files are written, run by run.

    A result that is there already, equal but for where and when it was computed, stays. Raises InputError for a file
    that is damaged or of a newer schema, for a member that is not what its name says, for a run that another process is
    at work on, and for a result that differs from a finished one, unless ``replace`` is given: a run that is replaced
    takes everything that was computed on it with it. Whatever is refused, nothing has been imported.
    """
    with ExitStack() as stack:
        archives = _Archives([(path, stack.enter_context(_opened(path))) for path in files])
        incoming = [_compared(store, slug, archives) for slug in sorted(archives.runs)]
        conflicts = [conflict for one in incoming for conflict in one.conflicts]
        if conflicts and not replace:
            raise InputError(
                f"{len(conflicts)} result(s) differ from finished ones of the store, nothing was imported; "
                f"to replace them: --replace. {'; '.join(conflicts[:3])}"
            )
        lacking = [one for one in incoming if one.new]
        for one in lacking:  # all of them before anything is written, so that a refusal leaves nothing half imported
            stack.enter_context(store.lock(one.spec, wait=False))
        for one in lacking:
            if _compared(store, one.spec.slug, archives) != one:
                raise InputError(f"another process has just changed {one.spec.slug}; import again")
        for one in lacking:
            contents = {name: archives.read(f"{one.spec.slug}/{name}") for name in one.new}
            store.adopt(one.spec, contents, anew=one.anew)
        written = [f"{one.spec.slug}/{name}" for one in incoming for name in one.new]
        return Imported(written, sum(one.there for one in incoming))


def _opened(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    except _DAMAGE as error:
        raise InputError(f"{path} is damaged or no archive of hessnb ({error}); copy or export it again") from error


class _Archives:
    """The members of several archives, verified, by name; those that lie in pieces are put together."""

    def __init__(self, opened: Sequence[tuple[Path, zipfile.ZipFile]]) -> None:
        self._pieces: dict[str, dict[tuple[int, int], tuple[zipfile.ZipFile, str]]] = defaultdict(dict)
        self.runs: dict[str, list[str]] = defaultdict(list)
        for path, archive in opened:
            for member, content in _verified(path, archive):
                name, piece = _split(member)
                earlier = self._pieces[name].get(piece)
                if earlier and earlier[0].read(earlier[1]) != content:
                    raise InputError(f"{path} and another file given have different contents of {member}")
                self._pieces[name][piece] = (archive, member)
        for name, pieces in self._pieces.items():
            n = next(iter(pieces))[1]
            if missing := [f"{name}.{i}of{n}" for i in range(1, n + 1) if (i, n) not in pieces]:
                raise InputError(f"{missing[0]} is in none of the files given; give all files of the export at once")
            slug, _, file = name.partition("/")
            self.runs[slug].append(file)

    def read(self, name: str) -> bytes:
        """Return the content of a file."""
        return b"".join(archive.read(member) for _, (archive, member) in sorted(self._pieces[name].items()))


def _split(member: str) -> tuple[str, tuple[int, int]]:
    """Return the name of the file that a member belongs to, and which of how many pieces it is."""
    name, _, piece = member.rpartition(".")
    i, of, n = piece.partition("of")
    return (name, (int(i), int(n))) if of and i.isdigit() and n.isdigit() else (member, (1, 1))


def _verified(path: Path, archive: zipfile.ZipFile) -> Iterator[tuple[str, bytes]]:
    """Go through the members of an archive with their contents; raise InputError if one is not as the manifest says."""
    contents = {}
    try:
        for name in archive.namelist():
            contents[name] = archive.read(name)
    except (*_DAMAGE, OSError) as error:
        raise InputError(f"{path} is damaged ({error}); copy or export it again") from error
    if MANIFEST not in contents:
        raise InputError(f"{path} is no archive of hessnb: it has no {MANIFEST}")
    manifest = unseal(contents.pop(MANIFEST), f"{path}: {MANIFEST}")
    schema, members = manifest.get("schema"), manifest.get("members", {})
    if not isinstance(schema, int) or schema > SCHEMA:
        raise InputError(
            f"{path} was written by a newer hessnb (schema {schema}, this one knows {SCHEMA}); update hessnb"
        )
    if members.keys() != contents.keys():
        raise InputError(f"{path} is damaged: it does not hold what its {MANIFEST} lists; copy or export it again")
    for name, content in contents.items():
        if hashlib.sha256(content).hexdigest() != members[name]["sha256"]:
            raise InputError(f"{path} is damaged: the checksum of {name} does not match; copy or export it again")
        yield name, content


def _compared(store: Store, slug: str, archives: _Archives) -> _Incoming:
    """Return what comes in of a run, compared with what the store holds of it."""
    files, where = sorted(archives.runs[slug], key=lambda file: file != "run.json"), f"{slug}/run.json"
    if files[0] != "run.json":  # else nobody knows on which training the measures were taken
        raise InputError(f"{where} is in none of the files given; give all files of the export at once")
    incoming = run_result_from_json(unseal(archives.read(where), where), where)
    spec = incoming.spec
    if spec.slug != slug:
        raise InputError(f"{where} is the run {spec.slug}: its name says {slug}")
    new, conflicts, there = [], [], 0
    known = store.result(spec)
    anew = False
    for file in files:
        content, path = archives.read(f"{slug}/{file}"), store.file(spec, file)
        came_from = _checked(spec, file, content)
        if known is None or not path.exists():
            new.append(file)
        elif _same(file, content, path):
            there += 1
        else:
            new.append(file)
            anew = anew or file in ("run.json", WEIGHTS)
            ours = known.provenance if file == WEIGHTS else unseal(path.read_bytes(), path)["provenance"]
            theirs = incoming.provenance if file == WEIGHTS else came_from
            conflicts.append(f"{slug}/{file}: here {line(spec.label, ours)}; in the file {line(spec.label, theirs)}")
    if anew:
        return _Incoming(spec, files, 0, conflicts, anew=True)
    return _Incoming(spec, new, there, conflicts, anew=False)


def _checked(spec: RunSpec, file: str, content: bytes) -> dict[str, Any]:
    """Return the provenance of a file of a run, {} for weights; raise InputError if it is not what it is called."""
    where = f"{spec.slug}/{file}"
    if file == WEIGHTS:
        if _tensors(content)[1].get("spec") != spec.canonical():
            raise InputError(f"{where} holds the weights of another run")
        return {}
    body = unseal(content, where)
    if file == "run.json":
        return run_result_from_json(body, where).provenance
    found = measurement_from_json(body, where)
    if file != f"{found.measure.slug}.json":
        raise InputError(f"{where} is the measure {found.measure.slug}: its name says {file}")
    return found.provenance


def _tensors(content: bytes) -> tuple[dict[str, Tensor], dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / WEIGHTS
        path.write_bytes(content)
        return read_tensors(path)


def _same(file: str, content: bytes, path: Path) -> bool:
    """Return whether two files hold the same result, wherever and whenever it was computed."""
    if path.read_bytes() == content:
        return True
    if file == WEIGHTS:  # of the same tensors safetensors does not always write the same bytes
        (a, _), (b, _) = read_tensors(path), _tensors(content)
        return a.keys() == b.keys() and all(torch.equal(tensor, b[name]) for name, tensor in a.items())
    ours, theirs = (without_origin(unseal(c, path)) for c in (path.read_bytes(), content))
    return ours == theirs
